"""A trained toy, whose hidden states are measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from haste import config
from haste.measure import jobs
from haste.plan.plan import Plan
from haste.train import loop


@pytest.fixture(scope="session")
def pictures() -> Callable[..., dict[str, str]]:
    """A function that fills class folders with random pictures, to the section of a configuration that reads them."""

    def fill(folder: Path, classes: int = 10, count: int = 3) -> dict[str, str]:
        random = np.random.default_rng(0)
        for label in range(classes):
            (folder / f"{label}").mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (9, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{label}" / f"{i}.png")
        return {"source": "folder", "path": str(folder)}

    return fill


@pytest.fixture
def toy(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A function from measures, and changes of the configuration, to the plan of a toy in float64 whose state after 8
    steps is there."""
    monkeypatch.setitem(config.DENOISERS, "Toy", "toy_gradients:Toy")

    def make(changes: dict[str, Any] | None = None, **measures: dict[str, Any]) -> Plan:
        plan = make_plan(
            **(changes or {}),
            models={"dot": {"architecture": "Toy", "width": 16}},
            training={"batch": 4, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"},
            measures=measures,
            runs={"plain": {"milestones": [8], "measures": list(measures)}},
        )
        loop.train(plan, plan.state("plain", 8))
        return plan

    return make


@pytest.fixture
def measured() -> Callable[[Plan, str], dict[str, Any]]:
    """A function from a plan and the name of a measure to what its file says."""

    def measure(plan: Plan, label: str) -> dict[str, Any]:
        (what,) = (one.measurement for one in plan.measured if one.measurement.label == label)
        found = jobs.measure(plan, what, keep=True)
        assert found is not None
        return found

    return measure
