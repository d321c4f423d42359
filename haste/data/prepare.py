"""Images in: a source of pictures becomes a store of square uint8 RGB images and labels.

A source is a class with `count`, `classes`, `holdout`, `listing` and `load`, and one line in `SOURCES`. Sources put the
held-out images last, so that the splits of the store are two ranges.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from haste import artefact
from haste.data import order
from haste.data.store import Progress, join, shard_range, write_shard

KIND = "images"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 64


class Source(Protocol):
    """Labelled pictures, held-out ones last.

    Attributes:
        count: pictures in all.
        classes: name of each class; a label is a place in it.
        holdout: how many of the last pictures are held out from training.
        resolution: R, the side of the squares that `load` gives.
        listing: hash of which pictures these are, equal in every job that shares the work.
    """

    count: int
    classes: list[str]
    holdout: int
    resolution: int
    listing: str

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Picture i as (R, R, 3) uint8, and its label.

        Raises:
            ValueError: the picture cannot be read; the message names its file.
        """
        ...


class Digits:
    """scikit-learn's 1,797 handwritten digits (8x8), resized; the last `holdout` ones are held out."""

    def __init__(self, resolution: int, holdout: int) -> None:
        from sklearn.datasets import load_digits  # 1 s to import, and only this source needs it

        data: Any = load_digits()
        self._levels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0..16 -> 0..255
        self._labels = data.target
        self.count, self.classes = len(self._levels), [str(digit) for digit in range(10)]
        self.resolution, self.holdout = resolution, _checked_holdout("digits", holdout, self.count)
        self.listing = artefact.fingerprint(["digits", self.count])

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Digit i as (R, R, 3) uint8 with three equal channels, and its label 0..9."""
        small = Image.fromarray(self._levels[i])
        grey = np.asarray(small.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC))  # clips by itself
        return np.repeat(grey[:, :, None], 3, axis=2), int(self._labels[i])


class Folder:
    """Pictures in class folders, labelled by the folders' sorted order, or in one flat folder with the single label 0.

    Held-out pictures are chosen by a permutation that depends on `seed` and the number of pictures only.
    """

    def __init__(self, resolution: int, holdout: int, path: Path | str, seed: int = 0) -> None:
        self.root, self.resolution = Path(path), resolution
        self.classes, files = _scan(self.root)
        self.count, self.holdout = len(files), _checked_holdout(str(path), holdout, len(files))
        out = np.zeros(self.count, dtype=bool)
        out[order.permutation(seed, 0, self.count)[:holdout]] = True
        self._files = [files[i] for i in [*np.flatnonzero(~out), *np.flatnonzero(out)]]
        self.listing = artefact.fingerprint([[parts, label] for parts, label in self._files])

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Picture i as (R, R, 3) uint8, and its label.

        Raises:
            ValueError: the file is not a picture that can be read.
        """
        parts, label = self._files[i]
        path = self.root.joinpath(*parts)
        try:
            with Image.open(path) as image:
                return np.asarray(centre_crop(upright_rgb(image), self.resolution)), label
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a picture that can be read ({error})") from error


SOURCES = {"digits": Digits, "folder": Folder}


def open_source(name: str, *, resolution: int, holdout: int, **options: Any) -> Source:
    """Open a source of pictures by its name.

    Args:
        name: a key of `SOURCES`.
        resolution: side of the squares, pixels.
        holdout: pictures to hold out from training.
        options: what the source needs beside: `path` and `seed` for a folder.

    Raises:
        ValueError: no such source, an option it does not have, or nothing to read.
    """
    if name not in SOURCES:
        raise ValueError(f"image source {name!r}: expected one of {sorted(SOURCES)}")
    if resolution < 1:
        raise ValueError(f"resolution {resolution}: expected at least 1 pixel")
    try:
        inspect.signature(SOURCES[name]).bind(resolution, holdout, **options)
    except TypeError as error:
        raise ValueError(f"image source {name!r} with options {sorted(options)}: {error}") from error
    return SOURCES[name](resolution, holdout, **options)


def _checked_holdout(where: str, holdout: int, count: int) -> int:
    if not 0 <= holdout < count:
        raise ValueError(f"{where}: {holdout} pictures to hold out of {count}, expected 0..{count - 1}")
    return holdout


def _scan(root: Path) -> tuple[list[str], list[tuple[tuple[str, ...], int]]]:
    """Class names, and (path in parts, label) of every picture: classes sorted, and pictures within a class."""
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of images, found {'a file' if root.exists() else 'nothing'}")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    loose: list[tuple[str, ...]] = [(entry.name,) for entry in root.iterdir() if _is_picture(entry.name)]
    if folders and loose:
        raise ValueError(
            f"{root}: found both class folders ({folders[0]!r}) and pictures ({loose[0][0]!r}) beside them"
        )
    if not folders:
        found, classes = [(parts, 0) for parts in sorted(loose)], ["all"]
    else:
        found, classes = [], folders
        for label, name in enumerate(folders):
            inside = sorted((name, *parts) for parts in _pictures(root / name))
            if not inside:  # leaving it out would shift all later labels
                raise ValueError(f"{root / name}: a class folder without pictures, expected {', '.join(SUFFIXES)}")
            found += [(parts, label) for parts in inside]
    if not found:
        raise ValueError(f"{root}: found no pictures, expected {', '.join(SUFFIXES)} in class folders or directly")
    return classes, found


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _pictures(folder: Path) -> Iterator[tuple[str, ...]]:
    for base, _, names in os.walk(folder, followlinks=True):
        parts = Path(base).relative_to(folder).parts
        yield from ((*parts, name) for name in names if _is_picture(name))


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as RGB, turned as its EXIF says, transparency on white, 16-bit grey by its upper byte."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} has no known range, expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with BOX while the short side is at least 2 x size, BICUBIC to it, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def prepare_shard(
    folder: Path | str,
    source: Source,
    *,
    key: str,
    recipe: Mapping[str, Any],
    shard: int,
    shards: int,
    provenance: Mapping[str, Any],
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write one shard of an image store: image (R, R, 3) uint8 and label int64.

    Args:
        folder: the store's folder.
        source: where the pictures come from.
        key: hash of the recipe.
        recipe: how the store is made, JSON.
        shard: which shard, from 0.
        shards: how many there are.
        provenance: how this shard is made, JSON.
        workers: threads that decode pictures; the result does not depend on it.
        progress: called with (images written, images of this shard).

    Raises:
        ValueError: a picture cannot be read; the message names it.
    """
    size = source.resolution
    return write_shard(
        folder,
        kind=KIND,
        key=key,
        recipe=recipe,
        shard=shard,
        shards=shards,
        total=source.count,
        fields={"image": ((size, size, 3), np.uint8), "label": ((), np.int64)},
        batches=_load(source, shard_range(source.count, shard, shards), workers),
        provenance=provenance,
        facts=_facts(source),
        progress=progress,
    )


def _facts(source: Source) -> dict[str, Any]:
    # The listing makes `join` refuse shards of a folder that changed between them.
    return {"classes": source.classes, "resolution": source.resolution, "listing": source.listing}


def _load(source: Source, samples: range, workers: int) -> Iterator[dict[str, np.ndarray]]:
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes outside Python's lock
        for low in range(0, len(samples), _BATCH):
            images, labels = zip(*pool.map(source.load, samples[low : low + _BATCH]), strict=True)
            yield {"image": np.stack(images), "label": np.array(labels, dtype=np.int64)}


def prepare_join(
    folder: Path | str,
    source: Source,
    *,
    key: str,
    recipe: Mapping[str, Any],
    shards: int,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Join the shards of an image store; its splits are "train" and "held_out", its manifest names the classes.

    Returns:
        The manifest.

    Raises:
        ValueError: a shard is missing, foreign or of another source.
    """
    kept = source.count - source.holdout
    return join(
        folder,
        kind=KIND,
        key=key,
        recipe=recipe,
        shards=shards,
        splits={"train": [0, kept], "held_out": [kept, source.count]},
        provenance=provenance,
        expected_facts=_facts(source),
    )
