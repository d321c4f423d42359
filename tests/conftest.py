"""A tiny world: every part and store of a configuration of seconds, made once by the package's own commands."""

from __future__ import annotations

import copy
import fcntl
import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm import Warm

from haste import config
from haste.cli import main as cli
from haste.plan.plan import Plan

# Bits are those of CPUs, and jobs of one test would wait for the GPU that another holds.
if "HASTE_GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("COLUMNS", None)  # readline, which pytest loads, leaves it to the processes that run tests
TINY: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())


def pytest_sessionfinish() -> None:
    """Then it is as it was, or some libraries report as leaked what is still there when Python ends."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads, and tests run side by side."""
    import torch  # here, so that the process that only hands out tests starts without it

    torch.set_num_threads(1)
    # torch counts devices at a process's first gradient, and a fake tensor pretends a GPU from then on, which takes a
    # thread of its own. After that, ranks that tests fork could compute no gradient: so the first one comes before.
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """The collections of garbage that every training asks for, in forked ranks too, need not look at what is imported
    or kept by now, which grows from file to file."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The tiny configuration as plain data, free to be changed."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function from a name and what fills a folder to that folder, to be read only.

    It is filled once a test run, however many processes run the tests: the first that asks fills it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = base / f"once-{name}", base / f"once-{name}.done"
        with open(base / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process that becomes any job at once."""
    with tempfile.TemporaryDirectory() as folder:  # sockets have 108 characters
        made = Warm(Path(folder))
        yield made
        made.close()


@pytest.fixture(scope="session")
def _finished_data(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def fill(folder: Path) -> None:
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY, "results": str(folder / "results")}))
        shards = [["--shard", "0"], ["--shard", "1"], ["--join"]]
        steps = [["images", *how] for how in shards]
        steps += [["autoencoder"], ["teacher", "vit"], ["detector"], ["reference"]]
        for step in [*steps, *(["latents", *how] for how in shards)]:
            assert cli.main([step[0], "-c", str(path), *step[1:]]) == 0, step

    return once("data", fill) / "results"


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


# What a refused command may leave beside finished files: its lock and its words, which no reader takes for results.
ALLOWED = {"lock", "launch", "trajectory.json", "log.jsonl"}


class World:
    """A results folder with everything finished but the last state, its own configuration, and ways to damage it."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "results"
        self.configure()

    def configure(self, **changes: Any) -> None:
        """Write the configuration, with some top keys replaced, and plan it."""
        self.raw = {**copy.deepcopy(TINY), "results": str(self.root), "runs": {"HASTE": {"alignment": "HASTE"}}}
        self.raw |= changes
        self.file = self.folder / "tiny.yaml"
        self.file.write_text(yaml.safe_dump(self.raw))
        self.plan = Plan(config.resolve(self.raw))
        self.last = str(self.plan.state("HASTE", 16))

    def row(self, step: int = 8) -> Any:
        """The evaluation of a state."""
        return next(row.evaluation for row in self.plan.rows if row.step == step)

    @property
    def state(self) -> Path:
        """The trained state, from which the last one would be made and which is sampled."""
        return Path(self.plan.path(self.plan.state("HASTE", 8)))

    @property
    def images(self) -> Path:
        return Path(self.plan.images.folder)

    @property
    def latents(self) -> Path:
        return Path(self.plan.latents.folder)

    @property
    def teacher(self) -> Path:
        return Path(self.plan.teachers["vit"].folder)

    @property
    def detector(self) -> Path:
        return Path(self.plan.detector.part.folder)

    @property
    def reference(self) -> Path:
        return Path(self.plan.detector.reference.folder)

    @property
    def autoencoder(self) -> Path:
        return Path(self.plan.autoencoder.folder)

    def files(self) -> dict[str, str]:
        """Every file and what is in it."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name not in ALLOWED)
        return {str(path.relative_to(self.folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="session")
def finished_world(_finished_data: Path, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A world in which one state is trained, sampled and scored."""

    def fill(folder: Path) -> None:
        shutil.copytree(_finished_data, folder / "results")
        world = World(folder)
        steps = [["train", str(world.plan.state("HASTE", 8))]]
        steps += [[command, world.row().name] for command in ("sample", "evaluate", "grid")]
        for step in steps:
            assert cli.main([*step, "-c", str(world.file)]) == 0, step
        exported = [str(world.state), str(folder / "theirs.pt"), "--format", "repa"]
        assert cli.main(["export", *exported]) == 0

    return once("world", fill)


@pytest.fixture
def world(finished_world: Path, tmp_path: Path) -> World:
    """A copy of the finished world, free to be broken."""
    shutil.copytree(finished_world, tmp_path / "world")
    return World(tmp_path / "world")
