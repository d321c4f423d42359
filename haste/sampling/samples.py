"""Sets of finished images from any source: ADM's .npz, a folder, a zip, our own shards, an image store.

Images are streamed, never all in memory. N images of H x W pixels, uint8 RGB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from haste.data.ahead import made_ahead
from haste.files import artefact
from haste.files.npz import BROKEN, check_images, foreign, header_of
from haste.files.store import MANIFEST, Store

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DECODERS = min(8, os.cpu_count() or 1)  # threads that decode images
LOSSY = (".jpg", ".jpeg", ".webp")
OTHERS = (".tif", ".tiff", ".gif", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".ppm")  # image formats that are not read


@dataclasses.dataclass(frozen=True)
class Samples:
    """A set of images that can be read any number of times, always in the same order.

    path: its path; count: images; size: height and width in pixels; kind: how it is packed, in words;
    files: the files it is read from; lossy: how many of the images are in files whose format may have changed their
    pixels; left_out: how many more images there are in formats that are not read.
    """

    path: Path
    count: int
    size: tuple[int, int]
    kind: str
    files: tuple[Path, ...]
    _parts: tuple[Callable[[], Iterator[np.ndarray]], ...]
    lossy: int = 0
    left_out: int = 0

    def batches(self, most: int) -> Iterator[np.ndarray]:
        """The images in order, (B, H, W, 3) uint8 with B = `most` except in the last batch.

        Raises:
            ValueError: an image cannot be read, or differs in size from the first; the message names it.
        """
        return self.cut(itertools.repeat(most))

    def cut(self, sizes: Iterable[int]) -> Iterator[np.ndarray]:
        """The images in order, in pieces of these sizes, while sizes and images last. Raises as `batches`."""
        rows = self._rows()
        left = np.zeros((0, *self.size, 3), np.uint8)
        for size in sizes:
            pieces, held = [left], len(left)
            while held < size and (more := next(rows, None)) is not None:
                pieces.append(more)
                held += len(more)
            found = np.concatenate(pieces) if len(pieces) > 1 else left
            if not held:
                return
            yield found[:size]
            left = found[size:]

    def _rows(self) -> Iterator[np.ndarray]:
        for part in self._parts:
            yield from part()

    def identity(self) -> str:
        """sha256 over the pixels in order: equal for equal images, however they are packed."""
        digest = hashlib.sha256()
        for batch in self.batches(64):
            digest.update(np.ascontiguousarray(batch).data)
        return digest.hexdigest()

    def stamp(self) -> str:
        """Hash of the files' paths, sizes and times: while it is unchanged, the pixels need not be read again."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        return artefact.fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], length=64)


def open_samples(path: Path | str) -> Samples:
    """Open a set of images.

    Args:
        path: an .npz with `arr_0` (N, H, W, 3) uint8 (ADM's sample files), a folder of shards as `haste sample`
            writes them, a folder of images at any depth, a .zip of images, or the folder of an image store, whose
            held-out images are skipped; images in sorted order of their names.

    Raises:
        ValueError: missing, empty, or not such images; the message says what was found.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of images")
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _of_store(path)
        shards = sorted(path.glob("shard-*-of-*.npz"))
        return _of_shards(path, shards) if shards else _of_folder(path)
    if path.suffix == ".npz":
        return _of_arrays(path, [path], ".npz")
    if path.suffix == ".zip":
        return _of_zip(path)
    raise ValueError(f"{path}: expected an .npz, a .zip or a folder of images, found {path.suffix or 'no suffix'!r}")


# ---- a store


def _of_store(path: Path) -> Samples:
    store = Store.open(path, kind="images")
    rows = store.range("train") if "train" in store.splits else range(store.count)
    height, width = store.fields["image"][0][:2]

    def batches(size: int = 64) -> Iterator[np.ndarray]:
        for low in range(0, len(rows), size):
            yield store.read("image", rows[low : low + size])

    return Samples(path, len(rows), (height, width), "image store", (path / MANIFEST,), (batches,))


# ---- arrays


def _of_shards(path: Path, files: list[Path]) -> Samples:
    counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)\.npz$", file.name))}
    expected = max(counts, default=0)
    missing = [i for i in range(expected) if not (path / f"shard-{i:05d}-of-{expected:05d}.npz").exists()]
    if len(counts) != 1 or missing:
        what = f"shard {missing[0]} of {expected} is missing" if len(counts) == 1 else f"shards of {sorted(counts)}"
        raise ValueError(f"{path}: expected all shards of one set of samples, found that {what}")
    return _of_arrays(path, files, f"{len(files)} shards")


def _of_arrays(path: Path, files: list[Path], kind: str) -> Samples:
    shapes = [_array_shape(file) for file in files]
    for file, shape in zip(files, shapes, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise ValueError(f"{file}: images of {shape[1:3]} pixels, but {files[0].name} has {shapes[0][1:3]}")
    parts = tuple(lambda file=file: _rows_of_array(file) for file in files)
    count, (height, width) = sum(shape[0] for shape in shapes), shapes[0][1:3]
    if not count:
        raise ValueError(f"{path}: found no images under arr_0")
    return Samples(path, count, (height, width), kind, tuple(files), parts)


def _array_shape(file: Path) -> tuple[int, ...]:
    with _array(file) as (_, shape):
        return shape


class _array:  # noqa: N801 - used like a function
    """The stream of an .npz's `arr_0`, at its first row, and its shape."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...]]:
        try:
            self.archive = zipfile.ZipFile(self.file)
        except BROKEN as error:
            raise foreign(self.file, error) from error
        if "arr_0.npy" not in (names := self.archive.namelist()):
            held = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
            raise ValueError(f"{self.file}: expected images under arr_0, found {held}")
        try:
            stream = self.archive.open("arr_0.npy")
            found = header_of(stream)
        except BROKEN as error:
            raise foreign(self.file, error) from error
        check_images(self.file, found)
        return stream, found.shape

    def __exit__(self, *_: object) -> None:
        self.archive.close()


def _rows_of_array(file: Path, rows: int = 64) -> Iterator[np.ndarray]:
    with _array(file) as (stream, shape):
        width = math.prod(shape[1:])
        for low in range(0, shape[0], rows):
            count = min(rows, shape[0] - low)
            try:
                data = stream.read(count * width)
            except BROKEN as error:
                raise ValueError(f"{file}: broken after {low} of {shape[0]} images ({error})") from error
            if len(data) != count * width:
                raise ValueError(f"{file}: truncated after {low} of {shape[0]} images")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


# ---- image files


def _of_folder(path: Path) -> Samples:
    below = {file: str(file.relative_to(path)) for file in sorted(path.rglob("*"))}
    names = [file for file, name in below.items() if _is_picture(name) and file.is_file()]
    pictures = [(str(name), lambda name=name: name.open("rb")) for name in names]
    found = _of_pictures(path, pictures, "folder of pictures", tuple(names))  # type: ignore[arg-type]
    return dataclasses.replace(found, left_out=sum(_is_picture(name, OTHERS) for name in below.values()))


def _of_zip(path: Path) -> Samples:
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise ValueError(f"{path}: expected a .zip, found a truncated or foreign file ({error})") from error
        # Entries are read in place and never unpacked, so an entry's name cannot lead outside.
        # The order is that of the packed folder, folder by folder.
    names = sorted((name for name in archive.namelist() if _is_picture(name)), key=lambda name: name.split("/"))
    pictures = [(f"{path}:{name}", lambda name=name: archive.open(name)) for name in names]
    found = _of_pictures(path, pictures, "zip of pictures", (path,))  # type: ignore[arg-type]
    return dataclasses.replace(found, left_out=sum(_is_picture(name, OTHERS) for name in archive.namelist()))


def _is_picture(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether the name is that of an image; files that macOS adds to archives are not."""
    *folders, last = name.split("/")
    return last.lower().endswith(suffixes) and not last.startswith("._") and "__MACOSX" not in folders


def _of_pictures(
    path: Path, pictures: list[tuple[str, Callable[[], Any]]], kind: str, files: tuple[Path, ...]
) -> Samples:
    if not pictures:
        raise ValueError(f"{path}: found no images, expected {', '.join(SUFFIXES)}")
    first = _picture(*pictures[0])
    size = (first.shape[0], first.shape[1])

    def rows() -> Iterator[np.ndarray]:
        for (name, _), pixels in zip(pictures, _decoded(pictures), strict=True):
            if pixels.shape[:2] != size:
                raise ValueError(f"{name}: {pixels.shape[:2]} pixels, but {pictures[0][0]} has {size}")
            yield pixels[None]

    lossy = sum(name.lower().endswith(LOSSY) for name, _ in pictures)
    return Samples(path, len(pictures), size, kind, files, (rows,), lossy)


def _decoded(pictures: list[tuple[str, Callable[[], Any]]]) -> Iterator[np.ndarray]:
    """The images in order, decoded by some threads ahead of use."""
    return made_ahead(lambda one: _picture(*one), pictures, threads=DECODERS, depth=4 * DECODERS, name="pictures")


def _picture(name: str, opened: Callable[[], Any]) -> np.ndarray:
    try:
        with opened() as file, Image.open(file) as image:
            mode, form = image.mode, image.format
            pixels = np.asarray(image) if mode == "RGB" else None
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as an image ({error})") from error
    if form in ("JPEG", "MPO", "WEBP") and not name.lower().endswith(LOSSY):
        raise ValueError(
            f"{name}: holds {form}, which its name hides; expected a name that ends in {' or '.join(LOSSY)}"
        )
    if pixels is None:
        raise ValueError(f"{name}: mode {mode}, expected RGB; grey or transparent samples are not what a model made")
    return pixels
