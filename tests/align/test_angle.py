"""The cosine of two gradients and its error from inner products of groups, against the gradients themselves."""

import math

import numpy as np
import pytest

from haste.align.angle import cosines, jackknife

GROUPS, SIZE = 5, 40


@pytest.fixture
def gradients():
    """(2, S, P): two gradients' sums over groups, that have something in common."""
    generator = np.random.default_rng(3)
    common = generator.standard_normal(SIZE)
    return generator.standard_normal((2, GROUPS, SIZE)) + 0.4 * common


def cosine(a, d):
    return float(a @ d / (np.linalg.norm(a) * np.linalg.norm(d)))


def test_cosines_are_those_of_the_sums_of_all_groups_and_of_all_but_one(gradients):
    products = np.einsum("asp,dtp->asdt", gradients, gradients)
    whole, left_out = cosines(np.stack([products, 9 * products]))  # of a scale a cosine knows nothing
    a, d = gradients
    assert whole == pytest.approx([cosine(a.sum(0), d.sum(0))] * 2, rel=1e-12)
    expected = [cosine(np.delete(a, s, axis=0).sum(0), np.delete(d, s, axis=0).sum(0)) for s in range(GROUPS)]
    assert left_out[0] == pytest.approx(expected, rel=1e-12)
    assert left_out.shape == (2, GROUPS)


def test_the_error_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(4).standard_normal(8)
    without = np.array([np.delete(values, s).mean() for s in range(8)])
    assert jackknife(without) == pytest.approx(values.std(ddof=1) / math.sqrt(8), rel=1e-12)


def test_the_error_is_the_spread_over_other_images():
    """Of the cosine of the mean gradients of images, which are drawn anew many times."""
    generator = np.random.default_rng(5)
    common, found, errors = generator.standard_normal((2, SIZE)), [], []
    common[1] += 0.5 * common[0]
    for _ in range(200):
        images = common[:, None, None] + 6 * generator.standard_normal((2, 16, 12, SIZE))  # 16 groups of 12 images
        sums = images.sum(axis=2)
        whole, left_out = cosines(np.einsum("asp,dtp->asdt", sums, sums))
        found.append(whole)
        errors.append(jackknife(left_out))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


def test_a_gradient_of_nothing_has_no_angle(gradients):
    gradients[1] = 0
    whole, left_out = cosines(np.einsum("asp,dtp->asdt", gradients, gradients))
    assert np.isnan(whole) and np.isnan(left_out).all() and math.isnan(jackknife(left_out))
