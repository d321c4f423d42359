"""What a teacher of low frequencies sees: closed forms, and the centred transform of numpy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.networks.registry import least_low_pass
from haste.teachers.filters import low_pass


def wave(rows, columns, down, across, phase=0.4):
    """One wave with so many cycles down and across, (rows, columns) float64."""
    y, x = (torch.arange(size, dtype=torch.float64) / size for size in (rows, columns))
    return torch.cos(2 * math.pi * (down * y[:, None] + across * x) + phase)


def centred(x, radius):
    """The same by the whole spectrum with frequency 0 in its middle: (filtered, what of the spectrum is kept)."""
    rows, columns = x.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    y, x = np.ogrid[-(rows // 2) : rows - rows // 2, -(columns // 2) : columns - columns // 2]
    kept = (y / (rows / 2)) ** 2 + (x / (columns / 2)) ** 2 <= radius**2 + 1e-12
    return np.fft.ifft2(np.fft.ifftshift(spectrum * kept, axes=(-2, -1))), spectrum * kept


@given(st.integers(2, 17), st.integers(2, 17), st.floats(0.02, 1.0), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_it_is_the_real_part_of_the_centred_transform_and_keeps_the_energy_of_what_it_keeps(
    rows, columns, radius, seed
):
    x = np.random.default_rng(seed).standard_normal((2, 3, rows, columns))
    found = low_pass(torch.from_numpy(x), radius).numpy()
    expected, kept = centred(x, radius)
    np.testing.assert_allclose(found, expected.real, atol=1e-12)
    np.testing.assert_allclose(expected.imag, 0, atol=1e-12)
    np.testing.assert_allclose((found**2).sum(), (abs(kept) ** 2).sum() / (rows * columns), rtol=1e-10)  # Parseval
    np.testing.assert_allclose((x**2).sum(), (found**2).sum() + ((x - found) ** 2).sum(), rtol=1e-10)
    np.testing.assert_allclose(low_pass(torch.from_numpy(found), radius), found, atol=1e-12)


@pytest.mark.parametrize("size", [8, 9, 224])
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0])
def test_a_constant_image_is_unchanged(size, radius):
    flat = torch.tensor([0.0, -2.0, 0.7])[:, None, None].expand(3, size, size)
    torch.testing.assert_close(low_pass(flat, radius), flat, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("down", "across", "radius", "stays"),
    [
        (0, 29, 0.29, True),  # of 100 cycles: on the circle, which floating point puts a little inside
        (0, 30, 0.29, False),
        (20, 21, 0.29, True),  # sqrt(20^2 + 21^2) = 29
        (21, 21, 0.29, False),
        (70, 72, 1.0, False),  # a diagonal beyond the circle
        (100, 0, 1.0, True),  # Nyquist's frequency itself
    ],
)
def test_a_wave_stays_whole_up_to_the_radius_and_vanishes_beyond_it(down, across, radius, stays):
    x = wave(200, 200, down, across)
    torch.testing.assert_close(low_pass(x, radius), x if stays else torch.zeros_like(x), rtol=0, atol=1e-10)


@given(st.integers(2, 500))
@settings(max_examples=40, deadline=None)
def test_the_least_useful_radius_leaves_the_first_wave_of_a_side_and_a_little_less_does_not(side):
    x = wave(side, side, 0, 1, 0.0)
    torch.testing.assert_close(low_pass(x, least_low_pass(side)), x, rtol=0, atol=1e-10)
    assert low_pass(x, least_low_pass(side) - 1.01e-4).abs().max() < 1e-10
