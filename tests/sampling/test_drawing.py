"""`haste draw`: pictures by a file alone are those that the workflow draws in the same way."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import haste
from haste.cli import main as cli
from haste.config import Sampling
from haste.files import artefact
from haste.files.npz import read_npz
from haste.files.provenance import provenance_of
from haste.sampling.drawing import painter_of_file, pictures
from haste.sampling.painter import painter_of
from haste.sampling.samples import open_samples

CHOSEN = {"labels": [3, 7], "count": 8, "sampler": "euler", "steps": 2}


def draw(*arguments):
    return cli.main(["draw", *map(str, arguments), "--device", "cpu"])


@pytest.fixture
def ran(world, monkeypatch):
    """A world whose workflow left its configuration in the results folder."""
    artefact.write_json(world.plan.config_file, world.plan.config.model_dump(mode="json"))
    monkeypatch.chdir(world.folder)
    return world


def test_the_first_pictures_are_the_workflows_samples_wherever_the_results_folder_is(ran, tmp_path, capsys):
    drawn = read_npz(ran.row().sample_file(0), "samples")
    assert draw(ran.state, "--count", 9, "--out", "own.npz") == 0
    own = read_npz("own.npz", "drawing")
    for name in ("arr_0", "arr_1", "nfe"):
        assert (own[name] == drawn[name][:9]).all()
    loaded = haste.load(ran.state, device="cpu")
    assert (np.stack(loaded.draw(count=2)) == drawn["arr_0"][:2]).all()
    shutil.move(ran.root, tmp_path / "moved")  # the record's own paths lead nowhere now
    assert (np.stack(loaded.draw(count=1)) == drawn["arr_0"][:1]).all()  # nothing is loaded twice
    state = tmp_path / "moved" / ran.state.relative_to(ran.root)
    assert draw(state, "--count", 9, "--out", "moved.npz") == 0
    assert (read_npz("moved.npz", "drawing")["arr_0"] == drawn["arr_0"][:9]).all()
    assert open_samples(Path("moved.npz")).count == 9  # `haste score` reads it
    assert "moved.npz: 9 pictures" in capsys.readouterr().out


def test_classes_take_turns_and_the_grid_has_a_column_for_each(ran):
    asked = ["--class", 3, "--class", 7, "--guidance", 2, "--seed", 5]
    for out in ("grid.png", "all.npz", "one/by/one"):
        assert draw(ran.state, *asked, "--out", out) == 0
    sampling = Sampling(**CHOSEN, guidance=2.0, seed=5)
    expected = painter_of(ran.plan, ran.plan.state("HASTE", 8), sampling).draw(range(8))
    found = read_npz("all.npz", "drawing")
    assert (found["arr_0"] == expected["image"]).all() and found["arr_1"].tolist() == [3, 7] * 4
    each = sorted(Path("one/by/one").iterdir())
    assert [path.name for path in each] == [f"{i:06d}.png" for i in range(8)]
    assert all((np.asarray(Image.open(path)) == expected["image"][i]).all() for i, path in enumerate(each))
    grid, cell = np.asarray(Image.open("grid.png")), 64 + 2  # 8 px, enlarged to 64
    assert grid.shape == (4 * cell, 2 * cell, 4)
    for i, image in enumerate(expected["image"]):
        top, left = i // 2 * cell + 1, i % 2 * cell + 1
        assert (grid[top : top + 64 : 8, left : left + 64 : 8, :3] == image).all()
    made = provenance_of(Path("grid.png"))
    assert made["pictures"] == [3, 7] * 4 and made["sampling"]["guidance"] == 2.0
    assert provenance_of(each[1])["pictures"] == 7
    assert draw(ran.state, "--count", 1, "--out", "grid.png") == 0  # a drawing may be drawn anew


def test_a_checkpoint_from_elsewhere_draws_the_same_with_a_configuration_or_a_decoder_alone(ran):
    theirs, way = ran.folder / "theirs.pt", ["--sampling", "quick", "--count", 5]
    assert draw(ran.state, *way, "--out", "own.npz") == 0
    assert draw(theirs, "-c", ran.file, "--model", "dot", *way, "--out", "configured.npz") == 0
    own = read_npz("own.npz", "drawing")["arr_0"]
    assert (read_npz("configured.npz", "drawing")["arr_0"] == own).all()
    imported = ran.folder / "imported.safetensors"
    assert cli.main(["import", str(theirs), str(imported), "--heads", "2"]) == 0
    alone = painter_of_file(imported, sampling=ran.plan.config.sampling["quick"], decoder=str(ran.autoencoder))
    assert (pictures(alone, 5)["image"] == own).all()
    assert draw(imported, "--sampling", "ode-50", "--class", 2, "--decoder", ran.autoencoder) == 0


def test_weights_and_precisions_are_those_that_are_asked_for_and_the_workflow_draws_the_same(ran):
    common = ran.raw["sampling"]["quick"]
    ways = {"raw": {"weights": "model"}, "half": {"precision": "bf16", "decoder_precision": "fp16"}}
    ran.configure(
        sampling={**ran.raw["sampling"], **{name: common | way for name, way in ways.items()}},
        defaults={**ran.raw["defaults"], "milestones": [8], "sampling": ["quick", *ways]},
    )
    quick, *others = (row.evaluation for row in ran.plan.rows)
    assert quick.name == ran.row().name  # a key at its default is in no name
    assert len({quick.name, *(one.name for one in others)}) == 3
    for one, (name, way) in zip(others, ways.items(), strict=True):
        for command in ("sample", "evaluate"):
            assert cli.main([command, one.name, "-c", str(ran.file)]) == 0
        assert way.items() <= artefact.read_json(one.score, "score")["sampling"].items()
        asked = ["--sampling", name, "-c", ran.file, "--count", 6, "--out", f"{name}.npz"]
        assert draw(ran.state, *asked) == 0
        drawn = read_npz(one.sample_file(0), "samples")["arr_0"][:6]
        assert (read_npz(f"{name}.npz", "drawing")["arr_0"] == drawn).all()
    for name, asked in {"b": ["--weights", "model"], "c": []}.items():
        asked += ["-c", ran.file, "--count", 6, "--out", f"{name}.npz"]
        assert draw(ran.state, "--sampling", "quick", *asked) == 0
    raw, b, c = (read_npz(f"{name}.npz", "drawing")["arr_0"] for name in ("raw", "b", "c"))
    assert (b == raw).all() and (b != c).any()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--class", 10], ["has no class 10", "expected 0 to 9"]),
        (["--class", 3, "--prompt", "a"], ["classes and prompts", "one of the two"]),
        (["--prompt", "a red bus"], ["was trained with labels", "classes 0 to 9"]),
        (["--sampling", "quik"], ["sampling 'quik'", "quick", "sde-250"]),
        (["--count", 0], ["--count", "1 or more"]),
        (["--guidance", -1], ["sampling.guidance", "greater than or equal to 0", "found -1"]),
        (["--class", 3, "--class", 3], ["sampling.labels", "3 more than once"]),
        (["--out", "drawn.jpg"], [".png", ".npz", "folder"]),
        (["--out", "precious.png"], ["precious.png", "no drawing"]),
        (["--out", "results"], ["results", "folder with files"]),
        (["--decoder", "no/such/folder"], ["no/such/folder"]),
    ],
    ids=lambda value: str(value[0]),
)
def test_what_cannot_be_drawn_is_refused_with_what_to_do(ran, capsys, asked, said):
    Path("precious.png").write_bytes(b"\x89PNG")
    assert draw(ran.state, *asked) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in said), error
    assert not Path("drawn.png").exists() and Path("precious.png").read_bytes() == b"\x89PNG"


def test_without_a_configuration_a_decoder_must_be_named(world, capsys):
    assert draw(world.state) == 2
    said = capsys.readouterr().err
    assert f"{world.state}: nothing says its decoder. Name one, as by --decoder stabilityai/sd-vae-ft-ema" in said
    assert "by -c CONFIG" in said
    assert draw(world.folder / "theirs.pt") == 2
    assert "heads" in capsys.readouterr().err
