"""What a segment is trained with can be opened, and its losses asked for, by whoever does not train."""

from pathlib import Path

import pytest
import torch

from haste.files import journal
from haste.plan.names import State
from haste.teachers import targets
from haste.train import loop, state
from haste.train.distributed import Group
from haste.train.inputs import Inputs


@pytest.mark.parametrize("cache", [None, "features"])
def test_the_losses_of_a_saved_state_are_those_that_the_log_says_of_the_step_after_it(make_plan, tiny, cache):
    teachers = {"vit": {**tiny["teachers"]["vit"], **({"cache": cache} if cache else {})}}
    training = {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"}
    plan = make_plan(teachers=teachers, training=training, runtime={"log_every": 1, "keep_every": 1})
    for shard in range(plan.targets["vit"].shards if cache else 0):
        targets.make_shard(plan, "vit", shard)
    if cache:
        targets.join_shards(plan, "vit")
    path = loop.train(plan, plan.state("HASTE", 8))

    trajectory = plan.trajectories[path.parent.name]
    inputs = Inputs(plan, plan.segment(plan.state("HASTE", 8)), trajectory.recipe, Group(0, 1, torch.device("cpu")))
    learner, before = inputs.learner(), Path(plan.path(State(trajectory.name, 7)))
    state.restore(learner, state.read(before, key=trajectory.key)[1], before)
    batch = inputs.batches(7)
    with torch.no_grad():
        found = inputs.objective(learner)(batch, inputs.targets(batch))
    said = journal.read(path.parent / "log.jsonl")[-1]
    assert said["step"] == 8 and found.keys() == {"denoising", "features", "attention"}
    assert {name: value.item() for name, value in found.items()} == {
        name: pytest.approx(said[name], rel=1e-12) for name in found
    }
