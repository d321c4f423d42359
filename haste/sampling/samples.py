"""Sets of finished images from any source: ADM's .npz, a folder, archives, our own shards, an image store.

Images are streamed, never all in memory. N images of H x W pixels, uint8 RGB.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image

from haste.data import pictures
from haste.data.ahead import made_ahead
from haste.files import archives, artefact, listing, walk
from haste.files.npz import BROKEN, check_images, foreign, header_of, headers
from haste.files.store import MANIFEST, Store
from haste.files.walk import Parts

T = TypeVar("T")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DECODERS = min(8, os.cpu_count() or 1)  # threads that decode images
LOSSY = (".jpg", ".jpeg", ".webp")
_FORMATS = (*pictures.FORMATS, "BMP")
_SHOWN = 4  # images that a refusal names
_Read = Callable[[], Path | io.BytesIO]


@dataclasses.dataclass(frozen=True)
class Samples:
    """A set of images that can be read any number of times, always in the same order.

    path: its path; count: images; size: height and width in pixels; kind: how it is packed, in words;
    files: the files it is read from; lossy: how many of the images are in files whose format may have changed their
    pixels; unused: the other files there, as `haste.files.walk.grouped`; converted: how many were made RGB, None if
    none may be.
    """

    path: Path
    count: int
    size: tuple[int, int]
    kind: str
    files: tuple[Path, ...]
    _parts: tuple[Callable[[], Iterator[np.ndarray]], ...]
    lossy: int = 0
    unused: Sequence[dict[str, Any]] = ()
    converted: int | None = None
    check: Callable[[], object] = lambda: None  # looks at headers alone; raises ValueError as `batches` would

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the files, JSON."""
        found = {"path": str(self.path), "kind": self.kind, "lossy": self.lossy, "unused": list(self.unused)}
        return found if self.converted is None else {**found, "converted": self.converted}

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
        said = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return artefact.fingerprint(said if self.converted is None else [*said, "converted"], length=64)


def open_samples(path: Path | str, convert: bool = False) -> Samples:
    """Open a set of images.

    Args:
        path: an .npz with `arr_0` (N, H, W, 3) uint8 (ADM's sample files), a folder of shards as `haste sample`
            writes them, a folder of images at any depth, a .zip or .tar of images, or the folder of an image store,
            whose held-out images are skipped; images in sorted order of their names. The files of folders and
            archives are found as those of an image source, see `haste.files.walk`.
        convert: pictures in files that are not RGB become so as those of an image source do, see
            `haste.data.pictures.upright_rgb`; otherwise they are refused.

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
        if shards:
            return _of_shards(path, shards)
        inside = walk.Directory(path)
        return _of_pictures(inside, "folder of pictures", inside.file, partial(_on_disk, path), convert)
    if path.suffix == ".npz":
        return _of_arrays(path, [path], ".npz")
    if path.suffix.lower() in archives.SUFFIXES:
        packed = archives.Archives(path)
        kind = f"{path.suffix.lower()[1:]} of pictures"
        return _of_pictures(packed, kind, partial(_unpacked, packed), lambda found: packed.files, convert)
    raise ValueError(
        f"{path}: expected an .npz, a .zip, a .tar or a folder of images, found {path.suffix or 'no suffix'!r}"
    )


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
        name = self._name()
        try:
            stream = self.archive.open(f"{name}.npy")
            found = header_of(stream)
        except BROKEN as error:
            raise foreign(self.file, error) from error
        check_images(self.file, found, name)
        return stream, found.shape

    def _name(self) -> str:
        """`arr_0`, or the only array of images."""
        names = [name.removesuffix(".npy") for name in self.archive.namelist()]
        if "arr_0" in names:
            return "arr_0"
        images = [name for name, one in headers(self.archive).items() if len(one.shape) == 4 and one.dtype == np.uint8]
        if len(images) != 1:
            raise ValueError(f"{self.file}: expected images under arr_0, found {', '.join(names) or 'nothing'}")
        return images[0]

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


def _of_pictures(
    tree: listing.Tree,
    kind: str,
    file: Callable[[Parts], Path | io.BytesIO],
    files: Callable[[list[Parts]], Sequence[Path]],
    convert: bool,
) -> Samples:
    """The images of a tree in sorted order of their names; `files` are those on disk that hold them."""
    found = listing.pictures_among(tree, SUFFIXES)
    between = "/" if isinstance(tree, walk.Directory) else ":"
    images = [(f"{tree.root}{between}{'/'.join(parts)}", partial(file, parts)) for parts in found]
    check = partial(_check_alike, tree.root, images, convert)
    converted = check() if convert else None
    first = _picture(*images[0], convert)
    if first is None:
        check()
    assert first is not None
    size = (first.shape[0], first.shape[1])

    def rows() -> Iterator[np.ndarray]:
        # decoded by some threads ahead of use
        decoded = made_ahead(
            lambda one: _picture(*one, convert), images, threads=DECODERS, depth=4 * DECODERS, name="pictures"
        )
        for pixels in decoded:
            if pixels is None or pixels.shape[:2] != size:
                check()
            assert pixels is not None
            yield pixels[None]

    lossy = sum(name.lower().endswith(LOSSY) for name, _ in images)
    unused = walk.grouped(listing.unused_by(tree, found))
    whole = Samples(tree.root, len(images), size, kind, tuple(files(found)), (rows,), lossy, unused, converted)
    # An archive's files have no headers apart: they would be read twice.
    unseen = isinstance(tree, walk.Directory) and not convert
    return dataclasses.replace(whole, check=check) if unseen else whole


def _on_disk(root: Path, found: list[Parts]) -> list[Path]:
    files = [root.joinpath(*parts) for parts in found]
    for file in files:
        if reason := walk.why_unreadable(file):
            raise ValueError(f"{file}: cannot be read as an image ({reason})")
    return files


def _unpacked(packed: archives.Archives, parts: Parts) -> io.BytesIO:
    return io.BytesIO(packed.read(parts))


def _picture(name: str, file: _Read, convert: bool) -> np.ndarray | None:
    """An image's pixels (H, W, 3) uint8, or None if it is not RGB and not to be converted."""

    def pixels_of(image: Image.Image) -> tuple[str | None, np.ndarray | None]:
        shown = pictures.upright_rgb(image) if convert else image
        return image.format, np.asarray(shown) if shown.mode == "RGB" else None

    form, pixels = _read(name, file, pixels_of)
    if form in ("JPEG", "MPO", "WEBP") and not name.lower().endswith(LOSSY):
        raise ValueError(
            f"{name}: holds {form}, which its name does not say; expected a name that ends in {' or '.join(LOSSY)}"
        )
    return pixels


def _read(name: str, file: _Read, then: Callable[[Image.Image], T]) -> T:
    try:
        return pictures.opened(file(), then, _FORMATS)
    except Exception as error:  # of many classes; without its name nobody finds the file
        raise ValueError(f"{name}: cannot be read as an image ({pictures.reason(error, name)})") from error


def _check_alike(where: Path, images: Sequence[tuple[str, _Read]], convert: bool) -> int:
    """Refuse a set in which not all images are RGB of one size, or can be made RGB: the error names those that are not
    as most are. Returns how many have to be made RGB."""

    def shape(one: tuple[str, _Read]) -> tuple[str, int, int, bool]:
        return _read(*one, lambda image: _shape(image, convert))

    shapes = [*made_ahead(shape, list(images), threads=DECODERS, depth=4 * DECODERS, name="headers")]
    most = collections.Counter(one[:3] for one in shapes if one[0] == "RGB").most_common(1)
    odd = [
        f"{name}: mode {mode}, {width} x {height} px"
        for (name, _), (mode, width, height, _) in zip(images, shapes, strict=True)
        if not most or (mode, width, height) != most[0][0]
    ]
    if odd:
        first = [*odd[:_SHOWN], f"and {len(odd) - _SHOWN} more"][: len(odd)]
        of = f"{most[0][0][1]} x {most[0][0][2]} px" if most else "one size"
        raise ValueError(
            f"{where}: {len(odd)} of {len(images)} images do not fit, expected RGB of {of}: "
            f"{'; '.join(first)}. Remove those that are no samples; "
            f"{_CONVERT if len({one[1:3] for one in shapes}) == 1 else _CROPS}"
        )
    return sum(not plain for *_, plain in shapes)


_CONVERT = (
    "`haste score --convert` makes the others RGB as the workflow does, upright and with transparency on white; so "
    "does `haste images`, and the folder of its store (stores/images-*) can be the reference"
)
_CROPS = (
    "of photos, `haste images` makes RGB crops of one size, by a configuration that `haste new FOLDER` writes, and the "
    "folder of that store (stores/images-*) is such a set"
)


def _shape(image: Image.Image, convert: bool) -> tuple[str, int, int, bool]:
    """Mode, width and height, once it is RGB if it is to be converted; and whether it is left as it is."""
    if not convert:
        return image.mode, *image.size, True
    shown = pictures.upright_rgb(image)
    return shown.mode, *shown.size, pictures.is_plain(image)
