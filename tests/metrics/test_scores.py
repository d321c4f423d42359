import numpy as np
import pytest

from haste.metrics import frechet, inception_score, kid, scores


def test_class_accuracy_counts_the_largest_logit():
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [9.0, 8.0, 7.0]])
    assert scores.class_accuracy(logits, np.array([1, 0, 1, 0])) == 0.75


def test_labels_that_cannot_be_right_are_refused():
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"expected 0\.\.2, found 0\.\.3"):
        scores.class_accuracy(logits, np.array([0, 3]))
    with pytest.raises(ValueError, match="expected 2 integers"):
        scores.class_accuracy(logits, np.array([0, 1, 2]))


def test_caption_accuracy_is_of_the_samples_whose_caption_means_a_class_and_the_others_are_counted():
    metric, logits = scores.METRICS["caption_accuracy"], np.eye(3)
    stats = metric.update(None, {"logits": logits, "meant": np.array([0, 2, -1])})
    assert metric.value(stats, None) == {"caption_accuracy": 0.5}
    assert metric.notes(stats, None) == [
        "caption accuracy is of 2 of 3 samples: the others' captions mean no known class"
    ]
    none = metric.update(None, {"logits": logits, "meant": np.full(3, -1)})
    assert metric.value(none, None) == {} and metric.value(metric.merge(stats, none), None)["caption_accuracy"] == 0.5


def batch_of(seed, count):
    rng = np.random.default_rng(seed)
    return {
        "pool": rng.normal(size=(count, 4)).astype(np.float32),
        "spatial": rng.normal(size=(count, 5)).astype(np.float32),
        "logits": rng.normal(size=(count, 3)),
        "logits_unbiased": rng.normal(size=(count, 6)),
        "labels": rng.integers(0, 3, count),
        "meant": rng.integers(-1, 3, count),
        "cosine": rng.normal(0, 0.3, count).astype(np.float32),
    }


@pytest.mark.parametrize("name", scores.METRICS)
def test_a_metric_gives_the_same_from_merged_shards_as_from_one_pass(name, monkeypatch):
    monkeypatch.setattr(inception_score, "SPLIT", 25)
    monkeypatch.setattr(kid, "SIZE", 30)
    metric, batch, reference = scores.METRICS[name], batch_of(5, 60), batch_of(6, 40)
    assert set(metric.needs) <= set(batch)
    real = metric.update(None, reference) if metric.reference else None
    whole = metric.value(metric.update(None, batch), real)
    numbered = batch | {"index": np.arange(60)}
    first, second, third = ({k: v[a:b] for k, v in numbered.items()} for a, b in ((0, 7), (7, 31), (31, 60)))
    merged = metric.merge(metric.update(None, third), metric.update(metric.update(None, first), second))
    assert metric.value(merged, real) == pytest.approx(whole, rel=1e-10)
    assert set(whole) - set(metric.better) <= {f"{known}_std" for known in metric.better}
    assert set(metric.better) <= set(whole) and set(metric.better.values()) <= {"lower", "higher"}
    assert all(isinstance(note, str) for note in metric.notes(merged, real))


@pytest.mark.parametrize("name", scores.METRICS)
def test_a_metric_refuses_features_that_are_not_finite(name):
    metric, batch = scores.METRICS[name], batch_of(5, 60)
    seen = next(need for need in metric.needs if need != "labels")
    batch[seen][(17, 1)[: batch[seen].ndim]] = np.nan
    with pytest.raises(ValueError, match="row 17"):
        metric.update(None, batch)


def named(outputs):
    """Names of what is scored from a detector with these outputs, and the labels."""
    batch = {name: value for name, value in batch_of(7, 20).items() if name in {*outputs, "labels"}}
    found = {}
    for metric in scores.METRICS.values():
        if set(metric.needs) <= set(batch):
            stats = metric.update(None, batch)
            found |= metric.value(stats, stats)
    return set(found)


def test_a_classifier_of_the_data_has_no_sfid_and_no_inception_score_and_inception_no_class_accuracy():
    common = {"fd", "precision", "recall", "kid"}
    assert named({"pool", "logits"}) == {*common, "class_accuracy"}
    assert named({"pool", "spatial", "logits_unbiased"}) == {*common, "sfid", "is"}
    assert named({"pool"}) == common


def test_the_registered_precision_and_recall_take_the_reference_as_real():
    rng = np.random.default_rng(8)
    real, wide = rng.normal(size=(200, 2)), rng.uniform(-20, 20, size=(200, 2))
    metric = scores.METRICS["precision_recall"]
    found = metric.value(metric.update(None, {"pool": wide}), metric.update(None, {"pool": real}))
    assert found["precision"] < 0.1 and found["recall"] == 1


def test_the_registered_kid_draws_the_samples_first(monkeypatch):
    rng = np.random.default_rng(9)
    monkeypatch.setattr(kid, "SIZE", 8)
    real, fake = (rng.normal(size=(count, 3)).astype(np.float32) for count in (30, 20))
    metric = scores.METRICS["kid"]
    found = metric.value(metric.update(None, {"pool": fake}), metric.update(None, {"pool": real}))
    mean, std = kid.kid(real, fake, size=8)
    assert found == {"kid": mean, "kid_std": std}


@pytest.mark.parametrize(("name", "output", "number"), [("frechet", "pool", "fd"), ("sfid", "spatial", "sfid")])
def test_a_registered_frechet_distance_is_the_one_of_its_output(name, output, number):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 1
    metric = scores.METRICS[name]
    found = metric.value(metric.update(None, {output: x}), metric.update(None, {output: y}))
    expected = frechet.frechet_distance(frechet.update(None, x), frechet.update(None, y))
    assert found == {number: expected}
