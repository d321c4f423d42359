"""MM-DiT against plain attention in float64: text and image attend to each other, and text is never supervised."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from haste.align.losses import attention_loss
from haste.config import MODELS
from haste.config.parts import model_of
from haste.data.captions import Captions
from haste.diffusion.interpolant import Interpolant
from haste.models.denoiser import Denoiser
from haste.models.heads import Projector
from haste.models.mmdit import MMDiT
from haste.networks import joint

SHAPE = {"input_size": 6, "in_channels": 3, "text_width": 10, "depth": 3, "width": 16, "heads": 2}
PUBLISHED = {"input_size": 32, "in_channels": 4, "text_width": 768, "text_tokens": 77}
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")


def keys(depth, norm=False):
    """The names of REPA's and HASTE's checkpoints, without a projector."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "context_embedder"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for i in range(depth):
        of_text = ("attn.qkv", "adaLN_modulation.1") if i == depth - 1 else BLOCK
        sides = {"context_block": of_text, "x_block": BLOCK}
        layers += [f"joint_blocks.{i}.{side}.{layer}" for side, inside in sides.items() for layer in inside]
    found = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"pos_embed"}
    sides = [f"joint_blocks.{i}.{side}.attn" for i in range(depth) for side in ("context_block", "x_block")]
    return found | {f"{side}.{name}.weight" for side in sides if norm for name in ("ln_q", "ln_k")}


def questions(count=2, tokens=5, dtype=torch.float64, **changes):
    shape, generator = {**SHAPE, **changes}, torch.Generator().manual_seed(7)
    side, channels = shape["input_size"], shape["in_channels"]
    x = torch.randn(count, channels, side, side, generator=generator, dtype=dtype)
    text = torch.randn(count, tokens, shape["text_width"], generator=generator, dtype=dtype)
    return x, torch.rand(count, generator=generator, dtype=dtype), text


def made(dtype=torch.float64, **changes):
    return MMDiT(**{**SHAPE, **changes}, generator=torch.Generator().manual_seed(3)).to(dtype)


# ---- plain and slow, from the equations


def plain(w, x, t, text, depth, heads, patch=2):
    """The velocity by loops over heads and explicit softmaxes; `w` are the weights by their names."""

    def linear(name, value):
        return value @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def normed(value, shift, scale):
        value = value - value.mean(-1, keepdim=True)
        value = value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return value * (1 + scale[:, None]) + shift[:, None]

    def rms(value, name):
        if name not in w:
            return value
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def mlp(name, value):
        hidden = linear(f"{name}.fc1", value)
        gelu = hidden / 2 * (1 + (math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)).tanh())
        return linear(f"{name}.fc2", gelu)

    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // patch
    width, k = w["context_embedder.bias"].shape[0], w["context_embedder.bias"].shape[0] // heads
    cells = [x[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)].flatten(1)
             for i in range(side) for j in range(side)]  # fmt: skip
    angle = [[place / 10000 ** (n / (width // 4)) for n in range(width // 4)] for place in range(side)]
    waves = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angle]
    positions = torch.tensor([waves[j] + waves[i] for i in range(side) for j in range(side)], dtype=x.dtype)
    image = linear("x_embedder.proj", torch.stack(cells, dim=1)) + positions
    text = linear("context_embedder", text)
    w_t = torch.tensor([10000 ** (-n / 128) for n in range(128)], dtype=x.dtype)
    features = torch.cat([(t[:, None] * w_t).cos(), (t[:, None] * w_t).sin()], dim=1)
    c = functional.silu(linear("t_embedder.mlp.2", functional.silu(linear("t_embedder.mlp.0", features))))
    for i in range(depth):
        streams, parts = {"context_block": text, "x_block": image}, {}
        for side_, stream in streams.items():
            name = f"joint_blocks.{i}.{side_}"
            parts[side_] = linear(f"{name}.adaLN_modulation.1", c).split(width, dim=1)
            qkv = linear(f"{name}.attn.qkv", normed(stream, *parts[side_][:2])).split(width, dim=2)
            streams[side_] = (stream, qkv)
        joined = [torch.cat([streams["context_block"][1][n], streams["x_block"][1][n]], dim=1) for n in range(3)]
        length, attended = text.shape[1], []
        for head in range(heads):
            q, key, v = (piece[:, :, head * k : (head + 1) * k] for piece in joined)
            of_text, of_image = (f"joint_blocks.{i}.{side_}.attn.ln_" for side_ in streams)
            q, key = (torch.cat([rms(piece[:, :length], f"{of_text}{letter}.weight"),
                                 rms(piece[:, length:], f"{of_image}{letter}.weight")], dim=1)
                      for piece, letter in ((q, "q"), (key, "k")))  # fmt: skip
            attended.append((q @ key.mT / math.sqrt(k)).softmax(-1) @ v)
        both = torch.cat(attended, dim=2)
        new = {}
        for side_, rows in (("context_block", both[:, :length]), ("x_block", both[:, length:])):
            if len(parts[side_]) == 6:
                name, (stream, _) = f"joint_blocks.{i}.{side_}", streams[side_]
                _, _, gate, shift_m, scale_m, gate_m = parts[side_]
                stream = stream + gate[:, None] * linear(f"{name}.attn.proj", rows)
                new[side_] = stream + gate_m[:, None] * mlp(f"{name}.mlp", normed(stream, shift_m, scale_m))
        text, image = new.get("context_block"), new["x_block"]
    out = linear("final_layer.linear", normed(image, *linear("final_layer.adaLN_modulation.1", c).split(width, dim=1)))
    rows = out.view(batch, side, side, patch, patch, channels)
    return torch.einsum("bijpqc->bcipjq", rows).reshape(batch, channels, side * patch, side * patch)


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_velocity_and_every_gradient_are_those_of_plain_joint_attention(qk_norm):
    model = made(qk_norm=qk_norm)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ln_" in name:
                value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    x, t, text = questions()
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    inputs = [[x.clone().requires_grad_(), t, text.clone().requires_grad_()] for _ in "ab"]
    ours, expected = model(*inputs[0])[0], plain(weights, *inputs[1], SHAPE["depth"], SHAPE["heads"])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    for velocity in (ours, expected):
        (velocity * torch.arange(velocity.numel(), dtype=velocity.dtype).view_as(velocity).sin()).sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, weights[name].grad, rtol=1e-5, atol=1e-7, msg=name)
    for one, other in zip(*inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_text_has_no_positions_and_another_word_is_another_velocity():
    model, (x, t, text) = made(), questions()
    with torch.no_grad():
        velocity = model(x, t, text)[0]
        torch.testing.assert_close(model(x, t, text[:, [3, 0, 4, 2, 1]])[0], velocity, rtol=1e-12, atol=1e-12)
        assert (model(x, t, text.flip(0))[0] - velocity).abs().max() > 1e-3


def test_the_published_model_has_505070608_parameters_and_its_projector_7344896():
    with torch.device("meta"):
        model, projector = MMDiT(**PUBLISHED, **MODELS["MM-DiT"].settings), Projector(768, 768)
    count = [sum(p.numel() for p in network.parameters()) for network in (model, projector)]
    assert count == [505_070_608, 7_344_896]
    assert model.pos_embed.shape == (1, 256, 768) and model.state_dict().keys() == keys(24)
    assert model.taps["attention.7"].heads == 24 and model.taps["tokens.8"].grid == (16, 16)


def test_what_a_plan_knows_of_it_by_formulas_is_what_counting_its_operations_gives():
    settings = {"depth": 3, "width": 32, "heads": 4, "patch_size": 2, "mlp_ratio": 1.5, "qk_norm": "rms"}
    condition = Captions(classes=0, encoder="words", tokens=5, width=6, attention_mask=False)
    of = {"process": Interpolant(), "condition": condition, "input_size": 8, "in_channels": 3}
    counted = Denoiser.facts.__func__(MMDiT, settings, **of)
    assert MMDiT.facts(settings, **of) == counted and counted.flops > 1e6


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_its_weights_have_the_names_of_public_checkpoints_and_the_shapes_that_readers_expect(qk_norm):
    shape = {**SHAPE, "patch_size": 3, "mlp_ratio": 1.7, "qk_norm": qk_norm}
    found = {name: tuple(value.shape) for name, value in MMDiT(**shape).state_dict().items()}
    assert found.keys() == keys(3, norm=qk_norm == "rms") and found == joint.shapes(shape)


def test_it_begins_as_pytorch_begins_with_nothing_at_zero():
    model = made(width=64, depth=2, qk_norm="rms").requires_grad_(False)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.RMSNorm):
            assert layer.weight.eq(1).all()
        elif isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max() == pytest.approx(bound, rel=0.02), name
            assert layer.weight.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert layer.bias.abs().max() <= bound and layer.bias.std() > 0.3 * bound, name
    head = Projector(16, 8, hidden=64)
    head.initialise(torch.Generator().manual_seed(1), model.fill)
    assert all(layer.bias.all() for layer in head if isinstance(layer, torch.nn.Linear))


def test_first_weights_are_the_generators_whatever_was_drawn_elsewhere():
    first = made().state_dict()
    torch.randn(3)
    assert all(torch.equal(value, first[name]) for name, value in made().state_dict().items())


def test_attention_loss_of_a_layer_does_not_touch_the_text_in_that_layer():
    model, (x, t, text) = made(), questions()
    tap = model(x, t, text, {"attention.1"})[1]["attention.1"]
    assert tap.q.shape == tap.k.shape == (2, 2, 9, 8) and tap.logsumexp is None
    q, k = (torch.randn(2, 3, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    attention_loss(tap.q, tap.k, q, k, heads=2).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    of_text, of_image = (gradients[f"joint_blocks.1.{side}.attn.qkv.weight"] for side in ("context_block", "x_block"))
    assert of_text is None or not of_text.any()
    assert of_image[:32].any() and not of_image[32:].any()  # q and k, and not v
    assert gradients["joint_blocks.0.context_block.attn.qkv.weight"].any()  # whose text the image had attended to


def test_features_are_the_images_tokens_and_taps_change_nothing():
    model, (x, t, text) = made(), questions()
    with torch.no_grad():
        velocity, tapped = model(x, t, text, set(model.taps))
        assert torch.equal(velocity, model(x, t, text)[0])
        assert all(tapped[f"tokens.{m}"].shape == (2, 9, 16) for m in (1, 2, 3))
        last = model.unpatchify(model.final_layer(tapped["tokens.3"], model.t_embedder(t)))
    assert torch.equal(last, velocity)
    with pytest.raises(ValueError, match=r"no tap 'tokens\.4': a MMDiT of 3 blocks has tokens\.1 to tokens\.3"):
        model(x, t, text, {"tokens.4"})


def test_blocks_that_are_computed_again_give_the_same_gradients():
    gradients = []
    for again in (False, True):
        model, asked = made(), questions()
        model.checkpoint_blocks = again
        velocity, tapped = model(*asked, {"attention.0", "tokens.2"})
        (velocity.sum() + tapped["attention.0"].q.sum() + tapped["tokens.2"].square().sum()).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())


def test_a_larger_grid_has_more_positions_of_the_same_spacing():
    small, large = (made(input_size=side).pos_embed.unflatten(1, (side // 2, side // 2)) for side in (6, 12))
    assert torch.equal(large[:, :3, :3], small)
    with pytest.raises(ValueError, match="input_size 7 is not a multiple of patch_size 2"):
        made(input_size=7)


def test_half_precision_runs_every_layer_and_norms_in_float32():
    model = made(torch.float32, qk_norm="rms")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half, tapped = model(*questions(dtype=torch.float32), {"attention.1"})
    assert tapped["attention.1"].q.dtype == torch.bfloat16
    with torch.no_grad():
        whole = model(*questions(dtype=torch.float32))[0]
    np.testing.assert_allclose(half.float(), whole, atol=0.1)


def test_width_and_heads_follow_from_the_depth_and_the_defaults_are_the_published_model():
    assert model_of({"architecture": "mmdit"}) == MODELS["MM-DiT"]
    assert model_of({"architecture": "mmdit", "depth": 6}).settings.items() >= {"width": 192, "heads": 6}.items()
    for given, words in [
        ({"width": 20, "heads": 3}, "width 20 is not divisible by heads 3"),
        ({"width": 6, "heads": 3}, "width 6 is not divisible by 4, which the position embedding needs"),
        ({"depth": "deep"}, "depth"),
        ({"qk_norm": "ln"}, "qk_norm"),
        ({"head": 2}, "unknown key 'head'; did you mean 'heads'"),
    ]:
        with pytest.raises(ValueError, match=words):
            model_of({"architecture": "mmdit", **given})
