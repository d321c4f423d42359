"""Measures of hidden states: what they have in common, and which states they read. No torch.

Hidden states are those of the network after block m, counted from 1, of images at a time t with the null condition.
`haste.measure.passes` makes them once for all measures that ask for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from haste.config import LABEL, Config, Positive, Share, taps_of
from haste.config.keys import nearest
from haste.measure.measure import Measure, Row
from haste.networks.spec import Tap, blocks

if TYPE_CHECKING:
    from haste.measure.subject import Subject


class Hidden(Measure):
    """The base class of measures of hidden states, by layer and t.

    Attributes:
        layers: after which blocks, counted from 1; `all` that give their tokens.
        t: times of the noised images, in [0, 1].
        beside: teachers, by their names in the configuration, of whose features of the same images, clean, the same is
            measured: `subject.teachers`. Their identities are part of the result's name.
    """

    distinct: ClassVar = ("t", "layers", "beside")

    weights: Literal["model", "ema"] = "ema"  # those that samples are drawn with
    layers: Literal["all"] | Annotated[list[Positive], Field(min_length=1)] = "all"
    t: Annotated[list[Share], Field(min_length=1)] = [0.5]  # noqa: RUF012
    beside: Annotated[list[str], LABEL] = []  # noqa: RUF012

    def look(self, split: str, images: int | None, *, pooled: bool = True) -> dict[str, Any]:
        """What decides the hidden states of some images.

        Args:
            split: see `haste.measure.measure.Split`.
            images: random ones of it, the same at every call; None for all.
            pooled: the mean over a layer's tokens, (D,), and not each token, (N, D).
        """
        own = {"layers": self.layers, "t": self.t, "weights": self.weights, "pooled": pooled}
        return {"split": split, "images": images, "seed": self.seed, **own}

    def places(self, subject: Subject) -> list[tuple[int, float]]:
        """All pairs of a layer and a t."""
        layers = layers_in({"layers": self.layers}, subject.model.taps)
        return [(layer, t) for t in self.t for layer in layers]

    def rows(self, subject: Subject, values: Callable[..., Sequence[float]]) -> Iterator[Row]:
        """A row a layer and t, and of each teacher beside them what `subject.teachers` gets; each is computed on one of
        the ranks. A collective call.

        Args:
            subject: the network.
            values: of a layer and t, or of a teacher, the value and its error.
        """
        ((value, error),) = self.values.items()
        for place, found in subject.shared([*self.places(subject), *((name,) for name in self.beside)], values):
            row = dict(zip((value, error), found, strict=True))
            if len(place) == 1:
                subject.teachers[str(place[0])] = row
            else:
                yield {"layer": place[0], "t": place[1], **row}

    def unfit(self, config: Config, model: str) -> list[str]:
        """See `Measure`."""
        found, known = super().unfit(config, model), blocks(taps_of(config, model), "tokens")
        found += [
            f"beside: {name}, expected teachers{nearest(name, config.teachers)}"
            for name in self.beside
            if name not in config.teachers
        ]
        if not known:
            return [*found, f"layers: {model} has no hidden tokens to read"]
        beyond = [] if self.layers == "all" else [layer for layer in self.layers if layer not in known]
        said = f"{known[0]} to {known[-1]}" if known == list(range(known[0], known[-1] + 1)) else f"{known}"
        return found + ([f"layers: {beyond}, expected of those that {model} has, {said}"] if beyond else [])


def layers_in(look: Mapping[str, Any], taps: Mapping[str, Tap]) -> Sequence[int]:
    """The layers of a `Hidden.look`, of a network with these taps."""
    return blocks(taps, "tokens") if look["layers"] == "all" else look["layers"]


def field(layer: int, t: float) -> str:
    """The field of a store that holds the hidden states after a block at a time."""
    return f"layer {layer}, t {t}"
