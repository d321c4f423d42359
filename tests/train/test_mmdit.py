"""MM-DiT in the same trainer, with a toy of a text: cut, interrupted, aligned, sampled, measured, exchanged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import train_with

from haste import config
from haste.cli import main as cli
from haste.config import Strict, resolve
from haste.config.joint import Joint
from haste.data.condition import Condition
from haste.files import journal
from haste.files.npz import read_npz
from haste.plan.plan import Plan
from haste.train import loop
from haste.train.state import new_learner

JOINT = {"dot": {"architecture": "mmdit", "depth": 2, "width": 16, "heads": 4}}
HASTE = {
    "features": {"teacher": "vit", "depth": 1, "hidden": 16},
    "attention": {"teacher": "vit", "student_layers": [0, 1], "teacher_layers": [1, 0]},  # heads of 4 and of 8 numbers
}
TABLE = np.random.default_rng(0).standard_normal((11, 3, 6)).astype(np.float32)


class Toy(Condition):
    """Three vectors of six numbers for each class, as a text's hidden states; a row of its own for the null."""

    class Settings(Strict):
        pass

    def __init__(self, *, classes):
        self.classes = classes
        self.fields, self.arguments = {"label": ((), np.int64)}, {"text_tokens": 3, "text_width": 6}

    def rows(self, said):
        return {"label": said["label"]}

    def told(self, rows):
        return TABLE[rows["label"]]

    def null(self, count):
        return np.repeat(TABLE[-1:], count, axis=0)

    def sampled(self, sampling, indices):
        return {"label": np.asarray(indices) % self.classes}


def understands_toys(monkeypatch):
    monkeypatch.setitem(config.parts.CONDITIONS, "toy", f"{__name__}:Toy")
    monkeypatch.setattr(Joint, "condition", "toy")


@pytest.fixture
def make(make_plan, monkeypatch):
    """A function from changes to a plan of MM-DiT runs, whose latents carry the toy."""
    understands_toys(monkeypatch)

    def made(**changes):
        aligned = {"models": JOINT, "alignments": {"HASTE": HASTE}, "condition": {"name": "toy"}}
        defaults = {"model": "dot", "alignment": "HASTE", "milestones": [5], "sampling": ["few"]}
        plan = make_plan(**{**aligned, "sampling": SAMPLING, "defaults": defaults, "runs": {"HASTE": {}}, **changes})
        made = Path(plan.latents.manifest).exists()
        for how in () if made else (["--shard", "0"], ["--shard", "1"], ["--join"]):
            assert cli.main(["latents", "-c", str(plan.file), *how]) == 0
        return plan

    return made


SAMPLING = {"few": {"sampler": "euler", "steps": 2, "count": 20, "guidance": 2.0}}


def bits(plan, run, step):
    return load_file(plan.path(plan.state(run, step)))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_cuts_a_stop_and_blocks_computed_again_change_no_bit_and_every_weight_moves(make):
    whole = make(runs={"HASTE": {"stop": 3}})
    for step in (3, 5):
        loop.train(whole, whole.state("HASTE", step))
    expected = bits(whole, "HASTE", 5)
    first = new_learner(whole.trajectories[whole.state("HASTE", 5).trajectory].recipe, {}, {}).model.state_dict()
    rows_of_no_query = {"joint_blocks.1.context_block.attn.qkv.bias": slice(0, 16)}  # nothing follows the last text
    for name, value in first.items():
        moved = expected[f"model/{name}"] != value
        assert moved.any() != (name == "pos_embed"), name
        assert not moved[rows_of_no_query.get(name, slice(0, 0))].any(), name
    shutil.rmtree(Path(whole.root, "states"))
    runtime = {**whole.config.runtime.model_dump(mode="json"), "checkpoint_blocks": True}
    cut = make(runs={"HASTE": {"stop": 3, "milestones": [4, 5]}}, runtime=runtime)
    asked = iter([0, 1])
    with pytest.raises(loop.Interrupted):
        loop.train(cut, cut.state("HASTE", 3), lambda: next(asked))
    torch.rand(7)
    for step in (3, 4, 5):
        loop.train(cut, cut.state("HASTE", step))
    assert_same_bits(bits(cut, "HASTE", 5), expected)


def test_a_state_is_sampled_with_guidance_and_measured_and_as_repas_file_evaluated_and_gone_on_with(make, tmp_path):
    plan = make(measures={"gradient-cosine": {"measure": "gradient-cosine", "images": 8, "shards": 2, "t": [0.5]}})
    state = loop.train(plan, plan.state("HASTE", 5))
    assert state.parent.name.startswith("mmdit-features-attention-s0-")
    for command in (["sample", plan.rows[0].evaluation.name], ["measure", "gradient-cosine", str(state)]):
        assert cli.main([*command, "-c", str(plan.file)]) == 0
    own = read_npz(plan.rows[0].evaluation.sample_file(0), "samples")["arr_0"]
    theirs, bare, folder = tmp_path / "0000005.pt", tmp_path / "bare.safetensors", tmp_path / "sd3"
    for out, form in ((theirs, "repa"), (bare, "safetensors"), (folder, "diffusers")):
        assert cli.main(["export", str(state), str(out), "--format", form]) == 0
    assert cli.main(["import", str(folder), str(tmp_path / "back.safetensors")]) == 0
    average = {name.removeprefix("ema/"): value for name, value in load_file(state).items() if name.startswith("ema/")}
    assert_same_bits(load_file(bare), average)
    row = {"model": "dot", "sampling": ["few"], "step": 5}
    for file in (theirs, tmp_path / "back.safetensors"):
        other = make(runs={}, evaluate={"theirs": {**row, "checkpoint": str(file)}})
        other.check()
        assert cli.main(["sample", other.rows[0].evaluation.name, "-c", str(other.file)]) == 0
        assert (read_npz(other.rows[0].evaluation.sample_file(0), "samples")["arr_0"] == own).all()
    warm = make(runs={"warm": {"milestones": [1], "warm_start": str(theirs)}}, training={"batch": 8, "lr": 1e-12})
    warm.check()
    found, expected = load_file(loop.train(warm, warm.state("warm", 1))), load_file(state)
    kept = [name for name in expected if name.startswith(("model/", "projectors/"))]
    assert all(torch.allclose(found[name], expected[name], atol=1e-9) for name in kept)
    held = torch.load(theirs, weights_only=False)
    for which in ("model", "ema"):
        held[which]["context_embedder.weight"] = torch.ones(16, 7)
    torch.save(held, theirs)
    with pytest.raises(ValueError, match=r"0000005\.pt: not the model that was asked for; text_width: found 7, exp"):
        make(runs={}, evaluate={"theirs": {**row, "checkpoint": str(theirs)}}).check()


def test_four_processes_train_as_one_but_for_rounding_and_go_on_to_the_bit_where_they_were_cut(make):
    training = {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"}

    def trained(processes, milestones):
        runtime = {"processes": processes, "log_every": 1}
        plan = make(runs={"HASTE": {"milestones": milestones}}, training=training, runtime=runtime)
        shutil.rmtree(Path(plan.root, "states"), ignore_errors=True)
        losses = []
        for step in milestones:
            state = plan.state("HASTE", step)
            train_with(plan, state, processes) if processes > 1 else loop.train(plan, state)
            log = journal.read(Path(plan.path(state)).parent / "log.jsonl")
            losses += [(line["step"], line["denoising"], line.get("features"), line.get("attention")) for line in log]
        return bits(plan, "HASTE", 5), [number for line in sorted({*losses}) for number in line if number is not None]

    alone, losses = trained(1, [5])
    assert len(losses) == 5 * 4
    for processes in (2, 4):
        found, again = trained(processes, [5])
        assert again == pytest.approx(losses, rel=1e-9)
        for name, value in alone.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert_same_bits(trained(4, [2, 5])[0], found)


def of_published(tiny):
    """The tiny configuration for the published model alone, without alignment."""
    told = {"condition": {"name": "toy"}, "sampling": SAMPLING, "teachers": {}, "alignments": {}}
    return {**tiny, **told, "defaults": {"milestones": [8], "sampling": ["few"]}, "runs": {"row": {"model": "MM-DiT"}}}


def test_the_published_mapping_aligns_12_of_24_heads_of_blocks_4_to_7(tiny, monkeypatch):
    understands_toys(monkeypatch)
    teacher = {"teacher": "DINOv2-B"}
    runs = {"HASTE": {"model": "MM-DiT", "alignment": "HASTE"}, "REPA": {"model": "MM-DiT", "alignment": "REPA"}}
    alignments = {"HASTE": {"features": teacher, "attention": teacher}, "REPA": {"features": teacher}}
    raw = {**of_published(tiny), "runs": runs, "alignments": alignments}
    raw["teachers"] = {"DINOv2-B": {"pretrained": {"name": "DINOv2-B"}}}
    found = resolve(raw)
    terms = config.terms_of(found, "HASTE")
    assert terms["features"]["depth"] == config.terms_of(found, "REPA")["features"]["depth"] == 8
    assert terms["attention"]["student_layers"] == [4, 5, 6, 7]
    assert terms["attention"]["teacher_layers"] == [8, 9, 10, 11] and terms["attention"]["heads"] == 12
    plan = Plan(found)
    assert plan.state("HASTE", 8).trajectory.startswith("MM-DiT-features-attention-")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"condition": {"name": "labels"}}, "condition: labels, but MM-DiT is a network that takes toy"),
        ({"images": {"resolution": 10}}, "MM-DiT: input_size 5 is not a multiple of patch_size 2"),
        ({"sampling": {"few": {"sampler": "ddpm", "steps": 2}}}, "ddpm, which is a sampler for ddpm, but MM-DiT is f"),
    ],
)
def test_what_does_not_fit_it_is_refused_before_the_first_job(tiny, monkeypatch, changes, words):
    understands_toys(monkeypatch)
    raw = of_published(tiny)
    raw |= {name: {**raw[name], **value} for name, value in changes.items()}
    with pytest.raises(ValueError, match=words):
        config.check_samplers(resolve(raw))
