"""The whole workflow on a real SLURM: the tables of a local run, each stage with its own resources."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_world import ROOT, TINY, World, equal

from haste import config
from haste.cluster import job as jobs
from haste.plan import Plan

pytestmark = pytest.mark.timeout(3000)


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
