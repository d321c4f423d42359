"""A stop that is decided while training: the same bits as a stop at that step by hand, whatever interrupts it."""

import json
import math
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from haste.align.triggers import TRIGGERS, Average, Decision, Trigger
from haste.cli import main as cli
from haste.files import artefact, journal
from haste.files.provenance import read_header
from haste.models.sit import SiT
from haste.plan.names import State
from haste.teachers import encoder, targets
from haste.train import loop, readings, state, stops
from haste.train.distributed import Group
from haste.train.gradient_angles import Gradients
from haste.train.step import Objective

TINY = yaml.safe_load((Path(__file__).parent.parent / "tiny.yaml").read_text())
FORK = multiprocessing.get_context("fork")
# The slow average looks back on 2 steps, and 100 % is never bettered: the first reading stops, 6 steps after step 4.
AT_10 = {"trigger": "plateau", "after": 4, "every": 6, "fast": 0.2, "slow": 0.5, "margin": 1}
NEVER = {"trigger": "plateau", "after": 4, "every": 3, "fast": 0.2, "slow": 0.95, "margin": 0}
QUICK = {"save_every": 3, "log_every": 1, "trackers": []}


class Counts(Trigger):
    """Another trigger: it stops at a reading of its own choice, and reads the last step's denoising loss."""

    readings: int

    @property
    def needs(self):
        return {"last": Average("denoising", 0.0)}

    def decide(self, step, history):
        return Decision(len(history) == self.readings, f"{len(history)} readings up to {history[-1].values['last']}")


@pytest.fixture
def counts(monkeypatch):
    """As if it stood in the table."""
    monkeypatch.setitem(TRIGGERS, "counts", Counts)
    return {"trigger": "counts", "after": 4, "every": 2}


def overheard(monkeypatch):
    """What training asks for from now on: loads of teachers, and for each forward pass whether it has taps."""
    loads, asked, load, forward = [], [], encoder.Teacher.load, SiT.forward
    monkeypatch.setattr(encoder.Teacher, "load", lambda *args, **more: loads.append(1) or load(*args, **more))
    monkeypatch.setattr(
        SiT,
        "forward",
        lambda self, x, t, y, taps=(): asked.append(bool(taps)) or forward(self, x, t, y, taps=taps),
    )
    return loads, asked


def runs(**stops):
    return {name: {"alignment": "HASTE", "stop": stop} for name, stop in stops.items()}


def train_to(plan, run, *steps):
    for step in steps:
        loop.train(plan, plan.state(run, step))


def tensors(plan, run, step):
    return load_file(plan.path(plan.state(run, step)))


def assert_same_learner(found, expected):
    """All of a state but for the averages of triggers."""
    found = {name: value for name, value in found.items() if not name.startswith("readings/")}
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def folder(plan, run, step=16):
    return Path(plan.path(plan.state(run, step))).parent


def remove_states(plan, run):
    for path in folder(plan, run).rglob("step-*"):
        path.unlink()
    (folder(plan, run) / stops.FILE).unlink(missing_ok=True)


def test_what_follows_the_stop_is_to_the_bit_what_follows_a_stop_at_that_step_by_hand(make_plan):
    plan = make_plan(runs=runs(seen=AT_10, by_hand=10), runtime=QUICK)
    train_to(plan, "seen", 4, 8, 16)
    train_to(plan, "by_hand", 8, 10, 16)
    assert_same_learner(tensors(plan, "seen", 16), tensors(plan, "by_hand", 16))
    # The state at the stop is kept, and is that of the trunk there: the projector is still in it.
    kept = folder(plan, "seen") / "step-00000010.safetensors"
    assert any(name.startswith("projectors/") for name in load_file(kept))
    assert_same_learner(load_file(kept), tensors(plan, "by_hand", 10))
    assert_same_learner(tensors(plan, "seen", 8), tensors(plan, "by_hand", 8))


def test_the_trunk_is_shared_up_to_the_step_at_which_watching_begins(make_plan):
    plan = make_plan(runs=runs(seen=AT_10, never=None), runtime=QUICK)
    assert plan.state("seen", 4) == State(plan.state("never", 4).trajectory, 4)
    assert plan.state("seen", 5).trajectory != plan.state("never", 5).trajectory
    train_to(plan, "never", 4, 8)
    train_to(plan, "seen", 8)
    assert [r["step"] for r in journal.read(folder(plan, "seen") / "log.jsonl")] == [5, 6, 7, 8]
    # States that nobody watches are as they were before there were triggers, and are gone on from.
    trunk = plan.path(plan.state("never", 4))
    assert "triggers" not in read_header(trunk)
    assert not any(name.startswith("readings/") for name in load_file(trunk))


def test_after_the_stop_no_teacher_is_built_no_image_read_and_no_tap_asked(make_plan, monkeypatch):
    plan = make_plan(runs=runs(seen=AT_10), runtime=QUICK)
    train_to(plan, "seen", 4, 8)
    loads, asked = overheard(monkeypatch)
    train_to(plan, "seen", 16)
    assert asked == [True] * 2 + [False] * 6
    assert len(loads) == 1
    # And where a later job begins behind the stop, images and teacher need not even be there.
    Path(plan.path(plan.state("seen", 16))).unlink()
    Path(plan.images.manifest).unlink()
    train_to(plan, "seen", 16)
    assert len(loads) == 1


def test_each_term_stops_by_its_own_trigger_or_step(make_plan):
    later = {**AT_10, "every": 8}
    decided = {"both": {"features": AT_10, "attention": later}, "one": {"features": AT_10, "attention": 12}}
    hand = {"both by hand": {"features": 10, "attention": 12}}
    plan = make_plan(runs=runs(**decided, **hand), runtime=QUICK)
    train_to(plan, "both by hand", 16)
    for run, steps in {"both": (16,), "one": (12, 16)}.items():
        train_to(plan, run, *steps)
        assert_same_learner(tensors(plan, run, 16), tensors(plan, "both by hand", 16))
    assert {kind: one.step for kind, one in stops.along(plan, "both", 0).items()} == {
        "features": 10,
        "attention": 12,
    }
    # Of `one` the attention stops by the configuration, on a trajectory of its own, which carries the record on.
    assert {kind: one.step for kind, one in stops.along(plan, "one", 0).items()} == {"features": 10}
    header = read_header(plan.path(plan.state("one", 16)))
    assert header["triggers"]["features"]["stopped"]["step"] == 10
    assert not (folder(plan, "one") / stops.FILE).exists()


def averages(losses, decay):
    """The normalised exponential average of the losses of some steps."""
    weights = decay ** np.arange(len(losses))[::-1]
    return float((weights * losses).sum() / weights.sum())


def test_readings_are_the_averages_of_what_the_log_says_of_each_step(make_plan):
    plan = make_plan(runs=runs(seen=NEVER), runtime=QUICK, training={"batch": 8, "precision": "fp64"})
    train_to(plan, "seen", 8, 16)
    header = read_header(plan.path(plan.state("seen", 16)))
    lines = {r["step"]: r for r in journal.read(folder(plan, "seen") / "log.jsonl")}
    # Twenty steps are what 0.95 looks back on: no reading yet, nothing is decided before.
    assert header["triggers"]["features"]["readings"] == []
    shorter = {**NEVER, "slow": 0.8, "margin": 0.0001}
    plan = make_plan(runs=runs(seen=shorter), runtime=QUICK, training={"batch": 8, "precision": "fp64"})
    train_to(plan, "seen", 8, 16)
    header = read_header(plan.path(plan.state("seen", 16)))
    lines = {r["step"]: r for r in journal.read(folder(plan, "seen") / "log.jsonl")}
    for kind, left in {"features": 1.0, "attention": 0.0}.items():  # 1 - cosine, and the cross-entropy
        found = header["triggers"][kind]["readings"]
        assert found and found[0]["step"] == 10
        for reading in found:
            seen = [r for s in range(5, reading["step"] + 1) if kind in (r := lines[s])]
            losses = np.array([left + r[kind] for r in seen])
            assert len(losses) == reading["step"] - 4
            assert reading["fast"] == pytest.approx(averages(losses, 0.2), rel=1e-12)
            assert reading["slow"] == pytest.approx(averages(losses, 0.8), rel=1e-12)


def test_the_file_at_the_stop_says_step_trigger_reason_readings_and_cost(make_plan, capsys, caplog):
    caplog.set_level("INFO")
    plan = make_plan(runs=runs(seen=AT_10), runtime=QUICK)
    train_to(plan, "seen", 16)
    found = artefact.read_json(folder(plan, "seen") / stops.FILE, stops.KIND)
    for kind in ("features", "attention"):
        term = found["terms"][kind]
        assert (term["step"], term["trigger"]) == (10, AT_10)
        assert [reading["step"] for reading in term["readings"]] == [10]
        assert term["seconds"] >= 0
        assert term["reason"] in caplog.text and "not more than 100.00% below" in term["reason"]
        assert f"step 10: plateau stops {kind}" in caplog.text
    assert found["key"] == plan.trajectories[plan.state("seen", 16).trajectory].key
    assert cli.main(["show", str(folder(plan, "seen") / stops.FILE)]) == 0
    assert '"reason"' in capsys.readouterr().out


def _in_child(plan, target, errors, arm):
    torch.set_num_threads(1)
    try:
        arm()
        loop.train(plan, target)
    except BaseException as error:
        errors.put(repr(error))
        raise


def killed(plan, target, arm):
    """Train in a child that kills itself where `arm` says. True: it did."""
    errors = FORK.Queue()
    child = FORK.Process(target=_in_child, args=(plan, target, errors, arm))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), errors.get(timeout=5)
    return child.exitcode == -signal.SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, when):
    """Die before the call of a function for which `when` is true."""

    def arm():
        whole = getattr(owner, name)

        def dying(*args, **more):
            if when(*args):
                die()
            return whole(*args, **more)

        setattr(owner, name, dying)

    return arm


MOMENTS = {
    "in the step before it": before(Objective, "forward", lambda self, batch, *_: batch.step == 9),
    "when it is decided": before(state, "save", lambda path, *_: "00000010" in str(path)),
    "in the save of its state": before(state.files, "save_file", lambda tensors, path, **_: "00000010" in str(path)),
    "before its file": before(stops.artefact, "write_json", lambda path, _: Path(path).name == stops.FILE),
    "in the step after it": before(Objective, "forward", lambda self, batch, *_: batch.step == 10),
    "later": before(Objective, "forward", lambda self, batch, *_: batch.step == 14),
}


# A term stops at its third reading, at step 10.
ANGLE = {"trigger": "gradient-angle", "after": 4, "every": 2, "threshold": 1, "patience": 3, "images": 12, "shards": 3}
MEASURING = {"while it is measured": before(Gradients, "_negatives", lambda self, held: True)}


@pytest.mark.parametrize(
    ("stop", "moments"),
    [({"trigger": "counts", "after": 4, "every": 2, "readings": 3}, MOMENTS), (ANGLE, {**MEASURING, **MOMENTS})],
    ids=["averages", "angles"],
)
def test_a_kill_before_at_and_after_the_stop_changes_no_bit_and_no_decision(make_plan, counts, stop, moments):
    plan = make_plan(runs=runs(seen=stop), runtime={**QUICK, "save_every": 2})
    train_to(plan, "seen", 4, 8)
    ends = {}
    for moment in (None, *moments):
        remove = [Path(plan.path(plan.state("seen", 16))), *folder(plan, "seen").glob("step-00000010*")]
        for path in [*remove, *folder(plan, "seen").glob("rolling/*"), folder(plan, "seen") / stops.FILE]:
            path.unlink(missing_ok=True)
        target = plan.state("seen", 16)
        if moment is not None:
            assert killed(plan, target, moments[moment]), moment
        train_to(plan, "seen", 16)
        terms = artefact.read_json(folder(plan, "seen") / stops.FILE, stops.KIND)["terms"]
        told = {kind: {k: v for k, v in term.items() if k != "seconds"} for kind, term in terms.items()}
        ends[moment] = (tensors(plan, "seen", 16), load_file(folder(plan, "seen") / "step-00000010.safetensors"), told)
    undisturbed = ends.pop(None)
    for term in undisturbed[2].values():
        assert term["step"] == 10 and [reading["step"] for reading in term["readings"]] == [6, 8, 10]
    for moment, found in ends.items():
        for mine, expected in zip(found[:2], undisturbed[:2], strict=True):
            assert mine.keys() == expected.keys(), moment
            assert all(torch.equal(mine[name], expected[name]) for name in expected), moment
        assert found[2] == undisturbed[2], moment


def test_a_missing_file_is_written_again_by_the_next_start(make_plan):
    plan = make_plan(runs=runs(seen=AT_10), runtime=QUICK)
    train_to(plan, "seen", 16)
    path = folder(plan, "seen") / stops.FILE
    terms = artefact.read_json(path, stops.KIND)["terms"]
    for damage in (b"", b"{}", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        train_to(plan, "seen", 16)
        assert artefact.read_json(path, stops.KIND)["terms"] == terms


def test_cutting_a_run_elsewhere_changes_neither_readings_nor_bits(make_plan):
    never = {**NEVER, "slow": 0.8}
    whole = make_plan(runs={"seen": {"alignment": "HASTE", "stop": never, "milestones": [16]}}, runtime=QUICK)
    train_to(whole, "seen", 16)
    expected, header = tensors(whole, "seen", 16), read_header(whole.path(whole.state("seen", 16)))
    remove_states(whole, "seen")
    cuts = {"seen": {"alignment": "HASTE", "stop": never, "milestones": [5, 11, 16]}}
    cut = make_plan(runs=cuts, runtime={**QUICK, "save_every": 2})
    train_to(cut, "seen", 5, 11, 16)
    found = tensors(cut, "seen", 16)
    assert found.keys() == expected.keys() and any(name.startswith("readings/") for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = read_header(cut.path(cut.state("seen", 16)))
    for kind, record in header["triggers"].items():
        assert {**again["triggers"][kind], "seconds": 0} == {**record, "seconds": 0}


def test_a_state_at_the_stop_that_is_not_there_afterwards_is_an_error_and_not_another_try(make_plan, monkeypatch):
    plan = make_plan(runs=runs(seen=AT_10), runtime=QUICK)
    train_to(plan, "seen", 8)
    save = state.save
    monkeypatch.setattr(state, "save", lambda path, *rest: save(Path(path).parent / "elsewhere" / path.name, *rest))
    with pytest.raises(ValueError, match="expected that of step 10, which was just saved"):
        train_to(plan, "seen", 16)


def test_who_is_interrupted_at_the_stop_goes_on_behind_it(make_plan):
    plan = make_plan(runs=runs(seen=AT_10, by_hand=10), runtime=QUICK)
    train_to(plan, "by_hand", 8, 10, 16)
    train_to(plan, "seen", 8)
    asked = iter([0, 3])
    with pytest.raises(loop.Interrupted) as stop:
        loop.train(plan, plan.state("seen", 16), lambda: next(asked))
    assert (stop.value.step, stop.value.reason) == (10, 3)
    train_to(plan, "seen", 16)
    assert_same_learner(tensors(plan, "seen", 16), tensors(plan, "by_hand", 16))


def test_targets_on_disk_are_read_up_to_the_stop_and_no_more(make_plan, monkeypatch):
    cached = {"vit": {**TINY["teachers"]["vit"], "cache": "features+attention"}}
    plan = make_plan(teachers=cached, runs=runs(seen=AT_10, by_hand=10), runtime=QUICK)
    for shard in range(plan.targets["vit"].shards):
        targets.make_shard(plan, "vit", shard)
    targets.join_shards(plan, "vit")
    train_to(plan, "by_hand", 8, 10, 16)
    train_to(plan, "seen", 8)
    asked, forward = [], Objective.forward
    monkeypatch.setattr(
        Objective,
        "forward",
        lambda self, batch, *args: asked.append(bool(batch.targets)) or forward(self, batch, *args),
    )
    train_to(plan, "seen", 16)
    assert asked == [True] * 2 + [False] * 6
    assert_same_learner(tensors(plan, "seen", 16), tensors(plan, "by_hand", 16))
    # And where a later job begins behind the stop, they need not even be there.
    Path(plan.path(plan.state("seen", 16))).unlink()
    Path(plan.targets["vit"].manifest).unlink()
    train_to(plan, "seen", 16)


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the processor wait for a GPU to say a number."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("weights", "share"), [(None, 1.0), (torch.tensor([0.0, 0.5]), 0.25)])
def test_a_step_asks_the_device_for_no_number_and_a_step_that_overflowed_is_left_out(weights, share):
    """`share` is that of the samples that count, over those of all processes: a loss is a mean over these."""
    term = {"trigger": {**NEVER, "slow": 0.5}, "similarity": "cosine"}
    watch = readings.Watch("features", term, Group(0, 1, torch.device("cpu")))
    losses = [-0.25, math.inf, -0.5, math.nan, -0.75]
    with NoWaiting():
        for loss in losses:
            watch.add({"features": torch.tensor(loss), "denoising": torch.tensor(1.0)}, weights)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        watch.sums.sum().item()
    seen = np.array([1 + loss / share for loss in losses if math.isfinite(loss)])
    watch.read(99, "x")
    assert watch.history[0].values == pytest.approx(
        {"fast": averages(seen, 0.2), "slow": averages(seen, 0.5)}, rel=1e-14
    )


def test_readings_of_a_finished_run_tell_where_another_margin_would_have_stopped_it(make_plan, capsys):
    """By the code that the page on extending shows."""
    page = (Path(__file__).parent.parent.parent / "docs" / "extending.md").read_text().split("\n## A trigger\n")[1]
    (code,) = re.findall(r"```python\n(from .*?)```", page.split("\n## ")[0], re.DOTALL)
    never = {"trigger": "plateau", "after": 4, "every": 2, "fast": 0.2, "slow": 0.75, "margin": 0}
    plan = make_plan(runs=runs(seen=never), runtime=QUICK)
    train_to(plan, "seen", 8)
    state_file = plan.path(plan.state("seen", 8))
    exec(code.replace("results/states/TRAJECTORY/step-00400000.safetensors", state_file).replace("0.05", "1.0"), {})
    assert capsys.readouterr().out.startswith("(8, Decision(stop=True, reason=")


def test_the_last_step_alone_can_be_read_too(make_plan, counts):
    plan = make_plan(runs=runs(seen={**counts, "readings": 0}), runtime=QUICK)
    train_to(plan, "seen", 16)
    readings = read_header(plan.path(plan.state("seen", 16)))["triggers"]["features"]["readings"]
    lines = {r["step"]: r["denoising"] for r in journal.read(folder(plan, "seen") / "log.jsonl")}
    assert [reading["step"] for reading in readings] == [6, 8, 10, 12, 14, 16]
    assert [r["last"] for r in readings] == pytest.approx([lines[r["step"]] for r in readings], rel=1e-6)


def test_a_state_whose_readings_are_damaged_is_refused_by_name(make_plan):
    plan = make_plan(runs=runs(seen={**NEVER, "slow": 0.5}), runtime=QUICK)
    train_to(plan, "seen", 8)
    path = Path(plan.path(plan.state("seen", 8)))
    whole = path.read_bytes()
    for old, new in {rb"\"fast\": ": rb"\"fist\": ", rb"readings/features": rb"readings/featurez"}.items():
        path.write_bytes(whole.replace(old, new))
        assert path.read_bytes() != whole
        with pytest.raises(ValueError, match=str(path)):
            train_to(plan, "seen", 16)
    path.write_bytes(whole)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(json.loads(whole[8 : 8 + length])["__metadata__"]["haste"])
    assert header["triggers"]["features"]["trigger"]["every"] == 3
