"""A ramp that begins where a trigger fired: to the bit a ramp written by hand, whatever interrupts it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_readings import AT_10, QUICK, assert_same_learner, before, folder, killed, overheard, runs, tensors, train_to

from haste.align import schedule
from haste.files import journal
from haste.files.provenance import read_header
from haste.ops import prune, status
from haste.plan.names import State
from haste.plan.plan import Plan
from haste.report import gather
from haste.train import stops
from haste.train.step import Objective

RELEASED = {**AT_10, "release": 0.4}  # fires at 10, and falls over 4 steps
BY_HAND = {"alignment": "HASTE", "stop": 14, "ramp": 4}
LATER = before(Objective, "forward", lambda self, batch, *_: batch.step == 12)


def states(plan, run):
    return sorted(int(path.name[5:13]) for path in folder(plan, run).glob("step-*"))


def logged(plan, run, last=None):
    """Step and losses of the lines of a run's log."""
    lines = journal.read(folder(plan, run) / "log.jsonl", 0, last)
    return [{key: line.get(key) for key in ("step", "denoising", "features", "attention")} for line in lines]


def steps_trained(plan, run):
    """A copied line of the log does not say how long its steps took."""
    return [line["step"] for line in journal.read(folder(plan, run) / "log.jsonl") if "seconds" in line]


def two(make_plan, **more):
    return make_plan(runs={**runs(seen=RELEASED), "by_hand": BY_HAND}, runtime={**QUICK, **more})


@given(share=st.floats(0.01, 1), fired=st.integers(1, 10**6), shape=st.sampled_from(sorted(schedule.SHAPES)))
def test_a_release_is_a_ramp_over_a_share_of_the_steps_done_where_the_trigger_fired(share, fired, shape):
    ramp = schedule.released({"share": share, "shape": shape}, fired)
    assert ramp["from"] == fired and ramp["shape"] == shape
    assert ramp["to"] - fired == max(1, round(share * fired))
    weights = [schedule.factor(step, {"ramp": ramp}) for step in (0, fired, ramp["to"], ramp["to"] + 9)]
    assert weights == [1.0, 1.0, 0.0, 0.0]


def test_what_follows_the_firing_is_to_the_bit_what_a_ramp_by_hand_makes(make_plan):
    plan = two(make_plan)
    train_to(plan, "seen", 8, 16)
    train_to(plan, "by_hand", 8, 10, 14, 16)
    for step in (10, 14, 16):
        found = load_file(folder(plan, "seen") / f"step-{step:08d}.safetensors")
        assert_same_learner(found, tensors(plan, "by_hand", step))
    assert states(plan, "seen") == [8, 10, 14, 16]  # where it fired, and where the weight is 0
    header = read_header(folder(plan, "seen") / "step-00000014.safetensors")
    assert header["triggers"]["features"]["stopped"]["step"] == 10
    assert stops.along(plan, "seen", 0)["features"] == stops.Stopped(
        10, "plateau", header["triggers"]["features"]["stopped"]["reason"], ends=14
    )


def test_the_shape_is_that_of_the_runs_ramps(make_plan):
    rows = {"seen": {"alignment": "HASTE", "stop": RELEASED, "ramp": {"shape": "linear"}}}
    plan = make_plan(runs={**rows, "by_hand": {**BY_HAND, "ramp": {"features": 4, "attention": 4, "shape": "linear"}}})
    train_to(plan, "seen", 8, 16)
    train_to(plan, "by_hand", 8, 10, 14, 16)
    assert_same_learner(tensors(plan, "seen", 16), tensors(plan, "by_hand", 16))
    cosine = two(make_plan)
    assert cosine.state("seen", 16) != plan.state("seen", 16) and cosine.state("seen", 4) == plan.state("seen", 4)


def test_killed_in_the_middle_of_the_ramp_or_cut_there_it_ends_with_the_same_bits(make_plan):
    plan = two(make_plan, save_every=1)
    train_to(plan, "by_hand", 8, 10, 14, 16)
    train_to(plan, "seen", 8)
    assert killed(plan, plan.state("seen", 16), LATER)
    assert not (folder(plan, "seen") / "step-00000014.safetensors").exists()
    train_to(plan, "seen", 16)
    assert_same_learner(tensors(plan, "seen", 16), tensors(plan, "by_hand", 16))
    rows = {"seen": {"alignment": "HASTE", "stop": RELEASED, "milestones": [11, 13, 16]}}
    cut = make_plan(runs=rows, runtime=QUICK)
    for path in folder(plan, "seen").rglob("step-*"):
        path.unlink()
    train_to(cut, "seen", 11, 13, 16)
    assert_same_learner(tensors(cut, "seen", 16), tensors(plan, "by_hand", 16))


def test_the_teacher_is_there_until_the_weight_is_0_and_no_longer(make_plan, monkeypatch):
    plan = two(make_plan)
    train_to(plan, "seen", 8)
    loads, asked = overheard(monkeypatch)
    train_to(plan, "seen", 16)
    assert asked == [True] * 6 + [False] * 2
    assert len(loads) == 2  # up to the firing, and for the ramp
    Path(plan.path(plan.state("seen", 16))).unlink()
    Path(plan.images.manifest).unlink()
    train_to(plan, "seen", 16)
    assert len(loads) == 2


def test_each_term_is_released_by_its_own_trigger(make_plan):
    own = {"features": RELEASED, "attention": {**AT_10, "every": 8}}
    hand = {"alignment": "HASTE", "stop": {"features": 14, "attention": 12}, "ramp": {"features": 4}}
    plan = make_plan(runs={"seen": {"alignment": "HASTE", "stop": own}, "by_hand": hand}, runtime=QUICK)
    train_to(plan, "by_hand", 16)
    train_to(plan, "seen", 16)
    assert_same_learner(tensors(plan, "seen", 16), tensors(plan, "by_hand", 16))


@pytest.mark.parametrize("first", ["sudden", "slow"])
def test_what_lies_before_the_firing_is_trained_once_for_all_that_differ_behind_it(make_plan, first):
    """In either order; a state behind a firing is shared with nobody."""
    stop = {"sudden": AT_10, "slow": RELEASED, "slower": {**AT_10, "release": 0.6}}
    plan = make_plan(runs=runs(**stop), runtime=QUICK)
    order = [first, *(run for run in stop if run != first)]
    for run in order:
        train_to(plan, run, 4, 8, 16)
    assert steps_trained(plan, order[0]) == list(range(5, 17))
    for run in order[1:]:
        assert steps_trained(plan, run) == list(range(11, 17)), run
        assert [one.step for one in stops.along(plan, run, 0).values()] == [10, 10]
        assert logged(plan, run, 10) == logged(plan, order[0], 10), "the log has no hole where it was copied"
    alone = make_plan(runs={"by_hand": BY_HAND, "slower by hand": {**BY_HAND, "stop": 16, "ramp": 6}}, runtime=QUICK)
    for run, hand in {"slow": "by_hand", "slower": "slower by hand"}.items():
        train_to(alone, hand, 16)
        assert_same_learner(tensors(plan, run, 16), tensors(alone, hand, 16))
        assert torch.equal(tensors(plan, run, 8)["model/pos_embed"], tensors(plan, first, 8)["model/pos_embed"])


def test_what_is_damaged_or_foreign_is_not_copied(make_plan):
    plan = make_plan(runs=runs(sudden=AT_10, slow=RELEASED), runtime=QUICK)
    train_to(plan, "sudden", 8, 16)
    kept = folder(plan, "sudden") / "step-00000010.safetensors"
    kept.write_bytes(kept.read_bytes()[:-8])
    train_to(plan, "slow", 16)
    assert steps_trained(plan, "slow") == list(range(9, 17))  # from the copy of step 8
    about = folder(plan, "sudden") / "trajectory.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "recipe": 3}))
    for path in folder(plan, "slow").rglob("step-*"):
        path.unlink()
    train_to(plan, "slow", 16)
    assert steps_trained(plan, "slow") == list(range(5, 17))


def test_a_workflow_trains_the_earlier_row_first_and_the_later_one_waits_for_it(make_plan):
    plan = make_plan(runs=runs(sudden=AT_10, slow=RELEASED), runtime=QUICK)
    assert plan.segment(plan.state("slow", 8)).twin == plan.state("sudden", 8)
    assert plan.segment(plan.state("slow", 16)).twin == plan.state("sudden", 16)
    assert plan.segment(plan.state("sudden", 16)).twin is None
    train_to(plan, "sudden", 4, 8)
    plan = Plan(plan.config)
    assert plan.segment(plan.state("slow", 8)).twin is None and plan.segment(plan.state("slow", 16)).twin
    longer = {"alignment": "HASTE", "stop": AT_10, "milestones": [6, 12]}
    plan = make_plan(runs={"sudden": longer, **runs(slow=RELEASED)}, runtime=QUICK)
    assert [plan.segment(plan.state("slow", step)).twin.step for step in (8, 16)] == [12, 12]


def test_a_release_is_named_and_one_that_is_not_there_is_not(make_plan):
    plan = make_plan(runs=runs(sudden=AT_10, slow=RELEASED))
    names = [plan.state(run, 16).trajectory for run in ("sudden", "slow")]
    assert "-features-plateau-attention-plateau-" in names[0] and "-features-plateau-release-" in names[1]
    recipe = plan.trajectories[names[0]].recipe["terms"]["features"]
    assert "release" not in recipe and "release" not in recipe["trigger"]
    assert plan.trajectories[names[1]].recipe["terms"]["features"]["release"] == {"share": 0.4, "shape": "cosine"}
    assert plan.state("slow", 4) == State(plan.state("sudden", 4).trajectory, 4)


def test_people_are_told_of_the_release(make_plan):
    plan = two(make_plan)
    train_to(plan, "seen", 4, 8)
    train_to(make_plan(runs={"seen": {**runs(seen=RELEASED)["seen"], "milestones": [12]}}, runtime=QUICK), "seen", 12)
    plan = Plan(plan.config)
    line = next(line for line in status.snapshot(plan, queue=lambda _: {}).lines if line.run == "seen")
    assert "aligning features and attention; " in line.segment
    assert "features stopped at 10 by plateau, its weight falls to step 14" in line.segment
    assert stops.left(plan, plan.segment(plan.state("seen", 16))) == ["features", "attention"]
    assert gather.settings(plan, "seen")["ramp"].startswith("features over 0.4 of the steps")
    train_to(plan, "seen", 16)
    plan = Plan(plan.config)
    assert {folder(plan, "seen") / f"step-{step:08d}.safetensors" for step in (10, 14)} <= prune.states_needed(plan)
    assert not stops.left(plan, plan.segment(plan.state("seen", 16)))
