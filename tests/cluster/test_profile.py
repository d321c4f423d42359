"""The profile that users start from says what each line is, and asks for what training understands."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from haste.cluster import job

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "profiles" / "slurm" / "config.yaml").read_text()
PROFILE = yaml.safe_load(TEXT)


@pytest.mark.parametrize("rule", ["train", "train_plain"])
def test_training_understands_every_resource_that_it_is_given(rule):
    given = {**PROFILE["default-resources"], **PROFILE["set-resources"][rule]}
    asked = job.resources([f"{key}={value}" for key, value in given.items()])
    assert asked.processes == given["nodes"] * given["tasks_per_node"]
    assert PROFILE["set-threads"][rule] == 1, "who waits needs no cores"


def test_rules_ask_a_cluster_for_no_gpu_beside_what_the_profile_says():
    rules = "".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    asked = set(re.findall(r"resources: (\w+)=", rules))
    assert asked == {"devices"}  # gpu, gpus, nvidia_gpu and gres are what the executors of SLURM hand on


def test_site_settings_that_are_commented_out_are_understood_too():
    offered = re.findall(r"^  # (\w+): \"?([^\"#]*?)\"?\s+#", TEXT, re.MULTILINE)
    assert {key for key, _ in offered} >= {"slurm_account", "slurm_partition", "constraint", "qos", "slurm_extra"}
    job.parameters(job.resources([f"{key}={value}" for key, value in offered]), "name")


def test_training_after_the_stop_asks_for_less_than_before():
    before, after = (PROFILE["set-resources"][rule] for rule in ("train", "train_plain"))
    assert before["nodes"] * before["tasks_per_node"] == after["nodes"] * after["tasks_per_node"]  # else other bits
    assert after["mem_mb"] < before["mem_mb"]
    assert after["cpus_per_task"] < before["cpus_per_task"]


def test_what_runs_a_large_network_over_all_images_or_samples_asks_for_a_gpu_and_its_share_of_cores():
    for rule in ("latents", "text", "pca", "targets", "sample", "features", "reference"):
        asked = PROFILE["set-resources"][rule]
        assert (asked["gpu"], asked["cpus_per_task"]) == (1, 12), rule


def test_what_decodes_pictures_decodes_as_many_at_once_as_it_has_cores():
    for rule in ("images_check", "images"):
        assert PROFILE["set-threads"][rule] == PROFILE["set-resources"][rule]["cpus_per_task"]


def test_with_arrays_no_other_limit_holds_jobs_back():
    """The executor never submits the members of an array that it got while others of their rule were held back."""
    assert PROFILE["slurm-array-jobs"]
    assert PROFILE["jobs"] == "unlimited"
    assert int(PROFILE["max-jobs-per-timespan"].split("/")[0]) >= 100_000


def test_every_resource_of_training_stands_in_the_document():
    document = (ROOT / "docs" / "slurm.md").read_text().split("## The profile")[1]
    assert set(job.KEYS) <= set(re.findall(r"`(\w+)`", document))


def test_runs_may_have_other_nodes_than_others_by_an_expression_as_the_document_has_it(warm, tmp_path):
    document = (ROOT / "docs" / "slurm.md").read_text()
    (expression,) = re.findall(r'^    nodes: "(.*SiT-XL-2.*)"$', document, re.MULTILINE)
    changed = copy.deepcopy(PROFILE)
    changed["set-resources"]["train"] |= {"nodes": expression.replace("SiT-XL-2", "SiT-d4w128p2-features-s0")}
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text(yaml.safe_dump(changed))
    command = ["-n", "-p", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--workflow-profile", ROOT / "profiles" / "default", "--profile", tmp_path / "profile"]
    command += ["--configfile", ROOT / "config" / "digits.yaml", "--directory", tmp_path]
    done = warm.snakemake(*command)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"haste train (\S+)-s0-\w+/\d+ .* nodes=(\d)", done.stdout + done.stderr)
    assert set(shown) >= {("SiT-d4w128p2-features", "2"), ("SiT-d4w128p2-features-attention", "1")}
    asked = re.findall(r"haste train .* --slurm (.*) 3>&2", done.stdout + done.stderr)
    gpus = f"gpus_per_node={PROFILE['set-resources']['train']['gpus_per_node']}"
    assert asked and all(re.findall(r"\S*(?:gpu|gres|device)\S*", one) == [gpus] for one in asked), "once"
    assert all((nodes == "2") == name.endswith("-features") for name, nodes in shown)


def test_rules_of_the_profile_exist():
    rules = set()
    for file in (ROOT / "workflow").rglob("*.smk"):
        rules |= set(re.findall(r"^ *(?:use )?rule (?:\w+ as )?(\w+)", file.read_text(), re.MULTILINE))
    named = {*PROFILE["set-resources"], *PROFILE["set-threads"], *PROFILE["slurm-array-jobs"].split(",")}
    assert named <= rules


def test_the_document_says_what_every_rule_holds_in_memory():
    table = (ROOT / "docs" / "slurm.md").read_text().split("### Memory at ImageNet's size")[1].split("## ")[0]
    named = {
        word
        for line in table.splitlines()
        for word in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    rules = {
        name
        for path in ROOT.glob("workflow/rules/*.smk")
        for name in re.findall(r"^ *rule (\w+):", path.read_text(), re.M)
    }
    assert named == {*rules, "train_plain"} - {"measures"}  # which is train again, and a target without a job
