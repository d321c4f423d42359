"""What SLURM would refuse is said before anything is submitted, by the keys of the profile. Scripts play SLURM."""

from pathlib import Path

import pytest
import yaml

from haste.cluster import check, job

PROFILE = yaml.safe_load((Path(__file__).parents[2] / "profiles" / "slurm" / "config.yaml").read_text())


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A function from a script to the calls of the sbatch that runs it."""
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "sacctmgr").symlink_to("/bin/true")

    def says(script):
        path = tmp_path / "sbatch"
        path.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
        path.chmod(0o755)
        return lambda: calls.read_text().splitlines()

    return says


def refusing(flag, words):
    return f'case "$*" in *{flag}*) echo "{words}" >&2; exit 1;; esac'


def test_the_resources_of_the_profile_are_asked_for_as_training_and_snakemake_ask_for_them(sbatch):
    calls = sbatch("true")
    default = PROFILE["default-resources"] | {"slurm_account": "mine", "slurm_extra": "--exclude=node7"}
    asked = [(rule, default | given) for rule, given in PROFILE["set-resources"].items()]
    assert list(check.check([*asked, ("images_join", default), ("latents_join", default)])) == []
    assert "--test-only --account=mine --time=60 --mem=16000 --cpus-per-task=4 --exclude=node7 --wrap=true" in calls()
    train = "--time=1440 --mem=400000 --cpus-per-task=12 --nodes=1 --ntasks-per-node=8 --gpus-per-node=8"
    assert any(train in call for call in calls())
    assert any("--time=240 --mem=32000 --cpus-per-task=12 --gpus=1" in call for call in calls())
    assert len(calls()) == len(set(calls())), "the same question was asked twice"


@pytest.mark.parametrize(
    ("flag", "words", "keys"),
    [
        ("--account=lost", "Invalid account or account/partition combination specified", "slurm_account"),
        ("--partition=lost", "sbatch: error: invalid partition specified: lost", "slurm_partition"),
        ("--qos=lost", "Invalid qos specification", "qos"),
        ("--constraint=lost", "Invalid feature specification", "constraint"),
    ],
)
def test_what_no_time_mends_is_refused_with_the_rules_and_the_key(sbatch, flag, words, keys):
    sbatch(refusing(flag, words))
    key, value = {v: k for k, v in check.FLAGS.items()}[flag[2:].split("=")[0]], "lost"
    asked = [("train", {"nodes": 1}), ("score", {"gpu": 1, key: value}), ("sample", {"gpu": 1, key: value})]
    with pytest.raises(ValueError, match=f"jobs of sample, score .*{words.split()[-1]}.*Look at {keys}.* in the prof"):
        list(check.check(asked))


@pytest.mark.parametrize("accounts", ["echo '   root'; echo '   mine'", "true", "echo broken >&2; exit 1"])
def test_an_account_that_is_not_the_users_own_is_refused_where_somebody_can_say_so(sbatch, tmp_path, accounts):
    sbatch("true")
    (tmp_path / "sacctmgr").unlink()
    (tmp_path / "sacctmgr").write_text(f"#!/bin/sh\n{accounts}\n")
    (tmp_path / "sacctmgr").chmod(0o755)
    asked = [("sample", {"slurm_account": "Mine"}), ("train", {"slurm_account": "root, lost"})]
    if "mine" in accounts:
        with pytest.raises(ValueError, match="slurm_account in the profile: lost is none of yours: mine, root"):
            list(check.check(asked))
        asked.pop()
    assert list(check.check(asked)) == []


def test_what_may_be_otherwise_when_other_nodes_are_up_is_a_doubt_and_no_refusal(sbatch):
    sbatch(refusing("--gpus-per-node=8", "allocation failure: Requested node configuration is not available"))
    asked = [("train", {"gpus_per_node": count, "nodes": 2}) for count in (4, 8, 4)]
    (doubt,) = check.check([*asked, ("sample", {"gpu": 1})])
    assert "jobs of train (--nodes=2 --gpus-per-node=8) now: allocation failure" in doubt
    assert doubt.endswith("Look at gpus_per_node, nodes in the profile.")


def test_a_full_queue_is_no_doubt_about_a_job_and_all_jobs_together_may_not_fit_with_what_is_there(sbatch):
    calls = sbatch(refusing("--array=1-3", "sbatch: error: QOSGrpSubmitJobsLimit"))
    asked = [("sample", {"qos": "long"}), ("sample", {"qos": "long"}), ("score", {"mem_mb": 5})]
    assert check.too_many(asked, array=1000) == "QOSGrpSubmitJobsLimit"
    assert calls() == ["--test-only --array=1-3 --qos=long --wrap=true"]
    assert check.too_many(asked, array=2) == ""  # more are never asked for at once
    assert check.too_many(asked[:2], array=1000) == ""
    assert check.too_many([], array=1000) == ""
    sbatch("echo AssocMaxSubmitJobLimit >&2; exit 1")
    assert list(check.check(asked)) == []


def test_a_slurm_that_gives_no_answer_is_no_refusal(sbatch):
    sbatch("echo 'Unable to contact slurm controller' >&2; exit 1")
    (doubt,) = check.check([("sample", {"gpu": 1})])
    assert "Unable to contact slurm controller" in doubt


def test_a_machine_without_slurm_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch.*login node.*--cores all"):
        list(check.check([("sample", {"gpu": 1})]))


def test_quoted_flags_are_read_as_training_reads_them():
    extra = '--comment="two words" --exclusive'
    assert check.flags({"slurm_extra": extra}) == ("--comment=two words", "--exclusive")
    asked = job.parameters(job.resources([f"slurm_extra={extra}"]), "name")["additional_parameters"]
    assert asked.items() >= {"requeue": True, "comment": "two words", "exclusive": True}.items()
    assert asked["signal"].startswith("USR2@")  # whatever SUBMITIT_PREEMPT_SIGNAL says


def test_a_folder_whose_name_slurm_would_change_in_the_names_of_logs_is_refused(tmp_path):
    check.check_place(tmp_path)
    with pytest.raises(ValueError, match=r"results: .*/50%j has a %, which SLURM replaces"):
        check.check_place(tmp_path / "50%j")
