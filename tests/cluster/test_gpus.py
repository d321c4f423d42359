"""Jobs on one machine keep to GPUs of their own. A script plays the driver."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from haste.cluster import gpus
from haste.files import locks
from haste.networks import driver

TWO = "GPU 0: NVIDIA H200 (UUID: GPU-aaaa-1)\nGPU 1: NVIDIA H200 (UUID: GPU-bbbb-2)\n"
PARTS = (
    "GPU 0: NVIDIA A100 (UUID: GPU-aaaa-1)\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-c-1)\n  MIG 3g.20gb     Device  1: (UUID: MIG-c-2)\n"
    "GPU 1: NVIDIA A100 (UUID: GPU-bbbb-2)\n"
)
UNEQUAL = "GPU 0: NVIDIA T4 (UUID: GPU-aaaa-1)\nGPU 1: NVIDIA H200 (UUID: GPU-bbbb-2)\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function from the driver's answer to a machine that has these GPUs, with locks of its own."""
    for name in (gpus.VISIBLE, "CUDA_DEVICE_ORDER", "SLURM_JOB_ID", "RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards, also where it is not set
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "_folder", lambda: tmp_path / "locks")
    monkeypatch.setattr(gpus, "_held", {})

    def of(answer, code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat << 'END'\n{answer}END\nexit {code}\n")
        script.chmod(0o755)
        driver._machine.cache_clear()
        return tmp_path

    yield of
    for file in gpus._held.values():
        file.close()
    driver._machine.cache_clear()


TAKER = """
import json, pathlib, sys, time
from haste.cluster import gpus
from haste.files import locks
from haste.networks import driver
gpus._folder = lambda: pathlib.Path(sys.argv[1]) / "locks"
print(json.dumps(gpus.take(int(sys.argv[2]), int(sys.argv[3]))), flush=True)
time.sleep(float(sys.argv[4]))
"""


def taker(folder, count=1, jobs=1, seconds=60.0):
    """A job that takes GPUs and holds them for a while."""
    asked = [sys.executable, "-c", TAKER, str(folder), str(count), str(jobs), str(seconds)]
    return subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)


def until(true):
    """Wait for something that another process does."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def got(job):
    return json.loads(job.stdout.readline())


@pytest.mark.parametrize(
    ("answer", "said", "expected"),
    [
        (TWO, None, ["GPU-aaaa-1", "GPU-bbbb-2"]),
        (TWO, "1", ["GPU-bbbb-2"]),
        (TWO, "GPU-b, 0", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        (TWO, "", []),
        (TWO, "1,-1,0", ["GPU-bbbb-2"]),
        (TWO, "7", ["7"]),
        (PARTS, None, ["MIG-c-1", "MIG-c-2", "GPU-bbbb-2"]),
        (PARTS, "MIG-c-2", ["MIG-c-2"]),
        (PARTS, "0", ["0"]),
        (UNEQUAL, "0", ["0"]),  # the fastest for CUDA, the first slot for the driver
        ("", None, []),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_see(machine, monkeypatch, answer, said, expected):
    machine(answer)
    if said is not None:
        monkeypatch.setenv(gpus.VISIBLE, said)
    assert gpus.visible() == expected


def test_the_order_of_unequal_gpus_may_be_named(machine, monkeypatch):
    machine(UNEQUAL)
    monkeypatch.setenv(gpus.VISIBLE, "0")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpus.visible() == ["GPU-aaaa-1"]


def test_a_driver_that_fails_is_named_and_nothing_is_shared_out(machine, caplog):
    machine("Failed to initialize NVML\n", code=9)
    assert gpus.take(1) == [] and "nvidia-smi does not say" in caplog.text


def test_each_job_has_a_gpu_of_its_own_and_the_next_one_waits_for_a_killed_one(machine):
    folder = machine(TWO)
    first, second = taker(folder), taker(folder)
    try:
        assert sorted(got(first) + got(second)) == ["GPU-aaaa-1", "GPU-bbbb-2"]
        third = taker(folder, seconds=0)
        time.sleep(1)
        assert third.poll() is None
        first.send_signal(signal.SIGKILL)
        assert got(third) in (["GPU-aaaa-1"], ["GPU-bbbb-2"]) and third.wait(30) == 0
    finally:
        for job in (first, second):
            job.kill()
            job.wait()


def test_who_needs_all_gpus_gets_them_before_those_who_came_later(machine):
    folder = machine(TWO)
    small = taker(folder, seconds=3)
    assert got(small) == ["GPU-aaaa-1"]
    large = taker(folder, count=2, seconds=1)
    until(lambda: locks.holder(folder / "locks" / "GPU-bbbb-2.0"))  # it holds the one and waits for the other
    late = taker(folder, seconds=0)
    assert sorted(got(large)) == ["GPU-aaaa-1", "GPU-bbbb-2"]
    assert late.poll() is None
    assert len(got(late)) == 1
    assert [job.wait(30) for job in (small, large, late)] == [0, 0, 0]


def test_small_jobs_spread_over_gpus_before_they_share_one_and_ranks_never_share(machine):
    folder = machine(TWO)
    jobs = [taker(folder, jobs=2) for _ in range(2)]
    try:
        assert sorted(got(jobs[0]) + got(jobs[1])) == ["GPU-aaaa-1", "GPU-bbbb-2"]
        jobs.append(taker(folder, count=2, jobs=2))  # beside the two
        assert sorted(got(jobs[2])) == ["GPU-aaaa-1", "GPU-bbbb-2"]
        jobs.append(taker(folder, jobs=2))
        time.sleep(1)
        assert jobs[3].poll() is None
        jobs[2].kill()
        assert len(got(jobs[3])) == 1
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def test_who_waits_for_some_gpus_holds_up_nobody_who_uses_others(machine, monkeypatch):
    folder = machine(TWO)
    monkeypatch.setenv(gpus.VISIBLE, "1")
    first = taker(folder)
    got(first)
    second = taker(folder)
    try:
        monkeypatch.setenv(gpus.VISIBLE, "0")
        assert gpus.take(1) == ["GPU-aaaa-1"] and second.poll() is None
    finally:
        for job in (first, second):
            job.kill()
            job.wait()


def test_two_who_keep_from_one_another_what_both_need_give_way(machine, monkeypatch):
    folder = machine(TWO)
    monkeypatch.setattr(gpus, "_patience", lambda: time.monotonic() + 1)
    other = gpus._attempts(folder / "locks", ["GPU-bbbb-2"], 1, 1)  # as if it waited for the first GPU, holding this
    waits = threading.Timer(2, lambda: gpus._release(other))
    waits.start()
    assert sorted(gpus.take(2)) == ["GPU-aaaa-1", "GPU-bbbb-2"]
    waits.join()


def test_jobs_that_snakemake_runs_within_an_allocation_share_its_gpus_out(machine, monkeypatch):
    machine(TWO)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(gpus.SHARING, "1")
    assert gpus.take(1) == ["GPU-aaaa-1"]


def test_a_folder_of_locks_that_somebody_else_can_write_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpus.Path, "is_dir", lambda self: str(self) != "/tmp")
    place = tmp_path / f"haste-gpus-{os.getuid()}"
    assert gpus._folder() == place
    place.chmod(0o777)
    assert gpus._folder() is None and "not a folder of this user alone" in caplog.text
    place.rmdir()
    place.symlink_to(tmp_path)
    assert gpus._folder() is None


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "RANK"])
def test_what_a_cluster_or_a_launcher_gave_out_stays(machine, monkeypatch, variable):
    machine(TWO)
    monkeypatch.setenv(variable, "0")
    monkeypatch.setenv(gpus.VISIBLE, "1")
    assert gpus.take(1) == [] and os.environ[gpus.VISIBLE] == "1"


def test_a_process_that_has_a_gpu_keeps_it_and_does_not_wait_for_itself(machine):
    machine(TWO)
    assert gpus.take(1) == gpus.take(1) == ["GPU-aaaa-1"]
    with pytest.raises(ValueError, match="took GPU-aaaa-1 for itself before, and now needs 2"):
        gpus.take(2)


def test_more_than_there_are_is_left_to_who_says_why(machine):
    machine(TWO)
    assert gpus.take(3) == [] and gpus.VISIBLE not in os.environ


def test_taken_gpus_are_all_that_cuda_sees(machine, monkeypatch):
    machine(TWO)
    monkeypatch.setenv(gpus.VISIBLE, "1,0")
    assert gpus.take(1) == ["GPU-bbbb-2"] and os.environ[gpus.VISIBLE] == "GPU-bbbb-2"


def test_each_job_asks_snakemake_for_its_gpus_and_more_ranks_than_gpus_are_refused_before_the_first(
    machine, tiny, tmp_path, warm
):
    machine(TWO)
    runtime = {**tiny["runtime"], "device": "auto"}
    said = []
    for processes, words in [(2, ["-n"]), (4, [])]:
        file = tmp_path / f"{processes}.yaml"
        given = {**tiny, "results": str(tmp_path / "results"), "runtime": {**runtime, "processes": processes}}
        file.write_text(yaml.safe_dump(given))
        said.append(warm.snakemake("--cores", "8", "--configfile", file, *words))
    dry, real = said
    rules = re.findall(r"^rule (\w+):.*?devices=(\d)", dry.stdout + dry.stderr, re.MULTILINE | re.DOTALL)
    assert {rule: int(devices) for rule, devices in rules if rule in ("train", "sample", "latents")} == {
        "train": 2,
        "sample": 1,
        "latents": 1,
    }
    assert real.returncode == 1 and "runtime.processes is 4" in real.stderr and "2 can be seen here" in real.stderr
    assert not (tmp_path / "results" / "parts").exists()
