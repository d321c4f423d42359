"""What is measured of which state, by which name."""

import copy
from pathlib import Path

import yaml

from haste import config
from haste.plan.plan import Plan

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
COSINE = {"measure": "gradient-cosine", "images": 14, "shards": 3}
HASTE = {"alignment": "HASTE", "milestones": [8, 16], "measures": ["cos"]}


def plan_of(runs, measures=None, **changes):
    measures = {"cos": COSINE} if measures is None else measures
    return Plan(config.resolve({**copy.deepcopy(TINY), "measures": measures, "runs": runs, **changes}))


def files(plan, run):
    return [row.measurement.file for row in plan.measured if row.run == run]


def test_a_row_is_measured_at_each_of_its_milestones_and_runs_that_share_a_state_share_it():
    plan = plan_of({"HASTE": HASTE, "stops": {**HASTE, "stop": 12}, "plain": {}})
    assert [(row.run, row.step) for row in plan.measured] == [
        (run, step) for run in ("HASTE", "stops") for step in (8, 16)
    ]
    assert files(plan, "HASTE")[0] == files(plan, "stops")[0]
    assert len(plan.measure_files) == 3
    trajectory = plan.state("HASTE", 8).trajectory
    assert files(plan, "HASTE")[0].startswith(f"results/measures/{trajectory}.00000008/gradient-cosine-")


def test_what_decides_a_result_decides_its_name_and_nothing_else_does():
    runs = {"HASTE": HASTE}
    before = files(plan_of(runs), "HASTE")
    for other in ({"seed": 1}, {"images": 15}, {"t": [0.5]}, {"blocks": [1]}, {"blocks": "all"}, {"weights": "ema"}):
        assert not {*before} & {*files(plan_of(runs, {"cos": {**COSINE, **other}}), "HASTE")}, other
    for same in (
        {"alignment": "REPA"},
        {"t": [0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 0.8, 0.9]},
    ):  # it has its own; the default
        assert before == files(plan_of(runs, {"cos": {**COSINE, **same}}), "HASTE"), same
    called = plan_of({"HASTE": {**HASTE, "measures": ["other name"]}}, {"other name": COSINE})
    assert files(called, "HASTE") == before
    assert files(plan_of(runs, runtime={"threads": 2}), "HASTE") == before


def test_a_row_without_alignment_is_compared_with_the_one_that_the_measure_names():
    runs = {"plain": {"milestones": [8], "measures": ["cos"]}}
    cos = {**COSINE, "alignment": "HASTE"}
    (row,) = plan_of(runs, {"cos": cos}).measured
    assert row.measurement.terms.keys() == {"features", "attention"}
    weighed = copy.deepcopy(TINY["alignments"])
    weighed["HASTE"]["attention"]["weight"] = 3.0
    assert plan_of(runs, {"cos": cos}, alignments=weighed).measured[0].measurement.file != row.measurement.file


def test_measures_rename_nothing_else():
    plain, measured = (plan_of({"HASTE": {**HASTE, "measures": names}}) for names in ([], ["cos"]))
    assert plain.planned() == measured.planned() and list(plain.evaluations) == list(measured.evaluations)
    assert plan_of({"HASTE": {**HASTE, "measures": []}}, {}).report_made == plain_report()
    assert not plain.measure_files


def plain_report():
    """As a configuration without the keys has it."""
    raw = {**copy.deepcopy(TINY), "runs": {"HASTE": {"alignment": "HASTE", "milestones": [8, 16]}}}
    return Plan(config.resolve(raw)).report_made


def test_targets_that_a_measure_alone_asks_for_are_kept_and_read_from_disk():
    (vit,) = TINY["teachers"].values()
    teachers = {"vit": {**vit, "cache": "features+attention"}}
    runs = {"plain": {"milestones": [8], "measures": ["cos"]}}
    plan = plan_of(runs, {"cos": {**COSINE, "alignment": "HASTE"}}, teachers=teachers)
    (row,) = plan.measured
    assert row.measurement.cached == ("features", "attention")
    assert plan.targets["vit"].manifest in plan.measured_from(row.measurement)
    assert not plan_of({"plain": {"milestones": [8]}}, teachers=teachers).targets
