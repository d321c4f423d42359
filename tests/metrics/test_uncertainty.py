"""The standard error of a Frechet distance is the spread that other samples would show, found without drawing them."""

import numpy as np
import pytest

from haste.metrics.frechet import Moments, frechet_distance, update
from haste.metrics.uncertainty import frechet_error, influence

WIDTH = 6


def drawn(seed, count, width=WIDTH):
    """Features of no Gaussian: skewed, of unequal spread, correlated."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width)) * np.linspace(0.3, 2, width)
    return rng.gamma(2.0, 1.0, (count, width)) @ mix


@pytest.fixture(scope="module")
def reference():
    return update(None, 1.2 * drawn(1, 4000) + 0.3)


def error_of(features, reference, blocks=1):
    return frechet_error(update(None, features), reference, np.array_split(features, blocks))


def test_it_is_the_spread_over_many_sets_of_samples(reference):
    sets = [drawn(100 + i, 400) for i in range(300)]
    distances = [frechet_distance(update(None, features), reference) for features in sets]
    errors = [error_of(features, reference) for features in sets]
    # 300 sets know their spread to 4 %.
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.12)
    assert np.std(errors) < 0.25 * np.mean(errors)


def test_it_is_the_spread_of_the_bootstrap(reference):
    features, rng = drawn(5, 600), np.random.default_rng(0)
    again = [features[rng.integers(0, 600, 600)] for _ in range(300)]
    spread = np.std([frechet_distance(update(None, rows), reference) for rows in again])
    assert error_of(features, reference) == pytest.approx(spread, rel=0.12)


def test_where_the_distance_is_mostly_bias_it_errs_on_the_safe_side(reference):
    same = update(None, drawn(1, 40000))
    sets = [drawn(500 + i, 25 * WIDTH) for i in range(150)]
    spread = np.std([frechet_distance(update(None, features), same) for features in sets])
    assert 1.0 < np.mean([error_of(features, same) for features in sets]) / spread < 1.8


def test_the_influence_is_the_derivative_by_a_samples_weight(reference):
    features = drawn(7, 200)
    found = influence(update(None, features), reference)(features)

    def distance(weights):
        weights = weights / weights.sum()
        mean = weights @ features
        covariance = (features - mean).T @ ((features - mean) * weights[:, None])
        return frechet_distance(Moments.of_covariance(200, mean, covariance), reference)

    for sample in (0, 17, 199):
        step = np.zeros(200)
        step[sample] = 1e-4
        slope = (distance(np.full(200, 1 / 200) + step) - distance(np.full(200, 1 / 200) - step)) / 2e-4
        assert slope == pytest.approx(found[sample] - found.mean(), rel=0.02, abs=0.02)


def test_pieces_and_order_change_nothing(reference):
    features = drawn(8, 301)
    whole = error_of(features, reference)
    assert error_of(features, reference, blocks=13) == pytest.approx(whole, rel=1e-9)
    shuffled = features[np.random.default_rng(0).permutation(301)]
    assert error_of(shuffled, reference, blocks=7) == pytest.approx(whole, rel=1e-6)


def test_a_direction_without_spread_is_left_out(reference):
    flat = drawn(9, 300)
    flat[:, 2] = 5.0
    assert np.isfinite(error_of(flat, reference))


def test_fewer_than_two_samples_a_dimension_have_none(reference):
    assert error_of(drawn(10, 2 * WIDTH - 1), reference) is None
    assert error_of(drawn(10, 2 * WIDTH), reference) > 0
