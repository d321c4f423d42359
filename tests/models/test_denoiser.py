"""A network of any shape can be trained: its taps may have grids and widths of their own."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from haste import config
from haste.cli import main as cli
from haste.config import Positive, Strict
from haste.data.condition import Labels
from haste.diffusion.interpolant import Interpolant
from haste.models.denoiser import Denoiser
from haste.models.layers import AttentionTap, timestep_features
from haste.networks.spec import Tap
from haste.ops import cost
from haste.train import loop
from haste.train.state import new_learner

SHAPE = {"process": Interpolant(), "condition": Labels(classes=10), "input_size": 4, "in_channels": 4}


class UNet(Denoiser):
    """Two convolutional levels; what the coarse one knows has half the sides and twice the width."""

    class Settings(Strict):
        width: Positive

    def __init__(self, *, input_size, in_channels, classes, width):
        super().__init__(input_size=input_size, in_channels=in_channels, classes=classes)
        half = input_size // 2
        self.taps = {"tokens.1": Tap((input_size, input_size), width), "tokens.2": Tap((half, half), 2 * width)}
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.told, self.label = nn.Linear(256, 2 * width), nn.Embedding(classes + 1, 2 * width)
        self.norm = nn.GroupNorm(1, 2 * width)
        self.last = nn.Conv2d(3 * width, in_channels, 3, padding=1)

    def forward(self, x, t, y, taps=()):
        fine = functional.silu(self.first(x))
        told = self.told(timestep_features(t).to(fine.dtype)) + self.label(y)
        coarse = functional.silu(self.norm(self.down(fine)) + told[:, :, None, None])
        both = {"tokens.1": fine.flatten(2).mT, "tokens.2": coarse.flatten(2).mT}
        joined = torch.cat([fine, functional.interpolate(coarse, scale_factor=2)], dim=1)
        return self.last(joined), {name: both[name] for name in taps}


def with_unet(make_plan, monkeypatch, depth, **settings):
    monkeypatch.setitem(config.DENOISERS, "u_net", f"{__name__}:UNet")
    feature = {"teacher": "vit", "depth": depth, "hidden": 16}
    return make_plan(
        models={"dot": {"architecture": "u_net", "width": 8, **settings}},
        alignments={"REPA": {"features": feature}},
        runs={"REPA": {"alignment": "REPA", "milestones": [2]}},
    )


@pytest.mark.parametrize(("depth", "width"), [(1, 8), (2, 16)])
def test_a_network_of_this_package_is_a_file_and_a_line_and_its_taps_have_shapes_of_their_own(
    make_plan, monkeypatch, depth, width
):
    plan = with_unet(make_plan, monkeypatch, depth)
    path = loop.train(plan, plan.state("REPA", 2))
    trained = load_file(path)
    assert trained["projectors/features/0.weight"].shape == (16, width)
    assert trained["optimizer/exp_avg/model/first.weight"].any()
    assert path.parent.name.startswith("u_net-features-s0-")
    assert cli.main(["sample", plan.rows[0].evaluation.name, "-c", str(plan.file)]) == 0
    assert cost.parameters(plan.trajectories[path.parent.name].recipe) == sum(
        value.numel() for name, value in trained.items() if name.startswith("model/")
    )
    assert cli.main(["plan", "-c", str(plan.file)]) == 0


def test_tokens_after_a_block_that_a_network_does_not_have_are_refused(make_plan, monkeypatch):
    with pytest.raises(ValueError, match=r"alignments\.REPA\.features\.depth: 3, but dot has blocks 1 to 2"):
        with_unet(make_plan, monkeypatch, 3)
    with pytest.raises(ValueError, match=r"models\.dot\.width: Input should be greater than or equal to 1, found 0"):
        with_unet(make_plan, monkeypatch, 1, width=0)


def test_first_numbers_are_published_ones_and_nothing_is_left_to_chance(make_plan, monkeypatch):
    plan = with_unet(make_plan, monkeypatch, 1, width=64)
    (trajectory,) = plan.trajectories.values()
    model = new_learner(trajectory.recipe, {}, {}).model
    bound = (6 / (64 * 9 + 128)) ** 0.5  # Xavier-uniform of a map of 3 x 3 patches
    assert model.down.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not model.down.bias.any() and model.norm.weight.eq(1).all()
    assert model.label.weight.std().item() == pytest.approx(0.02, rel=0.1)

    class Bare(UNet):
        def __init__(self, **shape):
            super().__init__(**shape)
            self.extra = nn.Parameter(torch.zeros(3))

    shape = {"input_size": 4, "in_channels": 4, "classes": 10, "width": 8}
    with pytest.raises(ValueError, match="Bare: extra would start with arbitrary values"):
        Bare(**shape).initialise(torch.Generator())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found, taps: (found[:, :2], taps), r"velocity is \(1, 2, 4, 4\), expected \(1, 4, 4, 4\)"),
        (lambda found, taps: (found, {}), r"tap tokens\.1 is NoneType, expected \(1, 16, 8\)"),
        (lambda found, taps: (found, {**taps, "tokens.2": taps["tokens.1"]}), r"tap tokens\.2 is \(1, 16, 8\)"),
    ],
)
def test_what_a_network_says_of_itself_is_compared_with_what_it_gives(change, words):
    class Other(UNet):
        def forward(self, x, t, y, taps=()):
            return change(*super().forward(x, t, y, taps))

    with pytest.raises(ValueError, match=f"Other: {words}"):
        Other.facts({"width": 8}, **SHAPE)


def test_attention_is_compared_too():
    class Attending(UNet):
        given = None

        def __init__(self, **shape):
            super().__init__(**shape)
            self.taps = {"attention.0": Tap((2, 2), 16, heads=2)}

        def forward(self, x, t, y, taps=()):
            return x, {"attention.0": self.given}

    q = torch.empty(1, 2, 4, 8)
    for given, words in [
        ((q, q), "tap attention.0 is tuple, expected an AttentionTap"),
        (AttentionTap(q, q[:, :1], None), r"k of tap attention.0 is \(1, 1, 4, 8\), expected \(1, 2, 4, 8\)"),
    ]:
        Attending.given = given
        with pytest.raises(ValueError, match=words):
            Attending.facts({"width": 8}, **SHAPE)
    Attending.given = AttentionTap(q, q, None)
    assert Attending.facts({"width": 8}, **SHAPE).taps["attention.0"].heads == 2
