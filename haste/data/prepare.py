"""Images in: a source of images becomes a store of square uint8 RGB images and labels.

A source is a class with `count`, `classes`, `holdout`, `listing` and `load`, and one line in `SOURCES`. Sources put the
held-out images last, so that the splits of the store are two ranges.
"""

from __future__ import annotations

import collections
import inspect
import io
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from haste.data import order, pictures
from haste.data.digits import Digits, MovedDigits
from haste.files import artefact, listing, texts, walk
from haste.files.archives import Archives
from haste.files.captions import NO_CAPTION
from haste.files.listing import Listing
from haste.files.parquet import Rows
from haste.files.progress import Progress
from haste.files.provenance import provenance_of
from haste.files.sources import identity_of, pictures_of
from haste.files.store import join, shard_path, shard_range, write_shard
from haste.files.walk import Directory, Parts, Unused

KIND = "images"
PICTURES = "pictures"  # in a shard's provenance: what its pictures were
ENLARGED = "enlarged"  # there: how many were smaller than they were made, by their shorter side in pixels
_BATCH = 64
_SHOWN = 10  # images named in a message
Bad = list[tuple[str, str]]  # name and reason


class Source(Protocol):
    """Labelled images, held-out ones last.

    Attributes:
        count: number of all images.
        classes: name of each class; a label is an index into it.
        holdout: how many of the last images are held out from training.
        resolution: R, the side of the squares that `load` returns.
        listing: hash that identifies the set of images, equal in every job that shares the work.
        captioned: whether images have captions.

    A source without labels has no classes, and its label is always 0, which is then the null class.
    """

    count: int
    classes: list[str]
    holdout: int
    resolution: int
    listing: str
    captioned: bool

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Image i as (R, R, 3) uint8, and its label.

        Raises:
            ValueError: the image cannot be read, or has no caption where others have; the message names its file.
        """
        ...

    def captions(self, i: int) -> list[str]:
        """The captions of image i, at least one; only where `captioned`."""
        ...


class Folder:
    """Images in a folder and their labels, as `haste.files.listing.listed` says.

    Held-out images are chosen by a permutation that depends only on `seed` and the number of images.
    """

    unused: Unused

    def __init__(
        self,
        resolution: int,
        holdout: int,
        path: Path | str,
        seed: int = 0,
        labelled: bool = True,
        without: frozenset[str] = frozenset(),
        classes: int | None = None,
        labels: str | None = None,
        captions: str | None = None,
        crop: str = "adm",
        reader: str = "upright",
        subset: int | None = None,
    ) -> None:
        """
        Args:
            resolution: side of the squares, pixels.
            holdout: images to hold out from training.
            path: where they are.
            seed: of the permutation that chooses those.
            labelled: whether labels count.
            without: names of images to leave out, as `check` returns them.
            classes: the number of classes that is expected; it decides only where pictures say nothing.
            labels: a .csv of names and labels; for rows of parquet files, their column.
            captions: where they are, as `haste.files.listing.with_captions` says.
            crop: one of `haste.data.pictures.CROPS`.
            reader: one of `haste.data.pictures.READERS`.
            subset: how many of the images to train on are used; None is all.
        """
        self.root, self.resolution = Path(path), resolution
        self._small: dict[int, int] = {}  # the shorter side of images loaded so far that are smaller than `resolution`
        self._crop, self._reader = pictures.CROPS[crop], pictures.READERS[reader]
        found = self._list(labelled, classes, labels, captions)
        assert found.classes is not None
        self.classes, self.unused, self._found = found.classes, found.unused, found
        self.captioned = found.captions is not None
        files = [(parts, label) for parts, label in found.files if "/".join(parts) not in without]
        if bare := [self.classes[label] for label in sorted({*range(len(self.classes))} - {y for _, y in files})]:
            raise ValueError(f"{path}: class {bare[0]!r} has no picture that can be read, expected at least one")
        listing.checked_holdout(str(path), holdout, len(files), found.held_out)
        out = np.zeros(len(files), dtype=bool)
        if found.held_out is None:
            out[order.permutation(seed, 0, len(files))[:holdout]] = True
        else:  # those that are left of the source's own
            last = {parts for parts, _ in found.files[len(found.files) - found.held_out :]}
            out[:] = [parts in last for parts, _ in files]
        self.holdout = int(out.sum())
        ordered = [files[i] for i in [*np.flatnonzero(~out), *np.flatnonzero(out)]]
        kept = listing.checked_subset(subset, len(files) - self.holdout)
        self._files = [ordered[i] for i in order.used(len(files), self.holdout, kept)]
        self.count = len(self._files)
        self.listing = artefact.fingerprint([[parts, label, *self._mark(parts)] for parts, label in self._files])

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Image i as (R, R, 3) uint8, and its label.

        Raises:
            ValueError: the file is not a readable image.
        """
        path, (parts, label) = self.root / self.name(i), self._files[i]
        try:
            if self.captioned and not self.captions(i):
                raise ValueError(NO_CAPTION)
            image = pictures.opened(self._file(self._found.places.get(parts, parts)), self._reader)
            if min(image.size) < self.resolution:
                self._small[i] = min(image.size)
            return np.asarray(self._crop(image, self.resolution)), label
        except Exception as error:  # of many classes; without its name nobody finds the file
            raise ValueError(f"{path}: not a picture that can be read ({pictures.reason(error, path)})") from error

    def enlarged(self, samples: range) -> dict[str, int]:
        """Shorter side in pixels -> how many of some images, which were loaded, were enlarged from it."""
        sides = collections.Counter(self._small[i] for i in samples if i in self._small)
        return {str(side): count for side, count in sorted(sides.items())}

    def held(self, samples: range) -> str:
        """The identity of some images' names, sizes and labels."""
        return identity_of(pictures_of(self._found.sized(*self._files[i]) for i in samples))

    def captions(self, i: int) -> list[str]:
        """The captions of image i, in order."""
        return (self._found.captions or {}).get(self._files[i][0], [])

    def _mark(self, parts: Parts) -> list[str]:
        return [self._found.marks[parts]] if parts in self._found.marks else []

    def name(self, i: int) -> str:
        """The file of image i, below the folder."""
        return "/".join(self._files[i][0])

    def _list(self, labelled: bool, classes: int | None, labels: str | None, captions: str | None) -> Listing:
        tree = Directory(self.root)
        self._file: Callable[[Parts], Path | io.BytesIO] = tree.file
        return listing.with_captions(listing.listed(tree, labelled, classes, labels), tree, captions)


class Archive(Folder):
    """Images in a .zip or .tar, or in a folder of such, in the order that a `Folder` of the unpacked files has.

    Folders common to all images are ignored, so it does not matter whether `train/` or its contents were packed.
    """

    def _list(self, labelled: bool, classes: int | None, labels: str | None, captions: str | None) -> Listing:
        tree = Archives(self.root)
        self._file = lambda parts: io.BytesIO(tree.read(parts))
        return listing.with_captions(listing.listed(tree, labelled, classes, labels), tree, captions)


class Parquet(Folder):
    """Images in the rows of parquet files, as hubs keep data sets, in the rows' order."""

    def _list(self, labelled: bool, classes: int | None, labels: str | None, captions: str | None) -> Listing:
        rows = Rows(self.root)
        self._file = lambda parts: io.BytesIO(rows.read(parts))
        return listing.of_rows(rows, labelled, classes, labels)


class Coco(Folder):
    """MS-COCO as it is handed out: train and val pictures with their captions, in the order of their numbers; those of
    val are held out."""

    def _list(self, labelled: bool, classes: int | None, labels: str | None, captions: str | None) -> Listing:
        tree = Directory(self.root)
        self._file = tree.file
        return listing.of_coco(tree)


SOURCES = {
    "digits": Digits,
    "moved-digits": MovedDigits,
    "folder": Folder,
    "archive": Archive,
    "parquet": Parquet,
    "coco": Coco,
}


def open_source(name: str, *, resolution: int, holdout: int, **options: Any) -> Source:
    """Open a source of images by its name.

    Args:
        name: a key of `SOURCES`.
        resolution: side of the squares, pixels.
        holdout: images to hold out from training.
        options: the source's other arguments: `path` and `seed` for a folder.

    Raises:
        ValueError: no such source, an unknown option, or nothing to read.
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


def check(source: Folder, workers: int = 1) -> Bad:
    """Read every image of a folder: names and reasons of those that cannot be used, in order.

    Args:
        source: the folder.
        workers: threads that decode images; the result does not depend on it.
    """
    bad: Bad = []
    done, progress = 0, Progress("pictures checked", source.count, "pictures")
    for loaded in _attempts(source, range(source.count), workers):
        for i, found in enumerate(loaded, start=done):
            if isinstance(found, ValueError):
                reason = str(found).partition("not a picture that can be read (")[2].removesuffix(")")
                bad.append((source.name(i), reason or str(found)))
        done += len(loaded)
        progress.add(len(loaded))
    return bad


def write_checked(path: Path | str, source: Folder, bad: Bad, *, key: str) -> None:
    """Store what `check` found.

    Raises:
        ValueError: no image can be used.
    """
    if len(bad) == source.count:
        raise ValueError(f"{source.root}: {told(bad)}, expected some that can")
    header = {"schema": artefact.SCHEMA, "kind": "checked", "key": key, "listing": source.listing}
    header["held"] = source.held(range(source.count))
    made = artefact.provenance(key=key)
    found = {"pictures": source.count, "bad": [*map(list, bad)], "unused": walk.grouped(source.unused)}
    artefact.write_json(path, {**header, **found, "provenance": made})


def read_checked(path: Path | str, source: Source) -> Bad:
    """The stored result of `check` for a source.

    Raises:
        ValueError: the source was not checked, or has changed since.
    """
    found = artefact.read_json(path, "checked")
    repaired = isinstance(source, Folder) and found.get("held") not in (None, source.held(range(source.count)))
    if found["listing"] != source.listing or repaired:
        raise ValueError(
            f"{path}: {found['pictures']} pictures were checked, but others are there now ({source.count}). Bring them "
            "back, or remove this file to check them anew"
        )
    return [(name, reason) for name, reason in found["bad"]]


def told(bad: Bad) -> str:
    """How many images cannot be used, why, and the first ones by name."""
    reasons = collections.Counter(reason for _, reason in bad).most_common()
    counts = "; ".join(f"{count} {reason}" if reasons[1:] else reason for reason, count in reasons[:_SHOWN])
    names = ", ".join(walk.printable(name) for name, _ in bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
    return f"{len(bad)} picture{'s' * (len(bad) != 1)} cannot be used: {counts} ({names})"


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
    stored_as: str = "raw",
) -> Path:
    """Write one shard of an image store: image (R, R, 3) uint8 and label int64.

    Args:
        folder: the store's folder.
        source: of the images.
        key: hash of the recipe.
        recipe: how the store is made, JSON.
        shard: which shard, from 0.
        shards: the number of shards.
        provenance: how this shard is made, JSON.
        workers: threads that decode images and compress them; the result does not depend on it.
        stored_as: `raw`, or one of `haste.files.codecs.CODECS`; the pixels are the same.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    size, samples = source.resolution, shard_range(source.count, shard, shards)
    if isinstance(source, Folder):
        provenance = {**provenance, "inputs": {**provenance.get("inputs", {}), PICTURES: source.held(samples)}}
    return write_shard(
        folder,
        kind=KIND,
        key=key,
        recipe=recipe,
        shard=shard,
        shards=shards,
        total=source.count,
        fields={"image": ((size, size, 3), np.uint8), "label": ((), np.int64)},
        batches=_load(source, samples, workers),
        provenance=provenance,
        facts=_facts(source),
        coded={} if stored_as == "raw" else {"image": stored_as},
        workers=workers,
        learned=lambda: {ENLARGED: source.enlarged(samples)} if isinstance(source, Folder) else {},
    )


def _facts(source: Source) -> dict[str, Any]:
    # The listing makes `join` refuse shards if the folder changed between them.
    return {"classes": source.classes, "resolution": source.resolution, "listing": source.listing}


def _load(source: Source, samples: range, workers: int) -> Iterator[dict[str, np.ndarray]]:
    bad: list[ValueError] = []
    for loaded in _attempts(source, samples, workers):
        good = [found for found in loaded if not isinstance(found, ValueError)]
        bad += [found for found in loaded if isinstance(found, ValueError)]
        if not bad:  # otherwise the shard is lost, and all its errors are reported at once
            images, labels = zip(*good, strict=True)
            yield {"image": np.stack(images), "label": np.array(labels, dtype=np.int64)}
    if bad:
        names = "; ".join([*map(str, bad[:_SHOWN]), f"and {len(bad) - _SHOWN} more"][: len(bad)])
        raise ValueError(
            f"{len(bad)} of {len(samples)} pictures of this shard cannot be used: {names}. Repair or remove them, or "
            "leave such out (images.on_bad_image: skip)"
        )


def _attempts(source: Source, samples: range, workers: int) -> Iterator[list[tuple[np.ndarray, int] | ValueError]]:
    """Images and labels in batches, with an error instead of an image that cannot be read."""

    def attempt(i: int) -> tuple[np.ndarray, int] | ValueError:
        try:
            return source.load(i)
        except ValueError as refusal:
            return refusal

    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without Python's lock
        for low in range(0, len(samples), _BATCH):
            yield list(pool.map(attempt, samples[low : low + _BATCH]))


def prepare_join(
    folder: Path | str,
    source: Source,
    *,
    key: str,
    recipe: Mapping[str, Any],
    shards: int,
    provenance: Mapping[str, Any],
    skipped: Bad | None = None,
) -> dict[str, Any]:
    """Join the shards of an image store; its splits are "train" and "held_out", its manifest names the classes.

    The manifest also names the skipped images, `skipped`, each with the reason, and the files of the source that are
    not used, `unused`, by reason; and how many images were `enlarged`, with the median of their shorter sides in
    pixels, if all shards have counted them.

    Returns:
        The manifest.

    Raises:
        ValueError: a shard is missing, foreign or of another source.
    """
    if isinstance(source, Folder):
        _check_shards(folder, source, shards)
    kept = source.count - source.holdout
    said = {}
    if source.captioned:
        said["captions"] = texts.write(folder, (source.captions(i) for i in range(source.count)))
    return join(
        folder,
        kind=KIND,
        key=key,
        recipe=recipe,
        shards=shards,
        splits={"train": [0, kept], "held_out": [kept, source.count]},
        provenance=provenance,
        extra={
            **said,
            **_enlarged(folder, shards),
            **({} if skipped is None else {"skipped": [list(entry) for entry in skipped]}),
            "unused": walk.grouped(getattr(source, "unused", [])),
        },
        expected_facts=_facts(source),
    )


def _enlarged(folder: Path | str, shards: int) -> dict[str, Any]:
    sides = collections.Counter[int]()
    for shard in range(shards):
        path = shard_path(folder, shard, shards)
        counted = provenance_of(path)["provenance"].get(ENLARGED) if path.exists() else None
        if counted is None:
            return {}
        sides.update({int(side): count for side, count in counted.items()})
    median = statistics.median(sides.elements()) if sides else None
    return {ENLARGED: {"count": sides.total(), "median": median}}


def _check_shards(folder: Path | str, source: Folder, shards: int) -> None:
    """Refuse shards whose pictures have changed since, as if they had been replaced between two jobs."""
    old = []
    for shard in range(shards):
        path = shard_path(folder, shard, shards)
        made = provenance_of(path)["provenance"].get("inputs", {}).get(PICTURES) if path.exists() else None
        if made not in (None, source.held(shard_range(source.count, shard, shards))):
            old.append(str(path))
    if old:
        raise ValueError(
            f"{source.root}: pictures were changed after some shards were made from them. Put them back, or remove "
            f"{', '.join(old[:_SHOWN])}{', ...' if len(old) > _SHOWN else ''} and run again"
        )
