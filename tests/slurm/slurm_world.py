"""What a user has on the cluster of the tests: a results folder, a configuration, a profile, and commands.

Waits are for conditions, with generous limits; nothing here depends on how fast the machine is. A brake slows the
steps of jobs down and holds them before the last ones, so that there is always a step to disturb.
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
from haste.plan.plan import Plan

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
# In every process of a training job: a step takes PACE seconds, and step CEILING is not begun, as a file says.
BRAKE = """
import os, sys, time
if "snakemake" in sys.orig_argv:  # it waits ever longer between two looks at the queue
    from snakemake_executor_plugin_slurm import Executor
    Executor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, seconds: None)
if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "HASTE_BRAKE" in os.environ:
    from haste.files import journal
    add = journal.Journal.add
    def limits():
        try:
            return map(float, open(os.environ["HASTE_BRAKE"]).read().split())
        except FileNotFoundError:
            return 0, float("inf")
    def slowly(self, values):
        self.steps = getattr(self, "steps", self.begin) + 1
        pace, ceiling = limits()
        time.sleep(pace)
        while self.steps > ceiling:
            time.sleep(0.1)
            _, ceiling = limits()
        add(self, values)
    journal.Journal.add = slowly
"""
TRAIN = {"cpus_per_task": 1, "mem_mb": 1500, "signal_s": 30, "poll_s": 1}


class World:
    """A results folder on the cluster's shared file system, a configuration, a profile, and a user's commands."""

    def __init__(self, folder, data, slurm, runs, runtime=None, **train):
        self.folder, self.slurm, self.root = folder, slurm, folder / "results"
        folder.mkdir(parents=True, exist_ok=True)
        if data:
            shutil.copytree(data, self.root)
        self.brake_file = folder / "brake"
        (folder / "brakes").mkdir()
        (folder / "brakes" / "sitecustomize.py").write_text(BRAKE)
        self.configure(runs=runs, runtime=runtime or {})
        self.profile(**train)

    def brake(self, pace, ceiling):
        """From now on steps take `pace` seconds, and none beyond `ceiling` is done."""
        aside = self.brake_file.with_suffix(".aside")
        aside.write_text(f"{pace} {ceiling}")
        aside.replace(self.brake_file)

    def release(self):
        """Steps take what they take."""
        self.brake_file.unlink()

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
        """What a user's commands see."""
        path = f"{Path(sys.executable).parent}:{self.slurm.environment['PATH']}"
        return {
            **self.slurm.environment,
            "PATH": path,
            "PYTHONPATH": self.python_path(ROOT),
            "HASTE_BRAKE": str(self.brake_file),
            "OMP_NUM_THREADS": "1",
        }

    def python_path(self, clone):
        return f"{self.folder / 'brakes'}:{clone}"

    def start(self, *arguments, clone=ROOT):
        """A user's snakemake, in a terminal's process group of its own; what it says is in `log`."""
        command = ["-m", "snakemake", *arguments, "--snakefile", clone / "workflow" / "Snakefile"]
        command += ["--workflow-profile", clone / "profiles" / "default", "--profile", self.folder / "profile"]
        where = self.folder if clone == ROOT else clone
        return self._start(*command, "--directory", where, "--configfile", self.file, clone=clone)

    def train(self, run, step, first=None, **asked):
        """A user's `haste train --slurm`, which Snakemake would call."""
        asked = {**TRAIN, "runtime": 20, **asked}
        state, settings = self.plan.state(run, step), (f"{key}={value}" for key, value in asked.items())
        return self._start("-m", "haste.cli", "train", state, "-c", self.file, "--slurm", *settings, first=first)

    def _start(self, *arguments, clone=ROOT, first=None):
        """`first`: a folder with programs that are taken before all others of their names."""
        self.log = self.folder / f"user-{time.monotonic_ns()}.log"
        environment = {**self.environment, "PYTHONPATH": self.python_path(clone)}
        if first:
            environment["PATH"] = f"{first}:{environment['PATH']}"
        with open(self.log, "w") as out:
            command = [sys.executable, *map(str, arguments)]
            self.user = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        self.slurm.users.append(self.user)
        return self.user

    def clone(self):
        """Another copy of the code, as a colleague has it."""
        where = self.folder / "clone"
        for part in ("haste", "workflow", "profiles"):
            shutil.copytree(ROOT / part, where / part, ignore=shutil.ignore_patterns("__pycache__"))
        return where

    def finish(self, running, seconds=1200):
        code = running.wait(seconds)
        assert code == 0, self.log.read_text()[-6000:] + self.slurm.state()

    def leaves(self, user, code=None):
        """Somebody ends, with this exit code (None: any but 0)."""
        self.until("somebody leaves", lambda: user.poll() is not None)
        assert user.returncode != 0 if code is None else user.returncode == code, self.log.read_text()

    def haste(self, *arguments):
        command = [sys.executable, "-m", "haste.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=120)

    # -- what is seen ------------------------------------------------------------------------------------------------

    def path(self, run, step):
        return Path(self.plan.path(self.plan.state(run, step)))

    def queue(self, run, step, patience=120):
        """Live jobs that make a state, as (id, state)."""
        name = jobs.name(self.plan, self.plan.state(run, step))
        text = self.slurm.ask("squeue", "--noheader", "--name", name, "--format=%A %T", patience=patience)
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
        self.until("its job is seen", lambda: self.runs(run, step))
        (number,) = self.runs(run, step)
        return number

    def until(self, what, ask, seconds=240):
        """Wait for something, and no longer when nobody sees to it any more."""
        try:
            self.slurm.until(what, ask, seconds)
        except AssertionError as error:
            logs = [self.log, *self.root.glob("tiny/logs/train-*.log"), *self.root.glob("states/*/jobs/*.out")]
            raise AssertionError(f"{error}\n" + "\n".join(f"{p}:\n{p.read_text()[-2500:]}" for p in logs)) from None

    def said(self, run, step):
        """What all attempts to train a state wrote."""
        logs = sorted(self.path(run, step).parent.glob("jobs/*-attempt-*.log"))
        return "".join(path.read_text() for path in logs)

    def told(self, run, step):
        """What who waits for a state wrote to its log in Snakemake's place."""
        state = self.plan.state(run, step)
        return Path(self.plan.folder, "logs", f"train-{state.trajectory}-{Path(state.file).stem[5:]}.log").read_text()

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


def locally(world, folder, run, step, processes=2):
    """Begin to train the same state on this machine, without a cluster; its process, and where the state will be."""
    raw = yaml.safe_load(world.file.read_text())
    raw |= {"results": str(folder / "results")}
    raw["runtime"]["processes"] = processes
    left_out = shutil.ignore_patterns("states", "samples", "features", "scores", "tiny", ".lock")
    shutil.copytree(world.root, folder / "results", ignore=left_out)
    (folder / "local.yaml").write_text(yaml.safe_dump(raw))
    plan = Plan(config.resolve(raw))
    command = [sys.executable, "-m", "haste.cli", "train", str(plan.state(run, step)), "-c", str(folder / "local.yaml")]
    with open(folder / "local.log", "w") as out:
        local = subprocess.Popen(command, stdout=out, stderr=out, env=world.environment, start_new_session=True)
    world.slurm.users.append(local)
    return local, Path(plan.path(plan.state(run, step)))
