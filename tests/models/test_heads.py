import math

import torch
from torch import nn

from haste.models.heads import Projector


def test_projector_is_three_linear_layers_with_silu_between():
    head = Projector(6, 4, hidden=8).double()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = head.state_dict()
    expected = x
    for layer in (0, 2, 4):
        expected = expected @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        if layer < 4:
            expected = expected / (1 + torch.exp(-expected))
    torch.testing.assert_close(head(x), expected)


def test_projector_keys_under_projectors_0_are_those_of_repa():
    keys = nn.ModuleDict({"projectors": nn.ModuleList([Projector(8, 4)])}).state_dict()
    assert set(keys) == {f"projectors.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert keys["projectors.0.2.weight"].shape == (2048, 2048)


def test_projector_numbers_come_from_its_generator_alone():
    def build(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return Projector(8, 4, hidden=16, generator=torch.Generator().manual_seed(seed)).state_dict()["2.weight"]

    assert torch.equal(build(1, 10), build(1, 20))
    assert not torch.equal(build(1, 10), build(2, 10))


def test_projector_starts_xavier_uniform_with_zero_biases():
    head = Projector(100, 50, hidden=300)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.99 * bound < parameter.abs().max() <= bound
            assert abs(parameter.std() - bound / math.sqrt(3)) < 0.02 * bound
