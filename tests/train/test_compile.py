"""`compile: true` with the real compiler: the same training, faster where it counts."""

import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

from haste.files import journal
from haste.files.provenance import read_header
from haste.teachers.encoder import Teacher
from haste.train import loop

TINIEST = {
    "models": {"dot": {"depth": 1, "width": 16, "heads": 2, "patch_size": 2}},
    "alignments": {
        "HASTE": {
            "features": {"teacher": "vit", "depth": 1, "hidden": 16},
            "attention": {"teacher": "vit", "student_layers": [0], "teacher_layers": [1]},
        }
    },
    "runs": {"HASTE-3": {"alignment": "HASTE", "stop": 3, "milestones": [6]}},
}
KINDS = ("denoising", "features", "attention", "grad_norm")


def _trained(make_plan, **runtime):
    """The losses before and after the stop, the last state, and how many graphs were compiled on each side."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plan = make_plan(**TINIEST, runtime={"log_every": 1, **runtime})
    files, graphs = [], []
    for step in (3, 6):
        files.append(Path(loop.train(plan, plan.state("HASTE-3", step))))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - sum(graphs))
    losses = [
        {k: record[k] for k in KINDS if k in record}
        for file in files
        for record in journal.read(file.parent / "log.jsonl")
    ]
    found = losses, load_file(files[-1]), graphs
    shutil.rmtree(f"{plan.root}/states")
    return found


def test_a_compiled_run_has_the_losses_of_a_plain_one_before_and_after_the_stop_and_its_states_have_the_same_names(
    make_plan,
):
    losses, state, graphs = _trained(make_plan)
    assert graphs == [0, 0]
    compiled, compiled_state, graphs = _trained(make_plan, compile=True)
    assert graphs == [2, 1]  # network and teacher, and the network alone
    assert [len(kinds) for kinds in losses] == [4, 4, 4, 2, 2, 2]
    for mine, plain in zip(compiled, losses, strict=True):
        assert mine.keys() == plain.keys()
        assert list(mine.values()) == pytest.approx(list(plain.values()), rel=1e-3)
    assert {name: x.shape for name, x in compiled_state.items()} == {name: x.shape for name, x in state.items()}


def test_angles_are_measured_uncompiled_and_change_no_bit_of_a_compiled_run(make_plan, monkeypatch):
    """Of other numbers of images: code compiled for any number would serve training too, with other bits."""
    monkeypatch.setattr(Teacher, "compile", lambda self: None)  # it would be once for each stretch, in seconds
    angle = {"trigger": "gradient-angle", "after": 1, "every": 1, "threshold": -2, "images": 11, "shards": 3}
    found = {}
    for name, stop in {"with": angle, "without": None}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plan = make_plan(
            **{**TINIEST, "runs": {"HASTE": {"alignment": "HASTE", "stop": stop, "milestones": [4]}}},
            runtime={"log_every": 1, "compile": True},
        )
        path = loop.train(plan, plan.state("HASTE", 4))
        found[name] = load_file(path), torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if stop:
            readings = read_header(path)["triggers"]["features"]["readings"]
            assert [reading["step"] for reading in readings] == [2, 3, 4]
    assert found["with"][1] == found["without"][1] > 0
    for name, value in found["without"][0].items():
        assert torch.equal(found["with"][0][name], value), name
