"""What a user has on the cluster of the tests: a results folder, a configuration, a profile, and commands.

Waits are for conditions, with generous limits; nothing here depends on how fast the machine is. A brake slows the
steps in jobs down, so that there is always a step to disturb.
"""

import copy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

from haste import config
from haste.cluster import job as jobs
from haste.plan import Plan

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
BRAKE = """
import os, sys, time
if "snakemake" in sys.orig_argv:  # it waits ever longer between two looks at the queue
    from snakemake_executor_plugin_slurm import Executor
    Executor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)
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
        gpus = {rule: {"gpu": given["gpu"]} for rule, given in found["set-resources"].items() if "gpu" in given}
        found["set-resources"] = {
            **gpus,
            "train": {**train, **changes.get("train", {})},
            "train_plain": {**train, **changes.get("plain", {})},
        }
        found |= {
            "latency-wait": 20,
            "slurm-init-seconds-before-status-checks": 2,
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
