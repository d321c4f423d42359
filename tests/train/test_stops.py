"""What a trigger stopped is told wherever a person looks, and its state outlives what nobody needs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from haste import config
from haste.ops import prune, status
from haste.plan.plan import Plan
from haste.report import figures, gather, tables
from haste.report.content import Report, Row
from haste.train import stops

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
PLATEAU = {"trigger": "plateau", "after": 4, "every": 2, "fast": 0.5, "slow": 0.75}


def plan_in(tmp_path, **runs):
    return Plan(config.resolve({**copy.deepcopy(TINY), "results": str(tmp_path / "results"), "runs": runs}))


def haste(stop, **more):
    return {"alignment": "HASTE", "stop": stop, **more}


def header(plan, run, seed=0, step=16, **terms):
    """What a state's header says once triggers have stopped terms."""
    trajectory = plan.trajectories[plan.state(run, step, seed).trajectory]
    records = {
        kind: {
            "trigger": PLATEAU,
            "stopped": {"step": at, "reason": "enough", "trajectory": trajectory.name},
            "seconds": 0.5,
            "readings": [{"step": at, "fast": 0.25, "slow": 0.5}],
        }
        for kind, at in terms.items()
    }
    return {"key": trajectory.key, "trajectory": trajectory.name, "recipe": {}, "inputs": {}, "triggers": records}


def stopped(plan, run, seed=0, step=16, **terms):
    """A trajectory on which triggers have stopped terms, with the states at the stops."""
    folder = Path(plan.path(plan.state(run, step, seed))).parent
    folder.mkdir(parents=True, exist_ok=True)
    stops.write(folder, header(plan, run, seed, step, **terms))
    for at in terms.values():
        (folder / f"step-{at:08d}.safetensors").write_text("state")
    return folder


def test_the_file_is_of_the_stops_on_its_own_trajectory_alone(tmp_path):
    plan = plan_in(tmp_path, a=haste(PLATEAU))
    folder = stopped(plan, "a", features=10)
    assert stops.read(folder) == {"features": stops.Stopped(10, "plateau", "enough")}
    before = header(plan, "a", features=10, attention=12)
    before["triggers"]["attention"]["stopped"]["trajectory"] = "another"
    written = (folder / stops.FILE).stat().st_mtime_ns
    stops.write(folder, before)
    assert (folder / stops.FILE).stat().st_mtime_ns == written  # nothing new: not written again
    stops.write(folder, header(plan, "a", features=10, attention=12))
    assert sorted(stops.read(folder)) == ["attention", "features"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kind": "termination"}', '{"schema": 1, "kind": "termination", "terms": 3}']
)
def test_a_damaged_file_says_nothing(tmp_path, text):
    (tmp_path / stops.FILE).write_text(text)
    assert stops.read(tmp_path) == {}


def saved(folder, header, step, rolling=False):
    """A state with no more in it than its header."""
    path = folder / ("rolling" if rolling else "") / f"step-{step:08d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    about = {"schema": 1, "kind": "state", "step": step, **header}
    save_file({"x": np.zeros(1)}, path, metadata={"haste": json.dumps(about)})


@pytest.mark.parametrize("text", [None, "", '{"schema": 1, "kind": "termination", "terms": {"features": 3}}'])
def test_a_file_that_is_lost_or_damaged_is_made_up_for_by_the_newest_state_that_can_be_read(tmp_path, text):
    plan = plan_in(tmp_path, a=haste(PLATEAU))
    folder = stopped(plan, "a", features=8, attention=12)
    saved(folder, header(plan, "a", features=8), 8)
    saved(folder, header(plan, "a", features=8, attention=12), 12)
    saved(folder, header(plan, "a", features=8, attention=12), 13, rolling=True)
    (folder / "step-00000016.safetensors").write_text("truncated")
    (folder / stops.FILE).unlink() if text is None else (folder / stops.FILE).write_text(text)
    assert {kind: one.step for kind, one in stops.read(folder).items()} == {"features": 8, "attention": 12}
    assert gather.stop(plan, "a") == "features 8 by plateau, attention 12 by plateau"
    needed = prune.states_needed(Plan(plan.config))
    assert {folder / "step-00000008.safetensors", folder / "step-00000012.safetensors"} <= needed


def test_a_stop_that_a_state_knows_of_and_the_file_not_yet_is_told(tmp_path):
    plan = plan_in(tmp_path, a=haste(PLATEAU))
    folder = stopped(plan, "a", features=8)
    elsewhere = header(plan, "a", features=8, attention=12)
    saved(folder, elsewhere, 12)  # and then the machine went down
    assert sorted(stops.read(folder)) == ["attention", "features"]
    elsewhere["triggers"]["attention"]["stopped"]["trajectory"] = "another"
    saved(folder, elsewhere, 12)
    assert sorted(stops.read(folder)) == ["features"]


def test_a_stop_behind_the_last_milestone_is_none_of_this_run(tmp_path):
    plan = plan_in(tmp_path, long=haste(PLATEAU), short=haste(PLATEAU, milestones=[8]))
    stopped(plan, "long", features=10)
    assert stops.along(plan, "long", 0)["features"].step == 10
    assert stops.along(plan, "short", 0) == {}


def test_tables_say_where_triggers_stopped_over_all_seeds(tmp_path):
    runs = {
        "one": haste(PLATEAU),
        "terms": haste({"features": {**PLATEAU, "margin": 0.5}, "attention": 12}),
        "seeds": haste({**PLATEAU, "margin": 0.25}, seeds=[1, 2, 3]),
    }
    plan = plan_in(tmp_path, **runs)
    assert gather.stop(plan, "one") == "never by plateau"
    assert gather.stop(plan, "terms") == "features never by plateau, attention 12"
    stopped(plan, "one", features=10, attention=10)
    stopped(plan, "terms", step=12, features=10)  # on the trajectory up to the stop of the attention
    stopped(plan, "seeds", seed=1, features=8, attention=10)
    stopped(plan, "seeds", seed=3, features=12, attention=10)
    assert gather.stop(plan, "one") == "10 by plateau"
    assert gather.stop(plan, "terms") == "features 10 by plateau, attention 12"
    both = "8 to 12 by plateau in 2 of 3 seeds", "10 by plateau in 2 of 3 seeds"
    assert gather.stop(plan, "seeds") == f"features {both[0]}, attention {both[1]}"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("300", {"": 300}),
        ("never", {}),
        ("300 by plateau", {"": 300}),
        ("300 to 400 by plateau", {}),
        ("never by plateau", {}),
        ("features 100, attention 200", {"features": 100, "attention": 200}),
        ("features 100 by plateau, attention never", {"features": 100}),
        ("features 8 to 12 by plateau in 2 of 3 seeds, attention 10 by x3 in 2 of 3 seeds", {}),
    ],
)
def test_figures_mark_the_steps_that_the_table_names(text, steps):
    assert figures._stops(text) == steps


def test_the_report_shows_the_step_and_the_trigger():
    score = {
        "detector": {"kind": "cnn", "name": "cnn"},
        "scores": {"fd": 1.0},
        "samples": 20,
        "reference": {"samples": 20},
        "sampling": {"sampler": "euler", "steps": 2, "labels": "balanced", "guidance": 1.0, "interval": [0.0, 1.0]},
        "nfe": 2,
    }
    rows = [
        Row(run, "SiT", "HASTE", stop, 0, 400_000, score, {}, {}, "")
        for run, stop in {"a": "81000 by plateau", "b": "250000"}.items()
    ]
    report = Report("x", "x", "", rows, [], [], [], [], [], {}, "")
    table = tables.main_tables(report)[0]
    place = [head.name for head in table.heads].index("stop")
    assert [entry.cells[place].text for entry in table.entries] == ["81,000 by plateau", "250,000"]


def test_ablations_order_stops_by_their_steps_however_they_were_decided():
    found = sorted(["never", "300", "81 by plateau", "81", "90 to 95 by x", "never by x"], key=tables._order)
    assert found == ["81", "81 by plateau", "90 to 95 by x", "300", "never", "never by x"]


def test_status_says_what_has_stopped_and_what_is_aligned_still(tmp_path):
    plan = plan_in(tmp_path, a=haste(PLATEAU))
    folder = stopped(plan, "a", features=10)
    (folder / "log.jsonl").write_text(json.dumps({"step": 12, "denoising": 1.0, "images_per_s": 3.0}) + "\n")
    (line,) = status.snapshot(Plan(plan.config), queue=lambda _: {}).lines
    assert line.segment == "10 to 16, aligning attention; features stopped at 10 by plateau"


def test_status_of_a_finished_run_still_says_what_has_stopped(tmp_path):
    plan = plan_in(tmp_path, a=haste(PLATEAU))
    folder = stopped(plan, "a", features=10)
    (folder / "step-00000016.safetensors").write_text("state")
    (line,) = status.snapshot(Plan(plan.config), queue=lambda _: {}).lines
    assert (line.doing, line.segment) == ("finished", "features stopped at 10 by plateau")


def test_what_comes_next_is_told_with_what_is_left(tmp_path):
    plan = plan_in(tmp_path, a=haste(PLATEAU))
    folder = stopped(plan, "a", features=10)
    (folder / "step-00000008.safetensors").write_text("state")
    said = status.snapshot(Plan(plan.config), queue=lambda _: {}).next
    assert [line for line in said if line.endswith("from step 10 to 16, aligning attention")]


def test_prune_keeps_the_state_at_the_stop_and_forget_takes_all_of_the_run(tmp_path):
    plan = plan_in(tmp_path, a=haste(PLATEAU), never=haste(None))
    folder = stopped(plan, "a", features=10)
    for step in (6, 8, 16):
        (folder / f"step-{step:08d}.safetensors").write_text("state")
    trunk = Path(plan.path(plan.state("never", 8)))
    for step in (2, 4, 8, 16):
        trunk.parent.mkdir(parents=True, exist_ok=True)
        (trunk.parent / f"step-{step:08d}.safetensors").write_text("state")
    prune.prune([plan.config], yes=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "lock",
        *(f"step-{step:08d}.safetensors" for step in (8, 10, 16)),
        stops.FILE,
    ]
    assert sorted(int(path.name[5:13]) for path in trunk.parent.glob("step-*")) == [4, 8, 16]
    prune.forget(plan.config, "a", yes=True)
    assert not folder.exists()
    assert sorted(int(path.name[5:13]) for path in trunk.parent.glob("step-*")) == [8, 16]
