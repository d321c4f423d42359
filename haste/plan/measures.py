"""The measures of a plan: which measure is taken of which state, against which alignment, and the resulting files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from haste.config import EVALUATION, Config, measured_beside, measured_teacher, measured_terms
from haste.files.artefact import fingerprint
from haste.plan.data import Data
from haste.plan.names import RECIPE, Artefact, Segment, State
from haste.plan.runs import named_terms


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measure of one state.

    label: of the measure, in the configuration; run: the row; terms: the alignment that it is compared with, teachers
    by their names in the configuration; cached: the terms with cached targets; file: the result's path; hidden: the
    stores of the hidden states that it reads, by split; teacher: whose features it compares with; seen: the stores of
    teachers' features, that one's and those measured beside the state, by teacher and split; splits: those of the
    images that it looks at.
    """

    label: str
    run: str
    state: State
    terms: dict[str, dict[str, Any]]
    cached: tuple[str, ...]
    recipe: dict[str, Any]
    file: str
    hidden: dict[str, Artefact]
    teacher: str | None
    seen: dict[str, dict[str, Artefact]]
    splits: tuple[str, ...]

    @property
    def unseen(self) -> list[str]:
        """The teachers that it has to load: their features are not stored, or it asks them for something else."""
        stored = {name: [Path(one.manifest).exists() for one in stores.values()] for name, stores in self.seen.items()}
        return [name for name, there in stored.items() if not (there and all(there))]

    @property
    def segment(self) -> Segment:
        """A segment with these terms, as for a training job: opening the inputs requires one."""
        return Segment(self.state, None, None, self.terms, (), self.cached)

    @property
    def key(self) -> str:
        """Hash of everything that decides the result."""
        return fingerprint(self.recipe)

    @property
    def name(self) -> str:
        """STATE/MEASURE-HASH, as in rules and commands."""
        return "/".join(self.file.removesuffix(".json").split("/")[-2:])


@dataclasses.dataclass(frozen=True)
class MeasuredRow:
    """One measure of one run's state, as shown in the report."""

    run: str
    step: int
    seed: int
    measurement: Measurement


class Measures:
    """The measurements of states.

    Attributes:
        rows: lines of the report; several may share a measurement.
        by_name: the measurements.
    """

    def __init__(self, config: Config, data: Data, states: Iterable[tuple[str, int, int, State]]):
        """
        Args:
            config: the configuration.
            data: stores and networks.
            states: run, step, seed and state of the lines of the result table.
        """
        self.config, self.data = config, data
        states = list(states)
        last = {run: (step, seed) for run, step, seed, _ in sorted(states, key=lambda one: (one[1], -one[2]))}
        self.rows = [
            MeasuredRow(run, step, seed, self.of(run, state, label))
            for run, step, seed, state in states
            for label in (config.runs.get(run) or config.evaluate[run]).measures
            if (step, seed) == last[run] or not config.measures[label].made.once
        ]
        self.by_name: dict[str, Measurement] = {}
        for row in self.rows:  # for a shared state, of the first run
            self.by_name.setdefault(row.measurement.name, row.measurement)

    def of(self, run: str, state: State, label: str) -> Measurement:
        """A measure, by its name in the configuration, of a state that a row passes through or evaluates."""
        spec, terms = self.config.measures[label], measured_terms(self.config, run, label)
        of_state: dict[str, Any] = {"recipe": RECIPE, "state": str(state), "latents": self.data.latents.key}
        if run in self.config.evaluate:  # an imported checkpoint has no alignment in its name; a trained state has
            training = self.config.training.decided
            of_state |= {key: training[key] for key in ("precision", "time_dtype") if key in training}
        recipe = {**of_state, "measure": spec.measure, "settings": spec.decided}
        recipe["terms"] = named_terms(self.config, self.data, terms)
        teacher, beside = measured_teacher(self.config, label), measured_beside(self.config, label)
        if teacher is not None:
            recipe["teacher"] = self.data.teacher_key(teacher)
        if beside:
            recipe["beside"] = {name: self.data.teacher_key(name) for name in beside}
        splits = tuple(spec.made.least)
        if EVALUATION in splits:
            recipe[EVALUATION] = self.data.of(EVALUATION).latents.key
        folder, looks = f"{self.data.root}/measures", spec.made.hidden
        own = f"{folder}/{state.trajectory}.{state.step:08d}"
        kind = "".join(c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in spec.measure)
        stored = {} if EVALUATION in splits else terms  # targets are stored of training's images alone
        cached = tuple(kind for kind, term in stored.items() if self.config.teachers[term["teacher"]].caches(kind))
        return Measurement(
            label,
            run,
            state,
            terms,
            cached,
            recipe,
            f"{own}/{kind}-{fingerprint(recipe)}.json",
            {
                split: _store(own, {**of_state, "latents": self.data.of(split).latents.key, "look": dict(look)})
                for split, look in looks.items()
            },
            teacher,
            {name: self._seen(name, looks) for name in [*([teacher] if teacher else []), *beside]},
            splits,
        )

    def _seen(self, teacher: str, looks: Mapping[str, Mapping[str, Any]]) -> dict[str, Artefact]:
        """The stores of a teacher's features of the images whose hidden states are read."""
        found = {}
        for split, look in looks.items():
            images = self.data.of(split).images.key
            whose = {"recipe": RECIPE, "images": images, "teacher": self.data.teacher_key(teacher)}
            folder = f"{self.data.root}/measures/teacher-{fingerprint(whose)}"
            found[split] = _store(folder, {**whose, "look": _shown(look)})
        return found


def _shown(look: Mapping[str, Any]) -> dict[str, Any]:
    """What of a look decides what is stored of a teacher: the images, and whether each token is."""
    return {key: look[key] for key in ("split", "images", "seed")} | ({} if look["pooled"] else {"pooled": False})


def _store(folder: str, recipe: dict[str, Any]) -> Artefact:
    key = fingerprint(recipe)
    return Artefact("hidden", key, recipe, f"{folder}/hidden-{key}")
