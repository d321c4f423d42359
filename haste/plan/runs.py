"""The training of a plan: runs -> trajectories -> states, and the segments that make them.

A *state* is the checkpoint of a model after some step. Its name follows only from what decides it: the recipe (data,
model, optimiser, seed, ...), which alignment terms were active on which steps so far, and the step. So runs that agree
up to a step share that trunk, and a name never shows where training was cut.

A *trajectory* is a folder of states. A term that is still active has an open interval, [0, None): a run that will stop
at tau is, up to tau, on the same trajectory as the run that never stops. From tau on the interval is closed, [0, tau),
which gives another name: a branch. If a weight falls before tau, the branch begins where it begins to fall. A run's way
through trajectories is a list of `Piece`s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from haste import config as configuration
from haste.align.terms import kind_of, of_features
from haste.config import TERMS, Config, Model, OtherModel, Trigger, decides, terms_of
from haste.files.provenance import STATE_NAME
from haste.plan.data import Data
from haste.plan.names import RECIPE, Piece, Segment, State, Trajectory


class Runs:
    """The result of the table's training.

    Attributes:
        trajectories: by name.
        pieces: (run, seed) -> its way through trajectories; every seed of a row is trained separately.
        cuts: trajectory -> the steps whose states a run needs, or from which a branch starts.
    """

    def __init__(self, config: Config, data: Data):
        self.config, self.data = config, data
        self.trajectories: dict[str, Trajectory] = {}
        self.pieces: dict[tuple[str, int], tuple[Piece, ...]] = {
            (run, seed): tuple(self._pieces(run, seed)) for run, row in config.runs.items() for seed in row.all_seeds
        }
        self.cuts: dict[str, set[int]] = {name: set() for name in self.trajectories}
        for (run, seed), pieces in self.pieces.items():
            milestones = config.runs[run].milestones
            ends = {piece.high for piece in pieces if piece.high is not None and piece.high <= milestones[-1]}
            for step in {*milestones, *ends}:
                self.cuts[self.state(run, step, seed).trajectory].add(step)
        self._on_disk: dict[str, frozenset[int]] = {}

    # -- from runs to trajectories ---------------------------------------------------------------------------------

    def _pieces(self, run: str, seed: int) -> Iterator[Piece]:
        """A new piece begins where a term's weight begins to fall, where a trigger begins to watch it, and where the
        term stops at a step given in the configuration.

        Before that, the recipe contains nothing about the stop: the trunk is that of the run that never stops.
        """
        terms, row = terms_of(self.config, run), self.config.runs[run]
        triggers, falls = configuration.triggers_of(self.config, run), configuration.falls_from(self.config, run)
        stops = {kind: None if kind in triggers else row.stop.of(kind) for kind in terms}
        # a stop at step 0 starts no piece of its own
        bounds = sorted({step for kind in terms for step in (falls[kind], stops[kind]) if step})
        for low, high in zip([0, *bounds], [*bounds, None], strict=True):
            active = {}
            for kind, term in terms.items():
                stop, begin = stops[kind], falls[kind]
                if stop == 0:
                    continue
                active[kind] = {**term, "active": [0, stop if stop is not None and stop <= low else None]}
                if begin is None or begin > low:
                    continue
                if kind in triggers:
                    active[kind]["trigger"] = triggers[kind].decided
                    if (share := triggers[kind].release) is not None:
                        active[kind]["release"] = {"share": share, "shape": row.ramp.shape}
                elif stop is not None and begin < stop:
                    active[kind]["ramp"] = {"from": begin, "to": stop, "shape": row.ramp.shape}
            yield Piece(self._trajectory(run, seed, active), low, high)

    def _trajectory(self, run: str, seed: int, terms: dict[str, dict[str, Any]]) -> str:
        """Add a trajectory; returns its name."""
        row, model = self.config.runs[run], configuration.model_named(self.config, self.config.runs[run].model)
        named = named_terms(self.config, self.data, terms)
        recipe = {
            "recipe": RECIPE,
            "latents": self.data.latents.key,
            **configuration.condition_entry(self.config),
            **self.data.told,
            "model": configuration.model_entry(self.config, model),
            "training": configuration.training_entry(self.config, run),
            "seed": seed,
            "terms": named,
        }
        if row.warm_start is not None:
            start = self.data.identities[row.warm_start.file]
            recipe["warm_start"] = start if row.warm_start.classes == "kept" else {"file": start, "classes": "new"}
        found = Trajectory.of(f"{readable_name(model, named)}-s{seed}", recipe)
        self.trajectories[found.name] = found
        return found.name

    # -- from states to segments -----------------------------------------------------------------------------------

    def state(self, run: str, step: int, seed: int | None = None) -> State:
        """The state of a run after `step` steps, with one of its seeds; None is the first."""
        seed = self.config.runs[run].all_seeds[0] if seed is None else seed
        piece = next(piece for piece in self.pieces[run, seed] if piece.holds(step))
        return State(piece.trajectory, step)

    def planned(self) -> list[State]:
        """Every state that a run needs, or that a branch starts from."""
        return sorted(State(name, step) for name, steps in self.cuts.items() for step in steps)

    def trained(self, aligned: bool) -> list[str]:
        """Names of the trajectories whose own steps have, or do not have, an active alignment loss."""
        return [name for name in self.trajectories if self.aligns(name) == aligned]

    def aligns(self, trajectory: str) -> bool:
        """Whether a trajectory's own steps have an active alignment loss."""
        return any(term["active"][1] is None for term in self.trajectories[trajectory].recipe["terms"].values())

    def parse(self, name: str) -> State:
        """The state named `trajectory/step`, as in rules and commands.

        Raises:
            ValueError: no run of this configuration passes through it.
        """
        trajectory, _, step = name.rpartition("/")
        if trajectory not in self.trajectories or not step.isdigit():
            raise ValueError(
                f"state {name!r}: expected TRAJECTORY/STEP with one of this configuration's trajectories: "
                f"{', '.join(sorted(name for name, steps in self.cuts.items() if steps))}"
            )
        state = State(trajectory, int(step))
        if self._lineage(state) is None:
            raise ValueError(f"state {name!r}: this trajectory has no step {state.step} in this configuration")
        return state

    def on_disk(self, trajectory: str) -> frozenset[int]:
        """Steps of the finished states in a trajectory's folder (looked up once)."""
        if trajectory not in self._on_disk:
            folder = Path(self.data.root, "states", trajectory)
            names = [STATE_NAME.match(path.name) for path in folder.iterdir()] if folder.is_dir() else []
            self._on_disk[trajectory] = frozenset(int(match[1]) for match in names if match)
        return self._on_disk[trajectory]

    def segment(self, state: State) -> Segment:
        """The job that makes a state, from the nearest earlier state that exists on disk or is planned."""
        found = self._lineage(state)
        assert found is not None, state
        run, pieces = found
        earlier = [
            State(piece.trajectory, step)
            for piece in pieces
            for step in self.cuts[piece.trajectory] | self.on_disk(piece.trajectory)
            if piece.holds(step) and step < state.step
        ]
        parent = max(earlier, key=lambda one: one.step, default=None)
        missing = {s for s in self.cuts[state.trajectory] if s < state.step} - self.on_disk(state.trajectory)
        before = State(state.trajectory, max(missing)) if missing else None
        terms = self._active(run, state.trajectory)
        cached = tuple(kind for kind, term in terms.items() if self.config.teachers[term["teacher"]].caches(kind))
        after, watches = None if before == parent else before, tuple(self._watches(state, terms))
        return Segment(state, parent, after, terms, pieces, cached, self._twin(state), watches)

    def _twin(self, state: State) -> State | None:
        """The state of an earlier twin that shares most with this one; None if there is none, or it is on disk."""
        own, names = self.trajectories[state.trajectory], list(self.trajectories)
        for name in reversed(names[: names.index(own.name)]):
            if self.cuts[name] and own.is_twin(self.trajectories[name].recipe):
                steps = self.cuts[name]
                step = min((s for s in steps if s >= state.step), default=max(steps))
                return None if step in self.on_disk(name) else State(name, step)
        return None

    def _watches(self, state: State, terms: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What runs record of a state's segment, and for which term. The names of states say nothing of it. Later twins
        will copy the state, so what they record is recorded here."""
        own, names = self.trajectories[state.trajectory], list(self.trajectories)
        later = names[names.index(own.name) + 1 :]
        shared, seen = {own.name, *(name for name in later if own.is_twin(self.trajectories[name].recipe))}, []
        for (run, _), pieces in self.pieces.items():
            row = self.config.runs[run]
            through = any(piece.trajectory in shared and piece.holds(state.step) for piece in pieces)
            if through and state.step <= row.milestones[-1]:
                seen += [found for watch in row.watch if (found := watch.decided) not in seen]
        yield from ((kind, watch) for watch in seen for kind in terms)

    def _lineage(self, state: State) -> tuple[str, tuple[Piece, ...]] | None:
        """A run that passes through a state, and its pieces from the beginning up to the one that contains the state.

        Any such run will do, because they are identical up to the state.
        """
        for (run, _), pieces in self.pieces.items():
            for number, piece in enumerate(pieces, start=1):
                if piece.trajectory == state.trajectory and piece.holds(state.step):
                    return run, pieces[:number]
        return None

    def _active(self, run: str, trajectory: str) -> dict[str, dict[str, Any]]:
        """The alignment terms that are active on a trajectory's own steps, with all their settings."""
        recipe = self.trajectories[trajectory].recipe["terms"]
        later = ("ramp", "trigger", "release")
        return {
            kind: {**term, **{key: recipe[kind].get(key) for key in later}}
            for kind, term in terms_of(self.config, run).items()
            if kind in recipe and recipe[kind]["active"][1] is None
        }

    @property
    def notes(self) -> list[str]:
        """Settings of the configuration that have no effect."""
        rows = self.config.runs.items()
        idle = [
            f"{run}: watch has no effect: nothing is aligned"
            for run, row in rows
            if row.watch and not terms_of(self.config, run)
        ]
        return idle + [
            f"{run}: {found}"
            for run, row in rows
            for kind, begin in configuration.falls_from(self.config, run).items()
            if (found := _beyond(row.stop.of(kind), kind, begin, row.milestones[-1]))
        ]


def named_terms(config: Config, data: Data, terms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Alignment terms as in recipes: the settings that decide them, and the teacher by its key."""
    named = {
        kind: {**decides(TERMS[kind_of(kind)], term), "teacher": data.teacher_key(term["teacher"])}
        for kind, term in terms.items()
    }
    # The source of targets is not in a name, because caching only rounds them. Components do enter the name.
    for kind, term in of_features(terms).items():
        if components := config.teachers[term["teacher"]].pca:
            named[kind]["pca"] = components
    return named


def readable_name(model: Model | OtherModel, terms: dict[str, dict[str, Any]], otherwise: str = "vanilla") -> str:
    """A readable name that depends only on the recipe (labels may differ between configurations)."""
    if isinstance(model, Model):
        system = {"sit": "SiT", "dit": "DiT"}[model.architecture]
        unnamed = f"{system}-d{model.depth}w{model.width}p{model.patch_size}"
    else:
        unnamed = re.sub(r"[^A-Za-z0-9._]", "-", model.architecture)
    words = [next((n.replace("/", "-") for n, m in configuration.MODELS.items() if m == model), unnamed)]
    for kind, term in terms.items():
        end, ramp, trigger = term["active"][1], term.get("ramp"), term.get("trigger")
        by = "-" + re.sub(r"[^\w.]", "-", trigger["trigger"]) if trigger else ""
        by += "-release" if term.get("release") else ""
        words.append(kind + by + (f"-ramp{ramp['from']}" if ramp else "") + ("" if end is None else f"-to{end}"))
    return "-".join(words if terms else [*words, otherwise])


def _beyond(stop: Trigger | int | None, kind: str, begin: int | None, last: int) -> str:
    """A note on a stop that cannot come before the last milestone; empty if it can, or if there is none.

    begin: the step where the stop first affects the term, as in `falls_from`.
    """
    if isinstance(stop, Trigger):
        if stop.first <= last:
            return ""
        where = (
            f"step {stop.first}, where {stop.trigger} first decides on {kind}, lies beyond the last milestone {last}"
        )
        own = f"but the last {last - stop.after} steps are trained again, although equal to those of the run without it"
        return f"{where}: it {f'stops nothing yet, {own}' if stop.after < last else 'has no effect yet'}"
    if begin is not None and begin > last:
        return f"stop of {kind} at step {stop} lies beyond the last milestone {last}: it has no effect yet"
    return ""
