"""MM-DiT's weights in and out: HASTE's and REPA's files, diffusers' SD3Transformer2DModel, and what is refused."""

import argparse
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from haste.cli import main as cli
from haste.config import MODELS
from haste.diffusion.samplers import SAMPLERS
from haste.models import diffusers_folders, diffusers_sd3
from haste.models.checkpoints import read_checkpoint
from haste.models.mmdit import MMDiT

SHAPE = {
    **{"depth": 2, "width": 16, "heads": 4, "patch_size": 2, "mlp_ratio": 4.0, "qk_norm": "none"},
    **{"text_width": 10, "input_size": 6, "in_channels": 4},
}
FOUND = {"architecture": "mmdit", **SHAPE}
ARGS = {"path_type": "linear", "prediction": "v", "encoder_depth": 8, "qk_norm": False}


def numbers(seed, **changes):
    """Weights, all random, but for the positions."""
    model = MMDiT(**{**SHAPE, **changes})
    generator = torch.Generator().manual_seed(seed)
    found = {name: 0.2 * torch.randn(v.shape, generator=generator) for name, v in model.state_dict().items()}
    return found | {"pos_embed": model.pos_embed.clone()}


def projector(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "0.weight": (8, 16),
        "0.bias": (8,),
        "2.weight": (8, 8),
        "2.bias": (8,),
        "4.weight": (6, 8),
        "4.bias": (6,),
    }
    return {f"projectors.0.{name}": torch.randn(size, generator=generator) for name, size in sizes.items()}


def hastes(path, **changes):
    """A file as the training script of HASTE and REPA saves it."""
    found = {"model": {**numbers(1), **projector(3)}, "ema": {**numbers(2), **projector(4)}}
    parameters = [torch.nn.Parameter(value) for value in found["model"].values()]
    optimiser = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimiser.step()
    found |= {"opt": optimiser.state_dict(), "args": argparse.Namespace(**ARGS), "steps": 150_000, **changes}
    torch.save(found, path)
    return found


def questions(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 4, 6, 6, generator=generator, dtype=dtype)
    return x, torch.tensor([0.0, 0.3, 1.0], dtype=dtype), torch.randn(3, 7, 10, generator=generator, dtype=dtype)


def assert_same(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- HASTE's and REPA's files


def test_hastes_file_goes_in_and_out_to_the_bit(tmp_path):
    theirs, ours, out = tmp_path / "0150000.pt", tmp_path / "ours.safetensors", tmp_path / "out.pt"
    given = hastes(theirs)
    assert cli.main(["import", str(theirs), str(ours), "--heads", "4"]) == 0
    assert cli.main(["show", str(ours)]) == 0
    checkpoint = read_checkpoint(ours)
    assert checkpoint.layout == "ours" and checkpoint.shape == FOUND
    assert checkpoint.facts.items() >= {"step": 150_000, "path": "linear", "args": ARGS}.items()
    assert checkpoint.facts["source"]["layout"] == "REPA"
    for which in ("model", "ema"):
        own = {name: value for name, value in given[which].items() if not name.startswith("projectors.")}
        assert_same(checkpoint.weights[which], own)
        assert_same(checkpoint.model(which).state_dict(), own)
    assert cli.main(["export", str(ours), str(out), "--format", "repa"]) == 0
    again = torch.load(out, weights_only=False)
    heads = {name: value for name, value in given["model"].items() if name.startswith("projectors.")}
    assert_same(again["model"], given["model"])
    assert_same(again["ema"], {**given["ema"], **heads})  # heads have no average
    assert again["steps"] == 150_000 and again["args"].path_type == "linear" and again["args"].qk_norm is False


@pytest.mark.parametrize("prefix", ["", "module."])
def test_repas_bare_weights_are_the_average_with_and_without_positions(tmp_path, prefix):
    weights = {**numbers(2), **projector(4)}
    kept = {name: value for name, value in weights.items() if name != "pos_embed"}
    for name, tree, told in [("last.pt", weights, {}), ("bare.pt", kept, {"input_size": 6})]:
        torch.save({prefix + key: value for key, value in tree.items()}, tmp_path / name)
        found = read_checkpoint(tmp_path / name, expected={"heads": 4, **told})
        assert found.layout == "REPA" and found.shape == FOUND and len(found.projectors) == 1
        assert_same(found.weights["ema"], numbers(2))


def test_norms_of_queries_and_keys_show_the_heads_and_a_published_size_needs_no_word(tmp_path):
    torch.save(numbers(1, qk_norm="rms"), tmp_path / "norms.pt")
    assert read_checkpoint(tmp_path / "norms.pt").shape == {**FOUND, "qk_norm": "rms"}
    torch.save(numbers(1), tmp_path / "small.pt")
    with pytest.raises(
        ValueError, match=r"small\.pt: 2 blocks of width 16 are not the published size.*give their number"
    ):
        read_checkpoint(tmp_path / "small.pt")
    assert MODELS["MM-DiT"].settings["heads"] == 24  # as `haste.networks.joint` says of 24 blocks of width 768


def without(name):
    return lambda found: {key: value for key, value in found.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("joint_blocks.0.x_block.mlp.fc2.bias"), r"missing: joint_blocks\.0\.x_block\.mlp\.fc2\.bias"),
        (without("context_embedder.weight"), "does not hold context_embedder.weight, expected the weights of an MM"),
        (lambda found: {k: v for k, v in found.items() if "blocks.0." not in k}, "does not hold joint_blocks.0."),
        (lambda found: {**found, "joint_blocks.7.x_block.attn.qkv.bias": torch.ones(2)}, "3 blocks up to block 7"),
        (lambda found: {**found, "y_embedder.mlp.0.bias": torch.ones(2)}, r"not known: y_embedder\.mlp\.0\.bias"),
        (
            lambda found: {**found, "joint_blocks.1.context_block.attn.proj.bias": torch.ones(16)},
            r"not known: joint_blocks\.1\.context_block\.attn\.proj\.bias",
        ),
        (lambda found: {**found, "final_layer.linear.bias": torch.ones(9)}, r"found \(9,\), expected \(16,\)"),
        (lambda found: {**found, "final_layer.linear.bias": torch.full((16,), torch.nan)}, "not finite: final_layer"),
        (lambda found: {**found, "pos_embed": torch.ones(1, 8, 16)}, "pos_embed is .1, 8, 16., expected .* a square"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    torch.save({"ema": change(numbers(1))}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=words) as refusal:
        read_checkpoint(tmp_path / "bad.pt", expected={"heads": 4})
    assert f"{tmp_path}/bad.pt: " in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "SiT"}, "is said to be SiT's, but it is an MM-DiT"),
        ({"layout": "ours"}, "is said to be ours's, but it is an MM-DiT"),
        ({"expected": {"heads": 5}}, "5 heads do not divide its width 16"),
        (
            {"expected": {**FOUND, "text_width": 768, "depth": 24}},
            "depth: found 2, expected 24; text_width: found 10, e",
        ),
        ({"expected": {"depth": 2, "heads": 4}}, "a joint text and image transformer, expected those of a SiT or DiT"),
    ],
)
def test_another_model_or_layout_than_was_asked_for_is_refused(tmp_path, options, words):
    torch.save(numbers(1), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "file.pt", **{"expected": {"heads": 4}, **options})


def test_diffusers_file_without_its_folder_and_a_sit_are_no_mmdit(tmp_path):
    diffusers_folders.write(tmp_path / "sd3", numbers(5), FOUND)
    with pytest.raises(ValueError, match="found a joint text and image transformer of diffusers': give its folder"):
        read_checkpoint(tmp_path / "sd3" / "transformer" / diffusers_folders.WEIGHTS)
    sits = {"x_embedder.proj.weight": torch.ones(16, 4, 2, 2), "blocks.0.attn.qkv.bias": torch.ones(48)}
    torch.save(sits, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="expected the weights of an MM-DiT .*found the weights of a diffusion transf"):
        read_checkpoint(tmp_path / "a.pt", expected=FOUND)


# ---- diffusers


def theirs(**changes):
    """A transformer of diffusers' with random weights, pooled text and a larger grid of positions among them."""
    torch.manual_seed(0)
    shape = {**SHAPE, "qk_norm": changes.pop("qk_norm", "none")}
    made = SD3Transformer2DModel.from_config({**diffusers_sd3.config_of(shape), "pooled_projection_dim": 5, **changes})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def answers(network, x, t, text, pooled):
    with torch.no_grad():
        return network(x, text, torch.zeros(len(x), pooled, dtype=x.dtype), t).sample


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_diffusers_network_computes_the_same_here(tmp_path, qk_norm):
    network = theirs(qk_norm=qk_norm, pos_embed_max_size=8)
    network.save_pretrained(tmp_path / "sd3")
    ours = tmp_path / "ours.safetensors"
    assert cli.main(["import", str(tmp_path / "sd3"), str(ours)]) == 0
    found = read_checkpoint(ours)
    assert found.shape == {**FOUND, "qk_norm": qk_norm}
    expected = answers(network.double(), *questions(torch.float64), pooled=5)
    with torch.no_grad():
        velocity = found.model().double()(*questions(torch.float64))[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_ours_computes_the_same_in_diffusers_and_comes_back_to_the_bit(tmp_path, qk_norm):
    weights = numbers(5, qk_norm=qk_norm)
    torch.save(weights, tmp_path / "mine.pt")
    out, back = tmp_path / "sd3", tmp_path / "back.safetensors"
    assert cli.main(["export", str(tmp_path / "mine.pt"), str(out), "--format", "diffusers", "--heads", "4"]) == 0
    network = SD3Transformer2DModel.from_pretrained(out / "transformer").eval()
    with torch.no_grad():
        velocity = read_checkpoint(tmp_path / "mine.pt", expected={"heads": 4}).model()(*questions())[0]
    torch.testing.assert_close(answers(network, *questions(), pooled=2048), velocity, rtol=1e-5, atol=1e-5)
    assert cli.main(["import", str(out), str(back)]) == 0
    found = read_checkpoint(back)
    assert found.shape == {**FOUND, "qk_norm": qk_norm}
    assert_same(found.weights["ema"], weights)


def test_diffusers_scheduler_goes_from_the_same_noise_to_the_same_latents(tmp_path):
    diffusers_folders.write(tmp_path / "sd3", numbers(5), FOUND)
    network = SD3Transformer2DModel.from_pretrained(tmp_path / "sd3", subfolder="transformer").double().eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "sd3", subfolder="scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 6)[:-1])
    noise, _, text = questions(torch.float64)
    x, model = noise, MMDiT(**SHAPE).double()
    model.load_state_dict(numbers(5))
    for t in scheduler.timesteps:
        x = scheduler.step(answers(network, x, t.expand(3).double(), text, pooled=2048), t, x).prev_sample
    with torch.no_grad():
        ours = SAMPLERS["euler"].run(lambda x, t: model(x, torch.full((3,), t, dtype=x.dtype), text)[0], noise, 5)
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-5)  # its times are in float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dual_attention_layers": [0]}, r"dual_attention_layers is \[0\], expected \[\] of an MM-DiT"),
        ({"out_channels": 8}, "out_channels is 8, expected 4"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', expected null or 'rms_norm'"),
        ({"num_layers": None}, "has no 'num_layers', which a SD3Transformer2DModel has"),
        ({"_class_name": "FluxTransformer2DModel"}, "expected DiTTransformer2DModel or SD3Transformer2DModel"),
    ],
)
def test_another_network_of_diffusers_is_refused(tmp_path, capsys, change, words):
    diffusers_folders.write(tmp_path / "sd3", numbers(5), FOUND)
    file = tmp_path / "sd3" / "transformer" / "config.json"
    config = {**json.loads(file.read_text()), **change}
    file.write_text(
        json.dumps({name: value for name, value in config.items() if name == "qk_norm" or value is not None})
    )
    with pytest.raises(ValueError, match=words):
        diffusers_folders.read(tmp_path / "sd3", {})


def test_times_up_to_1000_missing_weights_too_few_positions_and_other_mlps_are_refused(tmp_path):
    folder = tmp_path / "sd3"
    diffusers_folders.write(folder, numbers(5), FOUND)
    file = folder / "transformer" / diffusers_folders.WEIGHTS
    whole = load_file(file)
    for change, words in [
        ({"proj_out.bias": None}, "does not hold proj_out.bias, expected the weights of a SD3Transformer2DModel"),
        ({"pos_embed.pos_embed": torch.ones(1, 4, 16)}, "has positions for 4 tokens, expected a grid of 3 x 3 or more"),
        ({"proj_out.bias": torch.full((16,), torch.inf)}, "not finite: final_layer.linear.bias"),
        ({"proj_out.bias": torch.ones(3)}, r"final_layer.linear.bias \(found \(3,\), expected \(16,\)\)"),
    ]:
        save_file({name: value for name, value in {**whole, **change}.items() if value is not None}, file)
        with pytest.raises(ValueError, match=words):
            diffusers_folders.read(folder, {})
    save_file(whole, file)
    with pytest.raises(ValueError, match="not the model that was asked for; depth: found 2, expected 24"):
        diffusers_folders.read(folder, {"depth": 24})
    scheduler = {**diffusers_sd3.SCHEDULER, "num_train_timesteps": 1000}  # Stable Diffusion 3's own
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for named in (folder, folder / "transformer"):
        with pytest.raises(ValueError, match=r"num_train_timesteps is 1000: .* an MM-DiT t in \[0, 1\]"):
            diffusers_folders.read(named, {})
    with pytest.raises(ValueError, match="mlp_ratio is 2.0, and SD3Transformer2DModel has 4 alone"):
        diffusers_folders.write(tmp_path / "other", numbers(5, mlp_ratio=2.0), {**FOUND, "mlp_ratio": 2.0})
