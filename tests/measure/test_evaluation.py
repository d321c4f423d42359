"""Images of their own for measures: through the same commands, with the same measures, and refused before anything."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_gradients import hidden_state

from haste.cli import main as cli
from haste.config import resolve
from haste.data import order
from haste.files.store import Store
from haste.ops import prune
from haste.plan.plan import Plan
from haste.teachers import targets

MEASURES = {
    "alike": {"measure": "cknna", "images": 20, "shards": 4, "neighbours": 3, "t": [0.25], "split": "evaluation"},
    "probe": {"measure": "probe", "images": 40, "layers": [1], "batch": 20, "epochs": 11, "split": "evaluation"},
    "loss": {"measure": "denoising", "images": 16, "groups": 8, "t": [0.5], "split": "evaluation"},
    "pca": {"measure": "pca", "images": 2, "layers": [1], "split": "evaluation"},
}


def test_measures_read_images_of_their_own_that_the_same_commands_prepared(toy, measured, pictures, tmp_path):
    plan = toy({"evaluation": pictures(tmp_path / "val")}, **MEASURES)
    others = plan.of("evaluation")
    for command, shards in (("images", 1), ("latents", 2)):
        for step in (*(["--shard", str(shard)] for shard in range(shards)), ["--join"]):
            assert cli.main([command, "-c", str(plan.file), "--evaluation", *step]) == 0
    with Store.of(others.images) as images:
        assert images.count == 30 and images.fields["image"][0] == (8, 8, 3)
        chosen = order.choice(0, "measured images", 0, 20, 30)
        shown = images.read("image", chosen)
    found = {label: measured(plan, label) for label in MEASURES}
    what = {one.measurement.label: one.measurement for one in plan.measured}
    tensors = load_file(plan.path(plan.state("plain", 8)))
    store = Store.of(what["alike"].hidden["evaluation"])
    states = torch.cat([hidden_state(others, tensors, image, 0.25, 2) for image in chosen])
    np.testing.assert_allclose(store.read("layer 2, t 0.25", range(20)), states, rtol=2e-6, atol=1e-6)
    seen = targets.load_teacher(plan, "vit")(torch.from_numpy(shown), features=True).features.mean(dim=1)
    kept = Store.of(what["alike"].seen["vit"]["evaluation"])
    np.testing.assert_allclose(kept.read("features", range(20)), seen, rtol=1e-5, atol=1e-6)
    assert Store.of(what["probe"].hidden["evaluation"]).count == 30
    assert Store.of(what["probe"].hidden["train"]).count == 40
    assert {row["accuracy"] * 30 % 1 for row in found["probe"]["rows"]} <= {0.0} and len(found["loss"]["rows"]) == 8
    for made in found.values():
        assert made["provenance"]["inputs"]["latents of evaluation"] == Store.of(others.latents).identity
    for one in what.values():
        assert {*others.latents.files, *plan.latents.files} <= {*plan.measured_from(one)}
    gone = {item.path for item in prune.unneeded(Path(plan.root), prune.Needs.of([plan]))}
    assert not gone & {Path(others.images.folder), Path(others.latents.folder)}


def test_a_section_that_no_measure_reads_changes_no_name(tiny, tmp_path):
    measures = {"loss": {"measure": "denoising"}, "probe": {"measure": "probe"}}
    runs = {"plain": {"measures": list(measures)}}
    plain, other = (
        Plan(resolve({**tiny, **more, "results": str(tmp_path), "measures": measures, "runs": runs}))
        for more in ({}, {"evaluation": {"path": "val"}})
    )
    assert plain.measure_files == other.measure_files and plain.planned() == other.planned()
    assert plain.images == other.images and plain.latents == other.latents
    other.check()  # the pictures are not looked at


@pytest.mark.parametrize(
    ("spec", "evaluation", "words"),
    [
        (MEASURES["loss"], None, "measures.it.split: evaluation, but there is no section `evaluation`; expected one"),
        (MEASURES["loss"], {"resolution": 16}, "evaluation.resolution: 16, expected 8"),
        (MEASURES["loss"], {"holdout": 3}, "evaluation.holdout: 3, expected 0"),
        (MEASURES["loss"], {"classes": 9}, "evaluation.classes: 9, expected 10"),
        (MEASURES["probe"] | {"split": "train"}, {}, "measures.it.split: Input should be 'held_out' or 'evaluation'"),
    ],
)
def test_a_section_that_does_not_fit_is_refused_by_its_key(tiny, spec, evaluation, words):
    more = {} if evaluation is None else {"evaluation": {"path": "val", **evaluation}}
    with pytest.raises(ValueError) as refused:
        resolve({**tiny, **more, "measures": {"it": spec}, "runs": {"plain": {"measures": ["it"]}}})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "change", "words"),
    [
        (MEASURES["alike"], lambda val: None, r"measures\.it\.images: 20, but there are 10 evaluation images"),
        (
            MEASURES["probe"],
            lambda val: (val / "9").rename(val / "x"),
            "its classes are not those of digits: 9, x",
        ),
        (MEASURES["probe"], lambda val: val.rename(val.with_name("gone")), r"val"),
    ],
)
def test_pictures_that_cannot_be_measured_are_refused_before_the_first_job(
    tiny, pictures, tmp_path, spec, change, words
):
    images = pictures(tmp_path / "val", count=1)
    change(tmp_path / "val")
    raw = {**tiny, "results": str(tmp_path / "results"), "evaluation": images, "measures": {"it": spec}}
    with pytest.raises(ValueError, match=words):
        Plan(resolve({**raw, "runs": {"plain": {"measures": ["it"]}}})).check()


def test_the_command_of_images_that_are_not_there_says_so(world, capsys):
    assert cli.main(["images", "-c", str(world.file), "--evaluation", "--join"]) == 2
    assert re.search("--evaluation: the configuration has no section `evaluation`", capsys.readouterr().err)
