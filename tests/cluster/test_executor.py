"""How Snakemake submits the stages' jobs: its own executor, whose SLURM are scripts. A full queue means later."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haste.files.artefact import fingerprint

ROOT = Path(__file__).parents[2]
SNAKEFILE = """
import os
from types import SimpleNamespace
from haste.cluster import executor, queue

plan = SimpleNamespace(root="results", folder="results/tiny", config=SimpleNamespace(name="tiny"))
LEFT = queue.left(plan) if workflow.is_main_process else {}

onstart:
    executor.take_over(workflow.scheduler._executor, plan, LEFT, "")

rule all:
    input: expand("results/{n}", n=range(4)),

rule part:
    output: "results/{n}"
    shell: "true"
"""
# A job's comment ends in its wildcards, and its work is to make a file of this name.
SBATCH = """
case "$*" in *--array*) echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1;; esac
[ -e room ] || { touch room; echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
[ -e back ] || { touch back; echo "sbatch: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
n=$(echo "$*" | sed 's/.*_wildcards_\\([0-9]*\\).*/\\1/')
case $n in 3) echo "sbatch: error: QOSMaxCpuPerJobLimit" >&2; exit 1;; esac
touch ../work/results/$n; echo 10$n
"""


def queue(work, *lines):
    """A script for squeue: names of jobs only where they are asked for; they begin with a prefix of the site's."""
    name = f"site_haste-tiny-{fingerprint(str((work / 'results').resolve()), 8)}"
    shown = "; ".join(f'echo "{line}$name"' for line in lines)
    return f"""name=; case "$*" in *%j*) name="|{name}";; esac; {shown}"""


@pytest.fixture
def snakemake(cluster, tmp_path):
    """A function that starts Snakemake in a folder with four jobs to submit, and that folder."""
    cluster.says("sinfo", "exit 0")
    cluster.says("sacctmgr", "echo me")
    cluster.says("scontrol", "echo MaxArraySize = 1001; echo MinJobAge = 300 sec")
    work = tmp_path / "work"
    cluster.says("squeue", queue(work, "100|COMPLETED", "101|COMPLETED", "102|COMPLETED", "77_2|RUNNING"))
    (work / "results" / "tiny").mkdir(parents=True)
    (work / "Snakefile").write_text(SNAKEFILE)
    (work / "config.yaml").write_text((ROOT / "profiles" / "default" / "config.yaml").read_text())
    words = ["--executor", "slurm", "--jobs", "unlimited", "--default-resources", "slurm_account=me"]
    words += ["slurm_partition=main", "runtime=1", "--slurm-array-jobs", "part", "--slurm-status-command", "squeue"]
    words += ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "1", "--workflow-profile", work]
    started = []

    def start(program=(sys.executable, "-m", "snakemake")):
        command = list(map(str, [*program, *words]))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        log = open(work / "log", "w")  # noqa: SIM115 - closed below
        options = {"cwd": work, "env": environment, "stdout": log, "stderr": log, "preexec_fn": listening}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start, work
    for process in started:
        process.kill()
        process.wait()


def listening():
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def single(cluster):
    """The jobs that were submitted by themselves, in order."""
    calls = [call for call in cluster.calls("sbatch") if "--array" not in call]
    return [call.split("_wildcards_")[1].split()[0] for call in calls]


def test_what_the_queue_refuses_is_submitted_later_and_what_lives_already_is_attached_to(cluster, warm, snakemake):
    (start, work), said = snakemake, lambda: (snakemake[1] / "log").read_text()
    cluster.says("sbatch", SBATCH)
    record = work / "results" / "tiny" / "submitted.jsonl"
    record.write_text('["1", "77_2", "a.log"]\n["2", "78", "b.log"]\n["3", "79"')  # 78 has ended, the last is cut
    running = start([*warm.client, "snakemake"])
    limit = time.monotonic() + 120
    while "Attached to SLURM job 77_2" not in said() or len(list(work.glob("results/[02]"))) < 2:
        assert time.monotonic() < limit, said()
        time.sleep(0.1)
    (work / "results" / "1").touch()
    cluster.says("squeue", queue(work, "100|COMPLETED", "102|COMPLETED", "77_2|COMPLETED"))
    assert running.wait(120) == 1
    assert "77_2" in record.read_text() and '"78"' not in record.read_text()
    assert {path.name for path in work.glob("results/[0-9]")} == {"0", "1", "2"}
    assert "SLURM takes no more jobs now (QOSMaxSubmitJobPerUserLimit)" in said()
    assert "SLURM takes no more jobs now (Unable to contact slurm controller)" in said()
    assert "3 of 5 steps" in said(), "a job that SLURM never takes ends only itself"
    assert set(single(cluster)) == {"0", "2", "3"}
    assert single(cluster).count("3") <= 2  # once more where it was the one that met a full queue
    assert not (work / "results" / "tiny" / "queue-full.txt").exists()
    assert any("--job-name haste-tiny-" in call for call in cluster.calls("sbatch"))


def test_after_ctrl_c_nothing_more_is_submitted_and_nothing_is_waited_for(cluster, snakemake):
    cluster.says("sbatch", 'echo "sbatch: error: AssocGrpSubmitJobsLimit" >&2; exit 1')
    start, work = snakemake
    running = start()
    full, limit = work / "results" / "tiny" / "queue-full.txt", time.monotonic() + 120
    while not full.exists():
        assert time.monotonic() < limit, (work / "log").read_text()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    assert running.wait(180) != 0
    calls = len(cluster.calls("sbatch"))
    time.sleep(3)
    assert len(cluster.calls("sbatch")) == calls
    assert "AssocGrpSubmitJobsLimit" in full.read_text()


def test_where_slurm_does_not_say_what_lives_nothing_is_submitted(cluster, warm, snakemake):
    cluster.says("squeue", "exit 1")
    start, work = snakemake
    (work / "results" / "tiny" / "submitted.jsonl").write_text('["1", "77", "a.log"]\n')
    assert start([*warm.client, "snakemake"]).wait(120) != 0
    assert "SLURM does not say whether jobs that an earlier start submitted" in (work / "log").read_text()
    assert not cluster.calls("sbatch")
