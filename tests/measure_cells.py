"""What a measure's pictures show, cell by cell."""

import base64
import io

import numpy as np
from PIL import Image


def cells(picture, rows):
    """A picture's cells, by column."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))).convert("RGB"))
    side = image.shape[0] // rows
    assert image.shape == (side * rows, side * len(picture["columns"]), 3)
    return {
        name: [image[r * side + 1 : (r + 1) * side - 1, c * side + 1 : (c + 1) * side - 1] for r in range(rows)]
        for c, name in enumerate(picture["columns"])
    }


def tokens_of(cell, side):
    """A cell's tokens, each of which has one colour."""
    blocks = cell.reshape(side, len(cell) // side, side, len(cell) // side, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    return blocks[:, 0, :, 0].reshape(-1, 3)
