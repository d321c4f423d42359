import pytest
import torch
from torch import Tensor

from haste.diffusion.guidance import guided
from haste.diffusion.samplers import euler, heun, time_grid

NULL = 3
LABELS, NONE = torch.tensor([0, 2]), torch.tensor([NULL, NULL])


class Model:
    """v = x (1 + y): the label decides, and every call is written down."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self.asked: list[tuple[float, list[int]]] = []

    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        self.asked.append((t, y.tolist()))
        assert len(x) == len(y)
        return (x * (1 + y)[:, None]).to(self.dtype)


X = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)


def test_guidance_extrapolates_from_unconditional_through_conditional():
    model = Model()
    found = guided(model, LABELS, NONE, scale=1.5)(X, 0.4)
    conditional, unconditional = X * (1 + LABELS)[:, None], X * (1 + NULL)
    torch.testing.assert_close(found, unconditional + 1.5 * (conditional - unconditional))
    assert model.asked == [(0.4, [0, 2, NULL, NULL])]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_guidance_at_scales_up_to_one(scale):
    model = Model()
    torch.testing.assert_close(guided(model, LABELS, NONE, scale)(X, 0.4), X * (1 + LABELS)[:, None])
    assert model.asked == [(0.4, [0, 2])]


@pytest.mark.parametrize(
    ("t", "doubled"),
    [(0.1, True), (0.7, True), (0.7 + 1e-15, True), (0.1 - 1e-15, True), (0.4, True), (0.7001, False), (0.0999, False)],
)
def test_the_interval_includes_its_ends_and_outside_one_conditional_evaluation_is_made(t, doubled):
    model = Model()
    guided(model, LABELS, NONE, 2.0, (0.1, 0.7))(X, t)
    assert model.asked == [(t, [0, 2, NULL, NULL] if doubled else [0, 2])]


@pytest.mark.parametrize(("high", "guided_calls"), [(0.7, 35), (0.72, 36), (0.6, 30), (0.58, 29), (1.0, 50), (0.0, 0)])
def test_rounding_of_the_grid_never_moves_the_end_of_the_interval(high, guided_calls):
    model = Model()
    euler(guided(model, LABELS, NONE, 2.0, (0.0, high)), X, 50)
    assert sum(len(labels) == 4 for _, labels in model.asked) == guided_calls
    assert len(model.asked) == len(time_grid(50)) - 1


def test_both_evaluations_of_a_heun_step_follow_the_decision_of_the_first():
    model = Model()
    heun(guided(model, LABELS, NONE, 2.0, (0.0, 0.5)), X, 4)
    assert [(t, len(labels)) for t, labels in model.asked] == [
        (1.0, 2), (0.75, 2), (0.75, 2), (0.5, 2), (0.5, 4), (0.25, 4), (0.25, 4)
    ]  # fmt: skip


def test_extrapolation_happens_in_the_precision_of_the_state():
    third = torch.full((2, 2), 1 / 3, dtype=torch.float64)
    found = guided(Model(torch.float32), LABELS, NONE, 4.0)(third, 0.5)
    single = (third * (1 + LABELS)[:, None]).float().double(), (third * (1 + NULL)).float().double()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, single[1] + 4.0 * (single[0] - single[1]), rtol=1e-15, atol=0)


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match=r"\[0.8, 0.2\] is empty"):
        guided(Model(), LABELS, NONE, 1.5, (0.8, 0.2))


def test_channels_beyond_the_guided_ones_are_those_of_the_conditional_half():
    x, labels = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3), torch.tensor([0, 1])

    def velocity(x, t, y):
        return x * (1 + y.to(x.dtype)[:, None, None]) + t

    conditional, null = velocity(x, 0.5, labels), velocity(x, 0.5, torch.tensor([2, 2]))
    found = guided(velocity, labels, torch.tensor([2, 2]), 1.5, channels=3)(x, 0.5)
    assert torch.equal(found[:, :3], (null + 1.5 * (conditional - null))[:, :3])
    assert torch.equal(found[:, 3], conditional[:, 3])
    assert (conditional[:, 3] != null[:, 3]).any()


def test_a_row_is_guided_as_it_is_in_its_batch_and_jumps_are_where_guidance_changes():
    labels, null = torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2])
    velocity = guided(lambda x, t, y: x + y[:, None], labels, null, 2.0, (0.25, 1.0))
    x = torch.ones(3, 1)
    assert torch.equal(velocity.row(1)(x[1:2], 0.5), velocity(x, 0.5)[1:2])
    assert velocity.jumps == (0.25,)
    assert guided(lambda x, t, y: x, labels, null, 1.0, (0.25, 1.0)).jumps == ()


def test_a_condition_of_several_parts_is_guided_part_by_part():
    told = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([[4.0], [5.0], [6.0]])}
    none = {name: torch.zeros_like(part) for name, part in told.items()}

    def field(x, t, y):
        return x + y["a"][:, None] * y["b"]

    found = guided(field, told, none, 2.0)
    x = torch.ones(3, 1)
    assert torch.equal(found(x, 0.5), 2 * field(x, 0.5, told) - x)
    assert torch.equal(found.row(1)(x[1:2], 0.5), found(x, 0.5)[1:2])
