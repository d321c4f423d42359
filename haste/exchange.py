"""Checkpoints in and out: other people's weights as a file of ours, and ours as files for other programs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from haste import artefact
from haste.config import MODELS, Model
from haste.models import checkpoints
from haste.models.checkpoints import Checkpoint
from haste.models.denoiser import Denoiser
from haste.plan import Plan
from haste.train import state as states
from haste.train.state import Learner, build_model

log = logging.getLogger("haste.exchange")

FORMATS = ("safetensors", "repa")
SIZES = {(model.depth, model.width, model.heads) for model in MODELS.values()}


def open_weights(path: Path | str, **options: Any) -> Checkpoint:
    """`haste.models.checkpoints.read_checkpoint`, which then knows the heads of published sizes.

    Raises:
        ValueError: the file is refused; the message says why.
    """
    return checkpoints.read_checkpoint(path, sizes=SIZES, **options)


def import_weights(
    source: Path,
    out: Path,
    *,
    layout: Literal["ours", "REPA", "SiT"] | None = None,
    model: Model | None = None,
    heads: int | None = None,
    input_size: int | None = None,
) -> Checkpoint:
    """Read weights of any known layout and write them as ours, without the optimiser.

    Args:
        source: the file to read.
        out: the .safetensors file to write.
        layout: whose file it is; None tells by what is in it.
        model: what the weights must be; None takes any size.
        heads: attention heads, for sizes that were not published.
        input_size: side of the latent grid, where the file does not show it.

    Raises:
        ValueError: the file is refused, or is not that model; or `out` is there already.
        OSError: `out` cannot be written.
    """
    _check_out(source, out, ".safetensors")
    told = model.model_dump() if model else {"heads": heads}
    told = {name: value for name, value in {**told, "input_size": input_size}.items() if value is not None}
    found = open_weights(source, layout=layout, expected=told)
    checkpoints.save_imported(out, found, artefact.provenance(inputs={"source": found.sha256}))
    return found


def export_weights(source: Path, out: Path, *, form: str, which: str = "ema") -> Checkpoint:
    """Write the weights of a state, or of anything that can be imported, for other programs.

    Args:
        source: a state, or a file of any known layout.
        out: the file to write.
        form: "safetensors": one set of weights under bare names; "repa": a .pt with both sets, as REPA reads it.
        which: "ema" or "model", for safetensors.

    Raises:
        ValueError: no such form, the source is refused, has no such weights, or `out` is there already.
        OSError: `out` cannot be written.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    _check_out(source, out, ".safetensors" if form == "safetensors" else ".pt")
    found = _of_state(source) or open_weights(source)
    if form == "repa" and "architecture" in found.shape:
        raise ValueError(
            f"{source}: its network is a {found.shape['architecture']}, and REPA's programs know SiT alone"
        )
    if form == "repa":
        checkpoints.save_repa(out, found, _arguments(found))
    else:
        checkpoints.save_bare(out, found, which, artefact.provenance(inputs={"source": found.sha256}))
    return found


def _of_state(source: Path) -> Checkpoint | None:
    """The weights of a state of another architecture than SiT; None for any other file."""
    try:
        recipe = states.read_header(source)["recipe"]
    except ValueError:
        return None
    return _of_recipe(source, recipe) if "architecture" in recipe["model"] else None


def _of_recipe(file: Path | str, recipe: Mapping[str, Any]) -> Checkpoint:
    """Weights of another architecture than SiT: the recipe says which, the file only holds them."""
    with torch.device("meta"):
        model = build_model(recipe)
    return checkpoints.read_weights_of(file, model, _shape(recipe))


def _shape(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's model as `Checkpoint.shape` has it."""
    size = {("in_channels" if name == "channels" else name): value for name, value in recipe["model"].items()}
    return {**size, "classes": recipe["classes"]}


def model_elsewhere(plan: Plan, trajectory: str) -> Denoiser:
    """The model of a row that was trained elsewhere.

    Raises:
        ValueError: the file is refused, is not the model that the configuration says, or changed since it was named.
    """
    spec, recipe = plan.elsewhere[trajectory], plan.trajectories[trajectory].recipe
    found = _known(plan, spec.checkpoint, recipe, spec.layout)
    said = found.facts.get("path")
    if said not in (None, spec.path):
        raise ValueError(f"{spec.checkpoint}: was trained on the {said} path, but the row says {spec.path}")
    model = build_model(recipe)
    model.load_state_dict(dict(found.chosen(spec.weights)))
    return model.requires_grad_(False).eval()


def warm_start(plan: Plan, trajectory: str, learner: Learner) -> None:
    """Put weights from elsewhere into a learner that begins; its optimiser is new.

    A file with one set of weights gives both the model and its average. A projector is taken where the file has one
    of that shape, else it begins anew.

    Raises:
        ValueError: the file is refused, is not the recipe's model, or changed since it was named.
    """
    recipe = plan.trajectories[trajectory].recipe
    file = next(file for file, identity in plan.identities.items() if identity == recipe["warm_start"])
    found = _known(plan, file, recipe, None)
    sets = dict(found.weights)
    learner.model.load_state_dict(sets.get("model") or sets["ema"])
    learner.ema.load_state_dict(sets.get("ema") or sets["model"])
    if found.facts.get("path") not in (None, recipe["training"]["path"]):
        log.warning("%s was trained on the %s path, going on with another", file, found.facts["path"])
    if "features" not in learner.projectors:
        return
    head = learner.projectors["features"]
    fits = [
        weights
        for weights in found.projectors
        if {name: value.shape for name, value in weights.items()}
        == {name: value.shape for name, value in head.state_dict().items()}
    ]
    if len(fits) == 1:
        head.load_state_dict(dict(fits[0]))
    log.info("%s: the projector %s", file, "is the file's" if len(fits) == 1 else "begins anew")


def _known(plan: Plan, file: str, recipe: Mapping[str, Any], layout: Any) -> Checkpoint:
    """A file that the plan named by its content, checked to be that content and the recipe's model."""
    other = "architecture" in recipe["model"]
    found = _of_recipe(file, recipe) if other else open_weights(file, layout=layout, expected=_shape(recipe))
    if found.sha256 != plan.identity_of(file):
        raise ValueError(
            f"{file}: holds {found.sha256[:12]}, but {plan.identity_of(file)[:12]} when it was named. It changed while "
            "it was in use; start again"
        )
    return found


def _check_out(source: Path, out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise ValueError(f"{out}: expected a name that ends in {suffix}")
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it, or give another name for what is made of {source}")


def _arguments(found: Checkpoint) -> dict[str, Any]:
    """The arguments of REPA's training script that say what the weights are."""
    said: Mapping[str, Any] = found.facts.get("args") or {}
    name = next((name for name, model in MODELS.items() if model.settings.items() <= found.shape.items()), None)
    widths = [len(head[max(head)]) for head in found.projectors]  # rows of the last layer
    return {
        **said,
        "model": name,
        "num_classes": found.shape["classes"],
        "path_type": found.facts.get("path"),
        "prediction": "v",
        "qk_norm": False,
        "projector_embed_dims": ",".join(map(str, widths)),
    }
