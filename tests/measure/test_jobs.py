"""What `haste measure` does: for the workflow, and for a person with a state or somebody else's checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from haste import config
from haste.cli import main as cli
from haste.files import artefact
from haste.files.provenance import read_header
from haste.measure.measure import Measure, check_rows

SPEC = {"measure": "gradient-cosine", "images": 6, "shards": 2, "t": [0.4], "alignment": "HASTE"}


@pytest.fixture
def measuring(world):
    """The world, with a measure of its states."""
    world.configure(measures={"cos": SPEC}, runs={"HASTE": {"alignment": "HASTE", "measures": ["cos"]}, "plain": {}})
    return world


def run(world, *arguments):
    assert cli.main(["measure", *map(str, arguments), "-c", str(world.file)]) == 0


def rows(path):
    return json.loads(Path(path).read_text())["rows"]


def refusal(world, capsys, *arguments):
    assert cli.main(["measure", *map(str, arguments), "-c", str(world.file)]) == 2
    return capsys.readouterr().err


def test_a_measure_of_the_configuration_is_made_once_and_says_how_it_was_made(measuring, capsys):
    what = next(one.measurement for one in measuring.plan.measured if one.step == 8)
    run(measuring, "cos", what.name)
    found, written = artefact.read_json(what.file, "measure"), Path(what.file).stat().st_mtime_ns
    assert found["key"] == what.key in what.file
    assert found["state"] == {
        **{"trajectory": what.state.trajectory, "step": 8, "file": str(measuring.state), "weights": "model"}
    }
    assert [(row["term"], row["t"], row["block"]) for row in found["rows"]] == [
        ("features", 0.4, 1),
        ("attention", 0.4, 1),
        ("alignment", 0.4, 1),
    ]
    assert found["provenance"]["inputs"].keys() == {"latents", "teacher of features", "teacher of attention"}
    for name in (what.name, measuring.state, what.state):  # however it is called
        capsys.readouterr()
        run(measuring, "cos", name)
        said = capsys.readouterr().out
        assert said.startswith("cos of HASTE (") and "attention" in said
    assert Path(what.file).stat().st_mtime_ns == written
    assert cli.main(["show", what.file]) == 0


def test_an_imported_checkpoint_is_measured_as_the_state_that_it_was(measuring, tmp_path):
    own, theirs, bare = (tmp_path / f"{name}.json" for name in ("own", "theirs", "bare"))
    run(measuring, "cos", measuring.state, "--json", own)
    run(measuring, "cos", measuring.folder / "theirs.pt", "--model", "dot", "--json", theirs)
    assert rows(theirs) == rows(own)
    file = tmp_path / "bare.safetensors"
    exported = [str(measuring.state), str(file), "--format", "safetensors", "--weights", "model"]
    assert cli.main(["export", *exported]) == 0
    run(measuring, "cos", file, "--model", "dot", "--json", bare)
    assert rows(bare) == [row for row in rows(own) if row["term"] == "attention"]  # it brings no projector
    found = json.loads(bare.read_text())
    assert found["notes"] == ["features left out: there is no projector"]
    assert found["state"]["weights"] == "ema"  # the one set that it has
    kept = list(Path(measuring.root, "measures").glob("*/*.json"))
    assert [path.parent.name for path in kept] == [f"{measuring.plan.state('HASTE', 8).trajectory}.00000008"]


def test_a_row_that_is_measured_needs_no_training(measuring, tmp_path):
    row = {"checkpoint": str(measuring.folder / "theirs.pt"), "model": "dot", "sampling": ["quick"], "step": 8}
    measuring.configure(measures={"cos": SPEC}, evaluate={"it": {**row, "measures": ["cos"]}})
    (one,) = measuring.plan.measured
    files = measuring.plan.measured_from(one.measurement)
    assert not any("states/" in file for file in files) and measuring.plan.latents.manifest in files
    run(measuring, "cos", one.measurement.name)
    assert artefact.read_json(one.measurement.file, "measure")["state"]["step"] == 8


def test_any_measure_can_be_asked_for_with_its_default_settings(measuring, capsys):
    measuring.configure()
    said = refusal(measuring, capsys, "cosine", "x")
    assert all(name in said.split("expected one of the configuration or of ")[1] for name in config.MEASURES)
    run(measuring, "gradient-cosine", measuring.state)
    assert "images 256, shards 8" in capsys.readouterr().out
    assert not Path(measuring.root, "measures").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["cos", "nothing.pt"],
            "nothing.pt: no such file; expected a state of the configuration, by its file or as",
        ),
        (["cos", "HASTE"], "(HASTE is a run, whose results are of {trajectory}/00000008"),
        (["cos", "{folder}"], "expected a checkpoint, found a folder"),
        (
            ["cos", "{folder}/theirs.pt"],
            "2 blocks of width 16 are no published size, and the weights do not show",
        ),
        (["cos", "{folder}/theirs.pt", "--model", "dat"], "model: nothing is called 'dat'; did you mean 'dot'?"),
        (["cos", "{folder}/theirs.pt", "--model", "dot", "--alignment", "HSTE"], "alignment: nothing is called 'HSTE'"),
        (["cos", "{trajectory}/00000009"], "step-00000009.safetensors: this state is missing"),
        (["gradient-cosine", "{folder}/theirs.pt", "--model", "dot"], "compares with an alignment, but theirs.pt has"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(measuring, capsys, arguments, words):
    known = {"folder": measuring.folder, "trajectory": measuring.plan.state("HASTE", 8).trajectory}
    words = words.format(**known) if "{" in words else words
    assert words in refusal(measuring, capsys, *(argument.format(**known) for argument in arguments))


def test_a_state_is_not_measured_against_another_teacher_than_it_was_trained_with(measuring, capsys):
    tensors, header = load_file(measuring.state), read_header(measuring.state)
    header["inputs"]["teacher of features"] = "0" * 64
    save_file(tensors, measuring.state, metadata={"haste": json.dumps(header)})
    said = refusal(measuring, capsys, "cos", measuring.state)
    assert "was trained with teacher of features 000000000000, but teacher of features is now" in said


class Two(Measure):
    axes = ("block",)
    values = {"value": "error"}  # noqa: RUF012 - a class variable of `Measure`


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"block": 1, "value": 1.0}, ValueError, "it: Two gave a row of ['block', 'value'], expected"),
        ({"block": 1, "value": 1.0, "error": 0.0, "x": 1}, ValueError, "it: Two gave a row of"),
        (
            {"block": 4, "value": 1.0, "error": float("inf")},
            FloatingPointError,
            "it: error at block 4 is inf, expected",
        ),
        (
            {"block": 4, "value": np.float32("nan"), "error": 0.0},
            FloatingPointError,
            "it: value at block 4 is nan, expected",
        ),
    ],
)
def test_a_row_has_the_columns_of_its_measure_and_finite_numbers(row, error, words):
    with pytest.raises(error) as refused:
        check_rows(Two(), [{"block": 1, "value": 0, "error": 0.5}, row], "it")
    assert str(refused.value).startswith(words)
