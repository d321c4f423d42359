"""Checkpoints in and out: other projects' weights as a file of ours, and ours as files for other programs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from haste.config import MODELS, SIZES, Model, OtherModel, condition_arguments, facts_in
from haste.files import artefact
from haste.files.provenance import read_header
from haste.models import checkpoints, diffusers_folders
from haste.models.checkpoints import Checkpoint
from haste.networks.hub_files import local
from haste.networks.layouts import KNOWN, expected_in

log = logging.getLogger("haste.exchange")

FORMATS = ("safetensors", "repa", "diffusers")


def open_weights(
    path: Path | str,
    *,
    layout: Literal["ours", "REPA", "SiT", "DiT"] | None = None,
    model: Model | OtherModel | None = None,
    heads: int | None = None,
    input_size: int | None = None,
    expected: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """`haste.models.checkpoints.read_checkpoint`, with the attention heads of the published sizes.

    Args:
        path: the file to read, or the id of one of the hub.
        layout: whose file it is; None detects it from the content.
        model: the expected model; None accepts any size.
        heads: attention heads, for sizes that were not published.
        input_size: side of the latent grid, if the file does not show it.
        expected: instead of these, all known entries of `Checkpoint.shape`.

    Raises:
        ValueError: the file is refused, or is not that model; the message says why.
    """
    told = expected or _expected(model, heads, input_size)
    return checkpoints.read_checkpoint(path, sizes=SIZES.values(), layout=layout, expected=told)


def _expected(
    model: Model | OtherModel | None = None, heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    told = {**(model.model_dump() if model else {"heads": heads}), "input_size": input_size}
    return {name: value for name, value in told.items() if value is not None}


def import_weights(source: Path, out: Path, **options: Any) -> Checkpoint:
    """Read weights of any known layout and write them in ours, without the optimiser.

    Args:
        source: the file to read, an id of the hub's, or diffusers' folder of a DiT or MM-DiT.
        out: the .safetensors file to write.
        options: layout, model, heads and input_size, as for `open_weights`.

    Raises:
        ValueError: the file is refused, or is not that model; or `out` exists already.
        OSError: `out` cannot be written.
    """
    _check_out(source, out, ".safetensors")
    source = local(source)
    if (source.is_dir() and (source / diffusers_folders.CONFIG).is_file()) or (source / "transformer").is_dir():
        if options.pop("layout", None):
            raise ValueError(f"{source}: a folder is read as diffusers', expected no layout")
        found = diffusers_folders.read(source, _expected(**options))
    else:
        found = open_weights(source, **options)
    checkpoints.save_imported(out, found, artefact.provenance(inputs={"source": found.sha256}))
    return found


def export_weights(
    source: Path, out: Path, *, form: str, which: str = "ema", vae: Path | None = None, **options: Any
) -> Checkpoint:
    """Write the weights of a state, or of any importable file, for other programs.

    Args:
        source: a state, a file of any known layout, or the id of one of the hub.
        out: the file to write, for "diffusers" a folder.
        form: "safetensors": one set of weights under bare names; "repa": a .pt with both sets, as REPA reads it;
            "diffusers": of a DiT, the folder that `DiTPipeline` loads; of an MM-DiT, one with the transformer that
            `SD3Transformer2DModel` loads, and its scheduler.
        which: "ema" or "model", unless for REPA.
        vae: for diffusers, a folder of an AutoencoderKL to put into it.
        options: layout, model, heads and input_size, as for `open_weights`.

    Raises:
        ValueError: no such form, the source is refused or has no such weights, or `out` exists already.
        OSError: `out` cannot be written.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    _check_out(source, out, {"safetensors": ".safetensors", "repa": ".pt", "diffusers": ""}[form])
    source = local(source)
    found = _of_state(source) or open_weights(source, **options)
    kind = found.shape.get("architecture", "sit")
    if form == "repa" and kind not in ("sit", "mmdit"):
        raise ValueError(f"{source}: its network is a {kind}, and REPA's programs know SiT and MM-DiT alone")
    if form == "diffusers" and kind not in diffusers_folders.KINDS:
        raise ValueError(f"{source}: not a DiT or MM-DiT; diffusers has none of the other networks of this package")
    if form == "repa":
        checkpoints.save_repa(out, found, _arguments(found))
    elif form == "diffusers":
        diffusers_folders.write(out, found.chosen(which), found.shape, vae)
    else:
        checkpoints.save_bare(out, found, which, artefact.provenance(inputs={"source": found.sha256}))
    return found


def _of_state(source: Path) -> Checkpoint | None:
    """The weights of a state of an architecture that its weights do not show; None for any other file."""
    try:
        recipe = read_header(source)["recipe"]
    except ValueError:
        return None
    return None if recipe["model"].get("architecture", "sit") in KNOWN else weights_by_recipe(source, recipe)


def weights_by_recipe(
    file: Path | str, recipe: Mapping[str, Any], layout: Any = None, classes: bool = True
) -> Checkpoint:
    """Weights of the model that a recipe names, of any number of classes if `classes` is False."""
    expected = expected_in(recipe, condition_arguments(recipe) if classes else {})
    if (name := expected.get("architecture", "sit")) in KNOWN:
        return open_weights(file, layout=layout, expected=expected)
    return checkpoints.read_weights_of(file, name, facts_in(recipe).shapes, expected)


def _check_out(source: Path, out: Path, suffix: str) -> None:
    if suffix and out.suffix != suffix:
        raise ValueError(f"{out}: expected a name that ends in {suffix}")
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it, or give another name for what is made of {source}")


def _arguments(found: Checkpoint) -> dict[str, Any]:
    """The arguments of REPA's training script that describe the weights."""
    said: Mapping[str, Any] = found.facts.get("args") or {}
    name = next((name for name, model in MODELS.items() if model.settings.items() <= found.shape.items()), None)
    widths = [len(head[max(head)]) for head in found.projectors]  # rows of the last layer
    return {
        **said,
        "model": name,
        "num_classes": found.shape.get("classes"),
        "path_type": found.facts.get("path"),
        "prediction": "v",
        "qk_norm": found.shape.get("qk_norm", "none") != "none",
        "projector_embed_dims": ",".join(map(str, widths)),
    }
