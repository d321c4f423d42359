"""Grids of samples: every picture in its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from haste.sampling import grids

LABELS = np.array([7, 2, 7, 2, 7, 5, 2])


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), 4, 4, 3), dtype=np.uint8)


def cell(grid: Image.Image, column: int, row: int, side: int) -> np.ndarray:
    left, top = (column * (side + grids.GAP) + grids.GAP // 2, row * (side + grids.GAP) + grids.GAP // 2)
    return np.asarray(grid)[top : top + side, left : left + side]


def test_image_i_of_class_c_is_in_row_i_of_column_c(images: np.ndarray):
    grid = grids.class_grid(images, LABELS, per_class=2, scale=3)
    for column, label in enumerate((2, 5, 7)):
        of_label = [image for image, found in zip(images, LABELS, strict=True) if found == label]
        for row, image in enumerate(of_label[:2]):
            found = cell(grid, column, row, 12)
            np.testing.assert_array_equal(found[..., :3], np.kron(image, np.ones((3, 3, 1), np.uint8)))
            assert (found[..., 3] == 255).all()


def test_a_missing_sample_and_the_gaps_are_blank(images: np.ndarray):
    grid = grids.class_grid(images, LABELS, per_class=2, scale=1)
    assert grid.size == (3 * (4 + grids.GAP), 2 * (4 + grids.GAP))
    assert (cell(grid, 1, 1, 4) == 0).all()  # label 5 has one sample
    assert np.count_nonzero(np.asarray(grid)[..., 3]) == 5 * 16


def test_a_grid_has_no_more_rows_than_its_fullest_column_has_samples(images: np.ndarray):
    grid = grids.class_grid(images, LABELS, per_class=9, scale=1)
    assert grid.size == (3 * (4 + grids.GAP), 3 * (4 + grids.GAP))


def test_named_classes_keep_their_columns_though_samples_are_missing(images: np.ndarray):
    grid = grids.class_grid(images, LABELS, per_class=1, scale=1, classes=[9, 7])
    assert (cell(grid, 0, 0, 4) == 0).all()
    np.testing.assert_array_equal(cell(grid, 1, 0, 4)[..., :3], images[0])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"images": np.zeros((7, 4, 4, 3))}, r"float64 \(7, 4, 4, 3\), expected uint8"),
        ({"images": np.zeros((7, 3, 4, 4), np.uint8)}, r"uint8 \(7, 3, 4, 4\), expected"),
        ({"labels": LABELS[:3]}, r"shape \(3,\), expected \(7,\)"),
        ({"per_class": 0}, "per_class is 0"),
        ({"classes": []}, "no classes"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(images: np.ndarray, changes: dict, found: str):
    with pytest.raises(ValueError, match=found):
        grids.class_grid(**({"images": images, "labels": LABELS, "per_class": 1, "scale": 1} | changes))


def test_a_png_comes_back_as_it_was_and_alone(images: np.ndarray, tmp_path: Path):
    grid = grids.class_grid(images, LABELS, per_class=2, scale=2)
    grids.write_png(tmp_path / "new" / "grid.png", grid, {"kind": "grid", "of": "ä"})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), np.asarray(grid))
    assert json.loads(Image.open(tmp_path / "new" / "grid.png").info["haste"]) == {"kind": "grid", "of": "ä"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]
