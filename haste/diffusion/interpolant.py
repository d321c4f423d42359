"""The interpolant: x_t = alpha_t z + sigma_t eps on a path, with its velocity as target (SiT, arXiv 2401.08740)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from haste.config import Sampling, Strict, Timesteps
from haste.diffusion.paths import PATHS, interpolate, timestep_lognormal
from haste.diffusion.process import Draws, Process
from haste.diffusion.samplers import Field, Sampler


class Interpolant(Process):
    """See the top of the file. The settings are the configuration's `training.path` and `training.timesteps`."""

    class Settings(Strict):
        path: Literal[*PATHS] = "linear"  # type: ignore[valid-type]
        timesteps: Timesteps = Timesteps()

    def __init__(self, path: str = "linear", timesteps: Mapping[str, Any] | None = None):
        """
        Args:
            path: a name of PATHS.
            timesteps: how times are drawn, as in `haste.config.Timesteps`; None draws them uniformly.
        """
        self.path, self.timesteps = PATHS[path], dict(timesteps or {"distribution": "uniform"})

    def times(self, uniforms: Draws, normals: Draws) -> Tensor:
        """See `Process`: uniform, or with a log-normal noise ratio sigma/alpha."""
        if self.timesteps["distribution"] == "uniform":
            return torch.from_numpy(uniforms("time").astype(np.float32))
        n = torch.from_numpy(normals("time of a normal")).double()
        return timestep_lognormal(n, self.timesteps["mu"], self.timesteps["s"], self.path).float()

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Process`."""
        return interpolate(self.path, z, noise, t)[0]

    def losses(self, predicted: Tensor, z: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """SiT Eq. 2 with the velocity as target; all samples have the same size, so a single mean is enough."""
        velocity = interpolate(self.path, z, noise, t)[1]
        return {"denoising": (predicted - velocity).square().mean()}

    def sample(
        self, sampler: Sampler, field: Field, x: Tensor, sampling: Sampling, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """See `Process`; the field is the velocity. ODE solvers take no noise, adaptive ones no steps."""
        if sampler.evaluations is None:
            return sampler.run(field, x, sampling.rtol, sampling.atol)
        if sampler.stochastic:
            return sampler.run(field, x, sampling.steps, noise, self.path)
        return sampler.run(field, x, sampling.steps)
