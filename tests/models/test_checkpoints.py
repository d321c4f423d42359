"""Other people's checkpoints: what they compute is kept, what they hide is refused, what does not fit is named."""

import argparse
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from haste.cli import main as cli
from haste.files import provenance
from haste.models import exchange
from haste.models.checkpoints import read_checkpoint
from haste.models.sit import SiT
from haste.train import loop

SMALL = {"input_size": 8, "in_channels": 4, "patch_size": 2, "depth": 3, "width": 32, "heads": 4, "classes": 5}
HEADS = {"heads": 4}
ARGS = {"model": "SiT-B/2", "num_classes": 5, "path_type": "linear", "prediction": "v", "qk_norm": False, "lr": 1e-4}


def numbers(seed: int, channels: int = 4, **changes) -> dict[str, torch.Tensor]:
    """Weights under REPA's names, all random; `channels` come out."""
    shape = {**SMALL, **changes}
    model = SiT(**shape)
    generator = torch.Generator().manual_seed(seed)
    found = {name: 0.2 * torch.randn(v.shape, generator=generator) for name, v in model.state_dict().items()}
    found["pos_embed"] = model.pos_embed.clone()
    rows = shape["patch_size"] ** 2 * channels
    found["final_layer.linear.weight"] = 0.2 * torch.randn(rows, shape["width"], generator=generator)
    found["final_layer.linear.bias"] = 0.2 * torch.randn(rows, generator=generator)
    return found


def projector(seed: int, width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(16, 32), (16, 16), (width, 16)]
    pairs = [(2 * i, torch.randn(size, generator=generator)) for i, size in enumerate(sizes)]
    return {f"projectors.0.{i}.{kind}": w if kind == "weight" else w[:, 0].clone() for i, w in pairs
            for kind in ("weight", "bias")}  # fmt: skip


def repa(path, **changes):
    """A file as REPA's training script saves it: optimiser, arguments, step and all."""
    model, ema = {**numbers(1), **projector(3)}, {**numbers(2), **projector(4)}
    parameters = [torch.nn.Parameter(value) for value in model.values()]
    optimiser = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimiser.step()
    found = {"model": model, "ema": ema, "opt": optimiser.state_dict(), "args": argparse.Namespace(**ARGS)}
    found |= {"steps": 400_000, **changes}
    torch.save({name: value for name, value in found.items() if value is not None}, path)
    return found


def questions(count=3):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    return x, torch.rand(count, generator=generator), torch.tensor([0, 5, 2])[:count]


def diffusers_twin(weights: dict[str, torch.Tensor], channels: int):
    """diffusers' DiT with the same weights: other code, which knows nothing of ours. Its timestep features are spaced
    a little differently (1/127 for 1/128), so they are put in their place."""
    from diffusers.models.embeddings import Timesteps
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    twin = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=channels, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, dropout=0.0, norm_eps=1e-6,
    )  # fmt: skip
    renamed = {}
    for kind in ("weight", "bias"):
        renamed[f"pos_embed.proj.{kind}"] = weights[f"x_embedder.proj.{kind}"]
        renamed[f"proj_out_1.{kind}"] = weights[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = weights[f"final_layer.linear.{kind}"]
        for i in range(3):
            mine, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            for letter, part in zip("qkv", weights[f"{mine}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{theirs}.attn1.to_{letter}.{kind}"] = part
            renamed[f"{theirs}.attn1.to_out.0.{kind}"] = weights[f"{mine}.attn.proj.{kind}"]
            renamed[f"{theirs}.ff.net.0.proj.{kind}"] = weights[f"{mine}.mlp.fc1.{kind}"]
            renamed[f"{theirs}.ff.net.2.{kind}"] = weights[f"{mine}.mlp.fc2.{kind}"]
            renamed[f"{theirs}.norm1.linear.{kind}"] = weights[f"{mine}.adaLN_modulation.1.{kind}"]
            embedder = f"{theirs}.norm1.emb"
            renamed[f"{embedder}.timestep_embedder.linear_1.{kind}"] = weights[f"t_embedder.mlp.0.{kind}"]
            renamed[f"{embedder}.timestep_embedder.linear_2.{kind}"] = weights[f"t_embedder.mlp.2.{kind}"]
            renamed[f"{embedder}.class_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"]
    missing, unexpected = twin.load_state_dict(renamed, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}  # which it computes by itself
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return twin.eval()


# ---- what is computed


@pytest.mark.parametrize("which", ["ema", "model"])
def test_repas_file_computes_what_another_implementation_computes_with_its_weights(tmp_path, which):
    found = repa(tmp_path / "0400000.pt")
    checkpoint = read_checkpoint(tmp_path / "0400000.pt", expected=HEADS)
    x, t, y = questions()
    with torch.no_grad():
        velocity, _ = checkpoint.model(which)(x, t, y)
        expected = diffusers_twin(found[which], 4)(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    assert checkpoint.layout == "REPA" and checkpoint.facts["step"] == 400_000 and checkpoint.facts["path"] == "linear"
    assert checkpoint.shape == {**SMALL, "mlp_ratio": 4.0}


def test_the_files_of_sra_and_deltafm_are_repas_and_sras_head_is_left_out(tmp_path):
    """SRA aligns the network with itself through a head `ap_head`; its file holds `ema`, or the weights alone."""
    head = {f"ap_head.linear{i}.{kind}": torch.ones(size) for i, kind, size in
            [(1, "weight", (64, 32)), (1, "bias", (64,)), (2, "weight", (32, 64)), (2, "bias", (32,))]}  # fmt: skip
    layouts = {"sra": {"ema": {**numbers(2), **head}}, "bare": {**numbers(2), **head}, "deltafm": {"ema": numbers(2)}}
    expected = SiT(**SMALL)
    expected.load_state_dict(numbers(2))
    for name, held in layouts.items():
        torch.save(held, tmp_path / f"{name}.pt")
        checkpoint = read_checkpoint(tmp_path / f"{name}.pt", expected=HEADS)
        assert checkpoint.layout == "REPA" and checkpoint.projectors == () and {*checkpoint.weights} == {"ema"}
        with torch.no_grad():
            assert torch.equal(checkpoint.model()(*questions())[0], expected(*questions())[0])


@pytest.mark.parametrize(("name", "layout"), [("DiT-XL-2-512x512.pt", None), ("mine.pt", "DiT")])
def test_dits_file_computes_noise_and_variance_at_the_step(tmp_path, name, layout):
    weights = {key: value for key, value in numbers(5, channels=8).items() if key != "pos_embed"}
    torch.save(weights, tmp_path / name)
    expected = {**SMALL, "architecture": "dit"}
    checkpoint = read_checkpoint(tmp_path / name, layout=layout, expected=expected)
    assert checkpoint.layout == "DiT" and checkpoint.shape == {**expected, "mlp_ratio": 4.0}
    x, _, y = questions()
    steps = torch.tensor([0, 500, 999])
    with torch.no_grad():
        predicted, _ = checkpoint.model()(x, steps.float(), y)
        theirs = diffusers_twin(weights, 8)(x, timestep=steps, class_labels=y).sample
    torch.testing.assert_close(predicted, theirs, rtol=1e-4, atol=1e-4)


def test_a_published_name_says_whose_a_file_is_and_another_word_is_refused(tmp_path):
    for name in ("SiT-XL-2-256x256.pt", "SiT-XL-2-256.pt", "DiT-XL-2-256x256.pt"):  # SiT's two homes have two names
        torch.save(numbers(5, channels=8), tmp_path / name)
        assert read_checkpoint(tmp_path / name, expected=HEADS).layout == name[:3]
        other = "DiT" if name.startswith("SiT") else "SiT"
        with pytest.raises(ValueError, match=f"is said to be {other}'s, but {name[:3]} publishes a file of this name"):
            read_checkpoint(tmp_path / name, layout=other, expected=HEADS)


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("bare", [True, False])
def test_sits_file_runs_in_our_time_with_its_first_channels(tmp_path, bare, channels):
    weights = numbers(5, channels=channels)
    args = argparse.Namespace(model="SiT-B/2", path_type="GVP", prediction="velocity")
    torch.save(weights if bare else {"ema": weights, "model": weights, "opt": {}, "args": args}, tmp_path / "s.pt")
    # Without a variance only the arguments of its training tell it from REPA's.
    checkpoint = read_checkpoint(tmp_path / "s.pt", layout="SiT" if bare or channels == 8 else None, expected=HEADS)
    x, t, y = questions()
    with torch.no_grad():
        velocity, _ = checkpoint.model()(x, t, y)
        theirs = diffusers_twin(weights, channels)(x, timestep=1 - t, class_labels=y).sample
    torch.testing.assert_close(velocity, -theirs[:, :4], rtol=1e-4, atol=1e-4)
    assert checkpoint.facts["path"] == (None if bare else "cosine") and checkpoint.layout == "SiT"


def test_the_turn_of_time_is_exact_to_rounding():
    from haste.models.checkpoints import _turned
    from haste.models.layers import timestep_features

    tree = {name: value.double() for name, value in numbers(5, channels=8).items()}
    turned = _turned(tree, {"in_channels": 4, "patch_size": 2})["t_embedder.mlp.0.weight"]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = timestep_features(1 - t) @ tree["t_embedder.mlp.0.weight"].T
    torch.testing.assert_close(timestep_features(t) @ turned.double().T, expected, rtol=1e-5, atol=1e-6)


# ---- names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_and_the_blocks_of_older_files_mean_the_same_weights(tmp_path, prefix):
    found = repa(tmp_path / "new.pt")
    old = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in found["ema"].items()}
    torch.save({"ema": {prefix + name: value for name, value in old.items()}}, tmp_path / "old.pt")
    new, older = (read_checkpoint(tmp_path / name, expected=HEADS) for name in ("new.pt", "old.pt"))
    assert set(older.weights) == {"ema"} and set(older.weights["ema"]) == set(new.weights["ema"])
    assert all(torch.equal(older.weights["ema"][name], value) for name, value in new.weights["ema"].items())


def prefixed(prefix, found):
    return {prefix + name: value for name, value in found.items()}


BESIDE = {"vae.encoder.conv_in.weight": torch.ones(2), "loss.weight": torch.ones(1), "initted": torch.tensor(True)}
OTHERS = {  # as they lie in a file -> the sets that are read
    "Lightning's": ({"state_dict": {**prefixed("model.", numbers(1)), **BESIDE}, "global_step": 7}, {"ema": 1}),
    "Lightning's, with an average": (
        {"state_dict": {**prefixed("net.", numbers(1)), **prefixed("net_ema.", numbers(2)), **BESIDE}},
        {"model": 1, "ema": 2},
    ),
    "Lightning's WeightAveraging": (
        {"state_dict": prefixed("model.", numbers(2)), "current_model_state": prefixed("model.", numbers(1))},
        {"model": 1, "ema": 2},
    ),
    "latent-diffusion's": (
        {
            "state_dict": {
                **prefixed("model.diffusion_model.", numbers(1)),
                **{f"model_ema.{name.replace('.', '')}": value for name, value in numbers(2).items()},
                "model_ema.decay": torch.tensor(0.9),
            }
        },
        {"model": 1, "ema": 2},
    ),
    "ema_pytorch's": (
        {**prefixed("online_model.module.", numbers(1)), **prefixed("ema_model.module.", numbers(2)), **BESIDE},
        {"model": 1, "ema": 2},
    ),
    "an average under ema_model.": (
        {"ema": prefixed("ema_model.", numbers(2)), "model": numbers(1)},
        {"model": 1, "ema": 2},
    ),
    "DeepSpeed's": ({"module": numbers(1), "global_steps": 3}, {"model": 1}),
    "a trainer's": ({"model_state_dict": numbers(1), "ema_state_dict": numbers(2)}, {"model": 1, "ema": 2}),
    "NumPy beside": ({"ema": numbers(2), "best_fid": np.float64(3.5), "random": np.random.get_state()}, {"ema": 2}),
    "paths beside": ({"ema": numbers(2), "args": argparse.Namespace(**ARGS, out=pathlib.Path("a/b"))}, {"ema": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_are_found_where_other_trainers_put_them(tmp_path, name):
    held, expected = OTHERS[name]
    torch.save(held, tmp_path / "a.pt")
    found = [read_checkpoint(tmp_path / "a.pt", expected=HEADS)]
    assert found[0].facts["step"] == held.get("global_step", held.get("global_steps"))
    if all(isinstance(value, torch.Tensor) for value in held.values()):
        save_file(held, tmp_path / "a.safetensors")
        found.append(read_checkpoint(tmp_path / "a.safetensors", expected=HEADS))
    for one in found:
        assert one.weights.keys() == expected.keys()
        for which, seed in expected.items():
            assert all(torch.equal(one.weights[which][name], value) for name, value in numbers(seed).items())


def test_two_networks_in_a_file_are_refused(tmp_path):
    torch.save({**prefixed("a.", numbers(1)), **prefixed("b.", numbers(2))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: holds several networks, one of them under 'b\.'; expected one"):
        read_checkpoint(tmp_path / "a.pt", expected=HEADS)


def test_projectors_come_apart_from_the_model_and_one_onto_nothing_is_none(tmp_path):
    found = repa(tmp_path / "a.pt")
    (head,) = read_checkpoint(tmp_path / "a.pt", expected=HEADS).projectors
    assert {f"projectors.0.{name}" for name in head} == set(projector(3))
    assert torch.equal(head["4.bias"], found["model"]["projectors.0.4.bias"])
    repa(tmp_path / "b.pt", model={**numbers(1), **projector(3, width=0)}, ema=None)
    assert read_checkpoint(tmp_path / "b.pt", expected=HEADS).projectors == ()


def test_the_mlp_of_irepa_is_repas_projector_under_another_name_and_its_convolution_keeps_its_own(tmp_path):
    named = {name.replace("projectors.0.", "projectors.0.projection_layer."): v for name, v in projector(3).items()}
    conv = {
        "projectors.1.projection_layer.weight": torch.ones(5, 4, 3, 3),
        "projectors.1.projection_layer.bias": torch.ones(5),
    }
    repa(tmp_path / "a.pt", model={**numbers(1), **named, **conv}, ema=None)
    mlp, other = read_checkpoint(tmp_path / "a.pt", expected=HEADS).projectors
    assert {f"projectors.0.{name}" for name in mlp} == set(projector(3))
    assert {name: tuple(v.shape) for name, v in other.items()} == {
        "projection_layer.weight": (5, 4, 3, 3),
        "projection_layer.bias": (5,),
    }


def test_half_precision_is_read_as_float32_and_absent_positions_are_computed(tmp_path):
    half = {name: value.half() for name, value in numbers(1).items()}
    del half["pos_embed"]
    torch.save(half, tmp_path / "half.pt")
    found = read_checkpoint(tmp_path / "half.pt", expected={"heads": 4, "input_size": 8}).weights["ema"]
    assert {value.dtype for value in found.values()} == {torch.float32}
    torch.testing.assert_close(found["pos_embed"], numbers(1)["pos_embed"])
    with pytest.raises(ValueError, match="half.pt: holds no pos_embed"):
        read_checkpoint(tmp_path / "half.pt", expected=HEADS)


def test_a_file_of_the_old_format_without_a_zip_around_it_is_read(tmp_path):
    torch.save(numbers(1), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pt", expected=HEADS).shape["depth"] == 3


def test_published_sizes_need_no_word_on_their_heads(tmp_path):
    torch.save(numbers(1, depth=12, width=384, heads=6), tmp_path / "s.pt")
    assert exchange.open_weights(tmp_path / "s.pt").shape["heads"] == 6
    torch.save(numbers(1), tmp_path / "t.pt")
    with pytest.raises(ValueError, match="3 blocks of width 32 are no published size"):
        exchange.open_weights(tmp_path / "t.pt")


# ---- what is refused


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("planted", "named"),
    [(Evil(), "system"), (argparse.ArgumentParser, "argparse.ArgumentParser"), (torch.nn.Linear(1, 1), "Linear")],
    ids=["code", "parser", "network"],
)
def test_anything_but_tensors_plain_data_and_a_namespace_is_refused_by_name_and_not_run(
    tmp_path, monkeypatch, planted, named, zipped
):
    monkeypatch.chdir(tmp_path)
    for place in ({"ema": numbers(1), "extra": planted}, {"ema": numbers(1), "args": argparse.Namespace(a=planted)}):
        torch.save(place, "bad.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"bad.pt: refused: it holds [\w.]*{named}[\w.]*, which could run code"):
            read_checkpoint("bad.pt")
    assert not pathlib.Path("executed").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.attn.qkv.bias": None}, r"missing: blocks\.1\.attn\.qkv\.bias"),
        ({"blocks.1.attn.q_norm.weight": torch.ones(8)}, r"not known: blocks\.1\.attn\.q_norm\.weight"),
        ({"blocks.2.mlp.fc2.bias": torch.ones(9)}, r"blocks\.2\.mlp\.fc2\.bias \(found \(9,\), expected \(32,\)\)"),
        ({"blocks.0.attn.proj.bias": torch.full((32,), torch.nan)}, r"not finite: blocks\.0\.attn\.proj\.bias"),
        ({"blocks.0.attn.proj.bias": torch.ones(32, dtype=torch.long)}, r"not finite: blocks\.0\.attn\.proj\.bias"),
        ({"pos_embed": torch.ones(1, 15, 32)}, r"pos_embed is \(1, 15, 32\), expected .* a square"),
        ({"blocks.900000000.mlp.fc1.bias": torch.ones(9)}, "4 blocks up to block 900000000, expected all from 0 on"),
        ({"x_embedder.proj.weight": None}, r"lacks x_embedder\.proj\.weight, which every SiT and DiT has; found "),
        ({"final_layer.linear.weight": None}, r"lacks final_layer\.linear\.weight, which every SiT and DiT has"),
        ({"final_layer.linear.weight": torch.ones(20)}, r"are \(.*\) and \(20,\), expected 4 and 2 dimensions"),
        ({"final_layer.linear.weight": torch.ones(20, 32)}, "20 output entries a patch, expected 16"),
        ({"y_embedder.embedding_table.weight": torch.tensor(1.0)}, r"does not hold y_embedder\.embedding_table"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2)}, "does not hold context_embedder.weight, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    found = {name: value for name, value in {**numbers(1), **change}.items() if value is not None}
    torch.save({"ema": found}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=words) as refusal:
        read_checkpoint(tmp_path / "bad.pt", expected=HEADS)
    assert f"{tmp_path}/bad.pt: " in str(refusal.value)


@pytest.mark.parametrize(
    ("found", "options", "words"),
    [
        ({}, {}, "expected weights, or 'model' or 'ema' with weights in them; found nothing"),
        ({"state_dict": {}, "epoch": 3}, {}, "found 'state_dict', 'epoch'"),
        ([torch.ones(1)], {}, "expected a dictionary of weights, found list"),
        (torch.ones(3), {}, "expected a dictionary of weights, found Tensor"),
        (
            numbers(5, channels=8),
            {},
            "Give its layout: SiT .a velocity., or DiT .noise and its variance.",
        ),
        (
            {"ema": numbers(5), "args": argparse.Namespace(**ARGS)},
            {"expected": HEADS, "layout": "SiT"},
            "is said to be SiT's, but its header says that it is of REPA",
        ),
        (numbers(5), {"expected": HEADS, "layout": "DiT"}, "expected twice as many in DiT's"),
        (numbers(5), {"expected": {**SMALL, "architecture": "dit"}}, "the weights of a SiT, but the model is a DiT"),
        (numbers(5, channels=8), {"expected": SMALL, "layout": "DiT"}, "the weights of a DiT, but the model is a SiT"),
        (
            numbers(5, channels=8),
            {"expected": {**SMALL, "architecture": "dit"}, "layout": "SiT"},
            "the weights of a SiT, but the model is a DiT",
        ),
        (numbers(5), {"expected": HEADS, "layout": "ours"}, "has no header of ours"),
        (numbers(5), {"expected": {"heads": 5}}, "5 heads do not divide its width 32"),
        (
            numbers(5),
            {"expected": {**HEADS, "input_size": 16, "depth": 2}},
            "input_size: found 8, expected 16; depth: found 3, ex",
        ),
        ({"ema": numbers(5), "args": argparse.Namespace(prediction="noise")}, {"expected": HEADS}, "predicts 'noise'"),
        ({"ema": numbers(5), "args": argparse.Namespace(path_type="VP")}, {"expected": HEADS}, "path_type 'VP'"),
    ],
    ids=lambda value: "" if isinstance(value, dict | list | torch.Tensor) else value[:30],
)
def test_files_of_another_kind_are_told_apart(tmp_path, found, options, words):
    torch.save(found, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "bad.pt", **options)


def test_a_truncated_file_a_folder_and_nothing_are_told_apart(tmp_path):
    repa(tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    save_file(numbers(1), tmp_path / "whole.safetensors")
    other = (tmp_path / "whole.safetensors").read_bytes()
    for name, content, words in [
        ("a.pt", whole[: len(whole) // 2], "a truncated file: a zip archive without its end"),
        ("b.pt", b"", "an empty file"),
        ("c.pt", b"root:x", "a truncated or foreign file"),
        ("d.pt", other[:-9], "a truncated or foreign file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: expected a checkpoint, found {words}"):
            read_checkpoint(tmp_path / name)
    for path, words in ((tmp_path, "found a folder"), (tmp_path / "none.pt", "found nothing")):
        with pytest.raises(ValueError, match=words):
            read_checkpoint(path)


@pytest.fixture(scope="module")
def bytes_of_a_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.pt"
    torch.save({"ema": numbers(1, depth=1, width=8, heads=2), "args": argparse.Namespace(**ARGS)}, path)
    return path.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_refused_with_the_files_name_or_read(tmp_path, bytes_of_a_file, data):
    broken = bytearray(bytes_of_a_file)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzzed.pt"
    path.write_bytes(broken)
    try:
        read_checkpoint(path, expected={"heads": 2})
    except ValueError as refusal:
        assert str(path) in str(refusal)


# ---- import and export


def test_an_imported_file_holds_the_weights_their_source_and_no_optimiser(tmp_path, capsys):
    found = repa(tmp_path / "a.pt")
    assert cli.main(["import", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"), "--heads", "4"]) == 0
    tensors = load_file(tmp_path / "a.safetensors")
    for which in ("model", "ema"):
        for name in numbers(1):
            assert torch.equal(tensors.pop(f"{which}/{name}"), found[which][name])
    assert {name.replace("projectors/0/", "projectors.0.") for name in tensors} == set(projector(3))
    header = provenance.provenance_of(tmp_path / "a.safetensors")
    assert header["source"]["file"] == "a.pt" and header["source"]["layout"] == "REPA" and header["step"] == 400_000
    import hashlib

    assert header["source"]["sha256"] == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    assert header["args"] == ARGS and header["provenance"]["command"]
    again = read_checkpoint(tmp_path / "a.safetensors")
    assert again.layout == "ours" and again.shape == {**SMALL, "mlp_ratio": 4.0} and again.facts["path"] == "linear"


def test_the_command_refuses_what_is_there_another_suffix_and_another_size(tmp_path, capsys):
    repa(tmp_path / "a.pt")
    (tmp_path / "there.safetensors").write_text("mine")
    for out, more, words in [
        ("there.safetensors", ["--heads", "4"], "is there already"),
        ("a.bin", ["--heads", "4"], "expected a name that ends in .safetensors"),
        ("b.safetensors", ["--model", "SiT-B/2"], "depth: found 3, expected 12"),
        ("b.safetensors", ["--model", "SiT-Q/2"], "expected one of SiT-S/2"),
    ]:
        assert cli.main(["import", str(tmp_path / "a.pt"), str(tmp_path / out), *more]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "mine" and not (tmp_path / "b.safetensors").exists()


def test_a_state_goes_out_to_repas_layout_and_comes_back_bit_for_bit(make_plan, tmp_path):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE", "milestones": [3]}})
    state = loop.train(plan, plan.state("HASTE", 3))
    whole = load_file(state)
    out, back = tmp_path / "out.pt", tmp_path / "back.safetensors"
    assert cli.main(["export", str(state), str(out), "--format", "repa"]) == 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(out, weights_only=True)
    assert found["steps"] == 3 and found["args"].path_type == "linear" and found["args"].num_classes == 10
    assert found["args"].projector_embed_dims == "16"
    for which in ("model", "ema"):  # what REPA's own model asks for: weights and projectors in one dictionary
        assert {name for name in found[which] if name.startswith("projectors.")} == set(projector(1))
    assert cli.main(["import", str(out), str(back), "--heads", "2"]) == 0
    kept = {n.replace("/features/", "/0/"): v for n, v in whole.items() if not n.startswith("optimizer/")}
    again = load_file(back)
    assert set(again) == set(kept) and all(torch.equal(again[name], value) for name, value in kept.items())


def test_bare_weights_go_out_under_bare_names_and_come_back_bit_for_bit(make_plan, tmp_path):
    plan = make_plan(runs={"vanilla": {"milestones": [3]}})
    state = loop.train(plan, plan.state("vanilla", 3))
    whole = load_file(state)
    for which in ("ema", "model"):
        out = tmp_path / f"{which}.safetensors"
        assert cli.main(["export", str(state), str(out), "--format", "safetensors", "--weights", which]) == 0
        expected = {n.removeprefix(f"{which}/"): v for n, v in whole.items() if n.startswith(f"{which}/")}
        found = load_file(out)
        assert set(found) == set(expected) and all(torch.equal(found[name], v) for name, v in expected.items())
        again = read_checkpoint(out)
        assert again.shape["heads"] == 2 and again.facts["step"] == 3 and again.facts["path"] == "linear"
        model = again.model()
        model.load_state_dict(found)
    with pytest.raises(ValueError, match="has no 'model' weights, only 'ema'"):
        read_checkpoint(tmp_path / "model.safetensors").chosen("model")


def test_a_file_of_no_published_size_goes_out_where_its_heads_are_said(tmp_path, capsys):
    found = repa(tmp_path / "a.pt")
    out = ["export", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors"), "--format", "safetensors"]
    assert cli.main(out) == 2
    assert "no published size" in capsys.readouterr().err
    assert cli.main([*out, "--heads", "4"]) == 0
    again = read_checkpoint(tmp_path / "a.safetensors")
    assert again.shape["heads"] == 4
    assert all(torch.equal(value, found["ema"][name]) for name, value in again.weights["ema"].items())


def test_a_header_of_another_kind_is_refused(tmp_path):
    save_file(numbers(1), tmp_path / "a.safetensors", metadata={"haste": json.dumps({"kind": "part", "schema": 1})})
    with pytest.raises(ValueError, match="expected a state or weights, found kind 'part'"):
        read_checkpoint(tmp_path / "a.safetensors")
