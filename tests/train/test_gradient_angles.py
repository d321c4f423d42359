"""Angles between gradients: what a reading says, image by image in float64, and that training knows nothing of it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_gradients import ALIGNED, cosine, image_gradients

from haste import config
from haste.data import order
from haste.data.batches import Batches
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.teachers import encoder, targets
from haste.train import loop, stops
from haste.train.gradient_angles import Angles

# Readings after steps 6, 8, ...; no cosine is below -2.
NEVER = {"trigger": "gradient-angle", "after": 4, "every": 2, "threshold": -2, "images": 14, "shards": 3}
AT_ONCE = {**NEVER, "threshold": 1}
QUICK = {"save_every": 3, "log_every": 1, "trackers": []}


def watched(make_plan, monkeypatch, stop, architecture="Toy", **changes):
    monkeypatch.setitem(config.DENOISERS, architecture, f"toy_gradients:{architecture}")
    return make_plan(
        models={"dot": {"architecture": architecture, "width": 16}},
        alignments={"HASTE": ALIGNED},
        training={"batch": 4, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"},
        runs={"HASTE": {"alignment": "HASTE", "stop": stop}},
        runtime={**QUICK, "keep_every": 1},
        **changes,
    )


def records(plan, step, run="HASTE"):
    return read_header(plan.path(plan.state(run, step)))["triggers"]


# Latents are drawn in float32, whatever follows: what is computed in float64 here and there agrees to that.
def expected_values(plan, step, times, blocks, terms):
    """Name -> value, of 14 images in 3 groups."""
    tensors = load_file(plan.path(plan.state("HASTE", step)))
    count = len(Store.open(plan.latents.folder).range("train"))
    images = order.choice(0, "measured images", 0, 14, count)
    groups = [range(0, 4), range(4, 9), range(9, 14)]
    at = {}
    for t in times:
        for block in blocks:
            each = [image_gradients(plan, tensors, image, t, block, (step - 1) / 20) for image in images]
            use = [i for i, kind in enumerate(("features", "attention")) if kind in terms and (i == 0 or t >= 0.3)]
            at[t, block] = [(sum(one[i] for i in use), one[2]) for one in each]

    def mean(pairs, without=()):
        kept = [i for i in range(14) if i not in without]
        sums = [[sum(at[pair][i][which] for i in kept) for which in (0, 1)] for pair in pairs]
        return float(np.mean([cosine(a, d) for a, d in sums]))

    def error(pairs):
        left = np.array([mean(pairs, group) for group in groups])
        return math.sqrt(2 / 3 * ((left - left.mean()) ** 2).sum())

    found = {"mean": mean(list(at)), "error": error(list(at))}
    for t in times:
        pairs = [pair for pair in at if pair[0] == t]
        found |= {f"t={t}": mean(pairs), f"t={t} error": error(pairs)}
    return found


def test_a_reading_is_the_angle_of_gradients_that_are_summed_image_by_image(make_plan, monkeypatch):
    own = {**NEVER, "of": "own", "times": [0.9], "every": 4}  # the block after which features are read has none of it
    stop = {"features": {**NEVER, "times": [0.1, 0.625], "block": [2, 1]}, "attention": own}
    plan = watched(make_plan, monkeypatch, stop)
    loop.train(plan, plan.state("HASTE", 8))
    found = records(plan, 8)
    assert [reading["step"] for reading in found["features"]["readings"]] == [6, 8]
    (at_8,) = found["attention"]["readings"]
    expected = expected_values(plan, 8, [0.9], [3], ["attention"])
    assert at_8 == {"step": 8, **{name: pytest.approx(value, abs=3e-8) for name, value in expected.items()}}
    expected = expected_values(plan, 8, [0.1, 0.625], [1, 2], ["features", "attention"])
    at_8 = found["features"]["readings"][-1]
    assert at_8 == {"step": 8, **{name: pytest.approx(value, abs=3e-8) for name, value in expected.items()}}
    assert 0 < expected["error"] < 1 and abs(expected["t=0.1"] - expected["t=0.625"]) > 0.01


def test_two_terms_that_ask_the_same_are_told_the_same_by_one_measurement_and_stop_together(make_plan, monkeypatch):
    measured, products = [], Angles._products
    monkeypatch.setattr(Angles, "_products", lambda *args: (measured.append(args[1].done), products(*args))[1])
    plan = watched(make_plan, monkeypatch, {**AT_ONCE, "patience": 2})
    loop.train(plan, plan.state("HASTE", 16))
    assert measured == [6, 8]
    found = records(plan, 16)
    assert found["features"]["readings"] == found["attention"]["readings"]
    stopped = stops.read(Path(plan.path(plan.state("HASTE", 16))).parent)
    assert {kind: one.step for kind, one in stopped.items()} == {"features": 8, "attention": 8}
    assert stopped["features"].reason.endswith("is below 1, at 2 of 2 readings in a row")
    assert found["features"]["seconds"] > found["attention"]["seconds"] > 0


def test_there_may_be_fewer_images_than_are_asked_for(make_plan, monkeypatch):
    images = {"source": "digits", "resolution": 8, "classes": 10, "holdout": 97, "shards": 2}
    plan = watched(make_plan, monkeypatch, {**NEVER, "images": 99_999, "every": 4}, images=images)
    rows = []
    measured = Batches.measured
    monkeypatch.setattr(
        Batches,
        "measured",
        lambda self, held, mine: (rows.extend(held[list(mine)]), measured(self, held, mine))[1],
    )
    loop.train(plan, plan.state("HASTE", 8))
    assert sorted(rows) == list(range(1700))


def test_a_reading_that_is_no_number_is_not_made(make_plan, monkeypatch, caplog):
    """As with a gradient of 0 or one that overflowed."""
    monkeypatch.setattr(Angles, "_products", lambda self, asked: np.zeros((len(asked.times), 1, 2, 3, 2, 3)))
    plan = watched(make_plan, monkeypatch, AT_ONCE)
    loop.train(plan, plan.state("HASTE", 8))
    assert records(plan, 8)["features"]["readings"] == []
    assert "step 6: no reading for features: t=0.02, t=0.02 error" in caplog.text


# ---- training knows nothing of it

CONTRAST = {
    "teacher": "vit", "depth": 1, "hidden": 16, "similarity": "nt-xent", "negatives": "batch", "negative_count": 13,
}  # fmt: skip
WAYS = {
    "plain": {},
    "accumulated, blocks computed again": {"runtime": {**QUICK, "accumulate": 2, "checkpoint_blocks": True}},
    "bf16": {"training": {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "bf16"}},
    "fp16": {"training": {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "fp16"}},
    "negatives of the batch": {"alignments": {"HASTE": {"features": CONTRAST}}},
    "targets on disk": {},
}


def same(found, expected):
    found = {name: value for name, value in found.items() if not name.startswith("readings/")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_never_fires_is_the_run_that_never_stops_and_one_that_fires_the_one_that_stops_there(
    make_plan, tiny, way
):
    runs = {"never": NEVER, "none": None, "fires": AT_ONCE, "by hand": 6}
    changes = {"runtime": QUICK, **WAYS[way]}
    if way == "targets on disk":
        changes["teachers"] = {"vit": {**tiny["teachers"]["vit"], "cache": "features+attention"}}
    plan = make_plan(**changes, runs={name: {"alignment": "HASTE", "stop": stop} for name, stop in runs.items()})
    if way == "targets on disk":
        for shard in range(plan.targets["vit"].shards):
            targets.make_shard(plan, "vit", shard)
        targets.join_shards(plan, "vit")
    ends = {}
    for name, steps in {"none": (8, 16), "never": (8, 16), "by hand": (6, 16), "fires": (16,)}.items():
        for step in steps:
            loop.train(plan, plan.state(name, step))
        ends[name] = load_file(plan.path(plan.state(name, 16)))
    same(ends["never"], ends["none"])
    same(ends["fires"], ends["by hand"])
    (kind, found), *_ = records(plan, 16, "never").items()
    assert [reading["step"] for reading in found["readings"]] == [6, 8, 10, 12, 14, 16]
    assert all(-1 <= reading["mean"] <= 1 and 0 < reading["error"] < 1 for reading in found["readings"])
    assert len({reading["mean"] for reading in found["readings"]}) == 6
    assert records(plan, 16, "fires")[kind]["stopped"]["step"] == 6


def test_measuring_looks_at_an_image_once_leaves_no_gradient_and_draws_no_random_number(make_plan, monkeypatch):
    products, look, left, looked = Angles._products, encoder.Teacher.__call__, [], []

    def watching(self, asked):
        before, steps = torch.random.get_rng_state(), len(looked)
        found = products(self, asked)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert sum(looked[steps:]) == 14
        left.append([p.grad for p in self.objective.parameters() if p.grad is not None])
        return found

    monkeypatch.setattr(Angles, "_products", watching)
    monkeypatch.setattr(
        encoder.Teacher, "__call__", lambda self, x, **more: (looked.append(len(x)), look(self, x, **more))[1]
    )
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE", "stop": NEVER}}, runtime=QUICK)
    loop.train(plan, plan.state("HASTE", 8))
    assert left == [[], []]


def test_the_number_of_images_at_once_changes_a_reading_by_rounding_only(make_plan, monkeypatch):
    plan = watched(make_plan, monkeypatch, {**NEVER, "every": 4})
    loop.train(plan, plan.state("HASTE", 8))
    (expected,) = records(plan, 8)["features"]["readings"]
    made = Angles.__init__
    monkeypatch.setattr(Angles, "__init__", lambda self, *args, part, **more: made(self, *args, part=3, **more))
    Path(plan.path(plan.state("HASTE", 8))).unlink()
    loop.train(plan, plan.state("HASTE", 8))
    (found,) = records(plan, 8)["features"]["readings"]
    assert found == pytest.approx(expected, rel=1e-9)


# ---- what cannot be measured is refused beforehand


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({**NEVER, "block": 4}, "runs.HASTE.stop.features.block: 4, but the network has blocks 1 to 3"),
        (
            {"features": {**NEVER, "of": "own", "block": 3}},
            "runs.HASTE.stop.features.block: 3, but at t=0.02 the loss of features reaches no block after 2",
        ),
        (
            {"attention": {**NEVER, "of": "own"}},
            "runs.HASTE.stop.attention.times: 0.02 is not from t_min to t_max of attention: nothing is aligned there",
        ),
        (  # once features have stopped
            {"attention": NEVER, "features": 5},
            "runs.HASTE.stop.attention.times: 0.02 is not from t_min to t_max of attention: nothing is aligned there",
        ),
        (
            {"attention": NEVER, "features": 0},
            "runs.HASTE.stop.attention.times: 0.02 is not from t_min to t_max of attention: nothing is aligned there",
        ),
        (  # attention alone reaches block 3, and does not count there
            {**NEVER, "block": [1, 3]},
            "runs.HASTE.stop.features.block: 3, but at t=0.02 the loss of features reaches no block after 2",
        ),
    ],
)
def test_angles_that_no_step_could_measure_are_refused_by_the_key(make_plan, monkeypatch, stop, said):
    with pytest.raises(ValueError) as refusal:
        watched(make_plan, monkeypatch, stop)
    assert said in str(refusal.value).splitlines()


def test_a_network_whose_blocks_cannot_be_told_apart_is_refused(make_plan, monkeypatch):
    with pytest.raises(ValueError, match=r"^runs\.HASTE\.stop\.features\.block: gradients are taken by block, but the"):
        watched(make_plan, monkeypatch, NEVER, "NoBlocks")
    assert watched(make_plan, monkeypatch, 5, "NoBlocks")
