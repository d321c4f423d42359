"""Reading untrusted .npz files: their arrays, or a ValueError with the file's name.

The arrays' headers alone show whether a file has the layout of images or of statistics, however large it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

# What numpy and zipfile raise for bytes that are not an .npz, for compressed or encrypted entries, and for headers
# that claim more than the memory.
BROKEN = (
    *(OSError, ValueError, KeyError, IndexError, EOFError, TypeError, OverflowError, MemoryError),
    *(RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


ADM = {"label": "arr_1"}  # what ADM calls a field of samples
WIDTHS = {"pool": 2048, "spatial": 2023}  # of Inception, which files that do not state their detector are taken for
SUFFIX = {"pool": "", "spatial": "_s"}  # of mu and sigma, in a file
MOST_PIXELS = 178_956_970  # of an image: Pillow's guard against decompression bombs


def read_npz(path: Path | str, what: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz by their names; nothing in it is unpickled.

    Args:
        path: the file.
        what: its expected content, for the message, such as "samples".
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
        raise foreign(path, error, what) from error


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of an array. stored: bytes of the array in the file, header included; start: bytes of the header."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int = 0
    stored: int = 0


def header_of(stream: IO[bytes], stored: int = 0) -> Header:
    """The header at the beginning of an array's stream, which is then positioned at the array's first byte."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return Header(*read(stream), start=stream.tell(), stored=stored)


def foreign(path: Path | str, error: BaseException, what: str = "an .npz") -> ValueError:
    """The error for a file that cannot be read as expected."""
    words = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{path}: expected {what}, found a truncated or foreign file ({words})")


def headers(path: Path | str | zipfile.ZipFile) -> dict[str, Header]:
    """The headers of all arrays of an .npz, which may be open already; the arrays themselves are not read.

    Raises:
        ValueError: it is truncated or foreign; the message names the file.
    """
    found = {}
    try:
        with contextlib.nullcontext(path) if isinstance(path, zipfile.ZipFile) else zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".npy"):
                    with archive.open(entry) as stream:
                        found[entry.filename.removesuffix(".npy")] = header_of(stream, entry.file_size)
    except BROKEN as error:
        raise foreign(str(getattr(path, "filename", path)), error) from error
    return found


def check_images(path: Path | str, found: Header, name: str = "arr_0") -> None:
    """Refuse an array that is not images (N, H, W, 3) uint8 in C order."""
    hint = "; convert floats in [0, 1] with clip(255 x), floats in [-1, 1] with clip(127.5 x + 128)"
    shape, dtype = found.shape, found.dtype
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} is pickled, which is never read; expected uint8 0..255 (N, H, W, 3)")
    if dtype != np.uint8:
        raise ValueError(f"{path}: {name} holds {dtype}, expected uint8 0..255{hint if dtype.kind == 'f' else ''}")
    if len(shape) != 4 or shape[3] != 3:
        told = " (channels come last: NHWC)" if len(shape) == 4 and shape[1] == 3 else ""
        raise ValueError(f"{path}: {name} has shape {shape}, expected (N, H, W, 3){told}")
    if found.fortran:  # whose images lie interleaved, so that none can be read without all
        raise ValueError(f"{path}: {name} is in Fortran's order; save it anew by numpy.ascontiguousarray")
    if shape[0] < 0 or min(shape[1:]) < 1 or shape[1] * shape[2] > MOST_PIXELS:
        raise ValueError(f"{path}: {name} has shape {shape}, expected images of 1 to {MOST_PIXELS:,} pixels")


def check_moments(path: Path | str, found: Mapping[str, Header], output: str, width: int | None) -> None:
    """Refuse a `mu` (D,) without its `sigma` (D, D), or with another D than `width`; None is any."""
    mu, sigma = f"mu{SUFFIX[output]}", f"sigma{SUFFIX[output]}"
    if sigma not in found:
        raise ValueError(f"{path}: holds {mu} without {sigma}")
    mean, covariance = found[mu], found[sigma]
    if pickled := [name for name in (mu, sigma) if found[name].dtype.hasobject]:
        raise ValueError(f"{path}: {pickled[0]} is pickled, which is never read; expected real numbers")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{path}: {mu} and {sigma} are {mean.dtype} and {covariance.dtype}, expected real numbers")
    square = len(mean.shape) == 1 and covariance.shape == 2 * mean.shape
    if not square or (width and mean.shape != (width,)):
        expected = f"({width},) and ({width}, {width})" if width else "(D,) and (D, D)"
        raise ValueError(f"{path}: {mu} and {sigma} are {mean.shape} and {covariance.shape}, expected {expected}")


def check_reference(path: Path | str, detector: str = "inception") -> None:
    """Refuse a file that is not a detector's reference: `mu` and `sigma` of Inception, in ADM's with `mu_s`, `sigma_s`
    and images; in pytorch-fid's alone.

    Raises:
        ValueError: it is truncated or foreign, or one of these is missing or of another shape.
    """
    found, alone = headers(path), detector == "pytorch-fid"
    for output, width in WIDTHS.items():
        if f"mu{SUFFIX[output]}" in found:
            check_moments(path, found, output, None if "haste" in found else width)
    if "arr_0" in found:
        check_images(path, found["arr_0"])
    held = " and ".join(sorted(found.keys() - {"haste"})) or "nothing"
    if alone and (found.keys() & {"arr_0", "mu_s"} or "mu" not in found):
        raise ValueError(f"{path}: expected pytorch-fid's mu and sigma alone, found {held}")
    if "mu" not in found:
        raise ValueError(f"{path}: expected mu and sigma, as ADM's and other references hold, found {held}")
    if "arr_0" in found and not found["arr_0"].shape[0]:
        raise ValueError(f"{path}: found no images under arr_0")
    for name in sorted(found.keys() & {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}):
        one = found[name]
        whole = one.start + math.prod(one.shape) * one.dtype.itemsize
        if one.stored != whole:
            raise ValueError(f"{path}: {name} is truncated or damaged: found {one.stored:,} bytes, expected {whole:,}")
