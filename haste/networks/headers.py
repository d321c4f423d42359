"""What a file of weights holds: names, shapes and types of its tensors, and the plain data beside them. No torch.

Formats: safetensors, torch's zip archives, and torch's older pickles. Of a tensor only its place in the file is read.

Nothing in a file is executed; see `haste.networks.pickles`.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from haste.networks import foreign
from haste.networks.pickles import SIZES, RefusedError, Storage, Stored, Unpickler

MOST_HEADER = 100_000_000  # bytes of JSON; safetensors' own limit
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's older files
_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
_OF_SAFETENSORS |= {"I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}
_OF_SAFETENSORS |= {"U16": "uint16", "U32": "uint32", "U64": "uint64"}
_OF_SAFETENSORS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


class MissingError(ValueError):
    """What a configuration names is not there, or not yet."""


def contents(path: Path | str, expected: str = "a checkpoint") -> tuple[Any, dict[str, str] | None]:
    """What a file of weights holds, with `Stored` in the place of tensors, and safetensors' metadata.

    Args:
        path: the file.
        expected: for the message.

    Returns:
        Of safetensors a dictionary of tensors, and the metadata; of torch's files whatever was saved, and None.

    Raises:
        ValueError: the file is missing, truncated or foreign, or holds what could run code; the message names it, what
            it is, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        found = foreign.folder(path) if path.exists() else "nothing"
        raise MissingError(f"{path}: expected {expected}, found {found}")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        # safetensors files begin with the length of their JSON header
        if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < MOST_HEADER:
            return _of_safetensors(path)
        return (_of_zip(path) if zipfile.is_zipfile(path) else _of_pickles(path)), None
    except RefusedError as refusal:
        raise ValueError(f"{path}: {refusal}") from refusal
    except Exception as error:  # bytes that are no checkpoint raise errors of all kinds
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        found = foreign.file(path) or f"a truncated or foreign file ({first})"
        raise ValueError(f"{path}: expected {expected}, found {found}") from error


def kind(held: Any) -> str:
    """What a file holds, in a word."""
    return "Tensor" if isinstance(held, Stored) else type(held).__name__


def safetensors_header(path: Path | str) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file (names, types and offsets of the tensors, and "__metadata__"), and the
    offset at which the tensors begin.

    Raises:
        ValueError: it has no such header.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, MOST_HEADER))), 8 + length


def _of_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    header, begin = safetensors_header(path)
    metadata, found, end = header.pop("__metadata__", None) or {}, {}, 0
    for name, entry in header.items():
        dtype, shape, (low, high) = _OF_SAFETENSORS[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if min(low, *shape, high - low) < 0 or high - low != math.prod(shape) * SIZES[dtype]:
            raise ValueError(f"{name} is {dtype} {shape} in {high - low} bytes")
        found[name] = Stored(Storage(dtype, math.prod(shape), begin + low), dtype, shape, _contiguous(shape))
        end = max(end, high)
    if (size := path.stat().st_size) != begin + end:
        raise ValueError(f"{size:,} bytes, expected {begin + end:,}")
    return found, metadata


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


# ---- torch's files


def _of_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
        root = pickles[0].removesuffix("data.pkl") if pickles else ""
        if not pickles or f"{root}constants.pkl" in records:
            raise ValueError("no data.pkl")
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers have their largest byte first")

        def place(storage: Storage, key: str) -> None:
            entry = records[f"{root}data/{key}"]
            if entry.compress_type or entry.file_size != storage.count * SIZES[storage.dtype]:
                raise ValueError(f"{entry.filename}: {entry.file_size} bytes for {storage.count} {storage.dtype}")
            file.seek(entry.header_offset)
            name, extra = struct.unpack("<26xHH", file.read(30))
            storage.start = entry.header_offset + 30 + name + extra
            if storage.start + entry.file_size > path.stat().st_size:
                raise ValueError(f"{entry.filename}: ends beyond the file")

        if records[pickles[0]].compress_type:
            raise ValueError("data.pkl is compressed")
        return Unpickler(io.BytesIO(archive.read(pickles[0])), place).load()


def _of_pickles(path: Path) -> Any:
    """Of torch before 1.6: a magic number, a version, the machine, what was saved, the storages' keys, the storages."""
    kept: dict[str, Storage] = {}
    with open(path, "rb") as file:
        within = _Within(file, path.stat().st_size)
        start = [Unpickler(within).load() for _ in range(2)]
        if start != [_MAGIC, _PROTOCOL]:
            raise ValueError("no magic number of torch's")
        if not Unpickler(within).load().get("little_endian", True):
            raise ValueError("its numbers have their largest byte first")
        found = Unpickler(within, lambda storage, key: kept.update({key: storage})).load()
        keys = Unpickler(within).load()
        for key in keys:
            storage = kept[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count != storage.count:
                raise ValueError(f"{count} numbers, expected {storage.count}")
            storage.start = file.tell()
            file.seek(storage.count * SIZES[storage.dtype], io.SEEK_CUR)
        if kept.keys() - set(keys) or file.tell() > path.stat().st_size:
            raise ValueError("ends before its numbers")
    return found


class _Within:
    """A file from which no more is read than there is: Python allocates what it is asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        """This many bytes. Raises EOFError where there are fewer."""
        if count > self.size - self.file.tell():
            raise EOFError(f"ends before {count:,} bytes more")
        return self.file.read(count)
