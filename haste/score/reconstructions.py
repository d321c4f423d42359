"""What the autoencoder alone costs: decoded latents of real images against real images, and a few of them to look at.

Samples cannot be better than what the decoder makes of perfect latents, so this bounds every row from the other side
than real images against real ones do. B images, R pixels per side.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from haste.data.jobs import check_autoencoder, check_decoder
from haste.data.latents import Autoencoder, to_pixels
from haste.files import artefact, locks
from haste.files.store import Store
from haste.metrics.scores import METRICS
from haste.networks.devices import choose_device
from haste.plan import names
from haste.plan.plan import Plan
from haste.sampling import grids
from haste.sampling.painter import DECODED_PIXELS
from haste.score.jobs import load_detector
from haste.score.sides import spaced
from haste.score.workflow import (
    FLOOR,
    about_detector,
    check_detector,
    notes,
    real_statistics,
    reference_statistics,
    values,
)

SIDE = 136  # most pixels of a picture to look at: two for each of the page's
MOST_PSNR = 100.0  # dB, of pictures that come back as they were


def make(plan: Plan, detector: names.Detector) -> None:
    """Write what a detector finds of decoded latents, also where it is there, unless another job makes it meanwhile.

    The decoded images are the even rows of the reference and are compared with its odd rows, exactly as the floor does
    with the even rows themselves: what the value is above the floor is the autoencoder's. Where the reference is a
    file, they are training images and are compared with all of it, as samples are.

    Raises:
        ValueError: the configuration trains nothing, or stores and networks do not belong together.
        FloatingPointError: a score is not finite.
    """
    if detector.reconstructed is None:
        raise ValueError("runs: none is trained here, so no image has latents that could be decoded")
    path = Path(detector.reconstructed)
    with locks.making(path, anew=True) as todo:
        if todo:
            artefact.write_json(path, _made(plan, detector, path.stem))


def _made(plan: Plan, detector: names.Detector, key: str) -> dict[str, Any]:
    started, reference = time.monotonic(), Store.of(detector.reference)
    judge, again = load_detector(plan, detector), Reconstructions(plan)
    check_detector(again.latents.folder, judge.identity, reference)
    rows = np.asarray(again.images.range(plan.config.detector[detector.name].split))
    if detector.reference_file is None:
        chosen = spaced(len(rows), 2 * FLOOR)
        rows, odd = rows[chosen[0::2]], chosen[1::2]
        real, against = reference_statistics(reference, odd), {"images": len(odd), "identity": reference.identity}
    else:
        rows = rows[spaced(len(rows), FLOOR)]
        real, against = real_statistics(reference)
    stats: dict[str, Any] = {}
    for low, seen in again.seen(judge.arrays, rows):
        batch = {**seen, "index": np.arange(low, low + len(next(iter(seen.values()))))}
        for name in (name for name, one in METRICS.items() if set(one.needs) <= set(batch)):
            stats[name] = METRICS[name].update(stats.get(name), batch)
    inputs = {"images": again.images.identity, "latents": again.latents.identity, "reference": reference.identity}
    return {
        "schema": artefact.SCHEMA,
        "kind": "score",
        "reconstructed": True,
        "key": key,
        "detector": about_detector(detector.name, reference),
        "samples": len(rows),
        "reference": against,
        "scores": values(stats, real),
        "psnr": again.psnr,
        "pictures": again.pictures(plan.data.shown_classes),
        "notes": notes(stats, real),
        "provenance": artefact.provenance(
            key=key, inputs={**inputs, "decoder": again.decoder.identity}, seconds=time.monotonic() - started
        ),
    }


class Reconstructions:
    """Images of a plan and what its decoder makes of the means of their latents.

    Attributes:
        images, latents: the stores.
        decoder: the autoencoder that samples are decoded with.
    """

    def __init__(self, plan: Plan):
        self.images, self.latents = Store.of(plan.images), Store.of(plan.latents)
        if self.latents.manifest["images"] != self.images.identity:
            raise ValueError(
                f"{self.latents.folder}: made from the images {self.latents.manifest['images'][:12]}, but "
                f"{self.images.folder} holds {self.images.identity[:12]}. Remove the latents to encode these"
            )
        self.decoder = Autoencoder.load(plan.decoder, device=str(choose_device(plan.config.runtime.device)))
        check_autoencoder(plan, self.decoder)
        check_decoder(plan, self.decoder, self.latents.manifest["autoencoder"])
        self._batch, self._squares, self._numbers = plan.config.runtime.sample_batch, 0, 0

    def decoded(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of some rows as they come back, (B, R, R, 3).

        Raises:
            FloatingPointError: an image has pixels that are not finite.
        """
        most = max(1, DECODED_PIXELS // self.images.fields["image"][0][0] ** 2)
        return np.concatenate([self._decoded(rows[low : low + most]) for low in range(0, len(rows), most)])

    def _decoded(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        means = np.split(self.latents.read("moments", rows), 2, axis=1)[0]
        pixels = self.decoder.decode(torch.from_numpy(means), scale=1.0, shift=0.0)
        if len(broken := (~pixels.isfinite().flatten(1).all(dim=1)).nonzero()):
            which = f"{self.latents.folder}: latent {rows[int(broken[0, 0])]}"
            raise FloatingPointError(f"{which} is decoded to pixels that are not finite, expected numbers in -1..1")
        return to_pixels(pixels).cpu().numpy()

    def seen(self, look: Any, rows: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
        """What a detector sees in the decoded images of some rows, batch by batch, each with the place of its first."""
        for low in range(0, len(rows), self._batch):
            some = rows[low : low + self._batch]
            made = self.decoded(some)
            lost = made.astype(np.int64) - self.images.read("image", some)
            self._squares, self._numbers = self._squares + int((lost**2).sum()), self._numbers + lost.size
            yield low, look(made, self.latents.folder, low)

    @property
    def psnr(self) -> float | None:
        """Of all images seen so far, dB, from the mean of their squared errors; None before any."""
        if not self._numbers:
            return None
        share = self._squares / self._numbers / 255**2
        return min(MOST_PSNR, -10 * math.log10(share)) if share else MOST_PSNR

    def pictures(self, classes: list[int]) -> dict[str, Any]:
        """A training image of each class and its reconstruction, below one another as a PNG in base64, with the class
        of each column; without classes the first images."""
        training = self.images.range("train")
        if classes:
            labels = self.images.read("label", training)
            first = {label: training[found[0]] for label in classes if len(found := np.flatnonzero(labels == label))}
        else:
            first = dict(enumerate(training[: names.SHOWN_CLASSES]))
        rows = np.fromiter(first.values(), np.int64)
        side = self.images.fields["image"][0][0]
        real, made = (_small(some, min(side, SIDE)) for some in (self.images.read("image", rows), self.decoded(rows)))
        places = np.tile(np.arange(len(rows)), 2)
        picture = grids.class_grid(
            np.concatenate([real, made]), places, per_class=2, scale=grids.SCALE if side * grids.SCALE <= SIDE else 1
        )
        out = io.BytesIO()
        picture.save(out, "PNG")
        return {"classes": list(first) if classes else [], "png": base64.b64encode(out.getvalue()).decode()}


def _small(images: Iterable[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """Images at most `side` pixels wide."""
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.LANCZOS)) for one in images])
