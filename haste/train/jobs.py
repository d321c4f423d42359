"""The functions behind the rules that train small networks, for a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from haste.files import locks
from haste.files.store import Store
from haste.files.texts import Texts
from haste.plan.names import Artefact
from haste.plan.plan import Plan
from haste.train import small_networks, text_encoder

MOST_IMAGES, MOST_BYTES = 50_000, 2**31  # the most images, and of their pixels, for a network that trains in minutes


def train_autoencoder(plan: Plan) -> None:
    """Train the small autoencoder.

    Raises:
        ValueError: the configuration uses a pretrained one.
    """
    part, trained = plan.autoencoder, plan.config.autoencoder.trained
    if part is None or trained is None:
        raise ValueError("autoencoder: this configuration uses a pretrained one, there is nothing to train")
    with locks.making(part.folder, done=part.manifest) as todo:
        if todo:
            data = _training_images(plan)
            images = {name: data[name] for name in ("images", "held_out")}
            small_networks.train_autoencoder(**images, **trained.model_dump(), **_about(part))


def train_teacher(plan: Plan, name: str) -> None:
    """Train one of the small teachers.

    Raises:
        ValueError: the configuration trains no teacher of this name.
    """
    part = plan.teachers.get(name)
    if part is None:
        raise ValueError(f"teacher {name!r}: not one that this configuration trains")
    trained = plan.config.teachers[name].trained
    assert trained is not None
    with locks.making(part.folder, done=part.manifest) as todo:
        if todo:
            small_networks.train_teacher(**_training_images(plan), **trained.model_dump(), **_about(part))


def train_detector(plan: Plan, name: str | None) -> None:
    """Train one of the small detectors; without a name, the only one.

    Raises:
        ValueError: the configuration trains no detector of this name; or several, and no name is given.
    """
    mine = {name: detector.part for name, detector in plan.detectors.items() if detector.part}
    name = name or (next(iter(mine)) if len(mine) == 1 else None)
    if name not in mine:
        found = "no name" if name is None else f"{name!r}"
        raise ValueError(f"detector: {found} given, expected one that is trained here: {', '.join(mine) or 'none is'}")
    trained = plan.config.detector[name].trained
    assert trained is not None
    part, turns = mine[name], not plan.config.images.classes
    with locks.making(part.folder, done=part.manifest) as todo:
        if todo:
            small_networks.train_detector(**_training_images(plan), **trained.model_dump(), **_about(part), turns=turns)


def train_text_encoder(plan: Plan) -> None:
    """Train the small text encoder.

    Raises:
        ValueError: the configuration trains none.
    """
    part, trained = plan.text_encoder, plan.config.condition.trained
    if part is None or trained is None:
        raise ValueError("condition.encoder: not one that this configuration trains, there is nothing to train")
    with locks.making(part.folder, done=part.manifest) as todo:
        if todo:
            size = {key: part.recipe[key] for key in ("tokens", "width")}
            text_encoder.train(**_captioned_images(plan), **size, **trained.model_dump(), **_about(part))


def _about(part: Artefact) -> dict[str, Any]:
    return {"out": Path(part.folder), "name": part.name, "key": part.key, "recipe": part.recipe}


def _training_images(plan: Plan) -> dict[str, Any]:
    """Images in memory for the small networks: all of a small set, evenly spaced ones of a large set."""
    store, found = Store.of(plan.images), {}
    for split, images, labels in (("train", "images", "labels"), ("held_out", "held_out", "held_out_labels")):
        rows = _spread(store.range(split), int(np.prod(store.fields["image"][0])))
        found[images], found[labels] = store.read("image", rows), store.read("label", rows)
        if not plan.config.images.classes:  # without labels, use a task that needs none
            found[images], found[labels] = small_networks.quarter_turns(found[images])
    return found


def _captioned_images(plan: Plan) -> dict[str, Any]:
    """The same images with their captions."""
    store, texts, found = Store.of(plan.images), Texts.of(plan.images), dict[str, Any]()
    for split, images, captions in (("train", "images", "captions"), ("held_out", "held_out", "held_out_captions")):
        rows = _spread(store.range(split), int(np.prod(store.fields["image"][0])))
        found[images], found[captions] = store.read("image", rows), [texts.of_image(row) for row in rows]
    return found


def _spread(rows: range, size: int) -> range:
    """Evenly spaced rows, as many as fit; size: bytes of an image."""
    return rows[:: -(-len(rows) // min(MOST_IMAGES, max(1, MOST_BYTES // size))) or 1]
