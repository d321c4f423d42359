"""Interpolants between data and noise: x_t = alpha_t x + sigma_t eps, t = 0 is data, t = 1 is noise (SiT, section 2).

Times are Python floats or tensors of shape (B,); the precision of the input is kept, so float64 stays float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)


def _cos(angle: Time) -> Time:
    return cast(Time, angle.cos() if isinstance(angle, Tensor) else math.cos(angle))


def _sin(angle: Time) -> Time:
    return cast(Time, angle.sin() if isinstance(angle, Tensor) else math.sin(angle))


@dataclass(frozen=True)
class Path:
    """An interpolant: its coefficients, their derivatives in t, and the time at which log(sigma/alpha) has a value."""

    name: str
    alpha: Callable
    sigma: Callable
    d_alpha: Callable
    d_sigma: Callable
    time_of_log_ratio: Callable[[Tensor], Tensor]


LINEAR = Path(
    name="linear",
    alpha=lambda t: 1.0 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: 0.0 * t - 1.0,
    d_sigma=lambda t: 0.0 * t + 1.0,
    # r / (1 + r) with r = exp(l), in the form that does not overflow
    time_of_log_ratio=torch.sigmoid,
)

COSINE = Path(
    name="cosine",
    alpha=lambda t: _cos(math.pi / 2 * t),
    sigma=lambda t: _sin(math.pi / 2 * t),
    d_alpha=lambda t: -math.pi / 2 * _sin(math.pi / 2 * t),
    d_sigma=lambda t: math.pi / 2 * _cos(math.pi / 2 * t),
    time_of_log_ratio=lambda log_ratio: 2 / math.pi * torch.atan(torch.exp(log_ratio)),
)

PATHS: dict[str, Path] = {path.name: path for path in (LINEAR, COSINE)}


def _beside(t: float | Tensor, x: Tensor) -> float | Tensor:
    """A batch of times (B,) as (B, 1, ..., 1), so that it multiplies x (B, ...); a float is returned unchanged."""
    if not isinstance(t, Tensor) or t.ndim == 0:
        return t
    assert t.shape == x.shape[:1], (tuple(t.shape), tuple(x.shape))
    return t.view(-1, *[1] * (x.ndim - 1))


def interpolate(path: Path, x: Tensor, eps: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """x_t = alpha x + sigma eps and the velocity v = alpha' x + sigma' eps.

    x and eps (B, ...), t a float or (B,); both results are shaped as x.
    """
    t = _beside(t, x)
    return path.alpha(t) * x + path.sigma(t) * eps, path.d_alpha(t) * x + path.d_sigma(t) * eps


def score_from_velocity(path: Path, v: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
    """Score of the density at time t > 0 from the velocity there (SiT, section 2).

    s = (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')); for the linear path, -(x + (1 - t) v) / t.
    v and x (B, ...), t a float or (B,).
    """
    t = _beside(t, x)
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    return (alpha * v - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def timestep_lognormal(n: Tensor, mu: float = 0.0, s: float = 1.0, path: Path = LINEAR) -> Tensor:
    """Training times whose noise ratio sigma/alpha = exp(mu + s n) is log-normal, from standard normals n.

    t = r / (1 + r) on the linear path, 2/pi atan(r) on the cosine path (EDM section 5, carried to an interpolant).
    """
    return path.time_of_log_ratio(mu + s * n)
