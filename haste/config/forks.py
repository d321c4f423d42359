"""Forks: two rows of `runs` for each step at which a run is branched, one with alignment and one without. No torch.

Up to the step both are the run that never stops, so by their names they share its states: the trunk is trained once.
Then one goes on with all terms and the other with none, on the same batches, times and noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from haste.align.terms import kind_of
from haste.config.derived import falls_from, terms_of, triggers_of
from haste.config.faults import unknown_measures, unknown_sampling
from haste.config.keys import nearest
from haste.config.schema import Config, Run, Trigger


@dataclass(frozen=True)
class Branch:
    """One side of a fork at one step: `stopped` there, or going on with the alignment of `run`, until step `end`."""

    fork: str
    run: str
    at: int
    end: int
    stopped: bool

    @property
    def name(self) -> str:
        """Its name in `runs`."""
        return f"{self.fork}@{self.at}-{'stopped' if self.stopped else 'aligned'}"


def branches(config: Config) -> dict[str, Branch]:
    """The branches of all forks by their names in `runs`; the aligned one of a step first."""
    found = [
        Branch(name, fork.run, step, step + fork.length, stopped)
        for name, fork in config.forks.items()
        for step in fork.at
        for stopped in (False, True)
    ]
    return {branch.name: branch for branch in found}


def branched(config: Config) -> Config:
    """The configuration with the branches of its forks in `runs`.

    Raises:
        ValueError: a run has the name of a branch.
    """
    rows = {name: _row(config, branch) for name, branch in branches(config).items()}
    taken = [name for name, row in rows.items() if config.runs.get(name, row) != row]
    if taken or (taken := [name for name in rows if name in config.evaluate]):
        raise ValueError(f"runs.{taken[0]}: this is the name of a branch of a fork, expected another name")
    return config.model_copy(update={"runs": {**config.runs, **rows}})


def written(config: Config) -> Config:
    """The configuration as it was before `branched`."""
    known = branches(config)
    return config.model_copy(update={"runs": {name: row for name, row in config.runs.items() if name not in known}})


def _row(config: Config, branch: Branch) -> Run:
    trunk, fork = config.runs[branch.run], config.forks[branch.fork]
    same = trunk.model_dump(mode="json", include={"model", "alignment", "training", "warm_start"})
    seeds = fork.seeds or trunk.all_seeds
    scored = [way for way in trunk.sampling if way not in config.sampling or not config.sampling[way].unscored]
    own = {
        "stop": {kind_of(term): branch.at for term in terms_of(config, branch.run)} if branch.stopped else {},
        "seed": seeds[0],
        "seeds": seeds,
        "milestones": [branch.end],
        "sampling": fork.sampling or scored or trunk.sampling,
        "measures": fork.measures,
    }
    return Run.model_validate({**same, **own})


def faults_of_forks(config: Config) -> list[str]:
    """What keeps forks from being made, one line each."""
    return [fault for name in config.forks for fault in _faults(config, name)]


def _faults(config: Config, name: str) -> list[str]:
    fork, where, own = config.forks[name], f"forks.{name}", branches(config)
    runs = {run: row for run, row in config.runs.items() if run not in own}
    if fork.run not in runs:
        return [f"{where}.run: nothing is called {fork.run!r}{nearest(fork.run, runs)}"]
    row, terms = runs[fork.run], terms_of(config, fork.run)
    if not terms:
        aligned = ", ".join(run for run in runs if terms_of(config, run)) or "a run with an alignment"
        return [f"{where}.run: {fork.run} aligns nothing that could be stopped, expected {aligned}"]
    faults = [*unknown_sampling(config, fork.sampling or [], where), *unknown_measures(config, "forks", name)]
    if strange := sorted(set(fork.seeds or ()) - set(row.all_seeds)):
        faults.append(f"{where}.seeds: {strange}, but {fork.run} is trained with {row.all_seeds}")
    ways = _row(config, next(iter(own.values()))).sampling if not faults else []
    if pictures := [way for way in ways if way in config.sampling and config.sampling[way].unscored]:
        faults.append(
            f"{where}.sampling: {pictures[0]} has chosen labels or prompts, which have no scores; expected others"
        )
    if fork.at[-1] > row.milestones[-1]:
        faults.append(
            f"{where}.at: {fork.at[-1]}, but {fork.run} ends at step {row.milestones[-1]}; expected steps up to that, "
            f"or a later milestone in runs.{fork.run}"
        )
    return faults + _unaligned(config, name)


def _watch(stops: Mapping[str, Trigger]) -> str:
    """How a run that never stops reads what triggers read."""
    told = ", ".join(dict.fromkeys(f"{{trigger: {stop.trigger}, ...}}" for stop in stops.values()))
    return f", with `watch: [{told}]` and the triggers' own keys, if their readings are wanted" if told else ""


def _unaligned(config: Config, name: str) -> list[str]:
    """Steps at which the run may no longer align."""
    fork, watched = config.forks[name], triggers_of(config, config.forks[name].run)
    for kind, step in falls_from(config, fork.run).items():
        if step is not None and fork.at[-1] > step:
            does = (
                f"{watched[kind].trigger} may stop {kind} at any time"
                if kind in watched
                else f"{kind} stops or goes down"
            )
            return [
                f"forks.{name}.at: {fork.at[-1]}, but from step {step} on {does} in {fork.run}; expected steps up to "
                f"that, or the fork of a run that never stops: a copy of {fork.run} without `stop`{_watch(watched)}"
            ]
    return []
