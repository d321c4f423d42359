import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.metrics import frechet, scores


def brute_force(real, fake, k):
    """Precision and recall by loops over exact differences in float64."""

    def ball_sizes(points):
        sizes = []
        for i, point in enumerate(points):
            others = [np.linalg.norm(point - other) for j, other in enumerate(points) if j != i]
            sizes.append(sorted(others)[k - 1])
        return sizes

    def share(points, centres):
        sizes = ball_sizes(centres)
        inside = [any(np.linalg.norm(p - c) <= s for c, s in zip(centres, sizes, strict=True)) for p in points]
        return sum(inside) / len(points)

    return share(fake, real), share(real, fake)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 4),
    shift=st.floats(0, 3),
    scale=st.floats(0.3, 2),
    origin=st.sampled_from([0.0, 1e6]),  # far from the origin |a|^2 + |b|^2 - 2ab would cancel
)
def test_precision_and_recall_equal_brute_force(seed, k, shift, scale, origin):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(17, 3)) + origin
    fake = rng.normal(size=(13, 3)) * scale + shift + origin
    assert scores.precision_recall(real, fake, k) == brute_force(real, fake, k)


def test_blocks_of_distances_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 4)), rng.normal(size=(41, 4)) * 1.3
    whole = scores.precision_recall(real, fake)
    monkeypatch.setattr(scores, "ROWS", 7)
    assert scores.precision_recall(real, fake) == whole == brute_force(real, fake, 3)


def test_a_point_on_the_sphere_is_inside():
    real = np.array([[0.0], [1.0], [3.0], [7.0]])  # radii for k = 1: 1, 1, 2, 4
    fake = np.array([[11.0], [11.5], [-1.0], [-50.0]])  # the first and the third lie exactly on a sphere
    assert scores.precision_recall(real, fake, k=1)[0] == 0.5


def test_a_collapsed_generator_has_high_precision_and_low_recall():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(200, 2))
    precision, recall = scores.precision_recall(real, real[:1] + 1e-4 * rng.normal(size=(200, 2)))
    assert precision == 1 and recall <= 0.01


def test_a_generator_that_covers_too_much_has_low_precision_and_high_recall():
    rng = np.random.default_rng(2)
    real, fake = rng.normal(size=(200, 2)), rng.uniform(-20, 20, size=(200, 2))
    precision, recall = scores.precision_recall(real, fake)
    assert precision < 0.1 and recall == 1


def test_identical_sets_score_one_and_distant_sets_zero():
    real = np.random.default_rng(3).normal(size=(60, 8)).astype(np.float32)
    assert scores.precision_recall(real, real) == (1, 1)
    assert scores.precision_recall(real, real + 1000) == (0, 0)


def test_twins_count_as_neighbours():
    points = np.array([[0.0], [0.0], [5.0], [9.0]])
    np.testing.assert_array_equal(scores.radii(points, k=1), [0, 0, 4, 4])


def test_unusable_features_are_refused():
    real = np.random.default_rng(0).normal(size=(10, 2))
    with pytest.raises(ValueError, match="k = 3 needs more than 3 images, found 3"):
        scores.precision_recall(real, real[:3])
    with pytest.raises(ValueError, match=r"width 2 \(real\) and 1 \(fake\)"):
        scores.precision_recall(real, real[:, :1])
    with pytest.raises(ValueError, match=r"fake features.*row 4"):
        scores.precision_recall(real, np.where(np.arange(10)[:, None] == 4, np.nan, real))


def test_class_accuracy_counts_the_largest_logit():
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [9.0, 8.0, 7.0]])
    assert scores.class_accuracy(logits, np.array([1, 0, 1, 0])) == 0.75


def test_labels_that_cannot_be_right_are_refused():
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"expected 0\.\.2, found 0\.\.3"):
        scores.class_accuracy(logits, np.array([0, 3]))
    with pytest.raises(ValueError, match="expected 2 integers"):
        scores.class_accuracy(logits, np.array([0, 1, 2]))


def test_every_metric_gives_the_same_from_merged_shards_as_from_one_pass():
    rng = np.random.default_rng(5)
    batch = {
        "pool": rng.normal(size=(60, 4)).astype(np.float32),
        "logits": rng.normal(size=(60, 3)),
        "labels": rng.integers(0, 3, 60),
    }
    reference = {"pool": rng.normal(size=(40, 4)), "logits": rng.normal(size=(40, 3)), "labels": np.zeros(40, int)}
    for name, metric in scores.METRICS.items():
        assert set(metric.needs) <= set(batch), name
        real = metric.update(None, reference) if metric.reference else None
        whole = metric.value(metric.update(None, batch), real)
        first, second, third = ({k: v[a:b] for k, v in batch.items()} for a, b in ((0, 7), (7, 31), (31, 60)))
        merged = metric.merge(metric.update(metric.update(None, first), second), metric.update(None, third))
        assert metric.value(merged, real) == pytest.approx(whole, rel=1e-10), name
        assert set(whole) == set(metric.better)
        assert set(metric.better.values()) <= {"lower", "higher"}


def test_the_registered_frechet_distance_is_the_one_of_the_pool():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 1
    metric = scores.METRICS["frechet"]
    found = metric.value(metric.update(None, {"pool": x}), metric.update(None, {"pool": y}))
    expected = frechet.frechet_distance(frechet.update(None, x), frechet.update(None, y))
    assert found == {"fd": expected}
