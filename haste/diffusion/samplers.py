"""Samplers: plain functions of a velocity, from noise at t = 1 to data at t = 0.

`velocity(x, t)` takes the state and the time as a Python float and returns the velocity, shaped as x. The state is kept
in float64; the caller chooses the model's precision. No sampler uses a random state: noise is an argument.

A velocity may have further methods:
    freeze_guidance(t)   itself with every decision that depends on time (whether to guide) fixed as at time t
    jumps     the times at which such a decision changes, so that it is not smooth there
    row(i)    itself for only sample i of the batch
Heun uses the first, so that both evaluations of a step have the same guidance; dopri5 uses all of them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from haste import extensions
from haste.diffusion import respacing
from haste.diffusion.paths import LINEAR, Path, score_from_velocity

Field = Callable[[Tensor, float], Tensor]  # of (x, t): the guided output of a network; here the velocity


def time_grid(steps: int, first: float = 1.0, last: float = 0.0) -> list[float]:
    """`steps` + 1 evenly spaced times, both ends exact."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    return [first + (last - first) * i / steps for i in range(steps)] + [last]


def sde_grid(steps: int, last: float = 0.04) -> list[float]:
    """The `steps` times 1 .. `last`, evenly spaced, at which the model is evaluated, and then 0."""
    if not 0.0 < last < 1.0:
        raise ValueError(f"last = {last}: the last noisy time must lie strictly between 0 and 1")
    if steps < 2:
        raise ValueError(f"{steps} sampling steps: Euler-Maruyama needs at least 2 (times 1 and {last})")
    return [*time_grid(steps - 1, 1.0, last), 0.0]


def euler(velocity: Field, x: Tensor, steps: int) -> Tensor:
    """Probability-flow ODE by Euler's method on `steps` even intervals; `steps` evaluations. Returns float64."""
    x = x.double()
    for t, t_next in pairwise(time_grid(steps)):
        x = x + (t_next - t) * velocity(x, t).double()
    return x


def heun(velocity: Field, x: Tensor, steps: int) -> Tensor:
    """The same ODE by Heun's method, 2 `steps` - 1 evaluations: the step that ends at 0 is Euler's. Returns float64."""
    x = x.double()
    for t, t_next in pairwise(time_grid(steps)):
        slope = velocity(x, t).double()
        if t_next > 0.0:
            slope = (slope + _guidance_frozen(velocity, t)(x + (t_next - t) * slope, t_next).double()) / 2
        x = x + (t_next - t) * slope
    return x


def euler_maruyama(
    velocity: Field,
    x: Tensor,
    steps: int,
    noise: Callable[[int], Tensor],
    path: Path = LINEAR,
    last: float = 0.04,
) -> Tensor:
    """Reverse SDE dx = (v - w/2 s) dt + sqrt(w) dW with w_t = 2 sigma_t (SiT, section 2). Returns float64.

    steps - 1 noisy steps go from t = 1 to `last`, then one without noise from `last` to 0: `steps` evaluations.
    `noise(i)` gives the standard normals of noisy step i = 0 .. steps - 2, shaped as x.
    """
    x = x.double()
    for i, (t, t_next) in enumerate(pairwise(sde_grid(steps, last))):
        v, w, dt = velocity(x, t).double(), 2.0 * path.sigma(t), t_next - t
        x = x + (v - w / 2 * score_from_velocity(path, v, x, t)) * dt
        if t_next > 0.0:
            x = x + (w * -dt) ** 0.5 * noise(i).to(x)
    return x


def dopri5(velocity: Field, x: Tensor, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """The same ODE by torchdiffeq's adaptive Dormand-Prince 5(4), one sample at a time. Returns float64, as x.

    A sample whose velocity is not finite, or too large for any step, becomes NaN.

    torchdiffeq chooses its steps by the error of the whole batch, so in a batch every sample would depend on the
    others. Separately, each sample has its own steps and its own number of evaluations. A velocity with jumps is solved
    from jump to jump, each interval with its own decision: no step straddles a jump. Times stay within [0, 1];
    torchdiffeq by itself would step past the end and interpolate back.
    """
    from torchdiffeq import odeint  # imports scipy, which no other sampler needs

    x, ends = x.double(), []
    for i in range(len(x)):
        own, state = velocity.row(i) if hasattr(velocity, "row") else velocity, x[i : i + 1]
        for high, low in pairwise([1.0, *sorted(getattr(own, "jumps", ()), reverse=True), 0.0]):
            slope = _guidance_frozen(own, (high + low) / 2)
            try:
                state = odeint(
                    # its first guess of a step, corrected later, may be longer than the whole interval
                    lambda t, y, slope=slope, ends=(low, high): slope(y, min(max(float(t), ends[0]), ends[1])).double(),
                    state,
                    torch.tensor([high, low], dtype=torch.float64, device=x.device),
                    rtol=rtol,
                    atol=atol,
                    method="dopri5",
                    options={"step_t": torch.tensor([low], dtype=torch.float64, device=x.device)},
                )[-1]
            except AssertionError:  # no step is small enough, as for a velocity that is not finite
                state = torch.full_like(state, torch.nan)
                break
        ends.append(state)
    return torch.cat(ends) if ends else x


def _guidance_frozen(velocity: Any, t: float) -> Field:
    return velocity.freeze_guidance(t) if hasattr(velocity, "freeze_guidance") else velocity


class Counted:
    """A velocity that counts the evaluations of every sample of its batch, and reports progress."""

    def __init__(
        self,
        velocity: Any,
        counts: Tensor,
        told: Callable[[float], None] = lambda share: None,
        share: tuple[float, float] = (0.0, 1.0),
    ):
        """
        Args:
            velocity: the velocity to wrap.
            counts: (B,) integers, which are incremented; a guided evaluation counts once.
            told: called with the completed share of the work, 0 to 1, before every evaluation.
            share: the start and end of this velocity's part of the work.
        """
        self.velocity, self.counts, self.told, self.share = velocity, counts, told, share

    def __call__(self, x: Tensor, t: float) -> Tensor:
        begin, end = self.share
        self.told(begin + (end - begin) * (1.0 - t))
        self.counts += 1
        return self.velocity(x, t)

    def freeze_guidance(self, t: float) -> "Counted":
        """Also counts in `counts`; see the top of the file."""
        return Counted(_guidance_frozen(self.velocity, t), self.counts, self.told, self.share)

    def held(self, t: float) -> "Counted":
        """The old name of `freeze_guidance`."""
        warnings.warn(
            "velocity.held is velocity.freeze_guidance now; the old name will go", FutureWarning, stacklevel=2
        )
        return self.freeze_guidance(t)

    def row(self, i: int) -> "Counted":
        """Counts for sample i; see the top of the file."""
        rows = len(self.counts)
        return Counted(self.velocity.row(i), self.counts[i : i + 1], self.told, (i / rows, (i + 1) / rows))

    @property
    def jumps(self) -> Sequence[float]:
        """See the top of the file."""
        return getattr(self.velocity, "jumps", ())


@dataclass(frozen=True)
class Sampler:
    """run: the function; evaluations: model calls for a number of steps; stochastic: whether it takes `noise`.

    Without `evaluations` the sampler is adaptive: it takes `rtol` and `atol` instead of steps. `process` names its
    training objective, whose `sample` calls it (`haste.diffusion.process.Process`).
    """

    run: Callable[..., Tensor]
    evaluations: Callable[[int], int] | None
    stochastic: bool = False
    process: str = "interpolant"


SAMPLERS = extensions.Table(
    "samplers",
    {
        "euler": Sampler(euler, lambda steps: steps),
        "heun": Sampler(heun, lambda steps: 2 * steps - 1),
        "euler-maruyama": Sampler(euler_maruyama, lambda steps: steps, stochastic=True),
        "dopri5": Sampler(dopri5, None),
        "ddpm": Sampler(respacing.ancestral, lambda steps: steps, stochastic=True, process="ddpm"),
        "ddim": Sampler(respacing.ddim, lambda steps: steps, stochastic=True, process="ddpm"),
    },
)


def nfe(name: str, steps: int | None) -> int | None:
    """Function evaluations per sample: how often the network is called (a guided evaluation counts once).

    None for an adaptive sampler, whose evaluations can only be counted.
    """
    if name not in SAMPLERS:
        raise ValueError(f"no sampler {name!r}: the samplers are {', '.join(sorted(SAMPLERS))}")
    known = SAMPLERS[name].evaluations
    if known is None:
        return None
    assert steps is not None
    return known(steps)
