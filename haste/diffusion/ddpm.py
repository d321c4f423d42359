"""Improved DDPM, the process of DiT: noise and its variance are predicted (Nichol and Dhariwal 2021, arXiv 2102.09672).

There are 1,000 steps k = 0 .. 999; step k lies at t = k / 999. The network is given k and returns 2C channels: the
noise, and numbers o that interpolate the variance, Sigma = exp(v log beta + (1 - v) log beta~) with v = (o + 1) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from haste.config import Sampling
from haste.diffusion.process import Draws, Process
from haste.diffusion.respacing import CHAIN, LAST, at, chain, log_variance, time_of
from haste.diffusion.samplers import Field, Sampler

_EDGE = 0.999  # data beyond it are in the last bins of the discretised likelihood, which are open
_BIN = 1.0 / 255.0  # half a bin: 256 values on [-1, 1]


class DDPM(Process):
    """See the top of the file. It has no settings of its own."""

    def outputs(self, channels: int) -> int:
        """See `Process`: the noise and its variance."""
        return 2 * channels

    def guided(self, channels: int) -> int:
        """See `Process`: the noise; the variance is that of the conditional evaluation."""
        return channels

    def place(self, t: float) -> float:
        """See `Process`: that of step round(999 t)."""
        return time_of(round(LAST * t))

    def times(self, uniforms: Draws, normals: Draws) -> Tensor:
        """See `Process`: each step is equally likely."""
        steps = np.floor(CHAIN * uniforms("time"))
        return torch.from_numpy((steps / LAST).astype(np.float32))

    def time(self, t: Tensor) -> Tensor:
        """The step k of each time, as a float."""
        return (LAST * t).round()

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Process`: sqrt(abar_k) z + sqrt(1 - abar_k) noise."""
        alpha_bar = chain().alpha_bar
        return at(alpha_bar**0.5, self._steps(t), z) * z + at((1.0 - alpha_bar) ** 0.5, self._steps(t), z) * noise

    def losses(self, predicted: Tensor, z: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """`mse` of the noise and `vlb`, the step's term of the variational bound in bits per dimension; their sum is
        trained.

        The bound's mean is detached, so that it trains the variance alone (section 4 of the paper, and DiT's code,
        which gives it the weight 1).
        """
        found, variance = predicted.chunk(2, dim=1)
        mse = (found - noise).square().mean()
        vlb = self.bound(found.detach(), variance, z, noise, t).mean()
        return {"denoising": mse + vlb, "mse": mse, "vlb": vlb}

    def bound(self, found: Tensor, variance: Tensor, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The term of the variational bound at each sample's step, (B,), in bits per dimension.

        KL(q(x_before | x_k, z) || p(x_before | x_k)); for step 0 the negative log-likelihood of z in bins of 2/255.

        Args:
            found: predicted noise, (B, C, h, w); variance: the channels that interpolate it, alike.
            z, noise, t: as for `losses`.
        """
        kept, k = chain(), self._steps(t)
        x = self.noised(z, noise, t)
        root, rest = at(kept.alpha_bar**0.5, k, z), at((1.0 - kept.alpha_bar) ** 0.5, k, z)
        of_data, of_state = at(kept.of_data, k, z), at(kept.of_state, k, z)
        mean, data = of_data * z + of_state * x, (x - rest * found) / root
        guess, own = of_data * data + of_state * x, log_variance(kept, k, variance)
        true = at(kept.log_posterior_variance, k, z)
        divergence = (own - true + (true - own).exp() + (mean - guess).square() * (-own).exp() - 1) / 2
        nats = torch.where(k == 0, -_log_likelihood(z, guess, own), divergence)
        return nats.flatten(1).mean(1) / math.log(2.0)

    def sample(
        self, sampler: Sampler, field: Field, x: Tensor, sampling: Sampling, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """See `Process`."""
        more = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
        return sampler.run(field, x, sampling.steps, noise, **more)

    def _steps(self, t: Tensor) -> Tensor:
        return self.time(t).long().view(-1, 1, 1, 1)


def _log_likelihood(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_variance)) gives to the bin of z, one of 256 on [-1, 1]; shaped as z."""
    scale = (-log_variance / 2).exp()
    above, below = (torch.special.ndtr((z + side - mean) * scale) for side in (_BIN, -_BIN))
    mass = torch.where(z < -_EDGE, above, torch.where(z > _EDGE, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
