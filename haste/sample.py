"""Samples of a state: one shard of images and their features, drawn such that image i depends on (seed, i) alone.

B batch, C latent channels, h x w latent cells, R pixels a side.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from haste import artefact
from haste.config import Sampling
from haste.data import order
from haste.data.latents import Autoencoder, to_pixels
from haste.data.store import Store, shard_range, write_shard
from haste.diffusion.guidance import guided
from haste.diffusion.paths import PATHS
from haste.diffusion.samplers import SAMPLERS
from haste.journal import clock
from haste.metrics.detectors import Detector
from haste.models.sit import SiT

log = logging.getLogger("haste.sample")


@dataclasses.dataclass(frozen=True)
class Painter:
    """What turns seeds into images: a model, how it is sampled, and the decoder."""

    model: SiT
    sampling: Sampling
    autoencoder: Autoencoder
    path: str
    scale: float
    shift: float

    def labels(self, indices: range) -> np.ndarray:
        """The class asked of each image, (B,) int64."""
        classes = self.model.null_class
        if self.sampling.labels == "balanced":
            return np.asarray(indices, dtype=np.int64) % classes
        drawn = order.uniforms(self.sampling.seed, "sample label", 0, indices)
        return np.minimum((drawn * classes).astype(np.int64), classes - 1)

    @torch.inference_mode()
    def paint(self, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, R, R, 3) uint8 and their labels (B,) int64."""
        sampling, seed = self.sampling, self.sampling.seed
        shape = (self.model.in_channels, self.model.input_size, self.model.input_size)
        labels = self.labels(indices)
        velocity = guided(
            self._velocity,
            torch.from_numpy(labels),
            self.model.null_class,
            sampling.guidance,
            (sampling.interval[0], sampling.interval[1]),
        )
        x = torch.from_numpy(order.normals(seed, "sample start", 0, indices, shape))
        sampler = SAMPLERS[sampling.sampler]
        if sampler.stochastic:
            x = sampler.run(
                velocity,
                x,
                sampling.steps,
                lambda step: torch.from_numpy(order.normals(seed, "sample noise", step, indices, shape)),
                PATHS[self.path],
            )
        else:
            x = sampler.run(velocity, x, sampling.steps)
        decoded = self.autoencoder.decode(x.float(), scale=self.scale, shift=self.shift)
        return to_pixels(decoded, sampling.pixels).numpy(), labels

    def _velocity(self, x: Tensor, t: float, labels: Tensor) -> Tensor:
        return self.model(x.float(), torch.full((len(x),), t, dtype=torch.float32), labels)[0]


def draw_shard(
    painter: Painter,
    detector: Detector,
    *,
    samples: Path,
    features: Path,
    key: str,
    recipe: dict,
    shard: int,
    shards: int,
    batch: int,
    inputs: dict[str, str],
) -> None:
    """Draw one shard: ADM's .npz (`arr_0` uint8 NHWC, `arr_1` labels) and the features store's shard, in one pass.

    Args:
        painter: what draws.
        detector: what looks at the images.
        samples: the .npz to write.
        features: folder of the features store.
        key: the features store's key.
        recipe: the features store's recipe.
        shard: which shard, from 0.
        shards: how many there are.
        batch: images drawn at once; changes nothing but float rounding.
        inputs: identities of state, autoencoder and detector, to be recorded.
    """
    started, total = time.monotonic(), painter.sampling.count
    indices = shard_range(total, shard, shards)
    images, labels = [], []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for low in range(0, len(indices), batch):
            pictures, asked = painter.paint(indices[low : low + batch])
            images.append(pictures)
            labels.append(asked)
            yield _seen(detector, pictures, asked)

    write_shard(
        features,
        kind="features",
        key=key,
        recipe=recipe,
        shard=shard,
        shards=shards,
        total=total,
        fields=_fields(detector),
        batches=batches(),
        provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
        facts={"detector": detector.identity, **inputs},
        progress=lambda done, count: _show(shard, shards, done, count, time.monotonic() - started),
    )
    side = painter.autoencoder.factor * painter.model.input_size
    header = {"schema": artefact.SCHEMA, "kind": "samples", "classes": painter.model.null_class}
    header |= artefact.provenance(key=key, recipe=recipe, inputs=inputs, seconds=time.monotonic() - started)
    with artefact.replacing(samples) as aside, open(aside, "wb") as file:
        np.savez(
            file,
            arr_0=np.concatenate([np.zeros((0, side, side, 3), np.uint8), *images]),
            arr_1=np.concatenate([np.zeros(0, np.int64), *labels]),
            haste=np.array(artefact.canonical(header)),
        )


def _seen(detector: Detector, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of a features store: what a detector says of images, beside their labels."""
    found = detector(torch.from_numpy(images))
    return {**{name: value.numpy() for name, value in found.items()}, "label": labels}


def _fields(detector: Detector) -> dict[str, tuple[tuple[int, ...], str]]:
    return {**{name: ((width,), "float32") for name, width in detector.outputs.items()}, "label": ((), "int64")}


def _show(shard: int, shards: int, done: int, count: int, seconds: float) -> None:
    to_go = clock(seconds / done * (count - done)) if done else "?"
    log.info("shard %d of %d: %d/%d images  %.1f images/s  %s to go", shard, shards, done, count, done / seconds, to_go)


def reference_shard(
    images: Store, detector: Detector, *, folder: Path, key: str, recipe: dict, batch: int = 256
) -> None:
    """Features of the real training images: the one-shard store that samples are compared with."""
    rows = images.range("train")

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for low in range(0, len(rows), batch):
            chosen = rows[low : low + batch]
            yield _seen(detector, images.read("image", chosen), images.read("label", chosen))

    inputs = {"images": images.identity, "detector": detector.identity}
    write_shard(
        folder,
        kind="features",
        key=key,
        recipe=recipe,
        shard=0,
        shards=1,
        total=len(rows),
        fields=_fields(detector),
        batches=batches(),
        provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
        facts=inputs,
    )
