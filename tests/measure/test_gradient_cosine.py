"""Cosines between gradients, of any state: against gradients that are summed image by image in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_gradients import ALIGNED, cosine, image_gradients

from haste import config
from haste.data import order
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.measure import gradient_cosine, jobs
from haste.train import loop

SPEC = {"measure": "gradient-cosine", "images": 14, "shards": 3, "t": [0.1, 0.625], "blocks": "all"}
GROUPS = [range(0, 4), range(4, 9), range(9, 14)]


@pytest.fixture
def plan(make_plan, monkeypatch):
    """Of a toy in float64 whose state after 8 steps is there."""
    monkeypatch.setitem(config.DENOISERS, "Toy", "toy_gradients:Toy")
    measures = {"all": SPEC, "one": {**SPEC, "blocks": [2], "t": [0.625], "shards": 2}, "averaged": {**SPEC}}
    measures["averaged"]["weights"] = "ema"
    plan = make_plan(
        models={"dot": {"architecture": "Toy", "width": 16}},
        alignments={"HASTE": ALIGNED},
        training={"batch": 4, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"},
        measures=measures,
        runs={"HASTE": {"alignment": "HASTE", "milestones": [8], "measures": list(measures)}},
    )
    loop.train(plan, plan.state("HASTE", 8))
    return plan


def measured(plan, label):
    (what,) = (one.measurement for one in plan.measured if one.measurement.label == label)
    return jobs.measure(plan, what, keep=True)


def placed(found):
    return {(row["term"], row["t"], row["block"]): row for row in found["rows"]}


def test_a_cosine_is_that_of_gradients_summed_image_by_image(plan):
    found = measured(plan, "all")
    rows, tensors = placed(found), load_file(plan.path(plan.state("HASTE", 8)))
    images = order.choice(0, "measured images", 0, 14, len(Store.open(plan.latents.folder).range("train")))
    uses = {"features": [0], "attention": [1], "alignment": [0, 1]}
    expected = {}
    for t, block in ((t, block) for t in SPEC["t"] for block in (1, 2, 3)):
        each = [image_gradients(plan, tensors, image, t, block) for image in images]
        # Features are aligned at block 2, attention up to block 3 and from t 0.3 on.
        kinds = [*(["features"] if block < 3 else []), *(["attention", "alignment"] if t >= 0.3 else [])]
        for kind in kinds:
            pairs = [(sum(one[i] for i in uses[kind]), one[2]) for one in each]
            value = cosine(sum(a for a, _ in pairs), sum(d for _, d in pairs))
            kept = [[pair for i, pair in enumerate(pairs) if i not in group] for group in GROUPS]
            left = np.array([cosine(sum(a for a, _ in some), sum(d for _, d in some)) for some in kept])
            expected[kind, t, block] = value, math.sqrt(2 / 3 * ((left - left.mean()) ** 2).sum())
    assert rows.keys() == expected.keys()
    for place, (value, error) in expected.items():
        assert rows[place]["cosine"] == pytest.approx(value, abs=3e-8), place
        assert rows[place]["error"] == pytest.approx(error, abs=3e-8), place
    assert found["notes"] == ["attention is not aligned at t 0.1: not from its t_min to t_max"]


def test_groups_passes_and_other_blocks_change_nothing_but_rounding(plan, monkeypatch):
    rows = placed(measured(plan, "all"))
    monkeypatch.setattr(gradient_cosine, "MOST_BYTES", 1)
    some = placed(measured(plan, "one"))
    assert {place[0] for place in some} == {"features", "attention", "alignment"}
    for place, row in some.items():
        assert row["cosine"] == pytest.approx(rows[place]["cosine"], rel=1e-9)
        assert row["error"] != rows[place]["error"]


def test_the_averaged_weights_are_measured_where_they_are_asked_for(plan):
    raw, averaged = (placed(measured(plan, label)) for label in ("all", "averaged"))
    path = plan.path(plan.state("HASTE", 8))
    tensors, header = load_file(path), read_header(path)
    tensors |= {f"model/{name[4:]}": value.clone() for name, value in tensors.items() if name.startswith("ema/")}
    save_file(tensors, path, metadata={"haste": json.dumps(header)})
    for file in Path(plan.root).glob("measures/*/*.json"):
        file.unlink()
    assert placed(measured(plan, "all")) == averaged != raw


def test_a_cosine_that_is_no_number_is_refused_with_its_place_and_no_file_is_left(plan):
    path = plan.path(plan.state("HASTE", 8))
    tensors, header = load_file(path), read_header(path)
    tensors["model/out.weight"] = torch.zeros_like(tensors["model/out.weight"])  # the denoising loss reaches no block
    save_file(tensors, path, metadata={"haste": json.dumps(header)})
    with pytest.raises(FloatingPointError, match=r"cosine at term features, t 0\.1, block 1 is nan, expected a finite"):
        measured(plan, "all")
    assert not list((Path(plan.root) / "measures").glob("**/*.json"))
