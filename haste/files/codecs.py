"""Rows of pixels that a store keeps compressed, each by itself, so that any of them can be read alone. Without loss.

A coded field lies in a shard as bytes, one row behind the other; beside it, in `NAME.ends`, lies where each row ends.
WebP at its fastest setting is smaller than PNG and faster both ways (docs/architecture.md has the table that
`benchmarks/pictures.py` prints). Pillow encodes and decodes without Python's lock.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import h5py

ENDS = ".ends"
_COPIED = 2**24  # bytes at once


def expected_share(stored_as: str, side: int) -> float:
    """Bytes of a row of side x side pixels by those of its pixels, as three photographs took; drawings take less."""
    return 1.0 if stored_as == "raw" else 0.42 if side >= 512 else 0.49


def to_webp(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a WebP file that holds just these pixels."""
    from PIL import Image  # here and below: `haste plan` needs no pictures

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True, quality=0, method=0)
    return out.getvalue()


def from_webp(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The pixels of `to_webp`.

    Raises:
        Exception: of many classes, if it is no such file, or of another shape.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
        if (image.height, image.width, len(image.getbands())) != tuple(shape):  # before they are decoded
            raise ValueError(f"{image.mode} of {image.width} x {image.height} pixels")
        return np.asarray(image)


CODECS: dict[str, tuple[Callable[[np.ndarray], bytes], Callable[[bytes, Sequence[int]], np.ndarray]]]
CODECS = {"webp": (to_webp, from_webp)}


class Spool:
    """Rows of one field of a shard that is being written, in a file without a name until all their sizes are known."""

    def __init__(self, codec: str, folder: Path, workers: int) -> None:
        """
        Args:
            codec: a key of `CODECS`.
            folder: where the shard will be.
            workers: threads that encode; the result does not depend on it.
        """
        self._encode, _ = CODECS[codec]
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` closes it
        self._ends, self._workers = list[int](), workers

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._ends[-1] if self._ends else 0

    def add(self, rows: np.ndarray) -> None:
        """Encode the next rows, (B, H, W, 3) uint8."""
        with ThreadPoolExecutor(self._workers) as pool:
            for data in pool.map(self._encode, rows):
                self._file.write(data)
                self._ends.append(self.size + len(data))

    def put(self, file: h5py.File, name: str) -> None:
        """Write them as the field `name`, and end."""
        data = file.create_dataset(name, shape=(self.size,), dtype="u1")
        self._file.seek(0)
        for low in range(0, self.size, _COPIED):
            part = np.frombuffer(self._file.read(_COPIED), dtype=np.uint8)
            data[low : low + len(part)] = part
        file.create_dataset(name + ENDS, data=np.array(self._ends, dtype="<i8"))
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


@dataclass(frozen=True)
class Coded:
    """A coded field of a shard: the codec, and the end of each row, counted from the field's first byte."""

    codec: str
    ends: np.ndarray

    def span(self, row: int) -> tuple[int, int]:
        """The first byte of a row, and how many it has."""
        start = int(self.ends[row - 1]) if row else 0
        return start, int(self.ends[row]) - start

    def decoded(self, data: bytes, shape: Sequence[int]) -> np.ndarray:
        """A row from its bytes; raises as `from_webp`."""
        return CODECS[self.codec][1](data, shape)


def described(found: Any) -> bool:
    """Whether a shard's header tells of its coded fields as it should: name -> codec and shape."""
    return isinstance(found, dict) and all(
        isinstance(entry, dict)
        and entry.get("codec") in CODECS
        and isinstance(entry.get("shape"), list)
        and all(isinstance(side, int) and side > 0 for side in entry["shape"])
        for entry in found.values()
    )
