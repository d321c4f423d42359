"""Samplers: plain functions of a velocity, from noise at t = 1 to data at t = 0.

`velocity(x, t)` takes the state and the time as a Python float and returns the velocity, shaped as x. The state is held
in float64; what the model computes in is the caller's affair. No sampler touches a random state: noise is handed in.

A velocity may have a method `held(t)` that returns it with every decision it takes by time (whether to guide) fixed
as at time t; Heun asks for it, so that both evaluations of a step have the same guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from haste.diffusion.paths import LINEAR, Path, score_from_velocity

Velocity = Callable[[Tensor, float], Tensor]


def time_grid(steps: int, first: float = 1.0, last: float = 0.0) -> list[float]:
    """`steps` + 1 evenly spaced times, both ends exact."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    return [first + (last - first) * i / steps for i in range(steps)] + [last]


def sde_grid(steps: int, last: float = 0.04) -> list[float]:
    """The `steps` times 1 .. `last`, evenly spaced, at which the model is asked, and then 0."""
    if not 0.0 < last < 1.0:
        raise ValueError(f"last = {last}: the last noisy time must lie strictly between 0 and 1")
    if steps < 2:
        raise ValueError(f"{steps} sampling steps: Euler-Maruyama needs at least 2 (times 1 and {last})")
    return [*time_grid(steps - 1, 1.0, last), 0.0]


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Probability-flow ODE by Euler's method on `steps` even intervals; `steps` evaluations. Returns float64."""
    x = x.double()
    for t, t_next in pairwise(time_grid(steps)):
        x = x + (t_next - t) * velocity(x, t).double()
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """The same ODE by Heun's method, 2 `steps` - 1 evaluations: the step that ends at 0 is Euler's. Returns float64."""
    x = x.double()
    for t, t_next in pairwise(time_grid(steps)):
        slope = velocity(x, t).double()
        if t_next > 0.0:
            at_end = velocity.held(t) if hasattr(velocity, "held") else velocity  # pyright: ignore[reportFunctionMemberAccess]
            slope = (slope + at_end(x + (t_next - t) * slope, t_next).double()) / 2
        x = x + (t_next - t) * slope
    return x


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    steps: int,
    noise: Callable[[int], Tensor],
    path: Path = LINEAR,
    last: float = 0.04,
) -> Tensor:
    """Reverse SDE dx = (v - w/2 s) dt + sqrt(w) dW with w_t = 2 sigma_t (SiT, section 2). Returns float64.

    steps - 1 noisy steps go from t = 1 to `last`, one more, without noise, from `last` to 0: `steps` evaluations.
    `noise(i)` gives the standard normals of noisy step i = 0 .. steps - 2, shaped as x.
    """
    x = x.double()
    for i, (t, t_next) in enumerate(pairwise(sde_grid(steps, last))):
        v, w, dt = velocity(x, t).double(), 2.0 * path.sigma(t), t_next - t
        x = x + (v - w / 2 * score_from_velocity(path, v, x, t)) * dt
        if t_next > 0.0:
            x = x + (w * -dt) ** 0.5 * noise(i).to(x)
    return x


@dataclass(frozen=True)
class Sampler:
    """run: the function; evaluations: model calls, given steps; stochastic: whether it takes `noise`."""

    run: Callable[..., Tensor]
    evaluations: Callable[[int], int]
    stochastic: bool = False


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, lambda steps: steps),
    "heun": Sampler(heun, lambda steps: 2 * steps - 1),
    "euler-maruyama": Sampler(euler_maruyama, lambda steps: steps, stochastic=True),
}


def nfe(name: str, steps: int) -> int:
    """Function evaluations of one sample: how often the velocity is asked (a guided evaluation counts once)."""
    if name not in SAMPLERS:
        raise ValueError(f"no sampler {name!r}: the samplers are {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name].evaluations(steps)
