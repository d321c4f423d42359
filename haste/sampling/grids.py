"""Grids of samples: one column per class, so that the same column of two grids shows the same class. No torch.

Shapes: N images, R pixels per side, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from haste.config import condition_in
from haste.files import artefact, locks
from haste.files.artefact import canonical, replacing
from haste.files.npz import ADM, read_npz
from haste.files.provenance import provenance_of
from haste.plan.names import Evaluation
from haste.plan.plan import Plan

GAP = 2  # pixels between neighbouring images, half of it on each side, so that columns have equal widths


def class_grid(
    images: np.ndarray, labels: np.ndarray, *, per_class: int, scale: int, classes: Sequence[int] | None = None
) -> Image.Image:
    """Lay out the first `per_class` samples of each label, in index order, one column per class.

    Sample j of column c has its top left corner at (c * cell + GAP / 2, j * cell + GAP / 2), cell = R * scale + GAP.

    Args:
        images: (N, R, R, 3) uint8, 0..255.
        labels: (N,) integers.
        per_class: maximum number of rows; further samples of a class are not shown.
        scale: side in pixels of each enlarged pixel (nearest neighbour, so that small images stay sharp).
        classes: the label of each column; by default all labels that occur, ascending.

    Returns:
        An RGBA image of (C * cell, rows * cell) pixels; rows without any sample are omitted. Gaps and
        missing samples are transparent.

    Raises:
        ValueError: images or labels of another shape or type, or a grid without rows, columns or size.
    """
    _check(images, labels, per_class, scale)
    columns = [int(c) for c in (np.unique(labels) if classes is None else classes)]
    if not columns:
        raise ValueError("class_grid: found no classes to show, expected at least one label")
    side = images.shape[1] * scale
    cell = side + GAP
    shown = [np.flatnonzero(labels == label)[:per_class] for label in columns]
    rows = max(1, *map(len, shown))  # an image has at least one
    grid = Image.new("RGBA", (len(columns) * cell, rows * cell), (0, 0, 0, 0))
    for column, found in enumerate(shown):
        for row, index in enumerate(found):
            picture = Image.fromarray(images[index]).resize((side, side), Image.Resampling.NEAREST)
            grid.paste(picture, (column * cell + GAP // 2, row * cell + GAP // 2))
    return grid


def columns_for(count: int, *, most: int, rows: int) -> int:
    """Columns (at most `most`) of a grid without classes that leave the fewest cells empty in at most `rows` rows."""
    shown = min(count, most * rows)
    return -(-shown // max(1, -(-shown // most)))


def _check(images: np.ndarray, labels: np.ndarray, per_class: int, scale: int) -> None:
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if not square or images.dtype != np.uint8:
        raise ValueError(f"class_grid: images are {images.dtype} {images.shape}, expected uint8 (N, R, R, 3)")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"class_grid: labels have shape {labels.shape}, expected {images.shape[:1]}, one an image")
    if per_class < 1 or scale < 1:
        raise ValueError(f"class_grid: per_class is {per_class} and scale is {scale}, expected 1 or more of both")


def write_png(path: Path | str, image: Image.Image, about: Mapping[str, Any]) -> None:
    """Write an image as PNG atomically; `about`, its provenance record, is stored in it as the text `haste`."""
    words = PngInfo()
    words.add_text("haste", canonical(dict(about)))
    with replacing(path) as aside:
        image.save(aside, format="PNG", pnginfo=words)


COLUMNS = 10  # classes in a grid
PER_CLASS = 4  # samples per class in a grid
SCALE = 2  # screen pixels per sample pixel, for small images


def paint_grid(plan: Plan, evaluation: Evaluation) -> None:
    """The first samples in columns by their condition (one per class), or in columns without meaning.

    Equal seeds: equal columns and equal noise for every method.
    """
    with locks.making(evaluation.grid, anew=True) as todo:
        if todo:
            _paint(plan, evaluation)


def _paint(plan: Plan, evaluation: Evaluation) -> None:
    condition = condition_in(plan.trajectories[evaluation.state.trajectory].recipe)
    images, told, inputs = [], list[dict[str, np.ndarray]](), dict[str, str]()
    for path in evaluation.sample_files:
        entries = {name: ADM.get(name, name) for name in condition.fields}
        found = read_npz(path, "samples", ["arr_0", *entries.values()])
        rows, shape = {name: found[entry] for name, entry in entries.items()}, found["arr_0"].shape
        fits = all(rows[name].shape == (*shape[:1], *row) for name, (row, _) in condition.fields.items())
        if len(shape) != 4 or shape[1:] != (shape[1], shape[1], 3) or not fits:
            beside = " and ".join(f"{name}s of shape {row.shape}" for name, row in rows.items())
            raise ValueError(f"{path}: images of shape {shape} and {beside}, expected (N, R, R, 3) and N rows")
        images.append(found["arr_0"])
        told.append(rows)
        inputs |= provenance_of(Path(path)).get("inputs", {})
    pixels = np.concatenate(images)
    columns = condition.columns({name: np.concatenate([rows[name] for rows in told]) for name in told[0]}, COLUMNS)
    if columns is None:
        width = columns_for(len(pixels), most=COLUMNS, rows=PER_CLASS)
        place, titles = np.arange(len(pixels)) % width, list(range(width))
    else:
        place, titles = columns
    grid = class_grid(pixels, place, per_class=PER_CLASS, scale=SCALE, classes=range(len(titles)))
    about = {"schema": artefact.SCHEMA, "kind": "grid", "samples": evaluation.name, "classes": titles}
    about |= {"titled": columns is not None}
    made = artefact.provenance(key=evaluation.key, recipe=evaluation.recipe, inputs=inputs)
    write_png(evaluation.grid, grid, {**about, "provenance": made})
