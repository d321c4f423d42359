"""The cosine between the gradients of alignment and denoising, by block and t (HASTE, arXiv 2505.16792, Tables 1, 2).

Where it is positive, a step along one loss also decreases the other to first order; where it is negative,
alignment works against the denoising loss. This is the quantity of the trigger `gradient-angle`, for any network: of
each alignment term, and of all terms together with the configuration's weights, without warm-up and ramp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from haste.align import angle
from haste.align.triggers import block_of, counting, reached
from haste.config import Positive, Share
from haste.measure.measure import Measure, Row

if TYPE_CHECKING:
    from haste.measure.subject import Subject

TOGETHER = "alignment"  # label of the rows of all terms together
MOST_BYTES = 8e9  # the most that gradients may take at once; larger requests take several passes over the images

Several = Annotated[int, Field(ge=2)]
Terms = Mapping[str, Mapping[str, Any]]


class GradientCosine(Measure):
    """See the file. Images, latent draws and noise are the same for every network, no label is dropped.

    Attributes:
        images: number of random training images; all if there are fewer.
        shards: groups of images for the jackknife of the standard error.
        t: every image is used at each of these; the defaults are those of HASTE's Table 2.
        blocks: blocks with respect to whose parameters the gradients are, counted from 1; `all` is every block that the
            alignment reaches; None is the block whose output the feature loss aligns or, if only attention is aligned,
            the last aligned one.
    """

    needs: ClassVar = frozenset({"alignment"})
    distinct: ClassVar = ("t", "blocks")
    axes: ClassVar = ("term", "t", "block")
    values: ClassVar = {"cosine": "error"}

    images: Several = 256
    shards: Several = 8
    t: Annotated[list[Share], Field(min_length=1)] = [0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 0.8, 0.9]  # noqa: RUF012
    blocks: Literal["all"] | Annotated[list[Positive], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _measurable(self) -> GradientCosine:
        if self.shards > self.images:
            raise ValueError(f"shards {self.shards} are more than images {self.images}, expected at most as many")
        return self

    def faults(self, terms: Terms, blocks: int) -> list[str]:
        """See `Measure`."""
        if not blocks:
            return ["blocks: gradients are taken by block, but the network has no list of its blocks"]
        beyond = [block for block in self._blocks(terms) if block > blocks]
        if beyond:
            return [f"blocks: {beyond}, but the network has blocks 1 to {blocks}"]
        last, kinds = reached(terms), " and ".join(terms)
        found = [
            f"blocks: {block}, but the loss of {kinds} reaches no block after {last}"
            for block in self._blocks(terms)
            if block > last
        ]
        return found + [
            f"t: {t} is not from t_min to t_max of {kinds}: nothing is aligned there"
            for t in self.t
            if not counting(terms, t)
        ]

    def flops(self, terms: int, forward: float, teachers: float) -> float:
        """See `Measure`: a forward pass at every t, and a backward pass for each loss."""
        return self.images * (len(self.t) * (1 + 2 * (terms + 1)) * forward + teachers)

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`."""
        terms = subject.terms
        if not terms:
            return
        for term in terms:
            if late := [t for t in self.t if term not in counting(terms, t, subject.process.place)]:
                subject.notes.append(
                    f"{term} is not aligned at t {', '.join(f'{t:g}' for t in late)}: not from its t_min to t_max"
                )
        blocks = self._blocks(subject.asked)
        for times, some in _passes(self.t, blocks, self._bytes(subject, blocks)):
            yield from self._rows(subject, times, some)

    def _blocks(self, terms: Terms) -> list[int]:
        if self.blocks is None:
            return [block_of(terms)]
        return list(range(1, reached(terms) + 1)) if self.blocks == "all" else list(self.blocks)

    def _bytes(self, subject: Subject, blocks: Sequence[int]) -> float:
        """Bytes of the gradients by one block at one t: float64 sums, and the kept copy of each group."""
        sizes = [sum(p.numel() for p in subject.model.block_list[block - 1].parameters()) for block in blocks]
        return (len(subject.terms) + 1) * max(sizes) * (8 + 4 * self.shards)

    def _rows(self, subject: Subject, times: Sequence[float], blocks: Sequence[int]) -> Iterator[Row]:
        kinds = list(subject.terms)
        products = subject.gradients().products(
            lambda found, _: [found[kind] for kind in [*kinds, "denoising"]],
            len(kinds) + 1,
            images=self.images,
            shards=self.shards,
            times=times,
            blocks=blocks,
        )
        for place, t in enumerate(times):
            for name, terms in _sets(counting(subject.terms, t, subject.process.place)).items():
                weights = np.zeros((2, len(kinds) + 1))
                weights[0, :-1] = [terms[kind]["weight"] if kind in terms else 0.0 for kind in kinds]
                weights[1, -1] = 1.0
                cosines, left_out = angle.cosines(angle.combined(products[place], weights))
                for number, block in enumerate(blocks):
                    if block <= reached(terms):
                        error = angle.jackknife(left_out[number])
                        yield {"term": name, "t": t, "block": block, "cosine": float(cosines[number]), "error": error}


def _sets(terms: Terms) -> dict[str, Terms]:
    """Each term alone, and all together if there are several."""
    found: dict[str, Terms] = {kind: {kind: term} for kind, term in terms.items()}
    return found | ({TOGETHER: terms} if len(terms) > 1 else {})


def _passes(
    times: Sequence[float], blocks: Sequence[int], size: float
) -> Iterator[tuple[Sequence[float], Sequence[int]]]:
    """Times and blocks in parts whose gradients fit, given the bytes of one block at one t."""
    room = max(1, int(MOST_BYTES // size))
    several = max(1, room // len(times))  # of blocks; then as many times as still fit
    at_once = max(1, min(len(times), room // several))
    for first in range(0, len(blocks), several):
        for low in range(0, len(times), at_once):
            yield times[low : low + at_once], blocks[first : first + several]
