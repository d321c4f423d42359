"""What the tokens of hidden states have most in common and differ in most: their first three principal components as
the red, green and blue of a picture, by layer and t, beside the decoded image.

The components of a layer and t are those of all tokens of all shown images, so that a colour means the same in all rows
of a column. Red is the component of the largest variance. A component's sign is arbitrary: here the token that is
furthest from the mean along it is bright, which does not depend on the axes of the feature space. Colours of different
columns cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from haste.measure.hidden import Hidden
from haste.measure.measure import Row, Split
from haste.measure.pictures import Column, Picture

if TYPE_CHECKING:
    from haste.measure.subject import Subject

COLOURS = 3


class PCA(Hidden):
    """See the file. The measured number is the share of the variance that the three components explain, 0..1.

    Attributes:
        images: number of random images; a row of the picture each.
        split: see `haste.measure.measure.Split`.
    """

    needs: ClassVar = frozenset({"decoder"})
    axes: ClassVar = ("layer", "t")
    values: ClassVar = {"explained": ""}

    images: Annotated[int, Field(ge=1, le=16)] = 4
    split: Split = "held_out"

    @property
    def least(self) -> Mapping[str, tuple[str, int]]:
        """See `Measure`."""
        return {self.split: ("images", self.images)}

    @property
    def hidden(self) -> Mapping[str, Mapping[str, Any]]:
        """See `Measure`."""
        return {self.split: self.look(self.split, self.images, pooled=False)}

    def run(self, subject: Subject) -> Iterator[Row]:
        """See `Measure`: every rank computes everything, which is little."""
        from haste.measure import passes

        read = passes.reader(subject, self.split, self.beside)
        beside, by_t = list[Column](), dict[float, list[Column]]()
        for name in self.beside:
            grid = passes.teacher_features(subject, self.split, name).manifest["grid"]
            cells, explained = coloured(read(name), tuple(grid))
            beside.append((name, cells))
            subject.teachers[name] = {"explained": explained}
        for layer, t in self.places(subject):
            cells, explained = coloured(read(layer, t), subject.model.taps[f"tokens.{layer}"].grid)
            by_t.setdefault(t, []).append((f"{layer}", cells))
            yield {"layer": layer, "t": t, "explained": explained}
        shown = list(subject.decoded(self.split, subject.images(self.split)))
        for t, columns in by_t.items():
            layers = f"after block {', '.join(layer for layer, _ in columns)}"
            what = "; ".join([layers, *(f"of teacher {name}" for name in self.beside)])
            alt = f"First three principal components of the tokens of {self.images} images at t {t:g}, a row an image: "
            picture = Picture.of(
                f"t {t:g}", f"{alt}the image, then its tokens {what}", [("image", shown), *columns, *beside]
            )
            subject.pictures.append(picture)


def coloured(tokens: NDArray[np.float32], grid: tuple[int, int]) -> tuple[list[NDArray[np.uint8]], float]:
    """The first three principal components of tokens (B, N, D) as colours, and the share of the variance that they
    explain, 0..1.

    Each component is scaled to 0..255 over all tokens, and is positive where it is largest.

    Args:
        tokens: (B, N, D), D >= 3.
        grid: (h, w), h w = N, rows first.

    Returns:
        B arrays (h, w, 3), and the share.
    """
    import torch

    from haste.teachers.targets import fit_pca

    features = torch.from_numpy(tokens)
    basis, explained = fit_pca([features], COLOURS)
    found = basis.project(features).double().numpy().reshape(-1, COLOURS)  # (B N, 3)
    furthest = found[np.abs(found).argmax(axis=0), np.arange(COLOURS)]
    found *= np.where(furthest < 0, -1.0, 1.0)
    low, high = found.min(axis=0), found.max(axis=0)
    levels = np.rint(255 * (found - low) / np.where(high > low, high - low, 1.0)).astype(np.uint8)
    return list(levels.reshape(len(tokens), *grid, COLOURS)), explained
