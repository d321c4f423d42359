"""Bad surroundings: a folder that cannot be written, a full disk, a hub out of reach, somebody else at work.

The same promises as in `test_bad_input.py`: exit code 2, a message that names the thing, no traceback, nothing lost.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from haste.cli import main as cli
from haste.networks import hub

ROOT = Path(__file__).parent.parent


def without(path: str | Path, *command: Any) -> list[Any]:
    """The command, after what it makes is removed: what is there already it need not write."""
    for file in [Path(path)] if Path(path).is_file() else Path(path).rglob("*"):
        if file.is_file():
            file.unlink()
    return list(command)


# What writes, and where to: (command, the folder within the results). Each finds everything else finished.
WRITERS: list[tuple[str, Callable[[Any], list[Any]], Callable[[Any], str | Path]]] = [
    ("images", lambda w: ["images", "--shard", 0], lambda w: w.plan.images.folder),
    ("images, join", lambda w: without(w.images / "manifest.json", "images", "--join"), lambda w: w.plan.images.folder),
    ("autoencoder", lambda w: ["autoencoder"], lambda w: w.root / "parts"),
    ("teacher", lambda w: ["teacher", "vit"], lambda w: w.root / "parts"),
    ("detector", lambda w: ["detector"], lambda w: w.root / "parts"),
    ("latents", lambda w: ["latents", "--shard", 0], lambda w: w.plan.latents.folder),
    ("reference", lambda w: without(w.reference, "reference"), lambda w: w.reference),
    ("train", lambda w: ["train", w.last], lambda w: w.state.parent),
    ("sample", lambda w: without(w.row().folder, "sample", w.row().name), lambda w: w.row().folder),
    ("sample, features", lambda w: without(w.row().folder, "sample", w.row().name), lambda w: w.row().features.folder),
    ("evaluate", lambda w: ["evaluate", w.row().name], lambda w: w.root / "scores"),
    ("floor", lambda w: ["floor"], lambda w: w.root / "scores"),
    ("reconstruct", lambda w: ["reconstruct"], lambda w: w.root / "scores"),
    ("grid", lambda w: ["grid", w.row().name], lambda w: w.row().folder),
    ("import", lambda w: ["import", w.state, w.folder / "out" / "a.safetensors"], lambda w: w.folder / "out"),
    (
        "export",
        lambda w: ["export", w.state, w.folder / "out" / "a.pt", "--format", "repa"],
        lambda w: w.folder / "out",
    ),
]
each_writer = pytest.mark.parametrize(("command", "place"), [w[1:] for w in WRITERS], ids=[w[0] for w in WRITERS])


@pytest.fixture
def mount() -> Iterator[Callable[..., bool]]:
    """A function that mounts something over a folder, and says whether it may."""
    done: list[Path] = []

    def mounted(folder: Path, *options: str) -> bool:
        if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
            return False
        done.append(folder)
        return True

    yield mounted
    for folder in reversed(done):
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=True)


def failing(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Where nothing can be mounted: every file fails as it is put on disk, as it does on a file system elsewhere."""

    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)


def refused(world: Any, command: list[Any], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = world.files()
    capsys.readouterr()
    config = [] if command[0] in ("import", "export") else ["-c", world.file]
    code = cli.main([str(part) for part in [*command, *config]])
    message = capsys.readouterr().err.split(f"haste {command[0]}: ")[-1]
    assert code == 2, message
    assert "Traceback" not in message
    for word in words:
        assert word in message, message
    after = world.files()
    assert {name: after.get(name) for name in before} == before
    # What is new is kept aside for the next try, or whole: samples whose features could not be written.
    assert not {name for name in after.keys() - before.keys() if "/." not in name and not name.endswith(".npz")}


@each_writer
def test_a_folder_that_cannot_be_written_is_named(world, mount, command, place, capsys, monkeypatch):
    folder, command = Path(place(world)), command(world)
    folder.mkdir(exist_ok=True)
    if mount(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    else:
        failing(monkeypatch, errno.EROFS)
    refused(world, command, [str(folder), "Read-only file system"], capsys)


@each_writer
def test_a_full_disk_is_named(world, mount, command, place, capsys, monkeypatch):
    folder, command = Path(place(world)), command(world)
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, world.folder / "aside")
    if mount(folder, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        shutil.copytree(world.folder / "aside", folder, dirs_exist_ok=True)
        with open(folder / "ballast", "wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    else:
        failing(monkeypatch, errno.ENOSPC)
    refused(world, command, [str(folder), "No space left on device"], capsys)


# ---- the hub


@pytest.fixture(params=["nobody listens", "nobody answers"])
def no_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A network whose way out is refused, or swallows what is sent: only a limit of time ends that."""
    with socket.socket() as way_out:
        way_out.bind(("127.0.0.1", 0))
        if request.param == "nobody answers":
            way_out.listen(50)
        address = f"http://127.0.0.1:{way_out.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, address)
            monkeypatch.setenv(name.upper(), address)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
        monkeypatch.setattr(hub, "SECONDS", 1.0)
        yield


def autoencoder(world: Any) -> list[Any]:
    world.configure(autoencoder={"pretrained": {"encode": "stabilityai/sd-vae-ft-mse", "factor": 2}})
    return ["latents", "--shard", 0]


def teacher(name: str) -> Callable[[Any], list[Any]]:
    def asked(world: Any) -> list[Any]:
        teachers = {"vit": {"pretrained": {"name": name}}}
        world.configure(images={**world.raw["images"], "resolution": 32}, teachers=teachers)
        return ["train", world.last]

    return asked


OUT_OF_REACH = [
    (autoencoder, ["autoencoder stabilityai/sd-vae-ft-mse: ", "Give a folder with config.json"]),
    (teacher("DINOv2-B"), ["DINOv2-B: its weights (timm/vit_base_patch14_dinov2.lvd142m)", "Give a local file"]),
    (teacher("I-JEPA-H"), ["I-JEPA-H: its weights (https://", "Give a local file"]),
]


@pytest.mark.parametrize(("ask", "words"), OUT_OF_REACH, ids=["autoencoder", "teacher", "teacher by its address"])
def test_a_hub_out_of_reach_is_given_up_soon_with_what_to_pass_instead(world, no_hub, ask, words, capsys):
    command, started = ask(world), time.monotonic()
    refused(world, command, words, capsys)
    assert time.monotonic() - started < 30


# ---- as people start it


def started(world: Any, *command: Any) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    return subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("damage", "command", "word"),
    [
        (lambda w: w.file.write_text("runs: {a: [1}"), ["plan"], "tiny.yaml: not YAML"),
        (lambda w: os.truncate(w.state, 99), ["train"], "step-00000008.safetensors: expected a state"),
        (lambda w: (w.images / "manifest.json").write_text("{"), ["latents", "--shard", 0], "manifest.json: expected"),
    ],
    ids=["configuration", "state", "store"],
)
def test_a_process_of_its_own_ends_with_code_2_and_the_message_alone(world, damage, command, word):
    damage(world)
    before = world.files()
    done = started(world, "haste.cli", *command, *([world.last] if command == ["train"] else []), "-c", world.file)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert world.files() == before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"runs": {"a": {"alignment": "HASTEE"}}}, "runs.a.alignment: nothing is called 'HASTEE'"),
        ({"results": "/"}, "results: '/', expected a folder"),
        ({"images": None}, "images: "),
        ({"autoencoder": {"pretrained": {"encode": "/no/vae", "factor": 2}}}, "autoencoder /no/vae: no such folder"),
    ],
    ids=["a name", "a folder", "nothing", "an input"],
)
def test_a_dry_run_of_the_workflow_says_the_same_and_writes_nothing(world, warm, changes, word):
    world.file.write_text(yaml.safe_dump({**world.raw, **changes}))
    before = world.files()
    snakefile, profile = ROOT / "workflow" / "Snakefile", ROOT / "profiles" / "default"
    command = ["--snakefile", snakefile, "--workflow-profile", profile, "--directory", world.folder]
    done = warm.snakemake(*command, "--configfile", world.file, "--cores", "1", "-n")
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert word in text
    assert "Traceback" not in text
    assert {name: content for name, content in world.files().items() if ".snakemake" not in name} == before
