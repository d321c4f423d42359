"""Forks in the report, and what suggests a stop: from files with planted differences, against numbers by hand."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file
from scipy import stats

from haste import config
from haste.cli import main as cli
from haste.files import artefact
from haste.plan.plan import Plan
from haste.report import forks, formats, gather, measures, page, suggest

AT = [2, 4, 6, 8]
TRUTH = {2: 0.3, 4: 0.1, 6: -0.2, 8: -0.3}  # crosses zero at 4 + 2 / 3
TIMES = [0.1, 0.5]
ZERO = 4 + 2 / 3


class Forked:
    """A plan whose branches are scored and measured by hand: stopped minus aligned is the truth and some noise."""

    def __init__(self, tiny, folder, **changes):
        runs = {"HASTE": {"alignment": "HASTE", "milestones": [8], **changes.pop("run", {})}}
        raw = {**tiny, "results": str(folder / "results"), "runs": runs}
        raw |= {"forks": {"when": {"run": "HASTE", "at": AT, "for": 3}}, **changes}
        self.file = folder / "forked.yaml"
        self.file.write_text(json.dumps(raw))
        self.plan = Plan(config.resolve(raw))
        self.branches, self.rng = config.branches(self.plan.config), np.random.default_rng(3)
        self.losses: dict[tuple[int, bool, int], np.ndarray] = {}

    def score(self, noise=0.0, errors=None, skip=(), dated=False):
        for row in self.plan.rows:
            branch = self.branches.get(row.run)
            if branch and (branch.at, branch.stopped) in skip:
                Path(row.evaluation.score).unlink(missing_ok=True)
                continue
            gain = TRUTH[branch.at] * branch.stopped if branch else 0.0
            found = {
                "kind": "score",
                "key": "k",
                "state": {"trajectory": row.evaluation.state.trajectory, "step": row.step},
                "sampling": row.evaluation.sampling.model_dump(mode="json"),
                "detector": {"name": "cnn", "identity": "d"},
                "samples": 20,
                "reference": {"images": 1700, "identity": "r"},
                "scores": {"fd": 5.0 + gain + noise * self.rng.normal()},
                **({} if dated else {"errors": {"fd": errors}}),
            }
            self.write(row.evaluation.score, found)

    def measure(self, noise=0.01, skip=()):
        for one in self.plan.measured:
            branch = self.branches.get(one.run)
            if branch is None:
                continue
            if (branch.at, branch.stopped) in skip:
                Path(one.measurement.file).unlink(missing_ok=True)
                continue
            gain = TRUTH[branch.at] * branch.stopped
            losses = 2.0 + np.array(TIMES)[:, None] * np.arange(8) + gain + noise * self.rng.normal(size=(2, 8))
            self.losses[branch.at, branch.stopped, one.seed] = losses
            rows = [{"t": t, "group": g, "loss": losses[i, g]} for i, t in enumerate(TIMES) for g in range(8)]
            found = {"measure": "denoising", "axes": ["t", "group"], "values": {"loss": ""}, "pooled": "group"}
            self.write_measure(one, {**found, "rows": rows})

    def cosines(self, values, error=0.01):
        for one in self.plan.measured:
            if one.measurement.label == "cos":
                where = {"term": "alignment", "t": 0.5, "block": 1}
                rows = [{**where, "cosine": values[one.step] + 0.001 * one.seed, "error": error}]
                found = {"measure": "gradient-cosine", "axes": ["term", "t", "block"], "values": {"cosine": "error"}}
                self.write_measure(one, {**found, "rows": rows})

    def write_measure(self, one, found):
        about = {
            "kind": "measure",
            "key": "k",
            "settings": {},
            "notes": [],
            "state": {"trajectory": "T", "step": one.step},
        }
        self.write(one.measurement.file, {**about, **found})

    def write(self, path, found):
        artefact.write_json(Path(path), {"schema": 1, **found, "provenance": {"made": "2026"}})

    @property
    def report(self):
        return gather.report(self.plan)

    @property
    def table(self):
        (table,) = forks.fork_tables(self.report)
        return list(csv.DictReader(io.StringIO(formats.to_csv(table)))), table


@pytest.fixture
def forked(tiny, tmp_path):
    return lambda **changes: Forked(tiny, tmp_path, **changes)


def test_the_table_has_stopped_minus_aligned_by_step_on_average_over_t_at_each_t_and_of_scores(forked):
    one = forked()
    one.score()
    one.measure()
    lines, table = one.table
    assert [int(line["step"]) for line in lines] == AT
    for line in lines:
        step = int(line["step"])
        pair = one.losses[step, True, 0] - one.losses[step, False, 0]
        assert float(line["held-out loss"]) == pytest.approx(pair.mean())
        assert float(line["held-out loss t 0.1"]) == pytest.approx(pair[0].mean())
        assert float(line["held-out loss t 0.5"]) == pytest.approx(pair[1].mean())
        assert float(line["FD (cnn)"]) == pytest.approx(TRUTH[step])
        # paired: the groups' own losses differ by whole units, which is in no interval
        half = stats.t.ppf(0.975, 7) * stats.sem(pair[0])
        assert float(line["held-out loss t 0.1 ±"]) == pytest.approx(half, rel=0.25)
    assert table.name == "fork-when" and "Each branch was trained for 3 more steps." in table.notes[0]
    assert "FD (cnn): of 20 samples, too few to know their noise." in table.notes
    one.score(dated=True)
    (said,) = (note for note in one.table[1].notes if note.startswith("FD (cnn)"))
    assert "scores were made before they had errors; remove them, and they are made again" in said


def test_over_seeds_the_interval_is_students_and_a_step_that_lacks_a_seed_is_named(forked):
    one = forked(run={"seeds": [0, 1, 2]})
    one.score(noise=0.01)
    one.measure(skip=[(8, True)])
    lines, table = one.table
    for line in lines[:3]:
        step = int(line["step"])
        gaps = [(one.losses[step, True, seed] - one.losses[step, False, seed]).mean() for seed in (0, 1, 2)]
        assert float(line["held-out loss"]) == pytest.approx(np.mean(gaps))
        assert float(line["held-out loss ±"]) == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(gaps))
    assert lines[3]["held-out loss"] == "" and lines[3]["FD (cnn)"] != ""
    assert "±: half of the 95 % t-interval over 3 seeds of training." in table.notes
    one = forked()
    one.score(skip=[(8, False)])
    one.measure(skip=[(8, True)])
    assert "Not there yet: 8." in one.table[1].notes


def test_the_noise_of_a_score_is_that_of_both_branches_where_the_scores_know_it(forked):
    one = forked()
    one.score(errors=0.03)
    lines, _ = one.table
    half = stats.norm.ppf(0.975) * math.hypot(0.03, 0.03)
    assert [float(line["FD (cnn) ±"]) for line in lines] == pytest.approx([half] * 4)


def test_the_report_says_from_which_step_on_stopping_was_better_and_draws_it(forked):
    one = forked()
    one.score()
    one.measure()
    said, unsure = forks.sentences(one.report)
    step, low, high = map(float, re.search(r"from step ([\d.]+) \(95 %: (\d+) to (\d+)", said).groups())
    assert said.startswith("when, of HASTE, by held-out loss: stopping was better from step 5") and low <= step <= high
    assert unsure == "when, of HASTE, by FD (cnn): cannot tell: one seed, whose noise is not known."
    loss, score = forks.fork_panels(one.report)
    last = (one.losses[8, True, 0] - one.losses[8, False, 0]).mean()
    assert "Stopping was better from step 5" in loss.caption and f"{last:.3g} at step 8" in loss.svg
    assert ">t 0.1<" in loss.svg and ">t 0.5<" in loss.svg and "Cannot tell" in score.caption


def test_labels_of_lines_that_end_together_do_not_overlap(forked):
    one = forked()
    one.score()
    one.measure(noise=0.0)
    panel, _ = forks.fork_panels(one.report)
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:t 0\.[15]|mean)<', panel.svg)]
    assert len(heights) == 3 and min(np.diff(sorted(heights))) > 6.5  # points, of text of 7


def test_branches_stand_in_no_other_table_curve_or_picture(forked):
    one = forked()
    one.score()
    one.measure()
    built = one.report
    assert [row.run for row in built.rows] == ["HASTE"] and not built.measures
    assert [curve.run for curve in built.curves] == ["HASTE"] and "when@" not in built.config_text
    assert "when@" not in page.text(built) and not [read for read in built.read if "when@" in read.run]


def test_a_picture_that_a_branch_shares_with_its_trunk_is_shown_once(forked):
    one = forked(forks={"when": {"run": "HASTE", "at": [2, 6], "for": 2}})
    one.score()
    for path in {row.evaluation.grid for row in one.plan.rows}:
        record, picture = PngInfo(), Image.new("L", (4, 4))
        record.add_text("haste", json.dumps({"schema": 1, "kind": "grid", "classes": [0]}))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, pnginfo=record)
    assert [grid.run for grid in one.report.grids] == ["HASTE"]


def test_every_number_of_a_fork_leads_to_the_files_it_is_made_from(forked, tmp_path):
    one = forked()
    one.score()
    one.measure()
    index = page.write(one.report, tmp_path / "report")
    html = index.read_text()
    links = set(re.findall(r'href="#(made-fork-[^"]+)"', html))
    assert links == {f"made-fork-0-{step}" for step in AT}
    for link in links:
        place = html[html.index(f'id="{link}"') :].split("</details>")[0]
        step = int(link.rsplit("-", 1)[1])
        names = [name for name, branch in one.branches.items() if branch.at == step]
        files = [row.measurement.file for row in one.plan.measured if row.run in names]
        files += [row.evaluation.score for row in one.plan.rows if row.run in names]
        assert len(files) == 4 and all(file in place for file in files)
    assert {path.name for path in index.parent.glob("fork-*")} == {f"fork-when.{kind}" for kind in ("csv", "md", "tex")}


def test_a_measure_of_groups_shows_their_mean_with_its_standard_error(forked):
    one = forked(run={"measures": ["denoising"]})
    one.score()
    (mine,) = (row for row in one.plan.measured if row.run == "HASTE")
    losses = np.arange(8.0) ** 2
    rows = [{"t": 0.5, "group": group, "loss": loss} for group, loss in enumerate(losses)]
    one.write_measure(
        mine, {"measure": "denoising", "axes": ["t", "group"], "values": {"loss": ""}, "pooled": "group", "rows": rows}
    )
    (table,) = measures.measure_tables(one.report)
    (cell,) = table.column("loss")
    assert (cell.value, cell.spread) == (pytest.approx(losses.mean()), pytest.approx(stats.sem(losses)))


# ---- haste suggest-stop

COS = {"measures": {"cos": {"measure": "gradient-cosine"}}, "run": {"measures": ["cos"], "milestones": [2, 4, 6, 8]}}


def said(one, run="HASTE"):
    return {s.by: s.found for s in suggest.suggestions(one.plan, run)}


def test_forks_and_angles_say_where_they_would_stop_and_how_sure(forked):
    one = forked(**COS)
    one.score(errors=0.01)
    one.measure()
    one.cosines({2: 0.2, 4: 0.05, 6: -0.15, 8: -0.3})  # below -0.05 from step 5 on; read at 6
    found = said(one)
    for by, step in (("fork when, held-out loss", ZERO), ("fork when, FD (cnn)", ZERO)):
        assert found[by].low <= step <= found[by].high and found[by].step == pytest.approx(step, abs=0.2)
    angle = found["cos, cosine of alignment below -0.05"]
    assert (angle.low, angle.step, angle.high) == (4, 6, 6)


def test_where_nothing_is_sure_it_says_so(forked):
    one = forked(**COS)
    one.score(errors=1.0)
    one.measure(noise=9.0)
    one.cosines({2: 0.2, 4: 0.05, 6: -0.15, 8: -0.3}, error=0.5)
    assert all(str(found).startswith("cannot tell") for found in said(one).values())


def test_several_seeds_give_intervals_over_them(forked):
    one = forked(**{**COS, "run": {**COS["run"], "seeds": [0, 1, 2]}})
    one.score(noise=0.001)
    one.measure(noise=0.001)
    one.cosines({2: 0.2, 4: 0.05, 6: -0.15, 8: -0.3})
    found = said(one)
    angle = found.pop("cos, cosine of alignment below -0.05")
    assert str(angle) == "step 6 (95 %: 4 to 6; t-interval over 3 seeds, at 6, 6, 6)"
    assert {found.reason for found in found.values()} == {"t-interval over 3 seeds"}


def write_log(one, kind, losses):
    folder = Path(one.plan.root, "states", one.plan.state("HASTE", 8).trajectory)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, kind: loss, "denoising": 1.0}) for step, loss in losses]
    (folder / "log.jsonl").write_text("\n".join(lines))


def test_a_logged_loss_that_levels_off_is_a_plateau_and_one_that_falls_is_none(forked):
    one = forked(run={"milestones": [100_000]}, forks={})
    steps, level = range(500, 100_500, 500), 30_000
    falling = {step: 3.0 - min(step, level) / level for step in steps}
    write_log(one, "attention", falling.items())
    (found,) = said(one).values()
    each = np.repeat(list(falling.values()), 500)  # of each step

    def average(step, decay):
        weights = decay ** (step - 1.0 - np.arange(step))
        return float(weights @ each[:step] / weights.sum())

    # asked every 1,000 steps, from the first at which the slow average has seen its window
    fires = next(s for s in range(20_000, 100_500, 1000) if average(s, 0.999) >= 0.98 * average(s, 0.99995))
    assert level < fires < 100_000 and (found.step, found.low, found.high) == (fires, None, None)
    write_log(one, "attention", [(step, 3.0 - step / 40_000) for step in steps])
    (found,) = said(one).values()
    assert str(found) == "cannot tell: it does not fire"


def test_what_a_trigger_recorded_is_read_from_the_newest_state(forked):
    trigger = {"trigger": "gradient-angle", "after": 0, "every": 1, "threshold": 0.0, "images": 8, "shards": 2}
    one = forked(run={"stop": trigger}, forks={})
    trajectory = one.plan.trajectories[one.plan.state("HASTE", 8).trajectory]
    readings = [{"step": s, "mean": 0.25 - 0.1 * s, "error": 0.001} for s in (1, 2, 3, 4)]
    record = {"trigger": {**trigger}, "stopped": None, "seconds": 0.0, "readings": readings}
    header = {"schema": 1, "kind": "state", "key": trajectory.key, "recipe": trajectory.recipe, "step": 8, "inputs": {}}
    header |= {"provenance": {}, "trajectory": trajectory.name, "triggers": {"features": record}}
    path = Path(one.plan.path(one.plan.state("HASTE", 8)))
    path.parent.mkdir(parents=True)
    save_file({"x": np.zeros(1)}, path, metadata={"haste": json.dumps(header)})
    found = said(one)
    (here,) = found.values()
    assert list(found) == ["readings of gradient-angle on features"]
    assert str(here) == "step 3 (95 %: 2 to 3; by standard errors: the cosine is -0.050 ± 0.001 at step 3)"
    record["term"] = "attention"
    header |= {"watched": {"w": record}}
    save_file({"x": np.zeros(1)}, path, metadata={"haste": json.dumps(header)})
    assert list(said(one)) == ["readings of gradient-angle on attention and features"]  # both have the same cosines


def test_the_command_prints_a_line_for_each_and_refuses_what_says_nothing(forked, capsys):
    one = forked(runs={"HASTE": {"alignment": "HASTE", "milestones": [8]}, "plain": {}})
    asked = ["-c", str(one.file)]
    for run, words in {
        "HASTE": "runs.HASTE: nothing says yet when to stop it; train it, with a trigger under `watch`, or",
        "plain": "runs.plain: aligns nothing that could be stopped; expected a run with an alignment",
        "HASTY": "runs: nothing is called 'HASTY'; did you mean 'HASTE'?",
    }.items():
        assert cli.main(["suggest-stop", run, *asked]) == 2
        assert words in capsys.readouterr().err
    one.score()
    one.measure()
    assert cli.main(["suggest-stop", "HASTE", *asked]) == 0
    words = capsys.readouterr().out
    assert "When to stop HASTE" in words and "fork when, held-out loss" in words and "cannot tell" in words
