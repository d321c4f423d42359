"""MM-DiT in diffusers' names: `SD3Transformer2DModel`, and the scheduler that gives it our times.

The two compute the same, with these differences of form. diffusers keeps q, k and v apart. It modulates the last norms
by [scale, shift], ours by [shift, scale]. It adds a projection of pooled text to the embedded time: exported, its
weights are zero; imported, that of a pooled text of zeros goes into the bias of our timestep MLP. Its positions may be
of a larger grid, of which it uses the middle.

Its timestep features are ours, so its `timestep` is t in [0, 1]. Stable Diffusion 3 gives it 1000 t, which makes
another function of the time: a network trained with that is not an MM-DiT as of REPA and HASTE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from haste.networks import joint

CLASS = "SD3Transformer2DModel"
SCHEDULER: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1, "shift": 1.0}
POOLED = 2048  # width of the pooled text in Stable Diffusion 3's pipelines
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_ADALN, _BIAS, _TEXT = "adaLN_modulation.1", "t_embedder.mlp.2.bias", "time_text_embed.text_embedder"
_POOLED = [f"{_TEXT}.{name}" for name in ("linear_1.bias", "linear_2.weight", "linear_2.bias")]
_KINDS = ("weight", "bias")
# Of our side of a block: its suffix in their names, and the names of its attention.
_SIDES = {
    "x_block": ("", ("to_q", "to_k", "to_v"), "to_out.0", "norm_"),
    "context_block": ("_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_"),
}


def _layers(shape: Mapping[str, Any]) -> Iterator[tuple[str, list[str], bool]]:
    """Each layer with weight and bias: our name, theirs, and whether the halves of its outputs change places."""
    yield from ((ours, [theirs], False) for ours, theirs in _OUTSIDE.items())
    yield f"final_layer.{_ADALN}", ["norm_out.linear"], True
    for i in range(shape["depth"]):
        for side, (suffix, qkv, proj, _) in _SIDES.items():
            ours, theirs = f"joint_blocks.{i}.{side}", f"transformer_blocks.{i}"
            last = side == "context_block" and i == shape["depth"] - 1
            yield f"{ours}.attn.qkv", [f"{theirs}.attn.{name}" for name in qkv], False
            yield f"{ours}.{_ADALN}", [f"{theirs}.norm1{suffix}.linear"], last
            if not last:
                yield f"{ours}.attn.proj", [f"{theirs}.attn.{proj}"], False
                yield f"{ours}.mlp.fc1", [f"{theirs}.ff{suffix}.net.0.proj"], False
                yield f"{ours}.mlp.fc2", [f"{theirs}.ff{suffix}.net.2"], False


def _norms(shape: Mapping[str, Any]) -> dict[str, str]:
    """Our name of each norm of queries and keys, and theirs."""
    if shape["qk_norm"] != "rms":
        return {}
    return {
        f"joint_blocks.{i}.{side}.attn.ln_{letter}.weight": f"transformer_blocks.{i}.attn.{theirs}{letter}.weight"
        for i in range(shape["depth"])
        for side, (_, _, _, theirs) in _SIDES.items()
        for letter in "qk"
    }


def _turned(value: Tensor, swap: bool) -> Tensor:
    return torch.cat(value.chunk(2)[::-1]) if swap else value


def to_diffusers(weights: Mapping[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """An MM-DiT's weights under diffusers' names."""
    found = {"pos_embed.pos_embed": weights["pos_embed"]}
    for kind in _KINDS:
        for ours, theirs, swap in _layers(shape):
            parts = _turned(weights[f"{ours}.{kind}"], swap).chunk(len(theirs))
            found |= {f"{name}.{kind}": part for name, part in zip(theirs, parts, strict=True)}
    found |= {theirs: weights[ours] for ours, theirs in _norms(shape).items()}
    width = shape["width"]
    for place, size in ((1, (width, POOLED)), (2, (width, width))):
        found |= {
            f"{_TEXT}.linear_{place}.{kind}": torch.zeros(size[: 2 - n]) for n, kind in enumerate(("weight", "bias"))
        }
    return {name: value.clone() for name, value in found.items()}  # a file does not hold parts of one tensor


def from_diffusers(weights: Mapping[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; a network with pooled text is told one of zeros. `weights` has all `names`."""
    found = {
        f"{ours}.{kind}": _turned(torch.cat([weights[f"{name}.{kind}"] for name in theirs]), swap)
        for ours, theirs, swap in _layers(shape)
        for kind in _KINDS
    }
    found |= {ours: weights[theirs] for ours, theirs in _norms(shape).items()}
    first, last, bias = (weights[name].double() for name in _POOLED)
    constant = last @ silu(first) + bias  # of a pooled text of zeros
    own = found[_BIAS]
    found[_BIAS] = (own.double() + constant).to(torch.promote_types(own.dtype, torch.float32))
    return found | {"pos_embed": _middle(weights["pos_embed.pos_embed"], shape["input_size"] // shape["patch_size"])}


def names(shape: Mapping[str, Any]) -> set[str]:
    """The weights that are read, by their names."""
    found = {f"{name}.{kind}" for _, theirs, _ in _layers(shape) for name in theirs for kind in _KINDS}
    return {*found, *_norms(shape).values(), *_POOLED, "pos_embed.pos_embed"}


def _middle(positions: Tensor, side: int) -> Tensor:
    """The positions of the side x side tokens in the middle, (1, side^2, D), of those of a larger grid."""
    whole = math.isqrt(positions.shape[1])
    if side > whole or whole**2 != positions.shape[1]:
        raise ValueError(f"has positions for {positions.shape[1]} tokens, expected a grid of {side} x {side} or more")
    low = (whole - side) // 2
    return positions.unflatten(1, (whole, whole))[:, low : low + side, low : low + side].flatten(1, 2)


def config_of(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of an MM-DiT with these arguments (of `haste.models.mmdit.MMDiT`).

    Raises:
        ValueError: an MLP ratio that diffusers' class does not have.
    """
    if shape["mlp_ratio"] != 4:
        raise ValueError(f"mlp_ratio is {shape['mlp_ratio']}, and {CLASS} has 4 alone")
    return {
        "_class_name": CLASS,
        "sample_size": shape["input_size"],
        "patch_size": shape["patch_size"],
        "in_channels": shape["in_channels"],
        "num_layers": shape["depth"],
        "attention_head_dim": shape["width"] // shape["heads"],
        "num_attention_heads": shape["heads"],
        "joint_attention_dim": shape["text_width"],
        "caption_projection_dim": shape["width"],
        "pooled_projection_dim": POOLED,
        "out_channels": shape["in_channels"],
        "pos_embed_max_size": shape["input_size"] // shape["patch_size"],
        "dual_attention_layers": [],
        "qk_norm": "rms_norm" if shape["qk_norm"] == "rms" else None,
    }


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `haste.models.mmdit.MMDiT` in a config.json.

    Raises:
        ValueError: a network that an MM-DiT is not.
    """
    try:
        heads, norm = config["num_attention_heads"], config.get("qk_norm")
        shape = {
            "depth": config["num_layers"],
            "width": heads * config["attention_head_dim"],
            "heads": heads,
            "patch_size": config["patch_size"],
            "mlp_ratio": 4.0,
            "qk_norm": {None: "none", "rms_norm": "rms"}.get(norm),
            "text_width": config["joint_attention_dim"],
            "input_size": config["sample_size"],
            "in_channels": config["in_channels"],
        }
    except KeyError as missing:
        raise ValueError(f"has no {missing}, which a {CLASS} has") from None
    if shape["qk_norm"] is None:
        raise ValueError(f"qk_norm is {norm!r}, expected null or 'rms_norm' of an MM-DiT")
    expected = config_of(shape)
    for key in ("out_channels", "dual_attention_layers", "caption_projection_dim"):
        if (found := config.get(key, expected[key])) != expected[key]:
            raise ValueError(f"{key} is {found!r}, expected {expected[key]!r} of an MM-DiT")
    return shape


def shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of our weights by their names."""
    return joint.shapes(shape)


def index(shape: Mapping[str, Any], labels: Any, vae: bool) -> None:
    """No pipeline's: Stable Diffusion 3's has encoders of text that an MM-DiT as of REPA and HASTE does not."""


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Refuse a network that was trained with other times than t in [0, 1]; raises ValueError."""
    if (found := config.get("num_train_timesteps", 1000)) != 1:
        raise ValueError(
            f"num_train_timesteps is {found}: its network is given times up to {found}, an MM-DiT t in [0, 1]; "
            "expected num_train_timesteps 1, as in folders that haste exports"
        )
