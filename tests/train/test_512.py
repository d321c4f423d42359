"""512 px from pictures to a stopped run: 64 x 64 latents, 1,024 tokens, and a teacher of patches of 14 that sees 448
px, so that both grids are 32 x 32. Networks are narrow; sizes are those of the papers' tables."""

import copy
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from haste import config
from haste.align import losses
from haste.cli import main as cli
from haste.data.batches import Batches
from haste.files import journal
from haste.files.store import Store
from haste.networks.registry import TEACHERS
from haste.ops import cost
from haste.plan.plan import Plan
from haste.teachers.targets import load_teacher
from haste.train import loop, state

COUNT, MB = 6, 1e6
LAYERS = ([0, 1], [1, 0])  # of the student, of the teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """DINOv2-B itself, but with two narrow blocks of random numbers; and a folder with the configuration of all."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        spec, small = TEACHERS["DINOv2-B"], {"depth": 2, "embed_dim": 24, "num_heads": 2}
        torch.manual_seed(3)
        network = timm.create_model(spec.timm, num_classes=0, **spec.overrides, **small)
        network.pos_embed.data.normal_()
        save_file(network.state_dict(), folder / "dino.safetensors")
        overrides = {**spec.overrides, **small}
        patch.setitem(TEACHERS, "DINOv2-B", replace(spec, depth=2, heads=2, width=24, overrides=overrides))
        _draw(folder / "pictures")
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        shape = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
        AutoencoderKL(**blocks, **shape).save_pretrained(folder / "vae")
        raw = _configuration(folder)
        (folder / "large.yaml").write_text(yaml.safe_dump(raw))
        jobs = [[rule, *how] for rule, how in (
            *(("images", ["--shard", str(i)]) for i in (0, 1)), ("images", ["--join"]),
            *(("latents", ["--shard", str(i)]) for i in (0, 1)), ("latents", ["--join"]),
        )]  # fmt: skip
        before = {stage.name: stage.megabytes for stage in cost.stages(Plan(config.resolve(raw)))[0]}
        for job in jobs:
            assert cli.main([*job, "-c", str(folder / "large.yaml")]) == 0, job
        yield raw, network, before


def _draw(folder):
    """Coarse noise, wide and tall, made larger as most of ImageNet is for 512 px."""
    folder.mkdir()
    for i in range(COUNT):
        width, height = [(40, 30), (30, 40)][i % 2]
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((12 * width, 12 * height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")


def _configuration(folder):
    teacher = {"name": "DINOv2-B", "weights": str(folder / "dino.safetensors")}
    terms = {"features": {"teacher": "dino", "depth": 1, "hidden": 16}}
    terms["attention"] = {"teacher": "dino", "student_layers": LAYERS[0], "teacher_layers": LAYERS[1]}
    images = {"path": str(folder / "pictures"), "resolution": 512, "classes": 1, "holdout": 1, "shards": 2}
    return {
        "name": "large",
        "results": str(folder / "results"),
        "images": {**images, "stored_as": "webp"},
        "autoencoder": {"pretrained": {"encode": str(folder / "vae")}, "shards": 2},
        "teachers": {"dino": {"pretrained": teacher}},
        "detector": {"cnn": {"trained": {"steps": 1}}},
        "models": {"dot": {"depth": 2, "width": 24, "heads": 2, "patch_size": 2}},
        "alignments": {"HASTE": terms},
        "sampling": {"quick": {"sampler": "euler", "steps": 2, "count": 4}},
        "defaults": {"model": "dot", "sampling": ["quick"]},
        "training": {"batch": 2, "lr": 0.01, "ema": 0.9},
        "runtime": {"log_every": 1, "save_every": 1, "trackers": []},
        "runs": {"HASTE": {"alignment": "HASTE", "stop": 3, "milestones": [5]}},
    }


def planned(raw, **changes):
    return Plan(config.resolve({**copy.deepcopy(raw), **changes}))


def attention_by_hand(q_s, k_s, q_t, k_t):
    """HASTE's Eq. 5 with both maps of N x N written out, in float64."""
    q_s, k_s, q_t, k_t = (x.double() for x in (q_s, k_s, q_t, k_t))
    target = (q_t @ k_t.mT / math.sqrt(q_t.shape[-1])).softmax(-1)
    return -(target * (q_s @ k_s.mT / math.sqrt(q_s.shape[-1])).log_softmax(-1)).sum(-1).mean()


def test_disk_is_what_the_plan_says_and_a_compressed_store_has_the_pixels_and_names_of_a_raw_one(
    world, tmp_path, capsys
):
    raw, _, before = world
    plan = planned(raw)
    plain = planned({**raw, "results": str(tmp_path), "images": {**raw["images"], "stored_as": "raw"}})
    assert cost.compressed(plan) == cost.compressed(plain) == []
    [estimate] = cost.compressed(planned(raw, results=str(tmp_path)))
    assert "stored as webp is an estimate, 42% of their pixels" in estimate
    said = {stage.name: stage.megabytes for stage in cost.stages(plain)[0]}
    assert plain.images.key == plan.images.key and plain.latents.key == plan.latents.key
    assert before["images"] == pytest.approx(0.42 * said["images"])
    (tmp_path / "raw.yaml").write_text(
        yaml.safe_dump({**raw, "results": str(tmp_path), "images": plain.config.images.model_dump()})
    )
    for how in (["--shard", "0"], ["--shard", "1"], ["--join"]):
        assert cli.main(["images", "-c", str(tmp_path / "raw.yaml"), *how]) == 0
    found = {"raw": Store.open(plain.images.folder), "webp": Store.open(plan.images.folder)}
    assert found["raw"].identity == found["webp"].identity
    size = {name: sum(s["bytes"] for s in store.manifest["shards"]) for name, store in found.items()}
    more = 24 * COUNT + 2 * 16_384  # a label and a digest an image, and two headers
    assert said["images"] * MB == 3 * 512 * 512 * COUNT and 0 <= size["raw"] - said["images"] * MB < more
    assert size["webp"] < 0.6 * size["raw"]
    latents = Store.open(plan.latents.folder)
    assert latents.fields["moments"] == ((8, 64, 64), np.dtype("float16"))
    size["latents"] = sum(shard["bytes"] for shard in latents.manifest["shards"])
    assert before["latents"] * MB == 8 * 64 * 64 * 2 * COUNT and 0 <= size["latents"] - before["latents"] * MB < more
    capsys.readouterr()
    # What is finished is not made again, and the plan says so.
    (tmp_path / "raw.yaml").write_text(yaml.safe_dump({**raw, "results": str(tmp_path)}))
    content = {path: path.read_bytes() for path in Path(plain.images.folder).glob("*.h5")}
    cli.main(["plan", "-c", str(tmp_path / "raw.yaml")])
    out = " ".join(capsys.readouterr().out.split())
    assert "the store of images is finished, as raw. It stays so although stored_as is webp now" in out
    assert "images" not in planned(raw, results=str(tmp_path)).jobs.left
    assert cli.main(["images", "-c", str(tmp_path / "raw.yaml"), "--shard", "0"]) == 0
    assert {path: path.read_bytes() for path in Path(plain.images.folder).glob("*.h5")} == content


def test_the_teacher_sees_448_px_on_a_grid_of_32_x_32_with_resampled_positions(world):
    raw, network, _ = world
    teacher = load_teacher(planned(raw), "dino")
    assert (teacher.size, teacher.grid) == ((448, 448), (32, 32))
    first, kept = network.pos_embed.detach().split([1, 37 * 37], dim=1)
    kept = kept.reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    resampled = functional.interpolate(kept, (32, 32), mode="bicubic", antialias=True).flatten(2).mT
    expected = torch.cat([first, resampled], dim=1)
    torch.testing.assert_close(teacher.network.pos_embed.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "way", [losses.cross_entropy_by_sample, losses.cross_entropy_fused], ids=["by_sample", "fused"]
)
def test_the_attention_loss_and_its_gradients_at_1024_tokens_are_those_of_whole_maps_in_float64(way, monkeypatch):
    monkeypatch.setitem(losses.WAYS, "cpu", way)
    drawn = torch.randn(4, 1, 2, 1024, 12, generator=torch.Generator().manual_seed(0))
    given = [x.clone().requires_grad_(i < 2) for i, x in enumerate(drawn)]
    whole = [x.double().requires_grad_(i < 2) for i, x in enumerate(drawn)]
    found, expected = losses.attention_loss(*given), attention_by_hand(*whole)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = zip(torch.autograd.grad(found, given[:2]), torch.autograd.grad(expected, whole[:2]), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def first_losses(plan):
    """Both alignment losses of the first step in float64, with whole maps."""
    segment = plan.segment(plan.state("HASTE", 3))
    recipe = plan.trajectories[segment.state.trajectory].recipe
    teacher = load_teacher(plan, "dino")
    learner = state.new_learner(recipe, segment.terms, {"dino": teacher.width})
    latents, images = Store.of(plan.latents), Store.of(plan.images)
    batch = Batches.of(recipe, latents, images)(0)
    mean, std = batch.moments.chunk(2, dim=1)
    z = (mean + std * batch.draw - latents.manifest["shift"]) * latents.manifest["scale"]
    t = batch.t.view(-1, 1, 1, 1)
    taps = {"tokens.1", *(f"attention.{layer}" for layer in LAYERS[0])}
    with torch.no_grad():
        _, seen = learner.model((1 - t) * z + t * batch.noise, batch.t, batch.condition, taps=taps)
        told = teacher(batch.images, features=True, attention=LAYERS[1])
        assert seen["attention.0"].q.shape == told.attention[0][0].shape == (2, 2, 1024, 12)
        cosines = functional.cosine_similarity(
            learner.projectors["features"](seen["tokens.1"]).double(), told.features.double(), dim=-1
        )
        maps = [attention_by_hand(seen[f"attention.{mine}"].q, seen[f"attention.{mine}"].k, *told.attention[theirs])
                for mine, theirs in zip(*LAYERS, strict=True)]  # fmt: skip
    return {"features": -cosines.mean().item(), "attention": torch.stack(maps).mean().item()}


def _killed(plan, step):
    """A process that is killed in a step."""
    given = loop.total_loss

    def dying(found, terms, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return given(found, terms, at)

    loop.total_loss = dying
    loop.train(plan, plan.state("HASTE", 3 if step < 3 else 5))


def test_a_run_stopped_at_its_step_has_the_losses_of_the_formula_and_its_bits_after_two_kills(world):
    raw, _, _ = world
    plan = planned(raw)
    expected = first_losses(plan)
    paths = [Path(plan.path(plan.state("HASTE", step))) for step in (3, 5)]

    def train(*steps):
        for step in steps:
            assert cli.main(["train", str(plan.state("HASTE", step)), "-c", f"{raw['results']}/../large.yaml"]) == 0

    train(3, 5)
    log = journal.read(paths[0].parent / "log.jsonl")
    assert {kind: log[0][kind] for kind in expected} == pytest.approx(expected, rel=1e-5)
    assert "attention" not in journal.read(paths[1].parent / "log.jsonl")[-1]
    assert plan.segment(plan.state("HASTE", 5)).teachers == []
    before = [load_file(path) for path in paths]
    for path in paths:
        path.unlink()
    for step, path in zip((2, 4), paths, strict=True):
        child = multiprocessing.get_context("fork").Process(target=_killed, args=(plan, step))
        child.start()
        try:
            child.join(timeout=300)
        finally:
            ended = child.exitcode
            child.kill()
        assert ended == -signal.SIGKILL and not path.exists()
        train(step + 1)
    for path, whole in zip(paths, before, strict=True):
        again = load_file(path)
        assert again.keys() == whole.keys() and all(torch.equal(again[name], value) for name, value in whole.items())


def test_cached_targets_of_1024_tokens_take_the_bytes_that_the_plan_says(world):
    raw, _, _ = world
    cached = copy.deepcopy(raw)
    cached["teachers"]["dino"]["cache"] = "features+attention"
    cached["training"]["lr"] = 0.02  # states that are still to be trained
    file = Path(raw["results"]).parent / "cached.yaml"
    file.write_text(yaml.safe_dump(cached))
    plan = planned(cached)
    said = {stage.name: stage.megabytes for stage in cost.stages(plan)[0]}["targets"] * MB
    for how in (["--shard", "0"], ["--join"]):
        assert cli.main(["targets", "dino", "-c", str(file), *how]) == 0
    store = Store.of(plan.targets["dino"])
    assert store.fields["features"][0] == (1024, 24) and store.fields["queries.1"][0] == (2, 1024, 12)
    assert said == COUNT * 2 * (1024 * 24 + 2 * 2 * 2 * 1024 * 12)
    assert 0 <= sum(shard["bytes"] for shard in store.manifest["shards"]) - said < 16 * COUNT + 16_384
