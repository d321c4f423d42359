import math

import pytest
import torch

from haste.diffusion.paths import (
    COSINE,
    LINEAR,
    PATHS,
    interpolate,
    score_from_velocity,
    timestep_lognormal,
)

BOTH = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)


@BOTH
def test_derivatives_are_those_of_the_coefficients(path):
    step = 1e-6
    for t in (0.0, 0.3, 0.77, 1.0):
        for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
            assert derivative(t) == pytest.approx((value(t + step) - value(t - step)) / (2 * step), abs=1e-8)


@BOTH
def test_a_path_goes_from_data_to_noise(path):
    x, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(interpolate(path, x, eps, torch.zeros(4, dtype=torch.float64))[0], x)
    torch.testing.assert_close(interpolate(path, x, eps, torch.ones(4, dtype=torch.float64))[0], eps)


def test_coefficients_are_the_published_ones():
    for t in (0.0, 0.2, 0.9):
        assert (LINEAR.alpha(t), LINEAR.sigma(t)) == (1 - t, t)
        assert COSINE.alpha(t) == pytest.approx(math.cos(math.pi * t / 2))
        assert COSINE.sigma(t) == pytest.approx(math.sin(math.pi * t / 2))
    assert PATHS == {"linear": LINEAR, "cosine": COSINE}


@BOTH
def test_every_sample_of_a_batch_is_mixed_at_its_own_time(path):
    x, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)
    x_t, v = interpolate(path, x, eps, t)
    assert x_t.dtype == v.dtype == torch.float64
    for b, time in enumerate(t.tolist()):
        torch.testing.assert_close(x_t[b], path.alpha(time) * x[b] + path.sigma(time) * eps[b])
        torch.testing.assert_close(v[b], path.d_alpha(time) * x[b] + path.d_sigma(time) * eps[b])


def test_float32_stays_float32():
    x = torch.ones(2, 3)
    for path in (LINEAR, COSINE):
        assert all(part.dtype == torch.float32 for part in interpolate(path, x, x, torch.tensor([0.2, 0.4])))


@BOTH
@pytest.mark.parametrize("t", [0.04, 0.5, 1.0, torch.tensor([0.01, 0.3, 0.6, 0.99], dtype=torch.float64)], ids=str)
def test_score_from_the_velocity_of_gaussian_data_is_the_gaussian_score(path, t):
    mean, std = 1.5, 0.4
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    times = t[:, None] if isinstance(t, torch.Tensor) else t
    alpha, sigma = path.alpha(times), path.sigma(times)
    variance = alpha**2 * std**2 + sigma**2
    residual = (x - alpha * mean) / variance
    velocity = path.d_alpha(times) * (mean + alpha * std**2 * residual) + path.d_sigma(times) * sigma * residual
    torch.testing.assert_close(score_from_velocity(path, velocity, x, t), -residual, rtol=1e-9, atol=1e-9)


def test_score_on_the_linear_path_is_the_short_formula():
    x, v = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(score_from_velocity(LINEAR, v, x, 0.3), -(x + 0.7 * v) / 0.3)


@BOTH
@pytest.mark.parametrize(("mu", "s"), [(0.0, 1.0), (1.0, 1.0), (-0.4, 2.0)])
def test_lognormal_times_have_a_lognormal_noise_ratio(path, mu, s):
    n = torch.linspace(-3, 3, 13, dtype=torch.float64)
    t = timestep_lognormal(n, mu, s, path)
    torch.testing.assert_close(path.sigma(t) / path.alpha(t), torch.exp(mu + s * n), rtol=1e-9, atol=0)


def test_lognormal_times_have_the_closed_forms_and_never_overflow():
    n = torch.tensor([-200.0, 0.0, 1.2, 200.0])
    ratio = torch.exp(n.double())
    torch.testing.assert_close(timestep_lognormal(n).double(), ratio / (1 + ratio))
    torch.testing.assert_close(timestep_lognormal(n, path=COSINE).double(), 2 / math.pi * torch.atan(ratio))
