"""Training with what no two sides have in common: teachers, grids, head widths and counts; and weights that move."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from haste import config
from haste.cli import main as cli
from haste.data.batches import Batches
from haste.files import artefact, journal
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.networks.registry import TEACHERS as TEACHERS_KNOWN
from haste.plan.plan import Plan
from haste.teachers.encoder import Teacher
from haste.teachers.targets import load_teacher
from haste.train import loop, state
from haste.train.step import total_loss

# The case of CLIP-B/16, whose 14 x 14 patches meet 16 x 16 tokens of the student, in small: 3 x 3 and 4 x 4.
COARSE = {"img_size": 12, "patch_size": 4, "embed_dim": 30, "depth": 3, "num_heads": 3, "num_classes": 0}
MODELS = {"dot": {"depth": 3, "width": 24, "heads": 4, "patch_size": 1}}
TEACHERS = {
    "coarse": {"trained": {"steps": 3, "batch": 8, "depth": 3, "width": 30, "heads": 3, "patch": 4}},
    "vit": {"trained": {"steps": 2, "batch": 8, "depth": 2, "width": 16, "heads": 2, "patch": 4}},
}
ALIGNMENTS = {
    "mixed": {
        "features": {"teacher": "coarse", "depth": 2, "hidden": 16},
        "attention": {"teacher": "vit", "student_layers": [2, 0], "teacher_layers": [0, 1]},
    },
    "swapped": {
        "features": {"teacher": "vit", "depth": 1, "hidden": 16, "similarity": "nt-xent"},
        "attention": {"teacher": "coarse", "student_layers": [1], "teacher_layers": [2]},
    },
}
RUNS = {name: {"alignment": name, "stop": {"features": 2}, "milestones": [2, 4]} for name in ALIGNMENTS}


def write_teacher(folder: Path) -> None:
    """A teacher as the pipeline leaves one, with a grid of its own."""
    torch.manual_seed(5)
    folder.mkdir(parents=True)
    save_file(VisionTransformer(**COARSE).state_dict(), folder / "model.safetensors")
    about = {"schema": 1, "kind": "part", "part": "teacher", "name": "coarse", "key": "k", "provenance": {}}
    about |= {"identity": artefact.file_identity(folder / "model.safetensors")}
    about |= {"architecture": {"kind": "VisionTransformer", "kwargs": COARSE, "mean": [0.5] * 3, "std": [0.5] * 3}}
    artefact.write_json(folder / "part.json", about)


@pytest.fixture
def plan(make_plan):
    found = make_plan(
        models=MODELS,
        teachers=TEACHERS,
        alignments=ALIGNMENTS,
        runs=RUNS,
        runtime={"log_every": 1, "save_every": 100, "trackers": []},
    )
    write_teacher(Path(found.teachers["coarse"].folder))
    return found


def halfway(to: int, size: int) -> np.ndarray:
    """(to, size): bilinear weights with half-pixel centres along one side."""
    rows = np.zeros((to, size))
    for place in range(to):
        centre = min(max((place + 0.5) * size / to - 0.5, 0.0), size - 1.0)
        low = int(centre)
        rows[place, low] += 1 - (centre - low)
        rows[place, min(low + 1, size - 1)] += centre - low
    return rows


def on_grid(tokens: torch.Tensor, side: int, own: int) -> torch.Tensor:
    """(..., own x own, D) -> (..., side x side, D)."""
    if side == own:
        return tokens
    weights = np.kron(halfway(side, own), halfway(side, own))
    return torch.from_numpy(weights).to(tokens) @ tokens


def first_losses(plan, run):
    """The alignment losses of the first step, from the formulas."""
    segment = plan.segment(plan.state(run, 2))
    recipe, terms = plan.trajectories[segment.state.trajectory].recipe, segment.terms
    teachers = {name: load_teacher(plan, name) for name in segment.teachers}
    learner = state.new_learner(recipe, terms, {name: teacher.width for name, teacher in teachers.items()})
    latents, images = Store.open(plan.latents.folder), Store.open(plan.images.folder)
    batch = Batches.of(recipe, latents, images)(0)
    mean, std = batch.moments.chunk(2, dim=1)
    z = (mean + std * batch.draw - latents.manifest["shift"]) * latents.manifest["scale"]
    t = batch.t.view(-1, 1, 1, 1)
    several, layers = {k: v for k, v in terms.items() if k != "attention"}, terms["attention"]["student_layers"]
    side = learner.model.grid[0]
    names = {*(f"tokens.{term['depth']}" for term in several.values()), *(f"attention.{i}" for i in layers)}
    with torch.no_grad():
        _, taps = learner.model((1 - t) * z + t * batch.noise, batch.t, batch.condition, taps=names)
        features = {}
        for name, term in several.items():
            seen = teachers[term["teacher"]](batch.images, features=True)
            projected = learner.projectors[name](on_grid(taps[f"tokens.{term['depth']}"], seen.grid[0], side))
            similar = functional.cosine_similarity(projected[:, :, None], seen.features[:, None], dim=-1)  # (B, N, N)
            logs = similar if term["similarity"] == "cosine" else functional.log_softmax(similar / 0.1, dim=-1)
            features[name] = -logs.diagonal(dim1=1, dim2=2).mean().item()
        values = []
        for mine, theirs in zip(layers, terms["attention"]["teacher_layers"], strict=True):
            told = teachers[terms["attention"]["teacher"]](batch.images, features=False, attention=[theirs])
            heads = min(4, told.attention[theirs][0].shape[1])
            tap = taps[f"attention.{mine}"]
            q, k = (on_grid(x, told.grid[0], side)[:, :heads] for x in (tap.q, tap.k))
            q_t, k_t = (x[:, :heads] for x in told.attention[theirs])
            target = (q_t @ k_t.mT / math.sqrt(q_t.shape[-1])).softmax(-1)
            values.append(-(target * (q @ k.mT / math.sqrt(q.shape[-1])).log_softmax(-1)).sum(-1).mean())
    return {**features, "attention": torch.stack(values).mean().item()}


@pytest.mark.parametrize("run", sorted(RUNS))
def test_features_of_one_teacher_and_attention_of_another_on_grids_that_differ_are_trained_together(plan, run):
    expected = first_losses(plan, run)
    for step in (2, 4):
        loop.train(plan, plan.state(run, step))
    log = Path(plan.path(plan.state(run, 2))).parent / "log.jsonl"
    first = journal.read(log)[0]
    assert {kind: first[kind] for kind in expected} == pytest.approx(expected, rel=1e-5)
    header = read_header(plan.path(plan.state(run, 2)))
    own = {kind: Teacher.load(plan.teachers[ALIGNMENTS[run][kind]["teacher"]].folder).identity for kind in expected}
    assert {kind: header["inputs"][f"teacher of {kind}"] for kind in own} == own
    assert len(set(own.values())) == 2
    # After the features' stop only the other term's teacher is asked.
    assert plan.segment(plan.state(run, 4)).teachers == [ALIGNMENTS[run]["attention"]["teacher"]]


@pytest.fixture
def clip_plan(tiny, tmp_path, monkeypatch):
    """CLIP-B/16 itself, but with fewer and narrower blocks of random numbers, and pictures of 256 px."""
    spec = TEACHERS_KNOWN["CLIP-B/16"]
    small = {"depth": 3, "embed_dim": 24, "num_heads": 3}
    network = timm.create_model(spec.timm, num_classes=0, **spec.overrides, **small)
    save_file(network.state_dict(), tmp_path / "clip.safetensors")
    spec = replace(spec, depth=3, heads=3, width=24, overrides={**spec.overrides, **small})
    monkeypatch.setitem(TEACHERS_KNOWN, "CLIP-B/16", spec)
    (tmp_path / "in").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 256)).save(tmp_path / "in" / f"{i}.png")
    terms = {
        "features": {"teacher": "clip", "depth": 1, "hidden": 16},
        "attention": {"teacher": "clip", "student_layers": [0, 1], "teacher_layers": [2, 1]},
    }
    raw = {
        **{name: tiny[name] for name in ("name", "sampling", "defaults", "detector")},
        "results": str(tmp_path / "results"),
        "images": {"path": str(tmp_path / "in"), "resolution": 256, "classes": 1, "holdout": 1},
        "autoencoder": {"trained": {"steps": 1, "batch": 1, "width": 8, "factor": 8}, "dtype": "float32"},
        "teachers": {"clip": {"pretrained": {"name": "CLIP-B/16", "weights": str(tmp_path / "clip.safetensors")}}},
        "models": {"dot": {"depth": 2, "width": 24, "heads": 4, "patch_size": 2}},
        "alignments": {"HASTE": terms},
        "training": {"batch": 4, "lr": 0.01, "ema": 0.9},
        "runtime": {"log_every": 1, "save_every": 100, "trackers": []},
        "runs": {"HASTE": {"alignment": "HASTE", "milestones": [2, 3]}},
    }
    file = tmp_path / "clip.yaml"
    file.write_text(yaml.safe_dump(raw))
    for step in (["images", "--shard", "0"], ["images", "--join"], ["autoencoder"], ["latents", "--shard", "0"],
                 ["latents", "--join"]):  # fmt: skip
        assert cli.main([*step, "-c", str(file)]) == 0, step
    return Plan(config.resolve(raw))


def test_clips_14_x_14_tokens_are_followed_by_a_students_16_x_16_from_pictures_to_steps(clip_plan):
    expected = first_losses(clip_plan, "HASTE")
    path = loop.train(clip_plan, clip_plan.state("HASTE", 3))
    teacher = load_teacher(clip_plan, "clip")
    model, _ = state.trained_model(path, key=clip_plan.trajectories[path.parent.name].key)
    assert (teacher.grid, model.grid) == ((14, 14), (16, 16))
    log = journal.read(path.parent / "log.jsonl")
    assert {kind: log[0][kind] for kind in expected} == pytest.approx(expected, rel=1e-5)
    assert len(log) == 3 and log[2]["features"] < log[0]["features"]  # the projector follows at once
    trained = load_file(path)
    moved = [trained[f"optimizer/exp_avg/{name}"].any() for name in (
        "projectors/features/0.weight", "model/blocks.0.attn.qkv.weight", "model/blocks.1.attn.qkv.weight"
    )]  # fmt: skip
    assert all(moved)


def test_a_ramp_and_a_warm_up_are_followed_step_by_step_also_through_a_kill(make_plan, monkeypatch):
    alignments = {"soft": {"features": {"teacher": "vit", "depth": 1, "hidden": 16, "warmup": 4}}}
    runs = {"soft": {"alignment": "soft", "stop": 10, "ramp": {"features": 4, "shape": "linear"}, "milestones": [12]}}
    runs["never"] = {"alignment": "soft", "milestones": [12]}
    common = {"alignments": alignments, "runs": runs, "runtime": {"save_every": 1, "log_every": 1, "trackers": []}}
    plan, weights, killed_at = make_plan(**common), {}, [None]

    def spied(found, terms, step):
        one = {name: torch.ones(()) for name in found}
        weights.setdefault(step, total_loss(one, terms, step).item() - 1)
        if step == killed_at[0]:
            raise KeyboardInterrupt
        return total_loss(found, terms, step)

    monkeypatch.setattr(loop, "total_loss", spied)
    loop.train(plan, plan.state("soft", 12))
    half = [0, 1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4, 0, 0]
    assert [weights[step] for step in range(12)] == pytest.approx([0.5 * value for value in half])
    paths = [Path(plan.path(plan.state("soft", step))) for step in (6, 10, 12)]
    assert all(path.exists() for path in paths) and len({path.parent for path in paths}) == 3
    assert paths[0] == Path(plan.path(plan.state("never", 6)))
    whole = load_file(paths[-1])
    for path in paths:
        path.unlink()
    for killed_at[0] in (3, 8, 11):
        with pytest.raises(KeyboardInterrupt):
            loop.train(plan, plan.state("soft", 12))
    killed_at[0] = None
    loop.train(plan, plan.state("soft", 12))
    again = load_file(paths[-1])
    assert not any(name.startswith("projectors/") for name in again)
    for name, value in whole.items():
        assert torch.equal(again[name], value), name
