"""What one step computes: golden losses, weights of terms, nothing beyond what was asked."""

import json
from pathlib import Path

import pytest
import torch
from make_golden import VARIANTS

from haste.files import journal
from haste.train import loop
from haste.train.state import new_learner, tensors_of
from haste.train.step import average, taps_of, total_loss, update

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_first_ten_losses_are_the_golden_ones(make_plan, tiny, name):
    architecture, run = "dit" if name.startswith("DiT") else "sit", name.removeprefix("DiT ")
    plan = make_plan(
        **(VARIANTS if name in VARIANTS["runs"] else {}),
        models={"dot": {**tiny["models"]["dot"], "architecture": architecture}},
        runtime={"log_every": 1, "save_every": 100},
        defaults={"model": "dot", "milestones": [10], "sampling": ["quick"]},
    )
    loop.train(plan, plan.state(run, 10))
    records = journal.read(Path(plan.path(plan.state(run, 10))).parent / "log.jsonl")
    found = [{loss: record[loss] for loss in GOLDEN[name][0]} for record in records]
    assert len(found) == 10
    for step, (got, want) in enumerate(zip(found, GOLDEN[name], strict=True)):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5), f"step {step}"


def test_a_term_that_is_off_costs_no_tap():
    assert taps_of({}) == set()
    features = {"features": {"depth": 3}}
    attention = {"attention": {"student_layers": [0, 2]}}
    assert taps_of(features) == {"tokens.3"}
    assert taps_of({**features, **attention}) == {"tokens.3", "attention.0", "attention.2"}


def test_the_total_is_the_weighted_sum():
    found = {"denoising": torch.tensor(2.0), "features": torch.tensor(-0.5), "attention": torch.tensor(3.0)}
    terms = {"features": {"weight": 0.5}, "attention": {"weight": 0.25}}
    assert total_loss(found, terms, 7).item() == 2.0 - 0.25 + 0.75
    assert total_loss(found, {}, 7).item() == 2.0


def test_the_total_follows_warm_up_and_ramp():
    found = {"denoising": torch.tensor(1.0), "features": torch.tensor(2.0), "attention": torch.tensor(8.0)}
    terms = {
        "features": {"weight": 0.5, "warmup": 4},
        "attention": {"weight": 0.25, "ramp": {"from": 2, "to": 10, "shape": "linear"}},
    }
    totals = [total_loss(found, terms, step).item() for step in (0, 1, 4, 6, 9)]
    assert totals == [1 + 0 + 2, 1 + 0.25 + 2, 1 + 1 + 1.5, 1 + 1 + 1, 1 + 1 + 0.25]


def learner_of(plan, run, terms=("features",)):
    recipe = plan.trajectories[plan.state(run, 8).trajectory].recipe
    active = {kind: plan.segment(plan.state("REPA", 8)).terms[kind] for kind in terms}
    return new_learner(recipe, active, {"vit": 16})


def test_a_projector_never_moves_the_models_first_numbers(make_plan):
    plan = make_plan()
    without, beside = learner_of(plan, "vanilla", ()), learner_of(plan, "vanilla")
    for name, value in tensors_of(without).items():
        assert torch.equal(tensors_of(beside)[name], value), name


def test_the_average_is_a_lerp_of_every_parameter(make_plan):
    learner = learner_of(make_plan(), "vanilla", ())
    before = {name: value.clone() for name, value in learner.ema.named_parameters()}
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(1.0)
    average(learner, 0.75)
    for name, value in learner.ema.named_parameters():
        torch.testing.assert_close(value.data, 0.75 * before[name] + 0.25 * learner.model.get_parameter(name))


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(make_plan):
    learner = learner_of(make_plan(), "vanilla", ())
    weight = learner.model.final_layer.linear.weight
    taken = []
    learner.optimizer.register_step_pre_hook(lambda *_: taken.append(weight.grad.norm().item()))
    (10 * weight.sum()).backward()
    norm = update(learner, clip=1.0, ema=0.9, skip=False)
    assert norm.item() == pytest.approx(10 * weight.numel() ** 0.5)
    assert taken == [pytest.approx(1.0, rel=1e-4)]
