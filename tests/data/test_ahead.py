"""Work ahead of its use: in order, no further than asked, refused where it would have come."""

import os
import threading
import time

import pytest

from haste.data.ahead import made_ahead, reading_threads, spread


def test_results_come_in_order_whoever_is_first_and_no_more_are_begun_than_asked():
    begun = []

    def make(i):
        begun.append(i)
        time.sleep(0.02 * (3 - i % 4))
        return i

    found = made_ahead(make, iter(range(40)), threads=4, depth=5, name="t")
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    assert max(begun) < 3 + 5 + 1
    assert list(found) == list(range(3, 40))


def test_a_refusal_comes_where_its_result_would_have_come_and_no_thread_is_left():
    found = made_ahead(lambda i: 1 // (3 - i), range(9), threads=2, depth=2, name="of this test")
    assert [next(found) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("of this test")]


def test_work_is_spread_such_that_at_most_a_share_of_it_is_done_one_after_another():
    """Nobody passes the barrier alone: of 40 items eight are always on their way, so five follow one another."""
    together, done = threading.Barrier(8), []
    with spread(8, "of this test") as run:
        run(lambda item: together.wait(timeout=30) is None or done.append(item), range(40))
        with pytest.raises(ZeroDivisionError):
            run(lambda item: 1 // item, [1, 0])
        run(done.append, [])
    assert sorted(done) == list(range(40))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("of this test")]


def test_a_rank_reads_in_four_threads_for_each_of_its_cores_8_to_32(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (reading_threads(None), reading_threads(3)) == (32, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert reading_threads(None) == 32
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert reading_threads(None) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    assert reading_threads(None) == 8
