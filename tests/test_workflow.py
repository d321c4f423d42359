"""The workflow as people run it: the whole DAG once, and then what a dry run says to every change of mind."""

import copy
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from haste import config
from haste.cli import main as cli
from haste.files import artefact, locks
from haste.ops import status
from haste.plan.names import State
from haste.plan.plan import Plan
from haste.train import loop, stops
from haste.train.state import new_learner

ROOT = Path(__file__).parent.parent
TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())
COSINE = {"measure": "gradient-cosine", "images": 6, "shards": 2, "t": [0.2, 0.8], "alignment": "HASTE"}
RUNS = {
    "vanilla": {"milestones": [8], "measures": ["cosine"]},
    "HASTE": {"alignment": "HASTE"},
    "HASTE-12": {"alignment": "HASTE", "stop": 12},
}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


class Workshop:
    """A results folder with its configuration, and Snakemake on it as a user starts it.

    With `warm`, it and its jobs are children of a process that has imported everything; without, they start as a user's
    do: where it matters which process holds what and which is killed. When the whole path is made, it and the first job
    of each command start as a user's.
    """

    def __init__(self, folder: Path, name: str = "tiny", warm=None, **changes):
        self.folder, self.root, self.name = folder, folder / "results", name
        self.program = [*warm.client, "snakemake"] if warm else [sys.executable, "-m", "snakemake"]
        self.environment = {**ENVIRONMENT, **(warm.environment if warm else {})}
        self.configure(**changes)

    def configure(self, **changes):
        """Write the configuration with some top keys replaced; returns its plan."""
        raw = {
            **copy.deepcopy(TINY),
            "name": self.name,
            "results": str(self.root),
            "measures": {"cosine": COSINE},
            "runs": RUNS,
            **changes,
        }
        # JSON is YAML; whole at once, since others may be reading it
        artefact.write_json(self.folder / f"{self.name}.yaml", raw)
        self.plan = Plan(config.resolve(raw))
        return self.plan

    def command(self, *arguments):
        return [
            *(*self.program, "--snakefile", str(ROOT / "workflow" / "Snakefile")),
            *("--workflow-profile", str(ROOT / "profiles" / "default"), "--directory", str(self.folder)),
            *("--configfile", str(self.folder / f"{self.name}.yaml"), "--cores", "2", *arguments),
        ]

    def started(self, *arguments):
        """Snakemake at work, in a process group of its own."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(self.command(*arguments), env=self.environment, **options)

    def snakemake(self, *arguments):
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, env=self.environment, timeout=800
        )

    def on_a_node(self, rule, **wildcards):
        """Run a job as the executor does on the node that it was submitted to."""
        artefact.write_json(self.plan.config_file, self.plan.config.model_dump(mode="json"))  # whoever submitted it did
        values = ",".join(f"{name}={value}" for name, value in wildcards.items())
        job = ["--target-jobs", f"{rule}:{values}", "--allowed-rules", rule, "--mode", "remote", "--force"]
        job += ["--force-use-threads", "--no-hooks", "--retries", "0", "--latency-wait", "5"]
        done = self.snakemake(*job)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    def jobs(self):
        """What a dry run lists: {(rule, what)}, `what` being step for training and the run's state for the rest."""
        done = self.snakemake("-n", "--rerun-triggers", "mtime")
        assert done.returncode == 0, done.stdout + done.stderr
        text = done.stdout + done.stderr
        blocks = re.findall(r"^(?:local)?rule (\w+):(.*?)(?=^\[|^(?:local)?rule |\Z)", text, re.MULTILINE | re.DOTALL)
        found = set()
        for rule, body in blocks:
            match = re.search(r"wildcards: (.*)", body)
            values = dict(part.split("=") for part in match[1].split(", ")) if match else {}
            found.add((rule.removesuffix("_plain"), self._name(values)))  # which resources it asks for is no matter
        return found - {("all", "")}

    def _name(self, values):
        if "trajectory" in values:
            return f"{values['trajectory']}/{values['step']}"
        return values.get("draw", "")

    def state(self, run, step):
        return str(self.plan.state(run, step))

    def evaluation(self, run, step):
        return next(row.evaluation for row in self.plan.rows if (row.run, row.step) == (run, step))

    def evaluated(self, run, step):
        """The jobs that turn a state into a line of the table."""
        name = self.evaluation(run, step).name
        return {("sample", name), ("score", name), ("grid", name), ("report", "")}


@pytest.fixture(scope="module")
def finished(_finished_data, once, warm):
    def fill(folder):
        shutil.copytree(_finished_data, folder / "results")
        shop = Workshop(folder)
        shop.environment |= warm.spared
        done = shop.snakemake()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    return Workshop(once("workflow", fill))


@pytest.fixture
def shop(finished, warm, tmp_path):
    """A copy of the finished results, times kept, free to be broken."""
    shutil.copytree(finished.root, tmp_path / "results")  # with its times
    return Workshop(tmp_path, warm=warm)


def test_the_whole_path_ends_in_a_report_with_every_row(finished):
    page = Path(finished.plan.report)
    assert page.exists()
    table = (page.parent / "results.csv").read_text()
    assert len(table.splitlines()) >= 1 + 5
    for run in RUNS:
        assert run in table
    assert cli.main(["table", "-c", finished.plan.config_file]) == 0
    (measured,) = finished.plan.measure_files
    assert len(artefact.read_json(measured, "measure")["rows"]) == 2
    assert (page.parent / "measure-cosine.csv").read_text().startswith("run,term,t 0.2,t 0.2 ±,t 0.8,t 0.8 ±\nvanilla,")
    logs = {log.stem for log in Path(finished.plan.folder, "logs").glob("*.log")}
    assert logs and logs <= {job.log for jobs in finished.plan.jobs.every.values() for job in jobs}
    view = status.snapshot(finished.plan)
    assert (view.workflow, view.jobs) == ("finished", []) and {line.doing for line in view.lines} == {"finished"}


def test_what_is_there_is_not_made_again_because_inputs_that_only_others_need_are(shop):
    for kind in ("stores", "parts", "features"):
        shutil.rmtree(shop.root / kind)
    assert shop.jobs() == set()
    evaluation = shop.evaluation("vanilla", 8)
    shutil.rmtree(evaluation.folder)
    Path(evaluation.score).unlink()
    needed = {"images", "images_join", "autoencoder", "detector", "reference", "latents", "latents_join"}
    assert shop.jobs() == {(rule, "") for rule in needed} | shop.evaluated("vanilla", 8)


def test_a_shard_that_is_lost_is_made_again_for_what_reads_it_with_the_same_content(shop):
    for store in (shop.plan.images, shop.plan.latents):
        Path(store.shard_files[1]).unlink()
    assert shop.jobs() == set(), "nothing reads them"
    milestones = [8, 16, 24]
    shop.configure(runs={**RUNS, "HASTE": {"alignment": "HASTE", "milestones": milestones}})
    made = {("images", ""), ("latents", "")}
    assert shop.jobs() == made | {("train", shop.state("HASTE", 24))} | shop.evaluated("HASTE", 24)
    done = shop.snakemake(shop.plan.path(shop.plan.state("HASTE", 24)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_features_of_the_reference_that_are_lost_are_named_before_a_score_needs_them(shop):
    (detector,) = shop.plan.detectors.values()
    reference = detector.reference
    Path(reference.shard_files[0]).unlink()
    shop.plan.check()
    Path(shop.evaluation("vanilla", 8).score).unlink()
    with pytest.raises(ValueError, match=r"is gone, but .*manifest\.json says that it is there"):
        shop.configure().check()


def test_a_dit_is_trained_sampled_scored_and_reported_by_the_same_rules(shop):
    ancestral = {"sampler": "ddpm", "steps": 3, "count": 20, "labels": "balanced", "guidance": 1.5}
    plan = shop.configure(
        models={"dot": {**TINY["models"]["dot"], "architecture": "dit"}},
        sampling={"quick": ancestral},
        runs={"DiT": {"alignment": "HASTE", "stop": 4, "milestones": [4, 8]}},
    )
    done = shop.snakemake()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    table = Path(plan.report).with_name("results.csv").read_text()
    assert table.count("DiT") >= 2 and "ddpm" in table
    assert Path(plan.path(plan.state("DiT", 8))).parent.name.startswith("DiT-d2w16p2-")


def test_digits_are_told_captions_from_images_to_a_report_that_shows_prompts_and_says_how_many_were_obeyed(
    warm, tmp_path
):
    shipped = config.read(ROOT / "config" / "digits-captions.yaml")
    few = {"steps": 2, "batch": 8}
    trained = {
        name: {**shipped[kind][name]["trained"], **few} for kind in ("teachers", "detector") for name in shipped[kind]
    }
    told = {**shipped["condition"], "encoder": {"trained": {**shipped["condition"]["encoder"]["trained"], **few}}}
    way = {**shipped["sampling"], "euler-25": {"sampler": "euler", "steps": 2, "count": 20, "guidance": 2.0}}
    shop = Workshop(tmp_path, shipped["name"], warm)
    plan = shop.configure(
        **{name: shipped[name] for name in ("title", "models", "alignments")},
        images={**shipped["images"], "subset": 60},
        condition=told,
        cache={"shards": 2},
        autoencoder={"trained": {**shipped["autoencoder"]["trained"], **few}},
        teachers={"digits-vit": {"trained": trained["digits-vit"]}},
        detector={"digits-cnn": {"trained": trained["digits-cnn"]}},
        training={**shipped["training"], "batch": 8},
        sampling={**way, "prompts": {**way["prompts"], "steps": 2}},
        measures={},
        defaults={**shipped["defaults"], "milestones": [4]},
        runs={"vanilla": {}, "HASTE": {"alignment": "HASTE", "stop": 2}},
    )
    done = shop.snakemake()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert artefact.read_json(plan.text.manifest, "store")["count"] == 2 * (60 + 297) + 1
    page, table = Path(plan.report), pd.read_csv(Path(plan.report).with_name("results.csv"))
    accuracy = table.set_index("run")[next(name for name in table if name.startswith("caption accuracy"))].dropna()
    assert {*accuracy.index} == {"vanilla", "HASTE", "real against real"} and accuracy.between(0, 1).all()
    assert "retrieval by chance" in page.read_text()  # the text encoder that was trained on the way
    assert all(prompt in page.read_text() for prompt in shipped["sampling"]["prompts"]["prompts"])
    assert shop.jobs() == set()
    # a shard of images that is lost is made again for who asks which class a caption means, and nothing is drawn again
    Path(plan.images.shard_files[0]).unlink()
    evaluation = shop.evaluation("vanilla", 4)
    shutil.rmtree(evaluation.features.folder)
    Path(evaluation.score).unlink()
    assert shop.jobs() == {("images", ""), ("features", evaluation.name), ("score", evaluation.name), ("report", "")}


def test_training_on_cached_targets_that_the_workflow_made_is_online_training_to_half_precision(
    make_plan, warm, tmp_path
):
    runs, (vit,) = {"HASTE": {"alignment": "HASTE", "milestones": [8]}}, TINY["teachers"].values()
    plan = make_plan(runs=runs)
    path = loop.train(plan, plan.state("HASTE", 8))
    online = load_file(path)
    shutil.rmtree(path.parent)
    shop = Workshop(tmp_path, warm=warm)
    shop.configure(teachers={"vit": {**vit, "cache": "features+attention"}}, runs=runs)
    done = shop.snakemake(str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "rule targets_join" in done.stdout + done.stderr
    cached = load_file(path)
    assert cached.keys() == online.keys()
    recipe = plan.trajectories[path.parent.name].recipe
    first = {f"model/{name}": value for name, value in new_learner(recipe, {}, {}).model.state_dict().items()}
    moved, apart = (
        torch.cat([(online[name] - other[name]).flatten() for name in first]).norm() for other in (first, cached)
    )
    assert 0 < apart < 0.03 * moved  # not zero: targets on disk are rounded to float16


def test_snakemakes_own_report_has_the_page_and_the_pictures(shop, tmp_path):
    file = tmp_path / "snakemake.html"
    done = shop.snakemake("--report", str(file))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    text = file.read_text()
    assert "Samples" in text and "index.html" in text
    grids = [path for path in shop.plan.shown if path.endswith("grid.png")]
    assert all(Path(path).parent.name in text for path in grids)


def test_a_second_run_finds_nothing_to_do(shop):
    assert shop.jobs() == set()


def test_a_branch_at_another_stop_trains_its_own_part_and_the_shared_trunk_once(shop):
    shop.configure(runs={**RUNS, "HASTE-10": {"alignment": "HASTE", "stop": 10}})
    trunk, branch = shop.state("HASTE-10", 10), shop.state("HASTE-10", 16)
    # step 8 is shared and scored already; step 10 of the trunk is made from it, and the branch from that
    assert shop.jobs() == {("train", trunk), ("train", branch)} | shop.evaluated("HASTE-10", 16)


def test_a_fork_trains_only_what_no_run_has_and_shows_stopped_minus_aligned_in_the_report(shop):
    fork = {"run": "HASTE", "at": [12], "for": 4}  # HASTE goes on, HASTE-12 stops there
    shop.configure(forks={"F": {**fork, "at": [12, 14]}})
    trunk, branch = shop.state("F@14-aligned", 14), shop.state("F@14-stopped", 18)
    both = {("train", state) for state in (trunk, branch, shop.state("F@14-aligned", 18))}
    drawn = {
        (rule, shop.evaluation(f"F@14-{side}", 18).name)
        for side in ("aligned", "stopped")
        for rule in ("sample", "score")
    }
    assert shop.jobs() == both | drawn | {("measure", ""), ("report", "")}
    shop.configure(forks={"F": fork})
    assert shop.jobs() == {("measure", ""), ("report", "")}
    done = shop.snakemake()
    assert done.returncode == 0, done.stderr
    lines = (Path(shop.plan.report).parent / "fork-F.csv").read_text().splitlines()
    assert lines[0].startswith("step,held-out loss,held-out loss ±,") and lines[1].startswith("12,") and len(lines) == 2
    assert shop.jobs() == set()


def test_a_run_that_a_trigger_stops_begins_on_the_finished_trunk_and_its_stop_changes_no_plan(shop):
    stop = {"trigger": "plateau", "after": 8, "every": 4, "fast": 0.5, "slow": 0.75, "margin": 1}
    shop.configure(runs={**RUNS, "seen": {"alignment": "HASTE", "stop": stop}})
    state = shop.plan.state("seen", 16)
    assert shop.jobs() == {("train", str(state))} | shop.evaluated("seen", 16)
    done = shop.snakemake(shop.plan.path(state))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^(local)?rule train:", done.stdout + done.stderr, re.MULTILINE)  # the one of aligned jobs
    assert {one.step for one in stops.along(shop.plan, "seen", 0).values()} == {12}
    assert shop.jobs() == shop.evaluated("seen", 16)
    shop.configure(runs={**RUNS, "seen": {"alignment": "HASTE", "stop": stop, "milestones": [16, 24]}})
    assert shop.jobs() == {("train", shop.state("seen", 24))} | shop.evaluated("seen", 16) | shop.evaluated("seen", 24)


def test_an_extension_trains_the_new_part_only(shop):
    shop.configure(runs={**RUNS, "HASTE": {"alignment": "HASTE", "milestones": [8, 16, 24]}})
    assert shop.jobs() == {("train", shop.state("HASTE", 24))} | shop.evaluated("HASTE", 24)


def test_an_inserted_milestone_trains_only_up_to_it_and_finished_states_stay(shop):
    shop.configure(runs={**RUNS, "HASTE": {"alignment": "HASTE", "milestones": [8, 14, 16]}})
    assert shop.jobs() == {("train", shop.state("HASTE", 14))} | shop.evaluated("HASTE", 14)
    path = Path(shop.plan.path(shop.plan.state("HASTE", 16)))
    before = path.read_bytes()
    done = shop.snakemake(shop.plan.path(shop.plan.state("HASTE", 14)))
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    assert not {job for job in shop.jobs() if job[0] == "train"}


def test_touched_files_train_nothing(shop):
    later = time.time() + 100
    for path in shop.root.rglob("*"):
        if path.is_file() and ("stores" in path.parts or "parts" in path.parts):
            os.utime(path, (later, later))
    for path in shop.root.rglob("step-*.safetensors"):
        os.utime(path, (later, later))
    assert not {rule for rule, _ in shop.jobs()} & {"train", "sample", "latents", "teacher", "autoencoder", "detector"}


def test_a_fresh_clone_over_existing_results_trains_nothing(shop, tmp_path):
    clone = tmp_path / "clone"
    for part in ("workflow", "profiles"):
        shutil.copytree(ROOT / part, clone / part)
    command = [
        part.replace(str(ROOT), str(clone)) if part.startswith(str(ROOT / "workflow")) else part
        for part in shop.command("-n")
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=shop.environment)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" in done.stdout + done.stderr


def test_a_deleted_score_remakes_that_score_and_the_tables(shop):
    evaluation = shop.evaluation("HASTE", 16)
    Path(evaluation.score).unlink()
    assert shop.jobs() == {("score", evaluation.name), ("report", "")}


def test_a_score_that_is_newer_than_the_report_remakes_the_report_as_the_plan_says(shop):
    os.utime(shop.evaluation("HASTE", 16).score)
    assert shop.jobs() == {("report", "")} and list(shop.configure().jobs.left) == ["report"]


def test_a_deleted_trunk_whose_branches_are_finished_trains_nothing(shop):
    for step in (8, 12):
        Path(shop.plan.path(shop.plan.state("HASTE", step))).unlink()
    assert shop.jobs() == set()


def test_another_way_to_sample_trains_nothing(shop):
    sampling = {**TINY["sampling"], "heun": {"sampler": "heun", "steps": 3, "count": 20}}
    shop.configure(
        sampling=sampling,
        runs={**RUNS, "vanilla": {"milestones": [8], "sampling": ["quick", "heun"]}},
    )
    names = {row.evaluation.name for row in shop.plan.rows if row.evaluation.sampling_name == "heun"}
    (name,) = names
    assert shop.jobs() == {("sample", name), ("score", name), ("grid", name), ("report", "")}


def test_guided_and_unguided_samples_of_a_state_are_one_job_that_goes_on_after_a_kill_and_a_third_way_is_its_own(shop):
    plain = {"sampler": "euler-maruyama", "steps": 40, "count": 140, "labels": "balanced"}
    ways = {"plain": plain, "guided": {**plain, "guidance": 2.0}}
    cold = Workshop(shop.folder)  # whose jobs are killed with it

    def configure(**ways):
        shop.configure(sampling=ways, runs={"vanilla": {"milestones": [8], "sampling": [*ways]}})
        return {row.evaluation.sampling_name: row.evaluation for row in shop.plan.rows}

    sets = configure(**ways)
    targets = [one.score for one in sets.values()]
    others = {(rule, one.name) for rule in ("score", "grid") for one in sets.values()} | {("report", "")}
    assert shop.jobs() == {("sample", sets["plain"].name)} | others
    running = cold.started(*targets)
    try:
        limit = time.monotonic() + 60
        while not list(Path(sets["guided"].folder).glob(".batches/*.npz")) and time.monotonic() < limit:
            time.sleep(0.02)
    finally:
        os.killpg(running.pid, 9)
    running.communicate()
    assert not any(one.is_drawn for one in sets.values())
    done = shop.snakemake(*targets)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    logs = {path.name: path.read_text() for path in (shop.root / "tiny/logs").glob("sample-*")}
    ours = [text for name, text in logs.items() if any(one.name in name for one in sets.values())]
    assert len(ours) == 1 and re.search(r"of 2 sets: 280/280 images \(\d+ kept from before\)", ours[0])
    assert all(map(os.path.exists, targets))
    late = configure(**ways, late={**plain, "guidance": 3.0})["late"].name
    assert {job for job in shop.jobs() if job[0] in ("sample", "score")} == {("sample", late), ("score", late)}


def test_a_checkpoint_from_elsewhere_is_sampled_and_scored_and_nothing_is_trained(shop, tmp_path):
    state = shop.plan.path(shop.plan.state("HASTE", 16))
    assert cli.main(["export", state, str(tmp_path / "theirs.pt"), "--format", "repa"]) == 0
    row = {"checkpoint": str(tmp_path / "theirs.pt"), "model": "dot", "sampling": ["quick"], "step": 16}
    shop.configure(evaluate={"theirs": row})
    name = shop.evaluation("theirs", 16).name
    assert shop.jobs() == {("sample", name), ("score", name), ("grid", name), ("report", "")}
    for folder in ("stores", "states"):  # alone, it needs no latents
        for left in (shop.root / folder).glob("latents-*" if folder == "stores" else "*"):
            shutil.rmtree(left)
    shop.configure(runs={}, evaluate={"theirs": row})
    assert not {rule for rule, _ in shop.jobs()} & {"latents", "latents_join", "train"}
    assert shop.snakemake().returncode == 0
    assert "theirs" in (Path(shop.plan.report).parent / "results.csv").read_text()


def test_a_detector_that_is_added_looks_at_the_samples_that_are_there(shop):
    shop.configure(detector={**TINY["detector"], "wide": {"trained": {"steps": 2, "batch": 8, "width": 16}}})
    draws = set(shop.plan.evaluations)
    expected = {(rule, "") for rule in ("detector", "reference", "floor", "reconstruct", "report")}
    assert shop.jobs() == expected | {(rule, draw) for rule in ("features", "score") for draw in draws}
    drawn = {path: path.stat().st_mtime_ns for path in shop.root.glob("samples/*/*")}
    done = shop.snakemake()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert {path: path.stat().st_mtime_ns for path in shop.root.glob("samples/*/*")} == drawn
    assert shop.jobs() == set()
    heading = (Path(shop.plan.report).parent / "results.csv").read_text().splitlines()[0]
    assert "FD (cnn)" in heading and "FD (wide)" in heading


def test_samples_that_are_lost_are_drawn_and_looked_at_in_one_job(shop):
    evaluation = shop.evaluation("HASTE", 16)
    for made in (*evaluation.sample_files, *evaluation.features.shard_files, evaluation.score, evaluation.grid):
        Path(made).unlink()
    assert shop.jobs() == shop.evaluated("HASTE", 16)


def test_a_requeued_job_ends_well_whatever_is_there_by_then_and_draws_nothing_again(shop):
    evaluation, config_file = shop.evaluation("HASTE", 16), str(shop.folder / "tiny.yaml")
    (file,), (features,) = evaluation.sample_files, evaluation.features.shard_files
    for made in (file, features, evaluation.score):
        Path(made).unlink()
    assert cli.main(["sample", evaluation.name, "-c", config_file]) == 0
    inode, drawn = os.stat(file).st_ino, Path(file).read_bytes()
    edited = yaml.safe_load(Path(config_file).read_text())
    Path(config_file).write_text(yaml.safe_dump({**edited, "runs": {"vanila": {"milestone": [8]}}}))  # and not finished
    shop.on_a_node("sample", draw=evaluation.name, shard="00000", shards="00001")  # Snakemake removes both files first
    assert "drawn before" in (shop.root / "tiny/logs" / f"sample-{evaluation.name}-00000-of-00001.log").read_text()
    assert os.stat(file).st_ino == inode and Path(file).read_bytes() == drawn
    assert Path(features).exists()
    reference = Path(shop.plan.reference.manifest)
    made = os.stat(reference).st_ino, reference.read_bytes()
    shop.on_a_node("reference", of=reference.parent.parent.name, seen=reference.parent.name)
    assert (os.stat(reference).st_ino, reference.read_bytes()) == made
    assert cli.main(["evaluate", evaluation.name, "-c", shop.plan.config_file]) == 0
    assert not (Path(file).parent / ".batches").exists(), "a second name outlives the score"


def test_an_unrelated_key_reruns_nothing(shop):
    shop.configure(runtime={**TINY["runtime"], "threads": 2, "log_every": 1}, title="another title")
    assert shop.jobs() == {("report", "")}  # the page shows the configuration


def test_a_row_that_is_renamed_or_removed_remakes_the_report_and_nothing_else(shop):
    shop.configure(runs={"plain": RUNS["vanilla"], "HASTE": RUNS["HASTE"]})
    assert shop.jobs() == {("report", "")}
    assert shop.snakemake().returncode == 0
    table = (Path(shop.plan.report).parent / "results.csv").read_text()
    assert "plain" in table
    assert "vanilla,dot" not in table.replace("plain,dot", "")
    assert shop.jobs() == set()


def test_after_pruning_a_finished_configuration_wants_nothing_and_a_row_taken_away_is_freed(shop):
    extra = Path(shop.plan.path(State(shop.plan.state("HASTE", 8).trajectory, 9)))
    shutil.copy(shop.plan.path(shop.plan.state("HASTE", 8)), extra)
    branch = Path(shop.plan.path(shop.plan.state("HASTE-12", 16)))
    file = str(shop.folder / "tiny.yaml")
    assert cli.main(["prune", "-c", file, "--yes"]) == 0
    assert branch.exists() and not extra.exists()
    assert shop.jobs() == set()
    shop.configure(runs={name: row for name, row in RUNS.items() if name != "HASTE-12"})
    assert cli.main(["prune", "-c", file, "--yes"]) == 0
    assert not branch.parent.exists()
    assert shop.jobs() == {("report", "")}


def test_two_snakemakes_of_one_configuration_the_second_says_who_holds_it_and_stops(shop):
    targets = [shop.plan.path(shop.plan.state("HASTE", step)) for step in (8, 12, 16)]
    for target in targets:
        Path(target).unlink()
    lock = Path(shop.plan.folder, ".lock")
    lock.unlink()
    real = Workshop(shop.folder)
    real.environment = shop.environment
    with locks.holding(Path(targets[0]).parent / "lock", "the test, so that the first is not over too early"):
        first = real.started(*targets)
        limit = time.monotonic() + 60
        while not (lock.exists() and lock.read_text()) and time.monotonic() < limit:
            time.sleep(0.02)
        second = shop.snakemake(*targets)
        assert first.poll() is None
    assert second.returncode != 0
    assert f"is in use (lock {lock}) by process {first.pid} on " in second.stdout + second.stderr
    assert "localrule train" not in second.stdout + second.stderr
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 0, text
    assert all(Path(target).exists() for target in targets)


def test_three_configurations_at_once_make_each_artefact_once_and_wait_for_one_another(make_plan, warm, tmp_path):
    make_plan()  # the stores; those removed below are made again
    milestones = {"one": [8], "two": [8, 12], "three": [8, 16]}
    runs = {name: {"HASTE": {"alignment": "HASTE", "milestones": steps}} for name, steps in milestones.items()}
    shops = [Workshop(tmp_path, name, warm, runs=rows) for name, rows in runs.items()]
    plan = shops[0].plan
    for folder in (plan.autoencoder.folder, plan.teachers["vit"].folder):
        shutil.rmtree(folder)
    Path(plan.images.manifest).unlink()
    targets = {shop: [shop.plan.path(state) for state in shop.plan.planned()] for shop in shops}
    running = [shop.started(plan.autoencoder.manifest, *targets[shop]) for shop in shops]
    for process in running:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
    logs = [path.read_text() for path in tmp_path.glob("results/*/logs/*.log")]
    for made in ("autoencoder: step 2 of 2", "vit: step 2 of 2", ": steps 0 to 8, aligning"):
        assert sum(made in text for text in logs) == 1, made
    assert any(re.search(r"waiting for .*: it is in use by process \d+ on \S+ since .*: ", text) for text in logs)
    states = [Path(path) for path in {path for every in targets.values() for path in every}]
    assert len(states) == 3 and all(path.exists() for path in states)
    assert not [path for path in (tmp_path / "results").rglob(".*") if path.name not in (".lock", ".locks")]
    again = shops[2].snakemake("-n", *targets[shops[2]])
    assert "Nothing to be done" in again.stdout + again.stderr


def test_after_kill_9_of_snakemake_alone_the_next_start_waits_for_its_job(shop, tmp_path):
    target = Path(shop.plan.path(shop.plan.state("vanilla", 8)))
    target.unlink()
    lock = target.parent / "lock"
    with locks.holding(lock, "the job of a dead Snakemake"):
        running = shop.started(str(target))
        log = shop.root / "tiny" / "logs" / f"train-{target.parent.name}-00000008.log"
        log.unlink(missing_ok=True)
        limit = time.monotonic() + 60
        while not (log.exists() and "waiting for" in log.read_text()) and time.monotonic() < limit:
            time.sleep(0.05)
        assert (
            f"waiting for trajectory {target.parent.name}: it is in use by process {os.getpid()} on " in log.read_text()
        )
        assert running.poll() is None and not target.exists()
    text, _ = running.communicate(timeout=120)
    assert running.returncode == 0, text
    assert target.exists()


def test_a_state_that_somebody_finished_since_snakemake_looked_is_neither_removed_nor_trained_again(shop):
    target = Path(shop.plan.path(shop.plan.state("vanilla", 8)))
    log, (inode, state) = target.parent / "log.jsonl", (target.stat().st_ino, target.read_bytes())
    lines = log.read_text()
    done = shop.snakemake("--force", str(target))  # the job runs though its state is there
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^localrule train", done.stdout + done.stderr, re.MULTILINE)
    assert (target.stat().st_ino, target.read_bytes()) == (inode, state)
    assert log.read_text() == lines


def test_a_killed_snakemake_leaves_no_lock_and_the_same_command_goes_on(shop):
    expected = {path: load_file(path) for path in shop.root.glob("states/*/step-*.safetensors")}
    shutil.rmtree(shop.root / "states")
    targets = [shop.plan.path(state) for state in shop.plan.planned()]
    running = Workshop(shop.folder).started(*targets)
    limit = time.monotonic() + 120
    while not list(shop.root.glob("states/*/step-*.safetensors")) and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(running.pid, 9)
    running.communicate()
    for lock in (shop.root / ".lock", Path(shop.plan.folder, ".lock")):
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    states = {path: path.stat().st_mtime_ns for path in shop.root.glob("states/*/step-*.safetensors")}
    assert 0 < len(states) < len(targets)
    done = shop.snakemake(*targets)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == when for path, when in states.items())
    for path, want in expected.items():
        found = load_file(path)
        assert all(torch.equal(found[name], value) for name, value in want.items()), path


def test_a_refused_configuration_is_refused_by_the_workflow_too_without_a_traceback(shop):
    raw = yaml.safe_load((shop.folder / "tiny.yaml").read_text())
    raw["runs"]["vanilla"] = {"milestone": [8]}
    (shop.folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    done = shop.snakemake()
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "runs.vanilla.milestone: unknown key; did you mean 'milestones'?" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("of", ["pictures", "reference"])
def test_what_the_first_jobs_would_refuse_is_refused_at_the_start_by_the_workflow_too(warm, tmp_path, of):
    shop = Workshop(tmp_path, warm=warm)
    if of == "pictures":
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "0.png")
        images = {"source": "folder", "path": str(tmp_path / "pictures"), "resolution": 8, "classes": 0, "holdout": 1}
        shop.configure(images=images)
        words = f"{tmp_path / 'pictures'}: 1 pictures to hold out of 1, expected 0..0"
    else:
        np.savez(tmp_path / "ref.npz", arr_0=np.zeros((3, 32, 32, 3), np.uint8))
        detector = {"fid": {"pretrained": {"name": "inception"}, "reference": str(tmp_path / "ref.npz")}}
        shop.configure(images={**TINY["images"], "resolution": 32}, detector=detector)
        words = f"{tmp_path / 'ref.npz'}: expected mu and sigma, as ADM's and other references hold, found arr_0"
    done = shop.snakemake()
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert words in text and "Traceback" not in text
    assert not list(shop.root.glob("stores/*")) and not list(tmp_path.rglob("images-*.log"))
