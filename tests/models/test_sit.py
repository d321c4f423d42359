import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from haste.config import MODELS
from haste.data.condition import Labels
from haste.diffusion.interpolant import Interpolant
from haste.models.dit import DiT
from haste.models.heads import Projector
from haste.models.sit import SiT
from haste.networks.spec import sit_facts

SMALL: dict[str, Any] = {
    "input_size": 8, "in_channels": 3, "patch_size": 2, "depth": 3, "width": 32, "heads": 4, "classes": 5
}  # fmt: skip
EVERY_TAP = ["tokens.1", "tokens.2", "tokens.3", "attention.0", "attention.1", "attention.2"]


def awake(seed: int = 0, **changes: Any) -> SiT:
    """A model whose every number is random: a fresh one is all zero gates, behind which mistakes hide."""
    model = SiT(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def batch(size: int = 3, dtype: torch.dtype = torch.float32, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(size, channels, 8, 8, generator=generator).to(dtype)
    t = torch.rand(size, generator=generator).to(dtype)
    return x, t, torch.tensor([0, 5, 2])[:size]


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def recompute(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, depth: int, heads: int, patch: int):
    """The model written out once more from its weights: loops, einsum, explicit softmax."""

    def linear(z: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", z, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def silu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    def gelu(z: Tensor) -> Tensor:
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    size, channels, height, _ = x.shape
    side = height // patch
    kernel = w["x_embedder.proj.weight"]
    tokens = torch.stack(
        [
            torch.einsum("bcij,dcij->bd", x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch], kernel)
            for r in range(side)
            for c in range(side)
        ],
        dim=1,
    )
    tokens = tokens + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    hidden = silu(linear(torch.cat([torch.cos(angles), torch.sin(angles)], 1), "t_embedder.mlp.0"))
    condition = silu(linear(hidden, "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][y])
    taps: dict[str, Any] = {}
    width = tokens.shape[-1]
    for i in range(depth):
        mod = linear(condition, f"blocks.{i}.adaLN_modulation.1").view(size, 6, 1, width)
        inside = layer_norm(tokens) * (1 + mod[:, 1]) + mod[:, 0]
        qkv = linear(inside, f"blocks.{i}.attn.qkv").view(size, -1, 3, heads, width // heads)
        q, k, v = (qkv[:, :, part].transpose(1, 2) for part in range(3))
        taps[f"attention.{i}"] = (q, k)
        weights = torch.exp(torch.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(width // heads))
        mixed = torch.einsum("bhij,bhjk->bihk", weights / weights.sum(-1, keepdim=True), v).reshape(size, -1, width)
        tokens = tokens + mod[:, 2] * linear(mixed, f"blocks.{i}.attn.proj")
        inside = layer_norm(tokens) * (1 + mod[:, 4]) + mod[:, 3]
        tokens = tokens + mod[:, 5] * linear(gelu(linear(inside, f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
        taps[f"tokens.{i + 1}"] = tokens
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").view(size, 2, 1, width).unbind(1)
    patches = linear(layer_norm(tokens) * (1 + scale) + shift, "final_layer.linear")
    out = torch.zeros(size, channels, height, height, dtype=x.dtype)
    for n in range(side * side):
        r, c = n // side * patch, n % side * patch
        out[:, :, r : r + patch, c : c + patch] = patches[:, n].view(size, patch, patch, channels).permute(0, 3, 1, 2)
    return out, taps


def test_velocity_and_every_tap_equal_an_independent_recomputation():
    model = awake().double()
    x, t, y = batch(dtype=torch.float64)
    velocity, taps = model(x, t, y, taps=EVERY_TAP)
    expected, expected_taps = recompute(dict(model.state_dict()), x, t, y, depth=3, heads=4, patch=2)
    torch.testing.assert_close(velocity, expected)
    assert set(taps) == set(EVERY_TAP)
    for name, tap in taps.items():
        if name.startswith("attention"):
            assert tap.logsumexp is None
            tap = (tap.q, tap.k)
        torch.testing.assert_close(tap, expected_taps[name])


def test_model_equals_the_diffusers_dit_with_the_same_weights():
    """At t = 0, where the two timestep features agree (diffusers spaces its frequencies a little differently)."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = awake(in_channels=4)
    other = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, dropout=0.0,
    )  # fmt: skip
    ours = model.state_dict()
    renamed = {f"pos_embed.proj.{kind}": ours[f"x_embedder.proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        renamed[f"proj_out_1.{kind}"] = ours[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = ours[f"final_layer.linear.{kind}"]
        for i in range(3):
            mine, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            for letter, part in zip("qkv", ours[f"{mine}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{theirs}.attn1.to_{letter}.{kind}"] = part
            renamed[f"{theirs}.attn1.to_out.0.{kind}"] = ours[f"{mine}.attn.proj.{kind}"]
            renamed[f"{theirs}.ff.net.0.proj.{kind}"] = ours[f"{mine}.mlp.fc1.{kind}"]
            renamed[f"{theirs}.ff.net.2.{kind}"] = ours[f"{mine}.mlp.fc2.{kind}"]
            renamed[f"{theirs}.norm1.linear.{kind}"] = ours[f"{mine}.adaLN_modulation.1.{kind}"]
            embedder = f"{theirs}.norm1.emb"  # every diffusers block carries the embedders once more
            renamed[f"{embedder}.timestep_embedder.linear_1.{kind}"] = ours[f"t_embedder.mlp.0.{kind}"]
            renamed[f"{embedder}.timestep_embedder.linear_2.{kind}"] = ours[f"t_embedder.mlp.2.{kind}"]
            table = ours["y_embedder.embedding_table.weight"]
            renamed[f"{embedder}.class_embedder.embedding_table.weight"] = table
    missing, unexpected = other.load_state_dict(renamed, strict=False)
    assert not unexpected and not [name for name in missing if name != "pos_embed.pos_embed"]
    x, _, y = batch(channels=4)
    with torch.no_grad():
        found, _ = model(x, torch.zeros(3), y)
        expected = other.eval()(x, timestep=torch.zeros(3, dtype=torch.long), class_labels=y).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tapping_changes_no_bit_of_the_velocity():
    model = awake()
    plain, none = model(*batch())
    tapped, _ = model(*batch(), taps=EVERY_TAP)
    assert none == {}
    assert plain.any() and torch.equal(plain, tapped)


def test_tapping_keeps_fused_attention(monkeypatch):
    calls = []
    fused = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    awake()(*batch(), taps=EVERY_TAP)
    assert len(calls) == SMALL["depth"]


def test_blocks_that_are_not_tapped_hand_out_no_queries_and_keys():
    model = awake()
    handed_out: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, outputs: handed_out.append(outputs[1] is not None))
    _, taps = model(*batch(), taps=["attention.1"])
    assert list(taps) == ["attention.1"]
    assert handed_out == [False, True, False]


@pytest.mark.parametrize("tap", ["tokens.0", "tokens.4", "attention.3", "attention.-1", "tokens.01", "mlp.1"])
def test_a_tap_the_model_does_not_have_is_refused_with_the_valid_range(tap):
    with pytest.raises(ValueError, match=r"tokens\.1 to tokens\.3 and attention\.0 to attention\.2"):
        awake()(*batch(), taps=[tap])


def test_gradients_flow_through_every_tap():
    model = awake()
    _, taps = model(*batch(), taps=["tokens.2", "attention.1"])
    (taps["tokens.2"].sum() + sum(part.sum() for part in taps["attention.1"][:2])).backward()
    qkv = model.blocks[1].get_submodule("attn.qkv").weight.grad
    assert isinstance(qkv, Tensor) and qkv.any()
    assert model.blocks[2].get_submodule("attn.qkv").weight.grad is None


def test_a_fresh_model_outputs_exactly_zero():
    velocity, _ = SiT(**SMALL)(*batch())
    assert velocity.shape == (3, 3, 8, 8) and not velocity.any()


def test_the_null_class_is_one_row_past_the_classes():
    model = awake()
    x, t, _ = batch()
    assert model.null_class == 5
    model(x, t, torch.full((3,), model.null_class))
    with pytest.raises(IndexError):
        model(x, t, torch.full((3,), model.null_class + 1))


def test_keys_are_those_of_repa():
    def both(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    expected = {"pos_embed", "y_embedder.embedding_table.weight"}
    expected |= both("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2")
    expected |= both("final_layer.linear", "final_layer.adaLN_modulation.1")
    for i in range(3):
        layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        expected |= both(*(f"blocks.{i}.{layer}" for layer in layers))
    assert set(SiT(**SMALL).state_dict()) == expected


def test_a_file_whose_positions_are_a_parameter_loads_and_ours_are_never_trained():
    model = SiT(**SMALL)
    stored = {name: nn.Parameter(value + 1, requires_grad=False) for name, value in model.state_dict().items()}
    model.load_state_dict(stored, strict=True)
    assert torch.equal(model.pos_embed, stored["pos_embed"])
    assert "pos_embed" not in dict(model.named_parameters())


def expected_parameters(depth: int, width: int, patch: int) -> int:
    """By hand, for 4 channels and 1000 classes; the positions are not counted."""
    patches = 4 * patch * patch
    block = (3 * width * width + 3 * width) + (width * width + width) + (8 * width * width + 5 * width)
    block += 6 * width * width + 6 * width
    embed = (patches * width + width) + (256 * width + width) + (width * width + width) + 1001 * width
    final = 2 * width * width + 2 * width + width * patches + patches
    return depth * block + embed + final


@pytest.mark.parametrize(("name", "millions"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_published_sizes_have_the_published_number_of_parameters(name, millions):
    shape = MODELS[f"SiT-{name}"].model_dump()
    with torch.device("meta"):
        model = SiT(input_size=32, in_channels=4, classes=1000, **shape)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == expected_parameters(shape["depth"], shape["width"], 2)
    assert abs(found / 1e6 - millions) < 1
    assert model.grid == (16, 16) and model.tokens == 256
    assert model.head_width == {"XL/2": 72}.get(name, 64)


def test_every_published_size_and_patch_runs_on_its_grid():
    sizes = {f"{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    shapes = {name: shape for name, shape in MODELS.items() if name != "MM-DiT"}
    assert set(shapes) == {f"{system}-{size}" for system in ("SiT", "DiT") for size in sizes}
    for name, shape in shapes.items():
        kind, channels = (SiT, 4) if name.startswith("SiT") else (DiT, 8)
        with torch.device("meta"):
            model = kind(input_size=32, in_channels=4, classes=1000, **shape.settings)
            found = sum(p.numel() for p in model.parameters())
            model.blocks = model.blocks[:2]  # the others are as these
            x, t, y = torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
            predicted, taps = model(x, t, y, taps={"tokens.1"})
        side = 32 // int(name.split("/")[1])
        assert predicted.shape == (2, channels, 32, 32), name
        assert taps["tokens.1"].shape == (2, side * side, shape.width), name
        more = 4 * shape.patch_size**2 * (shape.width + 1) if kind is DiT else 0  # of the last layer, for the variance
        assert found == expected_parameters(shape.depth, shape.width, shape.patch_size) + more
        assert found == sit_facts({**shape.decided, "input_size": 32, "channels": 4}, 1000).parameters


def same(a: SiT, b: SiT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_initial_numbers_come_from_the_generator_alone():
    def build(seed: int, global_seed: int) -> SiT:
        torch.manual_seed(global_seed)
        return SiT(**SMALL, generator=torch.Generator().manual_seed(seed))

    first = build(3, 1)
    Projector(32, 16)
    assert same(first, build(3, 2))
    assert not same(first, build(4, 1))


def test_initialise_again_gives_the_same_model_in_any_precision():
    again = awake().double()
    again.initialise(torch.Generator().manual_seed(0))
    assert same(SiT(**SMALL), again.float())


def test_a_model_made_on_meta_is_whole_after_initialise():
    with torch.device("meta"):
        model = SiT(**SMALL)
    model = model.to_empty(device="cpu")
    model.initialise(torch.Generator().manual_seed(0))
    assert same(SiT(**SMALL), model)


def test_initialisation_is_the_published_one():
    model = SiT(input_size=8, in_channels=4, patch_size=2, depth=1, width=256, heads=4, classes=500)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert not parameter.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
            assert parameter.abs().max() > 0.06, name  # normal, not uniform
        else:
            bound = math.sqrt(6 / (parameter.flatten(1).shape[0] + parameter.flatten(1).shape[1]))
            assert 0.98 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name


@pytest.mark.parametrize(("change", "complaint"), [({"patch_size": 3}, "patch_size 3"), ({"heads": 5}, "heads 5")])
def test_shapes_that_do_not_divide_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        SiT(**{**SMALL, **change})


@pytest.mark.parametrize("name", ["SiT-B/2", "SiT-S/8"])
def test_the_formulas_for_size_and_cost_are_what_a_network_without_memory_shows(name):
    size = {**MODELS[name].model_dump(), "input_size": 32, "channels": 4}
    formula = sit_facts(size, 1000)
    settings = {key: size[key] for key in MODELS[name].model_dump()}
    counted = SiT.facts(settings, process=Interpolant(), condition=Labels(classes=1000), input_size=32, in_channels=4)
    assert counted.parameters == formula.parameters and counted.taps == formula.taps
    assert counted.flops == pytest.approx(formula.flops, rel=0.03)  # the formula leaves out the first and last layers
