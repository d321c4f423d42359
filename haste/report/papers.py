"""Numbers that the papers report, shown beside measured ones. `published/README.md` explains the files.

They are from publications and not results of this code. A published result is shown beside a measured one only
if data, image size, model, method, iteration, guidance and batch agree, and every setting that the paper states; and
only in the columns that the papers report, those of Inception's scores.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from haste.report.compare import SAMPLERS, Column, guidance
from haste.report.content import NONE, Benchmark, Row

FOLDER = Path(__file__).parent / "published"
BATCH = "256"  # batch size of every run in these files
SAMPLES = 50_000
# Files whose rows are a model trained on ImageNet: the side of its images in pixels, and what the table varies.
FILES: dict[str, tuple[int, tuple[str, ...]]] = {
    "imagenet256_no_cfg.csv": (256, ()),
    "imagenet256_cfg.csv": (256, ()),
    "imagenet512.csv": (512, ()),
    "ablation_trigger.csv": (256, ("stop",)),
    "ablation_teacher.csv": (256, ("teacher", "stop")),
    "ablation_lambda.csv": (256, ("feature weight",)),
    "ablation_depth.csv": (256, ("layers",)),
    "ablation_components.csv": (256, ("teacher", "layers", "feature similarity")),
    "ablation_timestep_sampling.csv": (256, ("timesteps",)),
}
# What no published run of a method has otherwise: the words of `Row.settings` that are its.
AS_PUBLISHED = {
    "feature head": "mlp, 2048",
    "feature normalise": "none",
    "feature layer": "none",
    **{f"{term} t_min": "0" for term in ("feature", "attention")},
    **{f"{term} t_max": "1" for term in ("feature", "attention")},
}
SAMPLED = {"SiT": ("euler-maruyama", 250), "DiT": ("ddpm", 250)}  # how the papers draw; their tables do not repeat it
GUIDED = {"imagenet256_cfg.csv", "imagenet512.csv"}
SIMILARITIES = {"NT-Xent": "nt-xent", "Cos. sim.": "cosine"}
SCORES = {"fd": "fid", "sfid": "sfid", "is": "is", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class Published:
    """One published result. `scores` are as printed, by this package's names of metrics; `settings` are the alignment
    settings that the paper states, and `axes` those that its table varies: none in the main tables."""

    resolution: int
    model: str
    method: str
    step: int
    guidance: tuple[float, float, float]  # scale, interval; (1, 0, 1) is no guidance
    stop: str
    settings: Mapping[str, str]
    scores: Mapping[str, str]
    source: str
    axes: tuple[str, ...] = ()


def layers_text(depth: int | str | None, student: Sequence[int] | None, teacher: Sequence[int] | None) -> str:
    """Which layers a run aligns, in words: `depth 5; 2, 3, 4 to 7, 9, 11`."""
    words = [f"depth {depth}"] if depth else []
    if student and teacher:
        words.append(f"{', '.join(map(str, student))} to {', '.join(map(str, teacher))}")
    return "; ".join(words)


@functools.cache
def published() -> tuple[Published, ...]:
    """Every published result of a model, a method and an iteration; a number that two tables print appears once."""
    found: dict[tuple[object, ...], Published] = {}
    for name, (resolution, axes) in FILES.items():
        with open(FOLDER / name, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                one = _read(line, resolution, axes, guided=name in GUIDED)
                if one is not None:
                    what = (
                        one.resolution,
                        one.model,
                        one.method,
                        one.step,
                        one.guidance,
                        one.stop,
                        one.scores["fd"],
                        axes,
                    )
                    found.setdefault((*what, *sorted(one.settings.items())), one)
    return tuple(found.values())


def _read(line: Mapping[str, str], resolution: int, axes: tuple[str, ...], guided: bool) -> Published | None:
    """A line of a file; None if it states no iteration or, in a guided table, no guidance."""
    method = line.get("method") or ("vanilla" if line.get("target") == "vanilla" else "REPA")
    if not line.get("iteration") or (guided and not line["cfg_scale"]):
        return None
    low, high = line.get("interval_low") or 0, line.get("interval_high") or 1
    weight = (float(line["cfg_scale"]), float(low), float(high)) if guided else (1.0, 0.0, 1.0)
    # A table without this column does not state when alignment stopped.
    stop = line.get("termination") or ("never" if "termination" in line and method != "vanilla" else NONE)
    scores = {metric: line[name] for metric, name in SCORES.items() if line.get(name)}
    step, settings = int(line["iteration"]), {} if method == "vanilla" else _settings(line)
    if line.get("timestep_sampling"):
        settings["timesteps"] = line["timestep_sampling"].replace(";", ", ")
    return Published(resolution, line["model"], method, step, weight, stop, settings, scores, line["source"], axes)


def _settings(line: Mapping[str, str]) -> dict[str, str]:
    """The alignment settings that a line states, in the words of `Row.settings`."""
    pairs = ([int(n) for n in line.get(name, "").split(",") if n] for name in ("student_layers", "teacher_layers"))
    found = {
        "teacher": line.get("teacher") or line.get("target") or "",
        "layers": layers_text(line.get("feature_depth") or line.get("depth"), *pairs),
        "feature weight": f"{float(line['lambda']):g}" if line.get("lambda") else "",
        "feature similarity": SIMILARITIES.get(line.get("objective", ""), ""),
    }
    return {name: value for name, value in found.items() if value}


def comparable(column: Column) -> bool:
    """Whether the papers report a column."""
    return column.inception and column.metric in SCORES


def other_sampler(row: Row) -> str:
    """How a row was drawn, in words, if the papers draw its kind of model otherwise; empty if they draw it so too."""
    sampling = row.score.get("sampling") or {}
    way = (sampling.get("sampler"), sampling.get("steps"))
    if way == SAMPLED.get(row.model.split("-")[0], way):
        return ""
    return f"{SAMPLERS.get(str(way[0]), way[0])}" + (f", {way[1]} steps" if way[1] else "")


def beside(row: Row, benchmark: Benchmark | None, axis: str = "") -> list[Published]:
    """The published results that may be shown beside a measured one: from the main tables, or those varying an axis."""
    if benchmark is None or benchmark.data != "ImageNet" or row.settings.get("batch", BATCH) != BATCH:
        return []
    if any(row.settings.get(name, words) != words for name, words in AS_PUBLISHED.items()):
        return []
    return [
        one
        for one in published()
        if (one.resolution, one.model, one.method, one.step) == (benchmark.resolution, row.model, row.method, row.step)
        and (axis in one.axes if axis else not one.axes)
        and one.guidance == guidance(row.score)
        and all(row.settings.get(name, value) == value for name, value in one.settings.items())
    ]
