"""What one training step sees, as a function of (seed, step) alone: samples, noise, times and labels.

B batch, C latent channels, h x w latent cells, R pixels a side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from haste.data import order
from haste.data.ahead import made_ahead
from haste.files.store import Store

CPU = torch.device("cpu")
WORKERS = 2  # drawing normal numbers is most of the work, and numpy lets others run meanwhile


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of one step."""

    step: int
    moments: Tensor  # (B, 2C, h, w) float32: mean and std of the latents, unscaled
    draw: Tensor  # (B, C, h, w) float32, standard normal: z = mean + std * draw
    noise: Tensor  # (B, C, h, w) float32, standard normal: eps
    t: Tensor  # (B,) float32 in [0, 1]
    labels: Tensor  # (B,) int64; `null_class` where the label is dropped
    images: Tensor | None  # (B, R, R, 3) uint8, only when a teacher looks at them
    targets: Mapping[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)  # (teacher, field) -> (B, ...)
    rows: Tensor | None = None  # (B,) int64: the samples' places in the batch of all processes
    weights: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # term -> (B,) float64, see `Batches`

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed in the same way."""
        changed: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(self) if field.name != "step"):
            found = getattr(self, name)
            if isinstance(found, Mapping):
                changed[name] = {key: change(x) for key, x in found.items()}
            else:
                changed[name] = None if found is None else change(found)
        return Batch(self.step, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; to a GPU from pinned memory, without waiting."""
        if device.type == "cpu":
            return self
        return self.map(lambda x: x.pin_memory().to(device, non_blocking=True))

    def parts(self, count: int) -> list[Batch]:
        """The batch cut into equal parts, in order: what accumulating a gradient goes through."""
        return [self.map(lambda x, i=i: x.chunk(count)[i]) for i in range(count)]  # type: ignore[misc]


class Times(Protocol):
    """What batches ask of a process, a `haste.diffusion.process.Process`."""

    def times(self, uniforms: Callable[[str], np.ndarray], normals: Callable[[str], np.ndarray]) -> Tensor:
        """(B,) float32 in [0, 1]."""

    def place(self, t: float) -> float:
        """The time nearest to t that it has."""


class Batches:
    """Batches of the training split of a latents store, and of the images they were encoded from."""

    def __init__(
        self,
        latents: Store,
        images: Store | None,
        *,
        seed: int,
        size: int,
        null_class: int,
        class_dropout: float,
        process: Times,
        targets: Mapping[str, tuple[Store, Sequence[str]]] | None = None,
        t_min: Mapping[str, float] | None = None,
    ):
        """
        Args:
            latents: store with fields `moments` and `label`.
            images: store with field `image`, or None where no teacher looks.
            seed: decides order, noise, times and dropped labels.
            size: samples a batch, B.
            null_class: label that stands for "no label".
            class_dropout: share of the labels that are dropped, in [0, 1).
            process: draws the times.
            targets: teacher -> its store of targets, a row an image, and the fields to read.
            t_min: alignment term -> the time below which a sample does not count for it. A batch then has weights for
                that term: those of samples that count are equal, the others 0, and over the batch of all processes
                they add up to B (to 0 where no sample counts). So a mean over samples, each times its weight, is the
                mean over those that count, also as the average over equal parts of the batch: in whatever process.

        Raises:
            ValueError: the latents, or the targets, were made from other images.
        """
        self.targets = dict(targets or {})
        self.process = process
        self.t_min = {term: process.place(low) for term, low in (t_min or {}).items()}
        others = [(images.identity, images)] if images is not None else []
        others += [(store.manifest["images"], store) for store, _ in self.targets.values()]
        for identity, other in others:
            if latents.manifest["images"] != identity:
                raise ValueError(
                    f"{latents.folder}: encoded from images {latents.manifest['images'][:12]}, "
                    f"but {other.folder} holds {identity[:12]}"
                )
        self.latents, self.images = latents, images
        self.seed, self.size = seed, size
        self.null_class, self.class_dropout = null_class, class_dropout
        self.samples = latents.range("train")
        if len(self.samples) < size:
            raise ValueError(
                f"{latents.folder}: holds {len(self.samples)} training samples, fewer than training.batch {size}"
            )

    def __call__(self, step: int, visits: range | None = None) -> Batch:
        """The batch of the step that comes after `step` steps, or only its rows `visits`, which are the same then."""
        visits = range(self.size) if visits is None else visits
        chosen = self.samples.start + order.batch_indices(self.seed, step, self.size, len(self.samples))
        chosen = chosen[visits.start : visits.stop]
        moments, labels = self._encoded(chosen)
        shape = _shape_of(moments)
        dropped = order.uniforms(self.seed, "class dropout", step, visits) < self.class_dropout
        return Batch(
            step=step,
            moments=moments,
            draw=torch.from_numpy(order.normals(self.seed, "latent draw", step, visits, shape)),
            noise=torch.from_numpy(order.normals(self.seed, "noise", step, visits, shape)),
            t=self._times(step, visits),
            labels=torch.from_numpy(np.where(dropped, self.null_class, labels)),
            **self._for_teachers(chosen),
            rows=torch.arange(visits.start, visits.stop),
            weights=self._weights(step, visits),
        )

    def reading_indices(self, count: int) -> np.ndarray:
        """`count` random training images to measure with, or all if there are fewer: the same whenever it is asked.

        (M,) int64, places in the stores; those of a smaller count are the first of them.
        """
        return self.samples.start + order.choice(self.seed, "measured images", 0, count, len(self.samples))

    def measured(self, indices: np.ndarray, rows: range) -> Batch:
        """Images of `indices` in their order, with labels, without times. Latent draw and noise are each image's own:
        what is measured twice differs by the weights alone."""
        chosen = indices[rows.start : rows.stop]
        moments, labels = self._encoded(chosen)
        shape = _shape_of(moments)
        return Batch(
            step=0,
            moments=moments,
            draw=torch.from_numpy(order.normals(self.seed, "measured latent draw", 0, chosen.tolist(), shape)),
            noise=torch.from_numpy(order.normals(self.seed, "measured noise", 0, chosen.tolist(), shape)),
            t=torch.zeros(len(chosen)),
            labels=torch.from_numpy(labels),
            **self._for_teachers(chosen),
            rows=torch.arange(rows.start, rows.stop),
        )

    def _encoded(self, chosen: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Moments and labels of some images."""
        moments = torch.from_numpy(self.latents.read("moments", chosen).astype(np.float32))
        labels = self.latents.read("label", chosen)
        self._check(chosen, moments, labels)
        return moments, labels

    def _for_teachers(self, chosen: np.ndarray) -> dict[str, Any]:
        """What a batch has for or from teachers."""
        images = None if self.images is None else torch.from_numpy(self.images.read("image", chosen))
        stored = {
            (name, field): torch.from_numpy(store.read(field, chosen))
            for name, (store, fields) in self.targets.items()
            for field in fields
        }
        return {"images": images, "targets": stored}

    def _times(self, step: int, visits: range) -> Tensor:
        """(visits,) float32."""
        return self.process.times(
            lambda purpose: order.uniforms(self.seed, purpose, step, visits),
            lambda purpose: order.normals(self.seed, purpose, step, visits, ()),
        )

    def _weights(self, step: int, visits: range) -> dict[str, Tensor]:
        """Times are a function of position: every process knows those of the whole batch, and nobody has to ask."""
        if not self.t_min:
            return {}
        times = self._times(step, range(self.size)).double()
        counts = {term: (times >= low).double() for term, low in self.t_min.items()}
        share = {term: count * (self.size / max(1.0, count.sum().item())) for term, count in counts.items()}
        return {term: weights[visits.start : visits.stop] for term, weights in share.items()}

    def _check(self, chosen: np.ndarray, moments: Tensor, labels: np.ndarray) -> None:
        """Refuse latents that no encoder writes, before a step turns them into losses that say nothing of the cause."""
        if not moments.isfinite().all():
            broken = int(chosen[int((~moments.flatten(1).isfinite().all(dim=1)).nonzero()[0, 0])])
            raise ValueError(f"{self.latents.folder}: latents of image {broken} are not finite, expected numbers")
        most = max(0, self.null_class - 1)  # images without labels all have 0, which then is the null class
        if len(labels) and not (labels.min() >= 0 and labels.max() <= most):
            raise ValueError(f"{self.latents.folder}: labels {labels.min()}..{labels.max()}, expected 0..{most}")

    def ahead(
        self,
        steps: Iterable[int],
        visits: range | None = None,
        device: torch.device = CPU,
        depth: int = 3,
    ) -> Iterator[Batch]:
        """The batches of many steps in order, made and moved to a device in threads, `depth` of them ahead of use."""

        def make(step: int) -> Batch:
            return self(step, visits).to(device)

        return made_ahead(make, steps, threads=WORKERS, depth=depth, name="batches")


def _shape_of(moments: Tensor) -> tuple[int, ...]:
    """(C, h, w) of the latents that these are mean and std of."""
    channels, *cells = moments.shape[1:]
    return (channels // 2, *cells)
