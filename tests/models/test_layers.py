import math

import pytest
import torch

from haste.models.layers import LabelEmbedding, PatchEmbedding, TimestepEmbedding, sincos_positions, timestep_features


def test_positions_are_sines_and_cosines_of_x_then_of_y():
    width, rows, columns = 24, 3, 5
    found = sincos_positions(width, (rows, columns))
    assert found.shape == (rows * columns, width)
    quarter = width // 4
    for y in range(rows):
        for x in range(columns):
            expected = []
            for place in (x, y):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(found[y * columns + x], torch.tensor(expected))


def test_positions_of_a_width_that_does_not_split_in_four_are_refused():
    with pytest.raises(ValueError, match="width 30"):
        sincos_positions(30, (4, 4))


def test_timestep_features_are_cosines_then_sines_of_the_unscaled_time():
    times = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    found = timestep_features(times, 256)
    assert found.dtype == torch.float64
    for row, t in zip(found.tolist(), times.tolist(), strict=True):
        angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-13)


def test_timestep_features_of_half_precision_times_are_computed_in_float32():
    t = torch.tensor([0.5], dtype=torch.bfloat16)
    assert torch.equal(timestep_features(t), timestep_features(t.float()))


def test_timestep_embedding_runs_in_the_precision_of_its_weights():
    embedding = TimestepEmbedding(8).to(torch.bfloat16)
    assert embedding(torch.tensor([0.25], dtype=torch.float64)).dtype == torch.bfloat16


def test_in_bf16_times_one_step_of_250_apart_are_told_apart_only_by_a_precise_timestep_embedding():
    torch.manual_seed(0)
    embedding, times = TimestepEmbedding(64), torch.arange(250) / 250
    exact = embedding(times)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, precise = embedding(times), embedding(times, precise=True)
    assert torch.equal(precise, exact)
    step = (exact[1:] - exact[:-1]).norm(dim=1).median()
    assert (rounded.float() - exact).norm(dim=1).median() > step / 2


def test_patches_are_counted_row_by_row():
    embed = PatchEmbedding(channels=1, patch_size=2, width=1)
    with torch.no_grad():
        embed.proj.weight.fill_(0.25)  # the mean of a patch
        embed.proj.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
    image = torch.arange(4).repeat_interleave(4).view(2, 2, 2, 2).transpose(1, 2).reshape(1, 1, 4, 4).float()
    assert embed(image).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_label_embedding_has_one_row_more_than_classes():
    embedding = LabelEmbedding(classes=5, width=4)
    assert embedding(torch.tensor([5])).shape == (1, 4)
    with pytest.raises(IndexError):
        embedding(torch.tensor([6]))
