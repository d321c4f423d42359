"""A detector's features of a set of images: one pass for all scores, kept in a features store on request.

N images, B images at once, H x W pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haste.files import artefact
from haste.files.progress import Progress
from haste.files.store import MANIFEST, Store, join, shard_path, shard_range, write_shard
from haste.metrics.detector import Detector
from haste.sampling.looks import Looks, facts, looks_of
from haste.sampling.samples import Samples

SHARD = 4096  # images whose features are written at once: the most that a kill can lose
READ = 2048  # rows of features read at once
PROBE = 256  # images that are tested for floats cast to bytes without scaling

Batch = dict[str, NDArray]


@dataclass(frozen=True)
class View:
    """One detector's features of a set of images.

    count: N; outputs: name -> width; detector: what determines comparability, as `Detector.about`; batches: iterates
    over them in order, each batch (B, width) by name with "index" (B,); facts: what is known of the images afterwards.
    """

    count: int
    outputs: Mapping[str, int]
    detector: Mapping[str, Any]
    batches: Callable[[], Iterator[Batch]]
    facts: Callable[[], dict[str, Any]]


class Pixels:
    """Facts about images gathered in passing: their identity, duplicates, and whether they are plausible images."""

    def __init__(self, samples: Samples):
        self.samples = samples
        self.digest, self.looks, self.count = hashlib.sha256(), list[Looks](), 0
        self.values = np.zeros(256, dtype=bool)

    def add(self, images: NDArray[np.uint8]) -> None:
        """Add a batch (B, H, W, 3).

        Raises:
            ValueError: the first images hold only values that result from casting floats to bytes without scaling.
        """
        images = np.ascontiguousarray(images)
        self.digest.update(images.data)
        self.looks.append(looks_of(images))
        self.count += len(images)
        if self.count <= PROBE or self.count == len(images):
            self.values |= np.bincount(images.reshape(-1), minlength=256) > 0
        if self.count >= min(PROBE, self.samples.count):
            self._check_range()

    def _check_range(self) -> None:
        # Floats in [0, 1] become 0 and 1, floats in [-1, 1] also 255; black and white drawings have no 1.
        values = set(np.flatnonzero(self.values).tolist())
        if values <= {0, 1} or (values <= {0, 1, 255} and 1 in values):
            what = "nothing but black" if values <= {0} else f"no values but {', '.join(map(str, sorted(values)))}"
            raise ValueError(
                f"{self.samples.path}: the first {min(PROBE, self.samples.count)} images hold {what}: expected 0..255. "
                "Floats in [0, 1] become bytes by clip(255 x), floats in [-1, 1] by clip(127.5 x + 128)"
            )

    def facts(self) -> dict[str, Any]:
        """JSON: identity (sha256 of the pixels in order), number of duplicates, number of black images, mean value."""
        return {
            **self.samples.about,
            "size": list(self.samples.size),
            "identity": self.digest.hexdigest(),
            **facts(self.looks, self.samples.size),
        }


def probe(samples: Samples) -> None:
    """Test all headers and the first images, so that a common mistake is reported before hours of work.

    Raises:
        ValueError: they cannot be read or are not alike, or hold only values that result from casting floats to bytes
            without scaling.
    """
    samples.check()
    for images in samples.cut([PROBE]):
        Pixels(samples).add(images)


def extract_features(samples: Samples, detector: Detector, *, batch: int, folder: Path | None = None) -> View:
    """Extract features of images, or find those that were extracted before.

    Args:
        samples: the images.
        detector: extracts the features.
        batch: batch size; it changes features by float32 rounding only.
        folder: where features are kept, a store for each set of images and detector; None keeps none and extracts
            them while the view is iterated.

    Raises:
        ValueError: images that the detector cannot read, or that are not plausible images.
    """
    check_size(samples, detector)
    if folder is not None:
        view = view_of(_kept(folder, samples, detector) or _keep(folder, samples, detector, batch))
        # The stored features may come from other files with the same pixels: state the facts about these files.
        return replace(view, facts=lambda: {**view.facts(), **samples.about})
    pixels = Pixels(samples)

    def batches() -> Iterator[Batch]:
        progress, low = _progress(samples, detector), 0
        for found in _features(samples.batches(batch), detector, pixels, 0):
            high = low + len(found["pool"])
            yield {**found, "index": np.arange(low, high)}
            progress.add(high - low)
            low = high

    return View(samples.count, detector.outputs, detector.about, batches, pixels.facts)


def view_of(store: Store) -> View:
    """The view in any features store.

    Raises:
        ValueError: the store does not state its detector.
    """
    identity, fields = store.manifest.get("detector"), store.fields
    if not isinstance(identity, str) or "pool" not in fields:
        raise ValueError(f"{store.folder}: a features store that does not name its detector, or holds no pool features")
    outputs = {name: shape[0] for name, (shape, _) in fields.items() if len(shape) == 1}
    unknown = {"name": f"detector {identity[:8]}", "kind": None, "identity": identity, "outputs": outputs}
    about = {**unknown, **(store.manifest.get("about") or {})}

    def batches() -> Iterator[Batch]:
        for low in range(0, store.count, READ):
            rows = np.arange(low, min(low + READ, store.count))
            yield {**{name: store.read(name, rows) for name in outputs}, "index": rows}

    plain = {"path": str(store.folder), "kind": "features store", "images": store.count, "identity": store.identity}
    return View(store.count, outputs, about, batches, lambda: store.manifest.get("pixels") or plain)


def check_size(samples: Samples, detector: Detector) -> None:
    """Raises ValueError for images of a size that a detector cannot read."""
    side, (height, width) = detector.resolution, samples.size
    if side is not None and samples.size != (side, side):
        raise ValueError(f"{samples.path}: {height} x {width} px, but {detector.name} reads {side} x {side} px")
    if min(samples.size) < detector.smallest:
        least = detector.smallest
        raise ValueError(f"{samples.path}: {height} x {width} px, {detector.name} needs {least} x {least} px or more")


def _progress(samples: Samples, detector: Detector) -> Progress:
    return Progress(f"{samples.path} by {detector.name}", samples.count)


def _features(pieces: Iterator[NDArray[np.uint8]], detector: Detector, pixels: Pixels, first: int) -> Iterator[Batch]:
    def noted() -> Iterator[NDArray[np.uint8]]:
        for images in pieces:
            pixels.add(images)
            yield images

    def looks(first: int) -> Iterator[Callable[[], Batch]]:
        for images, one in zip(_ahead(noted()), itertools.cycle([detector, *detector.copies]), strict=False):
            yield partial(one.arrays, images, pixels.samples.path, first)
            first += len(images)

    return _in_order(looks(first), 1 + len(detector.copies))


def _in_order(looks: Iterator[Callable[[], Batch]], at_once: int) -> Iterator[Batch]:
    """What each gives, in their order, some of them at once in threads; one alone here, whose cores are counted."""
    if at_once == 1:
        yield from (look() for look in looks)
        return
    with ThreadPoolExecutor(at_once, thread_name_prefix="detector") as threads:
        waiting: deque[Future[Batch]] = deque()
        for look in looks:
            waiting.append(threads.submit(look))
            if len(waiting) > at_once:  # one is ready for who is done first
                yield waiting.popleft().result()
        yield from (one.result() for one in waiting)


def _ahead(pieces: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The same pieces, reading the next one while the detector processes the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        waiting = thread.submit(next, pieces, None)
        while (images := waiting.result()) is not None:
            waiting = thread.submit(next, pieces, None)
            yield images


# ---- kept features


def _recipe(samples: Samples, detector: Detector) -> dict[str, Any]:
    return {"detector": detector.identity, "outputs": dict(detector.outputs), "files": samples.stamp()}


def _place(folder: Path, samples: Samples, recipe: Mapping[str, Any]) -> Path:
    stem = re.sub(r"[^\w.-]+", "-", samples.path.resolve().stem)[:60]
    return folder / f"{stem}-{artefact.fingerprint(recipe)}"


def _kept(folder: Path, samples: Samples, detector: Detector) -> Store | None:
    """Features of these very images by this detector: the same files untouched, or other files with the same pixels."""
    recipe = _recipe(samples, detector)
    own = _place(folder, samples, recipe)
    if (own / MANIFEST).exists():
        return Store.open(own, kind="features", key=artefact.fingerprint(recipe), recipe=recipe)
    others = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    found = [artefact.read_json(path / MANIFEST, "store") for path in others]
    fitting = {
        manifest["pixels"]["identity"]: path
        for path, manifest in zip(others, found, strict=True)
        if manifest.get("detector") == detector.identity
        and manifest.get("pixels", {}).get("images") == samples.count
        and manifest["fields"].keys() >= detector.outputs.keys()
    }
    same = fitting.get(samples.identity()) if fitting else None
    return None if same is None else Store.open(same, kind="features")


def _keep(folder: Path, samples: Samples, detector: Detector, batch: int) -> Store:
    """Extract and keep features; shards that an interrupted pass has finished are not extracted again."""
    recipe = _recipe(samples, detector)
    key, place = artefact.fingerprint(recipe), _place(folder, samples, recipe)
    shards = -(-samples.count // SHARD)
    spans = [shard_range(samples.count, shard, shards) for shard in range(shards)]
    pieces = samples.cut(min(batch, len(span) - low) for span in spans for low in range(0, len(span), batch))
    pixels, progress, started = Pixels(samples), _progress(samples, detector), time.monotonic()
    common: dict[str, Any] = {"kind": "features", "key": key, "recipe": recipe, "shards": shards}
    inputs = {"weights": detector.about["weights"]}
    for shard, span in enumerate(spans):
        mine = itertools.islice(pieces, -(-len(span) // batch))
        if shard_path(place, shard, shards).exists():
            for images in mine:
                pixels.add(images)
            progress.add(len(span), new=False)
            continue
        write_shard(
            place,
            **common,
            shard=shard,
            total=samples.count,
            fields={name: ((width,), "float32") for name, width in detector.outputs.items()},
            batches=_features(mine, detector, pixels, span.start),
            provenance=artefact.provenance(key=key, recipe=recipe, inputs=inputs),
            facts={"detector": detector.identity, "about": detector.about},
            progress=progress,
        )
    provenance = artefact.provenance(key=key, recipe=recipe, inputs=inputs, seconds=time.monotonic() - started)
    join(place, **common, splits={}, provenance=provenance, extra={"pixels": pixels.facts()})
    return Store.open(place, kind="features", key=key, recipe=recipe)
