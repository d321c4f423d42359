"""From a plan's files to the content of the report. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from haste import config
from haste.align.terms import kind_of
from haste.cluster import accounting
from haste.files import artefact
from haste.files.progress import followed
from haste.files.provenance import provenance_of
from haste.measure import measure
from haste.ops import replay, sources
from haste.plan.names import Detector
from haste.plan.names import Row as Scored
from haste.plan.plan import Plan
from haste.report import pictures
from haste.report.content import NONE, Benchmark, Curve, Fork, Measured, Part, Read, Report, Row, Stage
from haste.report.lineage import Training, trunks
from haste.report.papers import COCO, COCO_IMAGES, COCO_VAL, IMAGENET, layers_text
from haste.train import stops, trackers

IMAGENET_CLASSES = 1000
TRAINED = "trained here"  # name of a decoder that the pipeline trained itself
METHODS = {(): "vanilla", ("features",): "REPA", ("attention",): "ATTA", ("attention", "features"): "HASTE"}


def method(plan: Plan, run: str) -> str:
    """The published name of a run's loss, or the method that a row of `evaluate` states."""
    if run in plan.config.evaluate:
        return plan.config.evaluate[run].method
    return METHODS[tuple(sorted({kind_of(term) for term in config.terms_of(plan.config, run)}))]


def stop(plan: Plan, run: str) -> str:
    """When a run's alignment stops, as the table shows it: over all its seeds, if a trigger stops it."""
    if run in plan.config.evaluate:
        return NONE
    triggers, found = config.triggers_of(plan.config, run), {}
    for kind in config.terms_of(plan.config, run):
        step = plan.config.runs[run].stop.of(kind)
        found[kind] = _watched(plan, run, kind) if kind in triggers else "never" if step is None else str(step)
    if not found:
        return NONE
    return found.popitem()[1] if len(set(found.values())) == 1 else ", ".join(f"{k} {s}" for k, s in found.items())


def _watched(plan: Plan, run: str, kind: str) -> str:
    """Where a trigger stopped a term: `300 by plateau`, or `300 to 400 by plateau` if seeds differ."""
    name = config.triggers_of(plan.config, run)[kind].trigger
    seeds = plan.config.runs[run].all_seeds
    steps = [found[kind].step for seed in seeds if kind in (found := stops.along(plan, run, seed))]
    if not steps:
        return f"never by {name}"
    several = "" if min(steps) == max(steps) else f" to {max(steps)}"
    some = "" if len(steps) == len(seeds) else f" in {len(steps)} of {len(seeds)} seeds"
    return f"{min(steps)}{several} by {name}{some}"


def records(plan: Plan, run: str, seed: int) -> list[dict[str, Any]]:
    """The log of a run with one seed up to its last milestone, across the trajectories that it passes through."""
    return [{**line, "loss": line.get("denoising")} for line in trackers.logged(plan, run, seed)]


def stages(plan: Plan) -> list[Stage]:
    """Jobs and seconds by rule, from the benchmark files of this configuration's own jobs, and the usage that a
    cluster's accounting recorded."""
    spent: dict[str, list[float]] = {}
    for path in sorted(Path(plan.folder, "benchmarks").glob("*.tsv")):
        try:
            seconds = float(pd.read_csv(path, sep="\t")["s"].iloc[-1])
        except (ValueError, KeyError, IndexError):  # the job was killed while Snakemake wrote the file: time unknown
            continue
        spent.setdefault(path.name.split("-")[0].split(".")[0], []).append(seconds)
    order = [
        "images",
        "autoencoder",
        "teacher",
        "detector",
        "latents",
        "text_encoder",
        "text",
        "pca",
        "targets",
        "train",
        "reference",
        "sample",
        "features",
        "score",
        "floor",
        "reconstruct",
        "grid",
        "measure",
    ]
    taken = accounting.by_stage(accounting.kept(plan))
    names = [*(name for name in order if name in spent or name in taken), *sorted(set(taken) - set(order))]
    return [Stage(n, len(spent.get(n, [])), sum(spent.get(n, [])), taken.get(n)) for n in names]


def _score(detector: Detector, path: str) -> dict[str, Any]:
    """A score under this configuration's name for the detector: another configuration may have made the file."""
    found = artefact.read_json(path, "score")
    artefact.check_entries(path, found, detector=dict, scores=dict, samples=int, reference=dict, provenance=dict)
    for name, value in found["scores"].items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{path}: {name} is {value}, expected a finite number; remove the file to score again")
    return {**found, "detector": {**found["detector"], "name": detector.name}}


def _score_of(plan: Plan, row: Scored, detector: Detector, path: str) -> dict[str, Any]:
    """A row's score under this configuration's names: another configuration may have made the file."""
    found = _score(detector, path)
    # All samples of a configuration have the same decoder, which is part of their name.
    decoder = TRAINED if plan.autoencoder else plan.decoder
    sampling = {**(found.get("sampling") or {}), "name": row.evaluation.sampling_name, "decoder": decoder}
    sampling["preset"] = row.evaluation.sampling.preset
    return {**found, "sampling": sampling, "state": {**(found.get("state") or {}), "step": row.step}}


def _parts(plan: Plan) -> list[Part]:
    made = [
        part
        for part in (
            plan.autoencoder,
            *plan.teachers.values(),
            *(d.part for d in plan.detectors.values()),
            plan.text_encoder,
        )
        if part is not None
    ]
    files = dict.fromkeys(part.manifest for part in made)  # teachers may differ by their filters alone
    found = [_part(file) for file in files if Path(file).exists()]
    return [
        Part(one["name"], one["part"], one["quality"], one["provenance"], _told_apart(one.get("architecture") or {}))
        for one in found
    ]


def _told_apart(architecture: dict[str, Any]) -> int:
    found = architecture.get("classes")
    return found if isinstance(found, int) else 0


def _part(path: str) -> dict[str, Any]:
    found = artefact.read_json(path, "part")
    artefact.check_entries(path, found, name=str, part=str, quality=dict, provenance=dict)
    return found


def settings(plan: Plan, run: str) -> dict[str, str]:
    """What an ablation may vary, in words: all training settings of a run, and its alignment settings except stops.

    Nothing of it is known for rows of `evaluate`.
    """
    if run in plan.config.evaluate:
        return {}
    row, terms, training = plan.config.runs[run], config.terms_of(plan.config, run), plan.config.training_of(run)
    found = {name: _words(value) for name, value in training.model_dump().items()}
    found["timesteps"] = _times(training.timesteps)
    if row.warm_start:
        found["warm start"] = row.warm_start.file + (", new classes" if row.warm_start.classes == "new" else "")
    layered = ("features", "attention")  # whose layers have a column; those of further teachers are settings
    teachers = {kind: _teacher(plan, term["teacher"]) for kind, term in terms.items()}
    if teachers:
        same = len(set(teachers.values())) == 1
        found["teacher"] = min(teachers.values()) if same else ", ".join(f"{k} {t}" for k, t in teachers.items())
        feature, attention = (terms.get(kind, {}) for kind in layered)
        found["layers"] = layers_text(
            feature.get("depth"), attention.get("student_layers"), attention.get("teacher_layers")
        )
    for kind, term in terms.items():
        told = ("teacher", "depth", "student_layers", "teacher_layers") if kind in layered else ("teacher",)
        own = {k: v for k, v in term.items() if k not in told}
        for key, more in (("head", ("hidden", "kernel")), ("normalise", ("normalise_factor",))):  # one choice, one word
            if key in own:
                sizes = [own.pop(name) for name in more]
                own[key] = _words([own[key] or "none", *(size for size in sizes if size is not None)])
        found |= {f"{kind.replace('features', 'feature')} {name}": _words(value) for name, value in own.items()}
    ramp, triggers = plan.config.runs[run].ramp, config.triggers_of(plan.config, run)
    falling = [f"{kind} over {steps} steps" for kind in terms if (steps := ramp.of(kind)) is not None]
    released = {kind: trigger.release for kind, trigger in triggers.items() if trigger.release is not None}
    falling += [f"{kind} over {share:g} of the steps" for kind, share in released.items()]
    if falling:
        found["ramp"] = f"{', '.join(falling)}, {ramp.shape}"
    return found


def _times(times: config.Timesteps) -> str:
    return "uniform" if times.distribution == "uniform" else f"lognormal({times.mu:g}, {times.s:g})"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _teacher(plan: Plan, name: str) -> str:
    teacher = plan.config.teachers[name]
    shown = teacher.pretrained.name if teacher.pretrained else name
    return shown if teacher.filter is None else f"{shown}, low_pass {teacher.filter.low_pass:g}"


def _rows(plan: Plan, training: Training) -> tuple[list[Row], list[str]]:
    """The rows that have scores, and a note on those that have none yet.

    Raises:
        ValueError: no row has a score.
    """
    scores = [(row, judgement) for row in plan.rows for judgement in row.evaluation.judged]
    there = [pair for pair in scores if Path(pair[1].score).exists()]
    if scores and not there:
        raise ValueError(
            f"{plan.folder}: none of its {len(scores)} scores exists yet, expected at least one; the workflow makes "
            f"them, and `haste status` says how far it is. The first will be {scores[0][1].score}"
        )
    several = len(plan.detectors) > 1
    missing = [
        f"{plan.label(row.run, row.seed)} at step {row.step:,}" + (f" by {judgement.detector.name}" if several else "")
        for row, judgement in scores
        if (row, judgement) not in there
    ]
    return _there(plan, training), [f"Not scored yet: {'; '.join(dict.fromkeys(missing))}."] if missing else []


def _there(plan: Plan, training: Training | None = None) -> list[Row]:
    """The rows that have scores."""
    return [
        row_of(
            plan,
            row,
            pictures.named(plan, _score_of(plan, row, judgement.detector, judgement.score)),
            judgement.score,
            hours=training.hours(row.run, row.seed, row.step) if training else None,
        )
        for row in followed("reading scores", plan.rows)
        for judgement in row.evaluation.judged
        if Path(judgement.score).exists()
    ]


def row_of(plan: Plan, row: Scored, score: dict[str, Any], file: str = "", hours: float | None = None) -> Row:
    """A row of a plan as the report shows it, with a score, parsed, its file, and what training took."""
    return Row(
        run=row.run,
        model=(plan.config.evaluate.get(row.run) or plan.config.runs[row.run]).model,
        method=method(plan, row.run),
        stop=stop(plan, row.run),
        seed=row.seed,
        step=row.step,
        score=score,
        settings=settings(plan, row.run),
        recipe=plan.trajectories[row.evaluation.state.trajectory].recipe,
        file=file,
        hours=hours,
    )


def measured(plan: Plan) -> tuple[list[Measured], list[str]]:
    """What measures found, and a note on what is not measured yet."""
    rows = [(row, Path(row.measurement.file)) for row in plan.measured]
    found = [
        Measured(row.measurement.label, row.run, row.seed, row.step, measure.read(path), str(path))
        for row, path in followed("reading measures", rows)
        if path.exists()
    ]
    missing = [
        f"{row.measurement.label} of {plan.label(row.run, row.seed)} at step {row.step:,}"
        for row, path in rows
        if not path.exists()
    ]
    return found, [f"Not measured yet: {'; '.join(missing)}."] if missing else []


def _older(plan: Plan) -> list[str]:
    """A note on scores that are older than their state, which was made again under the same name."""
    found = {}
    for row in plan.rows:
        evaluation = row.evaluation
        if evaluation.state.trajectory in plan.elsewhere:  # named by its content
            continue
        drawn = [made for path in (evaluation.sample_file(0), evaluation.score) if (made := _made(path))]
        if drawn and min(drawn) < _made(plan.path(evaluation.state)):
            found[evaluation.name] = f"{plan.label(row.run, row.seed)} at step {row.step:,} ({evaluation.name})"
    if not found:
        return []
    rooms = ", ".join(f"{plan.root}/{room}/NAME*" for room in ("samples", "features", "scores"))
    return [
        f"Older than the states that are there now: {'; '.join(found.values())}. If these are not the same states "
        f"again, remove {rooms} of each name to draw and score anew."
    ]


def _made(path: str) -> str:
    """When a file was made, by its own record; empty if it is missing or has no record. UTC, in one format."""
    try:
        header = provenance_of(Path(path))
        return str(header.get("provenance", header).get("made", ""))
    except (ValueError, OSError, AttributeError):
        return ""


def _forks(plan: Plan, rows: list[Row], measures: list[Measured]) -> list[Fork]:
    """What forks show, from the scores and measures of all rows."""
    branches, found = config.branches(plan.config), []
    for name, fork in plan.config.forks.items():
        mine = {label: one for label, one in branches.items() if one.fork == name}
        seeds = fork.seeds or plan.config.runs[fork.run].all_seeds
        parts = [row for row in rows if row.run in mine], [one for one in measures if one.run in mine]
        found.append(Fork(name, fork.run, fork.at, fork.length, seeds, mine, *parts))
    return found


def forks(plan: Plan) -> list[Fork]:
    """What forks show as far as it is there; raises as `report`."""
    return _forks(plan, _there(plan), measured(plan)[0])


def benchmark(plan: Plan) -> Benchmark | None:
    """The dataset whose published numbers may be shown beside these: ImageNet, recognised by its 1,000 classes, or
    MS-COCO 2014, by the number of its pictures to validate."""
    images = plan.config.images
    if images.source == "coco" and images.holdout == COCO_VAL:
        return Benchmark(COCO, images.resolution, images.subset or COCO_IMAGES)
    known = images.source != "digits" and images.classes == IMAGENET_CLASSES and images.subset is None
    return Benchmark(IMAGENET, images.resolution) if known else None


def _read(plan: Plan) -> list[Read]:
    """What triggers read of the runs."""
    found, apart = [], config.branches(plan.config)
    for run, seed in plan.pieces:
        if run in apart:  # its states repeat the readings of the trunk
            continue
        for one in sources.of_run(plan, run, seed) if config.terms_of(plan.config, run) else []:
            if one.settings and any(one.columns.values()):
                trigger = sources.trigger_of(one.settings)
                history = replay.readings(one, one.settings)
                threshold = getattr(trigger, "threshold", None)
                found.append(Read(run, seed, one.term, one.settings["trigger"], trigger.shown, history, threshold))
    return found


def report(plan: Plan) -> Report:
    """Everything the page shows, read from finished files; its notes name what is not finished.

    Raises:
        ValueError: nothing is scored yet, or a score or part is broken; the message names the file.
    """
    made = plan.config
    training = Training(plan)
    rows, notes = _rows(plan, training)
    decoded = {
        d.reconstructed: _score(d, d.reconstructed)
        for d in plan.detectors.values()
        if d.reconstructed and Path(d.reconstructed).exists()
    }
    measures, unmeasured = measured(plan)
    branches, written = config.branches(made), config.written(made).model_dump(mode="json", exclude_defaults=True)
    inputs = {j.score: plan.label(row.run, row.seed) for row in plan.rows for j in row.evaluation.judged}
    return Report(
        name=made.name,
        title=made.title or made.name,
        description=made.description,
        rows=[row for row in rows if row.run not in branches],
        floors=[_score(d, d.floor) for d in plan.detectors.values() if Path(d.floor).exists()],
        curves=[
            Curve(run, seed, records(plan, run, seed))
            for run, seed in followed("reading logs", plan.pieces)
            if run not in branches
        ],
        grids=pictures.grids(plan),
        parts=_parts(plan),
        stages=stages(plan),
        provenance=artefact.provenance(inputs=inputs),
        config_text=yaml.safe_dump(written, sort_keys=False),
        notes=[*pictures.enlarged(plan), *plan.changes, *plan.notes, *notes, *unmeasured, *_older(plan)],
        benchmark=benchmark(plan),
        seeds={run: row.all_seeds for run, row in made.runs.items()},
        measures=[one for one in measures if one.run not in branches],
        read=_read(plan),
        forks=_forks(plan, rows, measures),
        reconstructed=[*decoded.values()],
        real=pictures.real(plan, decoded),
        trunks=trunks(plan),
        unit=training.unit,
    )
