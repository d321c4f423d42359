"""The denoising loss on images, as a rule those held out from training, by t and group of images.

It is the loss that training minimises, without alignment, of a state's averaged weights. Every state sees the same
images, latent draws and noise, and every image is used at each t: two states' losses differ by their weights alone, so
their difference is known much better than either (the pairs of a paired bootstrap are the groups of images).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from haste.config import Share
from haste.measure.measure import Measure, Row, Split

if TYPE_CHECKING:
    from haste.measure.subject import Subject

LEAST = 8  # groups
TIMES = [0.1, 0.3, 0.5, 0.7, 0.9]


class Denoising(Measure):
    """See the file. No label is dropped.

    Attributes:
        weights: as in `Measure`; samples are drawn from the averaged ones.
        split: see `haste.measure.measure.Split`.
        images: number of random images of it; all if there are fewer.
        groups: groups of images of equal size, up to one image; as many as images if there are fewer.
        t: every image is used at each of these.
    """

    distinct: ClassVar = ("t",)
    axes: ClassVar = ("t", "group")
    values: ClassVar = {"loss": ""}
    pooled: ClassVar = "group"

    weights: Literal["model", "ema"] = "ema"
    split: Split = "held_out"
    images: Annotated[int, Field(ge=LEAST)] = 2048
    groups: Annotated[int, Field(ge=LEAST)] = 64
    t: Annotated[list[Share], Field(min_length=1)] = TIMES

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """See `Measure`."""
        return {self.split: ("groups", LEAST)}

    def flops(self, terms: int, forward: float, teachers: float) -> float:
        """See `Measure`: a forward pass at every t."""
        return self.images * len(self.t) * forward

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`."""
        chosen = subject.batches(self.split).reading_indices(self.images, self.split)
        counts = min(self.groups, len(chosen))
        bounds = [len(chosen) * number // counts for number in range(counts + 1)]
        objective = subject.inputs.objective(subject.learner)
        losses = subject.by_image(
            chosen, self.t, 1, lambda batch: lambda t: objective.denoising(batch, t)[None], self.split
        )[:, 0]
        for place, t in enumerate(self.t):
            for group in range(counts):
                mean = losses[place, bounds[group] : bounds[group + 1]].mean()
                yield {"t": t, "group": group, "loss": float(mean)}
