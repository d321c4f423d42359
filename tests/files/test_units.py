"""Seconds and bytes that people can read."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as some

from haste.files.units import duration, readable

SECONDS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


def read(text):
    return sum(float(number.replace(",", "")) * SECONDS[unit] for number, unit in re.findall(r"([\d,]+) (\w+)", text))


@given(some.floats(0, 1e10))
def test_a_duration_is_right_to_a_twentieth_in_at_most_two_units(seconds):
    said = duration(seconds)
    assert re.fullmatch(r"[\d,]+ (d|h|min|s)( \d+ (h|min|s))?", said)
    assert read(said) == pytest.approx(seconds, rel=0.05, abs=0.5)


@given(some.floats(0, 1e7), some.floats(0, 1e7))
def test_what_takes_longer_is_not_said_to_take_less(one, other):
    short, long = sorted((one, other))
    assert read(duration(short)) <= read(duration(long))


def test_durations_as_people_say_them():
    days = 157222 * 3600 + 22 * 60
    said = [
        duration(one) for one in (0.2, 45, 59.7, 90, 720, 3599, 4 * 3600 + 300, 23.6 * 3600, 3 * 86400 + 4 * 3600, days)
    ]
    assert said == ["0 s", "45 s", "1 min", "1 min 30 s", "12 min", "1 h", "4 h 5 min", "1 d", "3 d 4 h", "6,551 d"]


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (999_700, "1 MB"), (3.07e6, "3.07 MB"), (2.0516937e12, "2.05 TB"), (3e15, "3,000 TB")],
)
def test_bytes_are_said_in_three_digits_of_the_unit_that_suits_them(count, said):
    assert readable(count) == said
