"""Values derived from a configuration: the layers that each term aligns and when it stops, taps and cost of models."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

from haste.align.terms import of_features
from haste.config.parts import (
    KNOWN,
    TRANSFORMERS,
    Model,
    OtherModel,
    Process,
    condition_named,
    known_of,
    model_of,
    process_named,
)
from haste.config.published import ALIGNED_HEADS, MAPPINGS, REPA_DEPTH, alignment_named, model_named, teacher_shape
from haste.config.schema import Config, Evaluate, Trigger
from haste.networks.spec import Facts, Tap, sit_facts, sit_taps


def model_in(recipe: Mapping[str, Any]) -> Model | OtherModel:
    """The model in a trajectory's recipe."""
    return model_of({name: value for name, value in recipe["model"].items() if name not in ("input_size", "channels")})


def model_entry(config: Config, model: Model | OtherModel) -> dict[str, Any]:
    """A model's entries in a recipe, with the size of its latents."""
    return {**model.decided, "input_size": config.latent_size, "channels": config.autoencoder.channels}


def facts_in(recipe: Mapping[str, Any]) -> Facts:
    """Taps, parameters and operations of the model in a trajectory's recipe."""
    if isinstance(model_in(recipe), Model):
        return sit_facts(recipe["model"], recipe["classes"])
    process = {"process": recipe["training"].get("process")}
    kept = {key: recipe[key] for key in ("model", "classes", "condition") if key in recipe}
    return facts_of_other(json.dumps({**kept, "training": process}, sort_keys=True))


@functools.cache  # most are built, though without memory
def facts_of_other(recipe: str) -> Facts:
    """Taps and cost of a network other than SiT and DiT; `recipe` is its deciding part, as JSON."""
    found = json.loads(recipe)
    model, size = model_in(found), found["model"]
    return known_of(model.architecture).facts(
        model.settings,
        process=None if model.architecture in KNOWN else process_in(found),
        condition=condition_in(found),
        input_size=size["input_size"],
        in_channels=size["channels"],
    )


# ---- process and condition

OF_INTERPOLANT = ("path", "timesteps")  # keys of `training`


def process_of(model: Model | OtherModel) -> str:
    """The name of a network's process."""
    if isinstance(model, Model):
        return TRANSFORMERS[model.architecture]
    return known_of(model.architecture).process


def process_in(recipe: Mapping[str, Any]) -> Any:
    """The `haste.diffusion.process.Process` of a trajectory's recipe."""
    training = recipe["training"]
    given = dict(training.get("process") or {key: training[key] for key in OF_INTERPOLANT if key in training})
    kind = process_named(given.pop("name", "interpolant"))
    return kind(**kind.Settings.model_validate(given).model_dump())


def condition_of(model: Model | OtherModel) -> str:
    """The name of a network's condition."""
    return "labels" if isinstance(model, Model) else known_of(model.architecture).condition


def condition_entry(config: Config) -> dict[str, Any]:
    """The condition's entries in a recipe."""
    return {"classes": config.images.classes, **config.condition.entry}


def condition_arguments(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the condition of a trajectory's recipe says of the network: arguments of its constructor."""
    return condition_in(recipe).arguments if "condition" in recipe else {"classes": recipe["classes"]}


def condition_in(recipe: Mapping[str, Any]) -> Any:
    """The `haste.data.condition.Condition` of a trajectory's recipe."""
    given = dict(recipe.get("condition") or {"name": "labels"})
    kind = condition_named(given.pop("name"))
    return kind(classes=recipe["classes"], **kind.Settings.model_validate(given).model_dump())


def training_entry(config: Config, run: str) -> dict[str, Any]:
    """The entries of a run's training in its recipe."""
    training, process = config.training_of(run), process_of(model_named(config, config.runs[run].model))
    return _by_process(process, training.process, training.decided)


def training_elsewhere(config: Config, row: Evaluate) -> dict[str, Any]:
    """The training entries in the recipe of imported weights."""
    return _by_process(process_of(model_named(config, row.model)), config.training.process, {"path": row.path})


def _by_process(name: str, given: Process | None, decided: dict[str, Any]) -> dict[str, Any]:
    """The interpolant's keys or, for another process, its section instead, as far as given."""
    if name == "interpolant":
        return decided
    chosen = given if given is not None and given.name == name else Process(name=name)
    return {key: value for key, value in decided.items() if key not in OF_INTERPOLANT} | {"process": chosen.decided}


def taps_of(config: Config, name: str) -> Mapping[str, Tap]:
    """The taps that a model offers to the alignment losses, by name.

    Raises:
        ValueError: the network cannot be built for these latents.
    """
    model = model_named(config, name)
    if isinstance(model, Model):
        return sit_taps(model.depth, model.width, model.heads, config.latent_size // model.patch_size)
    return _facts_of(config, model).taps


def blocks_of(config: Config, name: str) -> int:
    """Number of a model's distinguishable blocks."""
    model = model_named(config, name)
    if isinstance(model, Model):
        return model.depth
    return _facts_of(config, model).blocks


def _facts_of(config: Config, model: OtherModel) -> Facts:
    training = _by_process(process_of(model), config.training.process, {})
    return facts_in({"model": model_entry(config, model), **condition_entry(config), "training": training})


def heads_of(taps: Mapping[str, Tap], layers: Collection[int]) -> int:
    """The number of heads that all of these layers have."""
    return min(taps[f"attention.{layer}"].heads or 0 for layer in layers)


def falls_from(config: Config, run: str) -> dict[str, int | None]:
    """Term -> the first step at which its stop may have an effect; None if it never stops."""
    found: dict[str, int | None] = {}
    for kind in terms_of(config, run):
        stop, ramp = config.runs[run].stop.of(kind), config.runs[run].ramp.of(kind)
        found[kind] = stop.after if isinstance(stop, Trigger) else None if stop is None else stop - (ramp or 0)
    return found


def triggers_of(config: Config, run: str) -> dict[str, Trigger]:
    """The terms of a run that a trigger stops, with the trigger."""
    stops = {kind: config.runs[run].stop.of(kind) for kind in terms_of(config, run)}
    return {kind: stop for kind, stop in stops.items() if isinstance(stop, Trigger)}


def terms_of(config: Config, run: str) -> dict[str, dict[str, Any]]:
    """The alignment terms of a run with every layer named: {"features": {...}, "attention": {...}}, if used, and
    "features-2", ... of further teachers."""
    return _terms(config, config.runs[run].model, config.runs[run].alignment)


def measured_terms(config: Config, row: str, measure: str) -> dict[str, dict[str, Any]]:
    """The alignment terms that a measure compares with on a row of `runs` or `evaluate`, as in `terms_of`: the
    row's own or, if it has none, those of `measures.NAME.alignment`, or the other way round; none if it needs none."""
    spec, run = config.measures[measure], config.runs.get(row)
    if not (needs := spec.made.needs & {"alignment", "named alignment"}):
        return {}
    own = terms_of(config, row) if run else {}
    if spec.alignment is None or (own and "alignment" in needs):
        return own
    return _terms(config, (run or config.evaluate[row]).model, spec.alignment)


def measured_teacher(config: Config, measure: str) -> str | None:
    """The teacher whose features a measure compares with: the one that it names, or the only one; None if it compares
    with none."""
    made = config.measures[measure].made
    return made.teacher or next(iter(config.teachers)) if "teacher" in made.needs else None


def measured_beside(config: Config, measure: str) -> list[str]:
    """The teachers of which a measure finds the same as of states."""
    return list(getattr(config.measures[measure].made, "beside", []))


def _terms(config: Config, model: str, name: str) -> dict[str, dict[str, Any]]:
    alignment = alignment_named(config, name)
    terms = {}
    for which, given in of_features(alignment.terms).items():
        # REPA alone and HASTE were published with different depths for SiT-B.
        published = REPA_DEPTH if alignment.attention is None else {k: m[0] for k, m in MAPPINGS.items()}
        term = given.model_dump()
        shape = teacher_shape(config.teachers[term["teacher"]])
        last = shape is not None and term["layer"] == shape[0] - 1  # by its number or by default: the same target
        named = {"depth": term["depth"] or published[model], "layer": None if last else term["layer"]}
        terms[which] = {**term, **named}
    if alignment.attention:
        term = alignment.attention.model_dump()
        if term["student_layers"] is None:
            _, term["student_layers"], term["teacher_layers"] = MAPPINGS[model]
        if term["heads"] is None:
            shape = teacher_shape(config.teachers[term["teacher"]])
            heads = heads_of(taps_of(config, model), term["student_layers"])
            term["heads"] = min(ALIGNED_HEADS, heads, shape[1] if shape else ALIGNED_HEADS)
        terms["attention"] = term
    return terms
