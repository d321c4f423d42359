"""Training is exact: whatever interrupts it, the same command ends in the same bits."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from haste.cli import main as cli
from haste.data.batches import Batches
from haste.data.condition import Labels
from haste.diffusion.interpolant import Interpolant
from haste.files import journal, locks, store
from haste.files.store import Store, join, write_shard
from haste.models.sit import SiT
from haste.teachers import encoder
from haste.train import loop, state
from haste.train.step import Objective

FORK = multiprocessing.get_context("fork")


def tensors(plan, run, step):
    return load_file(plan.path(plan.state(run, step)))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def train_to(plan, run, *steps):
    for step in steps:
        loop.train(plan, plan.state(run, step))


@pytest.mark.parametrize("run", ["vanilla", "HASTE"])
def test_cutting_a_run_at_other_milestones_changes_no_bit(make_plan, run, tmp_path):
    whole = make_plan(defaults={"model": "dot", "milestones": [16], "sampling": ["quick"]})
    train_to(whole, run, 16)
    expected = tensors(whole, run, 16)
    Path(whole.path(whole.state(run, 16))).unlink()
    cut = make_plan(defaults={"model": "dot", "milestones": [1, 5, 8, 16], "sampling": ["quick"]})
    train_to(cut, run, 1, 5, 8, 16)
    assert_same_bits(tensors(cut, run, 16), expected)


def test_a_branch_of_a_fork_has_the_bits_of_a_run_that_stops_there(make_plan):
    plan = make_plan()
    train_to(plan, "HASTE-12", 8, 12, 16)
    stopped = tensors(plan, "HASTE-12", 16)
    trunk = tensors(plan, "HASTE-12", 12)
    assert any(name.startswith("projectors/") for name in trunk)
    assert not any("projectors/" in name for name in stopped)
    # The trunk goes on as if nobody had branched off.
    train_to(plan, "HASTE", 16)
    assert any(name.startswith("projectors/") for name in tensors(plan, "HASTE", 16))
    assert not torch.equal(
        tensors(plan, "HASTE", 16)["model/x_embedder.proj.weight"], stopped["model/x_embedder.proj.weight"]
    )
    # A fork of the finished trunk, whose state there was not kept, has the same bits.
    shutil.rmtree(Path(plan.root, "states"))
    train_to(plan, "HASTE", 8, 16)
    forked = make_plan(forks={"F": {"run": "HASTE", "at": [12], "for": 4}})
    branch = forked.state("F@12-stopped", 16)
    loop.train(forked, forked.segment(branch).parent)
    loop.train(forked, branch)
    assert_same_bits(tensors(forked, "F@12-stopped", 16), stopped)


def test_after_the_stop_no_teacher_is_built_no_image_read_and_no_tap_asked(make_plan, monkeypatch):
    plan = make_plan()
    train_to(plan, "HASTE-12", 8, 12)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a teacher was asked for after the stop")

    asked = []
    forward = SiT.forward
    monkeypatch.setattr(encoder.Teacher, "load", forbidden)
    monkeypatch.setattr(
        SiT,
        "forward",
        lambda self, x, t, y, taps=(): asked.append(set(taps)) or forward(self, x, t, y, taps=taps),
    )
    Path(plan.images.manifest).unlink()
    train_to(plan, "HASTE-12", 16)
    assert asked == [set()] * 4


def _train_in_child(plan, target, errors, die_after):
    torch.set_num_threads(1)
    if die_after is not None:
        begin = journal.Journal.__enter__

        def armed(self):
            # A thread dies at its own moment: in a step, in a log line, in a save, between a rename and the next thing.
            threading.Timer(die_after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return begin(self)

        journal.Journal.__enter__ = armed
    try:
        loop.train(plan, target)
    except BaseException as error:
        errors.put(repr(error))
        raise


def _run_in_child(plan, target, die_after=None):
    errors = FORK.Queue()
    child = FORK.Process(target=_train_in_child, args=(plan, target, errors, die_after))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), errors.get(timeout=5)
    return child.exitcode == -signal.SIGKILL


def _tear_saves(monkeypatch, die_on):
    """In the `die_on`-th save: write half the file, then SIGKILL oneself."""
    whole, count = state.files.save_file, [0]

    def torn(tensors, path, metadata):
        count[0] += 1
        whole(tensors, path, metadata)
        if count[0] == die_on:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(state.files, "save_file", torn)


def test_kill_at_20_random_moments_and_in_the_middle_of_saves_changes_no_bit(make_plan, monkeypatch):
    runs = {"HASTE-70": {"alignment": "HASTE", "stop": 70, "milestones": [70, 140]}}
    plan = make_plan(runs=runs, runtime={"save_every": 4, "log_every": 4})
    targets = [plan.state("HASTE-70", step) for step in (70, 140)]
    for target in targets:
        assert not _run_in_child(plan, target)
    expected = [load_file(plan.path(target)) for target in targets]
    logs = [Path(plan.path(target)).parent / "log.jsonl" for target in targets]
    took = sum(record["seconds"] for log in logs for record in journal.read(log))
    for file in Path(plan.root, "states").rglob("*"):
        if file.is_file():
            file.unlink()

    chance, kills, torn = random.Random(20), 0, 0
    for target in targets:
        while not Path(plan.path(target)).exists():
            with monkeypatch.context() as patch:
                if chance.random() < 0.25:
                    _tear_saves(patch, die_on=chance.randint(1, 3))
                    kills += _run_in_child(plan, target)
                    torn += any(Path(plan.path(target)).parent.rglob(".*.part"))
                else:
                    kills += _run_in_child(plan, target, chance.uniform(0, took / 16) if kills < 40 else None)
    assert kills >= 20
    assert torn >= 3
    for target, want in zip(targets, expected, strict=True):
        assert not _run_in_child(
            plan, target
        )  # killed between the last rename and the clean-up: the same command again
        assert_same_bits(load_file(plan.path(target)), want)
        assert not list(Path(plan.path(target)).parent.rglob(".*.part"))
        assert not list(Path(plan.path(target)).parent.glob("rolling/*"))


def test_a_finished_state_is_never_trained_again(make_plan):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    path = Path(plan.path(plan.state("vanilla", 8)))
    before = path.stat().st_mtime_ns
    train_to(plan, "vanilla", 8)
    assert path.stat().st_mtime_ns == before


def test_two_trainers_on_one_trajectory_the_second_waits_says_for_whom_and_finds_the_state(make_plan, caplog):
    plan = make_plan()
    target = plan.state("vanilla", 8)
    path = Path(plan.path(target))
    with caplog.at_level("INFO"), locks.holding(path.parent / "lock", "x"):
        second = threading.Thread(target=loop.train, args=(plan, target))
        second.start()
        while "waiting for" not in caplog.text:
            time.sleep(0.01)
        assert not path.exists()
    second.join()
    assert path.exists()
    assert re.search(rf"waiting for trajectory {path.parent.name}: .* by process {os.getpid()} on ", caplog.text)


def test_rolling_states_are_the_newest_two_and_gone_at_the_end(make_plan):
    plan = make_plan(runtime={"save_every": 2, "log_every": 2})
    rolling, seen = Path(plan.path(plan.state("vanilla", 8))).parent / "rolling", []

    def look():
        seen.append(sorted(int(path.name[5:13]) for path in rolling.glob("step-*")))
        return 0

    loop.train(plan, plan.state("vanilla", 8), interrupted=look)  # asked after steps 1 to 7
    # Each is written while training goes on, and before the next: what is there is the newest two of [2, 4, 6] so far,
    # a third for the moment between its coming and the oldest one's going.
    assert seen[4] in ([2], [2, 4]) and seen[6] in ([2, 4], [2, 4, 6], [4, 6])
    assert not list(rolling.iterdir())


def test_states_are_kept_every_so_often_and_a_later_branch_starts_from_the_nearest(make_plan):
    plan = make_plan(runtime={"keep_every": 5, "save_every": 100, "log_every": 2})
    train_to(plan, "HASTE", 8)
    folder = Path(plan.path(plan.state("HASTE", 8))).parent
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000005.safetensors", "step-00000008.safetensors"]
    runs = {"late": {"alignment": "HASTE", "stop": 7, "milestones": [8]}}
    branch = make_plan(runs=runs)
    assert branch.segment(branch.state("late", 7)).start == 5


def test_a_rolling_state_that_cannot_be_read_is_passed_over(make_plan, caplog):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    expected = tensors(plan, "vanilla", 8)
    path = Path(plan.path(plan.state("vanilla", 8)))
    path.unlink()
    rolling = path.parent / "rolling" / "step-00000006.safetensors"
    rolling.parent.mkdir(exist_ok=True)
    rolling.write_bytes(b"\x10\0\0\0")
    train_to(plan, "vanilla", 8)
    assert "passing over" in caplog.text
    assert_same_bits(tensors(plan, "vanilla", 8), expected)


def test_a_parent_state_that_is_truncated_is_refused_by_name_and_kept(make_plan, capsys):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    path = Path(plan.path(plan.state("vanilla", 8)))
    for size in (0, 7, 100, path.stat().st_size - 1):
        torn = path.read_bytes()[:size]
        path.write_bytes(torn)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            train_to(plan, "vanilla", 16)
        assert path.read_bytes() == torn
        path.write_bytes(torn)
        assert cli.main(["train", str(plan.state("vanilla", 16)), "-c", str(plan.file)]) == 2
        assert str(path) in capsys.readouterr().err
        path.unlink()
        train_to(plan, "vanilla", 8)


def test_a_state_of_another_trajectory_or_schema_is_refused(make_plan, monkeypatch):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    train_to(plan, "REPA", 8)
    mine, other = (Path(plan.path(plan.state(run, 8))) for run in ("vanilla", "REPA"))
    good = mine.read_bytes()
    mine.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="a state of trajectory"):
        train_to(plan, "vanilla", 16)
    mine.write_bytes(good.replace(b'\\"schema\\": 1', b'\\"schema\\": 0'))
    with pytest.raises(ValueError, match="schema 0 is older than this version reads"):
        train_to(plan, "vanilla", 16)


def remake_latents(plan, change):
    """Put other content where the latents were, under the same key: another version of a library would."""
    old = Store.open(plan.latents.folder)
    common = {"kind": "latents", "key": old.manifest["key"], "recipe": old.recipe, "shards": 1, "provenance": {}}
    rows = {"moments": change(old.read("moments", range(old.count))), "label": old.read("label", range(old.count))}
    facts = {
        n: old.manifest[n] for n in ("classes", "images", "autoencoder", "channels", "scale", "shift", "factor", "size")
    }
    write_shard(old.folder, **common, shard=0, total=old.count, fields=old.fields, batches=[rows], facts=facts)
    join(old.folder, **common, splits=old.manifest["splits"])


def test_training_on_other_latents_than_before_is_refused(make_plan):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    remake_latents(plan, lambda moments: moments + 1e-3)
    with pytest.raises(ValueError, match="was trained with latents"):
        train_to(plan, "vanilla", 16)


def test_a_full_disk_stops_with_a_message_and_keeps_the_last_good_state(make_plan, monkeypatch, capsys):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    good = Path(plan.path(plan.state("vanilla", 8))).read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise state.files.safetensors.SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(state.files, "save_file", full)
        assert cli.main(["train", str(plan.state("vanilla", 16)), "-c", str(plan.file)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert Path(plan.path(plan.state("vanilla", 8))).read_bytes() == good
    assert not list(Path(plan.root, "states").rglob(".*.part"))
    train_to(plan, "vanilla", 16)


def test_a_loss_that_is_not_finite_stops_training_before_anything_is_saved(make_plan, monkeypatch):
    plan = make_plan()
    forward = Objective.forward

    def broken(self, batch, *more):
        found = forward(self, batch, *more)
        return {**found, "denoising": found["denoising"] * float("nan")} if batch.step == 4 else found

    monkeypatch.setattr(Objective, "forward", broken)
    with pytest.raises(FloatingPointError, match="denoising and grad_norm not finite at step 5"):
        train_to(plan, "vanilla", 8)
    kept = list(Path(plan.root, "states").rglob("*.safetensors"))
    assert [path.name for path in kept] == ["step-00000003.safetensors"]
    assert all(torch.isfinite(value).all() for path in kept for value in load_file(path).values())


def test_the_journal_survives_torn_lines_and_repeated_stretches(make_plan):
    plan = make_plan()
    train_to(plan, "vanilla", 8)
    path = Path(plan.path(plan.state("vanilla", 8))).parent / "log.jsonl"
    assert [record["step"] for record in journal.read(path)] == [2, 4, 6, 8]
    path.write_bytes(path.read_bytes()[:-20])
    train_to(plan, "vanilla", 16)
    assert [record["step"] for record in journal.read(path)] == [2, 4, 6, 10, 12, 14, 16]
    assert [record["step"] for record in journal.read(path, 6, 12)] == [10, 12]


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_a_batch_is_the_same_read_ahead_by_any_number_of_threads_or_asked_for_alone(make_plan, monkeypatch, readers):
    plan = make_plan()
    stores = [Store.open(made.folder) for made in (plan.latents, plan.images)]
    batches = Batches(*stores, seed=3, size=8, condition=Labels(classes=10), class_dropout=0.5, process=Interpolant())
    pread, readers_seen = store._pread, set()
    monkeypatch.setattr(
        store, "_pread", lambda *given: readers_seen.add(threading.current_thread().name[:5]) or pread(*given)
    )
    found = list(batches.ahead(range(5, 9), readers=readers))
    assert readers_seen == {"reads"}  # none in the threads that make batches
    for batch in found:
        alone = batches(batch.step)
        for name in ("moments", "draw", "noise", "t", "condition", "images"):
            assert torch.equal(getattr(batch, name), getattr(alone, name)), name


def test_labels_are_dropped_at_the_configured_rate(make_plan):
    plan = make_plan()
    store, seams = Store.open(plan.latents.folder), {"process": Interpolant(), "condition": Labels(classes=10)}
    batches = Batches(store, None, seed=3, size=1000, class_dropout=0.1, **seams)
    dropped = sum(int((batches(step).condition == 10).sum()) for step in range(5))
    assert 400 < dropped < 600  # 500 expected, standard deviation 21
