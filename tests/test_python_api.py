"""The page on Python shows code that runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from hub import serving
from PIL import Image

from haste.cli import main as cli
from haste.sampling.drawing import painter_of_file, pictures
from haste.train import loop

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_code_of_the_page_runs_as_it_stands(make_plan, capsys):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE", "milestones": [8]}})
    loop.train(plan, plan.state("HASTE", 8))
    (row,) = plan.rows
    for command in ("sample", "evaluate"):
        assert cli.main([command, row.evaluation.name, "-c", str(plan.file)]) == 0
    code = BLOCKS[1].replace("results/digits/config.json", str(plan.file)).replace("200", "8")
    found = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert set(found["losses"]) == {"denoising", "features", "attention"}
    assert found["pictures"].shape == (8, 8, 8, 3)
    printed = capsys.readouterr().out
    for name in ("fd", "precision", "recall", "class_accuracy", "attention"):
        assert f"'{name}': " in printed


def test_weights_from_elsewhere_are_drawn_from_with_noise_of_ones_own(make_plan, tmp_path):
    plan = make_plan(runs={"vanilla": {"milestones": [3]}})
    state = loop.train(plan, plan.state("vanilla", 3))
    code = BLOCKS[2].replace("0400000.pt", str(state)).replace("stabilityai/sd-vae-ft-ema", plan.decoder)
    found = {}
    exec(compile(code, str(PAGE), "exec"), found)
    pictures = found["pictures"]
    assert pictures.shape == (8, 8, 8, 3) and (pictures[0] != pictures[1]).any() and (pictures[0] != pictures[4]).any()


def test_pictures_are_drawn_in_five_lines_by_an_id_of_the_hub(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", str(world.folder / "theirs.pt"), "ours.safetensors", "--heads", "2"]) == 0
    code = BLOCKS[0].replace("stabilityai/sd-vae-ft-ema", str(world.autoencoder)).replace("207, 360", "7, 3")
    found = {}
    with serving(monkeypatch, str(tmp_path / "cache")) as server:
        server.put("nyu-visionx/SiT-collections", "SiT-XL-2-256.pt", Path("ours.safetensors").read_bytes())
        exec(compile(code, str(PAGE), "exec"), found)
    assert [(one.size, one.mode) for one in found["images"]] == [((8, 8), "RGB")] * 2
    asked = {"labels": [7, 3], "steps": 50, "guidance": 4.0, "seed": 0}
    expected = painter_of_file(
        "ours.safetensors", decoder=str(world.autoencoder), classes=[7, 3], guidance=4.0, steps=50
    )
    assert (np.stack(found["model"].draw(**asked)) == pictures(expected, 2)["image"]).all()
    assert (np.asarray(Image.open("golden-retriever.png")) == np.asarray(found["images"][0])).all()
    assert (np.stack(found["model"].draw(**asked | {"seed": 1})) != np.stack(found["images"])).any()
    assert (np.stack(found["model"].draw(**asked | {"labels": np.array([7, 3])})) == np.stack(found["images"])).all()
    for refused, words in (
        ({"labels": [10]}, "has no class 10, expected 0 to 9"),
        ({"count": 0}, "expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            found["model"].draw(**refused)


def test_the_code_of_the_page_is_short():
    assert len(BLOCKS) == 3
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 5
    for code in BLOCKS:
        lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len([line for line in lines if not re.match(r"from |import ", line)]) <= 22
