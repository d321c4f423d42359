"""Times of training: distributions by position, and which samples count for alignment."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from haste.align.losses import feature_loss
from haste.config import process_in
from haste.data import order
from haste.data.batches import Batches
from haste.data.condition import Labels
from haste.diffusion.interpolant import Interpolant
from haste.diffusion.paths import COSINE, LINEAR
from haste.files.store import Store
from haste.train.step import bands_of


@pytest.fixture
def batches(make_plan):
    plan = make_plan()

    def make(size=8, process=None, **more):
        common = {"seed": 3, "condition": Labels(classes=10), "class_dropout": 0.1, "process": process or Interpolant()}
        return Batches(Store.open(plan.latents.folder), None, size=size, **common, **more)

    return make


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_lognormal_times_have_a_noise_ratio_whose_logarithm_is_normal(batches, path):
    timesteps = {"distribution": "lognormal", "mu": 1.0, "s": 0.5}
    times = batches(1000, Interpolant(path.name, timesteps))(0).t.double().numpy()
    ratio = [path.sigma(t) / path.alpha(t) for t in times]
    assert stats.kstest(np.log(ratio), "norm", args=(1.0, 0.5)).pvalue > 0.01


def test_times_are_a_function_of_position_and_uniform_ones_are_as_they_were(batches):
    lognormal = batches(process=Interpolant(timesteps={"distribution": "lognormal", "mu": 0.0, "s": 1.0}))
    assert torch.equal(lognormal(5, range(2, 6)).t, lognormal(5).t[2:6])
    uniform = batches()(5)
    expected = order.uniforms(3, "time", 5, range(8)).astype(np.float32)
    assert torch.equal(uniform.t, torch.from_numpy(expected))
    # and nothing else of a batch moves with them
    assert torch.equal(uniform.noise, lognormal(5).noise) and torch.equal(uniform.draw, lognormal(5).draw)


def test_a_recipe_says_how_times_are_drawn():
    def times(**training):
        return process_in({"training": training}).times(lambda _: np.array([0.25]), lambda _: np.array([2.0])).item()

    assert times(path="linear") == 0.25
    assert times(path="linear", timesteps={"distribution": "uniform", "mu": 0.0, "s": 1.0}) == 0.25
    found = times(path="cosine", timesteps={"distribution": "lognormal", "mu": 0.3, "s": 0.7})
    assert found == pytest.approx(2 / math.pi * math.atan(math.exp(0.3 + 0.7 * 2)))


def test_only_terms_with_a_bound_have_one():
    terms = {"features": {"t_min": 0.0}, "attention": {"t_min": 0.25}}
    assert bands_of(terms) == {"attention": (0.25, 1.0)}
    assert bands_of({"features": {}, "attention": {"t_min": 0.0, "t_max": 0.9}}) == {"attention": (0.0, 0.9)}


def test_weights_give_the_mean_over_the_samples_that_count_in_any_cut_of_the_batch(batches):
    made = batches(bands={"features": (0.4, 1.0), "attention": (0.1, 0.8)})
    for step in range(4):
        whole = made(step)
        values = torch.arange(8.0, dtype=torch.float64) ** 2
        for term, (low, high) in made.bands.items():
            counts = (whole.t >= low) & (whole.t <= high)
            assert 0 < counts.sum() < 8
            expected = values[counts].mean().item()
            parts = [made(step, range(i, i + 2)).weights[term] * values[i : i + 2] for i in range(0, 8, 2)]
            parts += [part.weights[term] * v for part, v in zip(whole.microbatches(4), values.chunk(4), strict=True)]
            assert sum(part.mean().item() for part in parts[:4]) / 4 == pytest.approx(expected, rel=1e-12)
            assert sum(part.mean().item() for part in parts[4:]) / 4 == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_a_band_is_the_mean_over_its_samples_alone_with_both_ends(batches):
    times = batches()(2).t.double()
    low, high = times.sort().values[2].item(), times.sort().values[5].item()
    whole = batches(bands={"features": (low, high)})(2)
    projected, target = (torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    inside = [i for i in range(8) if low <= times[i] <= high]
    assert len(inside) == 4
    each = [
        -sum(float(a @ b / a.norm() / b.norm()) for a, b in zip(projected[i], target[i], strict=True)) / 4
        for i in inside
    ]
    found = feature_loss(projected, target, whole.weights["features"]).item()
    assert found == pytest.approx(sum(each) / 4, rel=1e-12)


def test_where_no_sample_counts_all_weights_are_zero(batches):
    weights = batches(bands={"features": (1.0, 1.0)})(0).weights["features"]
    assert weights.tolist() == [0.0] * 8
    assert batches()(0).weights == {}


def test_chosen_places_are_distinct_and_follow_from_seed_and_step():
    places = order.choice(1, "negatives", 4, 50, 300)
    assert len(set(places.tolist())) == 50 and places.min() >= 0 and places.max() < 300
    assert (places == order.choice(1, "negatives", 4, 50, 300)).all()
    assert (places != order.choice(1, "negatives", 5, 50, 300)).any()
    assert sorted(order.choice(1, "negatives", 4, 50, 10)) == list(range(10))
    # every place is as likely: 400 steps of 10 in 40 expect 100 each, deviation 9
    counts = np.bincount(np.concatenate([order.choice(0, "n", step, 10, 40) for step in range(400)]), minlength=40)
    assert np.abs(counts - 100).max() < 5 * 9
