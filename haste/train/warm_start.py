"""Weights from other sources: the weights that training begins from, and rows that were trained elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
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


def projectors_in(heads: Mapping[str, Mapping[str, Tensor]], like: nn.ModuleDict) -> dict[str, Mapping[str, Tensor]]:
    """The projection heads of a file for a learner's projectors, by term, as far as there are such.

    heads: by term or, in files that do not say it, by number. There they are taken in order if as many as expected have
    the expected shapes in that order, otherwise where a single one has the shape of a single projector.
    """
    wanted = {term: _shapes(projector.state_dict()) for term, projector in like.items()}
    if not all(name.isdigit() for name in heads):
        return {term: heads[term] for term in wanted if term in heads and _shapes(heads[term]) == wanted[term]}
    if [_shapes(head) for head in heads.values()] == list(wanted.values()):
        return dict(zip(wanted, heads.values(), strict=True))
    fits = {term: [name for name in heads if _shapes(heads[name]) == shapes] for term, shapes in wanted.items()}
    claimed = [name for found in fits.values() for name in found]
    return {term: heads[found[0]] for term, found in fits.items() if len(found) == 1 == claimed.count(found[0])}


def numbered(heads: Iterable[Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Heads of a file that does not say of which term they are."""
    return {str(place): head for place, head in enumerate(heads)}


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


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
    fits = projectors_in(numbered(found.projectors), learner.projectors)
    for term, projector in learner.projectors.items():
        if term in fits:
            projector.load_state_dict(dict(fits[term]))
        log.info("%s: the projector of %s %s", file, term, "is the file's" if term in fits else "begins anew")


def _known(plan: Plan, file: str, recipe: Mapping[str, Any], layout: Any, classes: bool = True) -> Checkpoint:
    """A file that the plan identified by its content, after checking that content and the model."""
    found = weights_by_recipe(plan.data.outside.files[file], recipe, layout, classes)
    if found.sha256 != plan.identities[file]:
        raise ValueError(
            f"{file}: holds {found.sha256[:12]}, but {plan.identities[file][:12]} when it was named. It changed while "
            "it was in use; start again"
        )
    return found
