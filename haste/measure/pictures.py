"""Pictures that a measure leaves in its result file, beside its rows. No torch.

They are in the file itself, as PNG in base64: so they are written, kept, copied and removed with the numbers.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from haste.files.artefact import check_entries, replacing
from haste.sampling.grids import class_grid

Column = tuple[str, Sequence[NDArray[np.uint8]]]
SIDES = 64, 256  # smallest and largest side of a cell in pixels


@dataclass(frozen=True)
class Picture:
    """A PNG of cells in equal columns.

    title: what it shows of its state, such as the t; columns: the heading of each column; alt: what a reader who does
    not see it is told; png: the file's bytes.
    """

    title: str
    columns: Sequence[str]
    alt: str
    png: bytes

    @classmethod
    def of(cls, title: str, alt: str, columns: Sequence[Column]) -> Picture:
        """Cells (h, w, 3) of any sizes, behind the headings of their columns, a row each; enlarged to squares of the
        largest side by nearest neighbour, so that a token stays a square, and made smaller above 256 pixels."""
        cells = [cell for _, column in columns for cell in column]
        side = min(SIDES[1], max(max(cell.shape[:2]) for cell in cells))
        squares = np.stack([_square(cell, side) for cell in cells])
        places = np.repeat(np.arange(len(columns)), [len(column) for _, column in columns])
        rows, out = max(len(column) for _, column in columns), io.BytesIO()
        scale = -(-SIDES[0] // side)
        class_grid(squares, places, per_class=rows, scale=scale, classes=range(len(columns))).save(out, "PNG")
        return cls(title, [heading for heading, _ in columns], alt, out.getvalue())

    @classmethod
    def read(cls, path: Path | str, entry: Any) -> Picture:
        """From its entry in a result file.

        Raises:
            ValueError: damaged or edited.
        """
        check_entries(path, entry, title=str, columns=list, alt=str, png=str)
        try:
            png = base64.b64decode(entry["png"], validate=True)
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                image.verify()
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{path}: damaged or edited: the picture {entry['title']!r} is no PNG ({error})"
            ) from error
        return cls(entry["title"], entry["columns"], entry["alt"], png)

    @property
    def entry(self) -> dict[str, Any]:
        """Itself in a result file."""
        png = base64.b64encode(self.png).decode()
        return {"title": self.title, "columns": list(self.columns), "alt": self.alt, "png": png}


def _square(cell: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    if cell.shape[:2] == (side, side):
        return cell
    way = Image.Resampling.NEAREST if max(cell.shape[:2]) <= side else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(cell).resize((side, side), way))


def write(pictures: Sequence[Picture], folder: Path, name: str) -> list[Path]:
    """Write each as a PNG file into a folder, named after its title: `NAME-TITLE.png`."""
    files = [folder / (re.sub(r"[^\w.]+", "-", f"{name}-{one.title}") + ".png") for one in pictures]
    for one, file in zip(pictures, files, strict=True):
        with replacing(file) as aside:
            aside.write_bytes(one.png)
    return files
