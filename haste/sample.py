"""Samples of a state, drawn such that image i depends on (seed, i) alone, and what detectors see in them.

B batch, C latent channels, h x w latent cells, R pixels a side.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste import artefact
from haste.config import Sampling
from haste.data import drawn, order
from haste.data.latents import Autoencoder, to_pixels
from haste.data.samples import open_samples
from haste.data.store import Store, shard_range, write_shard
from haste.diffusion.guidance import guided
from haste.diffusion.paths import PATHS
from haste.diffusion.samplers import SAMPLERS, Counted
from haste.journal import clock
from haste.metrics.detectors import Detector
from haste.models.denoiser import Denoiser
from haste.npz import SUFFIX, check_reference
from haste.score.sides import read_reference
from haste.score.workflow import MOMENTS

log = logging.getLogger("haste.sample")
_NONE = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class Painter:
    """What turns seeds into images: a model, how it is sampled, and the decoder."""

    model: Denoiser
    sampling: Sampling
    autoencoder: Autoencoder
    path: str
    scale: float
    shift: float

    def labels(self, indices: range) -> np.ndarray:
        """The class asked of each image, (B,) int64."""
        classes = self.model.null_class
        if not classes:  # a model without labels knows the null class alone, which is 0
            return np.zeros(len(indices), dtype=np.int64)
        if self.sampling.labels == "balanced":
            return np.asarray(indices, dtype=np.int64) % classes
        drawn = order.uniforms(self.sampling.seed, "sample label", 0, indices)
        return np.minimum((drawn * classes).astype(np.int64), classes - 1)

    def paint(self, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, R, R, 3) uint8 and their labels (B,) int64."""
        found = self.draw(indices)
        return found["image"], found["label"]

    @torch.inference_mode()
    def draw(self, indices: range, told: Callable[[float], None] = lambda share: None) -> dict[str, np.ndarray]:
        """Images as `paint` gives them, under `image`, their `label`, and `nfe`: evaluations of each, (B,) int64.

        A guided evaluation counts once. `told` hears the share of the work that is done, before every evaluation.
        """
        sampling, seed = self.sampling, self.sampling.seed
        shape = (self.model.in_channels, self.model.input_size, self.model.input_size)
        labels, device = self.labels(indices), next(self.model.parameters()).device
        counts = torch.zeros(len(indices), dtype=torch.int64)
        field = guided(
            self._velocity,
            torch.from_numpy(labels).to(device),
            self.model.null_class,
            sampling.guidance,
            (sampling.interval[0], sampling.interval[1]),
            None if sampling.guided_channels == "all" else sampling.guided_channels,
        )
        velocity = Counted(field, counts, told)

        def normals(purpose: str, step: int) -> Tensor:
            return torch.from_numpy(order.normals(seed, purpose, step, indices, shape)).to(device)

        x, sampler = normals("sample start", 0), SAMPLERS[sampling.sampler]
        if sampler.evaluations is None:
            x = sampler.run(velocity, x, sampling.rtol, sampling.atol)
        elif sampler.stochastic:
            x = sampler.run(velocity, x, sampling.steps, lambda i: normals("sample noise", i), PATHS[self.path])
        else:
            x = sampler.run(velocity, x, sampling.steps)
        decoded = self.autoencoder.decode(x.float(), scale=self.scale, shift=self.shift)
        image = to_pixels(decoded, sampling.pixels).cpu().numpy()
        return {"image": image, "label": labels, "nfe": counts.numpy()}

    def _velocity(self, x: Tensor, t: float, labels: Tensor) -> Tensor:
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        return self.model(x.float(), time, labels)[0]


def draw_shard(
    painter: Painter,
    *,
    path: Path,
    key: str,
    recipe: dict,
    shard: int,
    shards: int,
    batch: int,
    inputs: dict[str, str],
) -> None:
    """Draw one shard into ADM's .npz: `arr_0` uint8 NHWC, `arr_1` labels, and how they were made as `haste`.

    Images go to the file as they are drawn, so memory holds one batch of them. Batches are kept aside: after a kill
    the same call draws only what is missing, to the same bits, and nothing where the shard is whole.
    `haste.data.drawn.forget` removes them. Beside ADM's arrays the .npz has `nfe`, the evaluations of each sample.

    Args:
        painter: what draws.
        path: the .npz to write.
        key: the samples' key.
        recipe: the samples' recipe.
        shard: which shard, from 0.
        shards: how many there are.
        batch: images drawn at once; changes nothing but float rounding.
        inputs: identities of state and autoencoder, to be recorded.
    """
    started, indices = time.monotonic(), shard_range(painter.sampling.count, shard, shards)
    name, aside = f"samples, shard {shard} of {shards}", drawn.folder_of(path.parent)
    if drawn.again(path, aside, lambda file: _is_of(file, key, inputs)):
        log.info("%s: drawn before, %s", name, path)
        return
    watch = _Watch(name, len(indices))
    side, made = painter.autoencoder.factor * painter.model.input_size, [{"label": _NONE, "nfe": _NONE}]

    def draw(rows: range) -> dict[str, np.ndarray]:
        return painter.draw(rows, lambda share: watch(share * len(rows)))

    with artefact.replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            shape = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), side, side, 3)}
            np.lib.format.write_array_header_1_0(file, shape)
            for found, new in drawn.drawn(aside, indices, batch, inputs, draw):
                file.write(np.ascontiguousarray(found.pop("image")).data)
                made.append(found)
                watch.finished(len(found["label"]), new)
        labels, counts = (np.concatenate([found[name] for found in made]) for name in ("label", "nfe"))
        header = {"schema": artefact.SCHEMA, "kind": "samples", "classes": painter.model.null_class}
        header |= {"nfe": float(counts.mean()) if len(counts) else None}
        header |= artefact.provenance(key=key, recipe=recipe, inputs=inputs, seconds=time.monotonic() - started)
        rest = {"arr_1": labels, "nfe": counts, "haste": np.array(artefact.canonical(header))}
        for entry, array in rest.items():
            with archive.open(f"{entry}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    drawn.keep(path, aside)


def _is_of(path: Path, key: str, inputs: dict[str, str]) -> bool:
    """Whether a finished shard was drawn so, and from the same weights."""
    try:
        header = _asked(path)[1]
        return (header["key"], header["inputs"]) == (key, inputs)
    except (ValueError, KeyError) as error:
        log.warning("%s: is drawn again (%s)", path, error)
        return False


def feature_shard(
    detector: Detector,
    path: Path,
    *,
    folder: Path,
    key: str,
    recipe: dict,
    shard: int,
    shards: int,
    total: int,
    batch: int = 256,
) -> None:
    """What a detector sees in one shard of samples, as a shard of a features store.

    Args:
        detector: what looks at the images.
        path: the .npz that `draw_shard` wrote.
        folder: the features store's.
        key: the features store's key.
        recipe: the features store's recipe.
        shard: which shard, from 0.
        shards: how many there are.
        total: samples in all shards.
        batch: images looked at at once; changes nothing but float rounding.

    Raises:
        ValueError: the samples are missing, truncated, or not such as `draw_shard` writes.
    """
    images = open_samples(path)
    labels, header = _asked(path)
    made = {name: value for name, value in header["inputs"].items() if name != "detector"}
    inputs = {**made, "detector": detector.identity}
    facts = {**inputs, "about": _about(detector)}

    def batches() -> Iterator[dict[str, np.ndarray]]:
        done = 0
        for pictures in images.batches(batch):
            yield _seen(detector, pictures, labels[done : done + len(pictures)])
            done += len(pictures)

    write_shard(
        folder,
        kind="features",
        key=key,
        recipe=recipe,
        shard=shard,
        shards=shards,
        total=total,
        fields=_fields(detector),
        batches=batches(),
        provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
        facts=facts,
        progress=_Watch(f"{detector.name}, shard {shard} of {shards}", len(labels)).reached,
    )


class _Watch:
    """Shows how far a shard is, with rate and time to go, at most every `PAUSE` seconds and at its end."""

    PAUSE = 10.0

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count
        self.done, self.kept = 0, 0
        self.started = self.shown = time.monotonic()

    def __call__(self, begun: float) -> None:
        """So many samples' worth of work is done on the batch that is being drawn."""
        if time.monotonic() - self.shown >= self.PAUSE:
            self._show(self.done + begun)

    def finished(self, samples: int, new: bool) -> None:
        """A batch is drawn, or was found."""
        self.done += samples
        self.kept += 0 if new else samples
        if self.done == self.count:
            self._show(self.done)
        else:
            self(0.0)

    def reached(self, done: int, count: int) -> None:
        """So many samples are done, of `count`."""
        self.finished(done - self.done, new=True)

    def _show(self, done: float) -> None:
        self.shown = time.monotonic()
        rate = (done - self.kept) / max(self.shown - self.started, 1e-9)
        to_go = clock((self.count - done) / rate) if rate else "?"
        kept = f" ({self.kept} kept from before)" if self.kept else ""
        words = f"{done:.0f}/{self.count} images{kept}  {rate:.1f} images/s  {to_go} to go"
        log.info("%s: %s", self.name, words)


def _asked(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The classes asked of a shard's samples, (N,) int64, and the record of how they were made."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels, header = file["arr_1"].astype(np.int64), json.loads(str(file["haste"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected samples with their labels and record, found others ({error})") from error
    artefact.check_header(path, header, "samples")
    return labels, header


def _seen(detector: Detector, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of a features store: what a detector says of images, beside their labels."""
    found = detector(torch.from_numpy(images))
    return {**{name: value.numpy() for name, value in found.items()}, "label": labels}


def _about(detector: Detector) -> dict[str, Any]:
    # Not the configuration's name for it: another one, which shares the store, may call it otherwise.
    return {**detector.about, "name": detector.kind}


def _fields(detector: Detector) -> dict[str, tuple[tuple[int, ...], str]]:
    return {**{name: ((width,), "float32") for name, width in detector.outputs.items()}, "label": ((), "int64")}


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
    common: dict[str, Any] = {"folder": folder, "key": key, "recipe": recipe}
    _write_reference(detector, batches(), len(rows), inputs, named="real images", **common)


def reference_of_file(
    path: Path, detector: Detector, *, folder: Path, key: str, recipe: dict, batch: int = 256
) -> None:
    """As `reference_shard`, of ADM's reference file: features of its images, and beside them its own statistics.

    Raises:
        ValueError: the file is missing, truncated, or holds no images or no statistics of Inception.
    """
    check_reference(path)
    found = read_reference(path)
    images, moments = found.samples, found.moments
    assert images is not None
    arrays = {f"mu{SUFFIX[name]}": one.mean for name, one in moments.items()}
    arrays |= {f"sigma{SUFFIX[name]}": one.covariance for name, one in moments.items()}
    with artefact.replacing(folder / MOMENTS) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for pictures in images.batches(batch):
            yield _seen(detector, pictures, np.full(len(pictures), -1, np.int64))  # of no class that anybody says

    inputs = {"detector": detector.identity, "images": images.identity(), "file": found.about["identity"]}
    facts = {"file_name": path.name, "moments": artefact.file_identity(folder / MOMENTS)}
    common: dict[str, Any] = {"folder": folder, "key": key, "recipe": recipe}
    _write_reference(detector, batches(), images.count, inputs, named=path.name, facts=facts, **common)


def _write_reference(
    detector: Detector,
    batches: Iterator[dict[str, np.ndarray]],
    total: int,
    inputs: dict[str, str],
    *,
    folder: Path,
    key: str,
    recipe: dict,
    named: str,
    facts: dict[str, str] | None = None,
) -> None:
    """The one shard of a reference; `inputs` are identities, `facts` what is told of it beside them."""
    write_shard(
        folder,
        kind="features",
        key=key,
        recipe=recipe,
        shard=0,
        shards=1,
        total=total,
        fields=_fields(detector),
        batches=batches,
        provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
        facts={**inputs, "about": _about(detector), **(facts or {})},
        progress=_Watch(f"{detector.name}, {named}", total).reached,
    )
