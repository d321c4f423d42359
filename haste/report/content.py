"""What a report is made of: scores, curves, pictures, parts, times. Data alone; the other files read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haste.align.triggers import Reading
from haste.cluster.accounting import Usage
from haste.config import Branch

NONE = "–"  # what a cell without a value shows


@dataclass(frozen=True)
class Row:
    """One score of one run with one seed. `stop` is "–" (no alignment), "never", the step alignment stopped at, or
    "300 by plateau" where a trigger stopped it, over all seeds of the run: "300 to 400 by plateau".

    `settings` is what an ablation may vary, in words: teacher, layers, weights, ...; `recipe` is the recipe of the
    trained state, by which it is named.
    """

    run: str
    model: str
    method: str
    stop: str
    seed: int
    step: int
    score: Mapping[str, Any]  # a score file, parsed
    settings: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""  # of the score
    hours: float | None = None  # that training took, of the report's `unit`


@dataclass(frozen=True)
class Curve:
    """The log of a run with one seed, along its lineage, by step: step, loss (denoising), features and attention while
    aligned, images_per_s, ..."""

    run: str
    seed: int
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Measured:
    """What a measure, by its name in the configuration, found of one run's state with one seed: its file, parsed.

    `printed`: for a published finding, which was not measured here and whose run is its source, the decimals it is
    printed with.
    """

    name: str
    run: str
    seed: int
    step: int
    found: Mapping[str, Any]
    file: str = ""
    printed: int | None = None


@dataclass(frozen=True)
class Read:
    """What a trigger read of a term of one run with one seed, stopped or only watched; `shown` are the values that tell
    most, the first one first, which is compared with a `threshold` if it has one."""

    run: str
    seed: int
    term: str
    trigger: str
    shown: Sequence[str]
    history: Sequence[Reading]
    threshold: float | None = None


@dataclass(frozen=True)
class Fork:
    """A fork of `run`: at each step of `at` it went on for `length` steps with alignment, and stopped.

    `rows` and `measures` are of its branches by their names: their scores, and what was measured of them, at `at` +
    `length`; `branches` tells which side a name is."""

    name: str
    run: str
    at: Sequence[int]
    length: int
    seeds: Sequence[int]
    branches: Mapping[str, Branch]
    rows: Sequence[Row]
    measures: Sequence[Measured]


@dataclass(frozen=True)
class Grid:
    """A PNG of samples, one column per class; `labels` names the columns, if they are classes. `words`: what the
    samples were told, row by row, if these are words."""

    run: str
    step: int
    image: Path
    labels: Sequence[str]
    sampling: str = ""
    columns: int = 0  # 0: as many as there are labels
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Trunk:
    """Where a run leaves the training of another one, whose states it has up to a step."""

    run: str
    step: int


@dataclass(frozen=True)
class Real:
    """Real pictures, above what the autoencoder makes of them: a PNG with a column for each of `classes`, or with
    columns without meaning if there are none."""

    png: bytes
    classes: Sequence[str]


@dataclass(frozen=True)
class Part:
    """A network that the pipeline trained itself (`part`: autoencoder, teacher, detector) and its quality."""

    name: str
    part: str
    quality: Mapping[str, Any]
    provenance: Mapping[str, Any]
    classes: int = 0  # that it tells apart, if it is a classifier


@dataclass(frozen=True)
class Stage:
    """A kind of job: how many ran, their total wall time in seconds, and their usage of a cluster, if known."""

    name: str
    jobs: int
    seconds: float
    usage: Usage | None = None


@dataclass(frozen=True)
class Benchmark:
    """The dataset whose published numbers may be shown: `ImageNet` or `COCO`; the images' side in pixels; of COCO, how
    many of its images are trained on."""

    data: str
    resolution: int
    images: int | None = None


@dataclass(frozen=True)
class Report:
    """All that a page shows. `floors` are scores of real images against real ones, one per detector, `reconstructed`
    those of decoded latents; `seeds` are those of each run in the configuration, scored or not; `trunks` are the runs
    that begin as another; `unit` is what training's hours are of, `GPU` or `core`."""

    name: str
    title: str
    description: str
    rows: Sequence[Row]
    floors: Sequence[Mapping[str, Any]]
    curves: Sequence[Curve]
    grids: Sequence[Grid]
    parts: Sequence[Part]
    stages: Sequence[Stage]
    provenance: Mapping[str, Any]
    config_text: str
    notes: Sequence[str] = ()
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    benchmark: Benchmark | None = None
    measures: Sequence[Measured] = ()
    read: Sequence[Read] = ()
    forks: Sequence[Fork] = ()
    reconstructed: Sequence[Mapping[str, Any]] = ()
    real: Real | None = None
    trunks: Mapping[str, Trunk] = field(default_factory=dict)
    unit: str = "GPU"
