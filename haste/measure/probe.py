"""What a linear classifier reads from hidden states, by layer and t: the linear probe of REPA (arXiv 2410.06940).

The classifier is trained on hidden states of training images and judged on others. Both are of noised images
with the null condition, so nothing but the image says what its class is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from haste.config import LATER, Positive, Rate
from haste.measure.hidden import Hidden
from haste.measure.measure import Row

if TYPE_CHECKING:
    from haste.measure.subject import Subject

NOTE = "stored latents have no crops and flips, which the published protocol trains with"


class Probe(Hidden):
    """See the file. Accuracy is the share of the judged images, 0..1, and its error that of a binomial share.

    Attributes:
        images: number of random training images; None for all.
        judged: number of random images to judge it on; None for all.
        split: those of `images.holdout`, `held_out`, or of `evaluation`.
        epochs: passes over the training images.
        warmup: the first of them, over which the rate grows evenly from 0; then it falls to 0 along half a cosine.
        batch: images a step; all of them if there are fewer. What is left over at the end of an epoch is passed over.
        lr: the highest rate, of Adam.
    """

    needs: ClassVar = frozenset({"classes"})
    axes: ClassVar = ("layer", "t")
    values: ClassVar = {"accuracy": "error"}

    images: Positive | None = None
    judged: Positive | None = None
    split: Annotated[Literal["held_out", "evaluation"], LATER] = "held_out"
    epochs: Positive = 90
    warmup: Annotated[int, Field(ge=0)] = 10
    batch: Annotated[int, Field(ge=2)] = 16_384
    lr: Rate = 1e-3

    @model_validator(mode="after")
    def _warm(self) -> Probe:
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup {self.warmup} epochs, expected less than all epochs, {self.epochs}")
        return self

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """See `Measure`."""
        return {"train": ("images", self.images or 2), self.split: ("judged", self.judged or 1)}

    @property
    def hidden(self) -> Mapping[str, Mapping[str, Any]]:
        """See `Measure`."""
        return {"train": self.look("train", self.images), self.split: self.look(self.split, self.judged)}

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`: each rank takes its share of layers and times."""
        from haste.measure import linear, passes

        train, held_out = (passes.reader(subject, split, self.beside) for split in ("train", self.split))
        labels, expected = (subject.labels(split) for split in ("train", self.split))
        how = linear.Training(self.epochs, self.warmup, self.batch, self.lr, self.seed)
        classes = subject.inputs.recipe["classes"]
        subject.notes.append(NOTE)

        def values(*place: Any) -> tuple[float, float]:
            probe = linear.trained(train(*place), labels, classes, how, subject.group.device)
            right = linear.classes_of(probe, held_out(*place)) == expected
            share = float(right.mean())
            return share, math.sqrt(share * (1 - share) / len(right))

        yield from self.rows(subject, values)
