"""Respaced diffusion: a chain of 1,000 steps, some of them kept, and samplers that walk those (Nichol and Dhariwal
2021, arXiv 2102.09672, sections 3 and 4; Song et al. 2021, arXiv 2010.02502).

Step k of the chain has the variance beta_k, and abar_k is the product of 1 - beta up to and including k. Kept steps
have new variances, 1 - abar_k / abar_before, with `before` the next lower kept step. Numbers are float64 throughout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.networks.devices import sent

CHAIN = 1000  # steps that DiT is trained on
LAST = CHAIN - 1  # step k of the chain lies at t = k / LAST


@dataclass(frozen=True)
class Chain:
    """The kept steps of a chain, n of them, from the lowest to the highest; each field but `places` is (n,) float64.

    Attributes:
        places: the kept steps of the whole chain, (n,) int64: what the network is given.
        alpha_bar, before: abar of each kept step, and of the next lower one (1 for the first).
        beta: variance of each step.
        posterior_variance: beta~ of q(x_before | x_k, x_0); that of the first step, 0, is replaced by the second's
            wherever its logarithm is needed, in `log_posterior_variance`.
        of_data, of_state: the posterior's mean is of_data x_0 + of_state x_k.
    """

    places: NDArray[np.int64]
    alpha_bar: NDArray[np.float64]
    before: NDArray[np.float64]
    beta: NDArray[np.float64]
    posterior_variance: NDArray[np.float64]
    of_data: NDArray[np.float64]
    of_state: NDArray[np.float64]

    @property
    def log_posterior_variance(self) -> NDArray[np.float64]:
        """log beta~, finite also for the first step."""
        found = self.posterior_variance
        return np.log(np.append(found[1], found[1:]))


@functools.cache
def chain(steps: int = CHAIN) -> Chain:
    """The chain of DiT, betas linear from 1e-4 to 0.02, with this many steps kept: round(i 999 / (steps - 1)).

    Raises:
        ValueError: fewer than 2 steps, or more than the chain has.
    """
    if not 2 <= steps <= CHAIN:
        raise ValueError(f"{steps} sampling steps: expected 2 to {CHAIN}, the steps of the chain")
    whole = np.cumprod(1.0 - np.linspace(1e-4, 0.02, CHAIN))
    places = np.array([round(i * LAST / (steps - 1)) for i in range(steps)])
    alpha_bar = whole[places]
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1.0 - alpha_bar / before
    rest = 1.0 - alpha_bar
    of_data, of_state = beta * np.sqrt(before) / rest, (1.0 - before) * np.sqrt(1.0 - beta) / rest
    return Chain(places, alpha_bar, before, beta, beta * (1.0 - before) / rest, of_data, of_state)


def time_of(step: float) -> float:
    """t = k / 999 of a step of the whole chain, rounded to float32 as the times of a batch are."""
    return float(np.float32(step / LAST))


def log_variance(steps: Chain, index: int | Tensor, output: Tensor) -> Tensor:
    """log Sigma = v log beta + (1 - v) log beta~ with v = (output + 1) / 2: the network's variance channels, any shape.

    `index` counts the kept steps: an int, or a tensor that broadcasts against `output`.
    """
    low, high = (at(values, index, output) for values in (steps.log_posterior_variance, np.log(steps.beta)))
    share = (output + 1) / 2
    return share * high + (1 - share) * low


def at(values: NDArray[np.float64], index: int | Tensor, like: Tensor) -> Tensor:
    """Values of some kept steps, as precise as `like`."""
    if isinstance(index, int):  # a number, which needs no copy to a GPU, and so no wait for it
        return torch.tensor(values[index], dtype=like.dtype)
    return sent(torch.from_numpy(values), like.device)[index].to(like.dtype)


Noise = Callable[[int], Tensor]
Outputs = Callable[[Tensor, float], Tensor]  # of (x, t): predicted noise, then the variance channels


def ancestral(outputs: Outputs, x: Tensor, steps: int, noise: Noise) -> Tensor:
    """Ancestral sampling: the posterior of the predicted data with the network's variance; nothing is clipped.

    Args:
        outputs: (x, t) -> (B, 2C, h, w); t = k / 999 for step k of the whole chain.
        x: (B, C, h, w) standard normals, the state after the last step.
        steps: how many steps are kept, 2 to 1,000.
        noise: i -> standard normals of the i-th step, shaped as x; the last step, to the data, takes none.

    Returns:
        (B, C, h, w) float64.
    """
    kept, x = chain(steps), x.double()
    for i, k in enumerate(reversed(range(steps))):
        predicted, variance = outputs(x, time_of(kept.places[k])).double().chunk(2, dim=1)
        x = kept.of_data[k] * _data(kept, k, x, predicted) + kept.of_state[k] * x
        if k > 0:
            x = x + (log_variance(kept, k, variance) / 2).exp() * noise(i).to(x)
    return x


def ddim(outputs: Outputs, x: Tensor, steps: int, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16): deterministic for eta 0; eta 1 has the variance beta~ of the posterior.

    Arguments and result as `ancestral`; the network's variance is not used.
    """
    kept, x = chain(steps), x.double()
    for i, k in enumerate(reversed(range(steps))):
        predicted = outputs(x, time_of(kept.places[k])).double().chunk(2, dim=1)[0]
        variance = eta**2 * kept.posterior_variance[k]
        data, rest = _data(kept, k, x, predicted), 1.0 - kept.before[k] - variance
        x = kept.before[k] ** 0.5 * data + max(rest, 0.0) ** 0.5 * predicted
        if k > 0 and eta > 0:
            x = x + variance**0.5 * noise(i).to(x)
    return x


def _data(kept: Chain, k: int, x: Tensor, noise: Tensor) -> Tensor:
    """x_0 from x_k and its noise."""
    return (x - (1.0 - kept.alpha_bar[k]) ** 0.5 * noise) / kept.alpha_bar[k] ** 0.5
