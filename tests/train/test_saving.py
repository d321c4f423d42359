"""Saving goes on beside training, and loses nothing."""

import errno
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from haste import config
from haste.files import tensors as files
from haste.train import checkpoint, loop, saving, state

QUIET = {"log_every": 100, "trackers": []}


def read(path):
    with files.opened(path, "state") as file:
        return files.read(path, file, list(file.keys()))


@pytest.fixture
def disk(monkeypatch):
    """What happens to a write into the folder of rolling states: `disk.append(function)`."""
    first, write = [], files.write

    def written(path, tensors, header):
        if first and "rolling" in str(path):
            first.pop(0)()
        write(path, tensors, header)

    monkeypatch.setattr(files, "write", written)
    return first


def test_training_goes_on_while_a_slow_disk_writes_and_the_next_save_waits_for_it(make_plan, disk, monkeypatch):
    plan = make_plan(runs={"short": {"milestones": [6]}}, runtime={**QUIET, "save_every": 2})
    may_end, seen, step = threading.Event(), [], loop.Loop._step
    disk.append(lambda: seen.append("writes") or may_end.wait(60) or seen.append("hangs"))
    disk.append(lambda: seen.append("writes again"))

    def counted(self, batch):
        seen.append(batch.step)
        if batch.step == 3:  # the state after two steps is still on its way
            may_end.set()
        return step(self, batch)

    monkeypatch.setattr(loop.Loop, "_step", counted)
    loop.train(plan, plan.state("short", 6))
    assert "hangs" not in seen and seen.index("writes") < seen.index(3) < seen.index("writes again")


def test_a_state_saved_in_the_background_is_that_of_its_step_to_the_bit(make_plan):
    runs = {"short": {"milestones": [4]}, "long": {"milestones": [7]}}
    plan = make_plan(runs=runs, runtime={**QUIET, "save_every": 1, "keep_every": 4})
    kept = Path(plan.path(plan.state("short", 4)))
    expected = read(loop.train(plan, plan.state("short", 4)))
    kept.unlink()
    loop.train(plan, plan.state("long", 7))  # saves the same state on its way, while it goes on
    found = read(kept)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_disk_that_is_full_during_a_save_in_the_background_ends_training_with_its_name(make_plan, disk):
    plan = make_plan(runs={"short": {"milestones": [300]}}, runtime={**QUIET, "save_every": 2})
    steps = []

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step-2")

    disk.append(full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(plan, plan.state("short", 300), lambda: steps.append(1) or 0)
    assert len(steps) <= 4  # the next save would have raised it too
    assert not list(Path(plan.path(plan.state("short", 300))).parent.rglob("*.part"))


def test_the_state_of_an_interruption_is_saved_although_the_save_before_it_failed(make_plan, disk, caplog):
    plan = make_plan(runs={"short": {"milestones": [9]}}, runtime={**QUIET, "save_every": 2})
    steps, may_fail = [], threading.Event()

    def fails():
        may_fail.wait(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step-2")

    def stop():
        steps.append(1)
        if len(steps) == 3:
            threading.Timer(0.3, may_fail.set).start()
        return int(len(steps) == 3)

    disk.append(fails)
    with pytest.raises(loop.Interrupted, match="after step 3, which is saved"):
        loop.train(plan, plan.state("short", 9), stop)
    assert "a save failed" in caplog.text


def test_whoever_asks_training_to_stop_finds_both_states_whole(make_plan, disk):
    plan = make_plan(runs={"short": {"milestones": [9]}}, runtime={**QUIET, "save_every": 2})
    steps, may_end = [], threading.Event()
    disk.append(lambda: may_end.wait(60))

    def stop():
        steps.append(1)
        if len(steps) == 3:
            threading.Timer(0.3, may_end.set).start()
        return int(len(steps) == 3)

    with pytest.raises(loop.Interrupted, match="after step 3, which is saved"):
        loop.train(plan, plan.state("short", 9), stop)
    rolling = sorted(Path(plan.path(plan.state("short", 9))).parent.joinpath("rolling").glob("*.safetensors"))
    assert [path.name for path in rolling] == ["step-00000002.safetensors", "step-00000003.safetensors"]
    assert all(map(read, rolling))


def test_who_ends_finishes_the_save_in_flight_before_the_last_one_begins():
    """Of one that is killed meanwhile, all steps since the save before would be lost with both on their way."""
    background, may_end, seen = saving.Background(), threading.Event(), []
    background.start(lambda: may_end.wait(60) and seen.append("the one in flight"))
    threading.Timer(0.1, may_end.set).start()
    background.end({"last": torch.ones(2)}, lambda tensors: seen.extend(tensors))
    assert seen == ["the one in flight", "last"]


def test_saves_by_the_clock_come_once_a_period(make_plan, monkeypatch):
    plan = make_plan(runs={"short": {"milestones": [12]}}, runtime={**QUIET, "save_every": "5 min"})
    now, saved, save = [0.0], [], checkpoint.Checkpoints.save
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def a_minute():
        now[0] += 60
        return 0

    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, *a, **how: saved.append(a[2]) or save(self, *a, **how)
    )
    loop.train(plan, plan.state("short", 12), a_minute)
    assert saved == [5, 10, 12]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "10", "0 min", "min", "10 h", None])
def test_other_words_for_the_time_between_saves_are_refused_by_key(tiny, value):
    tiny["runtime"]["save_every"] = value
    with pytest.raises(
        ValueError, match="runtime.save_every: .*expected a number of steps, or of minutes such as '10 min'"
    ):
        config.resolve(tiny)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resuming_takes_no_memory_of_its_own_for_the_file_which_all_ranks_map_but_the_moments(make_plan, tmp_path):
    """On a GPU not even these; so ranks of a node share one copy of a state of 10 GB."""

    def own():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    plan = make_plan(models={"dot": {"depth": 4, "width": 256, "heads": 4, "patch_size": 2}})
    trajectory = plan.trajectories[plan.state("vanilla", 8).trajectory]
    saved, learner = (state.new_learner(trajectory.recipe, {}, {}) for _ in range(2))
    size = sum(p.nbytes for p in learner.model.parameters())
    for parameter in saved.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.optimizer.step()
    about = {"step": 8, "inputs": {}, "provenance": {}}
    header = {"key": trajectory.key, "recipe": trajectory.recipe, **about}
    state.save(tmp_path / "large", state.tensors_of(saved), header)
    before = own()
    _, tensors = state.read(tmp_path / "large", key=trajectory.key)
    assert sum(value.nbytes for value in tensors.values()) > 4 * size > 2**26 and own() - before < size / 4
    state.restore(learner, tensors, tmp_path / "large")
    assert own() - before < 2.25 * size
