"""CKNNA: against kernels written out in float64, and what does not change it."""

import multiprocessing
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_gradients import hidden_state

from haste.align.angle import jackknife
from haste.data import order
from haste.files.store import Store
from haste.measure.representations import Neighbours, cknna
from haste.teachers import targets

CKNNA = {"measure": "cknna", "images": 40, "shards": 4, "neighbours": 5, "t": [0.25, 0.75]}


def written_out(x, y, k, *, clamp=0.95, over_all=False):
    """CKNNA of rows x and y with whole kernels, masks and centring matrices, in float64."""
    n = len(x)

    def kernel(rows):
        rows = np.asarray(rows, np.float64)
        if clamp < 1:
            limit = np.sort(np.abs(rows).ravel())[int(clamp * rows.size)]
            rows = np.minimum(np.maximum(rows, -limit), limit)
        rows = rows / np.sqrt((rows**2).sum(axis=1))[:, None]
        return rows @ rows.T

    def mask(values):
        found = np.zeros((n, n))
        for i in range(n):
            others = [j for j in range(n) if j != i]
            found[i, sorted(others, key=lambda j: (-values[i, j], j))[:k]] = 1
        return found

    def hsic(a, b):  # Song et al. 2012, Eq. 5
        one = np.ones(n)
        middle = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (np.trace(a @ b) + middle - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))

    def align(a, b, alpha):
        if over_all:
            centre = np.eye(n) - np.ones((n, n)) / n  # a - mean of each row
            return (alpha * (a @ centre) * (b @ centre)).sum() / (n - 1) ** 2
        return hsic(alpha * a, alpha * b)

    a, b = kernel(x), kernel(y)
    own = align(a, a, mask(a)) * align(b, b, mask(b))
    return align(a, b, mask(a) * mask(b)) / (np.sqrt(own) + 1e-6)


def found(x, y, k, *, clamp=0.95, over_all=False):
    one, other = (Neighbours.of(np.float32(rows), 2 * k + 24, clamp=clamp) for rows in (x, y))
    return cknna(one, other, k, over_all=over_all)


def related(seed, n, widths=(24, 16)):
    """Two views of the same few numbers, with noise."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(n, 5))
    return tuple(np.float32(z @ random.normal(size=(5, d)) + 0.7 * random.normal(size=(n, d))) for d in widths)


@pytest.mark.parametrize("over_all", [False, True])
@pytest.mark.parametrize(("n", "k", "clamp"), [(30, 3, 0.95), (64, 10, 0.95), (64, 10, 1), (301, 7, 0.8)])
def test_it_is_what_whole_kernels_in_float64_give(n, k, clamp, over_all):
    x, y = related(n, n)
    expected = written_out(x, y, k, clamp=clamp, over_all=over_all)
    assert found(x, y, k, clamp=clamp, over_all=over_all) == pytest.approx(expected, abs=1e-5)
    assert 0.1 < expected < 0.9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_scale_order_and_without_the_clamp_a_rotation_change_nothing(seed, over_all):
    x, y = related(seed, 48)
    random = np.random.default_rng(seed)
    value = found(x, y, 5, over_all=over_all)
    assert found(x * 8, y / 4, 5, over_all=over_all) == pytest.approx(value, abs=1e-12)
    some = random.permutation(48)
    assert found(x[some], y[some], 5, over_all=over_all) == pytest.approx(value, abs=1e-12)
    rotation = np.linalg.qr(random.normal(size=(24, 24)))[0]
    free = found(x, y, 5, clamp=1, over_all=over_all)
    assert found(x @ rotation, y, 5, clamp=1, over_all=over_all) == pytest.approx(free, abs=1e-5)


@pytest.mark.parametrize("over_all", [False, True])
def test_a_representation_is_like_itself_and_not_like_noise(over_all):
    x, _ = related(0, 200)
    assert found(x, x, 10, over_all=over_all) == pytest.approx(1, abs=2e-4)  # the epsilon
    assert found(x, x[np.random.default_rng(0).permutation(200)], 10, over_all=over_all) < 0.12


def test_the_error_is_the_spread_over_choices_of_images():
    values, errors, groups = [], [], np.arange(300) * 8 // 300
    for seed in range(24):
        random = np.random.default_rng(seed)
        z, a, b = random.normal(size=(300, 5)), *(np.random.default_rng(9).normal(size=(2, 5, 24)))
        one, other = (Neighbours.of(np.float32(z @ m + random.normal(size=(300, 24))), 44) for m in (a, b))
        values.append(cknna(one, other, 10))
        errors.append(jackknife(np.array([cknna(one, other, 10, kept=groups != g) for g in range(8)])))
    assert 0.8 < np.mean(errors) / np.std(values, ddof=1) < 2.2  # rather too large (Efron and Stein 1981)


def test_leaving_out_images_finds_neighbours_among_the_others():
    x, y = related(3, 90)
    kept = np.arange(90) % 9 != 4
    whole = [Neighbours.of(rows, 40, clamp=1) for rows in (x, y)]
    rest = [Neighbours.of(rows[kept], 40, clamp=1) for rows in (x, y)]
    for over_all in (False, True):
        left = cknna(*whole, 6, kept=kept, over_all=over_all)
        assert left == pytest.approx(cknna(*rest, 6, over_all=over_all), abs=1e-12)


def grown(features, report):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Neighbours.of(features, 44)
    report.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_no_whole_kernel_is_ever_in_memory():
    fork = multiprocessing.get_context("fork")
    features, report = np.random.default_rng(0).normal(size=(6000, 32)).astype(np.float32), fork.Queue()
    child = fork.Process(target=grown, args=(features, report))
    child.start()
    child.join(60)
    assert report.get() < 0.6 * 4 * 6000**2 / 1024  # KiB; half of one in float32


def test_a_state_is_compared_with_the_mean_patch_token_of_the_teacher_of_the_same_images(toy, measured):
    plan = toy(hsic=CKNNA, centred={**CKNNA, "formula": "centred"})
    with Store.open(plan.images.folder) as images:
        held_out = images.range("held_out")
        chosen = held_out.start + order.choice(0, "measured images", 0, 40, len(held_out))
        shown = images.read("image", chosen)
    seen = targets.load_teacher(plan, "vit")(torch.from_numpy(shown), features=True).features.mean(dim=1).numpy()
    tensors = load_file(plan.path(plan.state("plain", 8)))
    for label, over_all in (("hsic", False), ("centred", True)):
        made = measured(plan, label)
        assert made["provenance"]["inputs"].keys() == {"latents", "teacher"} and made["settings"]["teacher"] == "vit"
        rows = {(row["layer"], row["t"]): row for row in made["rows"]}
        assert list(rows) == [(layer, t) for t in (0.25, 0.75) for layer in (1, 2, 3)]
        for layer, t in ((1, 0.75), (3, 0.25)):
            states = torch.cat([hidden_state(plan, tensors, image, t, layer) for image in chosen])
            expected = written_out(np.float32(states), seen, 5, over_all=over_all)
            assert rows[layer, t]["cknna"] == pytest.approx(expected, abs=1e-5)
            assert 0 < rows[layer, t]["error"] < 1


def test_a_teacher_beside_is_compared_like_a_state_and_not_with_itself(toy, measured, tiny):
    teachers = tiny["teachers"] | {"soft": tiny["teachers"]["vit"] | {"filter": {"low_pass": 0.5}}}
    spec = CKNNA | {"t": [0.25], "layers": [1], "teacher": "vit"}
    plan = toy({"teachers": teachers}, plain=spec, both=spec | {"beside": ["soft"]})
    with Store.open(plan.images.folder) as images:
        held_out = images.range("held_out")
        shown = images.read("image", held_out.start + order.choice(0, "measured images", 0, 40, len(held_out)))
    features = {
        name: targets.load_teacher(plan, name)(torch.from_numpy(shown), features=True).features.mean(dim=1).numpy()
        for name in ("vit", "soft")
    }
    plain, made = measured(plan, "plain"), measured(plan, "both")
    assert made["rows"] == plain["rows"] and "teachers" not in plain
    assert made["teachers"].keys() == {"soft"}
    assert made["teachers"]["soft"]["cknna"] == pytest.approx(
        written_out(features["soft"], features["vit"], 5), abs=1e-5
    )
    assert 0.1 < made["teachers"]["soft"]["cknna"] < 1 and made["teachers"]["soft"]["error"] > 0
    assert made["provenance"]["inputs"].keys() == {"latents", "teacher", "teacher soft"}
