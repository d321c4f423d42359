import numpy as np
import pytest

from haste.metrics import rows


def block(low, high):
    return {"pool": np.arange(low, high, dtype=np.float32)[:, None]}


def test_rows_without_places_follow_those_seen_before():
    stats = rows.collect(rows.collect(None, block(0, 3), "pool"), block(3, 7), "pool")
    assert stats.index.tolist() == list(range(7)) and stats.ordered[:, 0].tolist() == list(range(7))


def test_rows_come_back_in_their_order_however_they_were_merged():
    parts = [
        rows.collect(None, block(low, low + 3) | {"index": np.arange(low, low + 3)[::-1]}, "pool") for low in (6, 0, 3)
    ]
    merged = rows.merge(rows.merge(parts[0], parts[1]), parts[2])
    assert merged.ordered[:, 0].tolist() == [2, 1, 0, 5, 4, 3, 8, 7, 6]


def test_shards_that_do_not_say_where_they_lie_are_refused():
    one, other = rows.collect(None, block(0, 3), "pool"), rows.collect(None, block(3, 5), "pool")
    with pytest.raises(ValueError, match="2 images of these shards have the same place, the first is 0"):
        rows.merge(one, other)
    with pytest.raises(ValueError, match="1 images .* the first is 2"):
        rows.collect(one, block(3, 5) | {"index": np.array([2, 3])}, "pool")


@pytest.mark.parametrize("index", [np.array([0, -1]), np.array([0]), np.array([0.0, 1.0])])
def test_places_must_be_one_integer_a_row(index):
    with pytest.raises(ValueError, match="expected 2 integers from 0"):
        rows.places({"index": index}, 2, None)


def test_rows_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="width 1 and 2"):
        rows.merge(
            rows.collect(None, block(0, 3), "pool"),
            rows.collect(None, {"pool": np.zeros((2, 2)), "index": np.array([3, 4])}, "pool"),
        )
