"""Training with variants of the feature term and of its teacher: their names, their targets on disk, any cut."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cached_training import DOUBLE, VIT, make_targets
from test_distributed import train_with

from haste import config
from haste.files import artefact, journal
from haste.files.store import Store
from haste.ops import cost
from haste.plan import memory
from haste.plan.plan import Plan
from haste.report import gather
from haste.teachers.encoder import Teacher
from haste.train import loop
from haste.train.step import Objective

TERM = {"teacher": "blurred", "depth": 1, "layer": 0, "head": "conv", "normalise": "spatial", "normalise_factor": 0.6}
BAND = {"t_min": 0.1, "t_max": 0.8}
ATTENTION = {"teacher": "vit", "student_layers": [0], "teacher_layers": [1], "t_max": 0.7}
DEFAULTS = {"model": "dot", "milestones": [8], "sampling": ["quick"]}


def changes(features=None, cache="off", **more):
    """Of the tiny configuration: one run `new`, with two teachers of one network."""
    blurred = {"trained": VIT, "filter": {"low_pass": 0.5}, "cache": cache}
    return {
        "teachers": {"vit": {"trained": VIT}, "blurred": {**blurred, **more.pop("teacher", {})}},
        "alignments": {"new": {"features": {**TERM, **BAND, **(features or {})}, "attention": ATTENTION}},
        "runs": {"new": {"alignment": "new"}},
        "defaults": DEFAULTS,
        **more,
    }


def path_of(plan, step=8):
    return Path(plan.path(plan.state("new", step)))


def trained(plan, processes=1):
    if processes == 1:
        loop.train(plan, plan.state("new", 8))
    else:
        train_with(plan, plan.state("new", 8), processes)
    found = load_file(path_of(plan))
    path_of(plan).unlink()
    return found


def lines(plan):
    return journal.read(path_of(plan).parent / "log.jsonl")


# ---- names


def name_with(tiny, **features):
    tiny["alignments"]["REPA"]["features"] = {"teacher": "vit", "depth": 1, "hidden": 16} | features
    return Plan(config.resolve(tiny)).state("REPA", 8).trajectory


def test_defaults_that_are_written_out_change_no_name_and_neither_does_the_last_layer_by_its_number(tiny):
    plain = name_with(tiny)
    told = {"head": "mlp", "kernel": None, "normalise": None, "normalise_factor": None, "t_min": 0.0, "t_max": 1.0}
    assert name_with(tiny, **told, layer=None) == name_with(tiny, layer=1) == plain


def test_every_variant_has_a_name_of_its_own(tiny):
    plain = name_with(tiny)
    spatial, conv = {"normalise": "spatial"}, {"hidden": None, "head": "conv"}
    variants = [
        {"layer": 0},
        {"t_max": 0.5},
        spatial,
        {**spatial, "normalise_factor": 0.5},
        conv,
        {**conv, "kernel": 1},
    ]
    names = [name_with(tiny, **one) for one in [*variants, {"hidden": None, "head": "linear"}]]
    for radius in (0.25, 0.5):
        tiny["teachers"]["vit"]["filter"] = {"low_pass": radius}
        names.append(name_with(tiny))
    assert len({plain, *names}) == 10


def test_a_filter_trains_no_teacher_again_and_the_plan_counts_it_once(make_plan, tiny):
    plan = make_plan(**changes())
    assert plan.teachers["blurred"].folder == plan.teachers["vit"].folder
    tiny["results"] = "nowhere"
    found = {stage.name: stage for stage in cost.stages(Plan(config.resolve(tiny | changes())))[0]}
    assert (found["teacher"].jobs, found["teacher"].left) == (1, 1)


@pytest.mark.parametrize(
    ("head", "weights"),
    [({"head": "mlp", "hidden": 24}, (16 + 24 + 16) * 24), ({}, 9 * 16 * 16), ({"head": "linear"}, 16 * 16)],
)
def test_the_plan_counts_the_weights_of_the_head(make_plan, head, weights):
    plan = make_plan(**changes(head))
    segment = plan.segment(plan.state("new", 8))
    assert memory.head_parameters(plan, segment) == weights
    held = trained(plan)
    assert sum(v.numel() for n, v in held.items() if n.startswith("projectors/") and v.ndim > 1) == weights


def test_the_report_has_words_for_every_variant(make_plan):
    said = gather.settings(make_plan(**changes()), "new")
    assert (said["feature head"], said["feature normalise"], said["feature layer"]) == ("conv, 3", "spatial, 0.6", "0")
    assert (said["feature t_min"], said["feature t_max"], said["attention t_max"]) == ("0.1", "0.8", "0.7")
    assert said["teacher"] == "features blurred, low_pass 0.5, attention vit"
    plain = gather.settings(make_plan(), "REPA")
    assert (plain["feature head"], plain["feature normalise"], plain["teacher"]) == ("mlp, 16", "none", "vit")


# ---- any cut, and the disk


def test_a_cut_and_a_kill_change_no_bit_and_a_term_in_a_band_moves_its_head(make_plan):
    expected = trained(make_plan(**changes()))
    assert expected["projectors/features/projection_layer.weight"].shape == (16, 16, 3, 3)
    cut = make_plan(**changes(defaults={**DEFAULTS, "milestones": [5, 8]}))
    found = trained(cut)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["optimizer/exp_avg/projectors/features/projection_layer.weight"].any()


def test_a_kill_of_two_processes_changes_no_bit(make_plan, monkeypatch):
    plan = make_plan(**changes(runtime={"processes": 2, "save_every": 2, "log_every": 8}))
    expected, forward, folder = trained(plan, 2), Objective.forward, path_of(plan).parent

    def dies(self, batch, *more):
        if batch.step == 5:
            until = time.monotonic() + 60
            while not [*folder.rglob("step-00000004.safetensors")] and time.monotonic() < until:
                time.sleep(0.01)  # it is written in the background
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, batch, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "forward", dies)
        assert train_with(plan, plan.state("new", 8), 2, die_after=600)
    assert max(path.name for path in folder.rglob("*.safetensors")) == "step-00000004.safetensors"
    found = trained(plan, 2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("more", [{}, {"similarity": "nt-xent", "negatives": "batch", "negative_count": 9}])
def test_processes_and_accumulation_change_float64_training_by_rounding_only(make_plan, more):
    expected = trained(make_plan(**changes(more, training=DOUBLE)))
    several = make_plan(**changes(more, training=DOUBLE, runtime={"processes": 2, "accumulate": 2}))
    for name, value in trained(several, 2).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("pca", [None, 16])  # all components are a rotation: another target, of the same spread
def test_a_layer_of_a_filtered_teacher_on_disk_is_what_it_says_online(make_plan, pca):
    online = make_plan(**changes(training=DOUBLE, runtime={"log_every": 1}))
    trained(online)
    losses = lines(online)
    teacher = {"cache": "features", **({"pca": pca} if pca else {})}
    plan = make_targets(make_plan(**changes(training=DOUBLE, runtime={"log_every": 1}, teacher=teacher)), "blurred")
    store = Store.open(plan.targets["blurred"].folder)
    assert list(store.fields) == ["features.0"]
    said = Teacher.load(plan.teachers["vit"].folder)
    said.low_pass = 0.5
    images = torch.from_numpy(Store.open(plan.images.folder).read("image", [5, 900]))
    seen = said(images, features=True, layer=0).features
    assert (
        seen - Teacher.load(plan.teachers["vit"].folder)(images, features=True, layer=0).features
    ).abs().max() > 0.01
    stored = torch.from_numpy(store.read("features.0", [5, 900])).float()
    if pca is None:
        torch.testing.assert_close(stored, seen, rtol=2**-10, atol=1e-6)
    else:
        part = artefact.read_json(plan.pca["blurred"].manifest, "part")
        assert part["recipe"]["layer"] == 0 and part["quality"]["explained variance"] == pytest.approx(1, abs=1e-6)
        apart = (torch.cdist(x, x) for x in (stored, seen))
        torch.testing.assert_close(*apart, rtol=2e-2, atol=2e-2)
    for file in path_of(online).parent.glob("log.jsonl"):
        file.unlink()
    trained(plan)
    if pca is None:
        for one, other in zip(lines(plan), losses, strict=True):
            assert one["features"] == pytest.approx(other["features"], rel=2e-3, abs=1e-3)


def test_two_layers_of_one_teacher_share_a_store_but_no_components(make_plan):
    both = {name: {"features": {"teacher": "vit", "depth": 1, "hidden": 16, "layer": layer}} for name, layer in
            (("first", 0), ("last", 1))}  # fmt: skip
    runs = {name: {"alignment": name} for name in both}
    cached = {"trained": VIT, "cache": "features"}
    plan = make_targets(make_plan(teachers={"vit": cached}, alignments=both, runs=runs, defaults=DEFAULTS))
    store = Store.open(plan.targets["vit"].folder)
    assert sorted(store.fields) == ["features", "features.0"]
    rows = [3, 700]
    teacher, images = Teacher.load(plan.teachers["vit"].folder), Store.open(plan.images.folder).read("image", rows)
    for field, layer in {"features": None, "features.0": 0}.items():
        seen = teacher(torch.from_numpy(images), features=True, layer=layer).features
        torch.testing.assert_close(torch.from_numpy(store.read(field, rows)).float(), seen, rtol=2**-10, atol=1e-6)
    alone = make_plan(teachers={"vit": cached}, alignments=both, runs={"first": runs["first"]}, defaults=DEFAULTS)
    assert alone.targets["vit"].folder == plan.targets["vit"].folder  # what holds more serves
    with pytest.raises(ValueError, match=r"teachers\.vit\.pca: runs follow its layers the last, 0, but components are"):
        make_plan(teachers={"vit": {**cached, "pca": 3}}, alignments=both, runs=runs, defaults=DEFAULTS)
