"""Tensors on disk: safetensors files in which every tensor has a digest, which every reader checks.

    __metadata__: {"haste": the file's own record, JSON;  "digests": {tensor's name: its digest}, JSON}

safetensors itself checks names, shapes and the file's length. A block that a disk or a network lost reads as zeros,
which are numbers like any others: only the digests show it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from haste.files import artefact

log = logging.getLogger("haste.files")

_DIGITS = 32  # of a digest
_THREADS = min(4, os.cpu_count() or 1)  # hashing releases Python's lock: 1 to 2 GB/s a thread


def write(path: Path | str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors with their digests, atomically.

    Args:
        path: the file.
        tensors: name -> tensor of any shape, dtype and device.
        header: the file's own record.

    Raises:
        OSError: the disk is full or the folder is not writable; an existing file stays as it was.
    """
    here = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    blank = artefact.canonical(dict.fromkeys(here, "0" * _DIGITS))
    with artefact.replacing(path) as aside, artefact.saving_tensors(path), ThreadPoolExecutor(1) as beside:
        digests = beside.submit(_digests, here)  # while the disk is waited for
        save_file(here, aside, metadata={"haste": json.dumps(header, sort_keys=True), "digests": blank})
        _put_digests(aside, blank, artefact.canonical(digests.result()))


def _put_digests(file: Path, blank: str, text: str) -> None:
    """Replace an entry of a file's metadata by one of the same length."""
    before, after = (f'"digests":{json.dumps(entry)}'.encode() for entry in (blank, text))
    with open(file, "rb+") as out:
        head = out.read(int.from_bytes(out.read(8), "little"))
        assert head.count(before) == 1 and len(before) == len(after)
        out.seek(8 + head.index(before))
        out.write(after)


@contextlib.contextmanager
def opened(path: Path | str, what: str) -> Iterator[Any]:
    """A safetensors file, mapped: its tensors are read on access. Read them with `read`.

    Args:
        path: the file.
        what: what is expected, for the message.

    Raises:
        ValueError: missing, truncated or foreign; names the file.
    """
    try:
        file = safetensors.safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: this {what} is missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a {what}, found a truncated or foreign file ({error})") from error
    with file:
        yield file


def read(path: Path | str, file: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of an open file, after comparing each with its digest.

    A file of ours that an earlier version wrote has no digests; that is logged. Other programs' files have none either.

    Raises:
        ValueError: damaged; names the file and the first such tensor.
    """
    found = {name: file.get_tensor(name) for name in names}
    metadata = file.metadata() or {}
    if "digests" in metadata:
        try:
            expected = dict(json.loads(metadata["digests"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged: its digests cannot be read ({error})") from error
        broken = [name for name, digest in _digests(found).items() if expected.get(name) != digest]
        if broken:
            raise ValueError(
                f"{path}: damaged: {len(broken)} of {len(found)} tensors are not what was written, such as "
                f"{broken[0]!r}. Bring a whole copy back, or remove the file to have it made again"
            )
    elif "haste" in metadata and found:
        log.info("%s: written by an earlier version, without digests: damage in it would not be seen", path)
    return found


def check(path: Path | str, but: tuple[str, ...] = ()) -> None:
    """Compare all tensors of a file with their digests, except those whose names begin with one of `but`.

    Raises:
        ValueError: as `opened` and `read`.
    """
    with opened(path, "checkpoint") as file:
        read(path, file, [name for name in file.keys() if not name.startswith(but)])  # noqa: SIM118 - no mapping


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 over dtype, shape and bytes of each tensor, as `_DIGITS` hexadecimal digits."""

    def digest(value: Tensor) -> str:
        found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()[:_DIGITS]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
