"""What training took, along a lineage, and runs that share a trunk drawn as one line that forks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from haste import config
from haste.files import artefact
from haste.plan.plan import Plan
from haste.report import figures, gather, tables
from haste.report.content import Curve, Report, Row, Trunk
from haste.report.lineage import Training, trunks

ROWS = {
    "vanilla": {},
    "never": {"alignment": "HASTE"},
    "at 4": {"alignment": "HASTE", "stop": 4},
    "at 12": {"alignment": "HASTE", "stop": 12},
    "seeds": {"alignment": "HASTE", "stop": 12, "seeds": [0, 1]},
}


@pytest.fixture
def plan(tiny, tmp_path):
    return Plan(config.resolve({**tiny, "results": str(tmp_path), "runs": ROWS}))


def trained(plan, run, step, each, seed=0, **made):
    """The log of a run's own trajectory up to a step, two steps a line, each taking some seconds, and the state."""
    state = plan.state(run, step, seed)
    piece = next(piece for piece in plan.pieces[run, seed] if piece.trajectory == state.trajectory)
    path = Path(plan.path(state))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"step": at, "denoising": 1.0, "seconds": each} for at in range(piece.low + 2, step + 1, 2)]
    (path.parent / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    header = {"schema": artefact.SCHEMA, "kind": "state", "key": "k", "recipe": {}, "step": step, "inputs": {}}
    header["provenance"] = made
    save_file({"a": np.zeros(1)}, path, {"haste": json.dumps(header)})


def test_hours_are_those_of_all_devices_along_the_lineage_with_a_shared_trunk_in_full(plan):
    trained(plan, "never", 16, 36.0, processes=2, hardware={"threads": 3})
    trained(plan, "at 12", 16, 18.0, processes=1, hardware={"threads": 1})
    found = Training(Plan(plan.config))
    assert found.hours("never", 0, 8) == pytest.approx(4 * 36 * 6 / 3600)
    assert found.hours("never", 0, 16) == pytest.approx(8 * 36 * 6 / 3600)
    assert found.hours("at 12", 0, 16) == pytest.approx((6 * 36 * 6 + 2 * 18) / 3600)  # 12 steps of the trunk
    assert found.unit == "core"


def test_on_gpus_each_process_is_one_and_what_says_nothing_is_unknown(tiny, tmp_path):
    here = Plan(config.resolve({**tiny, "results": str(tmp_path), "runtime": {"device": "auto", "processes": 1}}))
    trained(here, "vanilla", 16, 36.0, processes=2, hardware={"threads": 3, "gpu": "H100"})
    found = Training(Plan(here.config))
    assert found.hours("vanilla", 0, 16) == pytest.approx(8 * 36 * 2 / 3600) and found.unit == "GPU"
    trained(here, "REPA", 16, 36.0, processes=2, hardware={"threads": 3, "gpu": "H100"}, device="cpu")
    cpus = config.resolve({**tiny, "results": str(tmp_path), "runtime": {"device": "cpu"}})
    mixed = Training(Plan(cpus))  # what states say, wherever the report is made
    assert mixed.unit == "GPU" and mixed.hours("vanilla", 0, 16) == found.hours("vanilla", 0, 16)
    assert mixed.hours("REPA", 0, 16) is None  # cores are no GPUs
    for state in Path(tmp_path, "states").glob("*/*.safetensors"):
        state.unlink()  # nobody knows any more on how many devices the logged steps were made
    assert Training(Plan(here.config)).hours("vanilla", 0, 16) is None
    assert found.hours("REPA", 0, 16) is None and found.hours("elsewhere", 0, 16) is None


def test_a_row_has_its_hours_in_the_tables_and_what_they_are_of_below():
    score = {"detector": {"name": "cnn"}, "samples": 9, "scores": {"fd": 7.0}}
    rows = [Row(run, "SiT", "vanilla", "–", 0, 8, score, hours=hours) for run, hours in (("a", 1234.5), ("b", None))]
    built = Report("n", "t", "", rows, [], [], [], [], [], {}, "", unit="GPU")
    (table,) = tables.main_tables(built)
    assert [cell.text for cell in table.column("GPU-hours")] == ["1,234", "–"]
    assert "GPU-hours: of training alone, from its first step. A beginning that runs share counts in full" in " ".join(
        table.notes
    )
    assert "GPU-hours" not in tables.results(built)  # equal results, equal files


def test_a_run_leaves_the_earlier_one_that_it_shares_most_with_where_its_states_begin_to_differ(plan):
    assert trunks(plan) == {"at 4": Trunk("never", 4), "at 12": Trunk("never", 12)}  # none for other seeds


def paths(svg):
    """The points of every line that a run drew, in the order of drawing."""
    found = re.findall(r'<path d="(M [^"]*)" clip-path[^>]*style="fill: none; [^"]*?stroke: (#\w+)', svg)
    return {colour: len(re.findall("[ML]", d)) for d, colour in found}


def test_curves_of_runs_that_share_a_trunk_are_one_line_that_forks_where_they_part():
    logs = {"never": 0.0, "at 12": 0.5}
    curves = [
        Curve(run, 0, [{"step": s, "loss": 2.0 - s / 20 + more * (s > 12)} for s in range(1, 17)])
        for run, more in logs.items()
    ]
    shared = {"at 12": Trunk("never", 12)}
    score = {"detector": {"name": "cnn"}, "samples": 9}
    rows = [
        Row(run, "SiT", "HASTE", "–", 0, step, {**score, "scores": {"fd": 20.0 - step + more * (step > 12)}})
        for run, more in logs.items()
        for step in (4, 8, 16)
    ]
    whole = Report("n", "t", "", rows, [], curves, [], [], [], {}, "")
    forked = Report("n", "t", "", rows, [], curves, [], [], [], {}, "", trunks=shared)
    first, second = (figures.styles(whole)[run].colour.lower() for run in logs)
    for panels in (figures.loss_panels, figures.score_panels):
        before, after = (paths(panels(built)[0].svg) for built in (whole, forked))
        assert before[first] == before[second] == after[first]
        assert after[second] < before[second]  # from where it leaves the other
    assert figures.styles(forked)["at 12"].trunk == Trunk("never", 12)


def test_the_fork_begins_on_the_line_that_it_leaves():
    line = (np.array([0.0, 10.0, 20.0]), np.array([8.0, 4.0, 2.0]), np.zeros(3))
    own = (np.array([0.0, 10.0, 20.0]), np.array([8.0, 4.0, 1.0]), np.zeros(3))
    steps, values, _, front = figures._forked(own, Trunk("a", 15), {"a": line})
    assert (steps.tolist(), values.tolist(), front) == ([15.0, 20.0], [3.0, 1.0], 1)
    steps, values, _, _ = figures._forked(own, Trunk("a", 15), {"a": line}, logarithmic=True)
    assert values.tolist() == pytest.approx([8**0.5, 1.0])
    other = (own[0], np.array([8.0, 5.0, 1.0]), own[2])  # measured otherwise: drawn whole
    assert figures._forked(other, Trunk("a", 15), {"a": line})[0].tolist() == [0.0, 10.0, 20.0]


def test_scores_before_the_fork_that_the_other_run_lacks_are_drawn_and_the_line_starts_there():
    line = (np.array([100.0, 400.0]), np.array([40.0, 30.0]), np.zeros(2))
    own = (np.array([100.0, 200.0, 400.0]), np.array([40.0, 45.0, 20.0]), np.zeros(3))
    for at in (200, 300):
        steps, values, _, front = figures._forked(own, Trunk("a", at), {"a": line})
        assert (steps.tolist(), values.tolist(), front) == ([200.0, 400.0], [45.0, 20.0], 0)
    steps, values, _, front = figures._forked(
        own, Trunk("a", 250), {"a": line}, dense=True
    )  # a log has the same losses
    assert (steps.tolist(), values.tolist(), front) == ([250.0, 400.0], [35.0, 20.0], 1)


def test_a_run_that_ends_on_the_trunk_has_a_line_of_its_own(tiny, tmp_path):
    runs = {"long": {"milestones": [8, 16]}, "short": {"milestones": [8]}, "same": {"milestones": [4, 16]}}
    assert trunks(Plan(config.resolve({**tiny, "results": str(tmp_path), "runs": runs}))) == {}


def test_a_report_of_a_plan_has_hours_and_trunks(plan):
    trained(plan, "vanilla", 16, 36.0, processes=1, hardware={"threads": 1})
    for row in plan.rows:
        if row.run == "vanilla":
            score = {
                "schema": 1, "kind": "score", "detector": {"name": "cnn", "identity": "d"}, "samples": 20,
                "reference": {"images": 9, "identity": "r"}, "scores": {"fd": 5.0}, "provenance": {"made": "by hand"},
            }  # fmt: skip
            Path(row.evaluation.score).parent.mkdir(parents=True, exist_ok=True)
            Path(row.evaluation.score).write_text(json.dumps(score))
    found = gather.report(Plan(plan.config))
    assert [(row.step, row.hours) for row in found.rows] == [(8, pytest.approx(0.04)), (16, pytest.approx(0.08))]
    assert found.unit == "core" and found.trunks["at 12"] == Trunk("never", 12)
