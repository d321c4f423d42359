import math

import numpy as np
import pytest
import torch
from torch import nn

from haste.models.heads import OneLayer, Projector, head_of


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


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_convolution_is_a_sum_over_the_neighbours_in_the_grid_with_zeros_around_it(kernel):
    grid, head = (2, 4), OneLayer(3, 5, kernel=kernel).double()
    tokens = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 8, 3)))
    weight, bias = (value.detach().numpy() for value in head.state_dict().values())
    expected = np.zeros((2, 8, 5)) + bias
    for row in range(2):
        for column in range(4):
            for i in range(kernel):
                for j in range(kernel):
                    y, x = row + i - kernel // 2, column + j - kernel // 2
                    if 0 <= y < 2 and 0 <= x < 4:
                        expected[:, 4 * row + column] += tokens[:, 4 * y + x].numpy() @ weight[:, :, i, j].T
    np.testing.assert_allclose(head(tokens, grid).detach(), expected, rtol=1e-12)


def test_a_linear_head_is_a_convolution_of_one_token():
    linear, conv = OneLayer(4, 6), OneLayer(4, 6, kernel=1)
    assert set(linear.state_dict()) == set(conv.state_dict()) == {"projection_layer.weight", "projection_layer.bias"}
    assert torch.equal(linear.projection_layer.weight, conv.projection_layer.weight[:, :, 0, 0])
    tokens = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(tokens), conv(tokens, (3, 2)))


def test_a_convolution_of_tokens_that_are_no_grid_is_refused():
    for grid in (None, (2, 4)):
        with pytest.raises(ValueError, match="head conv: 9 tokens are not those of a grid of"):
            OneLayer(4, 6, kernel=3)(torch.zeros(1, 9, 4), grid)


@pytest.mark.parametrize(("kernel", "fans"), [(None, 100 + 50), (3, 9 * 100 + 50)])
def test_one_layer_starts_xavier_uniform_from_its_generator_alone(kernel, fans):
    def build(seed):
        return OneLayer(100, 50, kernel=kernel, generator=torch.Generator().manual_seed(seed)).projection_layer

    weight, bound = build(3).weight, math.sqrt(6 / fans)
    assert torch.equal(weight, build(3).weight) and not torch.equal(weight, build(4).weight)
    assert 0.99 * bound < weight.abs().max() <= bound and not build(3).bias.any()


def test_a_term_without_a_word_on_its_head_has_the_projector():
    assert isinstance(head_of({"hidden": 8}, 4, 6), Projector)
    assert head_of({"head": "conv", "kernel": 5}, 4, 6).projection_layer.weight.shape == (6, 4, 5, 5)
    assert head_of({"head": "linear", "kernel": None}, 4, 6).projection_layer.weight.shape == (6, 4)
