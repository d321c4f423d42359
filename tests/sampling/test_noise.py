"""The noise of samples is a function of place, however it is drawn."""

import threading

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.data import order
from haste.sampling.noise import Noise

SHAPE = (2, 3, 3)


@settings(max_examples=50, deadline=None)
@given(asked=st.lists(st.integers(0, 6), max_size=8), steps=st.integers(0, 6), low=st.integers(0, 2**40))
def test_the_noise_of_a_step_is_that_of_its_place_whatever_was_drawn_ahead(asked, steps, low):
    indices = range(low, low + 3)
    with Noise(11, indices, SHAPE, steps, torch.device("cpu")) as noise:
        for step in asked:
            expected = order.normals(11, "sample noise", step, indices, SHAPE)
            np.testing.assert_array_equal(noise(step).numpy(), expected)
        np.testing.assert_array_equal(noise.start.numpy(), order.normals(11, "sample start", 0, indices, SHAPE))


def test_the_next_step_is_drawn_before_it_is_asked_for_and_none_beyond_the_last(monkeypatch):
    drawn, threads, event, real = [], set(), threading.Event(), order.normals

    def normals(seed, purpose, step, *rest):
        drawn.append(step)
        threads.add(threading.current_thread())
        if step == 1:
            event.set()
        return real(seed, purpose, step, *rest)

    monkeypatch.setattr(order, "normals", normals)
    with Noise(0, range(4), SHAPE, 3, torch.device("cpu")) as noise:
        noise(0)
        assert event.wait(60)
        noise(1)
    assert drawn == [0, 1]
    assert not any(thread.is_alive() for thread in threads)
