"""Public teachers: the attention that they themselves pay, and files in the layouts that their authors publish."""

import argparse
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_encoder import images, shrink

from haste.networks import weights
from haste.teachers import encoder
from haste.teachers.encoder import Teacher


@pytest.mark.parametrize("name", sorted(encoder.TEACHERS))
def test_attention_by_the_captured_queries_and_keys_is_what_the_teachers_own_attention_returns(monkeypatch, name):
    spec = encoder.TEACHERS[name]
    network = shrink(monkeypatch, name, depth=2, img_size=4 * spec.patch)
    with torch.no_grad():  # timm's initialisation is so faint that every attention map would be flat
        for parameter in network.parameters():
            parameter.normal_(std=0.7)
    attn, paid = network.blocks[1].attn, {}
    attn.register_forward_hook(lambda module, given, out: paid.update(x=given[0], out=out))
    teacher = Teacher(network, identity="none", norm=spec.norm)
    q, k = teacher(images(size=4 * spec.patch), features=False, attention=[1]).attention[1]
    assert q.shape == k.shape == (3, 3, 16, 8)

    # The class and register tokens' own are not handed out; nothing turns them.
    made = torch.nn.functional.linear(paid["x"], attn.qkv.weight, attn.qkv.bias)
    before = made.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)[:, :, :, : network.num_prefix_tokens]
    v = made.unflatten(-1, (3, 3, 8))[:, :, 2].transpose(1, 2)
    q, k = (torch.cat([prefix, patches], 2) for prefix, patches in zip(before, (q, k), strict=False))
    maps = (q @ k.mT / math.sqrt(8)).softmax(-1)
    assert maps.std() > 0.01 and network.num_prefix_tokens == (
        0 if "JEPA" in name or "SigLIP" in name else 5 if "reg" in name or "DINOv3" in name else 1
    )
    with torch.no_grad():
        expected = attn.proj((maps @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(paid["out"], expected, rtol=1e-4, atol=1e-4)


# ---- authors' files, with random weights


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def dino(state, other):
    heads = {"head.mlp.0.weight": torch.zeros(4, 24), "head.last_layer.weight_v": torch.zeros(2, 4)}
    teacher = under("backbone.", state) | heads
    student = under("module.backbone.", other) | under("module.", heads)
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    beside = {"args": argparse.Namespace(arch="vit_base"), "epoch": 400, "dino_loss": {"center": torch.zeros(1, 2)}}
    return {"student": student, "teacher": teacher, "optimizer": moments, **beside}


def dino_alone(state, other):
    return dict(state)


def mae(state, other):
    decoder = {"decoder_embed.weight": torch.zeros(8, 24), "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    decoder |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    return {"model": state | decoder, "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=np.float64(0.1))}


def ijepa(state, other):
    predictor = {"module.mask_token": torch.zeros(1, 1, 8), "module.predictor_blocks.0.norm1.weight": torch.ones(8)}
    sets = {"encoder": under("module.", state), "predictor": predictor, "target_encoder": under("module.", other)}
    return {**sets, "opt": {"state": {}}, "scaler": None, "epoch": 300, "loss": 0.1, "lr": 1e-3}


def ijepa_target(state, other):
    return {"target_encoder": under("module.", state), "epoch": 300}


def moco(state, other):
    heads = {"head.0.weight": torch.zeros(4, 24), "head.1.running_mean": torch.zeros(4)}
    own = under("module.base_encoder.", state | heads) | under("module.momentum_encoder.", other | heads)
    own |= {"module.predictor.0.weight": torch.zeros(4, 4)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": own, "optimizer": {"state": {}}, "scaler": {}}


def dinov3(state, other):
    named = (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens"))
    found = {"mask_token": torch.zeros(1, 24), "rope_embed.periods": torch.ones(2)}
    for name, value in state.items():
        for ours, theirs in named:
            name = name.replace(ours, theirs)
        found[name] = value
    for i in range(3):
        found[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(72)
        found[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(72)
    return found


FILES = {
    "DINO-B": (dino, ["dino_loss", "head", "student"]),
    "DINO-B alone": (dino_alone, []),
    "MAE-L": (mae, ["decoder_blocks", "decoder_embed", "decoder_pos_embed", "mask_token"]),
    "I-JEPA-H": (ijepa, ["predictor", "target_encoder"]),
    "I-JEPA-H target": (ijepa_target, []),
    "MoCov3-B": (moco, ["head", "module.momentum_encoder", "module.predictor"]),
    "DINOv3-B": (dinov3, ["mask_token", "rope_embed"]),
}


@pytest.mark.parametrize("case", FILES)
def test_an_authors_file_gives_its_encoder_names_what_is_not_used_and_is_refused_where_a_weight_is_missing(
    monkeypatch, tmp_path, caplog, case
):
    name, (layout, unused) = case.split()[0], FILES[case]
    state = shrink(monkeypatch, name).state_dict()
    file = tmp_path / "authors.pth"
    torch.save(layout(state, {one: value + 1 for one, value in state.items()}), file)
    with caplog.at_level(logging.INFO, "haste.networks"):
        found = Teacher.load(name, weights=file).network.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[one], value) for one, value in state.items() if one != "pos_embed")  # is resampled
    said = [line.getMessage() for line in caplog.records if line.name == "haste.networks"]
    assert said == ([f"{file}: of this file teacher {name} does not use {', '.join(unused)}"] if unused else [])
    small = replace(encoder.TEACHERS[name], depth=3, width=24)
    assert weights.check_transformer(file, name, small) == 3  # as the plan looks at it

    lost = {one: value for one, value in state.items() if one != "blocks.1.norm2.weight"}
    torch.save(layout(lost, state), file)
    with pytest.raises(
        ValueError, match=rf"(?s)authors\.pth: these are not weights of teacher {name}.*blocks\.1\.norm2"
    ):
        Teacher.load(name, weights=file)


def test_mocov3_has_its_fixed_positions_resampled_with_nothing_for_the_class_token_and_is_mended_where_misnamed(
    monkeypatch, tmp_path
):
    state = shrink(monkeypatch, "MoCov3-L", depth=15).state_dict()
    at, omega = np.mgrid[:14, :14].reshape(2, -1, 1), 1 / 10000 ** (np.arange(6) / 6)  # column, row
    angles = at * omega
    waves = np.concatenate([np.sin(angles[0]), np.cos(angles[0]), np.sin(angles[1]), np.cos(angles[1])], axis=1)
    fixed = torch.from_numpy(waves).float()
    held = state | {"pos_embed": torch.cat([torch.zeros(1, 24), fixed])[None]}
    wrong = {"blocks.13.norm1": "blocks.13.norm13", "blocks.13.mlp.fc1": "blocks.13.mlp.fc13"}
    wrong |= {"blocks.14.norm2": "blocks.14.norm14", "blocks.14.mlp.fc2": "blocks.14.mlp.fc14"}
    for right, name in wrong.items():
        held = {one.replace(f"{right}.", f"{name}."): value for one, value in held.items()}
    torch.save(moco(held, state), tmp_path / "mocov3.pth.tar")
    network = Teacher.load("MoCov3-L", weights=tmp_path / "mocov3.pth.tar").network
    assert (network.norm.eps, network.patch_embed.grid_size) == (1e-6, (16, 16))
    grid = fixed.T.reshape(1, 24, 14, 14)
    expected = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(network.pos_embed[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert not network.pos_embed[:, 0].any()
    found = network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items() if name != "pos_embed")


def test_mocov3_asks_for_a_file_and_timms_own_network_of_that_size_keeps_its_weights_and_normalisation():
    with pytest.raises(ValueError, match="teacher MoCov3-B: timm has no weights of it; give its authors' file"):
        Teacher.load("MoCov3-B")
    assert encoder.known("vit_base_patch16_224").norm == ((0.5,) * 3, (0.5,) * 3)


def test_biases_that_timms_dinov3_has_no_place_for_are_refused_instead_of_dropped(monkeypatch, tmp_path):
    state = shrink(monkeypatch, "DINOv3-B").state_dict()
    held = dinov3(state, state)
    held["blocks.1.attn.qkv.bias"][30] = 1.0  # of a key: masked
    torch.save(held, tmp_path / "dinov3.pth")
    Teacher.load("DINOv3-B", weights=tmp_path / "dinov3.pth")
    held["blocks.1.attn.qkv.bias"][60] = 1.0  # of a value
    torch.save(held, tmp_path / "dinov3.pth")
    with pytest.raises(ValueError, match=r"dinov3\.pth: blocks\.1\.attn\.qkv\.bias is not zero"):
        Teacher.load("DINOv3-B", weights=tmp_path / "dinov3.pth")


def test_a_file_with_two_encoders_of_which_nothing_says_which_is_meant_is_refused_with_both(monkeypatch, tmp_path):
    state = shrink(monkeypatch, "DINO-B").state_dict()
    torch.save({"left": state, "right": state}, tmp_path / "two.pth")
    with pytest.raises(
        ValueError, match=r"two\.pth: holds several encoders \(left/, right/\), expected one of teacher"
    ):
        Teacher.load("DINO-B", weights=tmp_path / "two.pth")
