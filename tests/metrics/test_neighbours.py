from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.metrics import neighbours


def brute_force(real, fake, k):
    """Precision and recall by loops over exact differences in float64."""

    def ball_sizes(points):
        sizes = []
        for i, point in enumerate(points):
            others = [np.linalg.norm(point - other) for j, other in enumerate(points) if j != i]
            sizes.append(sorted(others)[k - 1])
        return sizes

    def share(points, centres):
        sizes = ball_sizes(centres)
        inside = [any(np.linalg.norm(p - c) <= s for c, s in zip(centres, sizes, strict=True)) for p in points]
        return sum(inside) / len(points)

    return share(fake, real), share(real, fake)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 4),
    shift=st.floats(0, 3),
    scale=st.floats(0.3, 2),
    origin=st.sampled_from([0.0, 1e6]),  # far from the origin |a|^2 + |b|^2 - 2ab would cancel
)
def test_precision_and_recall_equal_brute_force(seed, k, shift, scale, origin):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(17, 3)) + origin
    fake = rng.normal(size=(13, 3)) * scale + shift + origin
    assert neighbours.precision_recall(real, fake, k) == brute_force(real, fake, k)


def test_blocks_of_distances_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 4)), rng.normal(size=(41, 4)) * 1.3
    whole = neighbours.precision_recall(real, fake)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert neighbours.precision_recall(real, fake) == whole == brute_force(real, fake, 3)


def test_a_point_on_the_sphere_is_inside():
    real = np.array([[0.0], [1.0], [3.0], [7.0]])  # radii for k = 1: 1, 1, 2, 4
    fake = np.array([[11.0], [11.5], [-1.0], [-50.0]])  # the first and the third lie exactly on a sphere
    assert neighbours.precision_recall(real, fake, k=1)[0] == 0.5


def test_a_collapsed_generator_has_high_precision_and_low_recall():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(200, 2))
    precision, recall = neighbours.precision_recall(real, real[:1] + 1e-4 * rng.normal(size=(200, 2)))
    assert precision == 1 and recall <= 0.01


def test_a_generator_that_covers_too_much_has_low_precision_and_high_recall():
    rng = np.random.default_rng(2)
    real, fake = rng.normal(size=(200, 2)), rng.uniform(-20, 20, size=(200, 2))
    precision, recall = neighbours.precision_recall(real, fake)
    assert precision < 0.1 and recall == 1


def test_identical_sets_score_one_and_distant_sets_zero():
    real = np.random.default_rng(3).normal(size=(60, 8)).astype(np.float32)
    assert neighbours.precision_recall(real, real) == (1, 1)
    assert neighbours.precision_recall(real, real + 1000) == (0, 0)


def test_twins_count_as_neighbours():
    points = np.array([[0.0], [0.0], [5.0], [9.0]])
    np.testing.assert_array_equal(neighbours.radii(points, k=1), [0, 0, 4, 4])


def test_unusable_features_are_refused():
    real = np.random.default_rng(0).normal(size=(10, 2))
    with pytest.raises(ValueError, match="k = 3 needs more than 3 images, found 3"):
        neighbours.precision_recall(real, real[:3])
    with pytest.raises(ValueError, match=r"width 2 \(real\) and 1 \(fake\)"):
        neighbours.precision_recall(real, real[:, :1])
    with pytest.raises(ValueError, match=r"fake features.*row 4"):
        neighbours.precision_recall(real, np.where(np.arange(10)[:, None] == 4, np.nan, real))


def gaussians(seed, real, fake, width, shift=0.3):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.exp(-np.arange(width) / 10)
    return rng.normal(size=(real, width)) @ mix, rng.normal(size=(fake, width)) @ mix * 0.9 + shift


def in_float64(real, fake, k=3):
    """By differences of float64, a row at a time."""

    def far(x, y):
        return np.array([((y - row) ** 2).sum(1) for row in x])

    def balls(x):
        return np.sort(far(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]

    across = far(fake, real)
    return (across <= balls(real)).any(1).mean(), (across <= balls(fake)[:, None]).any(0).mean()


@pytest.mark.parametrize("block", [64, 2048])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_wide_features_of_float32_score_as_in_float64(monkeypatch, block, offset):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real, fake = ((x + offset).astype(np.float32) for x in gaussians(0, 230, 310, 96))
    expected = in_float64(real.astype(np.float64), fake.astype(np.float64))
    assert 0.2 < expected[0] < 0.98 and 0.2 < expected[1] < 0.98
    assert neighbours.precision_recall(real, fake) == expected


def test_gaps_too_small_for_float32_are_decided_in_float64():
    # Radii of 1 far from the origin (norms of 1e6), and points 1e-5 inside and outside of them: in float32 the squared
    # distance would be off by 1 or so.
    real = np.array([[1e3, 0], [1e3 + 1, 0], [-1e3, 0], [-1e3 - 1, 0.0]])
    fake = np.array([[1e3 + 2 - 1e-5, 0], [1e3 + 2 + 1e-5, 0], [-1e3 - 2 + 1e-5, 0], [-1e3 - 2 - 1e-5, 0]])
    assert neighbours.precision_recall(real, fake, k=1)[0] == 0.5


def test_neighbours_that_float32_cannot_tell_apart_are_put_in_order():
    # Twenty points around 1e3, 1e-4 apart: every float32 bound between them is the same.
    line = 1e3 + 1e-4 * np.arange(20) ** 1.5
    points = np.concatenate([line, -line])[:, None]
    expected = np.sort(np.abs(points - points.T) + np.diag(np.full(40, np.inf)), axis=1)[:, 2]
    np.testing.assert_allclose(neighbours.radii(points, 3), expected, rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_the_unit_of_the_features_changes_nothing(factor):
    real, fake = gaussians(1, 60, 50, 8)
    assert neighbours.precision_recall(real * factor, fake * factor) == neighbours.precision_recall(real, fake)


def features_like_inceptions(seed: int, count: int, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """(count, 2048) float32, not negative, with squared norms of about 410 and a total variance of about 205."""
    sizes = np.linspace(1, 0.2, 48)
    axes = np.random.default_rng(7).standard_normal((48, 2048)) * sizes[:, None]
    draw = np.random.default_rng(seed)
    inner = (draw.standard_normal((count, 48)) * spread + shift) @ axes * 0.392 / np.sqrt((sizes**2).sum())
    return np.maximum(0.25 + inner + 0.12 * draw.standard_normal((count, 2048)), 0).astype(np.float32)


def as_adm_computes_them(real: np.ndarray, fake: np.ndarray, k: int = 3) -> list[float]:
    """ADM's evaluator: features, norms, products and sums each rounded to fp16; an image is its own first neighbour."""

    def half(x):
        return x.astype(np.float16).astype(np.float32)

    def far(x, y):
        x, y = half(x), half(y)
        mine, theirs = (half(half(z * z).sum(1)) for z in (x, y))
        return np.maximum(half(half(mine[:, None] - 2 * half(x @ y.T)) + theirs), 0)

    real_balls, fake_balls = (np.partition(far(x, x), k, axis=1)[:, k] for x in (real, fake))
    across = far(fake, real)
    return [(across <= real_balls).any(1).mean(), (across <= fake_balls[:, None]).any(0).mean()]


KINDS = {"as the reference": {}, "shifted": {"shift": 0.25}, "of less variety": {"spread": 0.8}}


@pytest.mark.parametrize("kind", KINDS)
def test_what_fp16_does_to_adms_precision_and_recall_is_what_the_documents_say(kind):
    text = Path(__file__, "../../../docs/scores.md").resolve().read_text()
    said = next(line for line in text.splitlines() if line.startswith(f"| {kind} |"))
    here, adms = ([float(x) for x in cell.split(",")] for cell in said.split("|")[2:4])
    real, fake = features_like_inceptions(1, 1000), features_like_inceptions(2, 1000, **KINDS[kind])
    # Another processor may round a tie of fp16 the other way: one image of a thousand.
    assert list(neighbours.precision_recall(real, fake)) == pytest.approx(here, abs=1e-3)
    assert as_adm_computes_them(real, fake) == pytest.approx(adms, abs=2e-3)


def test_equal_images_are_covered():
    same = np.full((30, 5), 0.1)
    assert neighbours.precision_recall(same, same) == (1, 1)
    np.testing.assert_array_equal(neighbours.radii(same), np.zeros(30))


def test_a_point_is_covered_by_any_of_two_balls_that_float32_cannot_tell_apart():
    # Each fake is inside one of two balls by 1e-5 and outside the other by as much, which float32 cannot tell.
    start = np.concatenate([sign * (1000 + 10 * np.arange(10)) for sign in (1.0, -1.0)])
    real = (start[:, None] + [0, 1, 3, 4]).reshape(-1, 1)
    fake = (start[:, None] + [2 - 1e-5, 2 + 1e-5]).reshape(-1, 1)
    assert neighbours.precision_recall(real, fake, k=1)[0] == 1


def test_a_process_that_allows_fast_products_gets_exact_ones_and_keeps_its_choice():
    real, fake = gaussians(3, 80, 70, 64)
    expected = neighbours.precision_recall(real, fake)
    torch.set_float32_matmul_precision("medium")
    try:
        assert neighbours.precision_recall(real, fake) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
