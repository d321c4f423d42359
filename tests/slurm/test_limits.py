"""A site that lets a user have few jobs in the queue, and a Snakemake that dies there: the same command ends green."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from slurm_world import World

pytestmark = pytest.mark.timeout(3000)

# The job that trains the autoencoder waits for as long as a file is there.
HELD = """
if "autoencoder" in sys.argv[1:2]:
    while os.path.exists(os.environ["HASTE_BRAKE"]):
        time.sleep(0.1)
"""


@pytest.fixture
def limited(slurm):
    """The cluster, where a user may have three jobs."""
    for limit in ("3", "-1"):
        slurm.ask("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={limit}")
        if limit == "3":
            yield slurm


def stages(slurm):
    """The jobs of the stages so far: their rule and wildcards -> how they stand."""
    text = slurm.ask("squeue", "--states=all", "--array", "--noheader", "--format=%T|%j|%k", patience=120)
    jobs = [line.split("|") for line in text.splitlines()]
    return [(comment, state) for state, name, comment in jobs if name.startswith("haste-tiny-")]


def test_the_whole_workflow_ends_where_three_jobs_are_allowed_and_each_job_runs_once(limited, data, tmp_path):
    runs = {"vanilla": {"milestones": [4, 8]}}
    world = World(tmp_path / "w", data, limited, runs, {"sample_shards": 4})
    for made in (*world.root.glob("parts/autoencoder-*"), *world.root.glob("stores/latents-*")):
        shutil.rmtree(made)
    with open(world.folder / "brakes" / "sitecustomize.py", "a") as file:
        file.write(HELD)
    world.brake(pace=0, ceiling=99)
    other = limited.ask("sbatch", "--parsable", "--hold", "--wrap=true", "--output=/dev/null")

    # Snakemake dies alone, its job goes on: the next one attaches to it
    snakemake = world.start()
    world.until("the autoencoder is trained", lambda: ("rule_autoencoder", "RUNNING") in stages(limited))
    snakemake.kill()
    snakemake.wait()
    snakemake = world.start()
    world.until("it attached", lambda: "Attached to SLURM job" in world.log.read_text())
    world.release()

    # samples of the first state and training of the second want the two places that are left
    world.finish(snakemake)
    said = world.log.read_text()
    assert "SLURM will not take all jobs at once (AssocMaxSubmitJobLimit)" in said
    assert "SLURM takes no more jobs now (AssocMaxSubmitJobLimit)" in said
    assert "Error" not in said
    found = stages(limited)
    assert {state for _, state in found} == {"COMPLETED"}
    assert set(Counter(comment for comment, _ in found).values()) == {1}, "a job ran twice"
    assert sum("rule_sample_" in comment for comment, _ in found) == 8
    assert limited.ask("squeue", "--noheader", "--format=%A").split() == other.split(), "others' jobs are left alone"
    assert Path(world.plan.report).exists()
