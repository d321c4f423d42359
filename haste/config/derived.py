"""What follows from a configuration: the layers that each term aligns and when it stops, taps and cost of models."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

from haste.config.parts import Model, OtherModel, architecture_named, model_of
from haste.config.published import ALIGNED_HEADS, MAPPINGS, REPA_DEPTH, alignment_named, model_named, teacher_shape
from haste.config.schema import Config, Trigger
from haste.networks.spec import Facts, Tap, sit_facts, sit_taps


def model_in(recipe: Mapping[str, Any]) -> Model | OtherModel:
    """The model that a trajectory's recipe names."""
    return model_of({name: value for name, value in recipe["model"].items() if name not in ("input_size", "channels")})


def facts_in(recipe: Mapping[str, Any]) -> Facts:
    """Taps, parameters and operations of the model that a trajectory's recipe names."""
    model, size = model_in(recipe), recipe["model"]
    if isinstance(model, Model):
        return sit_facts(size, recipe["classes"])
    return facts_of_other(
        model.architecture, json.dumps(model.settings), size["input_size"], size["channels"], recipe["classes"]
    )


@functools.cache  # it is built, if without memory
def facts_of_other(architecture: str, settings: str, size: int, channels: int, classes: int) -> Facts:
    """Of a network that is no SiT, with its settings as JSON."""
    shape = {"input_size": size, "in_channels": channels, "classes": classes}
    return architecture_named(architecture).facts(json.loads(settings), **shape)


def taps_of(config: Config, name: str) -> Mapping[str, Tap]:
    """What a model lets the alignment losses see, by name.

    Raises:
        ValueError: the network cannot be built for these latents.
    """
    model = model_named(config, name)
    if isinstance(model, Model):
        return sit_taps(model.depth, model.width, model.heads, config.latent_size // model.patch_size)
    return _facts_of(config, model).taps


def blocks_of(config: Config, name: str) -> int:
    """Blocks of a model that can be told apart."""
    model = model_named(config, name)
    if isinstance(model, Model):
        return model.depth
    return _facts_of(config, model).blocks


def _facts_of(config: Config, model: OtherModel) -> Facts:
    latents = (config.latent_size, config.autoencoder.channels, config.images.classes)
    return facts_of_other(model.architecture, json.dumps(model.settings), *latents)


def heads_of(taps: Mapping[str, Tap], layers: Collection[int]) -> int:
    """Heads that all of these layers have."""
    return min(taps[f"attention.{layer}"].heads or 0 for layer in layers)


def falls_from(config: Config, run: str) -> dict[str, int | None]:
    """Term -> the first step at which it may not be what it would be if it never stopped; None if it never stops."""
    found: dict[str, int | None] = {}
    for kind in terms_of(config, run):
        stop, ramp = getattr(config.runs[run].stop, kind), getattr(config.runs[run].ramp, kind)
        found[kind] = stop.after if isinstance(stop, Trigger) else None if stop is None else stop - (ramp or 0)
    return found


def triggers_of(config: Config, run: str) -> dict[str, Trigger]:
    """The terms of a run that a trigger stops, with that."""
    stops = {kind: getattr(config.runs[run].stop, kind) for kind in terms_of(config, run)}
    return {kind: stop for kind, stop in stops.items() if isinstance(stop, Trigger)}


def terms_of(config: Config, run: str) -> dict[str, dict[str, Any]]:
    """The alignment terms of a run with every layer named: {"features": {...}, "attention": {...}}, if used."""
    return _terms(config, config.runs[run].model, config.runs[run].alignment)


def measured_terms(config: Config, row: str, measure: str) -> dict[str, dict[str, Any]]:
    """The alignment terms that a measure compares with on a row of `runs` or `evaluate`, as `terms_of` gives them: the
    row's own or, where it has none, those of `measures.NAME.alignment`; none where the measure asks for none."""
    spec, run = config.measures[measure], config.runs.get(row)
    if "alignment" not in spec.made.needs:
        return {}
    own = terms_of(config, row) if run else {}
    if own or spec.alignment is None:
        return own
    return _terms(config, (run or config.evaluate[row]).model, spec.alignment)


def _terms(config: Config, model: str, name: str) -> dict[str, dict[str, Any]]:
    alignment = alignment_named(config, name)
    terms = {}
    if alignment.features:
        # REPA alone and HASTE were published with different depths for SiT-B.
        published = REPA_DEPTH if alignment.attention is None else {k: m[0] for k, m in MAPPINGS.items()}
        term = alignment.features.model_dump()
        terms["features"] = {**term, "depth": term["depth"] or published[model]}
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
