"""Readings that are recorded without stopping anything: the same bits as without, whatever interrupts them."""

import pytest
import torch
from safetensors.torch import load_file
from test_readings import QUICK, before, killed, remove_states, tensors, train_to

from haste import config
from haste.align.triggers import TRIGGERS, Average, Trigger
from haste.files.provenance import read_header
from haste.ops import cost
from haste.plan.plan import Plan
from haste.train import stops
from haste.train.gradient_angles import Angles
from haste.train.step import Objective

FLAT = {"trigger": "plateau", "after": 2, "every": 3, "fast": 0.2, "slow": 0.75, "margin": 1}  # it would stop at once
ANGLE = {"trigger": "gradient-angle", "after": 4, "every": 4, "threshold": 1, "images": 12, "shards": 3}
HASTE = {"alignment": "HASTE"}
LATER = before(Objective, "forward", lambda self, batch, *_: batch.step == 12)


def weights(found):
    """All of a state but for what was read."""
    return {name: value for name, value in found.items() if not name.startswith("watched/")}


def watched(plan, run, step):
    """Trigger and term -> record, without the time that it took."""
    records = read_header(plan.path(plan.state(run, step))).get("watched", {}).values()
    return {(r["trigger"]["trigger"], r["term"]): {**r, "seconds": 0.0} for r in records}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_watched_run_has_the_names_and_bits_of_one_that_is_not_and_stops_nowhere(make_plan):
    plain = make_plan(runs={"a": HASTE}, runtime=QUICK)
    train_to(plain, "a", 8, 16)
    expected, names = [tensors(plain, "a", step) for step in (8, 16)], plain.planned()
    remove_states(plain, "a")
    plan = make_plan(runs={"a": {**HASTE, "watch": [FLAT, ANGLE]}}, runtime=QUICK)
    assert plan.planned() == names and sorted(plan.evaluations) == sorted(plain.evaluations)
    train_to(plan, "a", 8, 16)
    for step, before_ in zip((8, 16), expected, strict=True):
        assert_same(weights(tensors(plan, "a", step)), before_)
    found = watched(plan, "a", 16)
    assert sorted(found) == [
        (name, kind) for name in ("gradient-angle", "plateau") for kind in ("attention", "features")
    ]
    assert [r["step"] for r in found["plateau", "features"]["readings"]] == [8, 11, 14]  # four steps after step 2
    assert [r["step"] for r in found["gradient-angle", "attention"]["readings"]] == [8, 12, 16]
    assert "triggers" not in read_header(plan.path(plan.state("a", 16)))


def test_what_is_watched_is_read_as_by_a_trigger_that_stops(make_plan):
    never = {**FLAT, "margin": 0, "after": 4}
    plan = make_plan(runs={"seen": {**HASTE, "stop": never}, "watched": {**HASTE, "watch": never}}, runtime=QUICK)
    train_to(plan, "seen", 16)
    train_to(plan, "watched", 16)
    asked = read_header(plan.path(plan.state("seen", 16)))["triggers"]
    for kind, record in asked.items():
        assert record["readings"] and watched(plan, "watched", 16)["plateau", kind]["readings"] == record["readings"]


def test_a_kill_and_other_cuts_change_no_reading(make_plan):
    rows = {"a": {**HASTE, "watch": [FLAT, ANGLE], "milestones": [16]}}
    plan = make_plan(runs=rows, runtime={**QUICK, "save_every": 2})
    train_to(plan, "a", 16)
    expected, records = tensors(plan, "a", 16), watched(plan, "a", 16)
    remove_states(plan, "a")
    assert killed(plan, plan.state("a", 16), LATER)
    train_to(plan, "a", 16)
    assert_same(tensors(plan, "a", 16), expected)
    assert watched(plan, "a", 16) == records
    remove_states(plan, "a")
    cut = make_plan(runs={"a": {**rows["a"], "milestones": [3, 9, 16]}}, runtime=QUICK)
    train_to(cut, "a", 3, 9, 16)
    assert_same(tensors(cut, "a", 16), expected)
    assert watched(cut, "a", 16) == records


def test_who_begins_to_watch_late_reads_late_and_says_since_when(make_plan):
    train_to(make_plan(runs={"a": HASTE}, runtime=QUICK), "a", 8)
    plan = make_plan(runs={"a": {**HASTE, "watch": FLAT, "milestones": [8, 12, 16]}}, runtime=QUICK)
    train_to(plan, "a", 12)
    record = watched(plan, "a", 12)["plateau", "features"]
    assert (record["since"], record["readings"]) == (8, [])  # step 11 has seen three steps, and the average needs four
    idle = make_plan(runs={"a": {**HASTE, "milestones": [8, 12, 16, 20]}}, runtime=QUICK)
    train_to(idle, "a", 16)  # nobody watches, and what was read is carried on
    assert watched(idle, "a", 16) == {key: {**r, "since": 8} for key, r in watched(plan, "a", 12).items()}
    again = make_plan(runs={"a": {**HASTE, "watch": FLAT, "milestones": [8, 12, 16, 20, 24]}}, runtime=QUICK)
    train_to(again, "a", 24)
    record = watched(again, "a", 24)["plateau", "features"]
    assert (record["since"], [r["step"] for r in record["readings"]]) == (16, [20, 23])


def test_a_trunk_is_watched_if_one_of_its_runs_asks_and_a_term_as_long_as_it_is_aligned(make_plan):
    rows = {"plain": HASTE, "watched": {**HASTE, "stop": {"features": 12}, "watch": FLAT}, "vanilla": {}}
    plan = make_plan(runs=rows, runtime=QUICK)
    assert [kind for kind, _ in plan.segment(plan.state("plain", 8)).watches] == ["features", "attention"]
    assert not plan.segment(plan.state("plain", 16)).watches and not plan.segment(plan.state("vanilla", 8)).watches
    assert [kind for kind, _ in plan.segment(plan.state("watched", 16)).watches] == ["attention"]
    train_to(plan, "watched", 16)
    found = watched(plan, "watched", 16)
    steps = {kind: [r["step"] for r in found["plateau", kind]["readings"]] for kind in ("features", "attention")}
    assert steps == {"features": [8, 11], "attention": [8, 11, 14]}
    names = load_file(plan.path(plan.state("watched", 16)))
    assert [name.split("/")[1] for name in names if name.startswith("watched/")] == ["attention"]


def test_beyond_a_triggers_first_step_the_fork_of_a_watched_copy_that_never_stops_branches_and_reads(make_plan):
    """As the message says that refuses the fork of the run itself."""
    rows = {"stopped": {**HASTE, "stop": FLAT}, "copy": {**HASTE, "watch": FLAT, "milestones": [12]}}
    plan = make_plan(runs=rows, forks={"F": {"run": "copy", "at": [9, 12], "for": 2}}, runtime=QUICK)
    train_to(plan, "copy", 9, 12)
    assert [r["step"] for r in watched(plan, "copy", 12)["plateau", "features"]["readings"]] == [8, 11]
    for side in ("aligned", "stopped"):
        for step in (9, 12):
            begins = plan.segment(plan.state(f"F@{step}-{side}", step + 2)).parent
            assert begins == plan.state("copy", step)


def test_what_a_later_row_watches_of_steps_that_it_shares_is_read_once_and_both_rows_find_it(make_plan):
    stop = {**FLAT, "after": 6, "margin": 1}  # fires at 12
    rows = {"sudden": {**HASTE, "stop": stop}, "slow": {**HASTE, "stop": {**stop, "release": 0.5}, "watch": [ANGLE]}}
    plan = make_plan(runs=rows, runtime=QUICK)
    train_to(plan, "sudden", 8, 16)
    (at,) = {one.step for one in stops.along(plan, "sudden", 0).values()}
    early, asked = watched(plan, "sudden", 8)["gradient-angle", "features"], []
    with pytest.MonkeyPatch.context() as patch:
        whole = Angles.values
        patch.setattr(Angles, "values", lambda self, done, *more: asked.append(done) or whole(self, done, *more))
        train_to(plan, "slow", 8, 16)
    assert [r["step"] for r in early["readings"]] == [8] and min(asked, default=99) > at
    for row in rows:
        (found,) = (
            r for k, r in stops.records(plan, row, 0) if k == "features" and r["trigger"]["trigger"] == "gradient-angle"
        )
        assert found["readings"][:1] == early["readings"], row


def test_a_watch_may_be_one_or_several_and_of_defaults_and_is_priced(make_plan):
    plan = make_plan(
        defaults={"model": "dot", "milestones": [16], "sampling": ["quick"], "watch": FLAT},
        runs={"a": HASTE, "b": {**HASTE, "watch": [FLAT, ANGLE]}, "vanilla": {}},
    )
    rows = plan.config.runs
    assert (len(rows["a"].watch), len(rows["b"].watch)) == (1, 2)
    assert "vanilla: watch has no effect: nothing is aligned" in plan.notes
    segment = plan.segment(plan.state("b", 16))
    assert cost.angle_flops(plan, segment) > 0
    assert cost.angle_flops(Plan(plan.config.model_copy(update={"runs": {"a": rows["a"]}})), segment) > 0
    only = Plan(plan.config.model_copy(update={"runs": {"a": rows["a"]}}))
    assert cost.angle_flops(only, only.segment(only.state("a", 16))) == 0
    late = Plan(
        config.resolve(
            {**plan.config.model_dump(), "runs": {"a": {**rows["a"].model_dump(), "watch": {**ANGLE, "after": 16}}}}
        )
    )
    assert cost.angle_flops(late, late.segment(late.state("a", 16))) == 0


class Fails(Trigger):
    """A trigger of others that fails when it is asked."""

    @property
    def needs(self):
        return {"last": Average("denoising", 0.0)}

    def decide(self, step, history):
        raise RuntimeError("asked")


def test_who_only_watches_is_not_asked(make_plan, monkeypatch):
    monkeypatch.setitem(TRIGGERS, "fails", Fails)
    plan = make_plan(runs={"a": {**HASTE, "watch": {"trigger": "fails", "every": 4}}}, runtime=QUICK)
    train_to(plan, "a", 8)
    assert len(watched(plan, "a", 8)["fails", "features"]["readings"]) == 2


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ([FLAT, FLAT], "runs.a.watch: plateau is there more than once with the same settings"),
        ({**FLAT, "release": 0.1}, "runs.a.watch: plateau has a release, but a trigger under watch stops nothing"),
        ({**FLAT, "evry": 3}, "runs.a.watch.0: unknown key 'evry'; did you mean 'every'"),
        ({**ANGLE, "block": 7}, "runs.a.watch.0.block: 7, but the network has blocks 1 to 2"),
        ({"trigger": "platau"}, "runs.a.watch.0: nothing is called 'platau'; did you mean 'plateau'"),
        (3, "runs.a.watch: "),
    ],
)
def test_a_watch_that_cannot_be_is_refused_by_its_key(make_plan, watch, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        make_plan(runs={"a": {**HASTE, "watch": watch}})


def test_a_watch_with_too_many_readings_for_a_header_is_refused(make_plan):
    with pytest.raises(ValueError, match=r"runs\.a\.watch\.0\.every: 1 makes 400,000 readings"):
        make_plan(runs={"a": {**HASTE, "milestones": [400_000], "watch": {"trigger": "plateau", "every": 1}}})
