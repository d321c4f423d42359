"""What the plan says is left is what Snakemake would do: the same jobs, whatever is there, is lost, or is wanted."""

import os
import re
from pathlib import Path

import pytest
from chance import Chance

from haste.ops import cost

ROOT = Path(__file__).parents[2]
SEEDS = [*range(20), 139]


def dry_run(warm, folder, file):
    """What Snakemake lists: (rule, files that the job makes); its count of jobs by rule; and which files the commands
    make of mirrored images."""
    done = warm.snakemake(
        *("-n", "--cores", 2, "--snakefile", ROOT / "workflow" / "Snakefile", "--directory", folder),
        *("--workflow-profile", ROOT / "profiles" / "default", "--configfile", file),
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    blocks = re.findall(r"^(?:local)?rule (\w+):(.*?)(?=^\[|^(?:local)?rule |\Z)", text, re.MULTILINE | re.DOTALL)
    made = [(rule, re.search(r"^    output: (.*)", body, re.MULTILINE)) for rule, body in blocks]
    counted = dict(re.findall(r"^(\w+) +(\d+)$", text.partition("Job stats:")[2], re.MULTILINE))
    jobs = {(rule, tuple(match[1].replace(" (update)", "").split(", "))) for rule, match in made if match}
    mirrored = {match[1].replace(" (update)", "") for (_, body), (_, match) in zip(blocks, made, strict=True)
                if match and re.search(r"haste latents +--flipped ", body)}  # fmt: skip
    return jobs, {rule: int(count) for rule, count in counted.items() if rule not in ("all", "total")}, mirrored


@pytest.mark.parametrize("seed", SEEDS)
def test_the_plan_lists_the_jobs_of_snakemakes_dry_run_and_none_whose_files_are_there(warm, tmp_path, seed):
    """Runs added, milestones put in, files and rooms lost: no training is needed for that."""
    world = Chance(seed, tmp_path)
    plan = world.plan()
    left = plan.jobs.left
    jobs, counted, mirrored = dry_run(warm, tmp_path, world.file)
    assert {(rule, job.makes) for rule, its in left.items() for job in its} == jobs
    assert {rule: len(its) for rule, its in left.items()} == counted
    flipped = [job for rule in ("latents", "latents_join") for job in left.get(rule, []) if job.about is not plan]
    assert {path for job in flipped for path in job.makes} == mirrored
    there = [
        job for rule, its in left.items() if rule != "report" for job in its if all(map(os.path.exists, job.makes))
    ]
    assert not there


def test_the_plan_that_is_printed_has_a_line_a_rule_with_the_counts_of_a_dry_run(tmp_path):
    plan = Chance(5, tmp_path).plan()
    left = {rule: len(its) for rule, its in plan.jobs.left.items()}
    assert {stage.name: stage.left for stage in cost.stages(plan)[0] if stage.left} == left != {}
