"""Randomness depends on position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.data import order

seeds = st.integers(0, 2**64 - 1)
GOLDEN_ORDER = [1, 6, 4, 2, 5, 3, 7, 0]
GOLDEN_BATCH = [2, 3, 2]
GOLDEN_UNIFORMS = [0.04229731580154461, 0.9273708649948268]
GOLDEN_NORMALS = [[-0.0830942, -0.2664186]]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, epoch=st.integers(0, 10**6), n=st.integers(1, 300))
def test_every_epoch_is_a_permutation(seed, epoch, n):
    assert sorted(order.permutation(seed, epoch, n)) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(order.permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_is_equally_likely():
    # 3,000 epochs of 4 samples: each of the 16 (place, sample) pairs is expected 750 times, deviation 24.
    table = np.zeros((4, 4))
    for epoch in range(3000):
        table[np.arange(4), order.permutation(9, epoch, 4)] += 1
    assert np.abs(table - 750).max() < 5 * 24


@settings(max_examples=80, deadline=None)
@given(seed=seeds, n=st.integers(1, 40), batch=st.integers(1, 100), steps=st.integers(1, 5))
def test_batches_are_the_epochs_one_after_another(seed, n, batch, steps):
    found = np.concatenate([order.batch_indices(seed, step, batch, n) for step in range(steps)])
    epochs = -(-len(found) // n)
    expected = np.concatenate([order.permutation(seed, epoch, n) for epoch in range(epochs)])
    assert found.dtype == np.int64
    assert np.array_equal(found, expected[: len(found)])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, step=st.integers(0, 1000), n=st.integers(1, 50), batch=st.integers(1, 30), parts=st.integers(1, 4))
def test_a_batch_in_parts_is_the_batch(seed, step, n, batch, parts):
    # A step of `parts * batch` samples is the same samples as `parts` steps of `batch`.
    whole = order.batch_indices(seed, step, batch * parts, n)
    pieces = [order.batch_indices(seed, step * parts + part, batch, n) for part in range(parts)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_a_shared_permutation_cannot_be_spoiled():
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(0, 0, 5)[0] = 3


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds, step=st.integers(0, 2**40), positions=st.lists(st.integers(0, 2**40), max_size=6), cut=st.integers(0, 6)
)
def test_slices_of_a_draw_equal_the_whole(seed, step, positions, cut):
    for function in (order.normals, order.uniforms):
        whole = function(seed, "noise", step, positions, (3, 2))
        parts = [function(seed, "noise", step, part, (3, 2)) for part in (positions[:cut], positions[cut:])]
        assert whole.shape == (len(positions), 3, 2)
        assert np.array_equal(whole, np.concatenate(parts))


def test_each_row_is_the_stream_at_its_position():
    rows = order.normals(5, "noise", 7, [3, 0, 2**40], (2, 3))
    streams = [order.generator(5, "noise", 7, position) for position in (3, 0, 2**40)]
    assert np.array_equal(rows, [stream.standard_normal((2, 3), dtype=np.float32) for stream in streams])


def test_seed_purpose_step_and_position_each_change_the_draw():
    calls = [(s, p, t, [i]) for s in (0, 1) for p in ("noise", "time") for t in (0, 1) for i in (0, 1)]
    for function in (order.normals, order.uniforms):
        assert len({function(*call, (4,)).tobytes() for call in calls}) == 16


def test_a_missing_coordinate_is_not_a_zero():
    draws = {order.generator(3, "x", *position).integers(2**63) for position in [(), (0,), (0, 0), (0, 0, 0)]}
    assert len(draws) == 4


def test_streams_at_neighbouring_positions_do_not_overlap():
    # A counter that began at the position's own word would give shifted copies of one stream.
    draws = np.concatenate([order.generator(0, "x", i).bit_generator.random_raw(1000) for i in range(20)])
    assert len(np.unique(draws)) == len(draws)


def test_normals_and_uniforms_have_their_moments():
    normal = order.normals(0, "noise", 0, range(200), (100,)).astype(np.float64)
    uniform = order.uniforms(0, "time", 0, range(20_000))
    assert normal.mean() == pytest.approx(0, abs=0.03) and normal.var() == pytest.approx(1, abs=0.05)
    assert (normal**4).mean() == pytest.approx(3, abs=0.3)
    assert uniform.dtype == np.float64 and uniform.shape == (20_000,)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01) and uniform.var() == pytest.approx(1 / 12, abs=0.003)


def test_orders_and_draws_of_a_seed_never_change():
    # Golden values: a change here changes every training run.
    assert order.permutation(0, 0, 8).tolist() == GOLDEN_ORDER
    assert order.batch_indices(1, 2, 3, 4).tolist() == GOLDEN_BATCH
    np.testing.assert_allclose(order.uniforms(5, "time", 7, [11, 12]), GOLDEN_UNIFORMS, rtol=0, atol=1e-15)
    np.testing.assert_allclose(order.normals(5, "noise", 7, [11], (2,)), GOLDEN_NORMALS, rtol=1e-6)


@pytest.mark.parametrize("arguments", [(-1, "x"), (2**64, "x"), (0, "x", -1), (0, "x", 2**64), (0, "x", 1, 2, 3, 4)])
def test_what_has_no_stream_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        order.generator(*arguments)


def test_an_empty_data_set_has_no_batches():
    with pytest.raises(ValueError, match="0 samples"):
        order.batch_indices(0, 0, 4, 0)
