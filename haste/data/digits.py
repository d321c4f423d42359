"""scikit-learn's handwritten digits as a source of images: as they are, or moved and captioned."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from haste.data import order
from haste.files import artefact, listing


class Digits:
    """scikit-learn's 1,797 handwritten digits (8x8), resized; the last `holdout` ones are held out."""

    captioned = False

    def __init__(self, resolution: int, holdout: int, labelled: bool = True, subset: int | None = None) -> None:
        # What sklearn.datasets.load_digits reads, which takes 2 s to import. A row: 64 levels 0..16, and the digit.
        found = importlib.util.find_spec("sklearn")
        file = Path(found.origin if found and found.origin else "scikit-learn").parent / "datasets/data/digits.csv.gz"
        if not file.is_file():
            raise ValueError(f"images.source digits: expected scikit-learn's pictures in {file}; install scikit-learn")
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
        self._levels = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        self._digits = rows[:, -1]
        self._labels = self._digits if labelled else np.zeros_like(self._digits)
        self.classes = [str(digit) for digit in range(10)] if labelled else []
        self.resolution, self.holdout = resolution, listing.checked_holdout("digits", holdout, len(self._levels))
        kept = listing.checked_subset(subset, len(self._levels) - holdout)
        self._rows = order.used(len(self._levels), holdout, kept)
        self.count = len(self._rows)
        self.listing = artefact.fingerprint(["digits", self.count])

    def load(self, i: int) -> tuple[np.ndarray, int]:
        """Digit i as (R, R, 3) uint8 with three equal channels, and its label 0..9."""
        small = Image.fromarray(self._levels[self._rows[i]])
        grey = self._placed(small, i)
        return np.repeat(grey[:, :, None], 3, axis=2), int(self._labels[self._rows[i]])

    def _placed(self, small: Image.Image, i: int) -> np.ndarray:
        """(R, R) uint8."""
        return np.asarray(small.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC))  # clips by itself


class MovedDigits(Digits):
    """The digits at two sizes and five places of their canvas, and captions that say digit, size and place.

    Size and place of a digit depend only on which one it is.
    """

    captioned = True
    WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    SIZES: ClassVar[Mapping[str, float]] = {"small": 0.5, "large": 0.75}  # of the canvas
    PLACES: ClassVar[Mapping[str, tuple[float, float]]] = {  # of the free room, from the left and from above
        "in the middle": (0.5, 0.5),
        "shifted left": (0.0, 0.5),
        "shifted right": (1.0, 0.5),
        "shifted up": (0.5, 0.0),
        "shifted down": (0.5, 1.0),
    }

    def __init__(self, resolution: int, holdout: int, labelled: bool = True, subset: int | None = None) -> None:
        super().__init__(resolution, holdout, labelled, subset)
        drawn = order.uniforms(0, "moved digit", 0, self._rows.tolist(), (2,))
        self._moves = (drawn * [len(self.SIZES), len(self.PLACES)]).astype(int)  # (M, 2)
        self.listing = artefact.fingerprint(["moved digits", self.count])

    def _placed(self, small: Image.Image, i: int) -> np.ndarray:
        size, place = self._move(i)
        side = round(self.resolution * self.SIZES[size])
        left, top = (round((self.resolution - side) * share) for share in self.PLACES[place])
        canvas = Image.new("L", (self.resolution, self.resolution))
        canvas.paste(small.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        return np.asarray(canvas)

    def _move(self, i: int) -> tuple[str, str]:
        size, place = self._moves[i]
        return [*self.SIZES][size], [*self.PLACES][place]

    def captions(self, i: int) -> list[str]:
        """Two ways to say what digit i is, how large and where."""
        (size, place), word = self._move(i), self.WORDS[self._digits[self._rows[i]]]
        return [f"a {size} {word}, {place}", f"{word}, {size} and {place}"]
