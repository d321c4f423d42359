"""A tiny world: every part and store of a configuration of seconds, made once by the package's own commands."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from haste import cli, config
from haste.plan import Plan

TINY: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The tiny configuration as plain data, free to be changed."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def _finished_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "results"
    path = root.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "results": str(root)}))
    shards = [["--shard", "0"], ["--shard", "1"], ["--join"]]
    steps = [["images", *how] for how in shards]
    steps += [["autoencoder"], ["teacher", "vit"], ["detector"], ["reference"], *(["latents", *how] for how in shards)]
    for step in steps:
        assert cli.main([step[0], "-c", str(path), *step[1:]]) == 0, step
    return root


@pytest.fixture
def make_plan(_finished_data: Path, tmp_path: Path) -> Callable[..., Plan]:
    """A function from changes of the tiny configuration to its plan, over a results folder of this test's own.

    Stores and parts are there; nothing is trained. `plan.file` is the configuration on disk.
    """
    root = tmp_path / "results"
    shutil.copytree(_finished_data, root)

    def make(**changes: Any) -> Plan:
        raw = {**copy.deepcopy(TINY), "results": str(root), **changes}
        plan = Plan(config.resolve(raw))
        plan.file = tmp_path / "tiny.yaml"
        plan.file.write_text(yaml.safe_dump(raw))
        return plan

    return make
