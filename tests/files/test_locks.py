import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from haste.files import artefact, locks

HOLD = """
import sys, time
from haste.files import locks
with locks.making(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "part")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def eventually(what):
    end = time.monotonic() + 30
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    assert what()


@pytest.mark.parametrize("finished", [True, False])
def test_whoever_waits_says_for_whom_and_makes_what_a_killed_maker_did_not(tmp_path, holder, caplog, finished):
    seen = []

    def second():
        with locks.making(tmp_path / "part") as todo:
            seen.append(todo)

    with caplog.at_level("INFO"):
        thread = threading.Thread(target=second)
        thread.start()
        eventually(lambda: "waiting for" in caplog.text)
    assert f"waiting for {tmp_path / 'part'}: it is in use by process {holder.pid} on {os.uname().nodename} since" in (
        caplog.text
    )
    assert not seen
    if finished:
        (tmp_path / "part").touch()
    holder.kill()
    thread.join(30)
    assert seen == [not finished]
    assert {path.name for path in tmp_path.iterdir()} == ({"part"} if finished else set())  # and no lock file


def test_what_is_there_is_not_made_again_unless_that_is_wanted(tmp_path):
    (tmp_path / "score").touch()
    with locks.making(tmp_path / "score") as todo:
        assert not todo
    with locks.making(tmp_path / "score", anew=True) as todo:
        assert todo


def _count(folder, times):
    for _ in range(times):
        with locks.making(folder / "number", anew=True):
            number = int((folder / "number").read_text())
            time.sleep(0.0005)
            (folder / "number").write_text(str(number + 1))


def test_of_many_processes_one_at_a_time_makes_though_lock_files_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOOK", 0.001)
    (tmp_path / "number").write_text("0")
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=_count, args=(tmp_path, 40)) for _ in range(5)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert (tmp_path / "number").read_text() == "200"
    assert not (tmp_path / ".locks").exists()


def test_several_share_a_lock_that_one_alone_cannot_take_meanwhile(tmp_path):
    sharing = [locks.acquire(tmp_path / ".lock", "x", shared=True) for _ in range(2)]
    with pytest.raises(locks.InUse, match="x is in use"):
        locks.acquire(tmp_path / ".lock", "x")
    for file in sharing:
        file.close()
    locks.acquire(tmp_path / ".lock", "x").close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named_with_what_to_do_and_a_setting_does_without(tmp_path, monkeypatch, caplog, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=f"{tmp_path}.*no locks .*{os.strerror(code)}.*HASTE_LOCKS=none"):
        locks.acquire(tmp_path / "lock", "x")
    monkeypatch.setenv("HASTE_LOCKS", "none")
    with locks.holding(tmp_path / "lock", "x"), locks.making(tmp_path / "part") as todo:
        assert todo
    assert f"{tmp_path}: no locks are taken" in caplog.text


def test_a_lock_names_nobody_once_its_holder_has_ended_but_the_one_that_was_killed(tmp_path):
    script = "import os, sys; from haste.files import locks; held = locks.acquire(sys.argv[1], 'x'); "
    for end, named in (("os.fork() or sys.exit()", False), ("sys.exit()", False), ("os._exit(9)", True)):
        subprocess.run([sys.executable, "-c", script + end, str(tmp_path / "lock")], timeout=60)
        found = locks.holder(tmp_path / "lock")
        assert (found is not None and found.at_work is False) == named


def test_who_holds_a_lock_is_told_with_its_beginning_and_its_configuration(tmp_path):
    words = (
        "process 12 on node7 since 2026-01-01T00:00:00+00:00 (job 5): haste train x -c /data/results/mine/config.json"
    )
    (tmp_path / "lock").write_text(f"{words}\n")
    found = locks.holder(tmp_path / "lock")
    assert (found.who, found.at_work, found.since, found.configuration) == (words, None, 1767225600.0, "mine")


def test_a_job_of_the_cluster_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with (
        locks.holding(tmp_path / "lock", "x"),
        pytest.raises(locks.InUse, match=r"process \d+ on .* since .* \(job 77\): "),
    ):
        locks.acquire(tmp_path / "lock", "x")


def leftovers(folder):
    """Temporary files of a living and a dead process here, of one elsewhere, now and two days ago, and of nobody."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    here, names = artefact._host(), {}
    whose = {"living": f"{os.getppid()}@{here}", "dead": f"{dead.pid}@{here}", "elsewhere": "1@node-7.example.org"}
    for name, who in {**whose, "silent": "1@node-7.example.org"}.items():
        names[name] = folder / f".{name}.h5.{who}.0123abcd.part"
    names |= {"earlier": folder / ".earlier.h5.0123abcd.part", "older": folder / ".older.h5.0123abcd.part"}
    for name, path in names.items():
        path.mkdir() if name == "dead" else path.touch()
        if name in ("silent", "older"):
            os.utime(path, (time.time() - 2 * 86400,) * 2)
    return names


def test_a_start_sweeps_what_the_dead_left_and_nothing_that_a_living_process_here_or_elsewhere_writes(tmp_path):
    names = leftovers(tmp_path)
    artefact.tidy(tmp_path.parent)
    assert {name for name, path in names.items() if path.exists()} == {"living", "elsewhere", "earlier"}


def test_whoever_holds_an_artefacts_lock_sweeps_what_was_left_of_it_wherever_its_maker_died(tmp_path):
    names = leftovers(tmp_path)
    with locks.making(tmp_path / "elsewhere.h5"):
        assert {name for name, path in names.items() if path.exists()} == {"living", "earlier"}


def test_a_writers_own_temporary_file_outlives_a_sweep_by_another_process(tmp_path):
    with artefact.replacing(tmp_path / "shard.h5") as aside:
        aside.write_text("half")
        sweep = "import sys; from haste.files import artefact; artefact.tidy(sys.argv[1])"
        assert subprocess.run([sys.executable, "-c", sweep, str(tmp_path)]).returncode == 0
        assert aside.read_text() == "half"
    assert (tmp_path / "shard.h5").read_text() == "half"


def test_a_start_dates_what_comes_from_a_machine_whose_clock_is_ahead(tmp_path):
    (tmp_path / "stores").mkdir()
    ahead, before = tmp_path / "stores" / "manifest.json", tmp_path / "stores" / "shard.h5"
    for path, when in ((ahead, time.time() + 7200), (before, time.time() - 7200)):
        path.touch()
        os.utime(path, (when, when))
    artefact.tidy(tmp_path)
    assert ahead.stat().st_mtime <= time.time()
    assert before.stat().st_mtime < time.time() - 7000
