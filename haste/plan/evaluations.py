"""The evaluations of a plan: samples of states, detectors' features of them, scores; also of imported weights."""

from __future__ import annotations

import itertools

from haste.config import (
    Config,
    Evaluate,
    Sampling,
    condition_entry,
    decides,
    model_entry,
    model_named,
    training_elsewhere,
)
from haste.files.artefact import fingerprint
from haste.plan.data import Data
from haste.plan.names import RECIPE, Evaluation, Judgement, Row, State, Trajectory
from haste.plan.runs import Runs, readable_name


class Evaluations:
    """What is sampled and scored.

    Attributes:
        rows: lines of the result table; several may share an evaluation.
        states: run, step, seed and state of every line, also where nothing is drawn.
        by_name: the evaluations.
        notes: which samples are not scored.
        elsewhere: trajectory of a checkpoint that is not trained here -> its section of the configuration.
        trajectories: of those checkpoints, by name.
    """

    def __init__(self, config: Config, data: Data, runs: Runs):
        self.config, self.data = config, data
        self.rows: list[Row] = []
        self.states: list[tuple[str, int, int, State]] = []
        self.by_name: dict[str, Evaluation] = {}
        self.elsewhere: dict[str, Evaluate] = {}
        self.trajectories: dict[str, Trajectory] = {}
        for run, seed in runs.pieces:
            row = config.runs[run]
            # Chosen classes are for a picture, and the report shows that of the first seed.
            ways = [way for way in row.sampling if seed == row.all_seeds[0] or not config.sampling[way].unscored]
            self.states += [(run, step, seed, runs.state(run, step, seed)) for step in row.milestones]
            for step, sampling in itertools.product(row.milestones, ways):
                self.rows.append(Row(run, step, self._evaluation(runs.state(run, step, seed), sampling), seed))
        for name, spec in config.evaluate.items():
            state = self._state_elsewhere(spec)
            self.states.append((name, spec.step, spec.seed, state))
            self.rows += [Row(name, spec.step, self._evaluation(state, way), spec.seed) for way in spec.sampling]

        used = dict.fromkeys(row.evaluation.sampling_name for row in self.rows if row.evaluation.sampling.unscored)
        self.notes = [
            f"sampling.{name}: samples of chosen {_chosen(config, name)} are shown and not scored" for name in used
        ]

    def _evaluation(self, state: State, name: str) -> Evaluation:
        root, sampling, shards = self.data.root, self.config.sampling[name], self.config.runtime.sample_shards
        settings = decides(Sampling, sampling.model_dump())
        recipe = {"recipe": RECIPE, "state": str(state), "sampling": settings, "decoder": self.data.decoder_key}
        draw = f"{state.trajectory}.{state.step:08d}.{fingerprint(recipe, 8)}"
        judgements = []
        for detector in self.data.detectors.values():
            features = self.data.features(draw, draw, detector.kind, detector.key, shards)
            score = f"{root}/scores/{draw}.{fingerprint([features.key, detector.reference.key], 8)}.json"
            judgements.append(Judgement(detector, features, score))
        folder = f"{root}/samples/{draw}"
        found = Evaluation(draw, state, name, sampling, folder, shards, recipe, tuple(judgements))
        self.by_name[draw] = found
        return found

    def weights(self, state: State, sampling: Sampling) -> str:
        """The set of weights that samples are drawn from, `ema` or `model`: of a checkpoint from elsewhere what its row
        says, unless the sampling asks for the raw ones."""
        row = self.elsewhere.get(state.trajectory)
        return row.weights if row and sampling.weights == "ema" else sampling.weights

    def _state_elsewhere(self, spec: Evaluate) -> State:
        """A state that is not trained here. Its step does not identify it, so the step is only in the row."""
        model = model_named(self.config, spec.model)
        recipe = {
            "recipe": RECIPE,
            "checkpoint": self.data.identities[spec.checkpoint],
            "weights": spec.weights,
            **condition_entry(self.config),
            **self.data.told,
            "model": model_entry(self.config, model),
            "training": training_elsewhere(self.config, spec),
        }
        trajectory = Trajectory.of(readable_name(model, {}, "elsewhere"), recipe)
        self.trajectories[trajectory.name] = trajectory
        self.elsewhere[trajectory.name] = spec
        return State(trajectory.name, 0)

    def named(self, name: str) -> Evaluation:
        """A set of samples by its name.

        Raises:
            ValueError: this configuration has no set of that name.
        """
        if name not in self.by_name:
            raise ValueError(
                f"samples {name!r}: not in this configuration, which has {', '.join(sorted(self.by_name))}"
            )
        return self.by_name[name]


def _chosen(config: Config, way: str) -> str:
    return "prompts" if config.sampling[way].prompts else "classes"
