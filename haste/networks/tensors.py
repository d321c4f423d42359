"""Tensors of a file of weights, read from the places that `haste.networks.headers` finds; nothing in it is executed."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste.networks import headers
from haste.networks.pickles import SIZES, Stored


def placed(file: Path | str) -> Callable[[Stored], Tensor]:
    """The function that gives a tensor of a file.

    The file is mapped, so that of tensors that nobody looks at, such as an optimiser's, nothing is read.
    """
    with open(file, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # torch demands that it may be written

    def place(stored: Stored) -> Tensor:
        dtype, storage = getattr(torch, stored.dtype), stored.storage
        count = storage.count * SIZES[storage.dtype] // SIZES[stored.dtype]
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=storage.start)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    return place


def read(file: Path | str, expected: str) -> Any:
    """What a file of weights holds, with its tensors, on the CPU. Arguments and errors as `headers.contents`."""
    held, _ = headers.contents(file, expected)
    return _filled(held, placed(file))


def _filled(held: Any, place: Callable[[Stored], Tensor], depth: int = 0) -> Any:
    """The upper levels of what a file holds, in which weights are."""
    if isinstance(held, Stored):
        return place(held)
    if isinstance(held, Mapping) and depth < 3:
        return {name: _filled(value, place, depth + 1) for name, value in held.items()}
    return held
