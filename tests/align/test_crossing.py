"""From which step on stopping is better: planted curves whose crossing is known, and curves that have none."""

import numpy as np
import pytest
from scipy import stats

from haste.align import crossing
from haste.align.crossing import Curve

STEPS = np.array([50, 100, 150, 200, 250, 300], dtype=float) * 1000
DRAWS = 100


def falling(steps, zero):
    """A line through zero at a step."""
    return (zero - steps) / 100_000


def images(rng, truth, noise, units=64):
    """Groups of images: half of a group's deviation is the same at all steps, for it is the same images."""
    shared, own = rng.normal(size=(units, 1)), rng.normal(size=(units, len(truth)))
    return Curve(STEPS, truth + noise * (shared + own) / np.sqrt(2), "images")


def skewed(rng, truth, noise):
    """Losses of groups are skewed to the right."""
    return Curve(STEPS, truth + noise * (rng.exponential(size=(64, len(truth))) - 1), "images")


def seeds(rng, truth, noise):
    return Curve(STEPS, truth + noise / 4 * rng.normal(size=(4, len(truth))), "seeds")


def errors(rng, truth, noise):
    noise = noise / 8
    found = truth + noise * rng.normal(size=len(truth))
    return Curve(STEPS, found[None], "images", errors=np.full(len(truth), noise))


MAKERS = [images, skewed, seeds, errors]
each_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
each_noise = pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])


def drawn(make, truth, noise, count=DRAWS):
    rng = np.random.default_rng(7)
    return [crossing.crossing(make(rng, truth, noise)) for _ in range(count)]


@each_kind
@each_noise
@pytest.mark.parametrize("zero", [120_000, 200_000])
def test_the_interval_of_what_is_told_covers_the_crossing_in_at_least_90_of_100_draws(make, noise, zero):
    found = drawn(make, falling(STEPS, zero), noise)
    wrong = [one for one in found if one.step is not None and not one.low <= zero <= one.high]
    assert len(wrong) <= DRAWS // 10
    assert all(one.low <= one.step <= one.high for one in found if one.step is not None)


@each_kind
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_where_noise_is_low_a_crossing_is_told_and_covered_in_at_least_90_of_100_draws(make, noise):
    found = drawn(make, falling(STEPS, 175_000), noise)
    assert sum(one.step is not None and one.low <= 175_000 <= one.high for one in found) >= 90


NONE = {
    "noise alone": 0 * STEPS,
    "helps at each step": falling(STEPS, 400_000),
    "helps less and less": np.exp(-STEPS / 50_000),
    "harms at each step": falling(STEPS, 0),
    "harms at first, then helps": -falling(STEPS, 175_000),
}


@each_kind
def test_an_end_of_the_interval_that_is_known_without_a_crossing_holds_in_at_least_90_of_100_draws(make):
    helps, harms = (drawn(make, falling(STEPS, zero), 0.5) for zero in (320_000, 30_000))
    assert sum(one.step is None and 50_000 < one.low <= 320_000 and one.high is None for one in helps) >= 90
    assert sum(one.step is None and 30_000 <= one.high < 300_000 and one.low is None for one in harms) >= 90


@each_kind
@pytest.mark.parametrize("noise", [0.3, 2.0])
@pytest.mark.parametrize("truth", NONE.values(), ids=NONE)
def test_curves_without_a_crossing_get_cannot_tell_in_at_least_90_of_100_draws(make, noise, truth):
    found = drawn(make, truth, noise)
    assert sum(str(one).startswith("cannot tell") for one in found) >= 90


def test_a_noiseless_curve_crosses_where_the_line_between_two_steps_does():
    values = np.array([3.0, 2.0, 1.0, -3.0, -4.0, -5.0])
    found = crossing.crossing(Curve(STEPS, np.tile(values, (8, 1)), "images"))
    assert found.step == found.low == found.high == pytest.approx(162_500)


def test_a_step_before_which_alignment_surely_helped_again_is_in_no_interval():
    truth = np.array([1.0, 0.0, 1.0, 1.0, -1.0, -1.0])
    found = drawn(images, truth, 0.5, 10)
    assert all(200_000 < one.low <= one.high < 250_000 for one in found)


def test_more_noise_makes_the_interval_wider():
    widths = []
    for noise in (0.1, 0.3, 0.9):
        found = [one for one in drawn(images, falling(STEPS, 175_000), noise, 10) if one.step is not None]
        widths.append(np.mean([one.high - one.low for one in found]))
    assert widths == sorted(widths)


def test_intervals_of_seeds_are_those_of_students_t():
    values = np.random.default_rng(0).normal(size=(3, len(STEPS)))
    low, high = crossing.interval(Curve(STEPS, values, "seeds"))
    found = stats.t.interval(0.95, 2, loc=values.mean(0), scale=stats.sem(values))
    np.testing.assert_allclose([low, high], found)


def test_intervals_over_images_are_nearly_those_of_scipys_bootstrap():
    values = np.random.default_rng(1).exponential(size=(200, 2))
    low, high = crossing.interval(Curve(STEPS[:2], values, "images"))
    for place in range(2):
        found = stats.bootstrap((values[:, place],), np.mean, method="percentile", rng=np.random.default_rng(2))
        assert [low[place], high[place]] == pytest.approx(list(found.confidence_interval), abs=0.02)


def test_what_is_known_instead_of_a_crossing_is_said():
    def said(truth):
        return str(crossing.crossing(images(np.random.default_rng(0), truth, 0.1)))

    assert "alignment surely helps at step 300,000, and surely harms at no later step" in said(falling(STEPS, 500_000))
    assert "alignment surely harms at step 50,000, and surely helps at no earlier step" in said(falling(STEPS, 0))
    dip = falling(STEPS, 500_000) - 10 * (STEPS == 150_000)
    assert "surely helps at step 300,000 after harming at step 150,000, and surely harms at no later step" in said(dip)
    assert "at no step is the difference surely other than zero" in said(0 * STEPS)
    one = crossing.crossing(Curve(STEPS, falling(STEPS, 175_000)[None], "seeds"))
    assert str(one) == "cannot tell: one seed, whose noise is not known"


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.95])
def test_bands_of_all_steps_together_cover_the_whole_curve_in_at_least_90_of_100_draws_also_of_8_groups(shared):
    rng, covered = np.random.default_rng(11), 0
    for _ in range(DRAWS):
        values = np.sqrt(shared) * rng.normal(size=(8, 1)) + np.sqrt(1 - shared) * rng.normal(size=(8, 12))
        low, high = crossing.interval(Curve(np.arange(12.0), values, "images"), together=True)
        covered += bool(((low <= 0) & (high >= 0)).all())
    assert covered >= 90
