"""DiT in diffusers' names: `DiTTransformer2DModel`, its scheduler, and the index of the pipeline that loads them.

diffusers keeps the embedders of time and label in every block, and q, k and v apart. Its timestep features have the
frequencies 10000^(-i / 127), DiT's and ours 10000^(-i / 128), and no weights make up for that: the best linear map of
its features to ours, over steps 0 .. 999, leaves a root mean square error of 0.18. So its own loader computes slightly
other outputs, also with the public files of DiT; `at_our_times` corrects a loaded network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from haste.models.layers import sincos_positions
from haste.networks.spec import sit_shapes

CLASS = "DiTTransformer2DModel"
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "variance_type": "learned_range",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INSIDE = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_KINDS = ("weight", "bias")


def to_diffusers(weights: Mapping[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """A DiT's weights under diffusers' names; the positions, which it computes by itself, are left out."""
    found = {f"{b}.{kind}": weights[f"{a}.{kind}"] for a, b in _OUTSIDE.items() for kind in _KINDS}
    for i in range(shape["depth"]):
        block, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        found |= {f"{theirs}.{b}.{kind}": weights[f"{block}.{a}.{kind}"] for a, b in _INSIDE.items() for kind in _KINDS}
        for kind in _KINDS:
            parts = weights[f"{block}.attn.qkv.{kind}"].chunk(3)
            found |= {f"{theirs}.attn1.to_{letter}.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
        found |= {f"{theirs}.norm1.emb.{b}": weights[a] for a, b in _EMBEDDERS.items()}
    return {name: value.clone() for name, value in found.items()}  # a file does not hold a tensor under two names


def from_diffusers(weights: Mapping[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`, with the positions; `weights` has all `names`.

    Raises:
        ValueError: blocks have different embedders, which no DiT has.
    """
    found = {f"{a}.{kind}": weights[f"{b}.{kind}"] for a, b in _OUTSIDE.items() for kind in _KINDS}
    for i in range(shape["depth"]):
        block, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        found |= {f"{block}.{a}.{kind}": weights[f"{theirs}.{b}.{kind}"] for a, b in _INSIDE.items() for kind in _KINDS}
        for kind in _KINDS:
            found[f"{block}.attn.qkv.{kind}"] = torch.cat([weights[f"{theirs}.attn1.to_{x}.{kind}"] for x in "qkv"])
        for name, other in _EMBEDDERS.items():
            own = weights[f"{theirs}.norm1.emb.{other}"]
            if not torch.equal(found.setdefault(name, own), own):
                raise ValueError(f"block {i} has another {other} than block 0, expected one for all")
    side = shape["input_size"] // shape["patch_size"]
    return found | {"pos_embed": sincos_positions(shape["width"], (side, side))[None]}


def names(shape: Mapping[str, Any]) -> set[str]:
    """The weights that are read, by their names."""
    inside = [*_INSIDE.values(), *(f"attn1.to_{letter}" for letter in "qkv")]
    found = {f"{name}.{kind}" for name in _OUTSIDE.values() for kind in _KINDS}
    for i in range(shape["depth"]):
        found |= {f"transformer_blocks.{i}.{name}.{kind}" for name in inside for kind in _KINDS}
        found |= {f"transformer_blocks.{i}.norm1.emb.{name}" for name in _EMBEDDERS.values()}
    return found


def config_of(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a DiT with these arguments (of `haste.models.dit.DiT`).

    Raises:
        ValueError: an MLP ratio that diffusers' class does not have.
    """
    if shape["mlp_ratio"] != 4:
        raise ValueError(f"mlp_ratio is {shape['mlp_ratio']}, and {CLASS} has 4 alone")
    return {
        "_class_name": CLASS,
        "num_attention_heads": shape["heads"],
        "attention_head_dim": shape["width"] // shape["heads"],
        "in_channels": shape["in_channels"],
        "out_channels": 2 * shape["in_channels"],
        "num_layers": shape["depth"],
        "dropout": 0.0,
        "norm_num_groups": 32,
        "attention_bias": True,
        "sample_size": shape["input_size"],
        "patch_size": shape["patch_size"],
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": shape["classes"],
        "upcast_attention": False,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def shape_of(config: Any) -> dict[str, Any]:
    """The arguments of `haste.models.dit.DiT` in a config.json.

    Raises:
        ValueError: not such a network, or one that DiT is not.
    """
    if not isinstance(config, dict):
        raise ValueError(f"a {type(config).__name__}, expected an object")
    older = ("Transformer2DModel", "ada_norm_zero")  # as diffusers called a DiT at first
    if config.get("_class_name") != CLASS and (config.get("_class_name"), config.get("norm_type")) != older:
        raise ValueError(f"its _class_name is {config.get('_class_name')!r}, expected {CLASS} or SD3Transformer2DModel")
    try:
        channels, heads = config["in_channels"], config["num_attention_heads"]
        shape = {
            "depth": config["num_layers"],
            "width": heads * config["attention_head_dim"],
            "heads": heads,
            "patch_size": config["patch_size"],
            "mlp_ratio": 4.0,
            "input_size": config["sample_size"],
            "in_channels": channels,
            "classes": config["num_embeds_ada_norm"],
        }
    except KeyError as missing:
        raise ValueError(f"has no {missing}, which a {CLASS} has") from None
    expected = config_of(shape)
    for key in ("out_channels", "norm_type", "activation_fn", "attention_bias", "norm_elementwise_affine"):
        if config.get(key, expected[key]) != expected[key]:
            raise ValueError(f"{key} is {config[key]!r}, expected {expected[key]!r} of a DiT")
    return shape


def shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of our weights by their names."""
    return sit_shapes({**shape, "channels": shape["in_channels"], "architecture": "dit"}, shape["classes"])


def index(shape: Mapping[str, Any], labels: Sequence[str] | None, vae: bool) -> dict[str, Any]:
    """The model_index.json of the pipeline."""
    names = labels or [str(number) for number in range(shape["classes"])]
    found: dict[str, Any] = {"_class_name": "DiTPipeline", "id2label": dict(enumerate(names))}
    found |= {"scheduler": ["diffusers", "DDPMScheduler"], "transformer": ["diffusers", CLASS]}
    return found | {"vae": ["diffusers", "AutoencoderKL"] if vae else [None, None]}


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Any will do: it is not read."""


def at_our_times(transformer: Any) -> Any:
    """A loaded `DiTTransformer2DModel` with DiT's timestep features in place of diffusers'; returns it."""
    from diffusers.models.embeddings import Timesteps

    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return transformer
