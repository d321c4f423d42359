"""What the plan says is left is what Snakemake would do: the same jobs, whatever is there, is lost, or is wanted."""

import os
import re
from pathlib import Path

import pytest
from chance import FAMILY, Chance

from haste.ops import cost
from haste.plan.jobs import Jobs

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
    check(warm, Chance(seed, tmp_path))


@pytest.mark.parametrize("seed", [7, 11, 34])
def test_so_it_does_where_some_sets_of_samples_are_drawn_beside_others(warm, tmp_path, seed):
    """Ways added, and samples, features, scores lost: of one set, of some, of all."""
    world = Chance(seed, tmp_path, ways=FAMILY)
    world.lose_drawn()
    check(warm, world)


@pytest.mark.parametrize("seed", [2, 7, 9, 11, 26, 34])
def test_all_that_scores_and_grids_read_is_made_though_each_job_on_samples_is_cut_short_and_run_again(tmp_path, seed):
    """Each looks at the disk by itself when it begins, as on a node."""
    world = Chance(seed, tmp_path, ways=FAMILY)
    world.lose_drawn()
    plan = world.plan()
    for job in plan.jobs.left.get("sample", []):
        shard = int(Path(job.makes[0]).name[6:11])
        for share in (0.5, 1.0):
            for one in (job.about, *Jobs(plan).beside(job.about, shard)):
                looked = [judged.features.shard_files[shard] for judged in one.judgements]
                for path in (one.sample_file(shard), *looked):
                    if not os.path.exists(path) and world.random.random() < share:
                        world.make(plan, path)
    for job in plan.jobs.left.get("features", []):
        world.make(plan, job.makes[0])
    for job in plan.jobs.left.get("score", []):
        assert all(map(os.path.exists, job.about[1].features.shard_files)), job.makes
    for job in plan.jobs.left.get("grid", []):
        assert all(map(os.path.exists, job.about.sample_files)), job.makes


def check_beside(jobs):
    """Each job on samples does what the plan says, and features of which no other job makes."""
    alone = {path for job in jobs.left.get("features", []) for path in job.makes}
    for job in jobs.left.get("sample", []):
        found = jobs.beside(job.about, int(Path(job.makes[0]).name[6:11]))
        assert found == [one.about for one in job.beside]
        assert not alone & {path for one in (job, *job.beside) for path in one.makes}
        assert job.about.name not in jobs.drawn


@pytest.mark.parametrize("seed", [10, 13, 14, 18, 29, 32])
def test_a_job_on_samples_does_the_sets_that_the_plan_says_whichever_of_them_are_drawn(tmp_path, seed):
    world = Chance(seed, tmp_path, ways=FAMILY)
    world.lose_drawn()
    jobs = world.plan().jobs
    assert {one.name for job in jobs.left["sample"] for one in map(lambda job: job.about, job.beside)} & jobs.drawn
    check_beside(jobs)


def check(warm, world):
    plan = world.plan()
    left = plan.jobs.left
    jobs, counted, mirrored = dry_run(warm, world.folder, world.file)
    assert {(rule, job.makes) for rule, its in left.items() for job in its} == jobs
    assert {rule: len(its) for rule, its in left.items()} == counted
    flipped = [job for rule in ("latents", "latents_join") for job in left.get(rule, []) if job.about is not plan]
    assert {path for job in flipped for path in job.makes} == mirrored
    check_beside(plan.jobs)
    there = [
        job for rule, its in left.items() if rule != "report" for job in its if all(map(os.path.exists, job.makes))
    ]
    assert not there


def test_the_plan_that_is_printed_has_a_line_a_rule_with_the_counts_of_a_dry_run(tmp_path):
    plan = Chance(5, tmp_path).plan()
    left = {rule: len(its) for rule, its in plan.jobs.left.items()}
    assert {stage.name: stage.left for stage in cost.stages(plan)[0] if stage.left} == left != {}
