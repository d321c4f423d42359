import argparse
import json
import math
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from haste.files import artefact
from haste.networks.registry import HALF, Encoder
from haste.teachers import encoder
from haste.teachers.encoder import Teacher
from haste.teachers.filters import low_pass

NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def small_network(**changes):
    torch.manual_seed(0)
    network = VisionTransformer(**{**SMALL, **changes})
    with torch.no_grad():  # timm's initialisation is so faint that every attention map would be flat
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def teacher_of(network, **options):
    return Teacher(network, identity="none", norm=options.pop("norm", NORM), **options)


def images(count=3, size=16):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tokens_before(network, x, layer):
    """All tokens, prefix included, as they enter a block."""
    with torch.no_grad():
        tokens = network.norm_pre(network._pos_embed(network.patch_embed(x)))
        for block in network.blocks[:layer]:
            tokens = block(tokens)
    return tokens


def normalised(batch):
    mean, std = (torch.tensor(part)[:, None, None] for part in NORM)
    return (batch.permute(0, 3, 1, 2) / 255 - mean) / std


VARIANTS = {
    "class token": {},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "normalised queries": {"qk_norm": True, "reg_tokens": 1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_queries_and_keys_are_what_the_weights_make_of_the_patch_tokens(changes):
    network = small_network(**changes)
    targets = teacher_of(network)(images(), features=False, attention=[2, 0])
    assert targets.features is None and targets.grid == (4, 4) and set(targets.attention) == {0, 2}
    for layer, (q, k) in targets.attention.items():
        block = network.blocks[layer]
        x = block.norm1(tokens_before(network, normalised(images()), layer))[:, network.num_prefix_tokens :]
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        for found, row, norm in ((q, 0, block.attn.q_norm), (k, 1, block.attn.k_norm)):
            whole = x @ weight[24 * row : 24 * row + 24].T + bias[24 * row : 24 * row + 24]
            heads = torch.stack([norm(whole[..., 8 * head : 8 * head + 8]) for head in range(3)], dim=1)
            assert found.shape == (3, 3, 16, 8)
            torch.testing.assert_close(found, heads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_features_are_the_normalised_patch_tokens_of_the_last_block(changes):
    network = small_network(**changes)
    with torch.no_grad():
        expected = network.forward_features(normalised(images()))[:, network.num_prefix_tokens :]
    found = teacher_of(network)(images(), features=True, attention=[3])
    assert found.features.shape == (3, 16, 24)
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-5)


def test_features_without_a_final_norm_are_the_last_block_as_it_is():
    network = small_network()
    expected = tokens_before(network, normalised(images()), 4)[:, 1:]
    found = teacher_of(network, final_norm=False)(images(), features=True).features
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("final_norm", [True, False])
def test_features_of_a_layer_are_its_tokens_through_the_last_norm_and_later_blocks_run_for_attention_alone(final_norm):
    network, ran = small_network(), []
    for layer, block in enumerate(network.blocks):
        block.register_forward_hook(lambda module, given, out, layer=layer: ran.append(layer))
    teacher = teacher_of(network, final_norm=final_norm)
    for layer in range(4):
        expected = tokens_before(network, normalised(images()), layer + 1)[:, 1:]
        expected = network.norm(expected) if final_norm else expected
        for attention, last in (((), layer), ((2,), max(layer, 2))):
            ran.clear()
            found = teacher(images(), features=True, layer=layer, attention=attention)
            torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-5)
            assert ran == list(range(last + 1)) and set(found.attention) == set(attention)
    torch.testing.assert_close(found.features, teacher(images(), features=True).features, rtol=0, atol=0)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=r"it has layers 0\.\.3"):
            teacher(images(), features=True, layer=layer)


def test_a_compiled_teacher_is_one_graph_for_each_kind_of_request_and_says_the_same():
    plain, compiled = (teacher_of(small_network(qk_norm=True, reg_tokens=1)) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile(backend="eager")
    request = {"features": True, "layer": 1, "attention": [2, 0]}
    requests = [request, {"features": False, "attention": [1]}, request]
    for asked in requests:
        found, expected = (teacher(images(), **asked) for teacher in (compiled, plain))
        assert found.attention.keys() == expected.attention.keys() and found.grid == expected.grid
        assert (found.features is None) == (expected.features is None)
        pairs = [(found.features, expected.features)] if found.features is not None else []
        pairs += [
            pair
            for layer, both in found.attention.items()
            for pair in zip(both, expected.attention[layer], strict=True)
        ]
        assert all(torch.equal(*pair) for pair in pairs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_softmax_over_patches_is_the_whole_attention_map_renormalised():
    network = small_network(reg_tokens=2)
    block = network.blocks[1]
    maps = []
    attn = block.attn
    attn.fused_attn = False  # the plain path shows its map to the dropout that follows it
    attn.attn_drop.register_forward_hook(lambda module, given, out: maps.append(given[0]))
    q, k = teacher_of(network)(images(), features=False, attention=[1]).attention[1]
    patches = maps[0][:, :, 3:, 3:]
    expected = patches / patches.sum(-1, keepdim=True)
    assert expected.std() > 0.01
    torch.testing.assert_close((q @ k.mT / math.sqrt(8)).softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_attention_stays_fused_while_it_is_read(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    teacher_of(small_network())(images(), features=True, attention=[0, 1, 2, 3])
    assert len(calls) == 4


def test_blocks_after_the_last_one_needed_are_not_run():
    network = small_network()
    ran = []
    for layer, block in enumerate(network.blocks):
        block.register_forward_hook(lambda module, given, out, layer=layer: ran.append(layer))
    teacher = teacher_of(network)
    teacher(images(), features=False, attention=[1, 0])
    assert ran == [0, 1]
    ran.clear()
    teacher(images(), features=True, attention=[1])
    assert ran == [0, 1, 2, 3]


def test_no_hook_is_left_behind_and_nothing_is_trainable():
    network = small_network()
    teacher = teacher_of(network.train())
    teacher(images(), features=True, attention=[0, 3])
    with pytest.raises(ValueError, match="NHWC"):
        teacher(images().float(), features=False, attention=[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


def test_targets_can_enter_a_loss_that_is_differentiated():
    targets = teacher_of(small_network())(images(), features=True, attention=[0])
    student = torch.ones_like(targets.features, requires_grad=True)
    (student * targets.features).sum().backward()  # saves the target: an inference tensor would be refused
    torch.testing.assert_close(student.grad, targets.features)


def test_sizes_are_those_of_the_network():
    teacher = teacher_of(small_network())
    assert (teacher.depth, teacher.heads, teacher.width, teacher.head_width, teacher.grid) == (4, 3, 24, 8, (4, 4))


@pytest.mark.parametrize("layers", [[4], [-1], [0, 17]])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(layers):
    with pytest.raises(ValueError, match=r"it has layers 0\.\.3"):
        teacher_of(small_network())(images(), features=True, attention=layers)


def test_asking_for_nothing_is_refused():
    with pytest.raises(ValueError, match="neither features"):
        teacher_of(small_network())(images(), features=False)


def test_images_are_resized_bicubically_without_antialiasing():
    teacher = teacher_of(small_network())
    found = teacher.prepare(images(size=40))
    sampled = normalised(images(size=40))
    # With a factor of 2.5 sample centres lie at 2.5 i + 0.75; the kernel (a = -0.75) reads the four pixels around each.
    near = [[math.floor(2.5 * i + 0.75) + d for d in (-1, 0, 1, 2)] for i in range(16)]
    rows = torch.zeros(16, 40)
    for i, pixels in enumerate(near):
        for pixel in pixels:
            d = abs(2.5 * i + 0.75 - pixel)
            inner = (1.25 * d - 2.25) * d * d + 1
            outer = ((-0.75 * d + 3.75) * d - 6) * d + 3
            rows[i, min(max(pixel, 0), 39)] += inner if d <= 1 else outer
    torch.testing.assert_close(found, rows @ sampled @ rows.T, rtol=1e-4, atol=1e-4)


def test_resizing_before_normalising_differs_by_rounding_only():
    batch, network = images(size=40), small_network()
    after, before = teacher_of(network), teacher_of(network, resize_first=True)
    torch.testing.assert_close(before.prepare(batch), after.prepare(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resize_first", [False, True])
def test_a_teacher_sees_its_normalised_image_filtered_at_its_own_size_whatever_comes_first(resize_first):
    teacher = teacher_of(small_network(), resize_first=resize_first)
    before = teacher.prepare(images(size=40))
    teacher.low_pass = 0.5
    found = teacher.prepare(images(size=40))
    assert found.shape == (3, 3, 16, 16)
    torch.testing.assert_close(found, low_pass(before, 0.5), rtol=0, atol=0)
    mean, std = (torch.tensor(part)[:, None, None] for part in NORM)
    torch.testing.assert_close(found, (low_pass(before * std + mean, 0.5) - mean) / std, rtol=1e-4, atol=1e-5)


def test_features_and_attention_of_a_filtered_teacher_are_those_of_filtered_images():
    network = small_network()
    teacher = teacher_of(network)
    teacher.low_pass = 0.5
    found = teacher(images(), features=True, attention=[1])
    with torch.no_grad():
        expected = network.forward_features(low_pass(normalised(images()), 0.5))[:, 1:]
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-5)
    teacher.low_pass = None
    plain = teacher(images(), features=True, attention=[1])
    assert (plain.features - found.features).abs().max() > 0.1
    assert (plain.attention[1][0] - found.attention[1][0]).abs().max() > 0.01


# ---- from a folder


@pytest.fixture
def folder(tmp_path):
    network = small_network(qk_norm=True)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    part = {
        "schema": artefact.SCHEMA,
        "kind": "part",
        "part": "teacher",
        "name": "small",
        "architecture": {
            "kind": "VisionTransformer",
            "kwargs": {**SMALL, "qk_norm": True},
            "mean": NORM[0],
            "std": NORM[1],
        },
        "identity": artefact.file_identity(tmp_path / "model.safetensors"),
    }
    artefact.write_json(tmp_path / "part.json", part)
    return tmp_path


def test_a_folder_gives_back_the_teacher_that_was_saved(folder):
    teacher = Teacher.load(folder)
    expected = teacher_of(small_network(qk_norm=True))(images(), features=True, attention=[2])
    found = teacher(images(), features=True, attention=[2])
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=0)
    torch.testing.assert_close(found.attention, expected.attention, rtol=0, atol=0)
    assert teacher.identity == artefact.file_identity(folder / "model.safetensors")


def test_a_wrong_truncated_or_foreign_folder_is_refused(folder):
    weights, path = folder / "model.safetensors", folder / "part.json"
    description = json.loads(path.read_text())
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights"):
        Teacher.load(folder)
    path.write_text(json.dumps(description | {"identity": artefact.file_identity(weights)}))
    with pytest.raises(ValueError, match="do not fit"):
        Teacher.load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="found no file"):
        Teacher.load(folder)
    path.write_text(json.dumps(description | {"part": "detector"}))
    with pytest.raises(ValueError, match="expected a teacher, found 'detector'"):
        Teacher.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"part\.json"):
        Teacher.load(folder)


# ---- public encoders, on random weights saved as their authors' files are


def shrink(monkeypatch, name, **overrides):
    spec = encoder.TEACHERS[name]
    small = {"depth": 3, "embed_dim": 24, "num_heads": 3, **overrides}
    spec = replace(spec, overrides={**spec.overrides, **small})
    monkeypatch.setitem(encoder.TEACHERS, name, spec)
    torch.manual_seed(2)
    return timm.create_model(spec.timm, num_classes=0, **spec.overrides).eval()


def test_dinov2_with_registers_loads_its_authors_file_and_resamples_positions(monkeypatch, tmp_path):
    network = shrink(monkeypatch, "DINOv2-B-reg")  # 518 px, a grid of 37 x 37
    state = dict(network.state_dict())
    state["mask_token"] = torch.zeros(1, 24)
    state["register_tokens"] = state.pop("reg_token")
    class_position = torch.full((1, 1, 24), 0.7)
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - class_position
    torch.save(state, tmp_path / "dinov2.pth")

    teacher = Teacher.load("DINOv2-B-reg", weights=tmp_path / "dinov2.pth", resolution=64)
    assert (teacher.size, teacher.grid) == ((56, 56), (4, 4))
    assert teacher.identity == artefact.file_identity(tmp_path / "dinov2.pth")

    positions = network.pos_embed.detach().reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(positions, (4, 4), mode="bicubic", antialias=True)
    expected = timm.create_model("vit_base_patch14_reg4_dinov2", img_size=56, depth=3, embed_dim=24, num_heads=3)
    own = {key: value for key, value in network.state_dict().items() if key != "pos_embed"}
    expected.load_state_dict(own | {"pos_embed": resampled.flatten(2).mT}, strict=False)
    with torch.no_grad():
        wanted = expected.eval().forward_features(teacher.prepare(images(size=64)))[:, 5:]
    found = teacher(images(size=64), features=True).features
    assert found.shape == (3, 16, 24)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["model", "state_dict", "module."])
def test_a_trainers_file_with_numpy_and_arguments_beside_the_weights_is_read(monkeypatch, tmp_path, place):
    state = shrink(monkeypatch, "MAE-L").state_dict()
    held = {f"module.{name}": value for name, value in state.items()} if place == "module." else {place: dict(state)}
    beside = {"args": argparse.Namespace(out=tmp_path), "loss": np.float64(0.5), "epoch": 3}
    torch.save(held if place == "module." else held | beside, tmp_path / "mae.pth")
    found = Teacher.load("MAE-L", weights=tmp_path / "mae.pth").network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items() if name != "pos_embed")  # resampled


def test_clip_gives_its_tokens_before_the_last_norm_with_its_own_activation(monkeypatch, tmp_path):
    network = shrink(monkeypatch, "CLIP-B/16")
    torch.manual_seed(3)
    with torch.no_grad():
        network.norm.weight.normal_()
    head = {"head.weight": torch.randn(512, 24), "head.bias": torch.zeros(512)}
    safetensors.torch.save_file(network.state_dict() | head, tmp_path / "clip.safetensors")
    teacher = Teacher.load("CLIP-B/16", weights=tmp_path / "clip.safetensors", resolution=256)
    assert teacher.grid == (14, 14)

    with torch.no_grad():
        x = network.norm_pre(network._pos_embed(network.patch_embed(teacher.prepare(images(size=256)))))
        for block in network.blocks:
            x = x + block.attn(block.norm1(x))
            hidden = block.mlp.fc1(block.norm2(x))
            x = x + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
    found = teacher(images(size=256), features=True).features
    torch.testing.assert_close(found, x[:, 1:], rtol=1e-4, atol=1e-5)


def test_a_file_that_lacks_weights_of_clip_or_has_others_is_refused_though_timm_takes_it(monkeypatch, tmp_path):
    whole = shrink(monkeypatch, "CLIP-B/16").state_dict()
    others = {"missing: blocks.1.mlp.fc1.weight": {k: v for k, v in whole.items() if k != "blocks.1.mlp.fc1.weight"}}
    others["not known: blocks.3.norm1.weight"] = {**whole, "blocks.3.norm1.weight": torch.ones(24)}
    for what, state in others.items():
        safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
        with pytest.raises(ValueError, match=f"these are not weights of teacher CLIP-B/16.*{what}"):
            Teacher.load("CLIP-B/16", weights=tmp_path / "clip.safetensors")


@pytest.mark.parametrize("name", sorted(encoder.TEACHERS))
def test_every_public_encoder_exists_in_timm_with_this_normalisation_patch_and_grid(name):
    spec = encoder.TEACHERS[name]
    source = timm.get_pretrained_cfg(spec.timm)
    assert spec.by_file or (source.mean, source.std) == spec.norm
    with torch.device("meta"):
        network = timm.create_model(spec.timm, img_size=spec.size, num_classes=0, depth=1)
    assert (type(network), type(network.blocks[0].attn)) in encoder.PLAIN
    assert encoder.known(name) is spec and (encoder.known(spec.timm) is spec) != spec.by_file
    grid = 14 if name == "CLIP-B/16" else 16
    assert network.patch_embed.patch_size == (spec.patch, spec.patch)
    assert network.patch_embed.grid_size == (grid, grid)


def test_any_plain_vit_of_timm_can_be_a_teacher_and_no_other_encoder():
    assert encoder.known("vit_small_patch16_224.augreg_in21k") == Encoder(
        "vit_small_patch16_224.augreg_in21k", 16, 256, 12, 6, 384, norm=HALF
    )
    dinov3 = encoder.known("vit_small_patch16_dinov3.lvd1689m")  # Eva
    assert dinov3 == Encoder("vit_small_patch16_dinov3.lvd1689m", 16, 256, 12, 6, 384)
    with pytest.raises(ValueError, match="VisionTransformerRelPos is not a plain vision transformer"):
        encoder.known("vit_relpos_small_patch16_224")


def test_without_a_network_the_message_says_how_to_give_a_file(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="Give a local file"):
        Teacher.load("DINOv2-B")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match="Give a local file"):
        Teacher.load("I-JEPA-H")


def test_unsuitable_encoders_weights_and_sizes_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="shifted windows"):
        Teacher.load("swin_base_patch4_window7_224")
    with pytest.raises(ValueError, match="convolutional"):
        Teacher.load("convnext_base")
    with pytest.raises(ValueError, match="neither a folder, nor in timm, nor one of CLIP-B/16, "):
        Teacher.load("dinov9")
    with pytest.raises(ValueError, match=r"100 px give an input of 87\.5 px"):
        Teacher.load("DINOv2-B", resolution=100, weights=tmp_path / "x")
    with pytest.raises(ValueError, match="found no file"):
        Teacher.load("DINOv2-B", weights=tmp_path / "nowhere.pth")
    shrink(monkeypatch, "DINOv2-B")
    for name in ("foreign.pth", "foreign.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match=f"{name}: expected the weights of teacher DINOv2-B, found a truncated"):
            Teacher.load("DINOv2-B", weights=tmp_path / name)
    other = VisionTransformer(**SMALL).state_dict()
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="these are not weights of teacher DINOv2-B"):
        Teacher.load("DINOv2-B", weights=tmp_path / "other.safetensors")


def test_a_weight_file_cannot_run_code(monkeypatch, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    shrink(monkeypatch, "DINOv2-B")
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth: refused: it holds [\w.]*open, which could run code"):
        Teacher.load("DINOv2-B", weights=tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
