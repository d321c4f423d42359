"""Batches of training as a function of (seed, step): samples, noise, times and conditions.

B batch, C latent channels, h x w latent cells, R pixels per side.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from haste.config import EVALUATION, condition_in, process_in
from haste.data import order
from haste.data.ahead import made_ahead, spread
from haste.data.condition import Condition
from haste.files.store import Reads, Span, Store, one_by_one
from haste.networks.devices import sent
from haste.networks.spec import each

CPU = torch.device("cpu")
AHEAD = 3  # batches that are made, and on the device, before their step
WORKERS = 2  # drawing normal numbers is most of the work, and numpy releases Python's lock meanwhile


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of one step."""

    step: int
    moments: Tensor  # (B, 2C, h, w) float32: mean and std of the latents, unscaled
    draw: Tensor  # (B, C, h, w) float32, standard normal: z = mean + std * draw
    noise: Tensor  # (B, C, h, w) float32, standard normal: eps
    t: Tensor  # (B,) float32 in [0, 1]
    condition: Tensor | Mapping[str, Tensor]  # the network's input y, one row per sample; see `Condition`
    images: Tensor | None  # (B, R, R, 3) uint8, only if a teacher runs online
    targets: Mapping[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)  # (teacher, field) -> (B, ...)
    rows: Tensor | None = None  # (B,) int64: the samples' positions in the batch of all ranks
    weights: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # term -> (B,) float64, see `Batches`

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function applied to every tensor."""
        changed: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(self) if field.name != "step"):
            found = getattr(self, name)
            changed[name] = None if found is None else each(change, found)
        return Batch(self.step, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch, of the host's memory, on a device."""
        return self.map(lambda x: sent(x, device))

    def microbatches(self, count: int) -> list[Batch]:
        """The batch cut into equal parts, in order, for gradient accumulation."""
        return [self.map(lambda x, i=i: x.chunk(count)[i]) for i in range(count)]  # type: ignore[misc]


class Times(Protocol):
    """The part of `haste.diffusion.process.Process` that batches use."""

    def times(self, uniforms: Callable[[str], np.ndarray], normals: Callable[[str], np.ndarray]) -> Tensor:
        """(B,) float32 in [0, 1]."""

    def place(self, t: float) -> float:
        """Its time nearest to t."""


class Batches:
    """Batches of the training split of a latents store, and of the images they were encoded from."""

    def __init__(
        self,
        latents: Store,
        images: Store | None,
        *,
        seed: int,
        size: int,
        process: Times,
        condition: Condition,
        class_dropout: float,
        flipped: Store | None = None,
        targets: Mapping[str, tuple[Store, Sequence[str]]] | None = None,
        bands: Mapping[str, tuple[float, float]] | None = None,
    ):
        """
        Args:
            latents: store with `moments` and what the condition keeps beside them.
            images: store with field `image`, or None if no teacher runs online.
            seed: determines order, noise, times and dropped conditions.
            size: samples per batch, B.
            process: draws the times.
            condition: the condition of samples.
            class_dropout: share of the samples that get the null condition, in [0, 1).
            flipped: store of the mirrored images' latents; half of a step's samples are then mirrored, for the teacher
                too. None mirrors none. What is measured never is.
            targets: teacher -> its store of targets, one row per image, and the fields to read.
            bands: alignment term -> the first and the last time at which a sample counts for it. A batch then has
                weights for that term: those of samples that count are equal, the others 0, and they sum to B over the
                batch of all ranks (to 0 if no sample counts). So a mean over samples times their weights is the mean
                over those that count, also when averaged over equal parts of the batch on any rank.

        Raises:
            ValueError: the latents, or the targets, were made from other images; or latents of mirrored images by
                another autoencoder.
        """
        self.targets = dict(targets or {})
        self.process, self.condition, self.class_dropout = process, condition, class_dropout
        self.bands = {term: (process.place(low), process.place(high)) for term, (low, high) in (bands or {}).items()}
        _check_images(
            latents, images, [*(store for store, _ in self.targets.values()), *([flipped] if flipped else [])]
        )
        if flipped and flipped.manifest["autoencoder"] != latents.manifest["autoencoder"]:
            raise ValueError(f"{flipped.folder}: was encoded by another autoencoder than {latents.folder}")
        self.latents, self.flipped, self.images = latents, flipped, images
        self.reads: Reads = one_by_one
        self.seed, self.size = seed, size
        self.samples: range | Span = latents.range("train")
        if len(self.samples) < size:
            raise ValueError(
                f"{latents.folder}: holds {len(self.samples)} training samples, fewer than training.batch {size}"
            )

    @classmethod
    def of(
        cls,
        recipe: Mapping[str, Any],
        latents: Store,
        images: Store | None = None,
        condition: Condition | None = None,
        **more: Any,
    ) -> Batches:
        """The batches of a trajectory's recipe; `condition` is the recipe's, opened; `more` as in `__init__`."""
        training = recipe["training"]
        return cls(
            latents,
            images,
            seed=recipe["seed"],
            size=training["batch"],
            process=process_in(recipe),
            condition=condition or condition_in(recipe),
            class_dropout=training["class_dropout"],
            **more,
        )

    def __call__(self, step: int, visits: range | None = None) -> Batch:
        """The batch of the step after `step` steps, or only its rows `visits`, which are the same then."""
        visits = range(self.size) if visits is None else visits
        chosen = self.samples.start + order.batch_indices(self.seed, step, self.size, len(self.samples))
        chosen = chosen[visits.start : visits.stop]
        turned = order.flips(self.seed, step, visits) if self.flipped else None
        rows = self._rows(chosen)
        moments = self._moments(rows, chosen, turned)
        shape = _shape_of(moments)
        return Batch(
            step=step,
            moments=moments,
            draw=torch.from_numpy(order.normals(self.seed, "latent draw", step, visits, shape)),
            noise=torch.from_numpy(order.normals(self.seed, "noise", step, visits, shape)),
            t=self._times(step, visits),
            condition=self._told(rows, chosen, step, visits, self.class_dropout),
            **self._for_teachers(chosen, turned),
            rows=torch.arange(visits.start, visits.stop),
            weights=self._weights(step, visits),
        )

    def of_all(self, latents: Store, condition: Condition, images: Store | None = None) -> Batches:
        """Of all images of another store of latents, whatever its splits are called, to measure with; `condition` is
        opened for them.

        Raises:
            ValueError: the latents were made from other images.
        """
        _check_images(latents, images, [])
        found = copy.copy(self)
        found.condition = condition
        found.latents, found.images, found.targets, found.samples = latents, images, {}, range(latents.count)
        found.flipped = None
        return found

    def reading_indices(self, count: int | None, split: str = "train") -> np.ndarray:
        """`count` random images of a split to measure with, or all if there are fewer; the same at every call.

        (M,) int64, indices in the stores; of a smaller count the first of them. Without a count all, in order.
        """
        samples = self.samples if split in ("train", EVALUATION) else self.latents.range(split)
        if count is None:
            return np.arange(samples.start, samples.stop)
        return samples.start + order.choice(self.seed, "measured images", 0, count, len(samples))

    def measured(self, indices: np.ndarray, rows: range) -> Batch:
        """Images of `indices` in their order, with their conditions not dropped, without times.

        Latent draw and noise depend on the image alone, so two measurements differ only by the weights.
        """
        chosen = indices[rows.start : rows.stop]
        read = self._rows(chosen)
        moments = self._moments(read, chosen)
        shape = _shape_of(moments)
        return Batch(
            step=0,
            moments=moments,
            draw=torch.from_numpy(order.normals(self.seed, "measured latent draw", 0, chosen.tolist(), shape)),
            noise=torch.from_numpy(order.normals(self.seed, "measured noise", 0, chosen.tolist(), shape)),
            t=torch.zeros(len(chosen)),
            condition=self._told(read, chosen, 0, chosen.tolist(), dropout=0.0),
            **self._for_teachers(chosen),
            rows=torch.arange(rows.start, rows.stop),
        )

    def _rows(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Some images' latents, and what the condition keeps beside them."""
        return self.latents.rows(["moments", *self.condition.stored], chosen, self.reads)

    def _moments(self, rows: Mapping[str, np.ndarray], chosen: np.ndarray, turned: np.ndarray | None = None) -> Tensor:
        """Mean and std of some images' latents, of those `turned` (B,) as the encoder saw them mirrored."""
        moments = _finite(self.latents, rows["moments"], chosen)
        if self.flipped is not None and turned is not None and turned.any():
            found = self.flipped.rows(["moments"], chosen[turned], self.reads)["moments"]
            moments[torch.from_numpy(turned)] = _finite(self.flipped, found, chosen[turned])
        return moments

    def _told(
        self, rows: Mapping[str, np.ndarray], chosen: np.ndarray, step: int, visits: Sequence[int], dropout: float
    ) -> Any:
        """The conditions of some images."""
        kept = {name: rows[name] for name in self.condition.stored} | {"index": chosen}
        if fault := self.condition.fault(kept):
            raise ValueError(f"{self.latents.folder}: {fault}")
        told = self.condition.batch(kept, seed=self.seed, step=step, visits=visits, dropout=dropout)
        return each(torch.from_numpy, told)

    def _for_teachers(self, chosen: np.ndarray, turned: np.ndarray | None = None) -> dict[str, Any]:
        """A batch's images, those `turned` (B,) mirrored, and targets for teachers."""
        images = None
        if self.images is not None:
            seen = self.images.rows(["image"], chosen, self.reads)["image"]  # (B, R, R, 3)
            if turned is not None:
                seen[turned] = seen[turned, :, ::-1]
            images = torch.from_numpy(seen)
        stored = {
            (name, field): torch.from_numpy(values)
            for name, (store, fields) in self.targets.items()
            for field, values in store.rows(fields, chosen, self.reads).items()
        }
        return {"images": images, "targets": stored}

    def _times(self, step: int, visits: range) -> Tensor:
        """(visits,) float32."""
        return self.process.times(
            lambda purpose: order.uniforms(self.seed, purpose, step, visits),
            lambda purpose: order.normals(self.seed, purpose, step, visits, ()),
        )

    def _weights(self, step: int, visits: range) -> dict[str, Tensor]:
        """Times are a function of position: every rank computes those of the whole batch without communication."""
        if not self.bands:
            return {}
        times = self._times(step, range(self.size)).double()
        counts = {term: ((low <= times) & (times <= high)).double() for term, (low, high) in self.bands.items()}
        share = {term: count * (self.size / max(1.0, count.sum().item())) for term, count in counts.items()}
        return {term: weights[visits.start : visits.stop] for term, weights in share.items()}

    def ahead(
        self,
        steps: Iterable[int],
        visits: range | None = None,
        device: torch.device = CPU,
        depth: int = AHEAD,
        readers: int = 1,
    ) -> Iterator[Batch]:
        """The batches of many steps in order, made and moved to a device in threads, `depth` of them ahead of use.
        Others, `readers`, read what they consist of: a disk at the other end of a network takes milliseconds a read."""
        with spread(readers, "reads") as reads:
            own = copy.copy(self)
            own.reads = reads
            yield from made_ahead(
                lambda step: own(step, visits).to(device), steps, threads=WORKERS, depth=depth, name="batches"
            )


def _check_images(latents: Store, images: Store | None, targets: Sequence[Store]) -> None:
    others = [(images.identity, images)] if images is not None else []
    for identity, other in [*others, *((store.manifest["images"], store) for store in targets)]:
        if latents.manifest["images"] != identity:
            raise ValueError(
                f"{latents.folder}: encoded from images {latents.manifest['images'][:12]}, "
                f"but {other.folder} holds {identity[:12]}"
            )


def _finite(store: Store, moments: np.ndarray, chosen: np.ndarray) -> Tensor:
    """Latents of some images in float32; refuses values that no encoder writes, because the losses of a step would not
    show the cause."""
    found = torch.from_numpy(moments.astype(np.float32))
    if not found.isfinite().all():
        broken = int(chosen[int((~found.flatten(1).isfinite().all(dim=1)).nonzero()[0, 0])])
        raise ValueError(f"{store.folder}: latents of image {broken} are not finite, expected numbers")
    return found


def _shape_of(moments: Tensor) -> tuple[int, ...]:
    """(C, h, w) of the latents with these means and stds."""
    channels, *cells = moments.shape[1:]
    return (channels // 2, *cells)
