"""What goes wrong in training ends in a message, soon, and with the last good state in place."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from haste.cli import main as cli
from haste.files import journal, locks
from haste.train import launch, loop
from haste.train.step import Objective

TRAINING = {"batch": 8, "lr": 1.0e-3, "ema": 0.9}


def path_of(plan, run, step):
    return Path(plan.path(plan.state(run, step)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_resumes_to_the_same_bits_its_scaler_included(make_plan, precision):
    settings = {"training": {**TRAINING, "precision": precision}, "runtime": {"save_every": 3, "log_every": 2}}
    plan = make_plan(**settings)
    loop.train(plan, plan.state("HASTE", 16))
    expected = load_file(path_of(plan, "HASTE", 16))
    assert all(value.dtype == torch.float32 for name, value in expected.items() if name.startswith("model/"))
    assert ("scaler/scale" in expected) == (precision == "fp16")
    path_of(plan, "HASTE", 16).unlink()
    plan = make_plan(**settings, defaults={"model": "dot", "milestones": [5, 8, 13, 16], "sampling": ["quick"]})
    for step in (13, 16):
        loop.train(plan, plan.state("HASTE", step))
    found = load_file(path_of(plan, "HASTE", 16))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_half_precision_computes_near_what_single_precision_does(make_plan):
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        plan = make_plan(training={**TRAINING, "precision": precision}, runtime={"log_every": 1})
        loop.train(plan, plan.state("HASTE", 8))
        losses[precision] = journal.read(path_of(plan, "HASTE", 8).parent / "log.jsonl")
    for half in ("bf16", "fp16"):
        assert losses[half][-1]["denoising"] != losses["fp32"][-1]["denoising"]
        for found, expected in zip(losses[half], losses["fp32"], strict=True):
            for term in ("denoising", "features", "attention"):
                assert found[term] == pytest.approx(expected[term], abs=0.05), (half, term)


def test_time_dtype_makes_a_new_bf16_state_and_changes_neither_the_name_nor_the_bits_of_an_fp32_one(make_plan):
    found = {}
    for precision in ("fp32", "bf16"):
        for time_dtype in (None, "fp32"):
            plan = make_plan(training={**TRAINING, "precision": precision, "time_dtype": time_dtype})
            loop.train(plan, plan.state("vanilla", 4))
            found[precision, time_dtype] = path_of(plan, "vanilla", 4)
    assert found["fp32", None] == found["fp32", "fp32"] and found["bf16", None] != found["bf16", "fp32"]
    rounded, precise = (load_file(found["bf16", how]) for how in (None, "fp32"))
    name = "model/t_embedder.mlp.0.weight"
    assert not torch.equal(rounded[name], precise[name])


def break_step(monkeypatch, step, how):
    forward = Objective.forward

    def broken(self, batch, *more):
        return how(forward(self, batch, *more)) if batch.step == step else forward(self, batch, *more)

    monkeypatch.setattr(Objective, "forward", broken)


def test_a_step_that_is_not_finite_can_be_skipped_and_is_counted(make_plan, monkeypatch):
    plan = make_plan(training={**TRAINING, "nonfinite": "skip"}, runtime={"log_every": 2, "keep_every": 1})
    break_step(monkeypatch, 4, lambda found: {**found, "denoising": found["denoising"] * float("nan")})
    loop.train(plan, plan.state("vanilla", 8))
    before, after, later = (load_file(path_of(plan, "vanilla", step)) for step in (4, 5, 6))
    for name, value in before.items():
        if name.startswith(("model/", "optimizer/")):
            assert torch.equal(after[name], value), name
    assert not torch.equal(later["model/final_layer.linear.weight"], before["model/final_layer.linear.weight"])
    assert all(torch.isfinite(value).all() for value in load_file(path_of(plan, "vanilla", 8)).values())
    records = journal.read(path_of(plan, "vanilla", 8).parent / "log.jsonl")
    assert [record.get("skipped", 0) for record in records] == [0, 0, 1, 0]


def test_out_of_memory_says_which_settings_would_help(make_plan, monkeypatch, capsys):
    plan = make_plan()

    def full(found):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    break_step(monkeypatch, 4, full)
    assert cli.main(["train", str(plan.state("vanilla", 8)), "-c", str(plan.file)]) == 2
    message = capsys.readouterr().err
    for word in ("out of memory", "runtime.accumulate", "runtime.checkpoint_blocks", "training.batch", "20.00 GiB"):
        assert word in message


def test_a_batch_larger_than_the_data_is_refused(make_plan):
    plan = make_plan(training={**TRAINING, "batch": 1704})
    with pytest.raises(ValueError, match=r"holds 1700 training samples, fewer than training\.batch 1704"):
        loop.train(plan, plan.state("vanilla", 8))


def test_processes_that_do_not_divide_the_batch_are_refused_by_the_configuration(make_plan):
    with pytest.raises(
        ValueError, match=r"batch 8 is not divisible by runtime\.processes 3 times runtime\.accumulate 2"
    ):
        make_plan(runtime={"processes": 3, "accumulate": 2})


def test_a_gpu_that_is_not_there_is_refused(make_plan, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    plan = make_plan(runtime={"device": "cuda"})
    assert cli.main(["train", str(plan.state("vanilla", 8)), "-c", str(plan.file)]) == 2
    assert "needs a GPU of its own, and 0 are visible" in capsys.readouterr().err


def test_checkpointed_blocks_and_compiled_models_train_to_nearly_the_same(make_plan):
    losses = {}
    for name, runtime in {"plain": {}, "checkpoint": {"checkpoint_blocks": True}}.items():
        plan = make_plan(runtime={"log_every": 1, **runtime})
        loop.train(plan, plan.state("HASTE", 8))
        losses[name] = [r["denoising"] for r in journal.read(path_of(plan, "HASTE", 8).parent / "log.jsonl")]
        path_of(plan, "HASTE", 8).unlink()
    assert losses["checkpoint"] == pytest.approx(losses["plain"], rel=1e-5)


def workers_of(process, lock):
    """The training processes below a launcher; the one that holds the trajectory's lock, process 0, comes first."""
    started = psutil.Process(process.pid).children()
    (server,) = (child for child in started if any("forkserver" in word for word in child.cmdline()))
    found = server.children()
    first = int(re.match(r"process (\d+) on", lock.read_text())[1])
    return sorted(found, key=lambda child: child.pid != first)


def alive(workers):
    return [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def free(lock):
    try:
        with locks.holding(lock, "x"):
            return True
    except ValueError:
        return False


def wait_for(what, limit=240):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("nothing came in time")


@contextlib.contextmanager
def training(plan, step, **options):
    """A process that trains up to a step, when its first steps are done."""
    command = [sys.executable, "-m", "haste.cli", "train", str(plan.state("long", step)), "-c", str(plan.file)]
    streams, log = (
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        path_of(plan, "long", step).parent / "log.jsonl",
    )
    with subprocess.Popen(command, text=True, **streams, **options) as process:
        try:
            wait_for(lambda: log.exists() and log.stat().st_size)
            yield process
        finally:
            process.kill()


@pytest.fixture
def launched(make_plan):
    """A launcher with two processes in the middle of a long training: (process, its workers, plan)."""
    runs = {"long": {"milestones": [100_000]}}
    plan = make_plan(runs=runs, runtime={"processes": 2, "log_every": 10, "save_every": 10})
    with training(plan, 100_000) as process:
        yield process, workers_of(process, path_of(plan, "long", 100_000).parent / "lock"), plan


def test_a_rank_that_dies_ends_all_ranks_within_seconds_and_is_named(launched):
    process, workers, _ = launched
    assert len(workers) == 2
    workers[1].kill()
    started = time.monotonic()
    text, _ = process.communicate(timeout=40)
    assert time.monotonic() - started < 30
    assert process.returncode not in (0, 2)
    assert "process 1 of the training died" in text
    assert "SIGKILL" in text
    assert not alive(workers)


@pytest.mark.parametrize("processes", [1, 2])
def test_term_saves_the_last_step_and_the_same_command_goes_on_to_the_same_bits(make_plan, processes):
    runs = {"long": {"milestones": [300]}}
    plan = make_plan(runs=runs, runtime={"processes": processes, "log_every": 5, "save_every": 300})
    path = path_of(plan, "long", 300)
    with training(plan, 300) as process:
        process.terminate()
        text, _ = process.communicate(timeout=60)
    (saved,) = path.parent.glob("rolling/step-*")
    step = int(saved.name[5:13])
    assert process.returncode == 143 and "Traceback" not in text
    assert f"haste train: interrupted after step {step}, which is saved; the same command goes on" in text
    assert 0 < step < 300 and not path.exists()
    whole = make_plan(runs={"short": {"milestones": [step]}}, runtime={"processes": processes, "save_every": 300})
    (path.parent / "rolling").rename(path.parent / "kept")
    launch.launch(whole, whole.state("short", step))
    expected, found = load_file(path_of(whole, "short", step)), load_file(path.parent / "kept" / saved.name)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_term_to_all_processes_of_a_job_at_once_saves_too(make_plan):
    plan = make_plan(runs={"long": {"milestones": [300]}}, runtime={"processes": 2, "log_every": 5, "save_every": 300})
    with training(plan, 300, start_new_session=True) as process:
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    (saved,) = path_of(plan, "long", 300).parent.glob("rolling/step-*")
    assert process.returncode == 143 and f"interrupted after step {int(saved.name[5:13])}, which is saved" in said


def test_a_killed_launcher_leaves_no_trainer_and_the_lock_is_held_while_one_lives(launched):
    process, workers, plan = launched
    assert len(workers) == 2
    lock = path_of(plan, "long", 100_000).parent / "lock"
    assert not free(lock)
    process.kill()
    wait_for(lambda: not alive(workers), 20)
    wait_for(lambda: free(lock), 10)  # a dead process lets go when the last of its threads is gone


def test_the_launcher_tells_a_crash_from_a_refusal():
    crash = {"message": "RuntimeError: boom", "extraInfo": {"py_callstack": "Traceback: here"}}
    error = launch._reason(3, SimpleNamespace(message=crash))
    assert isinstance(error, RuntimeError)
    assert "process 3" in str(error)
    assert "Traceback: here" in str(error)
    refusal = launch._reason(0, SimpleNamespace(message={"message": "ValueError: wrong file"}))
    assert isinstance(refusal, ValueError)
    assert str(refusal) == "wrong file"
