"""What alignment terms cost: operations against arithmetic, memory against what is known to be in it. No times."""

import pytest
import torch

from haste import config
from haste.measure import jobs
from haste.measure.steps import cpu_peak_megabytes
from haste.train import loop

SPEC = {"measure": "cost", "alignment": "HASTE", "batch": 4, "turns": 2, "steps": 1}


@pytest.fixture
def plan(make_plan):
    runs = {"vanilla": {"milestones": [1, 2], "seeds": [0, 1], "measures": ["cost"]}}
    return make_plan(measures={"cost": SPEC}, runs=runs)


def test_operations_are_those_of_arithmetic_and_memory_holds_at_least_what_must_be_in_it(plan):
    ((run, step, seed, what),) = [(one.run, one.step, one.seed, one.measurement) for one in plan.measured]
    assert (run, step, seed) == ("vanilla", 2, 0)  # all states cost the same: it is taken of the last one alone
    loop.train(plan, what.state)
    found = jobs.measure(plan, what, keep=False)
    rows = {row["terms"]: row for row in found["rows"]}
    assert list(rows) == ["vanilla", "features", "attention", "features + attention"]
    assert {row["batch"] for row in rows.values()} == {4}
    # The student: 2 blocks of width 16, 4 tokens of patches of 2 x 2 x 4.
    width, tokens, attended = 16, 4, 2 * 2 * 4**2 * 16
    whole = 2 * (12 * width**2 * tokens + 6 * width**2) + tokens * 16 * width  # blocks and their modulation, patches
    whole += 256 * width + width**2 + 2 * width**2 + tokens * width * 16  # time, final layer
    data = tokens * 16 * width + 256 * width  # the first layers, whose inputs have no gradient
    student = 3 * whole - data + 3.5 * attended  # backward, attention computes its logits again
    projector = 3 * tokens * 3 * width**2
    maps = 2 * 4 * 4**2 * 16  # of 2 layers: teacher's, student's, gradients of queries and of keys
    expected = {"vanilla": 0, "features": projector, "attention": maps, "features + attention": projector + maps}
    # The teacher: 2 blocks of width 16, 4 patches of 4 x 4 x 3 and a class token.
    teacher = 2 * (12 * width**2 * 5 + 2 * 5**2 * width) + 4 * 48 * width
    for name, more in expected.items():
        assert rows[name]["student GMAC"] == pytest.approx((student + more) / 1e9, rel=1e-9), name
        assert rows[name]["teacher GMAC"] == pytest.approx(teacher / 1e9 if more else 0, rel=1e-9), name
    # Weights, gradients, two moments, average: 4 bytes each.
    facts = config.facts_in(plan.trajectories[what.state.trajectory].recipe)
    vanilla = rows["vanilla"]
    assert 20 * facts.parameters / 1e6 < vanilla["peak MB"] < 40 * facts.parameters / 1e6
    assert rows["features"]["peak MB"] > vanilla["peak MB"] + 16 * (3 * width * (width + 1)) / 1e6
    for row in rows.values():
        assert row["MB / vanilla"] == pytest.approx(row["peak MB"] / vanilla["peak MB"])
    (note,) = found["notes"]
    assert note.startswith("images/s are of this machine alone, ") and ", 1 threads, fp32, one process" in note


def test_peak_memory_is_what_was_held_and_the_most_that_was_allocated_beside_it():
    held = [torch.zeros(10**6), torch.zeros(10**6, dtype=torch.float64)]

    def work():
        first = torch.empty(3 * 10**6)
        del first
        return torch.empty(10**6).add_(1).add(torch.ones(10**6))  # two, and their sum

    assert cpu_peak_megabytes(work, held) == pytest.approx(4 + 8 + 12, abs=0.01)
    assert cpu_peak_megabytes(lambda: None, held) == 12


def test_a_batch_beyond_that_of_training_is_refused_before_anything_runs(tiny):
    tiny |= {"measures": {"cost": {**SPEC, "batch": 9}}, "runs": {"plain": {"measures": ["cost"]}}}
    with pytest.raises(ValueError, match=r"measures\.cost\.batch: 9, but training\.batch is 8 \(on plain\)"):
        config.resolve(tiny)
