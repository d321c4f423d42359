"""What is known of a denoising network before it is built: its taps, its size and its cost. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tap:
    """Activations that a network returns when they are requested by name.

    grid: rows and columns of its tokens; N is their product.
    width: width of a token, D.
    heads: of attention, whose queries and keys are (B, heads, N, width / heads); None for hidden tokens, (B, N, width).
    """

    grid: tuple[int, int]
    width: int
    heads: int | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What follows from a network's settings.

    taps: by name; "tokens.m" are hidden tokens after block m, counted from 1, "attention.i" is attention of block i,
        counted from 0.
    parameters: trainable parameters.
    flops: floating-point operations of one image's forward pass, two per multiplication.
    blocks: number of blocks with parameters of their own; block m is the one before "tokens.m".
    """

    taps: Mapping[str, Tap]
    parameters: int
    flops: float
    blocks: int = 0


def each(change: Callable[..., Any], told: Any, *more: Any) -> Any:
    """What a network is told, one array or tensor or a mapping of such, changed piece by piece.

    Args:
        change: of a piece, and the same piece of each of `more`.
        told: what is changed.
        more: of the same form.
    """
    if not isinstance(told, Mapping):
        return change(told, *more)
    return {name: change(piece, *(other[name] for other in more)) for name, piece in told.items()}


def blocks(taps: Mapping[str, Tap], kind: str) -> list[int]:
    """The numbers m of the taps `kind`.m, increasing."""
    split = (name.rpartition(".") for name in taps)
    return sorted(int(number) for what, _, number in split if what == kind)


def sit_taps(depth: int, width: int, heads: int, side: int) -> dict[str, Tap]:
    """The taps of a SiT with side x side tokens: all of every block."""
    grid = (side, side)
    tokens = {f"tokens.{block}": Tap(grid, width) for block in range(1, depth + 1)}
    return tokens | {f"attention.{block}": Tap(grid, width, heads) for block in range(depth)}


def sit_facts(size: Mapping[str, Any], classes: int) -> Facts:
    """Facts of a SiT or DiT without projectors, by formulas: nothing is built.

    Args:
        size: depth, width, heads, patch_size, mlp_ratio, input_size and channels of the latents; architecture, if it
            is not a SiT.
        classes: labels that it knows, the null class excluded.
    """
    depth, width, side = size["depth"], size["width"], size["input_size"] // size["patch_size"]
    hidden, patch = int(width * size["mlp_ratio"]), size["patch_size"] ** 2 * size["channels"]
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * hidden + hidden + width
    modulation = width + 1
    block = attention + mlp + 6 * width * modulation
    embeddings = patch * width + width + 256 * width + width + width * width + width + (classes + 1) * width
    outputs = (2 if size.get("architecture") == "dit" else 1) * patch  # noise and variance, or the velocity
    final = 2 * width * modulation + width * outputs + outputs
    weights = depth * (4 * width**2 + 2 * width**2 * size["mlp_ratio"])
    conditioning = depth * 6 * width**2  # once per image, not per token
    tokens = side**2
    flops = 2.0 * (weights * tokens + conditioning) + 4.0 * depth * tokens**2 * width
    return Facts(sit_taps(depth, width, size["heads"], side), depth * block + embeddings + final, flops, depth)
