"""Work ahead of its use: in order, no further than asked, refused where it would have come."""

import threading
import time

import pytest

from haste.data.ahead import made_ahead


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
