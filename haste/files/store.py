"""Stores: many samples of equal shape in a folder of HDF5 shards with a manifest.

    folder/shard-00000-of-00002.h5, folder/shard-00001-of-00002.h5, folder/manifest.json

Shards are written atomically by independent jobs; `join` checks them and writes the manifest, without which nothing is
read. (HDF5's own virtual datasets would read a missing shard as zeros.) Every sample has a digest, and the store's
identity is the hash of the digests in order: the same content has the same identity in any number of shards.

Fields are plain contiguous arrays in a shard, so HDF5 only gives their offsets and rows are then read with `pread`: it
is safe in threads and after a fork, a failing disk is an error and not a signal, and the kernel's page cache serves all
processes of a node, while a cache of our own would exist once per process. Pixels may be compressed instead, row by row
(`haste.files.codecs`): digests and so the identity are of the pixels, and shards of both kinds make one store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import h5py
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from haste.files import artefact, codecs, locks
from haste.files.codecs import ENDS, Coded, Spool
from haste.files.progress import Progress

log = logging.getLogger("haste.data")

DIGEST = "digest"
MANIFEST = "manifest.json"
_DIGEST_BYTES = 16
_SMALL = 8  # bytes of a row, such as a label, of a field that is read as a whole
_CHECKED = 256  # samples that are compared with their digests at once
_ENTRY = ("start", "count", "bytes")
_READ_LIMIT = 2**30  # bytes per pread; Linux reads at most 2 GiB at once
_OPEN = 64  # files of a store that stay open; a process may have 1,024
_VERIFY_ROWS = 256
_VERIFIERS = 4  # threads
_AGAIN = "Remove the shard and the manifest: the workflow makes them again"
_UNITS = {"text": "texts"}  # what a row is, of other kinds an image

Fields = Mapping[str, tuple[Sequence[int], DTypeLike]]
Span = range  # `Store.range` would shadow the built-in in annotations


def shard_path(folder: Path | str, shard: int, shards: int) -> Path:
    """The file of one shard, counted from 0."""
    return Path(folder) / f"shard-{shard:05d}-of-{shards:05d}.h5"


def shard_range(total: int, shard: int, shards: int) -> range:
    """The samples of one shard: contiguous, and sizes differ by one at most.

    Raises:
        ValueError: the shard is not one of 0..shards-1.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: expected a shard in 0..{shards - 1}")
    return range(total * shard // shards, total * (shard + 1) // shards)


def write_shard(
    folder: Path | str,
    *,
    kind: str,
    key: str,
    recipe: Mapping[str, Any],
    shard: int,
    shards: int,
    total: int,
    fields: Fields,
    batches: Iterable[Mapping[str, np.ndarray]],
    provenance: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    coded: Mapping[str, str] | None = None,
    workers: int = 1,
    learned: Callable[[], Mapping[str, Any]] = dict,
) -> Path:
    """Write the samples of one shard atomically, one process at a time.

    A shard of the same recipe, facts and fields stays as it is, coded or not; any other is replaced.

    Args:
        folder: the store's folder.
        kind: what the store holds, such as "images".
        key: hash of the recipe that the store's path carries.
        recipe: how the store is made, JSON.
        shard: number of the shard, from 0.
        shards: how many there are.
        total: samples in all shards together.
        fields: name -> (shape of one sample, dtype).
        batches: name -> (B, *shape) of exactly that dtype, in order, from shard_range(total, shard, shards).
        provenance: how this shard was made, JSON.
        facts: properties found in the data, JSON; all shards must agree, and `join` puts them into the manifest.
        progress: of the work that this shard is a part of; by default it has its own.
        coded: fields (H, W, 3) of uint8 that are compressed -> one of `haste.files.codecs.CODECS`.
        workers: threads that compress them; the result does not depend on it.
        learned: called after the last batch: further entries of the provenance, JSON.

    Raises:
        ValueError: batches of wrong fields, shape, dtype or number.
    """
    span = shard_range(total, shard, shards)
    layout = _layout(fields)
    path = shard_path(folder, shard, shards)
    header = {"schema": artefact.SCHEMA, "kind": kind, "key": key, "shard": shard, "shards": shards}
    header |= {"total": total, "start": span.start, "count": len(span)}
    header |= {name: artefact.canonical(obj) for name, obj in [("recipe", recipe), ("facts", facts or {})]}
    layout_on_disk = {**layout, DIGEST: ((_DIGEST_BYTES,), np.dtype("u1"))}
    with locks.making(path, anew=True):
        if _is_there(path, kind, header, layout_on_disk):
            log.info("%s: is there, nothing to make", path)
            return path
        told = {name: {"codec": codec, "shape": list(layout[name][0])} for name, codec in (coded or {}).items()}
        header |= {"coded": artefact.canonical(told)} if told else {}
        plain = {name: entry for name, entry in layout_on_disk.items() if name not in told}
        with (
            artefact.replacing(path) as aside,
            _written(path, aside, len(span), plain) as file,
            _spools(aside.parent, coded or {}, workers) as spools,
        ):
            _set_attributes(file, header)
            for name, (shape, dtype) in plain.items():
                file.create_dataset(name, shape=(len(span), *shape), dtype=dtype)
            mine = Progress(f"{path.parent.name}, shard {shard} of {shards}", len(span), _UNITS.get(kind, "images"))
            _fill(file, path, layout, len(span), batches, progress or mine, spools)
            for name, spool in spools.items():
                _check_room(path, spool.size)
                spool.put(file, name)
            _set_attributes(file, {"provenance": artefact.canonical({**provenance, **learned()})})
    return path


@contextlib.contextmanager
def _spools(folder: Path, coded: Mapping[str, str], workers: int) -> Generator[dict[str, Spool]]:
    with contextlib.ExitStack() as held:
        yield {
            name: held.enter_context(contextlib.closing(Spool(codec, folder, workers))) for name, codec in coded.items()
        }


def _set_attributes(file: h5py.File, entries: Mapping[str, Any]) -> None:
    for name, value in entries.items():
        file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def _is_there(path: Path, kind: str, header: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    """Whether a whole shard with this header and these fields is there."""
    try:
        found = _inspect(path, kind)
    except ValueError:
        return False
    told = {**found.header, **{name: artefact.canonical(found.header[name]) for name in ("recipe", "facts")}}
    return {name: told[name] for name in header} == header and found.fields == layout


@contextlib.contextmanager
def _written(path: Path, aside: Path, count: int, layout: Mapping[str, tuple[Any, np.dtype]]) -> Generator[h5py.File]:
    """An HDF5 file to write `count` samples to.

    Raises:
        OSError: the disk is full, or another write failed.
    """
    _check_room(path, count * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values()))
    try:
        # Format v1.10 allows attributes above 64 KiB, which a resolved recipe can need.
        with h5py.File(aside, "w", libver="v110", locking=False) as file:
            yield file
            file.flush()
    except RuntimeError as error:  # h5py raises it when a write fails on closing
        raise OSError(f"{path}: could not be written: {error}") from error


def _check_room(path: Path, size: int) -> None:
    # Report it before hours of work; and HDF5 cannot even close a file on a full disk.
    if size > (free := shutil.disk_usage(path.parent).free):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: needs {size:,} bytes, {free:,} are free", str(path))


def _layout(fields: Fields) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    if not fields or DIGEST in fields:
        raise ValueError(f"store fields {sorted(fields)}: expected at least one, and none named {DIGEST!r}")
    return {name: (tuple(shape), np.dtype(dtype).newbyteorder("<")) for name, (shape, dtype) in fields.items()}


def _fill(
    file: h5py.File,
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    count: int,
    batches: Iterable[Mapping[str, np.ndarray]],
    progress: Progress,
    spools: Mapping[str, Spool],
) -> None:
    done = 0
    for batch in batches:
        rows = _checked(path, layout, batch)
        size = len(next(iter(rows.values())))
        if done + size > count:
            raise ValueError(f"{path}: found {done + size} samples or more, expected {count}")
        for name, values in rows.items():
            if name in spools:
                spools[name].add(values)
            else:
                _write_rows(file, name, done, values)
        _write_rows(file, DIGEST, done, _digests(rows))
        done += size
        for spool in spools.values():  # the rest of it, and its copy
            _check_room(path, spool.size * (2 * count - done) // done)
        progress.add(size)
    if done != count:
        raise ValueError(f"{path}: found {done} samples, expected {count}")


def _write_rows(file: h5py.File, name: str, start: int, values: np.ndarray) -> None:
    dataset = file[name]
    assert isinstance(dataset, h5py.Dataset)
    dataset[start : start + len(values)] = values


def _checked(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]], batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    # No casting or broadcasting: a batch of another dtype or shape is a mistake upstream.
    if set(batch) != set(layout):
        raise ValueError(f"{path}: found fields {sorted(batch)}, expected {sorted(layout)}")
    rows, sizes = {}, {len(values) for values in batch.values()}
    for name, (shape, dtype) in layout.items():
        values = np.asarray(batch[name])
        if values.shape[1:] != shape or values.dtype != dtype.newbyteorder("=") or len(sizes) != 1:
            found = f"{values.dtype} {values.shape}"
            raise ValueError(f"{path}: field {name!r}: found {found}, expected {dtype.name} (B, {shape})")
        rows[name] = values
    return rows


def _digests(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """blake2b-128 of each sample's little-endian bytes, fields in sorted order: (B, 16) uint8."""
    flat = [_bytes(rows[name]) for name in sorted(rows)]
    digests = np.empty((len(flat[0]), _DIGEST_BYTES), dtype=np.uint8)
    for row in range(len(digests)):
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for values in flat:
            digest.update(values[row].data)
        digests[row] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return digests


def _bytes(values: np.ndarray) -> np.ndarray:
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    # (B, *shape) -> (B, width) -> (B, bytes of a sample)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(len(values), width).view(np.uint8)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The header of a shard, the offsets of its fields in the file, and the fields whose rows are coded there."""

    path: Path
    header: dict[str, Any]
    fields: dict[str, tuple[tuple[int, ...], np.dtype]]
    offsets: dict[str, int]
    coded: dict[str, Coded]


def _inspect(path: Path, kind: str) -> _Shard:
    """Read a shard's header and layout; refuse what is missing, truncated, foreign, or of another schema or kind."""
    if not path.is_file():
        raise ValueError(f"{path}: this shard is missing, expected a {kind} shard")
    try:
        # Shards never change, so a lock is useless, and some cluster file systems refuse it.
        with h5py.File(path, "r", locking=False) as file:
            header = {name: _attribute(file, name) for name in file.attrs}
            artefact.check_header(path, header, kind)
            fields, offsets = _arrays(path, file, header)
            header |= {name: json.loads(header[name]) for name in ("recipe", "facts")}
            return _with_coded(_Shard(path, header, fields, offsets, {}))
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:  # h5py raises these on broken metadata
        raise ValueError(
            f"{path}: expected an HDF5 {kind} shard, found a truncated or foreign file ({error})"
        ) from error


def _with_coded(shard: _Shard) -> _Shard:
    """A shard whose coded fields are what they decode to; their ends are no field of it."""
    fields, size = dict(shard.fields), shard.path.stat().st_size
    for name, entry in shard.header["coded"].items():
        kinds = [fields.pop(one, None) for one in (name, name + ENDS)]
        ends = _read_rows(shard, name + ENDS) if kinds == [((), np.dtype("u1")), ((), np.dtype("<i8"))] else np.zeros(2)
        if (np.diff(ends, prepend=0) <= 0).any() or (len(ends) and shard.offsets[name] + ends[-1] > size):
            raise ValueError(f"{shard.path}: not a shard as `write_shard` makes it; wrong or missing: {name}{ENDS}")
        fields[name], shard.coded[name] = (tuple(entry["shape"]), np.dtype("u1")), Coded(entry["codec"], ends)
    return dataclasses.replace(shard, fields=fields)


def _attribute(file: h5py.File, name: str) -> Any:
    # HDF5 keeps text of variable length in a heap without checksums, and can search a damaged one forever (observed).
    # So ours has a fixed length, and only such text and numbers are read.
    if file.attrs.get_id(name).dtype.kind not in "Siu":
        return None
    value = file.attrs[name]
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value


def _arrays(
    path: Path, file: h5py.File, header: dict[str, Any]
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], dict[str, int]]:
    expected = {"key": str, "recipe": str, "facts": str, "shard": int, "shards": int}
    expected |= {"total": int, "start": int, "count": int}
    header["coded"] = json.loads(header.get("coded", "{}"))
    wrong = _mistyped(header, expected) + ([] if codecs.described(header["coded"]) else ["coded"])
    fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    offsets: dict[str, int] = {}
    size = path.stat().st_size
    for name in map(str, file):
        # Only arrays inside this file: no links to others, no external storage, no compression.
        data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if (
            not isinstance(data, h5py.Dataset)
            or not data.shape
            or data.chunks
            or data.external
            or (data.shape[:1] != (header.get("count"),) and name not in header["coded"])
        ):
            wrong.append(name)
            continue
        fields[name], offsets[name] = (data.shape[1:], data.dtype), data.id.get_offset() or 0
        if data.size and (not offsets[name] or offsets[name] + data.nbytes > size):
            wrong.append(name)
    if wrong or fields.get(DIGEST) != ((_DIGEST_BYTES,), np.dtype("u1")) or len(fields) < 2:
        raise ValueError(f"{path}: not a shard as `write_shard` makes it; wrong or missing: {wrong or sorted(fields)}")
    return fields, offsets


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """The entries in which two recipes differ, as "path: found X, expected Y"."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = sorted({*found, *expected})
        below = [differences(found.get(key), expected.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return [line for lines in below for line in lines]
    return [] if found == expected else [f"{name or 'recipe'}: found {found!r}, expected {expected!r}"]


def check_key(where: Path, key: Any, recipe: Any, expected_key: str, expected_recipe: Any) -> None:
    """Refuse what another recipe made; raises ValueError."""
    if key != expected_key:
        lines = [] if expected_recipe is None else differences(recipe, expected_recipe)
        why = "; ".join(lines[:8]) or "which entries of the recipe differ is not known here"
        raise ValueError(f"{where}: made by another recipe: found key {key}, expected {expected_key} ({why})")


def join(
    folder: Path | str,
    *,
    kind: str,
    key: str,
    recipe: Mapping[str, Any],
    shards: int,
    splits: Mapping[str, Sequence[int]],
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    expected_facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check that every shard exists and fits the others, and write the manifest that makes them a store.

    Args:
        folder: the store's folder.
        kind: what the store holds.
        key: hash of the recipe.
        recipe: how the store is made, JSON.
        shards: how many shards there are.
        splits: name -> [start, stop) within the samples.
        provenance: how the manifest was made, JSON.
        extra: more entries for the manifest, in addition to the shards' facts.
        expected_facts: required values of some facts; None only requires that the shards agree.

    Returns:
        The manifest.

    Raises:
        ValueError: a shard is missing, truncated, foreign, of another key or schema, or disagrees with the others.
    """
    folder = Path(folder)
    found = [_inspect(shard_path(folder, shard, shards), kind) for shard in range(shards)]
    _check_agreement(found, key, recipe)
    facts, count, fields = found[0].header["facts"], found[0].header["total"], found[0].fields
    _check_facts(found[0], expected_facts or {})
    _check_splits(folder, splits, count)
    manifest = {
        **facts,
        **(extra or {}),
        "schema": artefact.SCHEMA,
        "kind": "store",
        "store": kind,
        "key": key,
        "recipe": dict(recipe),
        "count": count,
        "fields": _described(fields),
        "splits": {name: [int(start), int(stop)] for name, (start, stop) in splits.items()},
        "shards": [_entry(shard) for shard in found],
        "identity": _identity(_read_rows(shard, DIGEST) for shard in found),
        "provenance": dict(provenance),
    }
    if (found_before := _unchanged(folder / MANIFEST, manifest)) is not None:
        return found_before
    artefact.write_json(folder / MANIFEST, manifest)
    return manifest


def _check_facts(shard: _Shard, expected: Mapping[str, Any]) -> None:
    wrong = differences({name: shard.header["facts"].get(name) for name in expected}, dict(expected))
    if wrong:
        raise ValueError(f"{shard.path}: made from something else: {'; '.join(wrong[:8])}")


def _check_splits(folder: Path, splits: Mapping[str, Sequence[int]], count: int) -> None:
    for name, (start, stop) in splits.items():
        if not 0 <= start <= stop <= count:
            raise ValueError(f"{folder}: split {name!r} is [{start}, {stop}), expected it within 0..{count}")


def _unchanged(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The existing manifest, if its content is the same: it then keeps its provenance."""
    try:
        found = artefact.read_json(path, "store")
    except (ValueError, OSError):
        return None
    return found if {**found, "provenance": None} == {**manifest, "provenance": None} else None


def _described(fields: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, dict[str, Any]]:
    kept = {name: entry for name, entry in sorted(fields.items()) if name != DIGEST}
    return {name: {"shape": list(shape), "dtype": dtype.name} for name, (shape, dtype) in kept.items()}


def _check_agreement(found: Sequence[_Shard], key: str, recipe: Mapping[str, Any]) -> None:
    first = found[0]
    for number, shard in enumerate(found):
        header = shard.header
        check_key(shard.path, header["key"], header["recipe"], key, recipe)
        span = shard_range(first.header["total"], number, len(found))
        place = {"shard": number, "shards": len(found), "total": first.header["total"]}
        place |= {"start": span.start, "count": len(span)}
        wrong = differences({name: header[name] for name in place}, place)
        wrong += differences(header["facts"], first.header["facts"])
        wrong += differences(_names(shard), _names(first))
        if wrong:
            raise ValueError(f"{shard.path}: does not fit {first.path.name}: {'; '.join(wrong[:8])}")


def _names(shard: _Shard) -> dict[str, str]:
    return {name: f"{dtype.name} {shape}" for name, (shape, dtype) in shard.fields.items()}


def _entry(shard: _Shard) -> dict[str, Any]:
    header, size = shard.header, shard.path.stat().st_size
    entry = {"file": shard.path.name, "start": header["start"], "count": header["count"], "bytes": size}
    return entry | ({"coded": {name: one.codec for name, one in shard.coded.items()}} if shard.coded else {})


def _identity(digests: Iterable[np.ndarray]) -> str:
    """sha256 over the per-sample digests in order, independent of the number of shards."""
    whole = hashlib.sha256()
    for part in digests:
        whole.update(np.ascontiguousarray(part).data)
    return whole.hexdigest()


def _read_rows(shard: _Shard, name: str) -> np.ndarray:
    shape, dtype = shard.fields[name]
    out = np.empty((shard.header["count"], *shape), dtype=dtype)
    with open(shard.path, "rb") as file:
        _pread(shard, file.fileno(), out.reshape(-1).view(np.uint8), shard.offsets[name])
    return out


def _pread(shard: _Shard, descriptor: int, out: np.ndarray, offset: int) -> None:
    """Fill `out` (bytes) from an offset in the file."""
    done = 0
    while done < len(out):
        found = os.preadv(descriptor, [out[done : done + _READ_LIMIT].data], offset + done)
        if not found:
            raise ValueError(f"{shard.path}: truncated: found {offset + done} bytes, expected {offset + len(out)}")
        done += found


#: Calls a function with each of some items, in any order, and returns once all are done.
Reads = Callable[[Callable[[Any], None], Sequence[Any]], None]


def one_by_one(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """In this thread, in order."""
    for item in items:
        work(item)


def in_threads(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """In as many threads as Python thinks right for this machine."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, items):
            pass


def _opened(shards: Sequence[_Shard], number: int) -> io.FileIO:
    """A shard's file. It closes when nobody holds it any more: a thread that reads keeps what it reads from."""
    return io.FileIO(shards[number].path, "rb")


class Made(Protocol):
    """An artefact of a plan that is a store."""

    @property
    def kind(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def recipe(self) -> Mapping[str, Any]: ...
    @property
    def folder(self) -> str: ...


class Store:
    """A joined store, opened for reading. Open one with `Store.open`; close it, or use it as a context manager.

    Attributes:
        folder: its folder.
        manifest: all of manifest.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[_Shard], digests: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        self._digests = digests  # (count, 16) uint8
        self._fits = np.zeros(manifest["count"], dtype=bool)  # the samples whose digests were compared
        self._columns, self._reading = dict[str, np.ndarray](), threading.Lock()  # see `_column`
        self._shards, self._starts = shards, np.array([shard.header["start"] for shard in shards])
        self._reads: Reads = in_threads if any(shard.coded for shard in shards) else one_by_one
        self._open = functools.lru_cache(_OPEN)(functools.partial(_opened, shards))

    @classmethod
    def of(cls, made: Made) -> Store:
        """Open the store of a plan's artefact, with its kind, key and recipe; see `open`."""
        return cls.open(made.folder, kind=made.kind, key=made.key, recipe=made.recipe)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        kind: str | None = None,
        key: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        verify: Literal["quick", "full"] = "quick",
    ) -> Store:
        """Open a store and check it.

        Args:
            folder: the store's folder.
            kind: required kind; None accepts any.
            key: required key; None accepts any.
            recipe: the recipe behind `key`, only to report the differences if the key differs.
            verify: "quick" checks the manifest, every shard's presence, size, header and layout, and the digests (16
                bytes per sample) against the identity; "full" also reads every sample and compares it with its digest.

        Raises:
            ValueError: something is missing, truncated, foreign, of another kind, schema or key, or damaged; the
                message names the file, what was found and what was expected.
        """
        folder = Path(folder)
        manifest = artefact.read_json(folder / MANIFEST, "store")
        _check_manifest(folder / MANIFEST, manifest)
        if kind is not None and manifest["store"] != kind:
            raise ValueError(f"{folder / MANIFEST}: a store of {manifest['store']}, expected {kind}")
        if key is not None:
            check_key(folder / MANIFEST, manifest["key"], manifest["recipe"], key, recipe)
        shards = [_open_shard(folder, manifest, number) for number in range(len(manifest["shards"]))]
        digests = [_read_rows(shard, DIGEST) for shard in shards]
        store, identity = cls(folder, manifest, shards, np.concatenate(digests)), _identity(digests)
        if identity != store.identity:
            raise ValueError(f"{folder}: the shards' identity is {identity}, expected {store.identity} by the manifest")
        if verify == "full":
            store._verify()
        return store

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.manifest["count"]

    @property
    def identity(self) -> str:
        """sha256 of the content, independent of the number of shards."""
        return self.manifest["identity"]

    @property
    def recipe(self) -> dict[str, Any]:
        """How it was made."""
        return self.manifest["recipe"]

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape of one sample, dtype)."""
        entries = self.manifest["fields"].items()
        return {name: (tuple(entry["shape"]), np.dtype(entry["dtype"])) for name, entry in entries}

    @property
    def splits(self) -> dict[str, Span]:
        """Name -> samples of the split."""
        return {name: range(*bounds) for name, bounds in self.manifest["splits"].items()}

    def range(self, split: str) -> Span:
        """The samples of a split.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self.splits:
            raise ValueError(f"{self.folder}: no split {split!r}, expected one of {sorted(self.splits)}")
        return self.splits[split]

    def read(self, field: str, indices: ArrayLike | Sequence[int]) -> np.ndarray:
        """Read one field of samples, (len(indices), *shape); see `rows`."""
        return self.rows([field], indices)[field]

    def rows(
        self, fields: Sequence[str], indices: ArrayLike | Sequence[int], reads: Reads | None = None
    ) -> dict[str, np.ndarray]:
        """Read fields of samples in the given order, with repetitions: name -> (len(indices), *shape).

        What this process has not read yet is compared with its digest.

        Args:
            fields: their names.
            indices: of the samples.
            reads: makes the reads, which may go on in several threads at once. None decodes coded rows on all cores.

        Raises:
            ValueError: there is no such field or sample, the file lacks what its manifest promises, or is damaged.
        """
        if unknown := [field for field in fields if field not in self.manifest["fields"]]:
            raise ValueError(
                f"{self.folder}: no field {unknown[0]!r}, expected one of {sorted(self.manifest['fields'])}"
            )
        wanted, back = np.unique(self._indices(indices), return_inverse=True)
        found = self._read(fields, wanted, reads)
        new = np.flatnonzero(~self._fits[wanted])
        for low in range(0, len(new), _CHECKED):
            some = new[low : low + _CHECKED]
            self._check_digests(wanted[some], {field: found[field][some] for field in fields}, reads)
        if np.array_equal(back, np.arange(len(wanted))):  # in order: there is nothing to arrange
            return found
        return {field: values[back] for field, values in found.items()}

    def _indices(self, indices: ArrayLike | Sequence[int]) -> np.ndarray:
        asked = np.asarray(indices)
        if asked.ndim != 1 or (asked.size and asked.dtype.kind not in "iu"):
            raise ValueError(f"{self.folder}: indices are {asked.dtype} {asked.shape}, expected a row of integers")
        asked = asked.astype(np.int64)
        if asked.size and not (asked.min() >= 0 and asked.max() < self.count):
            raise ValueError(f"{self.folder}: indices {asked.min()}..{asked.max()}, expected 0..{self.count - 1}")
        return asked

    def _check_digests(self, rows: np.ndarray, known: Mapping[str, np.ndarray], reads: Reads | None) -> None:
        others = [name for name in self.manifest["fields"] if name not in known]
        wrong = self._damaged(rows, {**known, **self._read(others, rows, reads)})
        if wrong is not None:
            raise ValueError(
                f"{self.folder}: sample {wrong} does not fit its digest, so its shard is damaged. {_AGAIN}"
            )
        self._fits[rows] = True

    def _damaged(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> int | None:
        """The first of some samples that does not fit its digest, given all fields of them."""
        wrong = np.flatnonzero((_digests(values) != self._digests[rows]).any(axis=1))
        return int(rows[wrong[0]]) if len(wrong) else None

    def _read(self, fields: Sequence[str], wanted: np.ndarray, reads: Reads | None = None) -> dict[str, np.ndarray]:
        """Fields of samples in ascending order, each once; adjacent ones of a shard are read at once."""
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        cuts = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(numbers) != 0)) + 1
        runs = list(zip([0, *cuts], [*cuts, len(wanted)], strict=True)) if len(wanted) else []
        found, pieces = {}, []
        for field in fields:
            shape, dtype = self._shards[0].fields[field]
            if self._is_small(field):
                found[field] = self._column(field, reads)[wanted]
                continue
            values = found[field] = np.empty((len(wanted), *shape), dtype=dtype)
            for low, high in runs:
                number = int(numbers[low])
                step = 1 if field in self._shards[number].coded else high - low
                for first in range(low, high, step):
                    row = int(wanted[first] - self._starts[number])
                    pieces.append((number, field, row, values[first : first + step]))
        (reads or self._reads)(self._fill, pieces)
        return {field: values.astype(values.dtype.newbyteorder("="), copy=False) for field, values in found.items()}

    def _is_small(self, field: str) -> bool:
        shape, dtype = self._shards[0].fields[field]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return size <= _SMALL and not any(field in shard.coded for shard in self._shards)

    def _column(self, field: str, reads: Reads | None) -> np.ndarray:
        """All of a field of small rows, kept as the digests are: to read a label of a disk that is far away takes as
        long as to read a picture."""
        with self._reading:
            if field not in self._columns:
                shape, dtype = self._shards[0].fields[field]
                column, starts = np.empty((self.count, *shape), dtype=dtype), [*self._starts, self.count]
                spans = [(n, low, high) for n, (low, high) in enumerate(itertools.pairwise(starts)) if low < high]
                (reads or self._reads)(self._fill, [(n, field, 0, column[low:high]) for n, low, high in spans])
                self._columns[field] = column
            return self._columns[field]

    def _fill(self, piece: tuple[int, str, int, np.ndarray]) -> None:
        """Read rows of a shard's field from `row` on; of coded ones one."""
        number, field, row, out = piece
        shard, file = self._shards[number], self._open(number)
        if field not in shard.coded:
            start = shard.offsets[field] + row * (out.nbytes // len(out))
            _pread(shard, file.fileno(), out.reshape(-1).view(np.uint8), start)
            return
        start, size = shard.coded[field].span(row)
        data = np.empty(size, dtype=np.uint8)
        _pread(shard, file.fileno(), data, shard.offsets[field] + start)
        try:
            out[0] = shard.coded[field].decoded(data.tobytes(), out.shape[1:])
        except Exception as error:  # of many classes
            sample = shard.header["start"] + row
            raise ValueError(
                f"{shard.path}: sample {sample} is damaged: it cannot be decoded ({error}). {_AGAIN}"
            ) from error

    def _verify(self) -> None:
        """Compare every sample with its digest; reading and hashing release the GIL."""

        def damaged(low: int) -> int | None:
            rows = np.arange(low, min(low + _VERIFY_ROWS, self.count))
            return self._damaged(rows, self._read(list(self.manifest["fields"]), rows))

        with ThreadPoolExecutor(_VERIFIERS) as pool:
            for sample in pool.map(damaged, range(0, self.count, _VERIFY_ROWS)):
                if sample is not None:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(f"{self._file_of(sample)}: sample {sample} is damaged: it does not fit its digest")

    def _file_of(self, sample: int) -> Path:
        return next(s.path for s in self._shards if sample < s.header["start"] + s.header["count"])

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._open.cache_clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    expected = {"store": str, "key": str, "recipe": dict, "count": int, "fields": dict, "splits": dict}
    expected |= {"shards": list, "identity": str}
    wrong = _mistyped(manifest, expected) or ([] if manifest["shards"] else ["shards"])
    if not wrong:
        wrong += [f"splits.{n}" for n, ends in manifest["splits"].items() if not _is_span(ends, manifest["count"])]
        wrong += [name for name, f in manifest["fields"].items() if _mistyped(f, {"shape": list, "dtype": str})]
        wrong += [f"shard {n}" for n, s in enumerate(manifest["shards"]) if _mistyped(s, dict.fromkeys(_ENTRY, int))]
    if wrong:
        raise ValueError(f"{path}: not a manifest as `join` makes it; wrong or missing: {wrong}")


def _is_span(ends: Any, count: int) -> bool:
    return isinstance(ends, list) and [*map(type, ends)] == [int, int] and 0 <= ends[0] <= ends[1] <= count


def _mistyped(found: Any, expected: Mapping[str, type]) -> list[str]:
    if not isinstance(found, Mapping):
        return sorted(expected)
    return sorted(name for name, cls in expected.items() if not isinstance(found.get(name), cls))


def _open_shard(folder: Path, manifest: Mapping[str, Any], number: int) -> _Shard:
    """Check one shard against the manifest: name, size, header and layout."""
    entry, shards = manifest["shards"][number], len(manifest["shards"])
    path = shard_path(folder, number, shards)  # never a path from the manifest, which could lead elsewhere
    if not path.is_file():
        raise ValueError(f"{path}: this shard is missing, expected {entry['bytes']} bytes")
    try:
        shard = _inspect(path, manifest["store"])
    except ValueError as error:
        # One that was made again may have another size: how it was made is told in more words, or it is compressed.
        if (size := path.stat().st_size) == entry["bytes"]:
            raise
        raise ValueError(f"{path}: found {size} bytes, expected {entry['bytes']}: truncated or replaced") from error
    expected = {"key": manifest["key"], "shard": number, "shards": shards, "total": manifest["count"]}
    expected |= {"start": entry["start"], "count": entry["count"]}
    wrong = differences({name: shard.header[name] for name in expected}, expected)
    described = {name: f"{f['dtype']} {tuple(f['shape'])}" for name, f in manifest["fields"].items()}
    wrong += differences({name: text for name, text in _names(shard).items() if name != DIGEST}, described)
    # The manifest repeats the shards' facts; an edited entry there must not pass for true.
    facts = shard.header["facts"]
    wrong += differences(facts, {name: manifest.get(name) for name in facts})
    span = shard_range(manifest["count"], number, shards)
    if wrong or (entry["start"], entry["count"]) != (span.start, len(span)):
        raise ValueError(f"{path}: does not fit its manifest: {'; '.join(wrong) or 'its range of samples'}")
    return shard
