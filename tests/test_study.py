"""The study on the digits, config/study.yaml, cut to 40 steps: every part of what docs/study.md tells is in its report.

Snakemake decides what to run, and its commands are called one after another in this process: hundreds of them would
each take seconds to import torch. In the end Snakemake itself finds that only the report is left, and makes it.
"""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

from haste import config
from haste.cli import main as cli
from haste.files import artefact
from haste.ops import cost
from haste.ops.pace import Pace
from haste.plan.plan import Plan
from haste.report import suggest

ROOT = Path(__file__).parent.parent
STUDY = yaml.safe_load((ROOT / "config" / "study.yaml").read_text())
STEPS = 40
TRIGGERS = {
    "gradient-angle": {"every": 10, "images": 8, "shards": 2},
    "plateau": {"every": 2, "fast": 0.5, "slow": 0.75},
}


def cut(study, results):
    """The study with every number of training steps divided so that the runs end at step 40, the first of its seeds,
    and fewer images, samples and steps of everything else. No run, fork or measure is left out."""
    raw = json.loads(json.dumps(study))  # a copy without the sharing of YAML's anchors
    ratio = raw["defaults"]["milestones"][-1] // STEPS
    raw |= {"results": str(results)}
    for network in (raw["autoencoder"], *raw["teachers"].values(), *raw["detector"].values()):
        network["trained"] |= {"steps": 4, "batch": 8}
    raw["training"]["batch"] = 8
    raw["defaults"]["milestones"] = [step // ratio for step in raw["defaults"]["milestones"]]
    raw["defaults"]["seeds"] = raw["defaults"]["seeds"][:1]
    raw["runtime"]["log_every"] = 1
    for run in raw["runs"].values():
        if isinstance(run.get("stop"), int):
            run["stop"] //= ratio
        for trigger in (run.get("stop"), *run.get("watch", ())):
            if isinstance(trigger, dict):
                trigger |= TRIGGERS[trigger["trigger"]]
    for fork in raw["forks"].values():
        fork |= {"at": [step // ratio for step in fork["at"]], "for": fork["for"] // ratio}
    for way in raw["sampling"].values():
        way |= {"steps": 2, "count": 40}
    for measure in raw["measures"].values():
        measure |= {"images": 40}
        measure |= {"epochs": 2, "warmup": 1} if measure["measure"] == "probe" else {}
    return raw


class Study:
    """A results folder with the cut study in it."""

    def __init__(self, folder, warm=None):
        self.file, self.warm = folder / "study.yaml", warm
        raw = cut(STUDY, folder / "results")
        self.file.write_text(yaml.safe_dump(raw))
        self.plan = Plan(config.resolve(raw))
        self.report = Path(self.plan.report).parent

    def snakemake(self, *arguments):
        where = ["--snakefile", str(ROOT / "workflow" / "Snakefile"), "--directory", str(self.file.parent)]
        profile = ["--workflow-profile", str(ROOT / "profiles" / "default")]
        done = self.warm.snakemake(*where, *profile, "--configfile", self.file, "--cores", "2", *arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    def make(self):
        """Everything up to the report, by the commands that Snakemake would run, in its order."""
        artefact.write_json(self.plan.config_file, self.plan.config.model_dump(mode="json"))
        for line in re.findall(
            r"^Shell command: (haste .*?)(?: 3>&2)? > ", self.snakemake("-n", "--printshellcmds"), re.MULTILINE
        ):
            command = shlex.split(re.sub(r"\$\(\(10#(\d+)\)\)", lambda found: str(int(found[1])), line))[1:]
            if command[0] != "report":
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                    assert cli.main(command) == 0, (line, said.getvalue())


@pytest.fixture(scope="module")
def study(once, warm):
    def fill(folder):
        made = Study(folder, warm)
        made.make()
        said = made.snakemake()
        assert set(re.findall(r"^(?:local)?rule (\w+):", said, re.MULTILINE)) == {"report", "all"}

    folder = once("study", fill)
    return Study(folder)


def test_the_table_has_every_way_to_train_at_every_milestone(study):
    found = pd.read_csv(study.report / "results.csv").dropna(subset="step")  # real images against real ones have none
    runs = {name: study.plan.config.runs[name] for name in STUDY["runs"]}
    expected = {(name, step, seed) for name, run in runs.items() for step in run.milestones for seed in run.all_seeds}
    assert set(found[["run", "step", "seed"]].itertuples(index=False, name=None)) == expected


def test_the_study_takes_less_than_three_hours_on_two_cores_by_the_plan():
    plan = Plan(config.resolve({**STUDY, "results": "nowhere"}))
    core = 45e9  # operations a second in matrix products, half of what a core of the machine of docs/study.md reaches
    found, _ = cost.stages(plan, Pace.of_plan(plan, core=core))
    assert 0 < sum(stage.seconds for stage in found) < 3 * 3600


def test_the_fork_has_a_line_a_step_and_a_figure_of_loss_and_distance_with_what_they_say(study):
    found = pd.read_csv(study.report / "fork-when.csv")
    (fork,) = study.plan.config.forks.values()
    assert list(found["step"]) == fork.at and not found.isna().any(axis=None)
    quantities = ["held-out loss", "FD (digits-cnn)"]
    assert set(quantities) < set(found.columns)
    page = (study.report / "index.html").read_text()
    for quantity in quantities:
        assert f"when, of {fork.run}, by {quantity}: " in page and f"{quantity}, stopped minus aligned: " in page


@pytest.mark.parametrize("measure", STUDY["measures"])
def test_each_measure_has_its_table_with_every_run_that_asks_for_it(study, measure):
    found = pd.read_csv(study.report / f"measure-{measure}.csv")
    asked = {name for name, run in study.plan.config.runs.items() if measure in run.measures}
    assert set(found["run"]) == asked - set(config.branches(study.plan.config))


def test_suggest_stop_says_what_forks_cosines_readings_and_losses_say(study):
    (fork,) = study.plan.config.forks.values()
    said = {one.by for one in suggest.suggestions(study.plan, fork.run)}
    terms, plateaus = config.TERMS, {by for by in said if by.startswith("readings of plateau on ")}
    assert {term for by in plateaus for term in by.split(" on ")[1].split(" and ")} == set(terms)
    assert said - plateaus == {
        "fork when, held-out loss",
        "fork when, FD (digits-cnn)",
        "cosine, cosine of alignment below -0.05",
        "readings of gradient-angle on attention and features",  # of all terms together
        *(f"plateau of the logged {term} loss" for term in terms),
    }
