"""Training and the whole workflow on a real SLURM, disturbed in every way that clusters know: the bits stay the same.

Waits are for conditions, with generous limits; nothing here depends on how fast the machine is. A brake slows the
steps in jobs down, so that there is always a step to disturb.
"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from haste import config
from haste.cluster import job as jobs
from haste.plan import Plan

pytestmark = pytest.mark.timeout(3000)

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
BRAKE = """
import os, time
if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "HASTE_BRAKE" in os.environ:
    from haste import journal
    add = journal.Journal.add
    def slowly(self, values):
        try:
            time.sleep(float(open(os.environ["HASTE_BRAKE"]).read() or 0))
        except FileNotFoundError:
            pass
        add(self, values)
    journal.Journal.add = slowly
"""
TRAIN = {"cpus_per_task": 1, "mem_mb": 1500, "signal_s": 30, "poll_s": 1}


class World:
    """A results folder on the cluster's shared file system, a configuration, a profile, and a user's commands."""

    def __init__(self, folder, data, slurm, runs, steps=None, **train):
        self.folder, self.slurm, self.root = folder, slurm, folder / "results"
        folder.mkdir(parents=True, exist_ok=True)
        if data:
            shutil.copytree(data, self.root)
        self.brake = folder / "brake"
        (folder / "brakes").mkdir()
        (folder / "brakes" / "sitecustomize.py").write_text(BRAKE)
        self.configure(runs=runs)
        self.profile(**train)

    def configure(self, **changes):
        raw = {**copy.deepcopy(TINY), "results": str(self.root), **changes}
        raw["runtime"] = {**TINY["runtime"], "save_every": 5, "log_every": 5, "sample_shards": 2} | changes.get(
            "runtime", {}
        )
        self.file = self.folder / "tiny.yaml"
        self.file.write_text(yaml.safe_dump(raw))
        self.plan = Plan(config.resolve(raw))

    def profile(self, **changes):
        """The profile that users start from, with this small cluster's resources."""
        found = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
        found["default-resources"] = {
            "runtime": 10,
            "mem_mb": 1500,
            "cpus_per_task": 1,
            "slurm_partition": "main",
            "slurm_account": "haste",
        }
        train = {**TRAIN, "runtime": 20, "nodes": 1, "tasks_per_node": 2, "gpus_per_node": 0}
        found["set-resources"] = {
            "train": {**train, **changes.get("train", {})},
            "train_plain": {**train, **changes.get("plain", {})},
            "sample": {"gpu": 1},
        }
        found |= {
            "latency-wait": 20,
            "slurm-init-seconds-before-status-checks": 2,
            "seconds-between-status-checks": 2,
        }
        path = self.folder / "profile" / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(found))

    @property
    def environment(self):
        path = f"{Path(sys.executable).parent}:{self.slurm.environment['PATH']}"
        brakes = f"{self.folder / 'brakes'}:{ROOT}"
        return {
            **self.slurm.environment,
            "PATH": path,
            "PYTHONPATH": brakes,
            "HASTE_BRAKE": str(self.brake),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *arguments):
        """A user's snakemake, in a terminal's process group of its own."""
        command = [
            sys.executable,
            "-m",
            "snakemake",
            *map(str, arguments),
            "--snakefile",
            str(ROOT / "workflow" / "Snakefile"),
        ]
        command += ["--workflow-profile", str(ROOT / "profiles" / "default"), "--profile", str(self.folder / "profile")]
        command += ["--directory", str(self.folder), "--configfile", str(self.file)]
        self.log = self.folder / f"snakemake-{time.monotonic_ns()}.log"
        with open(self.log, "w") as out:
            self.snakemake = subprocess.Popen(
                command, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )
        self.slurm.users.append(self.snakemake)
        return self.snakemake

    def finish(self, running, seconds=1200):
        code = running.wait(seconds)
        assert code == 0, self.log.read_text()[-6000:] + self.slurm.state()

    def haste(self, *arguments):
        command = [sys.executable, "-m", "haste.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=120)

    # -- what is seen ------------------------------------------------------------------------------------------------

    def path(self, run, step):
        return Path(self.plan.path(self.plan.state(run, step)))

    def queue(self, run, step):
        """Live jobs that make a state, as (id, state)."""
        name = jobs.name(self.plan, self.plan.state(run, step))
        text = self.slurm.ask("squeue", "--noheader", "--name", name, "--format=%A %T", patience=120)
        return [tuple(line.split()) for line in text.splitlines()]

    def runs(self, run, step):
        return [number for number, state in self.queue(run, step) if state == "RUNNING"]

    def saved(self, run, step):
        folder = self.path(run, step).parent
        found = [*folder.glob("rolling/step-*.safetensors"), *folder.glob("step-*.safetensors")]
        return max((int(path.stem.split("-")[1]) for path in found), default=0)

    def gets_on(self, run, step, seconds=240):
        """Wait until a job trains and has saved something new; its number."""
        before = self.saved(run, step)
        self.until(f"{run} gets beyond step {before}", lambda: self.saved(run, step) > before, seconds)
        (number,) = self.runs(run, step)
        return number

    def until(self, what, ask, seconds=240):
        """Wait for something, and no longer when nobody sees to it any more."""
        try:
            self.slurm.until(what, ask, seconds)
        except AssertionError as error:
            logs = [self.log, *self.root.glob("tiny/logs/train-*.log")]
            raise AssertionError(f"{error}\n" + "\n".join(f"{p}:\n{p.read_text()[-2500:]}" for p in logs)) from None

    def attempts(self, run, step):
        """How every attempt of every job for a state ended, by accounting."""
        name = jobs.name(self.plan, self.plan.state(run, step))
        found = self.slurm.accounted("JobID", "JobName%200", "State")
        return [(job["JobID"], job["State"].split()[0]) for job in found if job["JobName%200"] == name]

    def trainers(self):
        """Processes that train."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "submitit.core._submit" in words and any(str(self.root.resolve()) in word for word in words):
                found.append(process)
        return [p for p in found if p.parent() is not None and p.parent().name() == "slurmstepd"]


def equal(found, expected):
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def locally(world, tmp_path, *states):
    """The same states, trained on this machine without a cluster, with the same number of processes."""
    raw = yaml.safe_load(world.file.read_text())
    raw |= {"results": str(tmp_path / "local")}
    raw["runtime"]["processes"] = 2
    shutil.copytree(
        world.root, tmp_path / "local", ignore=shutil.ignore_patterns("states", "samples", "features", "scores", "tiny")
    )
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(raw))
    plan = Plan(config.resolve(raw))
    for run, step in states:
        done = world.haste("train", plan.state(run, step), "-c", tmp_path / "local.yaml")
        assert done.returncode == 0, done.stderr
    return plan


@pytest.fixture
def data(_finished_data):
    """Every store and part of the tiny configuration, made on this machine."""
    return _finished_data


def test_one_training_survives_everything_that_a_cluster_does_to_it(slurm, data, tmp_path):
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [400]}}
    world = World(tmp_path / "w", data, slurm, runs, train={"nodes": 2, "tasks_per_node": 1})
    what, target = ("HASTE", 400), world.path("HASTE", 400)
    world.brake.write_text("0.3")
    snakemake = world.start(target)
    first = world.gets_on(*what)

    # Snakemake and everything it started die; the same command attaches
    os.killpg(snakemake.pid, signal.SIGKILL)
    snakemake.wait()
    snakemake = world.start(target)
    world.until("it attached", lambda: f"attached to job {first}" in world.log.read_text())
    assert world.gets_on(*what) == first

    # a second Snakemake says who is at work
    log = world.log
    second = world.start(target)
    assert second.wait(120) != 0
    assert "is in use" in world.log.read_text()
    world.log = log

    # a job of the higher partition takes both nodes
    before = world.saved(*what)
    slurm.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    world.until("it is preempted", lambda: not world.runs(*what))
    world.until("it is saved", lambda: world.saved(*what) >= before)
    world.until("it runs again", lambda: world.runs(*what))
    assert world.gets_on(*what) == first, "preemption ended the job"

    # one process is killed: another job goes on
    world.trainers()[1].kill()
    world.until("another job", lambda: world.runs(*what) not in ([], [first]))
    second = world.gets_on(*what)

    # the controller and a node's daemon die: the job runs on
    slurm.kill("slurmctld")
    slurm.kill("haste-n1")
    time.sleep(5)
    slurm.start_controller()
    slurm.start_node("haste-n1")
    assert world.gets_on(*what) == second

    # a node goes
    slurm.node_fails("haste-n2")
    world.until("SLURM notices", lambda: not world.runs(*what), 180)
    slurm.start_node("haste-n2")
    third = world.gets_on(*what)

    # somebody cancels it: it is not submitted behind their back, the same command goes on
    slurm.ask("scancel", third)
    assert snakemake.wait(120) != 0
    assert "was cancelled" in (world.root / "tiny" / "logs" / f"train-{target.parent.name}-00000400.log").read_text()
    snakemake = world.start(target)
    fourth = world.gets_on(*what)

    # Ctrl-C leaves it running and says so; haste cancel ends it
    os.killpg(snakemake.pid, signal.SIGINT)
    assert snakemake.wait(120) != 0
    assert f"job {fourth} goes on" in world.log.read_text()
    assert f"scancel {fourth}" in world.log.read_text()
    assert world.gets_on(*what) == fourth
    done = world.haste("cancel", "HASTE", "-c", world.file)
    assert f"cancelled job {fourth}" in done.stdout
    world.until("it is gone", lambda: not world.queue(*what))

    # its time is shorter than what is left: back into the queue, by itself
    world.profile(train={"nodes": 2, "tasks_per_node": 1, "runtime": 2, "signal_s": 45})
    world.brake.write_text("1")
    snakemake = world.start(target)
    last = world.gets_on(*what)
    world.until("its time is over", lambda: not world.runs(*what), 240)
    world.until("it runs again", lambda: world.runs(*what))
    assert world.gets_on(*what) == last
    world.brake.unlink()
    world.finish(snakemake)

    plan = locally(world, tmp_path, what)
    equal(target, plan.path(plan.state(*what)))
    attempts = world.attempts(*what)
    print(attempts)
    assert len({number for number, _ in attempts}) == len({first, second, third, fourth, last})
    assert ("PREEMPTED" in dict(attempts).values()) or [a for a in attempts if a == (first, "PREEMPTED")]
    assert attempts[-1] == (last, "COMPLETED")


def test_the_whole_workflow_ends_in_the_tables_of_a_local_run_and_each_stage_has_its_own_resources(
    slurm, data, tmp_path
):
    runs = {"HASTE-8": {"alignment": "HASTE", "stop": 8, "milestones": [8, 16]}}
    train = {"tasks_per_node": 2, "gpus_per_node": 2, "mem_mb": 2000}
    plain = {"tasks_per_node": 1, "nodes": 2, "mem_mb": 1200}
    world = World(tmp_path / "w", None, slurm, runs, train=train, plain=plain)
    world.finish(world.start())

    # before the stop two GPUs and the teacher, after it none
    found = slurm.accounted("JobID", "JobName%200", "State", "AllocTRES%200", "NNodes")
    asked = {}
    for step in (8, 16):
        name = jobs.name(world.plan, world.plan.state("HASTE-8", step))
        (asked[step],) = [job for job in found if job["JobName%200"] == name]
    assert [asked[step]["State"] for step in (8, 16)] == ["COMPLETED"] * 2
    assert "gres/gpu=2" in asked[8]["AllocTRES%200"]
    assert "mem=2000M" in asked[8]["AllocTRES%200"]
    assert "gres/gpu" not in asked[16]["AllocTRES%200"]
    assert [asked[step]["NNodes"] for step in (8, 16)] == ["1", "2"]
    inputs = json.loads(world.haste("show", world.path("HASTE-8", 16)).stdout)["provenance"]
    assert inputs["processes"] == 2
    log = "".join(p.read_text() for p in world.path("HASTE-8", 16).parent.glob("jobs/*attempt*.log"))
    assert "steps 8 to 16, aligning nothing" in log

    # the same table as without a cluster
    raw = yaml.safe_load(world.file.read_text())
    raw |= {"results": str(tmp_path / "local")}
    raw["runtime"]["processes"] = 2
    shutil.copytree(data, tmp_path / "local")
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--workflow-profile", ROOT / "profiles" / "default", "--directory", tmp_path]
    done = subprocess.run(
        [*map(str, command), "--configfile", str(tmp_path / "local.yaml")],
        capture_output=True,
        text=True,
        env=world.environment,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = Plan(config.resolve(raw))
    for step in (8, 16):
        equal(world.path("HASTE-8", step), plan.path(plan.state("HASTE-8", step)))
    tables = [(Path(p.report).parent / "results.csv").read_text() for p in (world.plan, plan)]
    assert tables[0] == tables[1]

    # another way to draw samples: its two shards as one array, its score, its picture, the report, and nothing else
    before = {job["JobID"] for job in slurm.accounted("JobID")}
    sampling = {**TINY["sampling"], "more": {"sampler": "euler", "steps": 3, "count": 20}}
    runs["HASTE-8"]["sampling"] = ["quick", "more"]
    world.configure(runs=runs, sampling=sampling)
    world.finish(world.start())
    rules = re.findall(r"^(?:local)?rule (\w+):", world.log.read_text(), re.MULTILINE)
    assert sorted(set(rules)) == ["all", "grid", "report", "sample", "score"]
    found = [job for job in slurm.accounted("JobID", "AllocTRES%200") if job["JobID"] not in before]
    new = {job["JobID"] for job in found}
    arrays = {number.split("_")[0] for number in new if "_" in number}
    assert len(arrays) == 1
    assert ["gres/gpu=1" in job["AllocTRES%200"] for job in found if "_" in job["JobID"]] == [True] * 4
