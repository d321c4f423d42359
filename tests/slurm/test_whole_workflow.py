"""The whole workflow on a real SLURM: the tables of a local run, resources by stage, and only what is new."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from pandas import read_csv
from slurm_world import TINY, World, equal

from haste import config
from haste.cli import main as cli
from haste.cluster import job as jobs
from haste.plan.plan import Plan

pytestmark = pytest.mark.timeout(3000)

FIELDS = ("JobID", "JobName%200", "State", "AllocTRES%200", "NNodes", "ElapsedRaw", "AllocCPUS")
RUN = {"alignment": "HASTE", "stop": 8, "milestones": [16]}
MORE = {**TINY["sampling"], "more": {"sampler": "euler", "steps": 3, "count": 20}}
# What each training process had loaded and opened when it ended.
WITNESS = """
if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
    import atexit, json
    opened = set()
    def seen(event, arguments):
        if event == "open":
            opened.add(str(arguments[0]))
    def tell():
        name = os.environ["SLURM_JOB_ID"] + "-" + os.environ["SLURM_PROCID"] + ".json"
        with open(os.path.join(os.environ["HASTE_WITNESS"], name), "w") as file:
            json.dump({"modules": sorted(sys.modules), "opened": sorted(opened)}, file)
    sys.addaudithook(seen)
    atexit.register(tell)
"""


class Watched(World):
    """A world whose training processes leave word of what they loaded and opened."""

    def __init__(self, *given, **settings):
        super().__init__(*given, **settings)
        self.witness = self.folder / "witness"
        self.witness.mkdir()
        with open(self.folder / "brakes" / "sitecustomize.py", "a") as file:
            file.write(WITNESS)

    @property
    def environment(self):
        return {**super().environment, "HASTE_WITNESS": str(self.witness)}

    def run(self):
        """Run the workflow to its end; its jobs as {(rule, what, shard)}, and what accounting has of them.

        `what` is the trajectory and step of training, and the samples' name for the rest.
        """
        before = {job["JobID"] for job in self.slurm.accounted("JobID")}
        self.finish(self.start())
        pattern = r"^(?:local)?rule (\w+):(.*?)(?=^\[|\Z)"
        ran = set()
        for rule, body in re.findall(pattern, self.log.read_text(), re.MULTILINE | re.DOTALL):
            match = re.search(r"wildcards: (.*)", body)
            values = dict(part.split("=") for part in match[1].split(", ")) if match else {}
            what = f"{values['trajectory']}/{values['step']}" if "trajectory" in values else values.get("draw", "")
            ran.add((rule, what, values.get("shard", "")))
        found = []

        def accounted():
            every = self.slurm.accounted(*FIELDS)
            found[:] = [job for job in every if job["JobID"] not in before]
            return not any(job["State"] in ("PENDING", "RUNNING", "COMPLETING") for job in found)

        self.until("all is accounted", accounted)
        return ran, found

    def witnesses(self, job):
        """By process, what a training job loaded and opened."""
        return [json.loads(path.read_text()) for path in sorted(self.witness.glob(f"{job}-*.json"))]


def trained(world, found, step):
    """What accounting has of the job that made a state."""
    name = jobs.name(world.plan, world.plan.state("HASTE-8", step))
    (job,) = [job for job in found if job["JobName%200"] == name]
    assert job["State"] == "COMPLETED"
    return job


def evaluated(*draws):
    """The jobs that make lines of the table of some samples, each in two shards."""
    shards = {("sample", draw, shard) for draw in draws for shard in ("00000", "00001")}
    return (
        shards
        | {(rule, draw, "") for rule in ("score", "grid") for draw in draws}
        | {
            ("report", "", ""),
            ("all", "", ""),
        }
    )


def arrays(found):
    """Sizes of the arrays among some jobs, by number; every member has a GPU."""
    members = [job for job in found if "_" in job["JobID"]]
    assert all("gres/gpu=1" in job["AllocTRES%200"] for job in members)
    numbers = [job["JobID"].split("_")[0] for job in members]
    return {number: numbers.count(number) for number in numbers}


def table(plan):
    return (Path(plan.report).parent / "results.csv").read_text()


def on_this_machine(world, data, folder):
    """The plan of the same configuration, finished by the package's own commands without a cluster."""
    raw = yaml.safe_load(world.file.read_text()) | {"results": str(folder / "local")}
    raw["runtime"]["processes"] = 2
    shutil.copytree(data, folder / "local")
    file, plan = folder / "local.yaml", Plan(config.resolve(raw))
    file.write_text(yaml.safe_dump(raw))
    steps = [*(["train", str(plan.state("HASTE-8", step))] for step in (8, 16)), ["floor"], ["reconstruct"]]
    for name, evaluation in plan.evaluations.items():
        steps += [["sample", name, "--shard", str(shard)] for shard in range(evaluation.shards)]
        steps += [["evaluate", name], ["grid", name]]
    for step in [*steps, ["report"]]:
        assert cli.main([*step, "-c", str(file)]) == 0, step
    return plan


def test_the_whole_workflow_ends_in_the_tables_of_a_local_run_and_does_only_what_is_new(slurm, data, tmp_path):
    scratch = tmp_path / "scratch"  # a node's own disk
    scratch.mkdir()
    one_node = {"tasks_per_node": 2, "gpus_per_node": 2, "mem_mb": 2000, "stage_in": str(scratch)}
    two_nodes = {"nodes": 2, "tasks_per_node": 1, "mem_mb": 1200}
    world = Watched(tmp_path / "w", None, slurm, {"HASTE-8": RUN}, train=one_node, plain=two_nodes)
    ran, found = world.run()
    assert {rule for rule, _, _ in ran} >= {
        "images",
        "images_join",
        "autoencoder",
        "teacher",
        "latents",
        "latents_join",
    }
    assert all(job["State"] == "COMPLETED" for job in found)

    # before the stop GPUs and the teacher, after it less of everything: no teacher, no images
    aligned, plain = (trained(world, found, step) for step in (8, 16))
    assert (aligned["NNodes"], plain["NNodes"]) == ("1", "2")
    assert "gres/gpu=2" in aligned["AllocTRES%200"] and "mem=2000M" in aligned["AllocTRES%200"]
    assert "gres/gpu" not in plain["AllocTRES%200"] and "mem=2400M" in plain["AllocTRES%200"]
    for job, teaches in ((aligned, True), (plain, False)):
        processes = world.witnesses(job["JobID"])
        assert len(processes) == 2
        for process in processes:
            stores = f"{scratch}/haste-{os.getuid()}" if teaches else f"{world.root}/stores"
            assert any(path.startswith(f"{stores}/latents-") for path in process["opened"])
            assert any(path.startswith(f"{stores}/images-") for path in process["opened"]) == teaches
            assert any("/parts/teacher-" in path for path in process["opened"]) == teaches
            assert ("haste.teachers.encoder" in process["modules"]) == teaches
    log = "".join(path.read_text() for path in world.path("HASTE-8", 16).parent.glob("jobs/*attempt*.log"))
    assert "steps 8 to 16, aligning nothing" in log
    assert not list(scratch.glob("*/latents-*")) and not list(scratch.glob("*/images-*")), "copies stay behind"

    # what each stage took, by the cluster's own accounting
    account = read_csv(Path(world.plan.report).parent / "time.csv").set_index("stage")
    of_training = [job for job in found if job["JobID"] in (aligned["JobID"], plain["JobID"])]
    hours = sum(int(job["ElapsedRaw"]) * int(job["AllocCPUS"]) for job in of_training) / 3600
    assert account.loc["train", "attempts"] == 2 and account.loc["train", "CPU-hours"] == pytest.approx(hours)
    assert account.loc["train", "GPU-hours"] == pytest.approx(2 * int(aligned["ElapsedRaw"]) / 3600)

    # the bits and the table of a local run
    plan = on_this_machine(world, data, tmp_path)
    for step in (8, 16):
        equal(world.path("HASTE-8", step), plan.path(plan.state("HASTE-8", step)))
    assert table(world.plan) == table(plan)

    # another way to draw samples: all its shards in one array, scores, pictures, the report, and nothing else
    old = set(world.plan.evaluations)
    world.configure(runs={"HASTE-8": {**RUN, "sampling": ["quick", "more"]}}, sampling=MORE)
    ran, found = world.run()
    new = set(world.plan.evaluations) - old
    assert len(new) == 1 and ran == evaluated(*new)
    assert list(arrays(found).values()) == [2]

    # checkpoints that are new: a milestone in a finished stretch trains up to it, and one from elsewhere trains nothing
    state = world.path("HASTE-8", 8)
    assert cli.main(["export", str(state), str(tmp_path / "theirs.pt"), "--format", "repa"]) == 0
    theirs = {"checkpoint": str(tmp_path / "theirs.pt"), "model": "dot", "step": 8, "sampling": ["quick"]}
    world.configure(runs={"HASTE-8": {**RUN, "milestones": [12, 16]}}, evaluate={"theirs": theirs})
    finished = world.path("HASTE-8", 16).read_bytes()
    ran, found = world.run()
    new = set(world.plan.evaluations) - old
    milestone = world.plan.state("HASTE-8", 12)
    training = ("train_plain", f"{milestone.trajectory}/{milestone.step:08d}", "")
    assert len(new) == 2 and ran == evaluated(*new) | {training}
    assert trained(world, found, 12)["NNodes"] == "2"
    assert list(arrays(found).values()) == [2, 2]
    assert world.path("HASTE-8", 16).read_bytes() == finished
    assert "theirs" in table(world.plan)
