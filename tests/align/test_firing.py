"""Where a trigger fires, and how sure: planted curves of which it is known, among them dips that do not last."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.align import firing, triggers
from haste.align.triggers import GradientAngle, Reading

STEPS = np.arange(1, 17) * 1000
DRAWS = 100
TRUTHS = {
    "falls": 0.35 - STEPS / 20_000,
    "falls, and rises again": np.where((STEPS > 5000) & (STEPS <= 8000), -0.25, 0.15),
    "is below for a reading": np.where(STEPS == 6000, -0.3, 0.1),
    "waves": 0.2 * np.cos(STEPS / 2000),
    "is below at once": np.full(len(STEPS), -0.3),
}
ABOVE = {"stays above": 0.05 + 0 * STEPS, "comes near": 0.3 - STEPS / 50_000, "has no angle": 0.0 * STEPS}


def read(means, errors):
    return [
        Reading(int(step), {"mean": float(mean), "error": float(error)})
        for step, mean, error in zip(STEPS, means, np.broadcast_to(errors, len(means)), strict=False)
    ]


def fires(trigger, truth):
    found = triggers.replayed("gradient-angle", trigger, read(truth, 0.0))
    return found and found[0]


def drawn(truth, noise, seeds, trigger):
    rng = np.random.default_rng(5)
    for _ in range(DRAWS):
        each = [read(truth + noise * rng.normal(size=len(STEPS)), noise) for _ in range(seeds)]
        yield firing.agreed([firing.fired(trigger, one) for one in each])


def covered(truth, noise, seeds, trigger):
    """Of how many draws what is told of the interval, an end or both, holds where it fires without noise."""
    here = fires(trigger, truth)
    found = list(drawn(truth, noise, seeds, trigger))
    assert all(one.low <= one.step <= one.high for one in found if one.step is not None)
    return sum((one.low or 0) <= here <= (one.high or math.inf) for one in found)


@pytest.mark.parametrize("noise", [0.03, 0.15])
@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_the_interval_holds_where_it_fires_without_noise_in_at_least_90_of_100_draws(truth, noise):
    assert covered(truth, noise, 1, GradientAngle()) >= 90


@pytest.mark.parametrize(("seeds", "noise", "patience"), [(1, 0.05, 3), (3, 0.02, 1), (3, 0.08, 1), (3, 0.15, 1)])
def test_so_it_does_over_seeds_and_with_patience(seeds, noise, patience):
    assert covered(TRUTHS["falls, and rises again"], noise, seeds, GradientAngle(patience=patience)) >= 90


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_noise_is_low_the_first_dip_is_told_whether_or_not_it_lasts(seeds):
    for truth in TRUTHS.values() if seeds == 1 else [TRUTHS["is below for a reading"]]:
        here, found = fires(GradientAngle(), truth), list(drawn(truth, 0.02, seeds, GradientAngle()))
        assert sum(one.step is not None and one.low <= here <= one.high for one in found) >= 90


@pytest.mark.parametrize("noise", [0.005, 0.3])
@pytest.mark.parametrize("truth", ABOVE.values(), ids=ABOVE)
def test_curves_that_stay_above_get_cannot_tell_in_at_least_90_of_100_draws(truth, noise):
    assert sum(one.step is None for one in drawn(truth, noise, 1, GradientAngle())) >= 90


cosines = st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 0.5)), min_size=1, max_size=16)
kinds = st.builds(GradientAngle, patience=st.integers(1, 3), sure=st.floats(0, 2), threshold=st.floats(-0.5, 0.5))


@settings(max_examples=100, deadline=None)
@given(cosines, kinds)
def test_it_fires_between_the_places_where_it_may_and_where_it_surely_does_as_replay_has_it(values, trigger):
    means, errors = np.array(values).T
    found, here = (
        firing.fired(trigger, read(means, errors)),
        triggers.replayed("gradient-angle", trigger, read(means, errors)),
    )
    assert found.step == (here and here[0])
    assert found.high is None or found.low < found.step <= found.high
    exact = firing.fired(trigger, read(means, 0.0))
    assert exact.high == exact.step == fires(trigger, means)


def test_what_is_known_is_said_with_the_reading_that_tells():
    def said(means, errors=0.01, **keys):
        return str(firing.agreed([firing.fired(GradientAngle(**keys), read(means, errors))]))

    assert said(TRUTHS["falls, and rises again"]) == (
        "step 6,000 (95 %: 5,000 to 6,000; by standard errors: the cosine is -0.250 ± 0.010 at step 6,000, and surely "
        "above -0.05 again at 9,000)"
    )
    assert said(ABOVE["stays above"]) == "cannot tell: it does not fire: the cosine is 0.050 ± 0.010 at step 1,000"
    unsure = "cannot tell: it fires at step 6,000, but not surely: the cosine is -0.300 ± 0.200 at step 6,000"
    assert said(TRUTHS["is below for a reading"], 0.2) == unsure
    assert said(TRUTHS["is below for a reading"], patience=2).startswith("cannot tell: it does not fire")


def test_seeds_agree_only_if_with_each_it_surely_fires():
    def said(*firings):
        return str(firing.agreed([firing.Firing(*one) for one in firings]))

    assert said((300, 200, 400), (None, 1600)) == "cannot tell: it fires with 1 of 2 seeds, at 300"
    assert said((None, 1600), (None, 1600)) == "cannot tell: it fires with none of 2 seeds"
    assert (
        said((300, 200, 400), (500, 400))
        == "cannot tell: it fires with all 2 seeds, at 300, 500, but not surely with 1"
    )
    assert said((300,), (500,), (400,)) == "step 400 (95 %: 152 to 648; t-interval over 3 seeds, at 300, 500, 400)"
    assert said((300,)) == "step 300 (one seed, whose noise is not known)"
