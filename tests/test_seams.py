"""A process and a condition of other packages, as the page on extending shows them, from training to scores."""

import math
import re
from types import SimpleNamespace

import numpy as np
import packages
import pytest
import torch
from safetensors.torch import load_file

from haste import config
from haste.cli import main as cli
from haste.data.batches import Batches
from haste.files import artefact, journal, provenance
from haste.files.npz import read_npz
from haste.files.store import Store
from haste.plan.plan import Plan
from haste.sampling.painter import Painter, latents
from haste.train import loop

NETWORK = """
```python
import torch
from torch import nn
from torch.nn import functional

from haste.config import Positive, Strict
from haste.models.denoiser import Denoiser
from haste.models.layers import timestep_features
from haste.networks.spec import Tap


class Cells(Denoiser):
    process, condition = "redraw", "direction"

    class Settings(Strict):
        width: Positive

    def __init__(self, *, input_size, in_channels, directions, width):
        super().__init__(input_size=input_size, in_channels=in_channels)
        self.taps = {"tokens.1": Tap((input_size, input_size), width)}
        self.cells, self.about = nn.Conv2d(in_channels, width, 3, padding=1), nn.Linear(256 + directions, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.out = nn.Conv2d(width, 2 * in_channels, 1)

    def forward(self, x, t, y, taps=()):
        if t.dtype != torch.long:
            raise TypeError(f"steps are {t.dtype}")
        about = self.about(torch.cat([timestep_features(t).to(y.dtype), y], dim=1))
        hidden = functional.silu(self.cells(x) + about[:, :, None, None])
        tokens = functional.silu(self.blocks[0](hidden.flatten(2).mT))
        found = self.out(tokens.mT.unflatten(2, x.shape[2:]))
        return found, {"tokens.1": tokens} if "tokens.1" in taps else {}
```

```toml
[project]
name = "my-cells"
version = "0.1"

[project.entry-points]
"haste.models" = { cells = "my_cells:Cells" }
```
"""
STEPS, LENGTH = 8, 2.0


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The packages where Python finds them."""
    texts = (packages.section("A process"), packages.section("A condition"), NETWORK)
    with packages.installed(tmp_path / "site", monkeypatch, *texts) as site:
        yield site


def changed(tiny, **more):
    """The tiny configuration with process, condition and network of the packages."""
    watch = {"trigger": "gradient-angle", "every": 4, "times": [0.4], "images": 8, "shards": 2, "threshold": -1}
    return tiny | {
        "models": {"dot": {"architecture": "cells", "width": 8}},
        "condition": {"name": "direction", "length": LENGTH},
        "alignments": {"REPA": {"features": {"teacher": "vit", "depth": 1, "hidden": 16, "t_min": 0.4}}},
        "training": {**tiny["training"], "process": {"name": "redraw", "steps": STEPS}},
        "sampling": {"mine": {"sampler": "redraw", "steps": 4, "count": 20, "guidance": 1.5, "interval": [0, 0.5]}},
        "defaults": {**tiny["defaults"], "sampling": ["mine"]},
        "runs": {"HASTE": {"alignment": "REPA", "stop": watch}},
        **more,
    }


def run_haste(world, *command):
    assert cli.main([*map(str, command), "-c", str(world.file)]) == 0, command


@pytest.fixture
def toy(world, installed):
    """A world whose latents carry directions."""
    of_labels = world.latents
    world.configure(**changed(world.raw))
    assert world.latents != of_labels
    for how in (["--shard", "0"], ["--shard", "1"], ["--join"]):
        run_haste(world, "latents", *how)
    return world


def test_process_and_condition_from_outside_are_trained_resumed_sampled_and_scored(toy, tmp_path, capsys, caplog):
    def said():
        return capsys.readouterr().err + caplog.text

    run_haste(toy, "plan")
    state = toy.plan.state("HASTE", 8)
    run_haste(toy, "train", state)
    whole, header = load_file(toy.state), provenance.provenance_of(toy.state)
    assert header["recipe"]["training"]["process"] == {"name": "redraw", "steps": STEPS}
    assert not {"path", "timesteps"} & set(header["recipe"]["training"])
    assert header["recipe"]["condition"] == {"name": "direction", "length": LENGTH}
    assert header["provenance"]["versions"].items() >= {"my-process": "0.1", "my-condition": "0.1"}.items()
    readings = header["triggers"]["features"]["readings"]
    assert [one["step"] for one in readings] == [4, 8] and all(abs(one["mean"]) < 1 for one in readings)
    for line in journal.read(toy.state.parent / "log.jsonl"):
        assert line["denoising"] == pytest.approx(line["mse"] + line["nll"], rel=1e-5)

    toy.state.unlink()  # and now with a stop on the way
    asked = iter([0, 0, 0, 0, 1])
    with pytest.raises(loop.Interrupted):
        loop.train(toy.plan, state, lambda: next(asked))
    torch.rand(7)  # whatever the process did in between
    run_haste(toy, "train", state)
    again = load_file(toy.state)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)

    evaluation = toy.row()
    for command in ("sample", "evaluate", "grid"):
        run_haste(toy, command, evaluation.name)
    found = read_npz(evaluation.sample_file(0), "samples")
    assert found["arr_0"].shape == (20, 8, 8, 3) and "arr_1" not in found
    assert np.linalg.norm(found["direction"], axis=1) == pytest.approx(LENGTH)
    assert found["nfe"].tolist() == [4] * 20
    with Store.open(evaluation.features.folder) as store:
        assert (store.read("direction", range(20)) == found["direction"]).all()
    score = artefact.read_json(evaluation.score, "score")
    assert score["scores"]["fd"] > 0 and "class_accuracy" not in score["scores"]

    exported = tmp_path / "bare.safetensors"
    assert cli.main(["export", str(toy.state), str(exported), "--format", "safetensors"]) == 0
    row = {"checkpoint": str(exported), "model": "dot", "sampling": ["mine"], "step": 8}
    toy.configure(**changed(toy.raw, evaluate={"it": row}))
    run_haste(toy, "sample", toy.plan.rows[-1].evaluation.name)
    same = read_npz(toy.plan.rows[-1].evaluation.sample_file(0), "samples")
    assert (same["arr_0"] == found["arr_0"]).all()
    other = {**toy.raw["training"], "process": {"name": "redraw", "steps": 5}}
    toy.configure(**changed(toy.raw, evaluate={"it": row}, training=other))
    assert cli.main(["sample", toy.plan.rows[-1].evaluation.name, "-c", str(toy.file)]) == 2
    assert "was trained by {'name': 'redraw', 'steps': 8}, but the row says {'name': 'redraw', 'steps': 5}" in said()


def test_steps_and_what_is_dropped_are_functions_of_position_at_the_asked_rates(toy):
    recipe = toy.plan.trajectories[toy.plan.state("HASTE", 8).trajectory].recipe
    store = Store.open(toy.latents)
    batches = Batches.of(
        {**recipe, "training": {**recipe["training"], "batch": 1600}}, store, bands={"features": (0.45, 1.0)}
    )
    whole, part = batches(3), batches(3, range(40, 60))
    steps, counts = (whole.t * (STEPS - 1)).round().unique(return_counts=True)
    assert steps.tolist() == list(range(STEPS)) and (counts - 200).abs().max() < 5 * 13.3  # 13.2 is a deviation
    none = (whole.condition == 0).all(dim=1)
    assert abs(int(none.sum()) - 160) < 5 * 12
    lengths = whole.condition[~none].norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, LENGTH))
    assert torch.equal(part.condition, whole.condition[40:60]) and torch.equal(part.t, whole.t[40:60])
    # 0.45 is nearest to step 3 of 0 .. 7, whose samples count though their time is 0.4286
    assert torch.equal(whole.weights["features"] > 0, (whole.t * (STEPS - 1)).round() >= 3)


# ---- against the closed form: latents of mean m(y), linear in y, and of one standard deviation where a sample is told
# y, of another where it is not

SPREAD = torch.tensor([[0.3, 0.5], [0.8, 1.2]], dtype=torch.float64)
SPREAD_OF_ALL = torch.tensor([[0.6, 0.9], [1.1, 1.8]], dtype=torch.float64)
MEANS = torch.tensor([[[1.0, -0.5], [0.25, 2.0]], [[0.0, 1.5], [-1.0, 0.75]]], dtype=torch.float64)  # by direction


def mean_of(y):
    return torch.einsum("bd,dhw->bhw", y, MEANS)


def coefficients(alpha, sigma, spread):
    """Bayes' rule for z of x = alpha z + sigma eps: its mean is a x + b m, and its variance."""
    total = (alpha * spread) ** 2 + sigma**2
    return alpha * spread**2 / total, sigma**2 / total, (spread * sigma) ** 2 / total


class Exact(torch.nn.Module):
    """Mean and log-variance of the latents given noisy ones."""

    process, in_channels, input_size = "redraw", 1, 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # a model has parameters, on a device

    def forward(self, x, k, y):
        assert k.dtype == torch.long
        y, angle = y.double()[:, :, None, None], math.pi / 2 * (k.double()[:, None, None, None] + 1) / STEPS
        spread = torch.where((y != 0).any(dim=1, keepdim=True), SPREAD, SPREAD_OF_ALL)
        a, b, variance = coefficients(angle.cos(), angle.sin(), spread)
        return torch.cat([a * x + b * mean_of(y[:, :, 0, 0])[:, None], variance.log()], dim=1), {}


def mean_and_variance(steps, guidance, until):
    """Of each latent cell of samples that are guided at steps up to `until`: the mean as a multiple of m, and the
    variance. Both follow from step to step, since all is affine in normal numbers."""
    factor, variance = torch.zeros_like(SPREAD), torch.ones_like(SPREAD)
    for place, k in enumerate(steps):
        alpha, sigma = math.cos(math.pi / 2 * (k + 1) / STEPS), math.sin(math.pi / 2 * (k + 1) / STEPS)
        if place:  # noised to this step; the first one is noise alone
            factor, variance = alpha * factor, alpha**2 * variance + sigma**2
        a, b, left = coefficients(alpha, sigma, SPREAD)
        if k <= until:  # uncond + guidance (cond - uncond), where uncond has no m; the variance is that of cond
            a, b = guidance * a + (1 - guidance) * coefficients(alpha, sigma, SPREAD_OF_ALL)[0], guidance * b
        factor, variance = a * factor + b, a**2 * variance + left
    return factor, variance


@pytest.mark.parametrize(
    ("guidance", "interval", "until"), [(1.0, [0, 1], -1), (2.0, [0, 1], 7), (2.0, [0, 0.65], 5)], ids=str
)
def test_samples_have_mean_and_covariance_of_the_closed_form(installed, guidance, interval, until):
    count = 8000
    recipe = {"classes": 10, "training": {"process": {"name": "redraw", "steps": STEPS}}}
    recipe["condition"] = {"name": "direction", "length": LENGTH}
    seams = config.process_in(recipe), config.condition_in(recipe)
    sampling = config.Sampling(sampler="redraw", steps=4, guidance=guidance, interval=interval, seed=3, count=count)
    rows = seams[1].sampled(sampling, range(count))
    painter = Painter(Exact(), sampling, SimpleNamespace(), *seams, 1.0, 0.0)
    z, asked = latents([painter], range(count), rows)
    assert asked.tolist() == [4] * count
    own = mean_of(torch.from_numpy(rows["direction"]).double())
    factor, variance = mean_and_variance([7, 5, 2, 0], guidance, until)
    if guidance == 1:  # then they are the data
        torch.testing.assert_close((factor, variance), (torch.ones_like(SPREAD), SPREAD**2))
    left = ((z[:, 0] - factor * own) / variance.sqrt()).flatten(1)  # standard normal, four to a sample
    # A mean deviates by 1 / sqrt(N), a variance by sqrt(2 / N), a covariance by 1 / sqrt(N): five of these are allowed.
    assert left.mean(dim=0).abs().max() < 5 / math.sqrt(count)
    assert (left.T @ left / count - torch.eye(4)).abs().max() < 5 * math.sqrt(2 / count)
    # On average over the circle m is 0, so the factor is looked at along m: its estimate deviates by this.
    along = (left * own.flatten(1)).mean(dim=0) / own.flatten(1).square().mean(dim=0)
    assert (along.abs() * own.flatten(1).norm(dim=0) < 5).all()
    again, _ = latents([painter], range(5, 9), {"direction": rows["direction"][5:9]})
    torch.testing.assert_close(again, z[5:9], rtol=1e-5, atol=1e-6)


# ---- what does not go together


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"condition": "labels"}, "condition: labels, but dot is a network that takes direction"),
        ({"condition": "directoin"}, "condition: nothing is called 'directoin'; did you mean 'direction'?"),
        ({"condition": {"name": "direction", "lenght": 1}}, "condition: unknown key 'lenght'; did you mean 'length'?"),
        (
            {"condition": {"name": "direction", "length": 0}},
            "condition.length: Input should be greater than 0, found 0",
        ),
        ({"models": {}, "runs": {"r": {"model": "SiT-S/2"}}}, "condition: direction, but SiT-S/2 is a network that"),
        (
            {"training": {"process": {"name": "redraw", "step": 2}}},
            "training.process: unknown key 'step'; did you mean",
        ),
        ({"training": {"process": {"name": "redraw", "steps": 1}}}, "training.process.steps: Input should be greater"),
        ({"training": {"process": "interpolant"}}, "training.process: the keys of interpolant are training.path and"),
        ({"training": {"path": "cosine"}}, "runs.HASTE: training.path is of interpolant, but dot is for redraw"),
        (
            {"runs": {"HASTE": {"training": {"path": "linear"}}}},  # the default, but written out
            "runs.HASTE: training.path is of interpolant, but dot is for redraw",
        ),
        (
            {"training": {"timesteps": {"distribution": "lognormal"}}},
            "runs.HASTE: training.timesteps is of interpolant, but dot is for redraw",
        ),
        (
            {"sampling": {"mine": {"sampler": "redraw", "steps": 4, "labels": "balanced"}}},
            "sampling.mine.labels: balanced, but samples are conditioned on direction, expected random",
        ),
        (
            {
                "evaluate": {
                    "it": {"checkpoint": "a", "model": "dot", "sampling": ["mine"], "step": 1, "path": "cosine"}
                }
            },
            "evaluate.it.path: cosine is a path of interpolant, but dot is for redraw",
        ),
    ],
)
def test_what_belongs_to_another_process_or_condition_is_refused_by_its_key(tiny, installed, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config.resolve(changed(tiny, **changes))


def test_settings_of_a_process_are_refused_for_a_network_of_the_interpolant(tiny, installed):
    tiny["training"]["process"] = {"name": "redraw"}
    with pytest.raises(ValueError, match=r"^runs\.vanilla: training\.process is of redraw, but dot is for interpolant"):
        config.resolve(tiny)


def test_a_sampler_that_does_not_suit_the_process_is_refused_before_anything_is_made(make_plan, tiny, installed):
    theirs = changed(tiny, sampling={"mine": {"sampler": "heun", "steps": 4, "count": 20}})
    with pytest.raises(
        ValueError, match="HASTE.sampling: mine uses heun, which is a sampler for interpolant, but dot is"
    ):
        Plan(config.resolve(theirs)).check()
    ours = make_plan(sampling={"quick": {"sampler": "redraw", "steps": 4, "count": 20}})
    with pytest.raises(ValueError, match="vanilla.sampling: quick uses redraw, which is a sampler for redraw, but dot"):
        ours.check()


def test_a_resolved_configuration_resolves_to_itself_and_defaults_are_the_same_name(tiny, installed):
    once = config.resolve(changed(tiny))
    assert config.resolve(once.model_dump(mode="json")) == once
    names = {
        str(Plan(config.resolve(changed(tiny, training={**tiny["training"], **given}))).state("HASTE", 8))
        for given in ({}, {"process": "redraw"}, {"process": {"name": "redraw", "steps": 8}})
    }
    other = {**tiny["training"], "process": {"name": "redraw", "steps": 9}}
    assert len(names) == 1 and str(Plan(config.resolve(changed(tiny, training=other))).state("HASTE", 8)) not in names


def test_samplers_of_this_package_are_for_the_process_that_the_schema_says(installed):
    from haste.config.schema import SAMPLERS
    from haste.diffusion import samplers

    assert {name: sampler.process for name, sampler in samplers.SAMPLERS.own.items()} == SAMPLERS
