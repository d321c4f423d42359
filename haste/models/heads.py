"""The projector between a student's tokens and a teacher's features (REPA)."""

import torch
from torch import nn

from haste.models.layers import fill_xavier


class Projector(nn.Sequential):
    """Three linear layers with SiLU between: (..., width_in) -> (..., width_out).

    Its keys `0.weight` .. `4.bias`, under `projectors.0.`, are those of REPA's checkpoints. It is not part of the
    model: it draws from its own generator, so that a model has the same initial weights with and without one. Without
    a generator it uses seed 0.
    """

    def __init__(self, width_in: int, width_out: int, hidden: int = 2048, generator: torch.Generator | None = None):
        super().__init__(
            nn.Linear(width_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width_out)
        )
        self.initialise(generator or torch.Generator("cpu").manual_seed(0))

    def initialise(self, generator: torch.Generator) -> None:
        """Xavier-uniform weights and zero biases, from `generator` alone."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                fill_xavier(layer, generator)
