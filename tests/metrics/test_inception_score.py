import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_isc import isc_features_to_metric

from haste.metrics import inception_score
from haste.metrics.inception_score import merge, update, value


def logits(seed, count, classes=7, scale=3.0):
    # They drift with the row, so that no split stands for another.
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(count, classes)) + np.linspace(0, 6, count)[:, None] * np.eye(classes)[0]).astype(
        np.float32
    )


def by_loops(found, split):
    """exp(mean KL) of each split, image by image, in float64."""
    scores = []
    for low in range(0, len(found), split):
        p = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in found[low : low + split].astype(float)]
        q = np.mean(p, axis=0)
        scores.append(np.exp(np.mean([sum(a * np.log(a / b) for a, b in zip(row, q, strict=True)) for row in p])))
    return scores


@pytest.fixture
def split(monkeypatch):
    monkeypatch.setattr(inception_score, "SPLIT", 20)
    return 20


def test_the_score_is_the_mean_over_splits_in_order(split):
    x = logits(0, 60)
    expected = by_loops(x, split)
    found = value(update(None, {"x": x}, "x"))
    assert found == {
        "is": pytest.approx(np.mean(expected), rel=1e-12),
        "is_std": pytest.approx(np.std(expected), rel=1e-9),
    }
    assert found["is"] != pytest.approx(by_loops(x, 60)[0], rel=0.01)


def test_the_score_agrees_with_torch_fidelity(split):
    x = logits(1, 100)
    theirs = isc_features_to_metric(torch.from_numpy(x), splits=5, shuffle=False)
    found = value(update(None, {"x": x}, "x"))
    assert found["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert found["is_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-8)


def test_splits_are_of_5000_as_adm_takes_them():
    x = logits(2, 10_000, 3)
    theirs = isc_features_to_metric(torch.from_numpy(x), splits=2, shuffle=False)
    assert value(update(None, {"x": x}, "x"))["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-10)


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, 64), max_size=6), order=st.randoms(use_true_random=False))
def test_shards_batches_and_their_order_change_nothing(cuts, order):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_score, "SPLIT", 20)
        x = logits(3, 65)
        pieces = [piece for piece in np.split(np.arange(65), sorted(set(cuts))) if piece.size]
        order.shuffle(pieces)
        stats = [update(None, {"x": x[piece], "index": piece}, "x") for piece in pieces]
        merged = stats[0]
        for other in stats[1:]:
            merged = merge(merged, other)
        expected = by_loops(x, 20)
        assert value(merged)["is"] == pytest.approx(np.mean(expected), rel=1e-12)
        one = None
        for piece in np.split(np.arange(65), sorted(set(cuts))):
            one = update(one, {"x": x[piece]}, "x") if piece.size else one
        assert value(one) == {name: pytest.approx(number, rel=1e-9) for name, number in value(merged).items()}


def test_sure_and_balanced_logits_score_the_number_of_classes_and_equal_ones_score_1():
    sure = 1e4 * np.eye(6)[np.arange(50) % 5]  # the sixth class is never seen
    assert value(update(None, {"x": sure}, "x")) == {"is": pytest.approx(5, rel=1e-12)}
    assert value(update(None, {"x": np.ones((50, 5))}, "x")) == {"is": pytest.approx(1, rel=1e-12)}


def test_one_image_scores_1_without_an_error_bar():
    assert value(update(None, {"x": logits(0, 1)}, "x")) == {"is": pytest.approx(1, rel=1e-12)}


def test_what_is_not_made_of_whole_splits_says_so(split):
    def said(count):
        return inception_score.notes(update(None, {"x": logits(0, count)}, "x"))

    assert said(20) == said(60) == []
    assert said(19) == ["IS: 19 images make one split of their own, not splits of 20; fewer score lower"]
    assert said(43) == ["IS: 3 splits of 20 but for 1 of 3, which weigh the same"]


def test_unusable_logits_are_refused():
    x = logits(0, 6)
    x[4, 2] = np.nan
    with pytest.raises(ValueError, match=r"logits_unbiased: 1 of 6 rows hold NaN.*row 4"):
        update(None, {"logits_unbiased": x}, "logits_unbiased")
    one = update(None, {"x": logits(0, 6)}, "x")
    with pytest.raises(ValueError, match="7 and 8 classes"):
        update(one, {"x": logits(0, 6, 8)}, "x")
    with pytest.raises(ValueError, match="same place"):
        merge(one, one)
