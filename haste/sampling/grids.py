"""Grids of samples: one column per class, so that the same column of two grids shows the same class. No torch.

Shapes: N images, R pixels per side, C classes.
"""

from __future__ import annotations

import itertools
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
from haste.files.progress import Progress
from haste.files.provenance import provenance_of
from haste.plan.names import SHOWN_CLASSES, Evaluation
from haste.plan.plan import Plan
from haste.sampling import batches
from haste.sampling.samples import Samples, open_samples

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


COLUMNS = SHOWN_CLASSES
TOLD = 5  # columns of a grid whose pictures have words, which need width
PER_CLASS = 4  # samples per class in a grid
MOST = 16  # of chosen classes, which have all their samples
SCALE = 2  # screen pixels per sample pixel, for small images


def paint_grid(plan: Plan, evaluation: Evaluation) -> None:
    """The first samples in columns by their condition (one per class), or in columns without meaning.

    Equal seeds: equal columns and equal noise for every method. Only the images that are shown are held.
    """
    with locks.making(evaluation.grid, anew=True) as todo:
        if todo:
            _paint(plan, evaluation)


def _paint(plan: Plan, evaluation: Evaluation) -> None:
    batches.check_made(evaluation.sample_files, "images", evaluation.state)
    condition = condition_in(plan.trajectories[evaluation.state.trajectory].recipe)
    sets, told, inputs = list[Samples](), list[dict[str, np.ndarray]](), dict[str, str]()
    entries = {name: ADM.get(name, name) for name in condition.fields}
    for path in evaluation.sample_files:
        samples, found = open_samples(path), read_npz(path, "samples", list(entries.values()))
        rows = {name: found[entry] for name, entry in entries.items()}
        fits = all(rows[name].shape == (samples.count, *row) for name, (row, _) in condition.fields.items())
        if samples.size[0] != samples.size[1] or not fits:
            beside = " and ".join(f"{name}s of shape {row.shape}" for name, row in rows.items())
            shape = (samples.count, *samples.size, 3)
            raise ValueError(f"{path}: images of shape {shape} and {beside}, expected (N, R, R, 3) and N rows")
        sets.append(samples)
        told.append(rows)
        inputs |= provenance_of(Path(path)).get("inputs", {})
    count = sum(samples.count for samples in sets)
    chosen, most = evaluation.sampling.chosen, PER_CLASS
    rows = {name: np.concatenate([rows[name] for rows in told]) for name in told[0]}
    columns, words = condition.columns(rows, COLUMNS), condition.words(rows)
    if chosen:
        (place, titles), most = (np.arange(count) % len(chosen), chosen), MOST
    elif columns is None:
        width = columns_for(count, most=TOLD if words else COLUMNS, rows=PER_CLASS)
        if prompts := len(evaluation.sampling.prompts):  # a column each or, of many, rows of as equal lengths as can be
            width, most = columns_for(prompts, most=TOLD, rows=prompts), count
            count = min(count, MOST * prompts)
        place, titles = np.arange(count) % width, list(range(width))
    else:
        place, titles = columns
    shown = np.sort(np.concatenate([np.flatnonzero(place == column)[:most] for column in range(len(titles))]))
    watch = Progress(f"grid of {evaluation.name}", int(shown.max(initial=-1)) + 1)
    grid = class_grid(
        _images(sets, shown, watch), place[shown], per_class=most, scale=SCALE, classes=range(len(titles))
    )
    about = {"schema": artefact.SCHEMA, "kind": "grid", "samples": evaluation.name, "classes": titles}
    about |= {"titled": columns is not None}
    if words is not None:  # under the pictures, row by row
        about["words"] = [words[row] for row in shown]
    made = artefact.provenance(key=evaluation.key, recipe=evaluation.recipe, inputs=inputs)
    write_png(evaluation.grid, grid, {**about, "provenance": made})
    if not evaluation.judged:  # otherwise the score is the last to need them
        batches.close(batches.folder_of(Path(evaluation.folder)))


def _images(sets: Sequence[Samples], rows: np.ndarray, watch: Progress) -> np.ndarray:
    """Images of some rows, ascending, of all sets together, (N, R, R, 3). Nothing is read behind the last one."""
    found, low = [], 0
    for images in itertools.chain.from_iterable(samples.batches(64) for samples in sets):
        mine = rows[(rows >= low) & (rows < low + len(images))] - low
        found.append(images[mine])
        low += len(images)
        watch.add(min(len(images), watch.total - watch.done))
        if not len(rows) or rows[-1] < low:
            break
    return np.concatenate(found)
