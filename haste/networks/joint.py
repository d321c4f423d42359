"""An MM-DiT by the names and shapes of its weights, which are those of REPA's and HASTE's checkpoints. No torch.

Shapes: D model width, K head width, p patch size, C channels, W width of a text's states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from haste.networks.sets import Tree
from haste.networks.spec import Facts, mlp_ratio, sit_taps

_HEADS = {(24, 768): 24}  # of the published size, by depth and width
_PATCHES, _TEXT, _MLP = "x_embedder.proj.weight", "context_embedder.weight", "joint_blocks.0.x_block.mlp.fc1.weight"
_NORM = "joint_blocks.0.x_block.attn.ln_q.weight"


def shows(tree: Tree) -> bool:
    """Whether weights have the blocks of an MM-DiT."""
    return any(name.startswith("joint_blocks.") for name in tree)


def size(tree: Tree, facts: Mapping[str, Any], told: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The arguments of `haste.models.mmdit.MMDiT` that its weights show, and its architecture; without input_size.

    Args:
        tree: the weights.
        facts: other contents of the file; a header of ours says the heads.
        told: what is known of it; the heads, where nothing shows them.
        file: for the message.

    Raises:
        ValueError: it is no MM-DiT, or its heads are not known.
    """
    if missing := [name for name in (_PATCHES, _TEXT, _MLP) if name not in tree or tree[name].ndim < 2]:
        raise ValueError(f"{file}: does not hold {', '.join(missing)}, expected the weights of an MM-DiT")
    width, channels, patch = tree[_PATCHES].shape[:3] if tree[_PATCHES].ndim == 4 else (0, 0, 0)
    if not min(width, channels, patch):
        raise ValueError(f"{file}: {_PATCHES} is {tree[_PATCHES].shape}, expected (width, channels, patch, patch)")
    places = {int(match[1]) for name in tree if (match := re.match(r"joint_blocks\.(\d+)\.", name))}
    if places != set(range(len(places))):
        raise ValueError(f"{file}: {len(places)} blocks up to block {max(places)}, expected all from 0 on")
    depth, of_head = len(places), len(tree[_NORM]) if _NORM in tree else 0
    heads = width // of_head if of_head else facts.get("heads") or told.get("heads") or _HEADS.get((depth, width))
    if not heads or width % heads:
        unknown = f"{depth} blocks of width {width} are not the published size, and the weights do not show their heads"
        wrong = f"{heads} heads do not divide its width {width}" if heads else f"{unknown}: give their number"
        raise ValueError(f"{file}: {wrong}")
    found: dict[str, Any] = {
        "architecture": "mmdit",
        "depth": depth,
        "width": width,
        "heads": heads,
        "patch_size": patch,
    }
    found |= {"mlp_ratio": mlp_ratio(len(tree[_MLP]), width), "qk_norm": "rms" if of_head else "none"}
    return found | {"text_width": tree[_TEXT].shape[1], "in_channels": channels}


def facts(size: Mapping[str, Any]) -> Facts:
    """Facts of an MM-DiT without projectors; `size` as for `shapes`, and text_tokens."""
    found, depth, width = shapes(size), size["depth"], size["width"]
    side, words = size["input_size"] // size["patch_size"], size["text_tokens"]
    flops = 4.0 * depth * (side**2 + words) ** 2 * width  # of attention
    for name, shape in found.items():
        once = name.startswith("t_embedder") or "adaLN" in name  # an image, not a token of it
        times = 1 if once else words if "context_" in name else side**2
        flops += 2.0 * times * math.prod(shape) * (len(shape) > 1 and name != "pos_embed")
    parameters = sum(math.prod(shape) for name, shape in found.items() if name != "pos_embed")
    return Facts(sit_taps(depth, width, size["heads"], side), parameters, flops, depth, found)


def shapes(size: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of its weights by their names, without projectors; `size` as from the function `size`, and input_size."""
    width, patch, channels = size["width"], size["patch_size"], size["in_channels"]
    hidden, norm = int(width * size["mlp_ratio"]), (width // size["heads"],)
    linear = {"x_embedder.proj": (width, channels, patch, patch), "context_embedder": (width, size["text_width"])}
    linear |= {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    norms: dict[str, tuple[int, ...]] = {}
    sides = [(i, side) for i in range(size["depth"]) for side in ("context_block", "x_block")]
    for i, side in sides:
        block, last = f"joint_blocks.{i}.{side}", (i, side) == (size["depth"] - 1, "context_block")
        linear[f"{block}.attn.qkv"] = (3 * width, width)
        linear[f"{block}.adaLN_modulation.1"] = ((2 if last else 6) * width, width)
        if not last:
            linear[f"{block}.attn.proj"] = (width, width)
            linear |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        if size["qk_norm"] == "rms":
            norms |= {f"{block}.attn.{name}.weight": norm for name in ("ln_q", "ln_k")}
    linear |= {"final_layer.linear": (patch * patch * channels, width)}
    linear |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    found = {f"{name}.weight": shape for name, shape in linear.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return found | norms | {"pos_embed": (1, (size["input_size"] // patch) ** 2, width)}
