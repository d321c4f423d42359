"""States are named by trajectory, never by cuts: what shares a name, and what does not."""

import copy
import gc
import itertools
import math
import weakref
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from haste import config
from haste.align import schedule
from haste.ops import cost
from haste.ops.pace import Pace
from haste.plan.names import State
from haste.plan.plan import Plan

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())


def plan_of(**changes):
    return Plan(config.resolve({**copy.deepcopy(TINY), **changes}))


def plan_of_runs(**runs):
    return plan_of(runs=runs)


def path_of(plan, run, step):
    return plan.path(plan.state(run, step))


def test_runs_that_stop_at_different_steps_share_their_trunk_and_only_that():
    plan = plan_of_runs(
        never={"alignment": "HASTE"}, early={"alignment": "HASTE", "stop": 6}, late={"alignment": "HASTE", "stop": 12}
    )
    for step in range(1, 7):
        assert path_of(plan, "never", step) == path_of(plan, "early", step) == path_of(plan, "late", step)
    for step in range(7, 13):
        assert path_of(plan, "never", step) == path_of(plan, "late", step) != path_of(plan, "early", step)
    assert len({path_of(plan, run, 13) for run in ("never", "early", "late")}) == 3


def test_the_state_at_the_stop_is_the_trunks_and_the_branch_starts_from_it():
    plan = plan_of_runs(early={"alignment": "HASTE", "stop": 6})
    segment = plan.segment(plan.state("early", 8))
    assert segment.parent == plan.state("early", 6)
    assert segment.parent.trajectory != segment.state.trajectory
    assert segment.terms == {}
    assert segment.teachers == []
    assert set(plan.segment(segment.parent).terms) == {"features", "attention"}


def test_terms_with_stops_of_their_own_leave_one_by_one():
    plan = plan_of_runs(a={"alignment": "HASTE", "stop": {"attention": 4, "features": 10}, "milestones": [16]})
    cuts = [state.step for state in sorted(plan.planned(), key=lambda state: state.step)]
    assert cuts == [4, 10, 16]
    assert [sorted(plan.segment(plan.state("a", step)).terms) for step in cuts] == [
        ["attention", "features"],
        ["features"],
        [],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": {"threads": 2, "save_every": 5, "log_every": 3, "keep_every": 7, "sample_batch": 3}},
        {"sampling": {"quick": {"sampler": "heun", "steps": 3, "count": 30}}},
        {"defaults": {"model": "dot", "milestones": [3, 8, 11, 16], "sampling": ["quick"]}},
        {"name": "another", "title": "x", "description": "y"},
        {"detector": {"other": {"trained": {"steps": 9}}}},
        {"images": {**TINY["images"], "shards": 5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_decide_a_state_does_not_show_in_its_name(change):
    before, after = plan_of(), plan_of(**change)
    for run in before.config.runs:
        assert path_of(before, run, 16) == path_of(after, run, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"training": {**TINY["training"], "lr": 2e-3}},
        {"training": {**TINY["training"], "batch": 4}},
        {"images": {**TINY["images"], "holdout": 98}},
        {"autoencoder": {**TINY["autoencoder"], "dtype": "float16"}},
        {"models": {"dot": {**TINY["models"]["dot"], "depth": 3}}},
        {"defaults": {**TINY["defaults"], "seed": 1}},
        {"defaults": {**TINY["defaults"], "training": {"class_dropout": 0.2}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_a_state_decides_its_name(change):
    before, after = plan_of(), plan_of(**change)
    assert not {path_of(before, run, 16) for run in before.config.runs} & {
        path_of(after, run, 16) for run in after.config.runs
    }


TWO = {**TINY["detector"], "wide": {"trained": {"steps": 2, "batch": 8, "width": 16}}}


def test_a_second_detector_renames_nothing_that_is_there():
    before, after = plan_of(), plan_of(detector=TWO)
    assert list(before.evaluations) == list(after.evaluations)
    assert set(before.shown) < set(after.shown)
    for name, evaluation in before.evaluations.items():
        assert evaluation.judgements == after.evaluations[name].judgements[:1]
        assert evaluation.sample_files == after.evaluations[name].sample_files
    assert (before.floor, before.reference) == (after.floor, after.reference)


def test_the_first_detector_leads_and_all_have_names_of_their_own():
    plan, turned = plan_of(detector=TWO), plan_of(detector=dict(reversed(TWO.items())))
    assert (plan.detector.name, turned.detector.name) == ("cnn", "wide")
    assert set(plan.shown) == set(turned.shown)
    for evaluation in plan.evaluations.values():
        mine = evaluation.judgements
        assert evaluation.score == mine[0].score and [one.detector.name for one in mine] == ["cnn", "wide"]
        assert len({one.features.folder for one in mine} | {one.score for one in mine}) == 4
    assert len({path for detector in plan.detectors.values() for path in (detector.floor, detector.reference.key)}) == 4


def test_a_public_detector_is_named_by_its_name_and_its_file_of_weights():
    images = {**TINY["images"], "resolution": 32}

    def looks(**public):
        return plan_of(images=images, detector={"x": {"pretrained": public}}).detector.looks

    assert looks(name="inception").startswith("inception-")
    found = [looks(name="inception"), looks(name="inception", weights="a"), looks(name="DINOv2-L", weights="a")]
    assert len(set(found)) == 3
    assert plan_of(images=images, detector={"y": {"pretrained": {"name": "inception"}}}).detector.looks == found[0]


def test_the_plan_says_what_features_of_every_detector_take_on_disk():
    images = {**TINY["images"], "resolution": 32}
    plan = plan_of(images=images, detector={**TINY["detector"], "fid": {"pretrained": {"name": "inception"}}})
    # 8 channels make 32 features, and 10 classes; Inception gives 2,048 + 2,023 + 1,008 numbers; a label is 8 bytes.
    assert [plan.feature_bytes(one) for one in plan.detectors.values()] == [4 * 42 + 8, 4 * 5079 + 8]


def test_a_reference_file_is_named_by_its_content_and_renames_scores_and_not_features(tmp_path):
    images = {**TINY["images"], "resolution": 32}

    def plan(file=None):
        detector = {"pretrained": {"name": "inception"}, "reference": file and str(tmp_path / file)}
        return plan_of(images=images, detector={"x": detector}, results=str(tmp_path / "results"))

    for name, content in {"a": "one", "b": "one", "c": "two"}.items():
        (tmp_path / name).write_text(content)
    store, a, b, c = plan(), plan("a"), plan("b"), plan("c")
    assert a.reference == b.reference and a.shown == b.shown
    assert len({made.reference.folder for made in (store, a, c)}) == len({made.floor for made in (store, a, c)}) == 3
    for evaluations in zip(*(made.evaluations.values() for made in (store, a, c)), strict=True):
        assert len({one.features.folder for one in evaluations}) == 1
        assert len({one.score for one in evaluations}) == 3


def test_a_teacher_matters_only_to_the_runs_that_look_at_it():
    other = {"vit": {"trained": {**TINY["teachers"]["vit"]["trained"], "steps": 3}}}
    before, after = plan_of(), plan_of(teachers=other)
    assert path_of(before, "vanilla", 16) == path_of(after, "vanilla", 16)
    assert path_of(before, "REPA", 16) != path_of(after, "REPA", 16)


def test_an_alignment_that_stops_at_step_0_is_vanilla():
    plan = plan_of_runs(vanilla={}, zero={"alignment": "HASTE", "stop": 0})
    assert path_of(plan, "vanilla", 16) == path_of(plan, "zero", 16)


def test_each_seed_is_a_trajectory_of_its_own_and_has_the_name_it_would_have_alone():
    several = plan_of_runs(a={"alignment": "HASTE", "stop": 6, "seeds": [0, 2]})
    for seed in (0, 2):
        alone = plan_of_runs(b={"alignment": "HASTE", "stop": 6, "seed": seed})
        for step in (3, 6, 8, 16):
            assert several.path(several.state("a", step, seed)) == path_of(alone, "b", step)
        own = [row.evaluation for row in several.rows if row.seed == seed]
        assert [e.score for e in own] == [row.evaluation.score for row in alone.rows]
        assert {e.sampling.seed for e in own} == {0}
    assert several.state("a", 8) == several.state("a", 8, 0) != several.state("a", 8, 2)
    assert len({row.evaluation.score for row in several.rows}) == len(several.rows) == 4


def test_only_the_first_seed_has_pictures():
    plan = plan_of_runs(a={"seeds": [3, 1]})
    grids = [path for path in plan.shown if path.endswith("grid.png")]
    assert grids == [row.evaluation.grid for row in plan.rows if row.seed == 3]


def test_samples_of_chosen_classes_are_shown_of_the_first_seed_and_never_scored():
    ways = {**TINY["sampling"], "pictures": {"sampler": "euler", "steps": 2, "labels": [7, 2, 5]}}
    plan = plan_of(sampling=ways, runs={"a": {"seeds": [3, 1], "sampling": ["quick", "pictures"], "milestones": [8]}})
    shown = [(row.evaluation, row.seed) for row in plan.rows if row.evaluation.sampling_name == "pictures"]
    ((evaluation, seed),) = shown
    assert (seed, evaluation.sampling.count) == (3, 12)  # four of each
    assert evaluation.grid in plan.shown and evaluation.score not in plan.shown
    scored = {path for path in plan.shown if "/scores/" in path and "floor" not in path and "reconstructed" not in path}
    assert scored == {row.evaluation.score for row in plan.rows if row.evaluation is not evaluation}
    assert "sampling.pictures: samples of chosen classes are shown and not scored" in plan.notes
    found = {stage.name: stage.jobs for stage in cost.stages(plan)[0]}
    assert (found["sample"], found["score"]) == (3, 2)
    measured = {"m": {"measure": "gradient-cosine"}}
    run = {"alignment": "HASTE", "seeds": [3, 1], "sampling": ["pictures"], "measures": ["m"], "milestones": [8]}
    assert [row.seed for row in plan_of(sampling=ways, measures=measured, runs={"a": run}).measured] == [3, 1]


def test_other_chosen_classes_or_another_order_are_other_samples_and_what_existed_keeps_its_name():
    def names(**labels):
        plan = plan_of(sampling={"quick": {**TINY["sampling"]["quick"], **labels}}, runs={"vanilla": {}})
        return {row.evaluation.name for row in plan.rows}

    assert names() == names(labels="balanced")
    others = [names(labels=found) for found in ("balanced", "random", [1, 2], [2, 1], [1])]
    assert len(set.union(*others)) == sum(map(len, others))


def test_the_demo_with_three_seeds_shares_stores_parts_and_the_states_of_seed_0_with_the_demo():
    demo, seeds = (Plan(config.load(ROOT / "config" / f"{name}.yaml")) for name in ("digits", "digits-seeds"))
    for made in ("images", "latents", "autoencoder", "detector", "reference", "teachers"):
        assert getattr(demo, made) == getattr(seeds, made)
    assert {row.seed for row in seeds.rows} == {0, 1, 2}
    first = {row.evaluation.score for row in seeds.rows if row.seed == 0}
    assert first and first <= {row.evaluation.score for row in demo.rows}


def test_a_ramp_leaves_the_trunk_where_it_begins_and_the_stop_leaves_the_ramp():
    ramp = {"features": 5, "shape": "linear"}
    plan = plan_of_runs(
        never={"alignment": "HASTE"},
        sharp={"alignment": "HASTE", "stop": 12},
        soft={"alignment": "HASTE", "stop": 12, "ramp": ramp},
    )
    for step in range(1, 8):
        assert path_of(plan, "soft", step) == path_of(plan, "never", step)
    for step in (8, 12, 13, 16):
        assert len({path_of(plan, run, step) for run in ("soft", "never", "sharp")}) == 2 + (step > 12)
    cuts = [plan.segment(plan.state("soft", step)) for step in (7, 12, 16)]
    assert [(s.start, s.state.step) for s in cuts] == [(0, 7), (8, 12), (12, 16)]  # 8 is a milestone
    assert [s.terms.get("features", {}).get("ramp") for s in cuts] == [
        None,
        {"from": 7, "to": 12, "shape": "linear"},
        None,
    ]
    assert cuts[1].terms["attention"]["ramp"] is None and cuts[2].terms == {}


PLATEAU = {"trigger": "plateau", "after": 6, "every": 2, "fast": 0.5, "slow": 0.75}


def test_a_run_with_a_trigger_leaves_the_trunk_where_it_begins_to_watch_and_aligns_as_far_as_the_plan_can_know():
    plan = plan_of_runs(
        never={"alignment": "HASTE"},
        seen={"alignment": "HASTE", "stop": PLATEAU},
        one={"alignment": "HASTE", "stop": {"features": PLATEAU, "attention": 10}},
    )
    for step in range(1, 7):
        assert path_of(plan, "seen", step) == path_of(plan, "one", step) == path_of(plan, "never", step)
    for step in (7, 16):
        assert len({path_of(plan, run, step) for run in ("seen", "one", "never")}) == 3
    segments = [plan.segment(plan.state("seen", step)) for step in (6, 8, 16)]
    assert [(s.start, s.state.step, sorted(s.terms)) for s in segments] == [
        (0, 6, ["attention", "features"]),
        (6, 8, ["attention", "features"]),
        (8, 16, ["attention", "features"]),
    ]
    assert [s.terms["features"]["trigger"] for s in segments[:2]] == [None, {**PLATEAU, "margin": 0.02}]
    assert [sorted(plan.segment(plan.state("one", step)).terms) for step in (10, 16)] == [
        ["attention", "features"],
        ["features"],
    ]
    mine = {plan.state(run, step).trajectory for run in ("seen", "one") for step in (8, 16)}
    assert mine <= set(plan.trained(aligned=True))  # whose jobs ask for an aligned job's resources


WATCHES = st.builds(
    lambda after, every: {**PLATEAU, "after": after, "every": every}, st.integers(0, 9), st.integers(1, 2)
)


def seen_so_far(stops, step):
    """What decides a state after some steps: of each step and loss whether it is off, on, or watched and by what."""
    found = []
    for done in range(step):
        for stop in stops:
            watched = isinstance(stop, dict) and done >= stop["after"]
            off = isinstance(stop, int) and done >= stop
            found.append(None if off else (stop["after"], stop["every"]) if watched else "on")
    return tuple(found)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.tuples(*[st.none() | st.integers(1, 9) | WATCHES] * 2), min_size=1, max_size=4),
    milestones=st.lists(st.integers(1, 10), min_size=1, max_size=3, unique=True).map(sorted),
)
def test_states_have_one_name_exactly_where_what_was_aligned_and_watched_so_far_is_the_same(rows, milestones):
    runs = {
        f"run{i}": {"alignment": "HASTE", "milestones": milestones, "stop": dict(zip(KINDS, stops, strict=True))}
        for i, stops in enumerate(rows)
    }
    plan, by_name, by_history = plan_of_runs(**runs), {}, {}
    for run, stops in zip(runs, rows, strict=True):
        for step in range(1, milestones[-1] + 1):
            name, history = path_of(plan, run, step), seen_so_far(stops, step)
            assert by_name.setdefault(name, history) == history
            assert by_history.setdefault(history, name) == name
        state = plan.state(run, milestones[-1])
        while state is not None:  # of every step, what is watched is known where it is trained
            segment = plan.segment(state)
            for step in range(segment.start, state.step):
                for kind, found in zip(KINDS, seen_so_far(stops, step + 1)[-2:], strict=True):
                    term = segment.terms.get(kind)
                    trigger = term and term["trigger"]
                    assert found == (term and ((trigger["after"], trigger["every"]) if trigger else "on"))
            state = segment.parent
        assert segment.start == 0


@pytest.mark.parametrize("change", [{"after": 5}, {"every": 3}, {"fast": 0.4}, {"slow": 0.8}, {"margin": 0.5}])
def test_every_key_of_a_trigger_decides_the_states_it_watches_and_no_others(change):
    plan = plan_of_runs(
        a={"alignment": "HASTE", "stop": PLATEAU}, b={"alignment": "HASTE", "stop": {**PLATEAU, **change}}
    )
    assert path_of(plan, "a", 5) == path_of(plan, "b", 5)
    assert path_of(plan, "a", 7) != path_of(plan, "b", 7)


def test_one_trigger_stands_for_both_losses_in_defaults_and_a_row_has_its_own():
    defaults = {**TINY["defaults"], "stop": PLATEAU}
    rows = {"both": {"alignment": "HASTE"}, "step": {"alignment": "HASTE", "stop": {"features": 3}}, "REPA": {}}
    found = plan_of(defaults=defaults, runs={**rows, "REPA": {"alignment": "REPA"}}).config.runs
    assert found["both"].stop.features == found["both"].stop.attention == found["REPA"].stop.features
    assert (found["step"].stop.features, found["step"].stop.attention) == (3, None)
    assert found["REPA"].stop.attention is None


def test_a_trigger_that_cannot_decide_before_the_end_is_allowed_and_said():
    plan = plan_of_runs(a={"alignment": "REPA", "stop": {**PLATEAU, "slow": 0.95}})
    (note,) = plan.notes
    assert note.startswith("a: step 26, where plateau first decides on features, lies beyond the last milestone 16")
    assert note.endswith(
        "it stops nothing yet, but the last 10 steps are trained again, although equal to those of the run without it"
    )
    plan = plan_of_runs(never={"alignment": "REPA"}, a={"alignment": "REPA", "stop": {**PLATEAU, "slow": 0.95}})
    assert sum(path_of(plan, "never", step) != path_of(plan, "a", step) for step in range(1, 17)) == 10
    (note,) = plan_of_runs(a={"alignment": "REPA", "stop": {**PLATEAU, "after": 16}}).notes
    assert note.endswith("lies beyond the last milestone 16: it has no effect yet")
    assert not plan_of_runs(a={"alignment": "REPA", "stop": PLATEAU}).notes


def test_the_plan_says_of_each_run_how_far_it_shares_a_trunk():
    plan = plan_of_runs(
        never={"alignment": "HASTE"},
        late={"alignment": "HASTE", "stop": 12},
        early={"alignment": "HASTE", "stop": {"features": 3, "attention": 12}},
        alone={"alignment": "REPA"},
        short={"alignment": "HASTE", "stop": 12, "milestones": [8]},  # and nothing of the branch behind its stop
        other={"alignment": "HASTE", "stop": 12, "milestones": [4], "seed": 1},
    )
    trunk = plan.state("never", 3).trajectory
    assert cost.shared_trunks(plan) == [
        f"never and late share {trunk} up to step 12, short up to step 8, early up to step 3: it is trained once."
    ]


def test_the_time_of_an_adaptive_sampler_is_not_made_up():
    ways = {"quick": {"sampler": "euler", "steps": 2}, "free": {"sampler": "dopri5"}}
    plan = plan_of(sampling=ways, runs={"vanilla": {"sampling": ["quick", "free"]}})
    seconds = {e.sampling_name: cost.sampling_seconds(plan, e, Pace(1e9, 1, 1)) for e in plan.evaluations.values()}
    assert seconds["quick"] > 0 and seconds["free"] is None
    stage = cost._sampling_stage(plan, Pace(1e9, 1, 1))
    assert stage.seconds > 2 * seconds["quick"] and stage.unknown  # at two milestones, and features
    assert stage.time.endswith("+ unknown")


def test_labels_are_not_part_of_a_name():
    renamed = copy.deepcopy(TINY)
    renamed["models"] = {"point": renamed["models"]["dot"]}
    renamed["defaults"]["model"] = "point"
    renamed["runs"] = {"my row": renamed["runs"]["HASTE-12"]}
    assert path_of(Plan(config.resolve(renamed)), "my row", 16) == path_of(plan_of(), "HASTE-12", 16)


def test_a_stop_beyond_the_last_milestone_is_allowed_and_said():
    plan = plan_of_runs(a={"alignment": "HASTE", "stop": 99})
    assert max(state.step for state in plan.planned()) == 16
    assert "a: stop of features at step 99 lies beyond the last milestone 16" in "\n".join(plan.notes)


def test_a_state_is_made_from_the_nearest_earlier_one_that_is_planned_or_on_disk(tmp_path):
    plan = plan_of(results=str(tmp_path))
    state = plan.state("vanilla", 16)
    assert plan.segment(state).parent == State(state.trajectory, 8)
    folder = Path(plan.path(state)).parent
    folder.mkdir(parents=True)
    (folder / "step-00000011.safetensors").touch()
    (folder / "step-00000021.safetensors").touch()
    plan = plan_of(results=str(tmp_path))
    assert plan.segment(state).parent == State(state.trajectory, 11)


@pytest.mark.parametrize("order", list(itertools.permutations(["early", "late", "never"])))
def test_the_order_of_the_rows_changes_no_segment(order):
    runs = {"early": {"stop": 6}, "late": {"stop": 12}, "never": {}}
    plan = plan_of_runs(**{name: {"alignment": "HASTE", "milestones": [16], **runs[name]} for name in order})
    assert plan.segment(plan.state("never", 16)).parent == plan.state("late", 12)
    assert plan.segment(plan.state("late", 12)).parent == plan.state("early", 6)
    assert plan.segment(plan.state("early", 6)).parent is None


def test_a_plan_that_nobody_holds_is_freed_at_once():
    plan = plan_of()
    state = plan.state("vanilla", 16)
    assert plan.segment(state).parent.step == 8 and plan.image_count == 1797
    held = [weakref.ref(one) for one in (plan, plan.trajectories[state.trajectory], plan.images)]
    gc.disable()
    try:
        del plan
        assert [one() for one in held] == [None] * 3
    finally:
        gc.enable()


def test_two_stretches_of_one_trajectory_are_trained_one_after_the_other(tmp_path):
    plan = plan_of(results=str(tmp_path))
    folder = Path(plan.path(plan.state("vanilla", 16))).parent
    folder.mkdir(parents=True)
    for step in (8, 16):
        (folder / f"step-{step:08d}.safetensors").touch()
    plan = plan_of(results=str(tmp_path), runs={"vanilla": {"milestones": [8, 14, 16, 24]}})
    segment = plan.segment(plan.state("vanilla", 24))
    assert (segment.parent.step, segment.after.step) == (16, 14)
    assert plan.segment(plan.state("vanilla", 14)).after is None


def test_a_state_that_no_run_passes_through_is_refused_by_name():
    plan = plan_of_runs(early={"alignment": "HASTE", "stop": 6})
    trunk = plan.state("early", 6).trajectory
    assert plan.parse(f"{trunk}/00000006") == State(trunk, 6)
    for wrong in ["nonsense/00000006", trunk, f"{trunk}/six", f"{trunk}/00000007"]:
        with pytest.raises(ValueError, match="state "):
            plan.parse(wrong)


@settings(deadline=None)
@given(
    stops=st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=5),
    milestones=st.lists(st.integers(1, 30), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_every_milestone_is_reached_by_a_chain_of_planned_states_that_starts_at_nothing(stops, milestones):
    runs = {
        f"run{i}": {"alignment": "HASTE", "stop": stop, "milestones": milestones}
        if stop is not None
        else {"alignment": "HASTE", "milestones": milestones}
        for i, stop in enumerate(stops)
    }
    plan = plan_of_runs(**runs)
    planned = set(plan.planned())
    for run, stop in zip(runs, stops, strict=True):
        for milestone in milestones:
            state, steps = plan.state(run, milestone), []
            while state is not None:
                assert state in planned
                segment = plan.segment(state)
                steps.append(state.step)
                # Within a segment the set of active terms never changes.
                aligned = {stop is None or step < stop for step in range(segment.start, state.step)}
                assert aligned == {bool(segment.terms)}
                state = segment.parent
            assert steps == sorted(set(steps), reverse=True)


KINDS = ("features", "attention")
ENDS = st.none() | st.tuples(st.integers(0, 14), st.none() | st.integers(2, 14)).filter(
    lambda end: end[1] is None or end[1] <= end[0]
)


def weights_by_hand(ends, shape, step):
    """What the terms' weights are multiplied by at a step; None where a term is off."""
    found = []
    for stop, ramp in (end or (None, None) for end in ends):
        if stop is not None and step >= stop:
            found.append(None)
        elif ramp is None or step <= stop - ramp:
            found.append(1.0)
        else:
            share = (step - (stop - ramp)) / ramp
            found.append(1 - share if shape == "linear" else math.cos(math.pi * share / 2) ** 2)
    return found


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(ENDS, ENDS, st.sampled_from(["linear", "cosine"])), min_size=1, max_size=4),
    milestones=st.lists(st.integers(1, 16), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_equal_names_mean_equal_weights_so_far_and_segments_train_with_them(rows, milestones):
    runs = {}
    for i, (*ends, shape) in enumerate(rows):
        given_ends = {kind: end for kind, end in zip(KINDS, ends, strict=True) if end is not None}
        stop = {kind: end[0] for kind, end in given_ends.items()}
        ramp = {kind: end[1] for kind, end in given_ends.items() if end[1] is not None}
        runs[f"run{i}"] = {
            "alignment": "HASTE",
            "milestones": milestones,
            "stop": stop,
            "ramp": {**ramp, "shape": shape},
        }
    plan, last = plan_of_runs(**runs), milestones[-1]
    so_far = {}
    for run, (*ends, shape) in zip(runs, rows, strict=True):
        # One name, one history of weights, whichever run asks. (The first step of a ramp still weighs 1.)
        for step in range(1, last + 1):
            history = [weights_by_hand(ends, shape, s) for s in range(step)]
            assert so_far.setdefault(path_of(plan, run, step), history) == history
            # Up to its first fall a run is on the trunk of the run that never stops.
            falls = [end[0] - (end[1] or 0) for end in ends if end is not None]
            if all(fall > 0 and step <= fall for fall in falls):
                terms = plan.trajectories[plan.state(run, step).trajectory].recipe["terms"]
                assert [term["active"] for term in terms.values()] == [[0, None], [0, None]]
                assert history == [[1.0, 1.0]] * step
        # Walking back from each milestone, every step is trained with its own weights.
        for milestone in milestones:
            state = plan.state(run, milestone)
            while state is not None:
                segment = plan.segment(state)
                for step in range(segment.start, state.step):
                    terms = [segment.terms.get(kind) for kind in KINDS]
                    found = [None if term is None else schedule.factor(step, term) for term in terms]
                    assert found == pytest.approx(weights_by_hand(ends, shape, step))
                state = segment.parent
            assert segment.start == 0


@pytest.mark.parametrize(("file", "name"), [("digits", "917b4ed3b24d"), ("digits-seeds", "e3d66951e453")])
def test_new_keys_at_their_defaults_leave_the_names_of_reports_that_people_have(file, name):
    raw = yaml.safe_load((ROOT / "config" / f"{file}.yaml").read_text())
    assert Plan(config.resolve(raw)).report_made == f"results/{file}/report/made-{name}.json"


def test_weights_that_change_under_their_path_give_new_names_and_are_named(tmp_path):
    file = tmp_path / "dino.pth"
    file.write_bytes(b"first")
    teachers = {"vit": {"pretrained": {"name": "DINOv2-B", "weights": str(file)}}}

    def plan():
        return plan_of(results=str(tmp_path / "results"), teachers=teachers, runs={"REPA": {"alignment": "REPA"}})

    first = plan()
    assert str(plan().state("REPA", 8)) == str(first.state("REPA", 8)) and not plan().notes
    file.write_bytes(b"other")
    assert str(plan().state("REPA", 8)) != str(first.state("REPA", 8))
    (note,) = plan().notes
    assert note.startswith(f"{file}: was changed since results were first made with it")
    file.write_bytes(b"first")
    assert str(plan().state("REPA", 8)) == str(first.state("REPA", 8)) and not plan().notes
    file.unlink()
    assert str(plan().state("REPA", 8)) == str(first.state("REPA", 8))
