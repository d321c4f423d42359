"""What a file of weights holds: names, shapes and types of its tensors, and the plain data beside them. No torch.

Formats: safetensors, torch's zip archives, and torch's older pickles. Of a tensor only its place in the file is read.

Nothing in a file is executed. A pickle is read by an unpickler that knows no functions and classes except the stand-ins
below: they note where a tensor lies, or return plain data. Anything else in it is refused by its name.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from haste.networks import foreign

MOST_HEADER = 100_000_000  # bytes of JSON; safetensors' own limit
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's older files
# Bytes of one number, by torch's name of the type.
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
SIZES |= {"uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1}
SIZES |= {"uint16": 2, "uint32": 4, "uint64": 8}
_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
_OF_SAFETENSORS |= {"I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}
_OF_SAFETENSORS |= {"U16": "uint16", "U32": "uint32", "U64": "uint64"}
_OF_SAFETENSORS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64"}
_STORAGES |= {"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
_STORAGES |= {"ComplexFloat": "complex64", "ComplexDouble": "complex128", "Untyped": "uint8"}


@dataclass
class Storage:
    """Numbers in a file, one after the other; `start` is the place of the first in bytes, -1 while it is unknown."""

    dtype: str
    count: int
    start: int = -1


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: a part of a storage; `stride` and `offset` count numbers, not bytes."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0


class RefusedError(ValueError):
    """What a file holds is not read; the message says what, without the file's name."""


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
        raise ValueError(f"{path}: expected {expected}, found {foreign.folder(path) if path.exists() else 'nothing'}")
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
        found = foreign.file(path)
        if found is None:
            first = (str(error).splitlines() or [type(error).__name__])[0][:200]
            found = f"a truncated or foreign file ({first})"
        raise ValueError(f"{path}: expected {expected}, found {found}") from error


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
        return _Unpickler(io.BytesIO(archive.read(pickles[0])), place).load()


def _of_pickles(path: Path) -> Any:
    """Of torch before 1.6: a magic number, a version, the machine, what was saved, the storages' keys, the storages."""
    kept: dict[str, Storage] = {}
    with open(path, "rb") as file:
        within = _Within(file, path.stat().st_size)
        start = [_Unpickler(within).load() for _ in range(2)]
        if start != [_MAGIC, _PROTOCOL]:
            raise ValueError("no magic number of torch's")
        if not _Unpickler(within).load().get("little_endian", True):
            raise ValueError("its numbers have their largest byte first")
        found = _Unpickler(within, lambda storage, key: kept.update({key: storage})).load()
        keys = _Unpickler(within).load()
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


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Reads a pickle without running anything; the one written in Python, since C's allocates what a file claims.

    place: called with each storage and its key.
    """

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch}  # type: ignore[attr-defined]

    def __init__(self, file: Any, place: Callable[[Storage, str], None] | None = None):
        super().__init__(file, encoding="latin1")
        self._place, self._storages = place, dict[str, Storage]()

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as older protocols call it
        if module == "torch" and name in SIZES:
            return name
        if module in ("torch", "torch.storage") and name.removesuffix("Storage") in _STORAGES:
            return _STORAGES[name.removesuffix("Storage")]
        if (known := _KNOWN.get(f"{module}.{name}")) is not None:
            return _StandIn(known)
        if f"{module}.{name}" == "argparse.Namespace":
            return type("Namespace", (Namespace,), {})
        if f"{module}.{name}" in _PASSED_OVER or module.startswith(_PASSED_OVER_IN):
            return type(name, (_PassedOver,), {})
        raise RefusedError(_refusal(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> Storage:
        what, dtype, key, _, count, *view = pid
        if self._place is None or what != "storage" or any(part is not None for part in view):
            raise ValueError(f"a reference to {what!r}")
        if key not in self._storages:
            if dtype not in SIZES or count < 0:
                raise ValueError(f"{count} numbers of type {dtype!r}")
            self._storages[key] = Storage(dtype, count)
            self._place(self._storages[key], key)
        return self._storages[key]

    def _load_bytearray(self) -> None:
        reader: Any = self
        (size,) = struct.unpack("<Q", reader.read(8))
        reader.append(reader.read(size))  # the original allocates it before it reads

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray


def _refusal(name: str) -> str:
    if name.startswith("torch.nn.modules.") or name.startswith("__main__."):
        what = "a whole pickled object instead of weights: save its state_dict() with the program that made it"
        return f"refused: it holds {name}, which could run code; that is {what}"
    if name.startswith("torch._utils._rebuild_"):
        return f"refused: it holds {name.rpartition('.')[2]} tensors; expected plain ones (dense, not quantised)"
    return (
        f"refused: it holds {name}, which could run code; expected tensors, plain data and, of classes, "
        "argparse.Namespace alone. A program that you trust with it can save its weights alone"
    )


class _StandIn:
    """A function of this file under the name of another; a pickle can call it, but not change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function that is changed")


class _PassedOver:
    """An object that is not built; whatever a pickle does to it has no effect. Each name in a file has its own class,
    so that a file changes no other's."""

    def __new__(cls, *given: Any, **named: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *given: Any, **named: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Has no effect."""

    def extend(self, values: Any) -> None:
        """Has no effect."""

    def __repr__(self) -> str:
        return type(self).__name__


class Namespace(_PassedOver):
    """An `argparse.Namespace`: its attributes are `entries`."""

    entries: Mapping[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.entries = state if isinstance(state, dict) else {}


class _Dictionary(dict[Any, Any]):
    """An OrderedDict or defaultdict, without its attributes and its function."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Type(_PassedOver):
    """A NumPy type."""

    def __init__(self, text: str, *more: Any):
        self.text = str(text)

    def __setstate__(self, state: Any) -> None:
        self.text = (state[1] if state[1] in "<>" else "") + self.text.lstrip("<>|=")


class _Array(_PassedOver):
    """A NumPy array, of which shape and type are kept."""

    def __init__(self, shape: Any = (), dtype: Any = ""):
        self.shape, self.dtype = shape, dtype

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, *_ = state

    def __repr__(self) -> str:
        return f"array of {getattr(self.dtype, 'text', '')} {self.shape}"


# ---- stand-ins


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> Stored:
    return _tensor_of_type(storage, offset, shape, stride, None, None, getattr(storage, "dtype", None))


def _tensor_of_type(
    storage: Any, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Stored:
    if not isinstance(storage, Storage) or dtype not in SIZES:
        raise ValueError(f"a tensor of {dtype!r}")
    shape, stride = tuple(shape), tuple(stride)
    room = storage.count * SIZES[storage.dtype] // SIZES[dtype]
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)) or (math.prod(shape) and last >= room):
        raise ValueError(f"a tensor {shape} beyond its {room} numbers")
    return Stored(storage, dtype, shape, stride, offset)


def _number(dtype: Any, raw: Any = b"") -> Any:
    import numpy

    found = numpy.dtype(dtype.text)
    if found.kind not in "biufcSU":
        raise ValueError(f"a number of {dtype.text!r}")
    return numpy.frombuffer(_bytes(raw), found, 1)[0].item()


def _bytes(given: Any = b"", *_: Any) -> bytes:
    return given.encode("latin1") if isinstance(given, str) else bytes(memoryview(given))


def _text(*parts: Any) -> str:
    return str(pathlib.PurePosixPath(*map(str, parts)))


def _dictionary(*given: Any) -> dict[Any, Any]:
    return _Dictionary(given[0] if given and isinstance(given[0], list | dict) else ())


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    "builtins.set": lambda given=(): set(given),
    "builtins.complex": lambda *parts: complex(*parts),
    "_codecs.encode": _bytes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda make, kind, given, state: make(*given),
    "torch.Size": lambda given=(): tuple(given),
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "numpy.dtype": _Type,
}
_KNOWN |= {f"torch.serialization._get_{what}": str for what in ("layout", "dtype")}
for _place in ("numpy._core", "numpy.core"):
    _KNOWN[f"{_place}.multiarray.scalar"] = _number
    _KNOWN[f"{_place}.multiarray._reconstruct"] = lambda *_: _Array()
    _KNOWN[f"{_place}.numeric._frombuffer"] = lambda raw, dtype, shape, order: _Array(shape, dtype)
for _place in ("pathlib", "pathlib._local"):
    for _name in ("Path", "PurePath", "PosixPath", "PurePosixPath"):
        _KNOWN[f"{_place}.{_name}"] = _text
    for _name in ("WindowsPath", "PureWindowsPath"):
        _KNOWN[f"{_place}.{_name}"] = lambda *parts: str(pathlib.PureWindowsPath(*map(str, parts)))

# Named in harmless places: types that say what something is, and what Lightning keeps beside the weights.
_PASSED_OVER = {"numpy.ndarray", "typing.Any", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"}
_PASSED_OVER |= {f"builtins.{name}" for name in ("int", "float", "str", "bool", "dict", "list", "tuple", "bytes")}
_PASSED_OVER |= {f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")}
_PASSED_OVER_IN = (
    "numpy.dtypes",
    "numpy.random.",
    "omegaconf.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
)
