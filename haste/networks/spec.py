"""What is known of a denoising network before it is built: its taps, its size and its cost. No torch."""

from __future__ import annotations

import dataclasses
import math
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
    shapes: of all its weights, by their names in files.
    """

    taps: Mapping[str, Tap]
    parameters: int
    flops: float
    blocks: int = 0
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


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


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which `int(width * ratio)` is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)  # it was rounded down


def sit_taps(depth: int, width: int, heads: int, side: int) -> dict[str, Tap]:
    """The taps of a SiT, DiT or MM-DiT with side x side tokens: all of every block."""
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
    shapes = sit_shapes(size, classes)
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name != "pos_embed")
    weights = depth * (4 * width**2 + 2 * width**2 * size["mlp_ratio"])
    conditioning = depth * 6 * width**2  # once per image, not per token
    tokens = side**2
    flops = 2.0 * (weights * tokens + conditioning) + 4.0 * depth * tokens**2 * width
    return Facts(sit_taps(depth, width, size["heads"], side), parameters, flops, depth, shapes)


def sit_shapes(size: Mapping[str, Any], classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a SiT's or DiT's weights by their names, without projectors; arguments as for `sit_facts`."""
    width, patch, channels = size["width"], size["patch_size"], size["channels"]
    outputs = (2 if size.get("architecture") == "dit" else 1) * channels  # noise and its variance, or the velocity
    hidden, tokens = int(width * size["mlp_ratio"]), (size["input_size"] // patch) ** 2
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for block in (f"blocks.{place}" for place in range(size["depth"])):
        linear |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linear |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        linear |= {f"{block}.adaLN_modulation.1": (6 * width, width)}
    linear |= {"final_layer.linear": (patch * patch * outputs, width)}
    linear |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    weights = {"x_embedder.proj": (width, channels, patch, patch), **linear}
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return shapes | {"y_embedder.embedding_table.weight": (classes + 1, width), "pos_embed": (1, tokens, width)}
