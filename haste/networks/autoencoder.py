"""An autoencoder in diffusers' layout before it is loaded: folder, configuration, headers of its weights. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste.networks import headers, layouts

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
# Names of attention that the public weights of Stable Diffusion still have.
_NEWER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLDER = re.compile(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
_INSIDE = "vae"  # its folder in a pipeline's
CONFIGS = (CONFIG, f"{_INSIDE}/{CONFIG}")
#: What is downloaded of a hub's repository: no pickles, so nothing that could run code.
PATTERNS = [
    f"{inside}{name}"
    for inside in ("", f"{_INSIDE}/")
    for name in (CONFIG, f"{WEIGHTS}*.safetensors", f"{WEIGHTS}.safetensors.index*.json")
]
HINT = f"Give a folder with {CONFIG} and {WEIGHTS}.safetensors, or load it once where there is internet (it is kept)"


@dataclass(frozen=True)
class Found:
    """An autoencoder's folder; its configuration; the files of its weights; their variant, such as "fp16", or None."""

    folder: Path
    config: Mapping[str, Any]
    files: list[Path]
    variant: str | None

    @property
    def channels(self) -> int:
        """C, latent channels."""
        return int(self.config.get("latent_channels", 4))  # diffusers' default

    @property
    def factor(self) -> int:
        """f, pixels per latent cell along one side."""
        return 2 ** (len(self.config.get("block_out_channels", [64])) - 1)


def folder_named(where: str | Path) -> Path | None:
    """The folder that a configuration names; None for a hub id.

    Raises:
        ValueError: a file, or a path at which there is nothing.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"autoencoder {where}: found {_bare(folder)}. {HINT}.")
    if folder.is_absolute() or str(where).startswith((".", "~")) or str(where).count("/") > 1:
        raise headers.MissingError(f"autoencoder {where}: no such folder. {HINT}.")
    return None


def opened(folder: Path) -> Found:
    """What a folder holds: an AutoencoderKL, or a whole pipeline with one in `vae`.

    Raises:
        ValueError: it holds none, or one whose weights are missing, pickled, truncated or of another size; the message
            names what lies there.
    """
    if not (folder / CONFIG).is_file() and (folder / _INSIDE / CONFIG).is_file():
        folder /= _INSIDE
    config = _checked_config(folder)
    files, variant = _weight_files(folder)
    found = Found(folder, config, files, variant)
    held: dict[str, Any] = {}
    for file in files:
        held |= headers.contents(file, "the weights of an autoencoder")[0]
    if (expected := shapes(config)) is not None:
        renamed = {_OLDER.sub(lambda match: _NEWER[match[0]], name): value for name, value in held.items()}
        layouts.check_fit(str(files[0]), f"the AutoencoderKL of its {CONFIG}", renamed, expected)
    return found


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of an AutoencoderKL's weights by their names; None for one with other blocks than the usual ones."""
    widths, c = config.get("block_out_channels", [64]), config.get("latent_channels", 4)
    blocks = [*config.get("down_block_types", []), *config.get("up_block_types", [])]
    if not {"DownEncoderBlock2D", "UpDecoderBlock2D"}.issuperset(blocks):
        return None
    first, last, layers = widths[0], widths[-1], config.get("layers_per_block", 1)
    attention = config.get("mid_block_add_attention", True)
    layer: dict[str, tuple[int, ...]] = {}
    for half, block, order, more in (("encoder", "down", widths, 0), ("decoder", "up", widths[::-1], 1)):
        for i, (before, after) in enumerate(zip([order[0], *order], order, strict=False)):
            at = f"{half}.{block}_blocks.{i}"
            for j in range(layers + more):
                layer |= _resnet(f"{at}.resnets.{j}", after if j else before, after)
            if i < len(order) - 1:
                layer[f"{at}.{block}samplers.0.conv"] = (after, after, 3, 3)
        for j in range(2):
            layer |= _resnet(f"{half}.mid_block.resnets.{j}", last, last)
        for name in ("to_q", "to_k", "to_v", "to_out.0") if attention else ():
            layer[f"{half}.mid_block.attentions.0.{name}"] = (last, last)
        if attention:
            layer[f"{half}.mid_block.attentions.0.group_norm"] = (last,)
        layer[f"{half}.conv_norm_out"] = (order[-1],)
    layer |= {"encoder.conv_in": (first, 3, 3, 3), "encoder.conv_out": (2 * c, last, 3, 3)}
    layer |= {"decoder.conv_in": (last, c, 3, 3), "decoder.conv_out": (3, first, 3, 3)}
    layer |= {"quant_conv": (2 * c, 2 * c, 1, 1)} if config.get("use_quant_conv", True) else {}
    layer |= {"post_quant_conv": (c, c, 1, 1)} if config.get("use_post_quant_conv", True) else {}
    biases = {f"{name}.bias": shape[:1] for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in layer.items()} | biases


def _resnet(at: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{at}.norm1": (before,), f"{at}.conv1": (after, before, 3, 3)}
    found |= {f"{at}.norm2": (after,), f"{at}.conv2": (after, after, 3, 3)}
    return found if before == after else {**found, f"{at}.conv_shortcut": (after, before, 1, 1)}


def check_size(channels: int, factor: int, expected: Any) -> None:
    """Refuse an autoencoder whose channels or factor differ from the configuration's section.

    Raises:
        ValueError: names both.
    """
    if (channels, factor) != (expected.channels, expected.factor):
        raise ValueError(
            f"autoencoder: has {channels} channels and factor {factor}, "
            f"the configuration says {expected.channels} and {expected.factor}"
        )


def has_weights(folder: Path) -> bool:
    """Whether a folder of the hub's cache is complete enough to be opened."""
    return any(_variants(one) for one in (folder, folder / _INSIDE))


def _variants(folder: Path) -> dict[str | None, Path]:
    """The weights that a folder offers, whole or as the index of their parts, by their variant."""
    pattern = re.compile(
        rf"{WEIGHTS}(?:\.(?P<a>\w+))?\.safetensors|{WEIGHTS}\.safetensors\.index(?:\.(?P<b>\w+))?\.json"
    )
    names = sorted(path.name for path in folder.glob(f"{WEIGHTS}*"))
    matches = [match for name in reversed(names) if (match := pattern.fullmatch(name))]  # a whole file before an index
    return {match["a"] or match["b"]: folder / match[0] for match in matches}


def _weight_files(folder: Path) -> tuple[list[Path], str | None]:
    found = _variants(folder)
    if not found:
        raise ValueError(f"{folder}: found no {WEIGHTS}.safetensors{_instead(folder)}")
    variant = next(one for one in (None, "fp16", *found) if one in found)
    if found[variant].suffix != ".json":
        return [found[variant]], variant
    try:
        parts = json.loads(found[variant].read_text())["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(parts))], variant
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{found[variant]}: expected an index of weights, found {type(error).__name__}") from error


def _instead(folder: Path) -> str:
    """What lies in a folder without the expected weights, and what to do with it."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".msgpack", ".onnx"):
            return f", but {_bare(path)}"
    return "; pickled weights (.bin, .pt) are not loaded, because they can run code"


def _bare(path: Path) -> str:
    """A file that is given for an autoencoder, in words."""
    if path.suffix == ".safetensors":
        what = f"{path.name}: one bare file, which does not say its architecture"
        todo = (
            f"AutoencoderKL.from_single_file('{path.name}').save_pretrained(FOLDER) of diffusers makes a folder of it"
        )
    elif path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        what = f"{path.name}: pickled weights, which are not loaded, because they can run code"
        todo = "save_pretrained(FOLDER) of diffusers writes them as .safetensors, where you trust their origin"
    else:
        what, todo = f"{path.name}, a file", "a folder is expected"
    return f"{what}; {todo}"


def _checked_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        found = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected an AutoencoderKL configuration, found {type(error).__name__}"
            f"{_instead(folder) if isinstance(error, FileNotFoundError) and not has_weights(folder) else ''}"
        ) from error
    if found != "AutoencoderKL":
        raise ValueError(f"{path}: _class_name is {found!r}, expected 'AutoencoderKL'")
    if config.get("latents_mean") or config.get("latents_std"):
        raise ValueError(f"{path}: latents_mean and latents_std are set, expected one scaling_factor and shift_factor")
    expected = {"latent_channels": int, "block_out_channels": list, "scaling_factor": int | float}
    expected |= {"shift_factor": int | float} if config.get("shift_factor") is not None else {}
    for name, kind in expected.items():
        if name in config and not isinstance(config[name], kind):  # a missing key has diffusers' default
            raise ValueError(f"{path}: {name} is {config[name]!r}, expected {getattr(kind, '__name__', kind)}")
    return config
