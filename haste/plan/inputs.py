"""What a configuration names outside itself, and the function that looks at each before the first job. No torch.

Only names and headers are read. Of what is finished nothing is looked at: it needs its sources no more.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from haste import extensions
from haste.config import EVALUATION, Config, condition_arguments, facts_in, layer_faults
from haste.files import artefact, units
from haste.networks import autoencoder, layouts, weights
from haste.networks import text as public_text
from haste.networks.headers import MissingError
from haste.networks.registry import DETECTORS, TEACHERS
from haste.plan.data import Data
from haste.plan.evaluations import Evaluations
from haste.plan.jobs import TRAINING, Jobs
from haste.plan.measures import Measurement, Measures
from haste.plan.names import Detector, Evaluation, Segment
from haste.plan.runs import Runs
from haste.plan.targets import Targets


@dataclasses.dataclass
class Parts:
    """What a plan is made of, and what is still to be made of it (looked up once)."""

    config: Config
    data: Data
    targets: Targets
    runs: Runs
    evaluations: Evaluations
    measures: Measures
    jobs: Jobs

    @functools.cached_property
    def trained(self) -> list[Segment]:
        """The training jobs that are still to run."""
        return [self.runs.segment(job.about) for rule in TRAINING for job in self.jobs.left.get(rule, [])]

    @functools.cached_property
    def drawn(self) -> list[Evaluation]:
        """The samples that are still to be drawn."""
        return list({one.name: one for one in self.jobs.to_draw}.values())

    @functools.cached_property
    def measured(self) -> list[Measurement]:
        """The measurements that are still to be taken."""
        return [job.about for job in self.jobs.left.get("measure", [])]


def _exist(files: list[str]) -> bool:
    return all(Path(file).exists() for file in files)


def images(parts: Parts) -> None:
    """Refuse pictures that cannot be counted, are too few, have other classes, or have changed since the first were
    prepared."""
    _check_batches(parts)
    if not parts.measured and not {"images_check", "images", "images_join"} & parts.jobs.left.keys():
        return
    there = {"train": parts.data.image_count - parts.config.images.holdout}
    parts.data.check_source()
    if any(EVALUATION in one.splits for one in parts.measured):
        there[EVALUATION] = _evaluation(parts.data)
    for one in parts.measured:
        for split, (key, least) in parts.config.measures[one.label].made.least.items():
            if least > (count := there.get(split, least)):
                whose = "training" if split == "train" else split
                raise ValueError(f"measures.{one.label}.{key}: {least:,}, but there are {count:,} {whose} images")


def _check_batches(parts: Parts) -> None:
    if (count := parts.data.count) is None:
        return
    count -= parts.config.images.holdout
    states = [one.state for one in parts.trained] + [one.state for one in parts.measured]
    for name in dict.fromkeys(state.trajectory for state in states):
        batch = parts.runs.trajectories[name].recipe["training"]["batch"]
        if batch > count:
            raise ValueError(
                f"training.batch: {batch:,}, but {parts.data.where} has {count:,} images to train on; expected no more "
                "than these. Take a smaller batch, or more images"
            )


def _evaluation(data: Data) -> int:
    """The number of images that only measures see; refuses those that cannot be used, as of other classes."""
    others, ours = data.of(EVALUATION), data.class_names
    count = others.image_count
    others.check_source()
    if None not in (ours, found := others.class_names) and found != ours:
        wrong = sorted({*(found or [])} ^ {*(ours or [])})
        raise ValueError(
            f"{others.where}: its classes are not those of {data.where}: {', '.join(wrong[:5])} only in one of them; "
            "expected the same names, because a label is a class's place among them"
        )
    return count


def encoder(parts: Parts) -> None:
    """Refuse a public autoencoder that could not encode the images."""
    if "latents" in parts.jobs.left:
        _autoencoder(parts, parts.data.encoder)


def decoder(parts: Parts) -> None:
    """Refuse a public autoencoder that could not decode the samples, latents of images, or measures' pictures."""
    again = "reconstruct" in parts.jobs.left
    if parts.drawn or again or any("decoder" in parts.config.measures[one.label].made.needs for one in parts.measured):
        _autoencoder(parts, parts.data.decoder)


def _autoencoder(parts: Parts, where: str) -> None:
    spec = parts.config.autoencoder
    if spec.pretrained is None:
        return
    folder = autoencoder.folder_named(where)
    if folder is None:
        cached = weights.in_cache(where, f"autoencoder {where}", *autoencoder.CONFIGS)
        folder = cached.parent if cached and autoencoder.has_weights(cached.parent) else None
    if folder is not None:
        found = autoencoder.opened(folder)
        autoencoder.check_size(found.channels, found.factor, spec)


def text(parts: Parts) -> None:
    """Refuse a text encoder of another width, or without its tokenizer; and states that another one made."""
    own, named = parts.data.text_encoder, parts.config.condition.encoder
    if named is None or named == public_text.WORDS:
        return
    where = own.folder if own else str(named)
    jobs = parts.trained or parts.drawn or parts.measured
    others = [parts.data.of(EVALUATION)] if any(EVALUATION in one.splits for one in parts.measured) else []
    sets = [parts.data, *others]
    made = [one.text for one in sets if one.text is not None and Path(one.text.manifest).exists()]
    if jobs:
        _check_room(parts, [one for one in sets if one.text is not None and one.text not in made])
    if own is not None:
        folder = Path(own.folder) if Path(own.manifest).exists() else None
    elif (folder := public_text.folder_named(where)) is None and jobs:
        cached = weights.in_cache(where, f"text encoder {where}", public_text.CONFIG) if len(made) < len(sets) else None
        folder = cached.parent if cached else None
    if folder is None or not jobs:
        return
    found, settings = public_text.opened(folder), parts.config.condition.decided
    public_text.check(found, tokens=settings["tokens"], width=settings["width"])
    memory = f"{parts.data.root}/identities.json"
    now = found.identities(lambda file: artefact.remembered_identity(file, memory)) if made else {}
    for store in made:
        expected = artefact.read_json(store.manifest, "store")["encoder"]
        for name, identity in now.items():
            if expected[name] != identity:
                raise ValueError(
                    f"{store.folder}: encoded by the {name} {expected[name][:12]}, but {folder} holds {identity[:12]}. "
                    "Put back what was there, or remove the store to encode the captions anew"
                )


def _check_room(parts: Parts, sets: Sequence[Data]) -> None:
    room, taken = parts.config.cache.max_bytes, sum(one.text_bytes for one in sets)
    if taken > room:
        raise ValueError(
            f"cache.max_bytes: {room} allows {units.readable(room)}, but the states of all captions take "
            f"{units.readable(taken)}; what would fit: condition.cache: false"
        )


def teachers(parts: Parts) -> None:
    """Refuse public teachers whose weights are missing or another network's, or whose patches do not fit the images."""
    jobs = [*parts.trained, *(one.segment for one in parts.measured)]
    stores = {name for name, store in parts.targets.stores.items() if not Path(store.manifest).exists()}
    seen = {name for one in parts.measured for name in one.unseen}
    for name in sorted(stores.union(seen, *(job.teachers for job in jobs))):
        spec = parts.config.teachers[name].pretrained
        if spec is None or spec.name in extensions.names("teachers"):
            continue
        public, called = TEACHERS.get(spec.name), f"teacher {spec.name}"
        if public is None:
            weights.check_timm_name(spec.name)
        else:
            public.side(spec.name, parts.config.images.resolution)
        depth = _transformer(spec, called)
        if faults := layer_faults(parts.config, name, depth) if depth else []:
            raise ValueError("\n".join(faults))


def detectors(parts: Parts) -> None:
    """Refuse public detectors whose weights are missing or another network's."""
    for detector in parts.data.detectors.values():
        spec = parts.config.detector[detector.name].pretrained
        made = not parts.drawn and _exist([detector.reference.manifest, *_scores(parts, detector)])
        if made or spec is None or spec.name not in DETECTORS:  # who draws samples extracts their features too
            continue
        if spec.name in TEACHERS:
            _transformer(spec, f"detector {spec.name}")
        elif spec.name == "clip":
            where = spec.weights or public_text.USUAL
            folder = public_text.folder_named(where)
            if folder is None and (cached := weights.in_cache(where, f"detector {where}", public_text.CONFIG)):
                folder = cached.parent
            if folder is not None:
                public_text.opened(folder)
        elif spec.weights is not None:
            weights.check_inception(Path(spec.weights))


def _scores(parts: Parts, detector: Detector) -> list[str]:
    """The files that a detector's reference is for."""
    judged = (one for drawn in parts.evaluations.by_name.values() for one in drawn.judged)
    real = [path for path in (detector.floor, detector.reconstructed) if path]
    return [*real, *(one.score for one in judged if one.detector == detector)]


def _transformer(spec: Any, called: str) -> int | None:
    """Look at a public network's weights; returns the number of its blocks, None if nothing tells."""
    public = TEACHERS.get(spec.name)
    if spec.weights is not None:
        return weights.check_transformer(Path(spec.weights), called, public)
    if public is not None and public.by_file:
        raise ValueError(public.asked(called))
    found = None
    if public is not None and public.on_hub:
        found = weights.in_cache(f"timm/{public.timm}", called, "model.safetensors")
    return weights.check_transformer(found, called, public) if found else None


def references(parts: Parts) -> None:
    """Refuse references that are not ADM's, and features of one that are gone where a score is still to be made."""
    for detector in parts.data.detectors.values():
        made, file = Path(detector.reference.manifest), detector.reference_file
        if file is not None and Path(file).is_file() and not made.exists():
            from haste.files import npz  # numpy is slow to import

            npz.check_reference(file, detector.kind)
        gone = [path for path in detector.reference.shard_files if made.exists() and not Path(path).exists()]
        if gone and not _exist(_scores(parts, detector)):
            raise ValueError(
                f"{gone[0]}: is gone, but {made} says that it is there; remove that too to make both again"
            )


def starts(parts: Parts) -> None:
    """Refuse files of `warm_start` that are not the run's model."""
    files = {identity: file for file, identity in parts.data.identities.items()}
    for segment in parts.trained:
        recipe = parts.runs.trajectories[segment.state.trajectory].recipe
        if segment.parent is None and (start := recipe.get("warm_start")):
            kept = isinstance(start, str)
            _described(parts, files[start if kept else start["file"]], recipe, None, classes=kept)


def elsewhere(parts: Parts) -> None:
    """Refuse checkpoints of `evaluate` that are not the row's model, or were trained on something else."""
    asked = {one.state.trajectory: set[str]() for one in parts.drawn}
    for measured in parts.measured:
        asked.setdefault(measured.state.trajectory, set())
    for one in parts.drawn:
        asked[one.state.trajectory].add(parts.evaluations.weights(one.state, one.sampling))
    for name in sorted(asked.keys() & parts.evaluations.elsewhere.keys()):
        spec, recipe = parts.evaluations.elsewhere[name], parts.evaluations.trajectories[name].recipe
        if (found := _described(parts, spec.checkpoint, recipe, spec.layout)) is not None:
            layouts.check_trained(found.file, found.facts, recipe["training"])
            for which in sorted(asked[name] or {spec.weights}):
                layouts.chosen(found.file, found.sets, which)


def _described(
    parts: Parts, given: str, recipe: dict[str, Any], layout: str | None, classes: bool = True
) -> layouts.Described | None:
    """What a file of weights holds, checked against a recipe's model; None if the file is gone, which is a note."""
    expected = layouts.expected_in(recipe, condition_arguments(recipe) if classes else {})
    file = parts.data.outside.files[given]
    if not Path(file).is_file():
        if (of := parts.data.outside.hub.get(given)) and given not in parts.data.missing:
            raise MissingError(f"{parts.data.outside.keys[given]}: {of.absent()}")
        return None
    if (name := recipe["model"].get("architecture", "sit")) in layouts.KNOWN:
        return layouts.described(file, layout, expected)
    shapes = facts_in(recipe).shapes
    return layouts.described_as(file, name, shapes, expected) if shapes else None


def trackers(parts: Parts) -> None:
    """Refuse a tracker whose library is missing."""
    for kind in parts.config.runtime.trackers if parts.trained else ():
        check_tracker(kind)


def check_tracker(kind: str) -> None:
    """Refuse a tracker of `runtime.trackers` whose library is missing; raises ValueError."""
    if kind == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ValueError("runtime.trackers: wandb is not installed (`pip install wandb`)")


#: Every path, file, hub name and library in a configuration, and what looks at it; a test walks the schema for others.
INPUTS: dict[str, Callable[[Parts], None]] = {
    "images.path": images,
    "images.labels": images,
    "images.captions": images,
    "evaluation.path": images,
    "evaluation.labels": images,
    "evaluation.captions": images,
    "autoencoder.pretrained.encode": encoder,
    "autoencoder.pretrained.decode": decoder,
    "condition.encoder": text,
    "teachers.NAME.pretrained.name": teachers,
    "teachers.NAME.pretrained.weights": teachers,
    "detector.NAME.pretrained.name": detectors,
    "detector.NAME.pretrained.weights": detectors,
    "detector.NAME.reference": references,
    "runs.NAME.warm_start.file": starts,
    "evaluate.NAME.checkpoint": elsewhere,
    "runtime.trackers": trackers,
}


def check(parts: Parts) -> None:
    """Look at all inputs; raises ValueError for the first that a job would refuse, or MissingError for all that are not
    there."""
    missing = [*parts.data.missing.values()]
    for look in dict.fromkeys(INPUTS.values()):
        try:
            look(parts)
        except MissingError as error:
            missing.append(str(error))
    if missing:
        raise MissingError("\n".join(dict.fromkeys(missing)))
