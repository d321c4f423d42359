"""How alike a network and a teacher see images, by layer and t: CKNNA, as in REPA (arXiv 2410.06940), Figures 2 and 3.

The mean over the tokens after a block is compared with the mean over the teacher's patch tokens of the clean image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from haste.align import angle
from haste.config import LABEL, Config, Positive
from haste.measure.hidden import Hidden
from haste.measure.measure import Row, Split

if TYPE_CHECKING:
    from haste.measure.subject import Subject

SPARE = 24  # candidates beside twice as many as are needed with a group left out, which takes some with it

Several = Annotated[int, Field(ge=2)]


class CKNNA(Hidden):
    """See the file.

    Attributes:
        teacher: by its name in the configuration; None is the only one. Its identity is part of the result's name.
        images: number of random images.
        split: see `haste.measure.measure.Split`.
        neighbours: k.
        formula: `hsic`, unbiased HSIC of masked kernels, or `centred`, REPA's Eq. 23.
        shards: groups of images for the jackknife of the standard error. With a group left out, neighbours are those
            among the others; the clamp stays that of all. The error is that of the choice of images.
    """

    needs: ClassVar = frozenset({"teacher"})
    axes: ClassVar = ("layer", "t")
    values: ClassVar = {"cknna": "error"}

    teacher: Annotated[str | None, LABEL] = None
    images: Annotated[int, Field(ge=4)] = 10_000
    split: Split = "held_out"
    neighbours: Positive = 10
    formula: Literal["hsic", "centred"] = "hsic"
    shards: Several = 8

    @model_validator(mode="after")
    def _enough(self) -> CKNNA:
        left = self.images - -(-self.images // min(self.shards, self.images))
        if self.shards > self.images:
            raise ValueError(f"shards {self.shards} are more than images {self.images}, expected at most as many")
        if self.neighbours >= left:
            raise ValueError(
                f"neighbours {self.neighbours}, but without one of {self.shards} shards {left} images are left, "
                "expected more than neighbours"
            )
        return self

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """See `Measure`."""
        return {self.split: ("images", self.images)}

    @property
    def hidden(self) -> Mapping[str, Mapping[str, Any]]:
        """See `Measure`."""
        return {self.split: self.look(self.split, self.images)}

    def unfit(self, config: Config, model: str) -> list[str]:
        """See `Measure`."""
        compared = self.teacher or next(iter(config.teachers), None)
        same = [f"beside: {compared} is the teacher that states are compared with; expected others"]
        return super().unfit(config, model) + (same if compared in self.beside else [])

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`: each rank takes its share of layers and times."""
        from haste.measure import passes, representations

        read, everyone = passes.reader(subject, self.split, self.beside), np.arange(self.images)
        device, candidates = subject.group.device, 2 * self.neighbours * self.shards // (self.shards - 1) + SPARE
        theirs = representations.Neighbours.of(
            passes.teacher_features(subject, self.split).read(passes.FEATURES, everyone), candidates, device=device
        )
        groups = everyone * self.shards // self.images

        def values(*place: Any) -> tuple[float, float]:
            mine = representations.Neighbours.of(read(*place), candidates, device=device)
            value = functools.partial(
                representations.cknna, mine, theirs, self.neighbours, over_all=self.formula == "centred"
            )
            return value(), angle.jackknife(np.array([value(kept=groups != one) for one in range(self.shards)]))

        yield from self.rows(subject, values)
