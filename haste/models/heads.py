"""Heads between a student's tokens and a teacher's features: REPA's projector, and those of iREPA.

Shapes: B batch, N = rows x columns tokens. A head maps tokens (B, N, width_in) on a teacher's grid (rows, columns) to
(B, N, width_out). It is not part of the model: it draws from its own generator, so that a model has the same initial
weights with and without one. Without a generator it uses seed 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from haste.models.layers import fill_xavier

Fill = Callable[..., None]  # of a layer and a generator


class Projector(nn.Sequential):
    """Three linear layers with SiLU between (REPA).

    Its keys `0.weight` .. `4.bias`, under `projectors.0.`, are those of REPA's checkpoints.
    """

    def __init__(self, width_in: int, width_out: int, hidden: int = 2048, generator: torch.Generator | None = None):
        super().__init__(
            nn.Linear(width_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width_out)
        )
        self.initialise(generator or torch.Generator("cpu").manual_seed(0))

    def initialise(self, generator: torch.Generator, fill: Fill = fill_xavier) -> None:
        """Weights from `generator` alone, as the network's own layers: by default Xavier-uniform, with zero biases."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                fill(layer, generator)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        """See the file; every token alone, so the grid does not matter."""
        return super().forward(tokens)


class OneLayer(nn.Module):
    """One linear layer of every token or, with a kernel, one convolution over their grid with zeros around it (iREPA,
    arXiv 2512.10794).

    Its keys `projection_layer.weight` and `projection_layer.bias` are those of iREPA's checkpoints.
    """

    def __init__(
        self, width_in: int, width_out: int, kernel: int | None = None, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.projection_layer: nn.Linear | nn.Conv2d = (
            nn.Linear(width_in, width_out)
            if kernel is None
            else nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)
        )
        self.initialise(generator or torch.Generator("cpu").manual_seed(0))

    def initialise(self, generator: torch.Generator, fill: Fill = fill_xavier) -> None:
        """As `Projector.initialise`; a convolution is a linear map of its patch."""
        fill(self.projection_layer, generator)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """See the file. ValueError if a convolution's tokens are not those of the grid."""
        if isinstance(self.projection_layer, nn.Linear):
            return self.projection_layer(tokens)
        if grid is None or grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"head conv: {tokens.shape[1]} tokens are not those of a grid of {grid}")
        image = tokens.transpose(1, 2).unflatten(2, grid)  # (B, width_in, rows, columns)
        return self.projection_layer(image).flatten(2).transpose(1, 2)


def head_of(term: Mapping[str, Any], width_in: int, width_out: int) -> Projector | OneLayer:
    """The head that a feature term asks for, with weights of seed 0."""
    if term.get("head", "mlp") == "mlp":
        return Projector(width_in, width_out, hidden=term["hidden"])
    return OneLayer(width_in, width_out, kernel=term["kernel"])
