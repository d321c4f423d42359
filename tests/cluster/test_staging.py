"""Copies on a node's own disk: the same bits, once a node, whole or not at all, and gone in the end."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from haste.cluster import job as jobs
from haste.cluster import staging
from haste.files.store import Store
from haste.train import loop

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def opened(monkeypatch):
    """The folders of the stores that are opened, by kind."""
    found, whole = {}, Store.open.__func__

    def watching(cls, folder, **how):
        store = whole(cls, folder, **how)
        found.setdefault(store.manifest["store"], []).append(Path(folder))
        return store

    monkeypatch.setattr(Store, "open", classmethod(watching))
    return found


def bits(path):
    return {name: value.clone() for name, value in load_file(path).items()}


@pytest.mark.parametrize(("run", "reads"), [("vanilla", ["latents"]), ("HASTE", ["images", "latents"])])
def test_training_on_copies_ends_in_the_same_bits_reads_no_other_store_and_leaves_nothing(
    make_plan, scratch, opened, run, reads
):
    plan = make_plan()
    state = plan.state(run, 8)
    with staging.staged(plan, state, str(scratch)) as near:
        opened.clear()
        loop.train(near, state)
        assert sorted(opened) == reads
        assert all(scratch in folder.parents for folders in opened.values() for folder in folders)
    assert not list(scratch.iterdir())
    found = bits(plan.path(state))
    Path(plan.path(state)).unlink()
    loop.train(plan, state)
    for name, value in bits(plan.path(state)).items():
        assert torch.equal(found[name], value), name


def test_targets_are_copied_where_they_are_read_and_then_no_images(make_plan, tiny):
    teachers = {"vit": {**tiny["teachers"]["vit"], "cache": "features+attention"}}
    plan = make_plan(teachers=teachers)
    assert list(staging.wanted(plan, plan.state("HASTE-12", 12))) == ["latents", "targets of vit"]
    assert list(staging.wanted(plan, plan.state("HASTE-12", 16))) == ["latents"]
    near = staging._reading(plan, {"targets of vit": Path("/near")})
    assert (near.targets["vit"].folder, near.latents.folder) == ("/near", plan.latents.folder)


def test_a_job_of_several_processes_copies_once_a_node_and_is_the_job_without_copies(
    make_plan, scratch, start_job, monkeypatch
):
    plan = make_plan(runtime={"trackers": [], "save_every": 3, "log_every": 2})
    state = plan.state("REPA", 8)
    monkeypatch.setenv("SLURM_TMPDIR", str(scratch))
    assert start_job(plan, state, size=2, stage_in="true").ended() == [0, 0]
    log = "".join(path.read_text() for path in jobs.folder(plan, state).glob("12-attempt-*.log"))
    assert not list(scratch.iterdir())
    found = bits(plan.path(state))
    Path(plan.path(state)).unlink()
    assert start_job(plan, state, size=2).ended() == [0, 0]
    for name, value in bits(plan.path(state)).items():
        assert torch.equal(found[name], value), name
    assert f"latents and images: read from copies in {scratch}" in log
    assert log.count(": copied and checked in") in (0, 2)  # the first process copied latents and images, or neither


def _come_and_go(plan, state, scratch, counted, meet):
    whole = staging._copy_file

    def counting(source, target, *more):
        with open(counted, "a") as file:
            file.write(f"{target.name} of {source.parent.name}\n")
        time.sleep(0.05)
        whole(source, target, *more)

    staging._copy_file = counting
    with staging.staged(plan, state, str(scratch)) as near:
        Store.open(near.latents.folder, verify="full").close()
        meet.wait(60)


def test_four_processes_that_come_at_once_make_one_copy_and_the_last_to_go_removes_it(make_plan, scratch, tmp_path):
    plan = make_plan()
    state, meet, counted = plan.state("REPA", 8), FORK.Barrier(4), tmp_path / "counted"
    given = (plan, state, scratch, counted, meet)
    children = [FORK.Process(target=_come_and_go, args=given) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    lines = counted.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 6, "two stores of two shards and a manifest"
    assert not list(scratch.iterdir())


def _die_in_the_middle(plan, state, scratch):
    staging._copy_file = _torn
    with staging.staged(plan, state, str(scratch)):
        raise AssertionError("it should be dead")


def _torn(source, target, *_):
    target.write_bytes(source.read_bytes()[:1000])
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_kill_in_the_middle_leaves_is_never_taken_for_whole_and_the_next_job_removes_it(make_plan, scratch):
    plan = make_plan()
    state = plan.state("vanilla", 8)
    child = FORK.Process(target=_die_in_the_middle, args=(plan, state, scratch))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (place,) = scratch.iterdir()
    assert [path.suffix for path in place.iterdir() if path.is_dir()] == [".part"]
    with staging.staged(plan, state, str(scratch)) as near:
        assert not list(place.glob("*.part")) and not list(place.glob(".*.part"))
        Store.open(near.latents.folder, verify="full").close()
    assert not list(scratch.iterdir())


def _die_while_reading(plan, state, scratch):
    with staging.staged(plan, state, str(scratch)):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("harm", ["truncated", "removed", "none"])
def test_a_dead_jobs_copy_serves_the_next_job_if_it_is_whole_and_is_made_again_if_not(make_plan, scratch, caplog, harm):
    plan = make_plan()
    state = plan.state("vanilla", 8)
    child = FORK.Process(target=_die_while_reading, args=(plan, state, scratch))
    child.start()
    child.join(60)
    (shard,) = scratch.glob("*/latents-*/shard-00001-of-00002.h5")
    before = shard.stat().st_ctime_ns
    if harm == "truncated":
        os.truncate(shard, 1000)
    if harm == "removed":  # as those do that tidy up old files
        shard.unlink()
    with staging.staged(plan, state, str(scratch)) as near, Store.open(near.latents.folder, verify="full"):
        assert shard.exists()
        assert (shard.stat().st_ctime_ns == before) == (harm == "none")
    assert ("the copy is made again" in caplog.text) == (harm != "none")
    assert not list(scratch.iterdir())


def test_a_copy_that_is_not_its_source_is_refused(make_plan, scratch, monkeypatch):
    plan = make_plan()
    whole = staging._copy_file

    def flipping(source, target, *more):
        whole(source, target, *more)
        if target.suffix == ".h5":
            with open(target, "rb+") as file:  # in the rows, which no header speaks of
                offset = target.stat().st_size // 2
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(staging, "_copy_file", flipping)
    with (
        pytest.raises(ValueError, match=f"the copy of {plan.latents.folder} is damaged.*does not fit its digest"),
        staging.staged(plan, plan.state("vanilla", 8), str(scratch)),
    ):
        pass
    assert not list(scratch.iterdir())


def test_too_little_room_is_refused_with_the_bytes_and_what_they_are_of(make_plan, scratch, monkeypatch):
    plan = make_plan()
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345))
    size = {
        made.kind: sum(Path(file).stat().st_size for file in made.shard_files) for made in (plan.latents, plan.images)
    }
    total = f"{sum(size.values()):,} are needed .latents {size['latents']:,} and images {size['images']:,}."
    with (
        pytest.raises(ValueError, match=f"{scratch} has 12,345 bytes free, but {total}"),
        staging.staged(plan, plan.state("REPA", 8), str(scratch)),
    ):
        pass
    assert not list(scratch.iterdir())


def test_a_copy_says_how_far_it_is_and_how_long_it_will_take(make_plan, scratch, monkeypatch, caplog):
    plan = make_plan()
    monkeypatch.setattr(staging, "SHOWN_EVERY", 0.0)
    monkeypatch.setattr(staging, "CHUNK", 100_000)
    caplog.set_level("INFO", logger="haste.cluster")
    with staging.staged(plan, plan.state("vanilla", 8), str(scratch)):
        pass
    lines = re.findall(r"latents: (\S+ \S+) of (\S+ \S+) copied, \d+ s to go", caplog.text)
    assert len(lines) > 3
    assert lines[-1][0] == lines[-1][1]
    assert re.search(r"latents: copied and checked in \d+ s", caplog.text)


def test_after_a_failure_nothing_is_left(make_plan, scratch):
    plan = make_plan()
    with pytest.raises(RuntimeError), staging.staged(plan, plan.state("vanilla", 8), str(scratch)):
        raise RuntimeError
    assert not list(scratch.iterdir())


def test_who_is_told_to_end_while_copying_gives_it_up_and_reads_where_the_stores_lie(make_plan, scratch):
    plan = make_plan()
    asked = iter([False, False])
    with staging.staged(plan, plan.state("REPA", 8), str(scratch), lambda: next(asked, True)) as near:
        assert near is plan
        assert not list(scratch.rglob("shard-*"))
    assert not list(scratch.iterdir())


def test_one_who_leaves_takes_no_copy_from_one_who_reads(make_plan, scratch):
    plan = make_plan()
    with staging.staged(plan, plan.state("REPA", 8), str(scratch)) as near:
        with staging.staged(plan, plan.state("vanilla", 8), str(scratch)) as other:
            assert other.latents.folder == near.latents.folder
        for made in (near.images, near.latents):
            Store.open(made.folder, verify="full").close()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("true", "neither SLURM_TMPDIR nor TMPDIR is set on this node"),
        ("/nowhere/at/all", "/nowhere/at/all on this node, expected an absolute path to a folder"),
        ("here", "expected an absolute path"),
        ("/tmp/$NOT_SET_ANYWHERE", "expected an absolute path"),
    ],
)
def test_a_folder_that_the_node_does_not_have_is_refused(setting, words, monkeypatch, tmp_path):
    for name in staging.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=words.replace("$", "[$]")):
        staging.scratch_of(setting)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("USER_S", tmp_path.name)
    assert staging.scratch_of("True") == staging.scratch_of(f"{tmp_path.parent}/$USER_S") == tmp_path
    assert staging.scratch_of("False") is None


def test_a_folder_of_somebody_elses_is_refused(make_plan, scratch, monkeypatch):
    plan = make_plan()
    place = scratch / f"haste-{os.getuid()}"
    (scratch / "elsewhere").mkdir()
    place.symlink_to("elsewhere")  # where everybody may write, anybody may have put it there
    with (
        pytest.raises(ValueError, match="expected a folder of our own"),
        staging.staged(plan, plan.state("vanilla", 8), str(scratch)),
    ):
        pass
    assert not list((scratch / "elsewhere").iterdir())


def test_a_finished_state_copies_nothing(make_plan, scratch):
    plan = make_plan()
    loop.train(plan, plan.state("vanilla", 8))
    with staging.staged(plan, plan.state("vanilla", 8), str(scratch)) as near:
        assert near is plan
        assert not list(scratch.iterdir())
