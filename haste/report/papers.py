"""Numbers that the papers report, shown beside measured ones. `published/README.md` explains the files.

They are from publications and not results of this code. A published result is shown beside a measured one only
if data, image size, model, method, iteration, guidance and batch agree, and every setting that the paper states except
the stop, which has a column of its own; and only in the columns that the papers report: for ImageNet those of
Inception's scores, for MS-COCO the FID by pytorch-fid's convention.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from haste.files.artefact import canonical
from haste.report.compare import PYTORCH_FID, SAMPLERS, Column, guidance
from haste.report.content import NONE, Benchmark, Row

FOLDER = Path(__file__).parent / "published"
BATCH = "256"  # batch size of every run in these files
SAMPLES = 50_000
IMAGENET, COCO = "ImageNet", "COCO"
COCO_IMAGES, COCO_VAL = 82_783, 40_504  # of MS-COCO 2014
# Files whose rows are a trained model: the side of its images in pixels, and what the table varies. Those named by COCO
# are of MS-COCO, the others of ImageNet.
FILES: dict[str, tuple[int, tuple[str, ...]]] = {
    "imagenet256_no_cfg.csv": (256, ()),
    "imagenet256_cfg.csv": (256, ()),
    "imagenet512.csv": (512, ()),
    "coco256.csv": (256, ()),
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
}
SAMPLED = {"SiT": ("euler-maruyama", 250), "DiT": ("ddpm", 250)}  # how the papers draw; their tables do not repeat it
WAYS = {"ODE": "euler", "SDE": "euler-maruyama"}  # samplers as COCO's table has them
CALLED = {"MMDiT": "MM-DiT"}  # models whose name in a file is not ours
GUIDED = {"imagenet256_cfg.csv", "imagenet512.csv", "coco256.csv"}
SIMILARITIES = {"NT-Xent": "nt-xent", "Cos. sim.": "cosine"}
SCORES = {"fd": "fid", "sfid": "sfid", "is": "is", "precision": "precision", "recall": "recall"}


@dataclass(frozen=True)
class Published:
    """One published result. `scores` are as printed, by this package's names of metrics; `settings` are the alignment
    settings that the paper states, and `axes` those that its table varies: none in the main tables. `accuracy` is that
    of a linear probe in %, "" if the source states none. `images` are those of `Benchmark`; `drawn` is the sampler and
    its evaluations, if the table has them."""

    data: str
    resolution: int
    model: str
    method: str
    step: int
    guidance: tuple[float, float, float] | None  # scale, interval; (1, 0, 1) is no guidance; None: not stated
    stop: str
    settings: Mapping[str, str]
    scores: Mapping[str, str]
    source: str
    axes: tuple[str, ...] = ()
    accuracy: str = ""
    images: int | None = None
    drawn: tuple[str, int] | None = None


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
            one = _read(name, line, resolution, axes)
            if one is not None:
                found.setdefault(canonical({**vars(one), "source": ""}), one)
    return tuple(found.values())


def _read(name: str, line: Mapping[str, str], resolution: int, axes: tuple[str, ...]) -> Published | None:
    """A line of a file; None if it states no iteration or, in a guided table of ImageNet, no guidance."""
    data = COCO if name.startswith(COCO.lower()) else IMAGENET
    method = line.get("method") or ("vanilla" if line.get("target") == "vanilla" else "REPA")
    if not line.get("iteration") or (name in GUIDED and data == IMAGENET and not line["cfg_scale"]):
        return None
    low, high = line.get("interval_low") or 0, line.get("interval_high") or 1
    weight = (float(line["cfg_scale"]), float(low), float(high)) if line.get("cfg_scale") else None
    # A table without this column does not state when alignment stopped.
    stop = line.get("termination") or ("never" if "termination" in line and method != "vanilla" else NONE)
    if line.get("trigger") not in (None, "", "none", "fixed"):
        stop += f" by {line['trigger']}"
    scores = {metric: line[key] for metric, key in SCORES.items() if line.get(key)}
    step, settings = int(line["iteration"]), {} if method == "vanilla" else _settings(line)
    settings |= {"batch": line["batch_size"]} if line.get("batch_size") else {}
    if line.get("timestep_sampling"):
        settings["timesteps"] = line["timestep_sampling"].replace(";", ", ")
    return Published(
        data=data,
        resolution=resolution,
        model=CALLED.get(line["model"], line["model"]),
        method=method,
        step=step,
        guidance=weight if name in GUIDED else (1.0, 0.0, 1.0),
        stop=stop,
        settings=settings,
        scores=scores,
        source=line["source"],
        axes=axes,
        accuracy=line.get("linear_probe_acc") or "",
        images=int(line["train_images"]) if line.get("train_images") else None,
        drawn=(WAYS[line["sampler"]], int(line["nfe"])) if line.get("sampler") and data == COCO else None,
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


def comparable(column: Column, benchmark: Benchmark | None) -> bool:
    """Whether the papers report a column of such images."""
    if benchmark is not None and benchmark.data == COCO:
        return (column.kind, column.metric) == (PYTORCH_FID, "fd")
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
    """The published results at any step that agree with a row in all that they state but the stop."""
    sampling = row.score.get("sampling") or {}
    way = (sampling.get("sampler"), row.score.get("nfe"))
    return [
        one
        for one in of_model(row, benchmark)
        if one.guidance in (None, guidance(row.score))
        and one.drawn in (None, way)
        and all(row.settings.get(name, value) == value for name, value in one.settings.items())
    ]


def _at(one: Published, axis: str) -> str | None:
    return one.stop if axis == "stop" else one.settings.get(axis)


def of_model(row: Row, benchmark: Benchmark | None) -> list[Published]:
    """The published results of a row's model and method, at any step and guidance."""
    if benchmark is None or not is_like(row, benchmark):
        return []
    whose = (benchmark.data, benchmark.resolution, benchmark.images, row.model, row.method)
    return [one for one in published() if (one.data, one.resolution, one.images, one.model, one.method) == whose]


def is_like(row: Row, benchmark: Benchmark | None) -> bool:
    """Whether a row is of the papers' images and, of ImageNet, batch, and sets nothing that no published run sets."""
    sampling = row.score.get("sampling") or {}
    if benchmark is None or "ramp" in row.settings or "low_pass" in row.settings.get("teacher", ""):
        return False
    if row.method != "vanilla" and row.settings.get("flip", "no") != "no":  # SiT and DiT were trained with flips
        return False
    own: dict[str, str] = {}
    if benchmark.data == COCO:  # of either weights: REPA's code draws from the raw ones, HASTE's from the averaged
        if sampling.get("split") != "held_out":
            return False
    elif sampling.get("weights", "ema") != "ema":  # the papers draw from the averaged weights
        return False
    else:
        own["batch"] = BATCH
    return all(row.settings.get(name, words) == words for name, words in {**AS_PUBLISHED, **own}.items())


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
    if benchmark is None or benchmark.data != IMAGENET:
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
