"""Batches of samples outlive a kill, and nothing else takes their place."""

import numpy as np
import pytest

from haste.sampling import batches

SOURCE = {"weights": "a", "autoencoder": "b"}


def draw(rows):
    place = np.arange(rows.start, rows.stop)
    return {"image": place[:, None] * np.ones((1, 3), np.int64), "label": place % 3}


def run(folder, indices, size, source=SOURCE, draw=draw, most=None):
    """The rows of up to `most` batches, and which ranges were drawn."""
    asked, found = [], []

    def counted(rows, sets):
        assert sets == [0]
        asked.append((rows.start, rows.stop))
        return [draw(rows)]

    kept = [batches.Kept(folder, source)]
    for number, (_, batch, keep) in enumerate(batches.drawn(kept, indices, size, counted), start=1):
        found += batch["label"].tolist()
        if keep is not None:
            keep()
        if number == most:
            break
    return found, asked


def test_batches_come_in_order_and_are_drawn_once(tmp_path):
    first, asked = run(tmp_path, range(4, 15), 4, most=2)
    assert asked == [(4, 8), (8, 12)]
    whole, asked = run(tmp_path, range(4, 15), 4)
    assert asked == [(12, 15)]
    assert whole == [i % 3 for i in range(4, 15)] and first == whole[:8]


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_another_batch_size_fits_what_is_new_between_what_is_kept(tmp_path, size):
    run(tmp_path, range(20), 4)
    (tmp_path / "000000004.npz").unlink()
    (tmp_path / "000000016.npz").unlink()
    rows, asked = run(tmp_path, range(20), size)
    assert rows == [i % 3 for i in range(20)]
    assert sorted(i for low, high in asked for i in range(low, high)) == [4, 5, 6, 7, 16, 17, 18, 19]


def test_a_batch_of_other_weights_or_a_damaged_one_is_drawn_again(tmp_path, caplog):
    run(tmp_path, range(8), 4)
    _, asked = run(tmp_path, range(8), 4, {**SOURCE, "weights": "c"})
    assert asked == [(0, 4), (4, 8)]
    file = tmp_path / "000000004.npz"
    for damage in (file.read_bytes()[:50], b"", b"nonsense"):
        file.write_bytes(damage)
        _, asked = run(tmp_path, range(8), 4, {**SOURCE, "weights": "c"})
        assert asked == [(4, 8)]
        assert str(file) in caplog.text


def test_a_batch_that_reaches_beyond_the_shard_is_not_taken(tmp_path):
    run(tmp_path, range(8), 8)
    rows, asked = run(tmp_path, range(6), 8)
    assert asked == [(0, 6)] and len(rows) == 6


def test_a_shard_without_samples_draws_nothing(tmp_path):
    assert run(tmp_path, range(3, 3), 4) == ([], [])


def test_shards_of_another_number_take_what_fits_into_them(tmp_path):
    """One shard was being made of 20 samples when their number became two."""
    run(tmp_path, range(20), 4, most=4)
    rows, asked = run(tmp_path, range(10), 4)
    assert rows == [i % 3 for i in range(10)] and asked == [(8, 10)]  # the batch from 8 reached beyond
    batches.forget(tmp_path, range(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000012.npz"]
    rows, asked = run(tmp_path, range(10, 20), 4)
    assert rows == [i % 3 for i in range(10, 20)] and asked == [(10, 12), (16, 20)]


def test_forgotten_batches_are_gone_and_may_be_forgotten_again(tmp_path):
    folder = batches.folder_of(tmp_path)
    run(folder, range(8), 4)
    for _ in range(2):
        batches.forget(folder, range(8))
        assert list(folder.iterdir()) == []
    for _ in range(2):
        batches.close(folder)
        assert list(tmp_path.iterdir()) == []


def test_a_place_that_another_process_clears_away_meanwhile_costs_nothing(tmp_path, monkeypatch):
    save = np.savez

    def cleared(file, **arrays):
        save(file, **arrays)
        batches.close(tmp_path / "batches")

    monkeypatch.setattr(np, "savez", cleared)
    rows, asked = run(tmp_path / "batches", range(10), 4)
    assert rows == [i % 3 for i in range(10)] and asked == [(0, 4), (4, 8), (8, 10)]
