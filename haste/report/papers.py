"""Numbers that the papers report, shown beside measured ones. `published/README.md` explains the files.

They are from publications and not results of this code. A published result is shown beside a measured one only
if data, image size, model, method, iteration, guidance and batch agree, and every setting that the paper states except
the stop, which has a column of its own; and only in the columns that the papers report, those of Inception's scores.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from haste.files.artefact import canonical
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
    "ablation_lambda_attention.csv": (256, ("attention weight",)),
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
CLAIMS = "speedup.csv"
UNREAD = {  # file -> why no table has its numbers
    "ablation_teacher_data.csv": "its distances are in ablation_components.csv; the rest describes the teachers",
    "coco256.csv": "text-to-image models, which are not trained here, and FID of another convention",
}
SAMPLED = {"SiT": ("euler-maruyama", 250), "DiT": ("ddpm", 250)}  # how the papers draw; their tables do not repeat it
GUIDED = {"imagenet256_cfg.csv", "imagenet512.csv"}
SIMILARITIES = {"NT-Xent": "nt-xent", "Cos. sim.": "cosine"}
SCORES = {"fd": "fid", "sfid": "sfid", "is": "is", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class Published:
    """One published result. `scores` are as printed, by this package's names of metrics; `settings` are the alignment
    settings that the paper states, and `axes` those that its table varies: none in the main tables. `accuracy` is that
    of a linear probe in %, "" if the source states none."""

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
    accuracy: str = ""


@dataclass(frozen=True)
class Claim:
    """A published speed-up: `method` reaches at step `at` what `baseline` has at `step`, `factor` times faster. `at` is
    None, and `factor` "", where the source does not state it."""

    resolution: int
    model: str
    method: str
    baseline: str
    guided: bool
    step: int
    at: int | None
    factor: str
    source: str


@functools.cache
def lines_of(name: str) -> tuple[Mapping[str, str], ...]:
    """The rows of a file."""
    with open(FOLDER / name, newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def layers_text(depth: int | str | None, student: Sequence[int] | None, teacher: Sequence[int] | None) -> str:
    """Which layers a run aligns, in words: `depth 5; 2, 3, 4 to 7, 9, 11`."""
    words = [f"depth {depth}"] if depth else []
    if student and teacher:
        words.append(f"{', '.join(map(str, student))} to {', '.join(map(str, teacher))}")
    return "; ".join(words)


@functools.cache
def published() -> tuple[Published, ...]:
    """Every published result of a model, a method and an iteration; what two rows of one kind of table repeat appears
    once, and where they differ in any score, both."""
    found: dict[str, Published] = {}
    for name, (resolution, axes) in FILES.items():
        for line in lines_of(name):
            one = _read(line, resolution, axes, guided=name in GUIDED)
            if one is not None:
                found.setdefault(canonical({**vars(one), "source": ""}), one)
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
    if line.get("trigger") not in (None, "", "none", "fixed"):
        stop += f" by {line['trigger']}"
    scores = {metric: line[name] for metric, name in SCORES.items() if line.get(name)}
    step, settings = int(line["iteration"]), {} if method == "vanilla" else _settings(line)
    if line.get("timestep_sampling"):
        settings["timesteps"] = line["timestep_sampling"].replace(";", ", ")
    accuracy = line.get("linear_probe_acc") or ""
    return Published(
        resolution, line["model"], method, step, weight, stop, settings, scores, line["source"], axes, accuracy
    )


def _settings(line: Mapping[str, str]) -> dict[str, str]:
    """The alignment settings that a line states, in the words of `Row.settings`."""
    pairs = ([int(n) for n in line.get(name, "").split(",") if n] for name in ("student_layers", "teacher_layers"))
    found = {
        "teacher": line.get("teacher") or line.get("target") or "",
        "layers": layers_text(line.get("feature_depth") or line.get("depth"), *pairs),
        "feature weight": f"{float(line['lambda']):g}" if line.get("lambda") else "",
        "attention weight": f"{float(line['lambda_attention']):g}" if line.get("lambda_attention") else "",
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
    """The published results that may be shown beside a measured one.

    Args:
        row: the measured result.
        benchmark: the dataset that its images are taken to be.
        axis: only those of tables that vary this setting. Without it those of the main tables, and of the others those
            whose varied settings are the row's. What repeats the numbers of another is left out.
    """
    fits = [one for one in _fitting(row, benchmark) if one.step == row.step]
    kept = [one for one in fits if not axis and not one.axes]
    for one in (one for one in fits if one.axes):
        wanted = axis in one.axes if axis else _exactly(row, one)
        if wanted and not any(_repeats(one, other) and _at(one, axis) == _at(other, axis) for other in kept):
            kept.append(one)
    return kept


def along(row: Row, benchmark: Benchmark | None, last: int) -> list[Published]:
    """The published results of a row's run at all steps up to one, for a curve: those of the main tables whose stop, if
    they state one, is the row's as far as it has acted."""
    fits = [one for one in _fitting(row, benchmark) if not one.axes and one.step <= last]
    return [one for one in fits if one.stop == NONE or _stopped(one.stop, one.step) == _stopped(row.stop, one.step)]


def _fitting(row: Row, benchmark: Benchmark | None) -> list[Published]:
    """The published results at any step that agree with a row in guidance and in all settings but the stop."""
    return [
        one
        for one in of_model(row, benchmark)
        if one.guidance == guidance(row.score)
        and all(row.settings.get(name, value) == value for name, value in one.settings.items())
    ]


def _at(one: Published, axis: str) -> str | None:
    return one.stop if axis == "stop" else one.settings.get(axis)


def of_model(row: Row, benchmark: Benchmark | None) -> list[Published]:
    """The published results of a row's model and method, at any step and guidance."""
    if not is_like(row, benchmark):
        return []
    whose = (benchmark and benchmark.resolution, row.model, row.method)
    return [one for one in published() if (one.resolution, one.model, one.method) == whose]


def is_like(row: Row, benchmark: Benchmark | None) -> bool:
    """Whether a row is of the papers' images and batch, and sets nothing that no published run sets."""
    if benchmark is None or benchmark.data != "ImageNet":
        return False
    if (row.score.get("sampling") or {}).get("weights", "ema") != "ema":  # the papers draw from the averaged weights
        return False
    if "ramp" in row.settings or "low_pass" in row.settings.get("teacher", ""):
        return False
    return all(row.settings.get(name, words) == words for name, words in {"batch": BATCH, **AS_PUBLISHED}.items())


def _exactly(row: Row, one: Published) -> bool:
    """Whether a row states all settings that a published ablation does, and stops where it stops."""
    stated = all(row.settings.get(name) == value for name, value in one.settings.items() if name in one.axes)
    return stated and (one.stop == NONE or _stopped(one.stop, row.step) == _stopped(row.stop, row.step))


def _stopped(stop: str, step: int) -> str:
    """Where a stop has acted before a step, "" if nowhere: a stop that is still ahead is none yet."""
    at, first = stop.split(" by ")[0], re.match(r"\d+", stop)
    return "" if at in ("never", NONE) or (first and int(first[0]) >= step) else at


def _repeats(one: Published, other: Published) -> bool:
    """Whether another result prints all numbers of one, up to the digits of the shorter ones."""
    if not one.scores.keys() <= other.scores.keys():
        return False
    both = [(text, other.scores[name]) for name, text in one.scores.items()]
    return all(float(f"{float(a):.{n}f}") == float(f"{float(b):.{n}f}") for a, b in both for n in [_fewest(a, b)])


def _fewest(*texts: str) -> int:
    """Decimals of the number with fewest."""
    return min(len(text.partition(".")[2]) for text in texts)


def claims(benchmark: Benchmark | None) -> list[Claim]:
    """The published speed-ups on images like these."""
    if benchmark is None or benchmark.data != "ImageNet":
        return []
    found = [
        Claim(
            resolution=int(line["resolution"]),
            model=line["model"],
            method=line["method"],
            baseline=line["baseline"],
            guided=line["guided"] == "yes",
            step=int(line["baseline_iteration"]),
            at=int(line["iteration"]) if line["iteration"] else None,
            factor=line["factor"],
            source=line["source"],
        )
        for line in lines_of(CLAIMS)
    ]
    return [claim for claim in found if claim.resolution == benchmark.resolution]
