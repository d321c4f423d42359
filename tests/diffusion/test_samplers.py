import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from haste.diffusion.guidance import guided
from haste.diffusion.paths import COSINE, LINEAR, Path
from haste.diffusion.samplers import SAMPLERS, Counted, dopri5, euler, euler_maruyama, heun, nfe, time_grid

MEAN, STD = 0.8, 0.3


def mixture_velocity(path: Path, parts: list[tuple[float, float, float]]) -> Callable[[Tensor, float], Tensor]:
    """E[v | x_t] in closed form for one-dimensional data drawn from sum of weight N(mean, std^2)."""

    def velocity(x: Tensor, t: float) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        weights, values = [], []
        for weight, mean, std in parts:
            variance = alpha**2 * std**2 + sigma**2
            residual = (x - alpha * mean) / variance
            weights.append(math.log(weight) - 0.5 * math.log(variance) - 0.5 * residual**2 * variance)
            values.append(path.d_alpha(t) * (mean + alpha * std**2 * residual) + path.d_sigma(t) * sigma * residual)
        return (torch.softmax(torch.stack(weights), 0) * torch.stack(values)).sum(0)

    return velocity


def gaussian_velocity(path: Path = LINEAR) -> Callable[[Tensor, float], Tensor]:
    return mixture_velocity(path, [(1.0, MEAN, STD)])


def recorded(velocity: Callable[[Tensor, float], Tensor]) -> tuple[Callable[[Tensor, float], Tensor], list]:
    calls: list[tuple[Tensor, float]] = []

    def ask(x: Tensor, t: float) -> Tensor:
        calls.append((x, t))
        return velocity(x, t)

    return ask, calls


def error(sampler, steps: int, path: Path) -> float:
    """Against the exact flow: the ODE keeps quantiles, so noise z ends at mean + std z."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    return (sampler(gaussian_velocity(path), z, steps) - (MEAN + STD * z)).abs().max().item()


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_ode_samplers_transport_a_gaussian_with_their_order_of_accuracy(sampler, order, path):
    coarse, fine = error(sampler, 200, path), error(sampler, 400, path)
    assert fine < 5e-3
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_ode_samplers_keep_the_quantiles_of_a_mixture(sampler):
    parts = [(0.3, -1.0, 0.2), (0.7, 0.5, 0.35)]
    z = torch.linspace(-2, 2, 15, dtype=torch.float64)
    x = sampler(mixture_velocity(LINEAR, parts), z, 2000)
    reached = sum(weight * torch.special.ndtr((x - mean) / std) for weight, mean, std in parts)
    torch.testing.assert_close(reached, torch.special.ndtr(z), rtol=0, atol=2e-3)


def moments(steps: int, path: Path, last: float) -> tuple[float, float]:
    """Exact mean and variance of Euler-Maruyama on Gaussian data, which is linear in the start and in every noise.

    Element 0 gets nothing, element 1 a unit start, element 2 + i a unit noise at step i.
    """
    unit = torch.eye(steps + 1, dtype=torch.float64)
    unit = torch.cat([torch.zeros(1, steps + 1, dtype=torch.float64), unit])  # (steps + 2, steps + 1)
    velocity = gaussian_velocity(path)
    ends = euler_maruyama(velocity, unit[:, 0], steps, lambda i: unit[:, 1 + i], path=path, last=last)
    return ends[0].item(), ((ends[1:] - ends[0]) ** 2).sum().item()


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_euler_maruyama_ends_with_the_mean_and_variance_of_the_data(path):
    mean, variance = moments(2000, path, last=1e-3)
    assert mean == pytest.approx(MEAN, rel=5e-3)
    assert variance == pytest.approx(STD**2, rel=5e-3)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_the_last_step_of_euler_maruyama_maps_the_marginal_at_its_last_time_without_noise(path):
    """The state at t = 0.04 is N(alpha mean, V); x + 0.04 (drift) is affine in it, so its moments are known."""
    mean, variance = moments(1000, path, last=0.04)
    alpha, sigma = path.alpha(0.04), path.sigma(0.04)
    spread = alpha**2 * STD**2 + sigma**2
    slope = 1 - 0.04 * (path.d_alpha(0.04) * alpha * STD**2 + path.d_sigma(0.04) * sigma + sigma) / spread
    assert mean == pytest.approx((alpha - 0.04 * path.d_alpha(0.04)) * MEAN, rel=5e-3)
    assert variance == pytest.approx(slope**2 * spread, rel=5e-3)


def test_euler_maruyama_asks_at_the_even_grid_down_to_its_last_time():
    velocity, calls = recorded(gaussian_velocity())
    noises: list[int] = []
    euler_maruyama(velocity, torch.zeros(2), 250, lambda i: noises.append(i) or torch.ones(2))
    expected = torch.linspace(1.0, 0.04, 250, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor([t for _, t in calls], dtype=torch.float64), expected)
    assert calls[-1][1] == 0.04
    assert noises == list(range(249))


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
def test_one_euler_maruyama_step_is_the_formula_with_w_of_two_sigma(path):
    velocity, calls = recorded(gaussian_velocity(path))
    x, kick = torch.tensor([0.4, -1.0], dtype=torch.float64), torch.tensor([0.7, 0.1], dtype=torch.float64)
    end = euler_maruyama(velocity, x, 2, lambda i: kick, path=path, last=0.5)
    score = -(x - path.alpha(1.0) * MEAN) / (path.alpha(1.0) ** 2 * STD**2 + path.sigma(1.0) ** 2)
    drift = gaussian_velocity(path)(x, 1.0) - path.sigma(1.0) * score
    middle = x - 0.5 * drift + math.sqrt(2 * path.sigma(1.0) * 0.5) * kick
    torch.testing.assert_close(calls[1][0], middle)
    score = -(middle - path.alpha(0.5) * MEAN) / (path.alpha(0.5) ** 2 * STD**2 + path.sigma(0.5) ** 2)
    # No noise in the last step.
    torch.testing.assert_close(end, middle - 0.5 * (gaussian_velocity(path)(middle, 0.5) - path.sigma(0.5) * score))


OURS = sorted(name for name in SAMPLERS if SAMPLERS[name].process == "interpolant")  # test_ddpm.py has the others
FIXED = [name for name in OURS if SAMPLERS[name].evaluations is not None]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("steps", [2, 7])
def test_number_of_function_evaluations_is_what_nfe_says(name, steps):
    velocity, calls = recorded(gaussian_velocity())
    noise = {"noise": lambda i: torch.zeros(1)} if SAMPLERS[name].stochastic else {}
    SAMPLERS[name].run(velocity, torch.zeros(1), steps, **noise)
    assert len(calls) == nfe(name, steps)


def test_presets_have_their_published_number_of_evaluations():
    assert (nfe("euler-maruyama", 250), nfe("euler", 50), nfe("heun", 125)) == (250, 50, 249)


@pytest.mark.parametrize("name", OURS)
def test_state_is_float64_and_the_global_random_state_is_left_alone(name):
    velocity, calls = recorded(lambda x, t: gaussian_velocity()(x, t).bfloat16())
    noise = {"noise": lambda i: torch.ones(3, dtype=torch.float32)} if SAMPLERS[name].stochastic else {}
    before = torch.get_rng_state()
    settings = (4,) if name in FIXED else (1e-2, 1e-2)
    end = SAMPLERS[name].run(velocity, torch.ones(3), *settings, **noise)
    assert torch.equal(before, torch.get_rng_state())
    assert end.dtype == torch.float64 and all(x.dtype == torch.float64 for x, _ in calls)
    assert all(type(t) is float for _, t in calls)


def test_heun_asks_a_velocity_that_decides_by_time_to_keep_its_decision_within_a_step():
    class Deciding:
        def __init__(self):
            self.held_at: list[tuple[float, float]] = []

        def __call__(self, x, t):
            return torch.zeros_like(x)

        def freeze_guidance(self, t):
            return lambda x, time: self.held_at.append((t, time)) or torch.zeros_like(x)

    velocity = Deciding()
    heun(velocity, torch.zeros(1), 2)
    assert velocity.held_at == [(1.0, 0.5)]


def test_grid_ends_are_exact():
    for steps in (1, 3, 7, 49, 250):
        grid = time_grid(steps)
        assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0


def test_settings_that_make_no_grid_are_refused():
    with pytest.raises(ValueError, match="0 sampling steps"):
        euler(gaussian_velocity(), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="at least 2"):
        euler_maruyama(gaussian_velocity(), torch.zeros(1), 1, lambda i: torch.zeros(1))
    with pytest.raises(ValueError, match="last = 1.0"):
        euler_maruyama(gaussian_velocity(), torch.zeros(1), 5, lambda i: torch.zeros(1), last=1.0)
    with pytest.raises(ValueError, match="no sampler 'euler_maruyama'.*euler-maruyama"):
        nfe("euler_maruyama", 5)


MIXTURE = mixture_velocity(LINEAR, [(0.3, -1.0, 0.2), (0.7, 0.5, 0.35)])
STARTS = torch.linspace(-2, 2, 7, dtype=torch.float64)


def by_scipy(velocity, x: Tensor, times: list[float]) -> Tensor:
    """The ODE from times[0] down to times[-1], one start after another, stopping at every time named."""
    ends = []
    for start in x:
        state = start.numpy()
        for high, low in pairwise(times):
            found = solve_ivp(
                lambda t, y: velocity(torch.from_numpy(y), min(max(t, low), high)).numpy(),  # noqa: B023
                (high, low),
                state.reshape(-1),
                method="DOP853",
                rtol=1e-11,
                atol=1e-12,
            )
            state = found.y[:, -1]
        ends.append(torch.from_numpy(state).reshape(start.shape))
    return torch.stack(ends)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=lambda path: path.name)
@pytest.mark.parametrize(("rtol", "atol", "off"), [(1e-3, 1e-6, 5e-3), (1e-7, 1e-9, 1e-6)])
def test_dopri5_transports_a_gaussian_within_its_tolerance(path, rtol, atol, off):
    end = dopri5(gaussian_velocity(path), STARTS, rtol, atol)
    torch.testing.assert_close(end, MEAN + STD * STARTS, rtol=0, atol=off)


def test_dopri5_agrees_with_another_librarys_solver():
    expected = by_scipy(MIXTURE, STARTS, [1.0, 0.0])
    torch.testing.assert_close(dopri5(MIXTURE, STARTS, 1e-8, 1e-10), expected, rtol=0, atol=1e-6)


def test_a_sample_of_dopri5_has_the_same_bits_and_evaluations_in_any_batch():
    counts = torch.zeros(7, dtype=torch.int64)
    whole = dopri5(Counted(Rows(), counts), STARTS)
    for i in range(7):
        velocity, calls = recorded(MIXTURE)
        assert torch.equal(dopri5(velocity, STARTS[i : i + 1]), whole[i : i + 1])
        assert counts[i] == len(calls)
    assert len(counts.unique()) > 1  # or one number for all would pass


class Rows:
    """The mixture's velocity, which knows nothing of its batch."""

    def __call__(self, x, t):
        return MIXTURE(x, t)

    def row(self, i):
        return self


def test_dopri5_asks_within_the_unit_interval_and_counts_the_evaluations_of_its_tolerance():
    velocity, calls = recorded(lambda x, t: 1e-4 * torch.ones_like(x))  # its first guess of a step is far too long
    dopri5(velocity, torch.ones(2))
    assert all(0.0 <= t <= 1.0 for _, t in calls)
    velocity, calls = recorded(MIXTURE)
    dopri5(velocity, STARTS[:1])
    # Only the two stages at a step's end are there, and the last step ends there: none is cut off or goes beyond.
    assert [t > 1e-9 for _, t in calls[-4:]] == [True, True, False, False]
    loose, tight = (torch.zeros(7, dtype=torch.int64) for _ in range(2))
    dopri5(Counted(Rows(), loose), STARTS, 1e-3, 1e-6)
    dopri5(Counted(Rows(), tight), STARTS, 1e-6, 1e-9)
    assert (tight > loose).all()


def labelled(x: Tensor, t: float, labels: Tensor) -> Tensor:
    """A smooth velocity for every label; 3 is the null class."""
    return torch.sin(x + labels.to(x.dtype)[:, None]) + t * (1 + labels.to(x.dtype)[:, None])


def test_guidance_on_an_interval_is_solved_from_jump_to_jump():
    """Against scipy, which is stopped at the interval's ends; a step across one costs evaluations and is wrong."""
    x, labels = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    velocity = guided(labelled, labels, torch.full_like(labels, 3), 2.5, (0.3, 0.71))
    expected = []
    for i in range(3):

        def by_hand(y, t, label=labels[i : i + 1]):
            y = y[None]
            conditional, null = labelled(y, t, label), labelled(y, t, torch.tensor([3]))
            return (null + 2.5 * (conditional - null) if 0.3 < t < 0.71 else conditional)[0]

        expected.append(by_scipy(by_hand, x[i : i + 1], [1.0, 0.71 + 1e-12, 0.71 - 1e-12, 0.3 + 1e-12, 0.3 - 1e-12, 0]))
    counts = torch.zeros(3, dtype=torch.int64)
    found = dopri5(Counted(velocity, counts), x, 1e-8, 1e-10)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)
    everywhere = torch.zeros(3, dtype=torch.int64)
    dopri5(Counted(guided(labelled, labels, torch.full_like(labels, 3), 2.5), everywhere), x, 1e-8, 1e-10)
    assert (counts < 2 * everywhere).all()


def test_progress_is_told_from_0_to_1_as_the_samples_go():
    for run, settings, parts in ((heun, (5,), 10**6), (dopri5, (1e-3, 1e-6), 7)):
        told: list[float] = []
        run(Counted(Rows(), torch.zeros(7, dtype=torch.int64), told.append), STARTS, *settings)
        assert told[0] == 0.0 and 0.75 < told[-1] <= 1.0
        # dopri5 goes back where it rejects a step, but never to an earlier sample
        places = [int(share * parts - 1e-6) for share in told]
        assert places == sorted(places)
