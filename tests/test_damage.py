"""A disk that loses 4 KB without a word: whoever reads the file refuses it by name, and training goes on from the state
before."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from haste.cli import main as cli
from haste.train import loop

ROW = {"model": "dot", "sampling": ["quick"], "step": 8}


def lose(path: Path, among: str = "ema/") -> None:
    """Zero 4 KB of a file of tensors: in its largest tensor, of those with a prefix if there are some."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    places = {name: entry["data_offsets"] for name, entry in json.loads(content[8:begin]).items() if "shape" in entry}
    mine = [place for name, place in places.items() if name.startswith(among)] or list(places.values())
    low, high = max(mine, key=lambda place: place[1] - place[0])
    end = begin + min(high, low + 4096)
    assert any(content[begin + low : end])
    path.write_bytes(content[: begin + low] + bytes(end - begin - low) + content[end:])


@pytest.mark.parametrize("command", ["sample", "measure", "train", "export", "import", "evaluate", "warm_start"])
def test_every_reader_of_a_state_refuses_it(world, command, capsys):
    state, out, runs = world.state, str(world.folder / "out"), world.raw["runs"]
    lose(state, "model/" if command in ("measure", "import") else "ema/")
    if command == "evaluate":
        world.configure(evaluate={"theirs": {**ROW, "checkpoint": str(state)}})
    if command == "warm_start":
        world.configure(runs={**runs, "tuned": {"warm_start": str(state)}})
        world.last = str(world.plan.state("tuned", 8))
    for made in world.root.glob("samples/*/*.npz"):
        made.unlink()
    asked = {
        "sample": ["sample", next(iter(world.plan.evaluations))],
        "measure": ["measure", "gradient-cosine", str(state)],
        "train": ["train", world.last],
        "warm_start": ["train", world.last],
        "export": ["export", str(state), f"{out}.safetensors", "--format", "safetensors"],
        "import": ["import", str(state), f"{out}.safetensors", "--heads", "2"],
        "evaluate": ["sample", list(world.plan.evaluations)[-1]],
    }[command]
    assert cli.main([*asked, *([] if command in ("export", "import") else ["-c", str(world.file)])]) == 2
    assert f"{state}: damaged: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "import"])
def test_what_was_exported_or_imported_is_checked_too(world, command, capsys):
    file = world.folder / "weights.safetensors"
    how = ["--format", "safetensors"] if command == "export" else ["--heads", "2"]
    assert cli.main([command, str(world.state), str(file), *how]) == 0
    lose(file)
    assert cli.main(["import", str(file), str(world.folder / "again.safetensors"), "--heads", "2"]) == 2
    assert f"{file}: damaged: " in capsys.readouterr().err


@pytest.mark.parametrize("part", ["autoencoder", "teacher", "detector"])
def test_a_trained_network_is_checked_when_it_is_loaded(world, part, capsys):
    (weights,) = getattr(world, part).glob("*.safetensors")
    lose(weights)
    for made in world.root.glob("samples/*/*.npz"):
        made.unlink()
    asked = ["latents", "--shard", "0"] if part == "autoencoder" else ["sample", world.row().name]
    asked = ["train", world.last] if part == "teacher" else asked
    assert cli.main([*asked, "-c", str(world.file)]) == 2
    assert f"{weights}: expected the weights " in capsys.readouterr().err


def test_training_passes_over_a_damaged_newest_state_to_the_one_before_to_the_same_bits(make_plan, caplog):
    plan = make_plan()
    state = plan.state("HASTE", 8)
    path = loop.train(plan, state)
    expected = load_file(path)
    for file in path.parent.rglob("*.safetensors"):
        file.unlink()
    steps = iter([0] * 6 + [1])
    with pytest.raises(loop.Interrupted):
        loop.train(plan, state, interrupted=lambda: next(steps))
    saved = sorted(path.parent.glob("rolling/step-*"))
    assert [file.name for file in saved] == ["step-00000006.safetensors", "step-00000007.safetensors"]
    lose(saved[1])
    loop.train(plan, state)
    assert f"passing over a state that cannot be read: {saved[1]}: damaged: " in caplog.text
    found = load_file(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
