"""The jobs of the rules on samples, features and scores."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haste.config import condition_in
from haste.diffusion.samplers import nfe
from haste.files import artefact, locks, store
from haste.files.store import Store
from haste.metrics.detector import Detector
from haste.metrics.detectors import open_detector
from haste.networks.devices import choose_device
from haste.networks.hub_files import origin
from haste.plan import names
from haste.plan.names import Evaluation, Judgement
from haste.plan.plan import Plan
from haste.sampling import batches, looks
from haste.sampling.compiled import compile_once
from haste.sampling.painter import painter_of
from haste.sampling.shards import Wanted, draw_shards
from haste.score.features import feature_shard, reference_of_file, reference_shard
from haste.score.workflow import floor, kept_moments, score

log = logging.getLogger("haste.sample")

FAULTS = (ValueError, OSError, FloatingPointError)  # of one set of samples, which say nothing of another


def load_detector(plan: Plan, detector: names.Detector) -> Detector:
    """One of a plan's detectors, on the device that the configuration names."""
    device = choose_device(plan.config.runtime.device)
    return open_detector(detector.opens, detector.weights, called=detector.name, device=device)


def make_reference(plan: Plan, detector: names.Detector) -> None:
    """Make a detector's features of the real images, if they are missing."""
    made = detector.reference
    if not Path(made.manifest).exists():
        with locks.making(made.folder, done=made.manifest) as todo:
            if todo:
                _make_reference(plan, detector)


def _make_reference(plan: Plan, detector: names.Detector) -> None:
    made = detector.reference
    common: dict[str, Any] = {"key": made.key, "recipe": made.recipe}
    judge, folder = load_detector(plan, detector), Path(made.folder)
    if detector.reference_file is None:
        split = plan.config.detector[detector.name].split
        reference_shard(Store.of(plan.images), judge, folder=folder, split=split, **common)
    else:
        reference_of_file(Path(detector.reference_file), judge, folder=folder, **common)
    provenance = artefact.provenance(**common)
    store.join(made.folder, kind="features", shards=1, splits={}, provenance=provenance, **common)
    if detector.reference_file is None:
        kept_moments(Store.of(made))


def sample(plan: Plan, evaluation: Evaluation, shard: int, *, together: bool = False) -> None:
    """Draw one shard of samples, and extract every detector's features.

    Args:
        plan: has the samples.
        evaluation: the set of samples.
        shard: which shard, from 0.
        together: whether also of the sets that `Jobs.beside` names, with the same network and noise. Of those that are
            drawn, features alone are made.

    Raises:
        ValueError, OSError, FloatingPointError: the set cannot be drawn, or has no features. What becomes of another
            set is only logged: whichever fails, the others are made.
    """
    sets = [evaluation, *(plan.jobs.beside(evaluation, shard) if together else [])]
    failed = _draw(plan, [one for one in sets if one is evaluation or not one.is_drawn], shard)
    for detector in plan.detectors.values():
        todo = [one for one in sets if one.name not in failed]
        opened = load_detector(plan, detector) if todo else None
        for one in todo:
            try:
                extract_features(plan, one, detector, shard, opened)
            except FAULTS as error:
                failed[one.name] = error
    # Not before: a workflow that is killed between the two discards the shard and calls this again.
    mine = store.shard_range(evaluation.sampling.count, shard, evaluation.shards)
    for one in sets:
        if one.name not in failed:
            batches.forget(batches.folder_of(Path(one.folder)), mine)
    own = failed.pop(evaluation.name, None)
    said = "%s: shard %d is given up: %s. The other sets of this job are not; the same snakemake command tries it again"
    for name, why in failed.items():
        log.error(said, name, shard, why)
    if own:
        raise own


def _draw(plan: Plan, sets: Sequence[Evaluation], shard: int) -> dict[str, Exception]:
    """Draw one shard of sets that differ only in guidance; by name, why a set was given up."""
    first, failed = sets[0], dict[Path, Exception]()
    painter = painter_of(plan, first.state, first.sampling)
    if plan.config.runtime.compile:
        compile_once(painter.model)
    facts = {"checkpoint": given} if (given := _given(plan, first.state)) else {}
    wanted = {
        one.name: Wanted(
            dataclasses.replace(painter, sampling=one.sampling),
            Path(one.sample_file(shard)),
            one.key,
            one.recipe,
            facts,
        )
        for one in sets
    }
    with contextlib.ExitStack() as held:
        # In one order wherever several are taken. Whoever waited finds the shard there, and compares its record.
        for path in sorted(one.path for one in wanted.values()):
            try:
                held.enter_context(locks.making(path, anew=True))
            except OSError as error:  # another user's folder
                failed[path] = error
        failed |= draw_shards(
            [one for one in wanted.values() if one.path not in failed],
            shard=shard,
            shards=first.shards,
            batch=plan.config.runtime.sample_batch,
            inputs=painter.inputs,
        )
    return {name: failed[one.path] for name, one in wanted.items() if one.path in failed}


def _given(plan: Plan, state: names.State) -> dict[str, Any]:
    """Of a checkpoint from elsewhere its step, its file, by the commit if it is of the hub, and its sha256."""
    if (row := plan.elsewhere.get(state.trajectory)) is None:
        return {}
    return {"step": row.step, "file": origin(plan.path(state)), "sha256": plan.identities[row.checkpoint]}


def extract_features(
    plan: Plan, evaluation: Evaluation, detector: names.Detector, shard: int, opened: Detector | None = None
) -> None:
    """Extract a detector's features of one shard of samples; `opened` is the detector if it is loaded already."""
    made = evaluation.judgement(detector.name).features
    condition = condition_in(plan.trajectories[evaluation.state.trajectory].recipe).on(plan)
    feature_shard(
        opened or load_detector(plan, detector),
        Path(evaluation.sample_file(shard)),
        folder=Path(made.folder),
        key=made.key,
        recipe=made.recipe,
        shard=shard,
        shards=made.shards,
        total=evaluation.sampling.count,
        condition=condition,
        batch=plan.config.runtime.sample_batch,
    )


def judge(plan: Plan, evaluation: Evaluation, judgement: Judgement) -> None:
    """Score a set of samples by one detector's features."""
    features, detector = judgement.features, judgement.detector
    batches.check_made(features.shard_files, "features", evaluation.state)
    common: dict[str, Any] = {"key": features.key, "recipe": features.recipe, "shards": features.shards}
    provenance = artefact.provenance(key=features.key, recipe=features.recipe)
    store.join(features.folder, kind="features", splits={}, provenance=provenance, **common)
    state, sampling = evaluation.state, evaluation.sampling
    counted = batches.mean_nfe([evaluation.sample_file(shard) for shard in range(features.shards)])
    pixels = looks.facts_of_shards(evaluation.sample_files)
    batches.close(batches.folder_of(Path(evaluation.folder)))
    whose = {"trajectory": state.trajectory, "step": state.step, "file": plan.path(state), **_given(plan, state)}
    said = {
        "name": evaluation.sampling_name,
        "weights": plan.weights(state, sampling),
        "decoder": evaluation.recipe["decoder"],
    }
    of = {"labels": {"labels"}, "captions": {"split", "prompts"}}  # keys by the condition that reads them
    unused = {key for name, keys in of.items() if name != plan.config.condition.name for key in keys}
    about = {
        "state": whose,
        "sampling": {**sampling.model_dump(exclude=unused), **said},
        "nfe": nfe(sampling.sampler, sampling.steps) if counted is None else counted,
    }
    path = Path(judgement.score)
    reference = Store.of(detector.reference)
    common = {"detector": detector.name, "about": about, "key": path.stem, "path": path}
    with locks.making(path, anew=True) as todo:
        if todo:
            score(Store.of(features), reference, **common, pixels=pixels)


def floor_of(detector: names.Detector) -> None:
    """Score real images against real ones by one detector."""
    path, part = Path(detector.floor), detector.part
    accuracy = None
    if part:
        made = artefact.read_json(part.manifest, "part")
        artefact.check_entries(part.manifest, made, quality=dict)
        accuracy = made["quality"].get("accuracy")
    reference = Store.of(detector.reference)
    with locks.making(path, anew=True) as todo:
        if todo:
            floor(reference, detector=detector.name, held_out_accuracy=accuracy, key=path.stem, path=path)
