"""What forks add to a plan: branches off one trunk, under the names that runs which stop there have."""

import copy
from pathlib import Path

import yaml
from safetensors.torch import load_file

from haste import config
from haste.plan.names import State
from haste.plan.plan import Plan
from haste.train import loop

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
FORK = {"run": "HASTE", "at": [4, 8], "for": 6}
RUNS = {"HASTE": {"alignment": "HASTE", "milestones": [16]}}


def planned(forks, runs=RUNS, **changes):
    return Plan(config.resolve({**copy.deepcopy(TINY), "runs": runs, "forks": forks, **changes}))


def test_the_trunk_is_trained_once_and_every_step_of_a_fork_is_a_cut_of_it():
    plan = planned({"F": FORK})
    trunk = plan.state("HASTE", 16).trajectory
    assert sorted(plan.cuts[trunk]) == [4, 8, 10, 14, 16]
    segments = [plan.segment(state) for state in plan.planned()]
    aligned = [(one.start, one.state.step) for one in segments if one.state.trajectory == trunk]
    assert aligned == [(0, 4), (4, 8), (8, 10), (10, 14), (14, 16)]
    branches = [one for one in segments if one.state.trajectory != trunk]
    assert [(one.parent, one.state.step, one.terms) for one in branches] == [
        (State(trunk, 4), 10, {}),
        (State(trunk, 8), 14, {}),
    ]


def test_a_branch_has_the_name_of_a_run_that_stops_there_and_an_aligned_one_that_of_its_run():
    other = {**RUNS, "stops": {"alignment": "HASTE", "stop": 8, "milestones": [14]}}
    plan = planned({"F": FORK}, other)
    assert plan.state("F@8-stopped", 14) == plan.state("stops", 14)
    assert plan.state("F@8-aligned", 14).trajectory == plan.state("HASTE", 16).trajectory


def test_the_aligned_branch_of_a_run_that_stops_goes_on_aligning_beyond_its_stop():
    plan = planned({"F": FORK}, {"HASTE": {"alignment": "HASTE", "milestones": [16], "stop": 8}})
    assert plan.segment(plan.state("F@8-aligned", 14)).terms.keys() == {"features", "attention"}
    assert plan.state("F@8-stopped", 14).trajectory == plan.state("HASTE", 16).trajectory


def test_forks_rename_nothing_and_a_configuration_without_them_is_as_it_was():
    plain, forked = planned({}), planned({"F": FORK})
    assert {*plain.trajectories} < {*forked.trajectories} and {*plain.evaluations} < {*forked.evaluations}
    assert plain.report_made == Plan(config.resolve({**copy.deepcopy(TINY), "runs": RUNS})).report_made
    assert plain.report_made != forked.report_made


def test_branches_are_scored_and_measured_but_have_no_pictures_in_the_report():
    plan = planned({"F": FORK})
    rows = [row.evaluation for row in plan.rows if row.run.startswith("F@")]
    assert len(rows) == 4 and {row.score for row in rows} < {*plan.shown}
    assert not {row.grid for row in rows} & {*plan.shown}
    assert [one.run for one in plan.measured] == ["F@4-aligned", "F@4-stopped", "F@8-aligned", "F@8-stopped"]


def test_a_branch_is_to_the_bit_the_run_that_stops_there_and_a_trunk_that_was_not_kept_is_trained_again(make_plan):
    alone = make_plan(runs={"stops": {"alignment": "HASTE", "stop": 8, "milestones": [14]}})
    for state in alone.planned():
        loop.train(alone, state)
    path = Path(alone.path(alone.state("stops", 14)))
    expected, kept = load_file(path), {*path.parents[1].iterdir()}
    for folder in kept:
        folder.rename(folder.with_name(f"apart-{folder.name}"))

    trunk = make_plan(runs=RUNS)  # finished without a state at the fork
    loop.train(trunk, trunk.state("HASTE", 16))
    forked = make_plan(runs=RUNS, forks={"F": {"run": "HASTE", "at": [8], "for": 6}})
    assert forked.segment(forked.state("F@8-stopped", 8)).start == 0
    for state in forked.planned():
        loop.train(forked, state)
    found = load_file(forked.path(forked.state("F@8-stopped", 14)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value), name
