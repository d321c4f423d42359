"""Long metrics say how far they are, in lines that also read well in a file; short ones say nothing."""

import logging
import re

import numpy as np
import pytest

from haste.metrics import kid, neighbours, progress


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes ten seconds."""
    times = iter(range(0, 10**6, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))


def test_a_line_says_what_is_done_and_how_long_the_rest_takes(caplog, clock):
    caplog.set_level(logging.INFO, logger="haste.score")
    work = progress.Progress("distances", 400)
    work.add(100)
    work.add(200)
    assert caplog.messages == ["distances: 25 %  30 s to go", "distances: 75 %  7 s to go"]


def test_lines_come_every_few_seconds_and_work_of_a_moment_has_none(caplog):
    caplog.set_level(logging.INFO, logger="haste.score")
    work = progress.Progress("distances", 1000)
    for _ in range(1000):
        work.add(1)
    assert not caplog.messages


@pytest.mark.parametrize("metric", ["precision and recall", "KID"])
def test_the_long_metrics_report_from_their_beginning_to_their_end(caplog, clock, monkeypatch, metric):
    caplog.set_level(logging.INFO, logger="haste.score")
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
