"""A process: what a network is trained to predict, and how samples follow from its predictions.

All other code uses times t in [0, 1], where 0 is data and 1 is noise: batches, `t_min`, `t_max`, guidance intervals,
triggers and measures. Only the process knows how a network receives time.

Shapes: B batch, C latent channels, h x w latent cells, O = `outputs(C)` channels of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from haste.config import Sampling, Strict
from haste.diffusion.samplers import Field, Sampler

#: A purpose -> a random number for each sample, (B,): a function of seed, purpose, step and the sample's place.
Draws = Callable[[str], NDArray[Any]]


class Process:
    """The interface of every training objective. It is constructed with its `Settings` as keywords, and holds no
    random state.

    A network names its process (`haste.models.denoiser.Denoiser.process`), and so does a sampler
    (`haste.diffusion.samplers.Sampler.process`).

    Attributes:
        Settings: the keys of `training.process` beside `name`, each with a default.
    """

    Settings: ClassVar[type[Strict]] = Strict

    def outputs(self, channels: int) -> int:
        """O, the output channels that a network needs for latents of C channels."""
        return channels

    def guided(self, channels: int) -> int:
        """How many of the outputs are guided, the first ones; the others are those of the conditional
        evaluation."""
        return self.outputs(channels)

    def place(self, t: float) -> float:
        """The process's time nearest to t, both in [0, 1]; monotone, and exact in float32."""
        return t

    def times(self, uniforms: Draws, normals: Draws) -> Tensor:
        """Times of a batch in [0, 1], (B,) float32, each a time of the process.

        Args:
            uniforms: numbers in [0, 1), float64, by purpose.
            normals: standard normals, float32, by purpose.
        """
        raise NotImplementedError(f"{type(self).__name__}.times")

    def time(self, t: Tensor) -> Tensor:
        """The network's time input for times t (B,) in [0, 1]: by default t itself."""
        return t

    def noised(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w) of latents z and standard normal noise, both (B, C, h, w), at times t (B,) in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__}.noised")

    def losses(self, predicted: Tensor, z: Tensor, noise: Tensor, t: Tensor) -> Mapping[str, Tensor]:
        """The losses of a batch, means over its samples, by name: `denoising` is trained, the others are only logged.

        Args:
            predicted: (B, O, h, w), the network's output at x_t; float32 or float64.
            z: latents, (B, C, h, w).
            noise: as for `noised`.
            t: (B,) in [0, 1].
        """
        raise NotImplementedError(f"{type(self).__name__}.losses")

    def field(self, network: Any) -> Callable[[Tensor, float, Any], Tensor]:
        """The field of samplers, before guidance: (x (B, C, h, w), t in [0, 1], condition) -> outputs (B, O, h, w).

        Args:
            network: a `haste.models.denoiser.Denoiser` with weights in float32; it may compute in half precision.
        """

        def outputs(x: Tensor, t: float, condition: Any) -> Tensor:
            times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            return network(x.float(), self.time(times), condition)[0]

        return outputs

    def sample(
        self, sampler: Sampler, field: Field, x: Tensor, sampling: Sampling, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Latents (B, C, h, w), float64, from standard normals x at t = 1.

        Args:
            sampler: one for this process.
            field: (x, t) -> outputs, guided.
            x: (B, C, h, w); the rows may be of several sets of samples, whose guidance differs, but not
                for a process or sampler of another package.
            sampling: its settings, such as `steps`; guidance is in the field.
            noise: i -> standard normals for the sampler's i-th use, shaped as x.
        """
        return sampler.run(field, x, sampling.steps, noise, self)
