"""A site that lets a user have few jobs in the queue, and a Snakemake that dies there: the same command ends green."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from slurm_world import World

from haste.cluster import job as jobs

pytestmark = pytest.mark.timeout(3000)

# The job that trains the detector waits for as long as a file is there.
HELD = """
if "detector" in sys.argv[1:2]:
    while os.path.exists(os.environ["HASTE_BRAKE"]):
        time.sleep(0.1)
"""


@pytest.fixture
def limited(slurm):
    """The cluster, where a user may have three jobs."""
    change = ("sacctmgr", "-i", "modify", "user", "root", "set")
    slurm.ask(*change, "MaxSubmitJobs=3")
    yield slurm
    slurm.ask(*change, "MaxSubmitJobs=-1")


def stages(world):
    """The jobs of the stages so far: their rule and wildcards, and how they stand."""
    name = ("--name", jobs.name_of_stages(world.plan))
    text = world.slurm.ask("squeue", *name, "--states=all", "--array", "--noheader", "--format=%k|%T", patience=120)
    return [tuple(line.split("|")) for line in text.splitlines()]


def test_the_workflow_ends_where_three_jobs_are_allowed_and_each_job_runs_once(limited, data, tmp_path):
    world = World(tmp_path / "w", data, limited, {"vanilla": {"milestones": [8]}}, {"sample_shards": 3})
    (detector,) = world.root.glob("parts/detector-*")
    shutil.rmtree(detector)
    with open(world.folder / "brakes" / "sitecustomize.py", "a") as file:
        file.write(HELD)
    world.brake(pace=0, ceiling=99)
    held = ("--hold", "--account=haste", "--wrap=true", "--output=/dev/null")
    others = [limited.ask("sbatch", "--parsable", *held).strip() for _ in range(3)]

    # the queue is full of other jobs: everything waits, and goes on when two of them are gone
    full, snakemake = "SLURM takes no more jobs now (AssocMaxSubmitJobLimit)", world.start()
    world.until("training and a stage wait", lambda: world.log.read_text().count(full) == 2, 90)
    assert full in world.told("vanilla", 8)
    assert full in world.haste("status", "-c", world.file).stdout
    limited.ask("scancel", *others[1:])

    # Snakemake dies alone, its job goes on: the next one attaches to it
    detector = f"rule_detector_wildcards_{detector.name.removeprefix('detector-')}"
    world.until("the detector is trained", lambda: (detector, "RUNNING") in stages(world), 90)
    snakemake.kill()
    snakemake.wait()
    snakemake = world.start()
    world.until("it attached", lambda: "Attached to SLURM job" in world.log.read_text())
    world.release()

    # three shards of samples are no array: it would never fit beside the other job
    world.finish(snakemake)
    said = world.log.read_text()
    assert "SLURM will not take all jobs at once (AssocMaxSubmitJobLimit)" in said
    assert full in said
    assert "Error" not in said, said
    found = stages(world)
    assert {state for _, state in found} == {"COMPLETED"}
    assert set(Counter(comment for comment, _ in found).values()) == {1}, "a job ran twice"
    assert sum("rule_sample_" in comment for comment, _ in found) == 3
    assert limited.ask("squeue", "--noheader", "--format=%A").split() == others[:1], "others' jobs are left alone"
    assert Path(world.plan.report).exists()
