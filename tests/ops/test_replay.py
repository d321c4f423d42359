"""When triggers with other settings would have stopped a term; what happened is said again, what is not known too."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import haste
from haste.align import angle, triggers
from haste.align.triggers import GradientAngle, Plateau, Reading
from haste.cli import main as cli
from haste.files.provenance import read_header
from haste.ops import replay, sources
from haste.ops.replay import grid, outcomes
from haste.ops.sources import Source, published
from haste.train import loop, stops

PUBLISHED = Path(haste.__file__).parent / "report/published/gradient_cosine_haste.csv"
QUICK = {"save_every": 3, "log_every": 1, "trackers": []}
STOPS = {"trigger": "plateau", "after": 4, "every": 2, "fast": 0.2, "slow": 0.5, "margin": 0.05}
NEVER = {**STOPS, "margin": 0}
ANGLE = {"trigger": "gradient-angle", "after": 4, "every": 4, "threshold": -1, "images": 12, "shards": 3}


def trained(plan, *runs):
    for run in runs:
        loop.train(plan, plan.state(run, 16))
    return plan


def of(plan, run="a", **asked):
    return outcomes(sources.of_run(plan, run, 0), {name.replace("_", "-"): each for name, each in asked.items()})


def said(found, **where):
    """Term -> where it stops, of the outcomes with these attributes."""
    return {one.source.term: one.step for one in found if all(getattr(one, k) == v for k, v in where.items())}


# -- published ---------------------------------------------------------------------------------------------------------


def test_of_the_published_readings_the_small_model_stops_where_the_paper_says_and_the_large_one_never():
    (small,), (large,) = (outcomes(published(PUBLISHED, model), {}) for model in ("SiT-B/2", "SiT-XL/2"))
    assert (small.step, small.settings["threshold"], small.settings["times"]) == (80_000, -0.05, [0.02, 0.1, 0.5, 0.8])
    assert small.shown["mean"] == pytest.approx(-0.0668, abs=5e-5)  # as the reply prints it
    assert small.decision.reason == "the gradients' cosine -0.0668 is below -0.05"
    assert large.step is None and large.settings["times"] == [0.02, 0.1, 0.5, 0.9]
    assert [one.step for one in large.history] == [100_000, 200_000, *range(250_000, 300_000, 10_000)]


def test_means_that_the_table_prints_are_those_that_are_read():
    with open(PUBLISHED) as file:
        printed = {int(r["iteration"]): float(r["cosine"]) for r in csv.DictReader(file) if r["t"] == "mean"}
    (small,) = outcomes(published(PUBLISHED, "SiT-B/2"), {})
    found = {one.step: one.values["mean"] for one in small.history}
    assert found == pytest.approx(printed, abs=6e-5) and len(found) == 4


def test_other_settings_of_a_published_table_every_combination():
    asked = grid(["gradient-angle.threshold=-0.05,-0.002,0.01", "gradient-angle.patience=1,2"])
    found = outcomes(published(PUBLISHED, "SiT-XL/2"), asked)
    stops_at = {(one.settings["threshold"], one.settings["patience"]): one.step for one in found}
    assert stops_at == {
        **{(-0.05, 1): None, (-0.05, 2): None, (-0.002, 1): 250_000, (-0.002, 2): None},
        **{(0.01, 1): 200_000, (0.01, 2): 250_000},
    }
    # The seven times together, as the appendix averages nothing itself: by hand from the table.
    (all_times,) = outcomes(
        published(PUBLISHED, "SiT-XL/2"), grid(["gradient-angle.times=[0.02,0.05,0.07,0.1,0.2,0.5,0.9]"])
    )
    lowest = min(one.values["mean"] for one in all_times.history)
    assert lowest == pytest.approx(np.mean([-0.0323, -0.0597, -0.0598, -0.0599, -0.0264, 0.0354, 0.0419]))
    every = outcomes(
        published(PUBLISHED, "SiT-B/2"), grid(["gradient-angle.every=30000", "gradient-angle.after=20000"])
    )
    assert [reading.step for reading in every[0].history] == [50_000, 80_000]


# -- a trained run -----------------------------------------------------------------------------------------------------


def test_a_run_replayed_with_its_own_settings_stops_where_it_stopped_and_for_the_same_reason(make_plan):
    own = {"features": STOPS, "attention": {**ANGLE, "threshold": 1, "patience": 2}}
    plan = trained(make_plan(runs={"a": {"alignment": "HASTE", "stop": own}}, runtime=QUICK), "a")
    happened = stops.along(plan, "a", 0)
    assert set(happened) == {"features", "attention"}
    again = [one for one in of(plan) if one.whose == "as run"]
    assert {one.source.term: (one.step, one.decision.reason) for one in again} == {
        kind: (one.step, one.reason) for kind, one in happened.items()
    }
    # Also where the states are gone, from the record beside them, and where that is gone, from the states.
    folder = Path(plan.path(plan.state("a", 16))).parent
    kept = {path: path.read_bytes() for path in folder.glob("step-*")}
    for path in kept:
        path.unlink()
    assert said(of(plan), whose="as run") == {kind: one.step for kind, one in happened.items()}
    for path, content in kept.items():
        path.write_bytes(content)
    (folder / stops.FILE).unlink()
    assert said(of(plan), whose="as run") == {kind: one.step for kind, one in happened.items()}


def test_a_watched_run_says_where_a_run_with_that_trigger_stops(make_plan):
    """The run that stops is trained apart: the replay knows it beforehand."""
    rows = {"a": {"alignment": "HASTE", "watch": NEVER}}
    rows |= {f"m{m}": {"alignment": "HASTE", "stop": {**STOPS, "margin": m}} for m in (0.05, 1)}
    plan = trained(make_plan(runs=rows, runtime=QUICK), *rows)
    found = of(plan, plateau=[{"margin": m} for m in (0.05, 1)])
    for margin in (0.05, 1):
        mine = {one.source.term: one.step for one in found if one.settings["margin"] == margin}
        happened = {kind: one.step for kind, one in stops.along(plan, f"m{margin}", 0).items()}
        assert {kind: step for kind, step in mine.items() if step is not None} == happened
        for one in (one for one in found if one.settings["margin"] == margin):
            record = read_header(plan.path(plan.state(f"m{margin}", 16)))["triggers"][one.source.term]
            read = [Reading(r["step"], {k: v for k, v in r.items() if k != "step"}) for r in record["readings"]]
            assert list(one.history)[: len(read)] == read


def test_without_settings_it_shows_the_runs_own_and_the_defaults_of_what_was_read(make_plan, capsys):
    plan = trained(make_plan(runs={"a": {"alignment": "HASTE", "watch": [NEVER, ANGLE]}}, runtime=QUICK), "a")
    found = [one for one in of(plan) if one.source.term == "features"]
    assert [(one.whose, one.settings["trigger"]) for one in found] == [
        *(("as watched", "plateau"), ("as watched", "gradient-angle")),
        *(("defaults", "plateau"), ("defaults", "gradient-angle")),
    ]
    flat, angles = found[2:]
    assert (flat.settings["margin"], flat.settings["slow"]) == (0.02, 0.5)  # what it was read with stays
    assert (angles.settings["threshold"], angles.settings["images"]) == (-0.05, 12)
    picture = plan.file.with_name("a.svg")
    assert cli.main(["replay", "a", "-c", str(plan.file), "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "When triggers would stop a" in printed and printed.endswith(f"{picture}: drawn\n")
    assert "gradient-angle of features" in picture.read_text() and "plateau of attention" in picture.read_text()


def test_some_of_the_times_that_were_read_make_a_mean_of_their_own(make_plan):
    row = {"alignment": "REPA", "watch": {**ANGLE, "times": [0.1, 0.5, 0.9]}}
    plan = trained(make_plan(runs={"a": row}, runtime=QUICK), "a")
    (found,) = of(plan, gradient_angle=[{"times": [0.1, 0.9], "threshold": 1}])
    (record,) = read_header(plan.path(plan.state("a", 16)))["watched"].values()
    for reading, one in zip(record["readings"], found.history, strict=True):
        assert one.values["mean"] == pytest.approx((reading["t=0.1"] + reading["t=0.9"]) / 2, rel=1e-12)
        assert one.values["error"] == pytest.approx((reading["t=0.1 error"] + reading["t=0.9 error"]) / 2, rel=1e-12)
        assert one.values["t=0.9"] == reading["t=0.9"]
    (same,) = of(plan, gradient_angle=[{"sure": 1.5}])
    assert [one.values["error"] for one in same.history] == [reading["error"] for reading in record["readings"]]


@given(st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_error_of_a_mean_is_at_most_the_mean_of_the_errors(left_out):
    values = np.array(left_out)  # (T, S)
    assert angle.jackknife(values.mean(axis=0)) <= np.mean([angle.jackknife(row) for row in values]) + 1e-12


def test_a_plateau_is_replayed_from_the_log_of_a_run_that_nobody_watched(make_plan):
    rows = {"a": {"alignment": "HASTE", "watch": NEVER}}
    plan = trained(make_plan(runs=rows, runtime=QUICK, training={"batch": 8, "precision": "fp64"}), "a")
    logs = [one for one in sources.of_run(plan, "a", 0) if one.found == "log"]
    found = outcomes(logs, {"plateau": [{key: value for key, value in NEVER.items() if key != "trigger"}]})
    read = {r["term"]: r["readings"] for r in read_header(plan.path(plan.state("a", 16)))["watched"].values()}
    assert [one.source.term for one in found] == ["features", "attention"]
    for one in found:
        assert [reading.step for reading in one.history] == [r["step"] for r in read[one.source.term]]
        for mine, theirs in zip(one.history, read[one.source.term], strict=True):
            assert mine.values == pytest.approx({k: theirs[k] for k in ("fast", "slow")}, rel=1e-9)
    # Of a run that read something, other averages than those that it read come from there too.
    other = of(plan, plateau=[{"slow": 0.75}])
    assert {one.source.found for one in other} == {"log"}
    assert [[reading.step for reading in one.history] for one in other] == [
        [8, 10, 12, 14, 16]
    ] * 2  # four steps after 4


def exactly(losses, decay):
    weights = decay ** np.arange(len(losses))[::-1]
    return float((weights * losses).sum() / weights.sum())


@given(
    runs=st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 2)), min_size=1, max_size=12),
    after=st.integers(0, 20),
    decay=st.floats(0, 0.99),
)
def test_averages_of_a_log_are_exact_where_the_steps_of_a_line_are_equal(runs, after, decay):
    ends = np.cumsum([count for count, _ in runs]).tolist()
    lines = [(end - n, end, {"residual": value}) for end, (n, value) in zip(ends, runs, strict=True)]
    steps = np.concatenate([np.full(count, value) for count, value in runs])
    source = Source("features", "log", lines=lines, last=ends[-1])
    found = replay._from_log(source, triggers.Average("residual", decay), after)
    assert set(found) == {end for end in ends if end > after}
    for end, value in found.items():
        assert value == pytest.approx(exactly(steps[after:end], decay), rel=1e-9)


@given(
    values=st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), min_size=1, max_size=30),
    margin=st.floats(0, 1),
)
def test_a_replay_is_what_the_trigger_decides_of_the_same_readings(values, margin):
    needs = Plateau(fast=0.5, slow=0.75).needs
    history = [Reading(4 * n, dict(zip(needs, pair, strict=True))) for n, pair in enumerate(values, start=1)]
    columns = {need: {one.step: one.values[name] for one in history} for name, need in needs.items()}
    settings = {"trigger": "plateau", "after": 0, "every": 4, "fast": 0.5, "slow": 0.75, "margin": 0.5}
    source = Source("features", "watch", settings, columns, last=history[-1].step)
    (found,) = outcomes([source], {"plateau": [{"margin": margin}]})
    expected = triggers.replayed("plateau", Plateau(fast=0.5, slow=0.75, margin=margin), history)
    assert (found.step, found.decision) == (expected or (None, found.decision))
    assert list(found.history) == history


# -- what cannot be said -----------------------------------------------------------------------------------------------


UNREAD = [
    ("plateau", {"fast": 0.1}, "was not measured with these settings: an average of residual with decay 0.1"),
    ("plateau", {"after": 2}, "its averages begin after step 4, not 2"),
    ("plateau", {"every": 100}, "the first reading would be after step 104, then every 100; the readings end at 16"),
    ("gradient-angle", {"times": [0.3]}, "was not measured with these settings: the angle of alignment at t 0.3"),
    ("gradient-angle", {"images": 9}, "9 images in 3 groups; it was the angle of alignment at t 0.02, 0.1, 0.5"),
    ("gradient-angle", {"of": "own"}, "the angle of own"),
    ("gradient-angle", {"block": 2}, "block 2"),
]


def test_what_was_not_read_is_said_and_not_guessed(make_plan):
    plan = trained(make_plan(runs={"a": {"alignment": "REPA", "watch": [NEVER, ANGLE]}}, runtime=QUICK), "a")
    for path in Path(plan.root, "states").rglob("log.jsonl"):
        path.unlink()
    for trigger, settings, why in UNREAD:
        with pytest.raises(ValueError, match="^nothing can be replayed: features: ") as error:
            outcomes(sources.of_run(plan, "a", 0), {trigger: [settings]})
        assert why in str(error.value)


def test_what_can_be_said_is_beside_what_cannot(make_plan):
    plan = trained(make_plan(runs={"a": {"alignment": "REPA", "watch": NEVER}}, runtime=QUICK), "a")
    found = of(plan, plateau=[{"margin": 1}], gradient_angle=[{"threshold": 0}])
    assert [(one.settings["trigger"], one.step) for one in found] == [("plateau", 6), ("gradient-angle", None)]
    assert found[1].missing == "a log has no angles between gradients; `watch: {trigger: gradient-angle}` records them"


def refused(capsys, *words):
    assert cli.main(["replay", *map(str, words)]) == 2
    return capsys.readouterr().err.removeprefix("haste replay: ").strip()


def test_every_refusal_is_a_line_that_says_what_to_do(make_plan, tmp_path, capsys):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE"}, "vanilla": {}}, runtime=QUICK)
    at = ("-c", plan.file)
    lines = {
        ("HASTE", *at): "nothing can be replayed: no trigger has read anything, and there is no log; train the run",
        ("HASTE", *at, "--set", "plateau.margin=0.1"): "nothing can be replayed: no trigger has read anything",
        ("HATSE", *at): "runs: nothing is called 'HATSE'; did you mean 'HASTE'?",
        ("vanilla", *at): "runs.vanilla: aligns nothing that a trigger could stop",
        ("HASTE", *at, "--seed", 3): "--seed 3: HASTE has 0",
        at: "expected a run of the configuration, or --readings FILE",
        ("HASTE", "--readings", PUBLISHED): "expected a run of the configuration, or --readings FILE",
        ("--readings", PUBLISHED): "--model is not given: expected one of SiT-B/2, SiT-XL/2",
        ("--readings", PUBLISHED, "--model", "SiT-L/2"): "--model SiT-L/2: expected one of SiT-B/2, SiT-XL/2",
        ("--readings", tmp_path / "none.csv"): "none.csv: cannot be read (No such file or directory)",
        ("--readings", tmp_path): "cannot be read (Is a directory)",
        (
            "--readings",
            PUBLISHED.with_name("overhead.csv"),
        ): "expected a CSV table with model, block, iteration, t, cosine",
    }
    small = ("--readings", PUBLISHED, "--model", "SiT-B/2")
    lines |= {
        (*small, "--set", "plateu.margin=1"): "nothing is called 'plateu'; did you mean 'plateau'?",
        (*small, "--set", "gradient-angle.treshold=1"): "unknown key 'treshold'; did you mean 'threshold'?",
        (
            *small,
            "--set",
            "gradient-angle.threshold=2",
        ): "gradient-angle: threshold: Input should be less than or equal",
        (*small, "--set", "gradient-angle.times=[0.3]"): "the angle of alignment at t 0.3, the default block",
        (*small, "--set", "gradient-angle.sure=1"): "the table has no standard errors, expected sure: 0",
        (
            *small,
            "--set",
            "plateau.margin=0.1",
        ): "nothing can be replayed: SiT-B/2, block 5: no trigger has read anything",
        (*small, "--set", "plateau.release=0.1"): "release does not decide when a trigger stops a term",
        (*small, "--set", "threshold=1"): "--set threshold=1: expected TRIGGER.KEY=VALUE",
        (*small, "--set", "plateau.margin=[0.1"): "--set plateau.margin=[0.1: expected TRIGGER.KEY=VALUE",
        (*small, "--out", tmp_path / "x.pdf"): "x.pdf: expected a file named *.svg or *.png",
    }
    for words, expected in lines.items():
        line = refused(capsys, *words)
        assert expected in line and "\n" not in line, (words, line)
    assert not list(tmp_path.glob("*.pdf"))


@pytest.mark.parametrize("text", ["", "model,block\n", "a,b\n1,2\n", "model,block,iteration,t,cosine\nm,1,x,0.5,1\n"])
def test_a_table_of_something_else_is_refused_by_name(tmp_path, text, capsys):
    (tmp_path / "x.csv").write_text(text)
    assert "x.csv: " in refused(capsys, "--readings", tmp_path / "x.csv")


def test_a_damaged_state_is_passed_over(make_plan):
    plan = trained(make_plan(runs={"a": {"alignment": "REPA", "watch": NEVER}}, runtime=QUICK), "a")
    path = Path(plan.path(plan.state("a", 16)))
    path.write_bytes(path.read_bytes()[:-8])
    assert [one.history[-1].step for one in of(plan) if one.whose == "as watched"] == [8]


def test_replaying_and_drawing_load_no_torch():
    code = (
        "import sys; from haste.cli import main; "
        f"main.main(['replay', '--readings', {str(PUBLISHED)!r}, '--model', 'SiT-B/2']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_the_trigger_is_shown_by_what_tells_most():
    assert list(GradientAngle().shown) == ["mean"] and list(Plateau().shown) == ["fast", "slow"]
