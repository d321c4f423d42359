"""From a plan's files to what the report shows. No torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from haste import artefact, config, journal
from haste.diagnose import pictures
from haste.plan import Evaluation, Plan
from haste.report.tables import NONE, Curve, Grid, Part, Report, Row, Stage

COLUMNS = 10  # classes in a grid
PER_CLASS = 4  # samples a class in a grid
SCALE = 2  # screen pixels a sample's pixel, for small images
METHODS = {(): "vanilla", ("features",): "REPA", ("attention",): "ATTA", ("attention", "features"): "HASTE"}


def method(plan: Plan, run: str) -> str:
    """The published name of a run's loss."""
    return METHODS[tuple(sorted(config.terms_of(plan.config, run)))]


def stop(plan: Plan, run: str) -> str:
    """When a run's alignment stops, as the table says it."""
    terms, stops = config.terms_of(plan.config, run), plan.config.runs[run].stop.model_dump()
    found = {kind: "never" if stops[kind] is None else str(stops[kind]) for kind in terms}
    if not found:
        return NONE
    return found.popitem()[1] if len(set(found.values())) == 1 else ", ".join(f"{k} {s}" for k, s in found.items())


def records(plan: Plan, run: str, seed: int) -> list[dict[str, Any]]:
    """What a run with one seed logged up to its last milestone, across the trajectories it passes through."""
    last, found = plan.config.runs[run].milestones[-1], []
    for piece in plan.pieces[run, seed]:
        high = last if piece.high is None else min(last, piece.high)
        lines = journal.read(Path(plan.root, "states", piece.trajectory, "log.jsonl"), piece.low, high)
        found += [{**line, "loss": line["denoising"]} for line in lines]
    return found


def stages(plan: Plan) -> list[Stage]:
    """Jobs and seconds by rule, from the benchmark files of this configuration's own jobs."""
    spent: dict[str, list[float]] = {}
    for path in sorted(Path(plan.folder, "benchmarks").glob("*.tsv")):
        try:
            seconds = float(pd.read_csv(path, sep="\t")["s"].iloc[-1])
        except (ValueError, KeyError, IndexError):  # a job was killed while Snakemake wrote it: no time is known
            continue
        spent.setdefault(path.name.split("-")[0].split(".")[0], []).append(seconds)
    order = [
        "images",
        "autoencoder",
        "teacher",
        "detector",
        "latents",
        "train",
        "reference",
        "sample",
        "score",
        "floor",
        "grid",
    ]
    return [Stage(name, len(spent[name]), sum(spent[name])) for name in order if name in spent]


def _score(plan: Plan, path: str) -> dict[str, Any]:
    """A score under this configuration's name for the detector: another one may have made it."""
    found = artefact.read_json(path, "score")
    return {**found, "detector": {**found["detector"], "name": plan.detector.name}}


def _parts(plan: Plan) -> list[Part]:
    made = [plan.autoencoder, *plan.teachers.values(), plan.detector]
    found = [artefact.read_json(part.manifest, "part") for part in made if part is not None]
    return [Part(part["name"], part["part"], part["quality"], part["provenance"]) for part in found]


def report(plan: Plan) -> Report:
    """Everything the page shows, read from finished files.

    Raises:
        ValueError: a score or part is missing or broken; names the file.
    """
    settings = plan.config
    rows = [
        Row(
            run=row.run,
            model=settings.runs[row.run].model,
            method=method(plan, row.run),
            stop=stop(plan, row.run),
            seed=row.seed,
            step=row.step,
            score=_score(plan, row.evaluation.score),
        )
        for row in plan.rows
    ]
    grids = [
        Grid(row.run, row.step, Path(row.evaluation.grid), [str(c) for c in shown_classes(plan)])
        for row in plan.rows
        if row.seed == settings.runs[row.run].seed and Path(row.evaluation.grid).exists()
    ]
    return Report(
        name=settings.name,
        title=settings.title or settings.name,
        description=settings.description,
        rows=rows,
        floor=_score(plan, plan.floor),
        curves=[Curve(run, seed, records(plan, run, seed)) for run, seed in plan.pieces],
        grids=grids,
        parts=_parts(plan),
        stages=stages(plan),
        provenance=artefact.provenance(
            inputs={row.evaluation.score: plan.label(row.run, row.seed) for row in plan.rows}
        ),
        config_text=yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        notes=plan.notes,
    )


def shown_classes(plan: Plan) -> range:
    """The classes that grids show, one column each."""
    return range(min(COLUMNS, plan.config.images.classes))


def paint_grid(plan: Plan, evaluation: Evaluation) -> None:
    """The first samples of every class, one column a class. Equal seeds: equal noise for every method."""
    images, labels = [], []
    for shard in range(evaluation.features.shards):
        path = evaluation.sample_file(shard)
        try:
            with np.load(path, allow_pickle=False) as file:
                images.append(file["arr_0"])
                labels.append(file["arr_1"])
        except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: expected samples, found a truncated or foreign file ({error})") from error
    classes = shown_classes(plan)
    pixels, asked = np.concatenate(images), np.concatenate(labels)
    grid = pictures.class_grid(pixels, asked, per_class=PER_CLASS, scale=SCALE, classes=classes)
    pictures.write_png(evaluation.grid, grid)
