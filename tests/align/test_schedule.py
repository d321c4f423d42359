"""Weights by step: where they begin, where they end, and what they are between."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haste.align.schedule import SHAPES, factor, ramped, warmed


def test_a_warm_up_grows_evenly_from_nothing_and_stays():
    assert [warmed(step, 4) for step in range(7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmed(step, 0) for step in (0, 1, 99)] == [1.0, 1.0, 1.0]


def test_a_linear_ramp_falls_evenly_to_nothing_at_the_stop():
    assert [ramped(step, 10, 14, "linear") for step in (0, 10, 11, 12, 13, 14, 20)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_a_cosine_ramp_is_half_a_cosine():
    found = [ramped(step, 10, 16, "cosine") for step in (9, 10, 11, 12, 13, 16, 17)]
    expected = [1, 1, math.cos(math.pi / 12) ** 2, 0.75, 0.5, 0, 0]
    assert found == pytest.approx(expected, abs=1e-15)


@given(
    begin=st.integers(0, 50),
    length=st.integers(2, 50),
    shape=st.sampled_from(sorted(SHAPES)),
    warmup=st.integers(0, 30),
)
def test_weights_stay_within_0_and_1_and_only_fall_once_the_ramp_has_begun(begin, length, shape, warmup):
    term = {"warmup": warmup, "ramp": {"from": begin, "to": begin + length, "shape": shape}}
    factors = [factor(step, term) for step in range(begin + length + 3)]
    assert all(0.0 <= value <= 1.0 for value in factors)
    assert all(value > 0.0 for step, value in enumerate(factors) if 0 < step < begin + length)
    assert factors[-3:] == [0.0, 0.0, 0.0]
    without = [factor(step, {"warmup": warmup}) for step in range(begin + 1)]
    assert factors[: begin + 1] == without
    falling = factors[max(begin, warmup) :]
    assert falling == sorted(falling, reverse=True)


def test_a_term_without_either_weighs_the_same_at_every_step():
    assert {factor(step, {"weight": 0.5}) for step in range(100)} == {1.0}
    assert factor(3, {"ramp": None, "warmup": 6}) == 0.5
