"""Long work says how far it is, in lines that also read well in a file."""

import logging
import re

import numpy as np
import pytest

from haste.files import progress
from haste.metrics import kid, neighbours


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes ten seconds."""
    times = iter(range(0, 10**6, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))


def test_a_line_says_what_is_done_and_how_long_the_rest_takes(caplog, clock):
    caplog.set_level(logging.INFO, logger="haste")
    work = progress.Progress("distances", 400, unit="")
    work.add(100)
    work.add(200)
    assert caplog.messages == ["distances: 25 %  30 s to go", "distances: 75 %  7 s to go"]


def test_items_that_take_long_are_followed_by_their_share(caplog, clock):
    caplog.set_level(logging.INFO, logger="haste")
    assert [*progress.followed("reading logs", "abcd")] == ["a", "b", "c", "d"]
    assert caplog.messages == [
        f"reading logs: {done} %  {left} s to go" for done, left in ((25, 30), (50, 20), (75, 10), (100, 0))
    ]


def test_what_was_there_before_tells_nothing_of_the_rate_and_what_is_begun_counts_for_it(caplog, clock):
    caplog.set_level(logging.INFO, logger="haste")
    work = progress.Progress("shard 0 of 1", 40)
    work.add(10, new=False)
    work.partly(5)
    work.add(30)
    assert caplog.messages == [
        "shard 0 of 1: 10/40 images (10 kept from before)  0.0 images/s  ? to go",
        "shard 0 of 1: 15/40 images (10 kept from before)  0.2 images/s  1 min 40 s to go",
        "shard 0 of 1: 40/40 images (10 kept from before)  1.0 images/s  0 s to go",
    ]


def test_lines_come_every_few_seconds_and_work_of_a_moment_has_none(caplog):
    caplog.set_level(logging.INFO, logger="haste")
    work = progress.Progress("distances", 1000, unit="")
    for _ in range(1000):
        work.add(1)
    assert not caplog.messages


@pytest.mark.parametrize("metric", ["precision and recall", "KID"])
def test_the_long_metrics_report_from_their_beginning_to_their_end(caplog, clock, monkeypatch, metric):
    caplog.set_level(logging.INFO, logger="haste")
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(48, 6)), rng.normal(size=(80, 6))
    if metric == "KID":
        kid.kid(real, fake, subsets=10, size=20)
    else:
        neighbours.precision_recall(real, fake)
    shares = [int(re.match(rf"{metric}: +(\d+) %", line)[1]) for line in caplog.messages]
    assert shares == sorted(shares) and len(shares) >= 10
    assert shares[0] <= 20 and shares[-1] == 100
