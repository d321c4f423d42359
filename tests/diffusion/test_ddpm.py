"""Improved DDPM against closed forms, numerical integration and diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from haste.config import Sampling
from haste.diffusion.ddpm import DDPM
from haste.diffusion.guidance import guided
from haste.diffusion.respacing import ancestral, at, chain, ddim, log_variance
from haste.diffusion.samplers import SAMPLERS

BETAS = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
ABAR = [math.prod(1 - beta for beta in BETAS[: k + 1]) for k in range(1000)]


def test_the_chain_is_that_of_linear_betas_and_its_posterior_that_of_bayes():
    kept = chain()
    assert kept.beta == pytest.approx(BETAS, rel=1e-9) and kept.alpha_bar == pytest.approx(ABAR, rel=1e-9)
    for k in (1, 2, 500, 999):
        # x_before ~ N(a x_0, 1 - a^2) and x_k = b x_before + sqrt(beta) n: a product of two Gaussians in x_before
        a2, beta = ABAR[k - 1], BETAS[k]
        precision = 1 / (1 - a2) + (1 - beta) / beta
        assert kept.posterior_variance[k] == pytest.approx(1 / precision, rel=1e-9)
        assert kept.of_data[k] == pytest.approx(math.sqrt(a2) / (1 - a2) / precision, rel=1e-9)
        assert kept.of_state[k] == pytest.approx(math.sqrt(1 - beta) / beta / precision, rel=1e-9)
    assert (kept.of_data[0], kept.of_state[0], kept.posterior_variance[0]) == pytest.approx((1, 0, 0), abs=1e-12)
    assert kept.log_posterior_variance[0] == kept.log_posterior_variance[1] == math.log(kept.posterior_variance[1])


@given(st.integers(2, 1000))
@settings(max_examples=50, deadline=None)
def test_any_count_of_kept_steps_has_both_ends_and_the_whole_chains_noise(steps):
    kept = chain(steps)
    assert len(kept.places) == steps == len({*kept.places.tolist()})
    assert (kept.places[0], kept.places[-1]) == (0, 999)
    assert np.cumprod(1 - kept.beta) == pytest.approx([ABAR[k] for k in kept.places], rel=1e-9)


@pytest.mark.parametrize("steps", [1, 0, 1001])
def test_counts_that_the_chain_does_not_have_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps: expected 2 to 1000"):
        chain(steps)


def test_step_k_lies_at_k_over_999_and_every_step_is_equally_likely():
    process = DDPM()
    uniforms = (np.arange(100_000) + 0.5) / 100_000
    times = process.times(lambda purpose: uniforms, lambda purpose: uniforms)
    assert times.dtype == torch.float32
    assert process.time(times).unique(return_counts=True)[1].tolist() == [100] * 1000
    for k in range(1000):
        assert process.time(torch.tensor([k / 999], dtype=torch.float32)).item() == k
        assert process.place(k / 999) == times[process.time(times) == k][0].item()  # no step of its own is left out
    assert process.time(torch.tensor([process.place(0.5)])).item() == 500
    assert process.time(process.times(lambda purpose: np.array([0.0, 1 - 1e-16]), None)).tolist() == [0, 999]


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def times_of(*steps):
    return torch.tensor(steps, dtype=torch.float32) / 999


def test_the_state_has_the_published_mean_and_variance():
    z, noise, t = random(0, 3, 4, 2, 2), random(1, 3, 4, 2, 2), times_of(0, 400, 999)
    found = DDPM().noised(z, noise, t)
    for i, k in enumerate((0, 400, 999)):
        expected = math.sqrt(ABAR[k]) * z[i] + math.sqrt(1 - ABAR[k]) * noise[i]
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


def gaussians(k, z, noise, found, output):
    """(mean, standard deviation) of the posterior and of the model's step from step k, for one number each."""
    kept = chain()
    x = math.sqrt(ABAR[k]) * z + math.sqrt(1 - ABAR[k]) * noise
    data = (x - math.sqrt(1 - ABAR[k]) * found) / math.sqrt(ABAR[k])
    share, low = (output + 1) / 2, math.log(kept.posterior_variance[max(k, 1)])
    deviation = math.exp((share * math.log(BETAS[k]) + (1 - share) * low) / 2)
    mean = [kept.of_data[k] * start + kept.of_state[k] * x for start in (z, data)]
    return (mean[0], math.sqrt(kept.posterior_variance[k])), (mean[1], deviation)


@pytest.mark.parametrize("k", [1, 2, 57, 999])
def test_the_bound_is_the_divergence_of_the_two_gaussians_integrated_numerically(k):
    process = DDPM()
    z, noise = random(1, 1, 2, 1, 1), random(2, 1, 2, 1, 1)
    found, output = noise + 0.01 * random(3, 1, 2, 1, 1), random(4, 1, 2, 1, 1)
    numbers = [x.flatten().tolist() for x in (z, noise, found, output)]
    bits = []
    for one in zip(*numbers, strict=True):
        (m, s), (m2, s2) = gaussians(k, *one)
        p, q = stats.norm(m, s), stats.norm(m2, s2)
        nats, _ = integrate.quad(lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), m - 9 * s, m + 9 * s)
        bits.append(nats / math.log(2))
    expected = np.mean(bits)
    assert process.bound(found, output, z, noise, times_of(k)).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_bound_at_step_0_is_the_likelihood_of_the_bins_of_8_bit_pixels():
    process = DDPM()
    z = torch.tensor([-1.0, 1.0, 0.2, 127 / 127.5 - 1]).view(1, 4, 1, 1).double()
    noise, output = random(1, 1, 4, 1, 1), random(2, 1, 4, 1, 1)
    found = noise + 0.1 * random(3, 1, 4, 1, 1)
    bits = []
    for one in zip(*(x.flatten().tolist() for x in (z, noise, found, output)), strict=True):
        _, (mean, deviation) = gaussians(0, *one)
        low = -math.inf if one[0] < -0.999 else one[0] - 1 / 255
        high = math.inf if one[0] > 0.999 else one[0] + 1 / 255
        mass, _ = integrate.quad(
            stats.norm(mean, deviation).pdf, max(low, mean - 40 * deviation), min(high, mean + 40 * deviation)
        )
        bits.append(-math.log2(max(mass, 1e-12)))
    assert process.bound(found, output, z, noise, times_of(0)).item() == pytest.approx(np.mean(bits), rel=1e-4)


def test_mse_trains_the_noise_alone_and_the_bound_the_variance_alone():
    process = DDPM()
    z, noise, t = random(0, 3, 2, 2, 2), random(1, 3, 2, 2, 2), times_of(0, 300, 999)
    predicted = random(2, 3, 4, 2, 2).requires_grad_()
    losses = process.losses(predicted, z, noise, t)
    assert losses.keys() == {"denoising", "mse", "vlb"}
    assert losses["denoising"].item() == pytest.approx((losses["mse"] + losses["vlb"]).item())
    assert losses["mse"].item() == pytest.approx((predicted[:, :2] - noise).square().mean().item())
    (of_mse,) = torch.autograd.grad(losses["mse"], predicted, retain_graph=True)
    (of_vlb,) = torch.autograd.grad(losses["vlb"], predicted)
    assert (of_mse[:, :2] != 0).all() and (of_mse[:, 2:] == 0).all()
    assert (of_vlb[:, :2] == 0).all() and (of_vlb[:, 2:] != 0).all()


def test_losses_in_float32_are_those_of_float64():
    process = DDPM()
    t = times_of(*range(0, 1000, 9))
    parts = [random(seed, len(t), channels, 4, 4) for seed, channels in ((0, 8), (1, 4), (2, 4))]
    exact, single = (process.losses(*(x.to(kind) for x in parts), t) for kind in (torch.float64, torch.float32))
    for name, value in exact.items():
        assert single[name].item() == pytest.approx(value.item(), rel=1e-4), name


def bounded(seed, channels=2):
    """A network that is none: outputs (B, 2C) of x (B, C) that stay small, and depend on t."""
    mix = 0.5 * random(seed, 2 * channels, channels)
    return lambda x, t: torch.tanh(torch.einsum("oc,bchw->bohw", mix, x)) * (0.5 + t)


@pytest.mark.parametrize("steps", [2, 10, 250])
def test_the_same_noise_gives_the_latents_of_diffusers_ddpm_scheduler(steps, monkeypatch):
    scheduler = DDPMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="learned_range",
        clip_sample=False, timestep_spacing="linspace",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    network, x = bounded(0), random(1, 2, 2, 3, 3)
    noise = [random(10 + i, 2, 2, 3, 3) for i in range(steps)]
    drawn = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(drawn))
    theirs = x.clone()
    for k in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, float(k) / 999), k, theirs).prev_sample
    ours = ancestral(network, x, steps, lambda i: noise[i])
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # their schedule is in float32


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_gives_the_latents_of_diffusers_ddim_scheduler(eta):
    scheduler = DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(1000)  # of fewer steps it takes the one before to be k - 1000 // steps, kept or not
    network, x = bounded(0), random(1, 2, 2, 3, 3)
    noise = [random(10 + i, 2, 2, 3, 3) for i in range(1000)]
    theirs = x.clone()
    for i, k in enumerate(scheduler.timesteps):
        predicted = network(theirs, float(k) / 999)[:, :2]
        theirs = scheduler.step(predicted, k, theirs, eta=eta, variance_noise=noise[i] * (k > 0)).prev_sample
    ours = ddim(network, x, 1000, lambda i: noise[i], eta)
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # their schedule is in float32


def test_ddim_of_few_steps_is_the_update_of_the_paper_between_kept_steps():
    network, x, eta = bounded(0), random(1, 2, 2, 3, 3), 0.5
    noise = [random(10 + i, 2, 2, 3, 3) for i in range(4)]
    places, expected = [999, 666, 333, 0], x
    for i, (k, before) in enumerate(zip(places, [ABAR[666], ABAR[333], ABAR[0], 1.0], strict=True)):
        predicted = network(expected, k / 999)[:, :2]
        data = (expected - math.sqrt(1 - ABAR[k]) * predicted) / math.sqrt(ABAR[k])
        sigma = eta * math.sqrt((1 - before) / (1 - ABAR[k]) * (1 - ABAR[k] / before))  # Eq. 16
        expected = math.sqrt(before) * data + math.sqrt(1 - before - sigma**2) * predicted + sigma * noise[i]
    torch.testing.assert_close(
        ddim(network, x, 4, lambda i: noise[i], eta), expected, rtol=1e-6, atol=1e-6
    )  # t in float32


MEAN, DEVIATION = (
    torch.tensor([1.5, -0.7]).view(1, 2, 1, 1).double(),
    torch.tensor([0.3, 2.0]).view(1, 2, 1, 1).double(),
)


def knows(x, t):
    """The best prediction for data N(MEAN, DEVIATION^2), and a variance as the posterior of such data has it."""
    k = round(999 * t)
    spread = ABAR[k] * DEVIATION**2 + 1 - ABAR[k]
    predicted = math.sqrt(1 - ABAR[k]) * (x - math.sqrt(ABAR[k]) * MEAN) / spread
    return torch.cat([predicted, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize(
    ("run", "tolerance"),
    [
        (lambda x, noise: ancestral(knows, x, 1000, noise), 0.03),
        (lambda x, noise: ancestral(knows, x, 250, noise), 0.05),
        (lambda x, noise: ddim(knows, x, 250, noise), 0.03),
        (lambda x, noise: ddim(knows, x, 250, noise, 1.0), 0.05),
    ],
    ids=["ddpm-1000", "ddpm-250", "ddim-250", "ddim-250, eta 1"],
)
def test_a_denoiser_that_knows_the_data_gives_its_distribution_back(run, tolerance):
    count = 40_000
    found = run(random(0, count, 2, 1, 1), lambda i: random(100 + i, count, 2, 1, 1))
    error = 4 / math.sqrt(count)  # standard errors of the mean and, about, of the deviation, both over the deviation
    assert ((found.mean(0, keepdim=True) - MEAN) / DEVIATION).abs().max() < error + tolerance
    assert (found.std(0, keepdim=True) / DEVIATION - 1).abs().max() < error + tolerance


def test_the_variance_is_beta_at_1_and_that_of_the_posterior_at_minus_1():
    kept = chain(250)
    for k in (1, 100, 249):
        ends = [log_variance(kept, k, torch.tensor(o, dtype=torch.float64)).exp().item() for o in (1.0, -1.0)]
        assert ends == pytest.approx([kept.beta[k], kept.posterior_variance[k]], rel=1e-9)


def test_the_last_step_takes_no_noise_and_each_other_step_its_own():
    taken = []
    ancestral(bounded(0), random(1, 1, 2, 2, 2), 10, lambda i: taken.append(i) or random(i, 1, 2, 2, 2))
    assert taken == list(range(9))
    taken.clear()
    ddim(bounded(0), random(1, 1, 2, 2, 2), 10, lambda i: taken.append(i) or random(i, 1, 2, 2, 2))
    assert taken == []


def test_the_network_is_given_the_step_of_the_whole_chain():
    given = []

    def network(x, step, condition):
        given.append(step.tolist())
        return torch.cat([x, x], dim=1), {}

    process = DDPM()
    field = process.field(network)
    sampling = Sampling(sampler="ddpm", steps=4)
    start = random(0, 2, 2, 2, 2)
    process.sample(SAMPLERS["ddpm"], lambda x, t: field(x, t, None), start, sampling, lambda i: 0 * start)
    assert given == [[999.0] * 2, [666.0] * 2, [333.0] * 2, [0.0] * 2]


def test_coefficients_are_float64_until_they_meet_the_data():
    kept = chain()
    assert at(kept.alpha_bar, 999, torch.zeros(1).double()).item() == kept.alpha_bar[999]


def test_guidance_changes_the_noise_and_leaves_the_variance_of_the_conditional_evaluation():
    process, x = DDPM(), random(0, 3, 2, 2, 2)

    def outputs(x, t, condition):
        return torch.cat([x, x], dim=1) * condition.view(-1, 1, 1, 1)

    own, null = torch.full((3,), 2.0).double(), torch.full((3,), 1.0).double()
    found = guided(outputs, own, null, 3.0, channels=process.guided(2))(x, 0.5)
    assert process.outputs(2) == 4 and found.shape == (3, 4, 2, 2)
    torch.testing.assert_close(found[:, :2], (1 + 3 * (2 - 1)) * x)
    torch.testing.assert_close(found[:, 2:], 2 * x)
