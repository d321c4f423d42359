"""The elements of a plan, with names and paths: artefacts, trajectories, states, segments, evaluations. No torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haste.config import Sampling
from haste.files.artefact import fingerprint

RECIPE = 1  # raised when the method changes so that equal settings no longer give equal results
SHOWN_CLASSES = 10  # columns of a grid of samples
MOST_COMPARED = 50_000  # most images on a side of what real images reach: the usual number of samples
GUIDING = ("guidance", "interval", "guided_channels", "pixels")  # keys of a sampling that need no noise of their own
STORES = (
    "images",
    "latents",
    "text",
    "targets",
    "features",
    "hidden",
)  # with shards and a manifest; others are one folder


@dataclasses.dataclass(frozen=True)
class Artefact:
    """An artefact on disk that is determined by a recipe: a store or a trained part."""

    kind: str
    key: str
    recipe: dict[str, Any]
    folder: str
    shards: int = 1
    name: str = ""

    @property
    def manifest(self) -> str:
        """The file whose presence means that the artefact is complete."""
        return f"{self.folder}/{'manifest' if self.kind in STORES else 'part'}.json"

    @property
    def shard_files(self) -> list[str]:
        """Every shard of a store, in order."""
        return [f"{self.folder}/shard-{i:05d}-of-{self.shards:05d}.h5" for i in range(self.shards)]

    @functools.cached_property
    def files(self) -> list[str]:
        """What a job that reads it waits for: the manifest, and shards that are gone although the manifest is there."""
        there = self.kind in STORES and Path(self.manifest).exists()
        return [self.manifest, *(path for path in self.shard_files if there and not Path(path).exists())]


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One folder of states: a recipe and the intervals on which its alignment terms were active."""

    name: str
    key: str
    recipe: dict[str, Any]

    @classmethod
    def of(cls, words: str, recipe: dict[str, Any]) -> Trajectory:
        """An artefact determined by a recipe; its name begins with readable words."""
        key = fingerprint(recipe)
        return cls(f"{words}-{key}", key, recipe)

    @property
    def flips(self) -> bool:
        """Whether it is trained on mirrored images too."""
        return self.recipe["training"].get("flip", False)

    def is_twin(self, other: Mapping[str, Any]) -> bool:
        """Whether another recipe differs only in what follows where a trigger fires."""
        return _unreleased(self.recipe) == _unreleased(other) and other != self.recipe


def _unreleased(recipe: Mapping[str, Any]) -> dict[str, Any]:
    terms = recipe["terms"].items()
    return {**recipe, "terms": {kind: {k: v for k, v in term.items() if k != "release"} for kind, term in terms}}


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a run's lineage that is on one trajectory: its states have low < step <= high."""

    trajectory: str
    low: int
    high: int | None

    def holds(self, step: int) -> bool:
        """Whether the state after `step` steps belongs to this piece."""
        return self.low < step and (self.high is None or step <= self.high)


@dataclasses.dataclass(frozen=True, order=True)
class State:
    """A state's name."""

    trajectory: str
    step: int

    @property
    def file(self) -> str:
        """The file's name inside the trajectory's folder."""
        return f"step-{self.step:08d}.safetensors"

    def __str__(self) -> str:
        return f"{self.trajectory}/{self.step:08d}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """One training job: from `parent` (None: from scratch) to `state`, with the terms active in between.

    `after` is an earlier state of the same trajectory that is still to be made, although this job does not start from
    it (a milestone inserted before a finished one): a trajectory has one trainer at a time.

    `twin` is a state to wait for, of a trajectory that differs only in what follows where a trigger fires: what both
    share is trained once (`haste/train/twins.py`). `watches` are triggers that only record their readings: the term
    and the settings.
    """

    state: State
    parent: State | None
    after: State | None
    terms: dict[str, dict[str, Any]]
    pieces: tuple[Piece, ...]
    cached: tuple[str, ...] = ()  # the terms with cached targets
    twin: State | None = None
    watches: tuple[tuple[str, dict[str, Any]], ...] = ()

    @property
    def start(self) -> int:
        """Steps done before the first one of this segment, if no newer state is found."""
        return self.parent.step if self.parent else 0

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers that run online: none after the last stop, none whose targets are cached."""
        return sorted({term["teacher"] for kind, term in self.terms.items() if kind not in self.cached})

    @property
    def targets(self) -> list[str]:
        """Names of the teachers whose targets are read from disk."""
        return sorted({self.terms[kind]["teacher"] for kind in self.cached})


@dataclasses.dataclass(frozen=True)
class Detector:
    """A network whose features the scores compare, and where its features of the real images are.

    name: in this configuration; kind: `cnn` for one that is trained here, as `part`, or a public one's name; weights: a
    public one's file, None for the hub's; reference_file: ADM's .npz that the reference is made from, None for the
    image store; floor: scores of real images against real ones; reconstructed: those of decoded latents against real
    ones, None where no latents are needed.
    """

    name: str
    kind: str
    weights: str | None
    key: str
    part: Artefact | None
    reference: Artefact
    reference_file: str | None
    floor: str
    reconstructed: str | None

    @property
    def looks(self) -> str:
        """Name of the folder for its features, whatever the images."""
        return f"{self.kind}-{self.key}"

    @property
    def opens(self) -> str:
        """What `haste.metrics.detectors.open_detector` opens: a folder or a name."""
        return self.part.folder if self.part else self.kind


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One detector's features of a set of samples, and the score computed from them."""

    detector: Detector
    features: Artefact
    score: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Samples of one state with one set of sampling settings, their features and scores, the main detector first."""

    name: str
    state: State
    sampling_name: str
    sampling: Sampling
    folder: str
    shards: int
    recipe: dict[str, Any]
    judgements: tuple[Judgement, ...]

    @property
    def key(self) -> str:
        """Hash of the sampling settings."""
        return fingerprint(self.recipe)

    @functools.cached_property
    def family(self) -> str:
        """Equal for sets of samples of one state that differ only in guidance, and so can share network and noise."""
        sampling = {name: value for name, value in self.recipe["sampling"].items() if name not in GUIDING}
        return fingerprint({**self.recipe, "sampling": sampling})

    @property
    def judged(self) -> tuple[Judgement, ...]:
        """The scores that a configuration makes: none of what was chosen, which is not what the reference is of."""
        return () if self.sampling.unscored else self.judgements

    @property
    def features(self) -> Artefact:
        """The main detector's features."""
        return self.judgements[0].features

    @property
    def score(self) -> str:
        """The main detector's score."""
        return self.judgements[0].score

    def judgement(self, detector: str) -> Judgement:
        """The features and score of one detector, by its name."""
        return next(one for one in self.judgements if one.detector.name == detector)

    @property
    def grid(self) -> str:
        """The image of its first samples by class."""
        return f"{self.folder}/grid.png"

    def sample_file(self, shard: int) -> str:
        """ADM's .npz of one shard."""
        return f"{self.folder}/shard-{shard:05d}-of-{self.shards:05d}.npz"

    @property
    def is_drawn(self) -> bool:
        """Whether all samples exist."""
        return all(Path(path).exists() for path in self.sample_files)

    @property
    def sample_files(self) -> list[str]:
        """ADM's .npz of all shards."""
        return [self.sample_file(shard) for shard in range(self.shards)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result table."""

    run: str
    step: int
    evaluation: Evaluation
    seed: int
