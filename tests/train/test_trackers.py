"""TensorBoard and W&B have the rows of the table: each from step 0 to its end, with scores and stops, once."""

import errno
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml

from haste import config
from haste.cli import main as cli
from haste.files import artefact, journal, locks
from haste.plan.plan import Plan
from haste.train import loop, trackers

TINY = yaml.safe_load((Path(__file__).parent.parent / "tiny.yaml").read_text())
RUNS = {"HASTE": {"alignment": "HASTE"}, "stopped": {"alignment": "HASTE", "stop": 12}}
RUNTIME = {"trackers": ["tensorboard"], "log_every": 2, "save_every": 3}


def events(plan, row):
    """What TensorBoard's own reader finds of a row: tag -> [(step, value)], and tag -> [(step, words)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(Path(plan.folder, "tensorboard", row)), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    tags = found.Tags()
    scalars = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in tags["scalars"]}
    words = {
        tag: [(one.step, one.tensor_proto.string_val[0].decode()) for one in found.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return scalars, words


def put_score(plan, run, step, **scores):
    """A score of a milestone, as `haste evaluate` writes it."""
    (row,) = (row for row in plan.rows if (row.run, row.step) == (run, step))
    artefact.write_json(row.evaluation.score, {"schema": artefact.SCHEMA, "kind": "score", "scores": scores})


@pytest.fixture(scope="module")
def trained(_finished_data, tmp_path_factory):
    """The results of two rows that share a trunk of 12 steps, both trained to step 16, without trackers."""
    root = tmp_path_factory.mktemp("trained") / "results"
    shutil.copytree(_finished_data, root)
    raw = {**json.loads(json.dumps(TINY)), "results": str(root), "runs": RUNS, "runtime": {**RUNTIME, "trackers": []}}
    plan = Plan(config.resolve(raw))
    for state in sorted(plan.planned(), key=lambda state: state.step):
        loop.train(plan, state)
    return root


@pytest.fixture
def tracked(trained, tmp_path):
    """A function from trackers and changes to a plan over a copy of these results."""
    root = tmp_path / "results"
    shutil.copytree(trained, root)

    def make(*kinds, **changes):
        runtime = {**RUNTIME, "trackers": list(kinds)}
        raw = {**json.loads(json.dumps(TINY)), "results": str(root), "runs": RUNS, "runtime": runtime, **changes}
        plan = Plan(config.resolve(raw))
        plan.file = tmp_path / "tiny.json"
        plan.file.write_text(json.dumps(raw))
        return plan

    return make


def test_while_a_trunk_trains_each_of_its_rows_has_its_points_and_a_kill_shows_none_twice(make_plan):
    plan = make_plan(runs=RUNS, runtime=RUNTIME)
    path = Path(plan.path(plan.state("HASTE", 8)))
    loop.train(plan, plan.state("HASTE", 8))
    path.unlink()  # as if killed before it was written
    loop.train(plan, plan.state("HASTE", 8))
    records = journal.read(path.parent / "log.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    for row in RUNS:
        scalars, _ = events(plan, row)
        for term in ("denoising", "features", "attention", "grad_norm"):
            assert scalars[term] == [(r["step"], pytest.approx(r[term], rel=1e-6)) for r in records], (row, term)
    assert not [path for path in Path(plan.root, "states").rglob("*tfevents*")]


def test_a_row_has_its_whole_curve_across_trunk_and_branch_with_its_scores_and_its_stop(tracked):
    plan = tracked("tensorboard")
    put_score(plan, "stopped", 8, fd=9.5, class_accuracy=0.25)
    put_score(plan, "stopped", 16, fd=7.5, class_accuracy=0.5)
    trackers.update(plan)
    scalars, words = events(plan, "stopped")
    assert [step for step, _ in scalars["denoising"]] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [step for step, _ in scalars["features"]] == [2, 4, 6, 8, 10, 12]  # then nothing is aligned
    assert scalars["scores/FD (cnn, quick)"] == [(8, 9.5), (16, 7.5)]
    assert scalars["scores/class_accuracy (cnn, quick)"] == [(8, 0.25), (16, 0.5)]
    assert scalars["stop/features"] == scalars["stop/attention"] == [(12, 12.0)]
    assert words["stop/features"] == [(12, "features stops at step 12, as its row says")]
    ((step, settings),) = words["settings"]
    assert step == 0 and "stop:\n" in settings and "lr: 0.001" in settings
    assert [step for step, _ in events(plan, "HASTE")[0]["features"]] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert "stop/features" not in events(plan, "HASTE")[0]


def test_what_is_written_is_not_written_again_and_a_score_comes_when_it_is_there(tracked):
    plan = tracked("tensorboard")
    for step, fd in ((8, 9.5), (16, 7.5)):
        put_score(plan, "HASTE", step, fd=fd)
        assert cli.main(["track", "-c", str(plan.file)]) == 0
        assert cli.main(["track", "-c", str(plan.file)]) == 0
    scalars, words = events(plan, "HASTE")
    assert scalars["scores/FD (cnn, quick)"] == [(8, 9.5), (16, 7.5)]
    assert all(len({step for step, _ in points}) == len(points) for points in [*scalars.values(), *words.values()])


def test_a_milestone_that_is_put_in_later_is_scored_in_its_place(tracked):
    plan = tracked("tensorboard")
    for step in (8, 16):
        put_score(plan, "HASTE", step, fd=float(step))
    trackers.update(plan)
    more = tracked("tensorboard", runs={**RUNS, "HASTE": {"alignment": "HASTE", "milestones": [8, 12, 16]}})
    put_score(more, "HASTE", 12, fd=12.0)
    trackers.update(more)
    scalars, _ = events(more, "HASTE")
    assert scalars["scores/FD (cnn, quick)"] == [(8, 8.0), (12, 12.0), (16, 16.0)]
    assert [step for step, _ in scalars["denoising"]] == [2, 4, 6, 8, 10, 12, 14, 16]


def test_a_row_that_is_renamed_keeps_its_run_and_one_with_another_stop_has_a_new_curve(tracked):
    plan = tracked("tensorboard")
    trackers.update(plan)
    before = json.loads(Path(plan.folder, "tensorboard", "HASTE", "written.json").read_text())["id"]
    again = tracked("tensorboard", runs={"never": {"alignment": "HASTE"}, "stopped": {"alignment": "HASTE", "stop": 8}})
    trackers.update(again)
    assert not Path(plan.folder, "tensorboard", "HASTE").exists()
    assert json.loads(Path(plan.folder, "tensorboard", "never", "written.json").read_text())["id"] == before
    assert [step for step, _ in events(again, "never")[0]["features"]] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [step for step, _ in events(again, "stopped")[0]["features"]] == [2, 4, 6, 8]


def test_a_row_that_another_process_writes_is_left_to_it(tracked):
    plan = tracked("tensorboard")
    with locks.holding(Path(plan.folder, "tensorboard", "HASTE", "lock"), "its training"):
        trackers.update(plan)
    assert not list(Path(plan.folder, "tensorboard", "HASTE").glob("events*"))
    assert list(Path(plan.folder, "tensorboard", "stopped").glob("events*"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), SystemExit("killed")])
def test_a_curve_whose_writing_fails_or_is_killed_half_way_has_every_point_once_after_the_next(
    tracked, monkeypatch, failure
):
    plan, write = tracked("tensorboard"), trackers.TensorBoard.write

    def half(self, points):
        write(self, list(points)[:2])
        raise failure

    def whole(*steps):
        monkeypatch.setattr(trackers.TensorBoard, "write", half)
        with pytest.raises(type(failure)):
            trackers.update(plan)
        monkeypatch.setattr(trackers.TensorBoard, "write", write)
        trackers.update(plan)
        scalars, words = events(plan, "HASTE")
        assert [step for step, _ in scalars["denoising"]] == [2, 4, 6, 8, 10, 12, 14, 16]
        assert [step for step, _ in scalars.get("scores/FD (cnn, quick)", ())] == [*steps]
        assert [step for step, _ in words["settings"]] == [0]

    whole()
    for steps in ([16], [8, 16]):  # the second is late: all is written again
        put_score(plan, "HASTE", steps[0], fd=1.0)
        whole(*steps)


def follow_trunk(plan):
    """Have the trackers follow a trunk as training does, with its records."""
    (piece, *_) = plan.pieces["HASTE", plan.config.runs["HASTE"].all_seeds[0]]
    with trackers.following(plan, piece.trajectory, 0, 12) as follow:
        for record in journal.read(Path(plan.root, "states", piece.trajectory, "log.jsonl"), 0, 12):
            follow(record)


@pytest.mark.parametrize("damage", ["", '"low"', "[8]"])
def test_a_damaged_score_is_left_out_with_a_warning_until_it_is_made_again(tracked, caplog, damage):
    plan = tracked("tensorboard")
    put_score(plan, "HASTE", 16, fd=16.0)
    trackers.update(plan)
    put_score(plan, "HASTE", 8, fd=1.5)
    (row,) = (row for row in plan.rows if (row.run, row.step) == ("HASTE", 8))
    path = Path(row.evaluation.score)
    path.write_text(path.read_text().replace("1.5", damage))
    follow_trunk(plan)
    trackers.update(plan)
    assert caplog.text.count(f"HASTE: score {path.stem} is left out of runtime.trackers") == 1
    assert events(plan, "HASTE")[0]["scores/FD (cnn, quick)"] == [(16, 16.0)]
    put_score(plan, "HASTE", 8, fd=8.0)
    trackers.update(plan)
    assert events(plan, "HASTE")[0]["scores/FD (cnn, quick)"] == [(8, 8.0), (16, 16.0)]


def test_a_full_disk_in_a_trackers_folder_does_not_end_training(tracked, monkeypatch, caplog):
    plan = tracked("tensorboard")
    with monkeypatch.context() as full:
        full.setattr(trackers.TensorBoard, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        follow_trunk(plan)
    assert caplog.text.count("tensorboard cannot be written to (OSError: [Errno 28] full)") == 1
    trackers.update(plan)
    for row in RUNS:
        assert [step for step, _ in events(plan, row)[0]["denoising"]] == [2, 4, 6, 8, 10, 12, 14, 16]


def test_a_renamed_row_keeps_its_run_also_if_another_process_writes_it_just_then(tracked):
    plan = tracked("tensorboard")
    trackers.update(plan)
    old, new = (Path(plan.folder, "tensorboard", name) for name in ("HASTE", "never"))
    before = artefact.read_json(old / "written.json", "tracked")["id"]
    again = tracked("tensorboard", runs={"never": RUNS["HASTE"], "stopped": RUNS["stopped"]})
    with locks.holding(old / "lock", "its training"):
        trackers.update(again)
        assert (old / "written.json").exists() and not new.exists()
    trackers.update(again)
    assert artefact.read_json(new / "written.json", "tracked")["id"] == before and not old.exists()


def test_a_row_without_a_line_or_a_score_has_no_points_however_often_it_is_asked_for(tracked):
    plan = tracked("tensorboard")
    shutil.rmtree(Path(plan.root, "states"))
    for _ in range(2):
        trackers.update(plan)
    assert not list(Path(plan.folder, "tensorboard").rglob("events*"))


def test_rows_whose_names_differ_only_by_a_slash_have_their_own_curves(tracked):
    plan = tracked("tensorboard", runs={"a/b": RUNS["HASTE"], "a-b": RUNS["stopped"]})
    for _ in range(2):
        trackers.update(plan)
    (other,) = Path(plan.folder, "tensorboard").glob("a-b-*")
    for row, last in (("a-b", 12), (other.name, 16)):
        assert [step for step, _ in events(plan, row)[0]["features"]] == [*range(2, last + 1, 2)]


class Wandb(types.ModuleType):
    """W&B's interface as far as it is used: runs by their ids, with what each `init` was told."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.runs, self.told, self.open, self.broken = {}, [], set(), False

    def init(self, **told):
        if self.broken:
            raise TimeoutError("the service does not answer")
        assert told["resume"] == "allow" and told["reinit"] == "create_new" and told["id"] not in self.open
        self.told.append(told)
        self.open.add(told["id"])
        run = self.runs.setdefault(told["id"], types.SimpleNamespace(rows=[], summary={}, axes={}))
        run.log = lambda values: run.rows.append(dict(values))
        run.define_metric = lambda name, step_metric: run.axes.update({name: step_metric})
        run.finish = lambda id=told["id"]: self.open.discard(id)
        return run

    def of(self, name):
        """The runs of this name."""
        return [self.runs[id] for id in {told["id"] for told in self.told if told["name"] == name}]


@pytest.fixture
def wandb(monkeypatch):
    made = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_wandb_has_one_run_a_row_that_every_job_resumes_with_no_step_twice(make_plan, wandb):
    plan = make_plan(runs=RUNS, runtime={**RUNTIME, "trackers": ["wandb"]})
    loop.train(plan, plan.state("stopped", 12))
    Path(plan.path(plan.state("stopped", 12))).unlink()  # as if killed before it was written
    loop.train(plan, plan.state("stopped", 12))
    put_score(plan, "stopped", 8, fd=9.5)
    loop.train(plan, plan.state("stopped", 16))
    put_score(plan, "stopped", 16, fd=7.5)
    trackers.update(plan)
    (run,) = wandb.of("stopped")
    assert run.axes == {"*": "step"} and not wandb.open
    assert [row["step"] for row in run.rows if "denoising" in row] == [2, 4, 6, 8, 10, 12, 14, 16]
    scores = [(row["step"], row["scores/FD (cnn, quick)"]) for row in run.rows if "scores/FD (cnn, quick)" in row]
    assert scores == [(8, 9.5), (16, 7.5)]
    assert [row["step"] for row in run.rows if "stop/features" in row] == [12]
    assert run.summary["stop/features"] == "features stops at step 12, as its row says"
    assert wandb.told[0]["config"]["recipe"]["training"]["lr"] == 0.001
    (other,) = wandb.of("HASTE")
    assert [row["step"] for row in other.rows if "denoising" in row] == [2, 4, 6, 8, 10, 12]


def test_offline_each_job_has_the_whole_curve_for_the_last_that_is_sent_replaces_those_before(
    make_plan, wandb, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE"}}, runtime={**RUNTIME, "trackers": ["wandb"]})
    for step in (8, 16):
        loop.train(plan, plan.state("HASTE", step))
    first, second = wandb.told
    assert first["id"] == second["id"]
    steps = [row["step"] for row in wandb.runs[first["id"]].rows if "denoising" in row]
    assert steps == [2, 4, 6, 8, *range(2, 17, 2)]


def test_training_goes_on_without_wandb_and_what_it_lacks_is_written_later(make_plan, wandb, caplog):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE"}}, runtime={**RUNTIME, "trackers": ["wandb"]})
    wandb.broken = True
    loop.train(plan, plan.state("HASTE", 8))
    assert caplog.text.count("wandb cannot be written to (TimeoutError: the service does not answer)") == 1
    wandb.broken = False
    trackers.update(plan)
    (run,) = wandb.of("HASTE")
    assert [row["step"] for row in run.rows if "denoising" in row] == [2, 4, 6, 8]


def test_every_tracker_of_the_configuration_exists_and_none_else():
    (choices,) = [field for name, field in config.Runtime.model_fields.items() if name == "trackers"]
    assert set(choices.annotation.__args__[0].__args__) == set(trackers.TRACKERS)


def test_a_tracker_that_is_not_installed_is_refused_with_how_to_install_it(tracked, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed \(`pip install wandb`\)"):
        trackers.update(tracked("wandb"))
