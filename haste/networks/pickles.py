"""Pickles of torch's, read without running anything in them. No torch.

The unpickler knows no functions and classes except its own stand-ins: they note where a tensor lies, or return plain
data. Anything else in a pickle is refused by its name.
"""

from __future__ import annotations

import math
import pathlib
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# Bytes of one number, by torch's name of the type.
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
SIZES |= {"uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1}
SIZES |= {"uint16": 2, "uint32": 4, "uint64": 8}
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


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Reads a pickle without running anything; the one written in Python, since C's allocates what a file claims.

    place: called with each storage and its key.
    """

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch}  # type: ignore[attr-defined]

    def __init__(self, file: Any, place: Callable[[Storage, str], None] | None = None):
        super().__init__(file, encoding="latin1")
        self._place, self._storages = place, dict[str, Storage]()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class or function; RefusedError for one that could run code."""
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
        """A tensor's storage, by its place instead of its numbers."""
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
