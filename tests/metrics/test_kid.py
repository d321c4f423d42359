import numpy as np
import pytest
import torch
from torch_fidelity import defaults
from torch_fidelity.metric_kid import kid_features_to_metric

from haste.metrics import kid as room
from haste.metrics.kid import kid, kid_of_all


def sides(real=60, fake=75, width=6):
    rng = np.random.default_rng(0)
    return rng.normal(size=(real, width)), 1.3 * rng.normal(size=(fake, width)) + 0.4


def by_pairs(real, fake):
    """The unbiased estimator, one pair at a time."""

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n, m = len(real), len(fake)
    own = sum(kernel(real[i], real[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(fake[i], fake[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(kernel(x, y) for x in real for y in fake) / (n * m)


def test_over_all_pairs_it_is_the_unbiased_estimator():
    real, fake = sides()
    assert kid_of_all(real, fake) == pytest.approx(by_pairs(real.tolist(), fake.tolist()), rel=1e-10)


@pytest.mark.parametrize("block", [1, 7, 25])
def test_blocks_and_order_change_nothing_over_all_pairs(monkeypatch, block):
    real, fake = sides()
    whole = kid_of_all(real, fake)
    monkeypatch.setattr(room, "BLOCK", block)
    assert kid_of_all(real[::-1], fake[::-1]) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("seed", [2020, 3])
def test_over_subsets_it_is_torch_fidelitys(seed):
    real, fake = sides()
    theirs = kid_features_to_metric(
        torch.from_numpy(fake),
        torch.from_numpy(real),
        kid_subsets=9,
        kid_subset_size=20,
        rng_seed=seed,
        verbose=False,
    )
    mean, std = kid(real, fake, subsets=9, size=20, seed=seed)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_the_defaults_are_torch_fidelitys(monkeypatch):
    theirs = [defaults.DEFAULTS[name] for name in ("kid_subsets", "kid_subset_size", "rng_seed")]
    assert theirs == [room.SUBSETS, room.SIZE, room.SEED]
    real, fake = sides()
    monkeypatch.setattr(room, "SUBSETS", 9)
    monkeypatch.setattr(room, "SIZE", 20)
    sets = torch.from_numpy(fake), torch.from_numpy(real)
    found = kid_features_to_metric(*sets, kid_subsets=9, kid_subset_size=20, verbose=False)
    assert room.value(real, fake) == {
        "kid": pytest.approx(found["kernel_inception_distance_mean"], rel=1e-9),
        "kid_std": pytest.approx(found["kernel_inception_distance_std"], rel=1e-9),
    }


def test_gaussians_with_different_means_have_the_closed_form():
    # For x ~ N(m, 1) and y ~ N(n, 1) independent, E (xy + 1)^3 with D = 1 follows from the moments of a normal.
    def expected(m, n):
        first, second, third = (
            lambda c: c,
            lambda c: 1 + c * c,
            lambda c: c**3 + 3 * c,
        )
        return third(m) * third(n) + 3 * second(m) * second(n) + 3 * first(m) * first(n) + 1

    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(6000, 1)), rng.normal(size=(6000, 1)) + 1.0
    closed = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    assert kid_of_all(real, fake) == pytest.approx(closed, rel=0.1)


def test_identical_sets_score_at_or_below_zero_and_halves_of_one_set_near_it():
    real, _ = sides(real=200)
    assert -1 < kid_of_all(real, real) < 0
    assert abs(kid_of_all(real[::2], real[1::2])) < 0.1 * kid_of_all(real[::2], real[1::2] + 1)


def test_few_images_are_taken_over_all_pairs_and_it_is_said():
    real, fake = sides()
    assert room.value(real, fake) == {"kid": kid_of_all(real, fake)}
    assert room.notes(60, 75) == ["KID: over all pairs; 60 images are too few for 100 subsets of 1,000"]
    assert room.notes(50_000, 10_000) == []


def test_unusable_features_and_subsets_are_refused():
    real, fake = sides()
    with pytest.raises(ValueError, match=r"width 6 \(real\) and 5 \(fake\)"):
        kid_of_all(real, fake[:, :5])
    with pytest.raises(ValueError, match="2 images or more on each side, found 60 real and 1 fake"):
        kid_of_all(real, fake[:1])
    with pytest.raises(ValueError, match=r"fake features.*row 3"):
        kid_of_all(real, np.where(np.arange(75)[:, None] == 3, np.inf, fake))
    with pytest.raises(ValueError, match="subsets of 2 to 60 images .* found 100 subsets of 61"):
        kid(real, fake, size=61)


def test_tensors_give_what_arrays_give(monkeypatch):
    """What a GPU computes, on the CPU."""
    rng = np.random.default_rng(3)
    real, fake = rng.normal(size=(31, 5)), rng.normal(size=(27, 5)) + 0.2
    expected = kid_of_all(real, fake)
    monkeypatch.setattr(room, "_placed", torch.from_numpy)
    monkeypatch.setattr(room, "BLOCK", 8)
    assert kid_of_all(real, fake) == pytest.approx(expected, rel=1e-12)
