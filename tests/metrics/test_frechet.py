import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_statistics_to_metric

from haste.metrics import frechet
from haste.metrics.frechet import Moments, frechet_distance


def features(seed, count, width):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def random_covariance(seed, width):
    root = np.random.default_rng(seed).normal(size=(width, width))
    return root @ root.T


def test_distance_of_gaussians_with_diagonal_covariances_is_the_closed_form():
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    var_a, var_b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    a = Moments.of_covariance(100, mean_a, np.diag(var_a))
    b = Moments.of_covariance(37, mean_b, np.diag(var_b))
    assert frechet_distance(a, b) == pytest.approx(10 + (2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-12)


def test_distance_of_two_gaussians_in_the_plane_is_the_closed_form():
    # For 2 x 2 matrices tr((S S')^(1/2)) = sqrt(tr(S S') + 2 sqrt(det(S S'))).
    cov_a, cov_b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    mean_a, mean_b = np.array([0.0, 0.0]), np.array([3.0, 4.0])
    root = np.sqrt(np.trace(cov_a @ cov_b) + 2 * np.sqrt(np.linalg.det(cov_a @ cov_b)))
    expected = 25 + 3 + 4 - 2 * root
    a, b = Moments.of_covariance(9, mean_a, cov_a), Moments.of_covariance(5, mean_b, cov_b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_distance_agrees_with_scipy_square_root_and_torch_fidelity(seed):
    x, y = features(seed, 200, 12), features(seed + 50, 150, 12)
    mean_x, mean_y, cov_x, cov_y = x.mean(0), y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    by_scipy = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    by_fidelity = fid_statistics_to_metric(
        {"mu": mean_x, "sigma": cov_x}, {"mu": mean_y, "sigma": cov_y}, verbose=False
    )["frechet_inception_distance"]
    found = frechet_distance(frechet.update(None, x), frechet.update(None, y))
    assert found == pytest.approx(by_scipy, rel=1e-9)
    assert found == pytest.approx(by_fidelity, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(1, 39), max_size=6),
    offset=st.sampled_from([0.0, 1e4]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_equals_one_pass(seed, cuts, offset, order):
    whole = features(seed, 40, 5) + offset
    bounds = [0, *sorted(set(cuts)), 40]
    pieces = [frechet.update(None, whole[a:b]) for a, b in itertools.pairwise(bounds)]
    order.shuffle(pieces)
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = frechet.merge(merged, piece)
    assert merged.count == 40
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(whole, rowvar=False), rtol=1e-7, atol=1e-9)


def test_updating_shard_after_shard_equals_one_pass():
    whole = features(3, 90, 7).astype(np.float32)
    stats = None
    for start in range(0, 90, 25):
        stats = frechet.update(stats, whole[start : start + 25])
    np.testing.assert_allclose(stats.covariance, np.cov(whole.astype(np.float64), rowvar=False), rtol=1e-10)


def test_fewer_images_than_features_still_give_a_finite_exact_distance():
    # Both covariances lack rank. With supports along different axes the product vanishes: only the traces remain.
    x, y = np.zeros((6, 30)), np.zeros((5, 30))
    x[:, :4] = features(0, 6, 4)
    y[:, 10:13] = features(1, 5, 3)
    a, b = frechet.update(None, x), frechet.update(None, y)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_covariances_that_lack_rank_agree_with_singular_values_of_the_features(seed):
    # With centred features X and Y, tr((S S')^(1/2)) is the nuclear norm of X Y^T / sqrt((n - 1) (m - 1)).
    x, y = features(seed, 8, 40), features(seed + 50, 11, 40)
    nuclear = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False).sum() / np.sqrt(7 * 10)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * nuclear
    assert frechet_distance(frechet.update(None, x), frechet.update(None, y)) == pytest.approx(expected, rel=1e-11)


def test_distance_is_symmetric_and_zero_for_equal_moments():
    a = Moments.of_covariance(50, np.arange(20.0), random_covariance(0, 20))
    b = Moments.of_covariance(50, np.ones(20), random_covariance(1, 20))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert 0 <= frechet_distance(a, a) < 1e-6


def test_order_and_batches_change_nothing_where_a_covariance_lacks_rank():
    # The root of an eigenvalue that is 0 but for rounding would be 1e-8, and there are many.
    x, y = features(0, 40, 150), features(1, 55, 150)
    whole = frechet_distance(frechet.update(None, x), frechet.update(None, y))
    stats = None
    for block in np.split(np.random.default_rng(2).permutation(x), [7, 8, 31]):
        stats = frechet.update(stats, block)
    assert frechet_distance(stats, frechet.update(None, y)) == pytest.approx(whole, rel=1e-11)
    assert frechet_distance(frechet.update(None, y), stats) == pytest.approx(whole, rel=1e-11)


def test_a_covariance_of_full_rank_is_used_in_full_whatever_the_count_says():
    full = random_covariance(3, 20)
    few, many = Moments.of_covariance(4, np.zeros(20), full), Moments.of_covariance(400, np.zeros(20), full)
    other = Moments.of_covariance(400, np.zeros(20), random_covariance(4, 20))
    assert frechet_distance(few, other) == pytest.approx(frechet_distance(many, other), rel=1e-12)
    assert frechet_distance(other, few) == pytest.approx(frechet_distance(many, other), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_with_their_row(bad):
    x = np.zeros((4, 3))
    x[2, 1] = bad
    with pytest.raises(ValueError, match="row 2"):
        frechet.update(None, x)


def test_one_image_and_different_widths_are_refused():
    one, many = frechet.update(None, np.ones((1, 3))), frechet.update(None, features(0, 9, 3))
    with pytest.raises(ValueError, match="2 images or more, found 1"):
        frechet_distance(one, many)
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet.merge(many, frechet.update(None, features(0, 9, 4)))
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(many, frechet.update(None, features(0, 9, 4)))
    with pytest.raises(ValueError, match="shape"):
        frechet.update(None, np.ones(3))
