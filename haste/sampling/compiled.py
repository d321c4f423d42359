"""A denoiser compiled by `torch.compile`, with one graph for batches of any size."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from haste.models.denoiser import Denoiser
from haste.networks.devices import check_compiler
from haste.networks.spec import each


def compile_once(model: Denoiser) -> None:
    """Compile a network's forward pass, once for the last batch of a shard and for guided batches too.

    The batch is a dimension without a size of its own in the graph. Of a single row, for which torch would compile
    another one, there are two.

    Raises:
        ValueError: the compiler that torch calls is missing.
    """
    check_compiler(next(model.parameters()).device)
    plain, compiled = model.forward, torch.compile(model.forward)

    def forward(x: Tensor, t: Tensor, y: Any, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        if taps:
            return plain(x, t, y, taps)
        predicted, tapped = compiled(*(each(_of_any_size, one) for one in (x, t, y)))
        return predicted[: len(x)], tapped

    model.forward = forward  # type: ignore[method-assign]


def _of_any_size(piece: Tensor) -> Tensor:
    piece = torch.cat([piece, piece]) if len(piece) == 1 else piece
    # Marked alone: with `dynamic=True` a batch that happens to have the size of a side would be taken for it.
    torch._dynamo.maybe_mark_dynamic(piece, 0)
    return piece
