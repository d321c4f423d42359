"""What jobs took, by the accounting's own words: every attempt counts, and what was once known is never lost.

RECORDED is what sacct of SLURM 22.05 said. The rest is in that format, with what that machine has not: a line a job,
then a line for each of its steps; with --duplicates, all of that for every attempt.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from haste.cli import main as cli
from haste.cluster import accounting, slurm
from haste.cluster import job as jobs
from haste.report import gather
from haste.report.content import Stage
from haste.report.times import time_table

# Training on two nodes of which one was lost, back in the queue and cancelled then; another, requeued once; and a shard
# of samples on a GPU.
RECORDED = """\
583805|NODE_FAIL|2026-11-20T20:14:37|30|2|billing=2,cpu=2,mem=3000M,node=2|00:07.460||haste-SiT-600-7a211451
583805.batch|CANCELLED|2026-11-20T20:14:37|30|1|cpu=1,mem=1500M,node=1|00:00.003|energy=0|batch
583805.0|FAILED|2026-11-20T20:14:37|34|2|cpu=2,mem=3000M,node=2|00:07.456|cpu=00:00:03,energy=0,mem=401228K,pages=0|python3
583805|CANCELLED by 0|2026-11-20T20:15:12|14|2|billing=2,cpu=2,mem=3000M,node=2|00:09.207||haste-SiT-600-7a211451
583805.batch|CANCELLED|2026-11-20T20:15:12|14|1|cpu=1,mem=1500M,node=1|00:00.003|energy=0|batch
583805.0|CANCELLED|2026-11-20T20:15:12|19|2|cpu=2,mem=3000M,node=2|00:09.203|energy=0|python3
583807|REQUEUED|2026-11-20T20:15:42|24|2|billing=2,cpu=2,mem=3000M,node=2|00:10.642||haste-SiT-600-7a211451
583807.batch|CANCELLED|2026-11-20T20:15:42|24|1|cpu=1,mem=1500M,node=1|00:00.003|energy=0|batch
583807.0|CANCELLED|2026-11-20T20:15:42|29|2|cpu=2,mem=3000M,node=2|00:10.638|energy=0|python3
583807|COMPLETED|2026-11-20T20:16:15|54|2|billing=2,cpu=2,mem=3000M,node=2|00:37.973||haste-SiT-600-7a211451
583807.batch|COMPLETED|2026-11-20T20:16:15|54|1|cpu=1,mem=1500M,node=1|00:00.015|cpu=00:00:00,energy=0,mem=12584K|batch
583807.0|COMPLETED|2026-11-20T20:16:15|54|2|cpu=2,mem=3000M,node=2|00:37.958|cpu=00:00:11,energy=0,mem=799336K|python3
40|COMPLETED|2026-11-20T20:09:11|57|1|billing=1,cpu=1,gres/gpu=1,mem=1501M,node=1|00:14.818||0b90bf65-0efc-4ad8-a417-b0f20b692602
40.batch|COMPLETED|2026-11-20T20:09:11|57|1|cpu=1,gres/gpu=1,mem=1501M,node=1|00:03.470|cpu=00:00:02,energy=0|batch
40.0|COMPLETED|2026-11-20T20:09:20|44|1|cpu=1,gres/gpu=1,mem=1501M,node=1|00:11.347|cpu=00:00:07,energy=0|python3
49|FAILED|2026-11-20T20:18:17|0|4||00:00:00||haste-SiT-16-738678d9
"""
# Training on a node of 8 GPUs, preempted once and lost with its node once; its steps tell of the GPUs.
TRAINING = """\
100|PREEMPTED|2026-11-01T10:00:00|3600|96|billing=96,cpu=96,gres/gpu:h200=8,gres/gpu=8,mem=400G,node=1|00:00:00||haste-t
100.batch|CANCELLED|2026-11-01T10:00:00|3602|96|cpu=96,gres/gpu=8,mem=400G,node=1|00:00:00||batch
100|NODE_FAIL|2026-11-01T12:00:00|1800|96|billing=96,cpu=96,gres/gpu:h200=8,gres/gpu=8,mem=400G,node=1|00:00:00||haste-t
100|COMPLETED|2026-11-01T13:00:00|7200|96|billing=96,cpu=96,gres/gpu:h200=8,gres/gpu=8,mem=400G,node=1|3-00:00:00||haste-t
100.batch|COMPLETED|2026-11-01T13:00:00|7200|96|cpu=96,gres/gpu=8,mem=400G,node=1|00:01.500|cpu=00:00:01,mem=20M|batch
100.extern|COMPLETED|2026-11-01T13:00:00|7200|96|billing=96,cpu=96,gres/gpu=8,node=1|00:00.001|cpu=00:00:00|extern
100.0|COMPLETED|2026-11-01T13:00:10|7190|96|cpu=96,gres/gpu=8,node=1|2-23:59:58|cpu=09:00:00,gres/gpumem=70G,gres/gpuutil=90,mem=9G|python
"""
# Two shards of an array of three, one cancelled by root while it ran; the third is another's. And one that waits.
ARRAY = """\
201|COMPLETED|2026-11-02T10:00:00|600|4|billing=4,cpu=4,gres/gpu:a100=1,mem=64G,node=1|00:20:00||4f1c
201.batch|COMPLETED|2026-11-02T10:00:00|600|4|cpu=4,gres/gpu:a100=1,mem=64G,node=1|00:20:00|cpu=00:20:00,energy=0|batch
202|CANCELLED by 0|2026-11-02T10:00:00|300|4|billing=4,cpu=4,gres/gpu:a100=1,mem=64G,node=1|00:05:00||4f1c
203|COMPLETED|2026-11-02T10:00:00|999|4|billing=4,cpu=4,gres/gpu:a100=1,mem=64G,node=1|00:20:00||4f1c
204|PENDING|Unknown|0|0||00:00:00||4f1c
"""


@pytest.fixture
def plan(make_plan):
    return make_plan()


def mark(plan, monkeypatch, stage, *numbers):
    for number in numbers:
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        Path(plan.folder).mkdir(exist_ok=True)
        accounting.mark(plan.config_file, stage)
    monkeypatch.delenv("SLURM_JOB_ID")


def train_left(plan, number):
    folder = jobs.folder(plan, plan.state("vanilla", 8))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}-attempt-0.log").touch()
    (folder / "submit.lock").touch()


def says(cluster, text):
    (cluster.folder / "said").write_text(text)
    cluster.says("sacct", "cat said")


def test_every_attempt_counts_with_its_gpus_and_how_it_ended():
    attempts = accounting.read(TRAINING, {"100": "train"})
    assert [(one.state, one.seconds, one.cpus, one.gpus) for one in attempts] == [
        ("PREEMPTED", 3600, 96, 8),
        ("NODE_FAIL", 1800, 96, 8),
        ("COMPLETED", 7200, 96, 8),
    ]
    usage = accounting.by_stage(attempts)["train"]
    assert (usage.jobs, usage.attempts) == (1, 3)
    assert usage.ended == {"PREEMPTED": 1, "NODE_FAIL": 1, "COMPLETED": 1}
    assert usage.gpu_seconds == 8 * (3600 + 1800 + 7200)
    assert usage.broken_gpu_seconds == 8 * (3600 + 1800)
    # where SLURM measured nothing, as of attempts that were cut off, nothing is averaged in as if nothing had been used
    assert usage.cpu_used / usage.cpu_measured == pytest.approx(3 * 86400 / (7200 * 96))
    assert usage.gpu_used / usage.gpu_measured == pytest.approx(0.9)


def test_what_a_real_cluster_said_of_jobs_that_it_lost_requeued_and_cancelled_is_read():
    owners = {"583805": "train", "583807": "train", "40": "sample", "49": "train"}
    usage = accounting.by_stage(accounting.read(RECORDED, owners))
    train, sample = usage["train"], usage["sample"]
    assert train.ended == {"NODE_FAIL": 1, "CANCELLED": 1, "REQUEUED": 1, "COMPLETED": 1}
    assert (train.jobs, train.gpu_seconds) == (2, 0)
    assert train.cpu_seconds == 2 * (30 + 14 + 24 + 54)
    assert train.broken_cpu_seconds == 2 * (30 + 14 + 24)
    assert train.cpu_used == pytest.approx(7.460 + 9.207 + 10.642 + 37.973)
    assert (sample.gpu_seconds, sample.cpu_used, sample.gpu_measured) == (57, 14.818, 0)


def test_of_an_array_only_the_jobs_that_were_ours_count_and_kinds_of_gpus_do():
    attempts = accounting.read(ARRAY, {"201": "sample", "202": "sample", "204": "sample"})
    assert [(one.job, one.state, one.gpus) for one in attempts] == [("201", "COMPLETED", 1), ("202", "CANCELLED", 1)]
    usage = accounting.by_stage(attempts)["sample"]
    assert usage.cpu_used / usage.cpu_measured == pytest.approx((1200 + 300) / (4 * 600 + 4 * 300))
    assert usage.gpu_measured == 0, "this site keeps no account of it"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:01.500", 1.5), ("02:03", 123), ("01:02:03", 3723), ("2-01:02:03", 176523), ("", 0), ("INVALID", 0)],
)
def test_times_of_sacct_are_read(text, seconds):
    assert accounting.duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "\n", "sacct: error: nothing\n", "100|COMPLETED\n", "100.0|COMPLETED|x|1|1|||||\n"]
)
def test_words_that_are_no_account_are_passed_over(text):
    assert accounting.read(text, {"100": "train"}) == []


def test_marks_and_the_logs_of_training_tell_whose_jobs_are_whose(plan, monkeypatch):
    mark(plan, monkeypatch, "sample", 201, 202)
    mark(plan, monkeypatch, "score", 300)
    mark(plan, monkeypatch, "images", 400)
    mark(plan, monkeypatch, "latents", 400)  # a whole workflow in one job
    train_left(plan, 100)
    assert accounting.jobs_of(plan) == {
        **{"100": "train", "201": "sample", "202": "sample", "300": "score"},
        "400": accounting.SEVERAL,
    }


def test_commands_of_a_workflow_leave_their_mark_and_those_of_a_person_do_not(plan, monkeypatch, tmp_path):
    Path(plan.folder).mkdir()
    shutil.copy(plan.file, plan.config_file)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert cli.main(["evaluate", "nothing", "-c", plan.config_file]) == 2  # what fails costs too
    assert cli.main(["targets", "vit", "--fit", "-c", plan.config_file]) == 2
    assert cli.main(["train", "x/1", "-c", plan.config_file, "--slurm", "runtime=1h"]) == 2  # who only waits
    assert cli.main(["report", "-c", plan.config_file]) == 2  # what Snakemake makes where it runs itself
    assert cli.main(["evaluate", "nothing", "-c", str(plan.file)]) == 2
    monkeypatch.delenv("SLURM_JOB_ID")
    assert cli.main(["sample", "nothing", "-c", plan.config_file]) == 2
    found = {path.name for path in Path(plan.root).rglob("jobs/*")}
    assert found == {"score-77", "pca-77"}


def test_what_was_once_known_outlives_the_accounting_and_an_account_goes_on(plan, cluster, monkeypatch):
    train_left(plan, 100)
    mark(plan, monkeypatch, "sample", 201, 202)
    says(cluster, "".join(TRAINING.splitlines(keepends=True)[:2]))  # it was preempted, and is to run again
    accounting.update(plan)
    assert [one.state for one in accounting.kept(plan)] == ["PREEMPTED"]
    assert "--duplicates" in cluster.calls("sacct")[0], "else only the last attempt is told"
    says(cluster, "".join(TRAINING.splitlines(keepends=True)[2:]) + ARRAY)  # the first attempt is forgotten already
    accounting.update(plan)
    whole = accounting.kept(plan)
    assert [one.state for one in whole] == ["PREEMPTED", "NODE_FAIL", "COMPLETED", "COMPLETED", "CANCELLED"]
    for script in ("exit 1", "echo slurm_persist_conn_open >&2; exit 1", "true"):
        cluster.says("sacct", script)
        accounting.update(plan)
        assert accounting.kept(plan) == whole
    assert "--jobs 202" in cluster.calls("sacct")[-1], "what is done need not be asked about again"
    monkeypatch.setenv("PATH", str(cluster.folder))  # a laptop
    accounting.update(plan)
    assert accounting.kept(plan) == whole


def test_an_accounting_that_hangs_keeps_no_report_waiting(plan, cluster, monkeypatch, caplog):
    train_left(plan, 100)
    monkeypatch.setattr(accounting, "PATIENCE", 0.1)
    monkeypatch.setattr(slurm, "TIMEOUT", 1.0)
    cluster.says("sacct", "sleep 100")
    accounting.update(plan)
    assert "sacct gave no answer" in caplog.text
    assert not accounting.file_of(plan).exists()


def test_an_account_that_cannot_be_read_is_left_as_it_is(plan, cluster, caplog):
    train_left(plan, 100)
    says(cluster, TRAINING)
    file = accounting.file_of(plan)
    file.parent.mkdir(parents=True)
    for words in ("{", json.dumps({"schema": 1, "kind": "accounting", "attempts": [{"job": 1}]})):
        file.write_text(words)
        accounting.update(plan)
        assert file.read_text() == words
        assert accounting.kept(plan) == []
        assert str(file) in caplog.text


def test_the_report_joins_the_account_to_its_times(plan, cluster, monkeypatch):
    train_left(plan, 100)
    mark(plan, monkeypatch, "sample", 201, 202)
    says(cluster, TRAINING + ARRAY)
    accounting.update(plan)
    benchmark = Path(plan.folder, "benchmarks", "train-x-8.tsv")
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text("s\n20000.0\n")
    table = time_table(gather.stages(plan))
    heads = [head.name for head in table.heads]
    lines = {entry.cells[0].text: dict(zip(heads, entry.cells, strict=True)) for entry in table.entries}
    train, total = lines["train"], lines["total"]
    assert train["attempts"].text == "3 (1 node fail, 1 preempted)"
    assert (train["GPU-hours"].text, train["GPU used"].text, train["CPU used"].text) == ("28.0", "90 %", "38 %")
    assert (lines["sample"]["GPU-hours"].text, lines["sample"]["GPU used"].text) == ("0.25", "–")
    assert total["GPU-hours"].value == pytest.approx(28.25)
    assert total["cluster jobs"].text == "3"
    words = " ".join(table.notes)
    assert re.search(r"12.1 of the 28.2 GPU-hours and \S+ of the \S+ CPU-hours went into attempts that did not", words)
    cpus = accounting.by_stage(accounting.read(RECORDED, {"583805": "train", "40": "sample"}))
    mixed = time_table([Stage(name, 1, 1.0, usage) for name, usage in cpus.items()])
    assert "0.024 of the 0.04 CPU-hours went into attempts" in " ".join(mixed.notes), "they had no GPU, others had"
    plain = time_table([Stage("train", 1, 20.0)])
    assert [head.name for head in plain.heads] == ["stage", "jobs", "time, summed", "share"] and not plain.notes


def test_haste_report_asks_the_accounting_and_a_report_without_one_keeps_what_it_said(world, cluster, monkeypatch):
    where = Path(world.plan.path(world.plan.state("HASTE", 8))).parent / "jobs"
    where.mkdir()
    (where / "100-attempt-0.log").touch()
    says(cluster, TRAINING)
    times = Path(world.plan.report).parent / "time.csv"
    assert cli.main(["report", "-c", str(world.file)]) == 0
    said = times.read_text()
    assert "GPU-hours" in said and ",28.0," in said
    monkeypatch.setenv("PATH", str(cluster.folder))
    assert cli.main(["report", "-c", str(world.file)]) == 0
    assert times.read_text() == said
