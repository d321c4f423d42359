"""What is painted is what was asked for: guidance and its interval, the path, pixels, the latents' scale."""

import dataclasses
import hashlib
import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from haste.config import Sampling
from haste.data import order
from haste.data.condition import Labels
from haste.data.latents import Autoencoder
from haste.diffusion.ddpm import DDPM
from haste.diffusion.interpolant import Interpolant
from haste.diffusion.samplers import SAMPLERS
from haste.models.dit import DiT
from haste.models.sit import SiT
from haste.sampling.compiled import compile_once
from haste.sampling.painter import Painter, latents

CLASSES, CHANNELS, SIDE, STEPS = 4, 3, 5, 5
SCALE, SHIFT = 0.75, -0.125  # the latents' own, unlike any decoder's below
LABELS = Labels(classes=CLASSES)
INDICES = range(3, 11)  # all labels, and not from 0


class Field(nn.Module):
    """A velocity known in closed form: (slope x + push (1 + t)) of its label, or of the null class."""

    in_channels, input_size, process = CHANNELS, SIDE, "interpolant"
    slope = np.array([0.5, -0.4, 0.9, 0.1, -0.7])
    push = np.array([1.0, -2.0, 0.3, 0.6, 0.2])

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))  # a model has parameters, on a device
        self.seen = []

    def forward(self, x, t, labels):
        assert t.shape == labels.shape == x.shape[:1]
        assert (t == t[0]).all()
        self.seen.append((round(float(t[0]), 6), labels.tolist()))
        wide = (slice(None), None, None, None)
        slope, push = torch.from_numpy(self.slope)[labels][wide], torch.from_numpy(self.push)[labels][wide]
        return (slope * x + push * (1 + t[wide])).to(x.dtype), {}

    @classmethod
    def velocity(cls, x, t, labels):
        """The same in numpy."""
        return cls.slope[labels][:, None, None, None] * x + cls.push[labels][:, None, None, None] * (1 + t)


class Decoder:
    """Images as large as latents, of so few bits that what becomes of them in pixels is exact; some outside [-1, 1]."""

    factor, channels, identity, device = 1, CHANNELS, "decoder", torch.device("cpu")
    scale, shift = 0.5, 0.5  # a decoder's own numbers, which are not the latents'

    def __init__(self):
        self.given = []

    def decode(self, z, *, scale, shift):
        image = torch.round(1.25 * torch.tanh(z) * 256) / 256
        self.given.append((z.clone(), scale, shift, image))
        return image


def paint(path="linear", indices=INDICES, **sampling):
    """Images, labels, the latents (float64) and the image that the decoder got and gave, and the model."""
    settings = {"sampler": "euler", "steps": STEPS, "count": 100, "labels": "balanced", "seed": 5, **sampling}
    model, decoder = Field(), Decoder()
    images, labels = Painter(model, Sampling(**settings), decoder, Interpolant(path), LABELS, SCALE, SHIFT).paint(
        indices
    )
    ((z, scale, shift, decoded),) = decoder.given
    assert (scale, shift) == (SCALE, SHIFT)
    return SimpleNamespace(images=images, labels=labels, z=z.double().numpy(), decoded=decoded.numpy(), model=model)


def start(indices=INDICES):
    return order.normals(5, "sample start", 0, indices, (CHANNELS, SIDE, SIDE)).astype(np.float64)


def guided_by_hand(x, t, labels, scale, interval):
    null = np.full_like(labels, CLASSES)
    if not interval[0] <= round(t, 6) <= interval[1]:
        return Field.velocity(x, t, labels)
    return Field.velocity(x, t, null) + scale * (Field.velocity(x, t, labels) - Field.velocity(x, t, null))


def euler_by_hand(scale=1.0, interval=(0.0, 1.0)):
    x, labels = start(), np.array([i % CLASSES for i in INDICES])
    for step in range(STEPS):  # from t = 1 to t = 0
        x = x - guided_by_hand(x, 1 - step / STEPS, labels, scale, interval) / STEPS
    return x


def sde_by_hand(path, scale=1.0, interval=(0.0, 1.0)):
    """dx = (v - sigma s) dt + sqrt(2 sigma) dW, from 1 to 0.04, then one step without noise, which ends at 0."""
    x, labels, a = start(), np.array([i % CLASSES for i in INDICES]), math.pi / 2
    times = [1 - 0.96 * step / (STEPS - 1) for step in range(STEPS)] + [0.0]
    for step, (t, t_next) in enumerate(pairwise(times)):
        v, dt = guided_by_hand(x, t, labels, scale, interval), t_next - t
        if path == "linear":
            sigma, score = t, -(x + (1 - t) * v) / t
        else:
            sigma = math.sin(a * t)
            score = -(math.cos(a * t) * v + a * sigma * x) / (a * sigma)
        x = x + (v - sigma * score) * dt
        if step < STEPS - 1:
            x = x + math.sqrt(-2 * sigma * dt) * order.normals(5, "sample noise", step, INDICES, x.shape[1:])
    return x


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_unguided_ode_is_eulers_from_the_start_of_each_image():
    found = paint()
    assert found.labels.tolist() == [i % CLASSES for i in INDICES]
    assert_near(found.z, euler_by_hand())
    assert [t for t, _ in found.model.seen] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert all(labels == found.labels.tolist() for _, labels in found.model.seen)


def test_guidance_moves_the_velocity_away_from_the_null_class():
    found = paint(guidance=2.5)
    assert_near(found.z, euler_by_hand(2.5))
    assert np.abs(euler_by_hand(2.5) - euler_by_hand()).max() > 0.1
    assert all(labels == found.labels.tolist() + [CLASSES] * len(INDICES) for _, labels in found.model.seen)


@pytest.mark.parametrize(("interval", "inside"), [([0.3, 0.7], {0.6, 0.4}), ([0.0, 0.4], {0.4, 0.2})], ids=str)
def test_guidance_is_on_within_its_interval_alone(interval, inside):
    found = paint(guidance=2.5, interval=interval)
    assert_near(found.z, euler_by_hand(2.5, interval))
    assert {t for t, labels in found.model.seen if len(labels) > len(INDICES)} == inside


@pytest.mark.parametrize("guidance", [{}, {"guidance": 2.5, "interval": [0.0, 0.6]}], ids=["plain", "guided"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_sde_is_that_of_the_path_the_model_was_trained_on(path, guidance):
    found = paint(path, sampler="euler-maruyama", **guidance)
    settings = (guidance.get("guidance", 1.0), guidance.get("interval", (0.0, 1.0)))
    assert_near(found.z, sde_by_hand(path, *settings))
    other = sde_by_hand({"linear": "cosine", "cosine": "linear"}[path], *settings)
    assert np.abs(found.z - other).max() > 0.1


def test_only_three_channels_are_guided_where_that_is_asked():
    """A fourth latent channel, as DiT's sampler leaves it: that of the conditional half, all along the way."""

    class Wide(Field):
        in_channels = 4

    model, decoder = Wide(), Decoder()
    settings = {"sampler": "euler", "steps": STEPS, "count": 100, "labels": "balanced", "seed": 5, "guidance": 2.5}
    sampling = Sampling(**settings, guided_channels=3)
    Painter(model, sampling, decoder, Interpolant(), LABELS, SCALE, SHIFT).paint(INDICES)
    x = order.normals(5, "sample start", 0, INDICES, (4, SIDE, SIDE)).astype(np.float64)
    labels = np.array([i % CLASSES for i in INDICES])
    for step in range(STEPS):
        t = 1 - step / STEPS
        both = guided_by_hand(x, t, labels, 2.5, (0, 1))
        x = x - np.concatenate([both[:, :3], Field.velocity(x, t, labels)[:, 3:]], axis=1) / STEPS
    assert_near(decoder.given[0][0].double().numpy(), x)


def test_dopri5_reaches_what_many_small_steps_reach_and_counts_what_it_asked():
    model, decoder = Field(), Decoder()
    sampling = Sampling(sampler="dopri5", count=100, labels="balanced", seed=5, guidance=2.5, interval=[0.2, 0.6])
    painter = Painter(model, sampling, decoder, Interpolant(), LABELS, SCALE, SHIFT)
    found = painter.draw(INDICES)
    assert found["nfe"].sum() == len(model.seen)
    assert found["nfe"].dtype == np.int64 and len(set(found["nfe"].tolist())) > 1
    fine = Painter(
        Field(),
        Sampling(**{**sampling.model_dump(), "sampler": "heun", "steps": 500, "rtol": None, "atol": None}),
        decoder,
        Interpolant(),
        LABELS,
        SCALE,
        SHIFT,
    )
    fine.paint(INDICES)
    np.testing.assert_allclose(decoder.given[0][0], decoder.given[1][0], rtol=0, atol=0.02)


@pytest.mark.parametrize(("sampler", "expected"), [("euler", 5), ("heun", 9), ("euler-maruyama", 5)])
def test_the_evaluations_of_every_image_are_counted(sampler, expected):
    sampling = Sampling(sampler=sampler, steps=5, count=100, guidance=2.0, interval=[0.3, 0.7])
    found = Painter(Field(), sampling, Decoder(), Interpolant(), LABELS, SCALE, SHIFT).draw(INDICES)
    assert found["nfe"].tolist() == [expected] * len(INDICES)


@pytest.mark.parametrize("pixels", ["truncate", "round"])
def test_pixels_are_cut_as_asked(pixels):
    found = paint(pixels=pixels)
    x = found.decoded.astype(np.float64).transpose(0, 2, 3, 1)
    assert x.min() < -1
    assert x.max() > 1
    levels = {"truncate": 255 * (x + 1) / 2, "round": 127.5 * x + 128}
    expected = {name: np.floor(np.clip(value, 0, 255)).astype(np.uint8) for name, value in levels.items()}
    assert found.images.dtype == np.uint8
    assert (found.images == expected[pixels]).all()
    assert (expected["truncate"] != expected["round"]).any()


def test_the_start_of_every_image_is_standard_normal():
    """Without a velocity the start arrives at the decoder as it is."""
    model, decoder = Field(), Decoder()
    model.slope = model.push = np.zeros(CLASSES + 1)
    sampling = Sampling(sampler="euler", steps=2, count=400, seed=1)
    Painter(model, sampling, decoder, Interpolant(), LABELS, SCALE, SHIFT).paint(range(400))
    z = decoder.given[0][0].double().numpy()  # (400, 3, 5, 5): 30,000 numbers
    assert abs(z.mean()) < 5 / math.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)
    assert len(np.unique(z[:, 0, 0, 0])) == 400


class Noisy(Field):
    """Noise and variance instead of a velocity."""

    process = "ddpm"

    def forward(self, x, t, labels):
        found = super().forward(x, t / 999, labels)[0]
        return torch.cat([found, found.tanh()], dim=1), {}


def painter_by(sampler, model=None, decoder=None, path="linear", **more):
    settings = {"sampler": sampler, "count": 100, "labels": "balanced", "seed": 5, "guidance": 2.5, **more}
    settings |= {} if sampler == "dopri5" else {"steps": 6}
    ddpm = SAMPLERS[sampler].process == "ddpm"
    process, model = (DDPM(), model or Noisy()) if ddpm else (Interpolant(path), model or Field())
    sampling = Sampling(**{"interval": [0.2, 0.7], **settings})
    return Painter(model, sampling, decoder or Decoder(), process, LABELS, 1.0, 0.0)


KEPT = {  # digests of latents, which are sums and products of noise, so that only another noise or order changes them
    "euler": ("6ecbc5704ba1d51f", {}),
    "heun": ("d99a255906653336", {}),
    "euler-maruyama": ("fcd2f19082e02466", {}),
    "euler-maruyama, cosine": ("8e9e1e393f41571e", {"path": "cosine"}),
    "ddim": ("f84d6f056d812412", {"eta": 0.5}),
}


@pytest.mark.parametrize("name", KEPT)
def test_latents_have_the_bits_that_they_have_always_had(name):
    digest, more = KEPT[name]
    painter = painter_by(name.split(",")[0], **more)
    z, _ = latents([painter], INDICES, LABELS.sampled(painter.sampling, INDICES))
    assert hashlib.sha256(z.numpy().tobytes()).hexdigest().startswith(digest)


SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn)


def arithmetic():
    """The type of products by autocast, if any, and whether TF32 is on."""
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return half, *(switch.allow_tf32 for switch in SWITCHES)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_network_has_the_precision_that_was_asked_for_and_the_state_is_float64(sampler, precision):
    usual, states, network, decoder = arithmetic(), set(), set(), set()

    class Asked(Noisy if SAMPLERS[sampler].process == "ddpm" else Field):
        def forward(self, x, t, labels):
            network.add((x.dtype, t.dtype, *arithmetic()))
            return super().forward(x, t, labels)[0].to(arithmetic()[0] or x.dtype), {}

    class Told(Decoder):
        def decode(self, z, *, scale, shift):
            decoder.add((z.dtype, *arithmetic()))
            return super().decode(z, scale=scale, shift=shift).half()

    painter = painter_by(sampler, Asked(), Told(), precision=precision, decoder_precision="fp16")

    class Watched(type(painter.process)):
        def field(self, model):
            outputs = super().field(model)
            return lambda x, *rest: states.add(x.dtype) or outputs(x, *rest)

    painter = dataclasses.replace(painter, process=Watched())
    assert painter.draw(INDICES)["image"].dtype == np.uint8
    assert latents([painter], INDICES, LABELS.sampled(painter.sampling, INDICES))[0].dtype == torch.float64
    expected = {"fp32": usual, "tf32": (None, True, True), "bf16": (torch.bfloat16, *usual[1:])}[precision]
    assert states == {torch.float64}
    assert network == {(torch.float32, torch.float32, *expected)}
    assert decoder == {(torch.float32, torch.float16, *usual[1:])}
    assert arithmetic() == usual


def test_on_a_cpu_tf32_computes_as_fp32_and_bf16_nearly_so():
    found = {}
    for precision in ("fp32", "tf32", "bf16"):
        painter = painter_by("heun", small(SiT), precision=precision)
        found[precision] = latents([painter], INDICES, LABELS.sampled(painter.sampling, INDICES))[0]
    assert torch.equal(found["tf32"], found["fp32"])
    apart = (found["bf16"] - found["fp32"]).abs().max() / found["fp32"].std()
    assert 0 < apart < 0.1


def test_switches_are_put_back_after_an_error_too():
    model, usual = Field(), arithmetic()
    model.slope = None  # breaks it
    with pytest.raises(TypeError):
        painter_by("euler", model, precision="tf32").draw(INDICES)
    assert arithmetic() == usual


def small(kind, **more):
    """A network of random weights in all its layers, for latents of 4 x 4 x 4."""
    network = kind(input_size=4, in_channels=4, patch_size=2, depth=1, width=16, heads=2, classes=CLASSES, **more)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return network.eval().requires_grad_(False)


def test_one_graph_serves_batches_of_any_size_and_guided_ones_too(monkeypatch):
    """The first batch has the size of a side and the channels, for which it is not taken; a last one has one sample."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced alike, and in no time
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = {}
    for way, prepare in {"plain": lambda network: None, "compiled": compile_once}.items():
        prepare(network := small(SiT))
        painter = painter_by("euler-maruyama", network, precision="bf16")
        rows = [range(4), range(4, 11), range(11, 13), range(13, 14)]
        found[way] = torch.cat([latents([painter], one, LABELS.sampled(painter.sampling, one))[0] for one in rows])
    torch.testing.assert_close(found["compiled"], found["plain"], rtol=0, atol=0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert found["plain"].std() > 0.1


class Unasked(TorchDispatchMode):
    """Fails where the value of a tensor is asked for, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dopri5"])
def test_no_evaluation_waits_for_the_one_before(sampler):
    """On a GPU, if there is one, torch itself looks from the second evaluation on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = small(DiT if SAMPLERS[sampler].process == "ddpm" else SiT).to(device)
    painter = painter_by(sampler, model, **({"eta": 0.5} if sampler == "ddim" else {}))

    def told(share):
        if share and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    rows = LABELS.sampled(painter.sampling, INDICES)
    try:
        with Unasked():
            z, _ = latents([painter], INDICES, rows, told)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert z.dtype == torch.float64 and z.isfinite().all()


class Broken(Decoder):
    """Its third image has a pixel that is no number."""

    def decode(self, z, *, scale, shift):
        image = super().decode(z, scale=scale, shift=shift)
        image[2, 0, 0, 0] = torch.nan
        return image


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama", "dopri5"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sampling_stops_at_latents_that_are_not_finite_and_names_the_sample(sampler, value):
    model = Field()
    model.push = np.array([1.0, -2.0, value, 0.6, 0.2])  # of class 2, which sample 6 is the first of
    steps = {} if sampler == "dopri5" else {"steps": 3}
    sampling = Sampling(sampler=sampler, **steps, count=100, labels="balanced", seed=5)
    with pytest.raises(FloatingPointError, match="sample 6: its latents are not finite"):
        Painter(model, sampling, Decoder(), Interpolant(), LABELS, SCALE, SHIFT).draw(INDICES)


def test_sampling_stops_at_pixels_that_are_not_finite_and_names_the_sample():
    sampling = Sampling(sampler="euler", steps=2, count=100, labels="balanced", seed=5)
    painter = Painter(Field(), sampling, Broken(), Interpolant(), LABELS, SCALE, SHIFT)
    with pytest.raises(FloatingPointError, match="sample 5: its pixels are not finite.*: the training diverged"):
        painter.draw(INDICES)
    narrow = sampling.model_copy(update={"decoder_precision": "fp16"})
    with pytest.raises(FloatingPointError, match="sample 5: its pixels.*: fp16 may be too narrow"):
        dataclasses.replace(painter, sampling=narrow).draw(INDICES)


def test_images_are_decoded_some_at_a_time_however_many_are_drawn_at_once():
    whole, parts = Decoder(), Decoder()
    parts.factor = 128  # images of 640 px, 2 of which are a million pixels
    sampling = Sampling(sampler="euler", steps=2, count=100, labels="balanced", seed=5)
    found = [
        Painter(Field(), sampling, decoder, Interpolant(), LABELS, SCALE, SHIFT).draw(INDICES)["image"]
        for decoder in (whole, parts)
    ]
    assert [len(z) for z, *_ in whole.given] == [8] and [len(z) for z, *_ in parts.given] == [2, 2, 2, 2]
    np.testing.assert_array_equal(*found)


class Network(nn.Module):
    """Where a decoder's network would be: keeps what it is given."""

    def decode(self, latents):
        self.given = latents
        return SimpleNamespace(sample=latents.clamp(-1, 1))


def test_the_decoders_network_gets_latents_by_the_stores_scale_and_shift():
    network = Network()
    numbers = {"latent_channels": CHANNELS, "block_out_channels": [4], "scaling_factor": 0.3, "shift_factor": 0.7}
    autoencoder = Autoencoder(network, numbers, "decoder", "cpu")
    sampling = Sampling(sampler="euler", steps=STEPS, count=100, labels="balanced", seed=5)
    Painter(Field(), sampling, autoencoder, Interpolant(), LABELS, SCALE, SHIFT).paint(INDICES)
    assert_near(network.given.double().numpy(), euler_by_hand() / SCALE + SHIFT)
