"""The losses of one step against the formulas, in float64: which layers meet which, and how they add up."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from haste.align.losses import TeacherTargets
from haste.data.batches import Batch
from haste.diffusion.interpolant import Interpolant
from haste.models.heads import OneLayer
from haste.models.sit import SiT
from haste.train import loop
from haste.train.distributed import Group
from haste.train.state import Learner
from haste.train.step import Objective, gather_negatives

BATCH, CHANNELS, SIDE, CLASSES = 5, 3, 8, 4
WIDTH, HEADS, DEPTH, PATCH = 12, 3, 3, 2  # tokens of 4 x 4
TEACHER_WIDTH, TEACHER_HEADS, TEACHER_HEAD_WIDTH = 7, 3, 5
SCALE, SHIFT = 0.5, 0.25

# Two teachers, layers in no order, fewer heads than both sides have: nothing fits by chance.
TERMS = {
    "features": {"teacher": "one", "depth": 2, "weight": 0.5},
    "attention": {"teacher": "two", "student_layers": [2, 0], "teacher_layers": [1, 3], "heads": 2, "weight": 0.5},
}


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def sixty_fourths(seed, *shape):
    """Normal float32 numbers of so few bits that the arithmetic on them below is exact."""
    return ((normal(seed, *shape) * 64).round() / 64).float()


@pytest.fixture(scope="module")
def learner():
    model = SiT(
        input_size=SIDE,
        in_channels=CHANNELS,
        patch_size=PATCH,
        depth=DEPTH,
        width=WIDTH,
        heads=HEADS,
        classes=CLASSES,
    ).double()
    with torch.no_grad():  # the published start, with its zeros, would make all blocks the identity
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(0.4 * normal(seed, *parameter.shape))
    projectors = nn.ModuleDict({"features": OneLayer(WIDTH, TEACHER_WIDTH).double()})
    optimizer = torch.optim.AdamW(model.parameters())
    return Learner(model, model, projectors, optimizer, torch.amp.GradScaler("cpu", enabled=False))


@pytest.fixture(scope="module")
def batch():
    return Batch(
        step=0,
        moments=sixty_fourths(1, BATCH, 2 * CHANNELS, SIDE, SIDE).abs(),
        draw=sixty_fourths(2, BATCH, CHANNELS, SIDE, SIDE),
        noise=sixty_fourths(3, BATCH, CHANNELS, SIDE, SIDE),
        t=torch.tensor([0.0, 0.125, 0.5, 0.71875, 0.96875]),
        condition=torch.tensor([0, 3, 1, CLASSES, 2]),
        images=None,
    )


def targets_on(grid):
    """What two teachers say; both know features and layers 0 to 3, so that any wrong one can be taken."""
    tokens = grid[0] * grid[1]

    def say(seed):
        heads = (BATCH, TEACHER_HEADS, tokens, TEACHER_HEAD_WIDTH)
        layers = {i: (normal(seed + 2 * i, *heads), normal(seed + 2 * i + 1, *heads)) for i in range(4)}
        return TeacherTargets(normal(seed + 9, BATCH, tokens, TEACHER_WIDTH), layers, grid)

    return {"one": say(100), "two": say(200)}


# ---- the formulas, in numpy


def noised(batch, path):
    """x_t and the velocity, (B, C, h, w), of z = (mean + std n - shift) scale."""
    mean, std = np.split(batch.moments.double().numpy(), 2, axis=1)
    z = (mean + std * batch.draw.double().numpy() - SHIFT) * SCALE
    eps, t = batch.noise.double().numpy(), batch.t.double().numpy()[:, None, None, None]
    if path == "linear":
        return (1 - t) * z + t * eps, eps - z
    a = math.pi / 2
    return np.cos(a * t) * z + np.sin(a * t) * eps, -a * np.sin(a * t) * z + a * np.cos(a * t) * eps


def coarser(tokens, grid):
    """(..., 4 x 4, D) on the teacher's grid; halving bilinearly with half-pixel centres is the mean of 2 x 2 blocks."""
    tokens = tokens.detach().numpy()
    if grid == (4, 4):
        return tokens
    cells = tokens.reshape(*tokens.shape[:-2], 2, 2, 2, 2, tokens.shape[-1])  # row, row within, column, column within
    return cells.mean(axis=(-4, -2)).reshape(*tokens.shape[:-2], 4, tokens.shape[-1])


def softmax_rows(q, k):
    logits = np.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(logits)
    return weights / weights.sum(-1, keepdims=True)


def cross_entropy(student, teacher, heads):
    mine, theirs = softmax_rows(*student)[:, :heads], softmax_rows(*(x.numpy() for x in teacher))[:, :heads]
    return -(theirs * np.log(mine)).sum(-1).mean()


def minus_cosine(a, b):
    lengths = np.sqrt((a * a).sum(-1)) * np.sqrt((b * b).sum(-1))
    return -((a * b).sum(-1) / lengths).mean()


@pytest.mark.parametrize("grid", [(4, 4), (2, 2)], ids=["same-grid", "coarser-teacher"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_terms_of_two_layer_pairs_are_those_of_the_formulas(learner, batch, path, grid):
    targets = targets_on(grid)
    found = Objective(learner, TERMS, process=Interpolant(path), scale=SCALE, shift=SHIFT)(batch, targets)

    x, velocity = noised(batch, path)
    taps = {"tokens.2", "attention.2", "attention.0"}
    with torch.no_grad():
        predicted, tapped = learner.model(torch.from_numpy(x), batch.t.double(), batch.condition, taps=taps)
    head = learner.projectors["features"].projection_layer
    tokens = coarser(tapped["tokens.2"], grid) @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    pairs = [
        cross_entropy(
            [coarser(tap, grid) for tap in tapped[f"attention.{mine}"][:2]], targets["two"].attention[theirs], 2
        )
        for mine, theirs in [(2, 1), (0, 3)]
    ]
    assert abs(pairs[0] - pairs[1]) > 0.01  # unequal, or an average would tell nothing
    expected = {
        "denoising": ((predicted.numpy() - velocity) ** 2).mean(),
        "features": minus_cosine(tokens, targets["one"].features.numpy()),
        "attention": (pairs[0] + pairs[1]) / 2,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-10), name


def spatial(target, factor):
    """iREPA's normalisation of (B, N, D) over tokens."""
    return (target - factor * target.mean(1, keepdims=True)) / (target.std(1, keepdims=True, ddof=1) + 1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (2, 2)], ids=["same-grid", "coarser-teacher"])
def test_a_convolution_over_the_teachers_grid_follows_normalised_features_in_a_band_of_t(learner, batch, grid):
    term = {**TERMS["features"], "head": "conv", "kernel": 3, "normalise": "spatial", "normalise_factor": 0.6}
    head, targets = OneLayer(WIDTH, TEACHER_WIDTH, kernel=3).double(), targets_on(grid)
    counts = np.array([0.0, 2.5, 2.5, 0.0, 0.0])  # of t from 0.1 to 0.6, as a batch of five has them
    weighed = replace(batch, weights={"features": torch.from_numpy(counts)})
    own = replace(learner, projectors=nn.ModuleDict({"features": head}))
    found = Objective(own, {"features": term}, process=Interpolant(), scale=SCALE, shift=SHIFT)(weighed, targets)

    x, _ = noised(batch, "linear")
    with torch.no_grad():
        _, tapped = learner.model(torch.from_numpy(x), batch.t.double(), batch.condition, taps={"tokens.2"})
    tokens = coarser(tapped["tokens.2"], grid).reshape(BATCH, *grid, WIDTH)
    around = np.pad(tokens, ((0, 0), (1, 1), (1, 1), (0, 0)))
    weight, bias = (value.detach().numpy() for value in head.state_dict().values())
    projected = bias + sum(
        around[:, i : i + grid[0], j : j + grid[1]] @ weight[:, :, i, j].T for i in range(3) for j in range(3)
    )
    expected = spatial(targets["one"].features.numpy(), 0.6)
    values = [minus_cosine(projected.reshape(BATCH, -1, TEACHER_WIDTH)[b], expected[b]) for b in (1, 2)]
    assert found["features"].item() == pytest.approx(sum(values) / 2, rel=1e-10)


def test_negatives_of_normalised_features_are_normalised_too():
    features, term = normal(5, 3, 4, 7), {"negative_count": 12, "normalise": "spatial", "normalise_factor": 0.6}
    found, places = gather_negatives(
        features, range(3), {"features": term}, seed=0, step=0, size=3, group=Group(0, 1, torch.device("cpu"))
    )
    assert sorted(places.tolist()) == list(range(12))
    np.testing.assert_allclose(found, spatial(features.numpy(), 0.6).reshape(12, 7)[places], rtol=1e-12)


def test_without_alignment_there_is_only_the_denoising_term(learner, batch):
    found = Objective(learner, {}, process=Interpolant(), scale=SCALE, shift=SHIFT)(batch, {})
    x, velocity = noised(batch, "linear")
    with torch.no_grad():
        predicted, _ = learner.model(torch.from_numpy(x), batch.t.double(), batch.condition)
    assert set(found) == {"denoising"}
    assert found["denoising"].item() == pytest.approx(((predicted.numpy() - velocity) ** 2).mean(), rel=1e-10)


@pytest.mark.parametrize("names", [["mse"], ["denoising", "features"]], ids=" and ".join)
def test_losses_of_a_process_need_the_one_that_is_trained_and_take_no_name_of_an_alignment(learner, batch, names):
    class Other(Interpolant):
        def losses(self, *given):
            return dict.fromkeys(names, super().losses(*given)["denoising"])

    objective = Objective(learner, {}, process=Other(), scale=SCALE, shift=SHIFT)
    with pytest.raises(
        ValueError, match=rf"Other: its losses are {', '.join(names)}; expected denoising, and not feat"
    ):
        objective(batch, {})


def test_a_loss_that_is_not_finite_is_found_before_a_save_that_no_log_line_precedes(make_plan, monkeypatch):
    plan = make_plan(runtime={"save_every": 2, "log_every": 1000, "trackers": []})
    forward = Objective.forward

    def broken(self, batch, *more):
        found = forward(self, batch, *more)
        return {**found, "denoising": found["denoising"] * float("nan")} if batch.step == 2 else found

    monkeypatch.setattr(Objective, "forward", broken)
    with pytest.raises(FloatingPointError, match="denoising and grad_norm not finite at step 3"):
        loop.train(plan, plan.state("vanilla", 8))
    kept = list(Path(plan.root, "states").rglob("*.safetensors"))
    assert [path.name for path in kept] == ["step-00000002.safetensors"]
    assert all(torch.isfinite(value).all() for value in load_file(kept[0]).values())
