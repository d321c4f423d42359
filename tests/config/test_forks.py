"""Forks of a run in a configuration: which rows they stand for, and which are refused by key."""

import copy
from pathlib import Path

import pytest
import yaml

from haste import config

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
TRIGGERED = {"trigger": "plateau", "after": 6, "every": 2, "fast": 0.5, "slow": 0.75}


def resolved(fork, runs=None, **changes):
    runs = {"HASTE": {"alignment": "HASTE", "milestones": [16]}, "plain": {}} if runs is None else runs
    return config.resolve({**copy.deepcopy(TINY), "runs": runs, "forks": {"F": fork}, **changes})


FORK = {"run": "HASTE", "at": [4, 8], "for": 6}


def test_each_step_has_a_row_that_goes_on_and_one_that_stops_and_both_end_after_as_many_steps():
    rows = resolved(FORK).runs
    assert list(rows) == ["HASTE", "plain", "F@4-aligned", "F@4-stopped", "F@8-aligned", "F@8-stopped"]
    assert [rows[name].milestones for name in list(rows)[2:]] == [[10], [10], [14], [14]]
    assert rows["F@8-stopped"].stop == config.Stops(features=8, attention=8)
    assert rows["F@8-aligned"].stop == config.Stops()
    for name in list(rows)[2:]:
        assert (rows[name].sampling, rows[name].measures) == (["quick"], ["denoising"])


def test_a_branch_stops_only_the_terms_that_its_run_has_and_takes_nothing_else_of_its_stop():
    runs = {"REPA": {"alignment": "REPA", "stop": 8, "ramp": 2, "training": {"lr": 0.5}, "seeds": [3, 5]}}
    rows = resolved({"run": "REPA", "at": [5], "for": 9, "seeds": [5], "measures": []}, runs).runs
    assert rows["F@5-stopped"].stop == config.Stops(features=5)
    assert rows["F@5-aligned"].stop == config.Stops()
    for name in ("F@5-stopped", "F@5-aligned"):
        assert (rows[name].ramp, rows[name].training) == (config.Ramps(), {"lr": 0.5})
        assert (rows[name].all_seeds, rows[name].measures) == ([5], [])


def test_what_is_resolved_resolves_to_itself_and_knows_what_was_written():
    found = resolved(FORK)
    assert config.resolve(found.model_dump(mode="json")) == found
    assert list(config.written(found).runs) == ["HASTE", "plain"]


def test_the_measure_of_forks_can_be_defined_otherwise_and_is_not_there_without_forks():
    assert resolved(FORK).measures["denoising"].model_extra["groups"] == 64
    spec = {"measure": "denoising", "groups": 9}
    assert resolved(FORK, measures={"denoising": spec}).measures["denoising"].model_extra["groups"] == 9
    assert not config.resolve(copy.deepcopy(TINY)).measures


def test_a_fork_may_be_at_the_very_step_where_its_run_stops_or_begins_to_be_watched():
    for stop in (8, TRIGGERED):
        at = 8 if stop == 8 else 6
        assert f"F@{at}-aligned" in resolved({**FORK, "at": [at]}, {"HASTE": {"alignment": "HASTE", "stop": stop}}).runs


@pytest.mark.parametrize(
    ("fork", "runs", "said"),
    [
        ({"run": "HASTY"}, {}, "forks.F.run: nothing is called 'HASTY'; did you mean 'HASTE'?"),
        ({"run": "plain"}, {}, "forks.F.run: plain aligns nothing that could be stopped, expected HASTE"),
        ({"at": [0, 4]}, {}, "forks.F.at.0: Input should be greater than or equal to 1"),
        (
            {"at": [4, 17]},
            {},
            "forks.F.at: 17, but HASTE ends at step 16; expected steps up to that, or a later milest",
        ),
        ({"at": [8, 4]}, {}, "forks.F: at [8, 4] is out of order: write its steps in increasing order, each once"),
        ({"at": []}, {}, "forks.F.at: "),
        ({"for": 0}, {}, "forks.F.for: Input should be greater than or equal to 1, found 0"),
        ({"fro": 1}, {}, "forks.F.fro: unknown key; did you mean 'for'?"),
        ({"seeds": [0, 7]}, {}, "forks.F.seeds: [7], but HASTE is trained with [0]"),
        ({"sampling": ["quik"]}, {}, "forks.F.sampling: nothing is called 'quik'; did you mean 'quick'?"),
        ({"measures": ["loss"]}, {}, "forks.F.measures: nothing is called 'loss'"),
        (
            {},
            {"stop": 7},
            "forks.F.at: 8, but from step 7 on features stops or goes down in HASTE; expected steps up to that, or",
        ),
        ({}, {"stop": 10, "ramp": 3}, "forks.F.at: 8, but from step 7 on features stops or goes down in HASTE"),
        ({}, {"stop": TRIGGERED}, "forks.F.at: 8, but from step 6 on plateau may stop features at any time in HASTE"),
        (
            {},
            {"stop": TRIGGERED},
            "or the fork of a run that never stops: a copy of HASTE without `stop`, with `watch: [{trigger: plateau, .",
        ),
    ],
)
def test_what_cannot_be_forked_is_refused_by_key_with_what_to_do(fork, runs, said):
    rows = {"HASTE": {"alignment": "HASTE", "milestones": [16], **runs}, "plain": {}}
    with pytest.raises(ValueError, match="forks") as refused:
        resolved({**FORK, **fork}, rows)
    assert said in str(refused.value)


def test_without_images_that_are_held_out_there_is_no_held_out_loss():
    public = {
        "images": {**TINY["images"], "holdout": 0, "resolution": 32},
        "autoencoder": {"pretrained": {"encode": "a"}},
        "teachers": {"vit": {"pretrained": {"name": "DINOv2-B"}}},
        "detector": {"cnn": {"pretrained": {"name": "inception"}}},
    }
    with pytest.raises(ValueError, match=r"measures\.denoising\.groups: 8 images .*, but images\.holdout keeps 0"):
        resolved(FORK, **public)
    resolved({**FORK, "measures": []}, **public)
    resolved(FORK, **public, measures={"denoising": {"measure": "denoising", "split": "train"}})


def test_branches_leave_out_pictures_of_chosen_classes_which_nothing_compares():
    ways = {"sampling": {**TINY["sampling"], "pictures": {"preset": "ode-50", "labels": [3, 8]}}}
    runs = {"HASTE": {"alignment": "HASTE", "sampling": ["quick", "pictures"]}}
    assert resolved(FORK, runs, **ways).runs["F@4-stopped"].sampling == ["quick"]
    for fork, row in ((FORK, {"sampling": ["pictures"]}), ({**FORK, "sampling": ["pictures"]}, {})):
        with pytest.raises(ValueError, match=r"forks\.F\.sampling: pictures has chosen labels .* no scores"):
            resolved(fork, {"HASTE": {"alignment": "HASTE", **row}}, **ways)


def test_a_run_that_has_the_name_of_a_branch_is_refused():
    runs = {"HASTE": {"alignment": "HASTE"}, "F@4-stopped": {}}
    with pytest.raises(
        ValueError, match=r"runs\.F@4-stopped: this is the name of a branch of a fork, expected another"
    ):
        resolved(FORK, runs)
