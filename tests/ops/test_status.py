"""`haste status` says what is going on, at any moment, and disturbs nobody."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haste.cli import main as cli
from haste.cluster import job, queue
from haste.files import journal, locks
from haste.ops import status
from haste.plan.plan import Plan
from haste.train import loop

HOLD = """
import sys, time
from haste.files import journal, locks
with locks.holding(sys.argv[1], "a trajectory"):
    print("held", flush=True)
    time.sleep(60)
"""
WRITE = "import time; print('10/20', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """This machine's own SLURM, where it has one, is nobody's business here."""
    places = [place for place in os.environ["PATH"].split(":") if not Path(place, "squeue").exists()]
    monkeypatch.setenv("PATH", ":".join(places))


@pytest.fixture
def hold():
    """A function from a lock's path to a process that holds it."""
    running = []

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def lines(plan):
    return {line.run: line for line in status.snapshot(Plan(plan.config)).lines}


def folder(plan, run, step):
    return Path(plan.path(plan.state(run, step))).parent


def text(plan, capsys):
    assert cli.main(["status", "-c", str(plan.file)]) == 0
    return " ".join(capsys.readouterr().out.split())


def write_log(where, *records):
    where.mkdir(parents=True, exist_ok=True)
    (where / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def record(step, **more):
    return {"step": step, "denoising": 1.25, "features": -0.5, "grad_norm": 2.0, "images_per_s": 40.0, **more}


def test_where_nothing_has_begun_every_run_is_listed_and_nothing_is_written(make_plan, tmp_path, capsys):
    plan = make_plan(results=str(tmp_path / "nowhere"))
    said = text(plan, capsys)
    for run in plan.config.runs:
        assert run in said
    assert said.count("not begun") == 4
    assert f"next: make {plan.images.manifest}, {plan.latents.manifest}" in said
    assert "0 to 8, aligning nothing" in said
    assert not (tmp_path / "nowhere").exists()


def test_a_run_in_training_shows_segment_step_rate_time_losses_and_who_works(make_plan, hold, capsys):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE", "stop": 12}})
    where = folder(plan, "HASTE", 8)
    write_log(where, record(2), record(4, waiting=0.25, time=time.time() - 5, memory_mb=3.0))
    assert lines(plan)["HASTE"].doing == "paused"
    holder = long_ago(hold, where / "lock")
    line = lines(plan)["HASTE"]
    assert (line.doing, line.segment) == ("training", "0 to 8, aligning features and attention")
    assert (line.step, line.last) == (4, 16)
    assert line.rate == pytest.approx(40 / 8)  # images a second over the batch
    assert line.to_go == pytest.approx((16 - 4) / 5)
    assert line.losses == {"denoising": 1.25, "features": -0.5}
    assert line.waiting == 0.25
    assert line.age == pytest.approx(5, abs=2)
    said = text(plan, capsys)
    assert "4/16" in said and "denoising 1.2500" in said and "25 %" in said
    holder.kill()
    holder.wait()
    assert lines(plan)["HASTE"].doing == "died"
    with locks.holding(where / "lock", "the next start, which ends as it should"):
        pass
    assert lines(plan)["HASTE"].doing == "paused"


def test_asking_who_holds_a_lock_refuses_nobody_who_wants_it_and_knows_when_it_is_free(tmp_path, hold):
    path = tmp_path / "lock"
    assert locks.holder(path) is None
    holder = hold(path)
    found = locks.holder(path)
    assert found.at_work and f"process {holder.pid} on " in found.who
    holder.kill()
    holder.wait()
    assert locks.holder(path).at_work is False  # its text is still there
    with locks.holding(path, "x"):
        assert locks.holder(path).at_work
    assert locks.holder(path) is None and path.exists()


def test_a_lock_of_another_machine_is_told_as_its_file_says(tmp_path):
    (tmp_path / "lock").write_text("process 12 on node7 since 2026-01-01T00:00:00+00:00: haste train x\n")
    assert locks.holder(tmp_path / "lock") == locks.Holder(
        "process 12 on node7 since 2026-01-01T00:00:00+00:00: haste train x", None
    )


def test_after_the_stop_the_branch_is_followed_and_a_finished_run_says_so(make_plan):
    plan = make_plan(runs={"HASTE-12": {"alignment": "HASTE", "stop": 12}})
    for step in (8, 12):
        loop.train(plan, plan.state("HASTE-12", step))
    line = lines(plan)["HASTE-12"]
    assert (line.step, line.doing, line.segment) == (12, "paused", "12 to 16, aligning nothing")
    loop.train(plan, plan.state("HASTE-12", 16))
    line = lines(plan)["HASTE-12"]
    assert (line.step, line.doing, line.segment, line.to_go) == (16, "finished", "", None)
    states = [p for p in Path(plan.root, "states").rglob("*") if p.is_file()]
    assert line.size == sum(path.stat().st_size for path in states)


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 6, "denois',
        b"\xff\xfe\x00 rubbish\n",
        b'{"step": "six"}\n[1, 2]\nnull\n',
        b'{"step": 6}\n',
        b'{"step": 6, "denoising": "low", "images_per_s": null, "time": "noon", "waiting": []}\n',
        b'{"step": 6, "denoising": NaN, "images_per_s": 0}\n',
    ],
)
def test_a_damaged_log_is_read_as_far_as_it_goes(make_plan, damage, capsys):
    plan = make_plan(runs={"vanilla": {}})
    where = folder(plan, "vanilla", 8)
    write_log(where, record(4))
    with open(where / "log.jsonl", "ab") as file:
        file.write(damage)
    assert "vanilla" in text(plan, capsys)
    assert lines(plan)["vanilla"].step in (4, 6)


def log(plan, name, words, *, age=0.0, done=False):
    path = Path(plan.folder, "logs", f"{name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)
    os.utime(path, (time.time() - age,) * 2)
    if done:
        bench = Path(plan.folder, "benchmarks", f"{name}.tsv")
        bench.parent.mkdir(parents=True, exist_ok=True)
        bench.write_text("s\n1.0\n")
        os.utime(bench, (time.time() - age,) * 2)


@pytest.fixture
def write():
    """A function from a log to a process that has it as standard output, as a job has, and has written a line."""
    running = []

    def start(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as log:
            running.append(subprocess.Popen([sys.executable, "-SE", "-c", WRITE], stdout=log))
        while not path.read_text():
            time.sleep(0.01)
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def names(plan):
    """Rule -> the name of the log of its first job that is left."""
    return {rule: jobs[0].log for rule, jobs in plan.jobs.left.items()}


def long_ago(hold, path):
    """A process that has held a lock for longer than any log is old."""
    holder = hold(path)
    path.write_text(re.sub(r"since \S+:", "since 2026-01-01T00:00:00+00:00:", path.read_text()))
    return holder


def dead(path):
    """A lock of a process that was killed."""
    gone = subprocess.Popen([sys.executable, "-SE", "-c", ""])
    gone.wait()
    path.write_text(f"process {gone.pid} on {socket.gethostname()} since 2026-01-01T00:00:00+00:00: snakemake\n")


def test_jobs_are_told_apart_by_their_logs_and_what_failed_by_its_last_words(make_plan, hold, write, capsys):
    plan = make_plan()
    named = names(plan)
    log(plan, named["floor"], "all well\n", age=50, done=True)
    log(plan, named["score"], "warming up\nhaste evaluate: the loss is nan at step 3\n", age=9)
    log(plan, named["grid"], "Traceback (most recent call last):\n  File x\nKeyError: 'y'\n", age=20)
    log(plan, named["sample"], "1/20\n", age=200)
    long_ago(hold, Path(plan.folder, ".lock"))
    running = write(Path(plan.folder, "logs", f"{named['train']}.log"))
    said = text(plan, capsys)
    assert "the workflow is at work: process " in said
    since = r"[\w ]+ since its last message"
    assert re.search(rf"running: {named['train']} \(process {running.pid}\), {since}: 10/20", said)
    assert re.search(rf"failed: {re.escape(named['score'])}, {since}: haste evaluate: the loss is nan at step 3", said)
    assert f"failed: {named['grid']}" in said and "KeyError: 'y'" in said
    assert re.search(rf"died: {named['sample']}, 3 min 2\d s since its last message: 1/20", said)
    assert named["floor"] not in said


def test_jobs_on_a_clusters_nodes_are_not_dead_because_nobody_here_does_them(make_plan, hold, capsys):
    plan = make_plan()
    log(plan, names(plan)["sample"], "1/20\n", age=200)
    long_ago(hold, Path(plan.folder, ".lock"))
    Path(plan.folder, "submitted.jsonl").touch()
    named = re.escape(names(plan)["sample"])
    assert re.search(rf"running: {named}, no message for 3 min 2\d s: 1/20", text(plan, capsys))


def test_a_job_whose_snakemake_was_killed_runs_on_alone_and_is_told_with_what_to_do(make_plan, write, capsys):
    plan = make_plan()
    name = names(plan)["train"]
    running = write(Path(plan.folder, "logs", f"{name}.log"))
    dead(Path(plan.folder, ".lock"))
    log(plan, names(plan)["sample"], "1/20\n", age=20)
    said = text(plan, capsys)
    assert "the workflow is gone without a message: process " in said
    assert f"runs on alone: {name} (process {running.pid}), " in said
    assert "the same command again waits for them" in said and "`kill` its process" in said
    assert f"died: {names(plan)['sample']}" in said


def test_without_a_workflow_a_job_that_did_not_end_was_interrupted(make_plan):
    plan = make_plan()
    log(plan, names(plan)["sample"], "10/20\n", age=3)
    states = {job.name: job.state for job in status.snapshot(plan).jobs}
    assert states == {names(plan)["sample"]: "interrupted"}


def test_a_job_that_waits_for_another_process_says_for_whom(make_plan, hold, write, capsys):
    plan = make_plan()
    path = Path(plan.folder, "logs", f"{names(plan)['train']}.log")
    waits = write(path)
    with open(path, "a") as more:
        more.write("10:00:00 haste.files: waiting for trajectory x: it is in use by process 7 on here since ...\n")
    hold(Path(plan.folder, ".lock"))
    said = (
        rf"waits: {names(plan)['train']} \(process {waits.pid}\), \d+ s: 10:00:00 haste.files: waiting for trajectory x"
    )
    assert re.search(said, text(plan, capsys))


def test_what_an_earlier_workflow_left_did_not_die_in_this_one_and_a_report_that_is_there_was_finished(make_plan, hold):
    plan = make_plan()
    log(plan, names(plan)["sample"], "10/20\n", age=300)
    log(plan, "report", "", age=300)
    hold(Path(plan.folder, ".lock"))
    assert [(job.name, job.state) for job in status.snapshot(plan).jobs if job.name != "report"] == [
        (names(plan)["sample"], "interrupted")
    ]
    Path(plan.report).parent.mkdir()
    Path(plan.report).touch()
    assert "report" not in {job.name for job in status.snapshot(plan).jobs}


def test_who_begins_to_train_is_not_blamed_for_the_silence_before(make_plan, hold):
    plan = make_plan(runs={"vanilla": {}})
    where = folder(plan, "vanilla", 8)
    write_log(where, record(4, time=time.time() - 3600))
    assert lines(plan)["vanilla"].age == pytest.approx(3600, abs=60)
    hold(where / "lock")
    assert lines(plan)["vanilla"].age < 60


def test_jobs_of_what_is_no_longer_configured_or_was_made_elsewhere_meanwhile_are_not_shown(make_plan, hold):
    plan = make_plan()
    hold(Path(plan.folder, ".lock"))
    log(plan, "detector-0123456789ab", "step 3 of 9\n", age=30)
    log(plan, Path(plan.detector.part.folder).name, "haste detector: no\n", age=30)
    log(plan, "autoencoder", "step 1 of 2\n", age=30)
    assert status.snapshot(plan).jobs == []


def test_a_finished_configuration_is_finished_while_another_trains_on_its_trunk(make_plan, hold, capsys):
    runs = {"vanilla": {"milestones": [8]}}
    longer = make_plan(name="longer", runs={"vanilla": {"milestones": [8, 16]}})
    plan = make_plan(runs=runs)
    loop.train(plan, plan.state("vanilla", 8))
    for one in [one for of in plan.jobs.every.values() for one in of]:
        for path in one.makes:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch(exist_ok=True)
    lock = folder(plan, "vanilla", 8) / "lock"
    hold(Path(longer.folder, ".lock"))
    hold(lock)
    told = lock.read_text().strip()
    lock.write_text(f"{told} train x -c {longer.folder}/config.json\n")
    assert lines(longer)["vanilla"].doing == "training"
    (line,) = status.snapshot(Plan(plan.config)).lines
    view = status.snapshot(Plan(plan.config))
    assert (line.doing, view.workflow, view.jobs, view.next) == ("finished", "finished", [], [])
    assert "tiny: the workflow is finished" in text(plan, capsys)


def test_a_trunk_that_another_configurations_job_trains_is_told_so(make_plan, hold):
    plan = make_plan(runs={"vanilla": {}})
    lock = folder(plan, "vanilla", 8) / "lock"
    hold(lock)
    told = lock.read_text().strip()
    lock.write_text(f"{told} train x -c {plan.root}/longer/config.json\n")
    assert lines(plan)["vanilla"].doing == "training, by the job of longer"


def test_a_step_of_a_minute_shows_how_far_it_is_before_the_first_losses(make_plan, hold, monkeypatch, caplog):
    monkeypatch.setattr(journal, "ALIVE", 0.0)  # as if every step took longer
    caplog.set_level("INFO", logger="haste.train")
    plan = make_plan(runs={"vanilla": {}}, runtime={"trackers": [], "log_every": 100})
    loop.train(plan, plan.state("vanilla", 8))
    assert any(re.match(r"step 3/8  [\d.]+ images/s  .* to go", message) for message in caplog.messages)
    path = folder(plan, "vanilla", 8) / "log.jsonl"
    every = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in every] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in journal.read(path)] == [8]  # what has losses
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:3]))
    Path(plan.path(plan.state("vanilla", 8))).unlink()
    hold(path.parent / "lock")
    line = lines(plan)["vanilla"]
    assert (line.step, line.doing, line.losses) == (3, "training", {})
    assert line.rate == pytest.approx(every[2]["images_per_s"] / 8) and line.age < 60


def test_what_is_next_starts_from_what_is_on_disk(make_plan):
    plan = make_plan(runs={"vanilla": {}})
    (train, score) = status.snapshot(plan).next
    assert train == f"train {plan.state('vanilla', 8).trajectory} from step 0 to 8, aligning nothing"
    assert score.startswith("sample and score 2 sets of samples, 0 of them")
    loop.train(plan, plan.state("vanilla", 8))
    (train, score) = status.snapshot(Plan(plan.config)).next
    assert "from step 8 to 16" in train and "1 of them of states on disk" in score


def test_disk_is_counted_by_room_also_while_files_come_and_go(make_plan):
    plan = make_plan()
    disk = status.snapshot(plan).disk
    stores = sum(path.stat().st_size for path in Path(plan.root, "stores").rglob("*") if path.is_file())
    assert disk["stores"] == stores > 0
    assert disk["samples"] == 0
    shutil.rmtree(plan.root)
    assert set(status.snapshot(plan).disk.values()) == {0}


def test_what_a_clusters_queue_says_stands_beside_the_run_that_waits(make_plan):
    plan = make_plan(runs={"vanilla": {}})
    view = status.snapshot(plan, lambda _: {plan.state("vanilla", 8): "job 7 PENDING (Priority)"})
    assert (view.lines[0].queued, view.lines[0].doing) == ("job 7 PENDING (Priority)", "waits in the queue")


def test_a_run_whose_job_was_put_back_into_the_queue_waits_whatever_its_old_lock_says(make_plan):
    plan = make_plan(runs={"vanilla": {}})
    where = folder(plan, "vanilla", 8)
    write_log(where, record(4, time=time.time()))
    (where / "lock").write_text("process 12 on node7 since 2026-01-01T00:00:00+00:00: haste train x\n")
    for queued, doing in (
        ("PENDING (BeginTime)", "waits in the queue"),
        ("RUNNING on n2", "training, as its lock says"),
    ):
        (line,) = status.snapshot(plan, lambda _, queued=queued: {plan.state("vanilla", 8): f"job 7 {queued}"}).lines
        assert (line.doing, line.step, line.rate) == (doing, 4, 5.0)
        assert line.to_go == pytest.approx((16 - 4) / 5)


def test_jobs_of_the_other_stages_are_counted_by_rule_and_state(make_plan, monkeypatch, tmp_path, capsys):
    plan, here = make_plan(runs={"vanilla": {}}), os.getcwd()
    lines = [
        f"{state}|{here}|rule_sample_wildcards_x.{n}|0" for n, state in enumerate(["RUNNING", "PENDING", "PENDING"])
    ]
    lines += [
        f"RUNNING|{here}|rule_images_check",
        f"RUNNING|{here}|(null)",
        "RUNNING|/elsewhere|rule_sample",
        "garbled",
    ]
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = "; ".join(f"echo '{line}'" for line in lines)
    squeue.write_text(f'#!/bin/sh\ncase "$*" in *--me*--array*) {said};; esac\n')
    squeue.chmod(0o755)
    assert status.snapshot(plan).queue == ["images_check: 1 RUNNING", "sample: 2 PENDING, 1 RUNNING"]
    assert "in the queue: sample: 2 PENDING, 1 RUNNING" in text(plan, capsys)


def test_that_the_cluster_takes_no_more_jobs_is_a_note_for_as_long_as_it_is_so(make_plan, capsys):
    plan = make_plan(runs={"vanilla": {}})
    assert "takes no more" not in text(plan, capsys)
    queue.full(plan).parent.mkdir(parents=True, exist_ok=True)
    queue.full(plan).write_text("SLURM takes no more jobs now (AssocMaxSubmitJobLimit).\n")
    assert "note: SLURM takes no more jobs now (AssocMaxSubmitJobLimit)." in text(plan, capsys)


def test_slurms_own_queue_is_asked_where_there_is_one_and_its_silence_is_said(make_plan, monkeypatch, tmp_path, capsys):
    plan = make_plan(runs={"vanilla": {}})
    name = job.name(plan, plan.state("vanilla", 8))
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    squeue.write_text(f"#!/bin/sh\necho '12|RUNNING|n2|None|{name}'\n")
    squeue.chmod(0o755)
    assert status.snapshot(plan).lines[0].queued == "job 12 RUNNING on n2"
    squeue.write_text(f"#!/bin/sh\necho '13|PENDING||Priority|{name}'\n")
    assert "job 13 PENDING (Priority)" in text(plan, capsys)
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error' >&2; exit 1\n")
    assert "note: the cluster's queue does not answer" in text(plan, capsys)


def test_a_checkpoint_from_elsewhere_is_a_line_too(make_plan, tmp_path, capsys):
    trained = make_plan(runs={"vanilla": {}})
    loop.train(trained, trained.state("vanilla", 8))
    file = trained.path(trained.state("vanilla", 8))
    row = {"checkpoint": file, "model": "dot", "sampling": ["quick"], "step": 8}
    plan = make_plan(runs={}, evaluate={"public": row})
    assert "public" in text(plan, capsys)
    (line,) = status.snapshot(plan).lines
    assert line.doing == "trained elsewhere, 0 of 1 sets of samples scored"


def test_watching_looks_again_until_it_is_interrupted(make_plan, monkeypatch, capsys):
    plan, naps = make_plan(runs={"vanilla": {}}), []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "sleep", nap)
    assert cli.main(["status", "--watch", "2", "-c", str(plan.file)]) == 130
    assert naps == [2.0, 2.0, 2.0]
