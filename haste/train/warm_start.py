"""Weights from other sources: the weights that training begins from, and rows that were trained elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from haste.models.build import build_model
from haste.models.checkpoints import Checkpoint
from haste.models.denoiser import Denoiser
from haste.models.exchange import weights_by_recipe
from haste.networks.layouts import LABELS, check_trained, trained_otherwise
from haste.plan.plan import Plan
from haste.train.state import Learner

log = logging.getLogger("haste.exchange")


def model_elsewhere(plan: Plan, trajectory: str, weights: str) -> Denoiser:
    """The model of a row that was trained elsewhere, with one set of weights, `ema` or `model`.

    Raises:
        ValueError: as `checkpoint_elsewhere`, or it does not have these weights.
    """
    model = build_model(plan.trajectories[trajectory].recipe)
    found = checkpoint_elsewhere(plan, trajectory)
    model.load_state_dict(dict(found.chosen(weights)))
    return model.requires_grad_(False).eval()


def checkpoint_elsewhere(plan: Plan, trajectory: str) -> Checkpoint:
    """The file of a row that was trained elsewhere.

    Raises:
        ValueError: the file is refused, is not the configuration's model, or has changed since it was named.
    """
    spec, recipe = plan.elsewhere[trajectory], plan.trajectories[trajectory].recipe
    found = _known(plan, spec.checkpoint, recipe, spec.layout)
    check_trained(spec.checkpoint, found.facts, recipe["training"])
    return found


def projector_in(heads: Iterable[Mapping[str, Tensor]], like: nn.Module) -> Mapping[str, Tensor] | None:
    """The projection head in a file that has a projector's shape; None if there is none or more than one."""
    shapes = {name: value.shape for name, value in like.state_dict().items()}
    fits = [head for head in heads if {name: value.shape for name, value in head.items()} == shapes]
    return fits[0] if len(fits) == 1 else None


def warm_start(plan: Plan, trajectory: str, learner: Learner) -> None:
    """Load weights from a file into a new learner; its optimiser starts empty.

    A file with one set of weights provides both the model and its average. A projector is loaded if the file has one
    of that shape, else it keeps its initial weights; so does the table of classes, if the recipe asks for a new one.

    Raises:
        ValueError: the file is refused, is not the recipe's model, or has changed since it was named.
    """
    recipe = plan.trajectories[trajectory].recipe
    start = recipe["warm_start"]
    kept = isinstance(start, str)
    file = next(file for file, identity in plan.identities.items() if identity == (start if kept else start["file"]))
    found = _known(plan, file, recipe, None, classes=kept)
    own = {} if kept else {LABELS: learner.model.state_dict()[LABELS].clone()}
    sets = {which: {**tree, **own} for which, tree in found.weights.items()}
    learner.model.load_state_dict(sets.get("model") or sets["ema"])
    learner.ema.load_state_dict(sets.get("ema") or sets["model"])
    if said := trained_otherwise(found.facts, recipe["training"]):
        log.warning("%s was trained %s, going on with another", file, said[0])
    if "features" not in learner.projectors:
        return
    head = learner.projectors["features"]
    if (fits := projector_in(found.projectors, head)) is not None:
        head.load_state_dict(dict(fits))
    log.info("%s: the projector %s", file, "begins anew" if fits is None else "is the file's")


def _known(plan: Plan, file: str, recipe: Mapping[str, Any], layout: Any, classes: bool = True) -> Checkpoint:
    """A file that the plan identified by its content, after checking that content and the model."""
    found = weights_by_recipe(file, recipe, layout, classes)
    if found.sha256 != plan.identities[file]:
        raise ValueError(
            f"{file}: holds {found.sha256[:12]}, but {plan.identities[file][:12]} when it was named. It changed while "
            "it was in use; start again"
        )
    return found
