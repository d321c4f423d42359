"""How far a network has come along each alignment term, trained on it or not (HASTE, arXiv 2505.16792).

Attention is compared as in training: the cross-entropy of a pair of layers, on average over the pairs. Features are
compared by their cosine, without a projector where the network's tokens are as wide as the teacher's, and through the
state's own projector where it has one. All rows see the same images, latent draws and noise, and the same layers.

B images of a batch, T times, V values, M images in all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from haste.align.terms import of_features
from haste.config import Share
from haste.measure.measure import Measure, Row, Split

if TYPE_CHECKING:
    from torch import Tensor

    from haste.align.losses import TeacherTargets
    from haste.data.batches import Batch
    from haste.measure.subject import Subject

ATTENTION, FEATURES, PROJECTED = "attention, cross-entropy", "features, cosine", "projected features, cosine"
TIMES = [0.1, 0.3, 0.5, 0.7, 0.9]


class Progress(Measure):
    """See the file. No label is dropped. The error is that of the choice of images.

    Attributes:
        split: see `haste.measure.measure.Split`.
        images: number of random images of it; all if there are fewer.
        t: every image is used at each of these.
    """

    needs: ClassVar = frozenset({"named alignment"})
    distinct: ClassVar = ("t",)
    axes: ClassVar = ("term", "t")
    values: ClassVar = {"value": "error"}
    along: ClassVar = "step"

    split: Split = "held_out"
    images: Annotated[int, Field(ge=2)] = 1024
    t: Annotated[list[Share], Field(min_length=1)] = TIMES

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """See `Measure`."""
        return {self.split: ("images", 2)}

    def flops(self, terms: int, forward: float, teachers: float) -> float:
        """See `Measure`: a forward pass at every t."""
        return self.images * (len(self.t) * forward + teachers)

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`."""
        chosen = subject.batches(self.split).reading_indices(self.images, self.split)
        names, look = self._looking(subject)
        values = subject.by_image(chosen, self.t, len(names), look, self.split)  # (T, V, M)
        for number, name in enumerate(names):
            for place, t in enumerate(self.t):
                mine = values[place, number]
                error = float(mine.std(ddof=1)) / math.sqrt(len(mine))
                yield {"term": name, "t": t, "value": float(mine.mean()), "error": error}

    def _looking(self, subject: Subject) -> tuple[Sequence[str], Callable[[Batch], Callable[[Tensor], Tensor]]]:
        """The V terms that can be compared, and what gives their values of a batch."""
        import torch

        terms, names = subject.terms, _names(subject)
        objective = subject.inputs.objective(subject.learner)

        def look(batch: Batch) -> Callable[[Tensor], Tensor]:
            targets = subject.inputs.targets(batch)

            def at(t: Tensor) -> Tensor:
                _, taps, _ = objective.predicted(batch, t)
                found = []
                for term, projected in names.values():
                    seen = targets[terms[term]["teacher"]]
                    each = [_value(objective, term, projected, _only(i, taps), _only(i, seen)) for i in range(len(t))]
                    found.append(torch.stack(each))
                return torch.stack(found)

            return at

        return list(names), look


def _names(subject: Subject) -> dict[str, tuple[str, bool]]:
    """What can be compared: its name -> the term, and whether its projector is used; notes what cannot."""
    terms, names = subject.terms, dict[str, tuple[str, bool]]()
    if "attention" in terms:
        names[ATTENTION] = ("attention", False)
    for name, term in of_features(terms).items():
        block, teacher = term["depth"], term["teacher"]
        own, theirs = subject.model.taps[f"tokens.{block}"].width, subject.inputs.widths[teacher]
        if own == theirs:
            names[FEATURES.replace("features", name)] = (name, False)
        else:
            subject.notes.append(
                f"{name} without a projector left out: tokens after block {block} have width {own}, those of "
                f"{teacher} {theirs}"
            )
        if name in subject.projected:
            names[PROJECTED.replace("features", name)] = (name, True)
    return names


def _value(objective: Any, term: str, projected: bool, taps: Mapping[str, Any], seen: TeacherTargets) -> Tensor:
    """One term of one image."""
    from haste.align.losses import feature_loss
    from haste.train.step import feature_target

    if term == "attention":
        return objective.attention(taps, seen)
    assert seen.features is not None
    tokens, target = objective.tokens(term, taps, seen), feature_target(seen.features, objective.terms[term])
    if projected:
        tokens = objective.projectors[term](tokens, seen.grid)
    return -feature_loss(tokens, target)


def _only(i: int, found: Any) -> Any:
    """Activations of a batch, of its image i alone."""
    if isinstance(found, Mapping):
        return {name: _only(i, one) for name, one in found.items()}
    if isinstance(found, tuple):
        parts = [_only(i, one) for one in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(found) and not isinstance(found, type):  # a teacher's
        return dataclasses.replace(
            found, **{name: _only(i, getattr(found, name)) for name in ("features", "attention")}
        )
    return None if found is None else found[i : i + 1]
