"""Reading .npz files that anybody may have written or damaged: their arrays, or a ValueError with the file's name."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# What numpy and zipfile raise on bytes that are no .npz: of everyday ones, of compressed or encrypted entries, and of
# headers that promise more than there is memory.
BROKEN = (
    *(OSError, ValueError, KeyError, IndexError, EOFError, TypeError, OverflowError, MemoryError),
    *(RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def read_npz(path: Path | str, what: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz by their names; nothing in it is unpickled.

    Args:
        path: the file.
        what: what it should be, for the message, such as "samples".
        names: the arrays to read; None is all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or foreign, or lacks one of `names`; the message names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one bare array")
            found = {name: file[name] for name in names or file.files}
            if strange := [name for name, value in found.items() if not isinstance(value, np.ndarray)]:
                raise ValueError(f"{strange[0]} is no array")
            return found
    except FileNotFoundError:
        raise
    except BROKEN as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: expected {what}, found a truncated or foreign file ({words})") from error
