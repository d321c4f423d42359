"""A linear probe: what it learns and does not, against its steps in numpy, and that it repeats to the bit."""

import math

import numpy as np
import pytest
import torch

from haste.data import order
from haste.files.store import Store
from haste.measure import linear, passes
from haste.teachers import targets

PROBE = {"measure": "probe", "images": 200, "judged": 90, "layers": [1, 3], "batch": 64, "lr": 0.02}


def clouds(n, seed=0, classes=4, width=6):
    """Points around a centre a class, far from the others, on a scale that only the normalisation makes even."""
    centres = 6 * np.random.default_rng(5).normal(size=(classes, width))
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    points = (centres[labels] + random.normal(size=(n, width))) * 10.0 ** np.arange(-3, width - 3)
    return np.float32(points), labels


def accuracy(train, labels, held_out, expected, **how):
    training = linear.Training(**{"epochs": 60, "warmup": 5, "batch": 64, "lr": 0.02, "seed": 0, **how})
    probe = linear.trained(train, labels, 4, training, "cpu")
    return (linear.classes_of(probe, held_out) == expected).mean()


def test_classes_apart_are_learnt_and_shuffled_ones_are_not():
    (train, labels), (held_out, expected) = clouds(600), clouds(400, seed=1)
    assert accuracy(train, labels, held_out, expected) > 0.995
    shuffled, others = (np.random.default_rng(2).permutation(one) for one in (labels, expected))
    assert accuracy(train, shuffled, held_out, others) < 0.25 + 5 * math.sqrt(0.25 * 0.75 / 400)


def test_every_step_is_that_of_batch_norm_softmax_and_adam_written_out():
    x, y = clouds(23)
    x, epochs, warmup, batch, lr = x.astype(np.float64), 4, 2, 10, 0.1
    how = linear.Training(epochs, warmup, batch, lr, seed=3)
    probe = linear.trained(x, y, 4, how, "cpu")
    start = torch.empty(4, 6)
    torch.nn.init.trunc_normal_(start, std=0.01, generator=torch.Generator().manual_seed(3))
    theta = [start.double().numpy(), np.zeros(4)]
    first, second = ([np.zeros_like(part) for part in theta] for _ in range(2))
    mean, variance, step = np.zeros(6), np.ones(6), 0
    for epoch in range(epochs):
        visits = order.permutation(3, epoch, 23)
        for i in range(2):  # the last three of 23 are passed over
            some, truth = x[visits[10 * i : 10 * i + 10]], y[visits[10 * i : 10 * i + 10]]
            mean, variance = 0.9 * mean + 0.1 * some.mean(0), 0.9 * variance + 0.1 * some.var(0, ddof=1)
            normed = (some - some.mean(0)) / np.sqrt(some.var(0) + 1e-6)
            logits = normed @ theta[0].T + theta[1]
            likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            slope = (likely - np.eye(4)[truth]) / 10
            done = epoch + i / 2
            rate = lr * done / 2 if done < 2 else lr * (1 + math.cos(math.pi * (done - 2) / 2)) / 2
            step += 1
            for part, gradient in enumerate((slope.T @ normed, slope.sum(0))):
                first[part] = 0.9 * first[part] + 0.1 * gradient
                second[part] = 0.999 * second[part] + 0.001 * gradient**2
                right = first[part] / (1 - 0.9**step)
                theta[part] = theta[part] - rate * right / (np.sqrt(second[part] / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(probe[1].weight.detach(), theta[0], rtol=1e-7)
    np.testing.assert_allclose(probe[1].bias.detach(), theta[1], rtol=1e-7)
    expected = ((x - mean) / np.sqrt(variance + 1e-6) @ theta[0].T + theta[1]).argmax(1)
    assert (linear.classes_of(probe, x) == expected).all()


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    (x, y), how = clouds(100), {"epochs": 5, "warmup": 1, "batch": 32, "lr": 0.1}
    one, same, other = (
        linear.trained(x, y, 4, linear.Training(**how, seed=seed), "cpu")[1].weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_states_that_say_their_class_are_read_and_the_file_says_how_sure_that_is(toy, measured, monkeypatch):
    plan = toy(probe=PROBE | {"beside": ["vit"]})
    images = Store.open(plan.images.folder)

    def telling(subject, look, layers, chosen):
        """After block 1 the class, after block 3 the class of a third of the images and nothing of the others."""
        said = np.eye(16, dtype=np.float32)[images.read("label", chosen)]
        return {"layer 1, t 0.5": said, "layer 3, t 0.5": said * (chosen % 3 == 0)[:, None].astype(np.float32)}

    monkeypatch.setattr(passes, "_states", telling)
    found = measured(plan, "probe")
    train, judged = (
        images.range(split).start + order.choice(0, "measured images", 0, count, len(images.range(split)))
        for split, count in (("train", 200), ("held_out", 90))
    )
    teacher = targets.load_teacher(plan, "vit")
    seen = [
        teacher(torch.from_numpy(images.read("image", chosen)), features=True).features.mean(dim=1).numpy()
        for chosen in (train, judged)
    ]
    how = linear.Training(90, 10, 64, 0.02, seed=0)
    probe = linear.trained(seen[0], images.read("label", train), 10, how, "cpu")
    accuracy = (linear.classes_of(probe, seen[1]) == images.read("label", judged)).mean()
    assert found["teachers"]["vit"]["accuracy"] == pytest.approx(accuracy, abs=1.01 / 90)  # rounding of features
    assert accuracy > 0.4  # an untrained network's features already tell digits apart
    sure, part = found["rows"]
    assert (sure["layer"], sure["t"], sure["accuracy"], sure["error"]) == (1, 0.5, 1.0, 0.0)
    share = part["accuracy"]
    assert 0.3 < share < 0.6 and part["error"] == pytest.approx(math.sqrt(share * (1 - share) / 90))
    assert found["notes"] == ["stored latents have no crops and flips, which the published protocol trains with"]
    store = Store.of(next(one.measurement for one in plan.measured).hidden["train"])
    assert store.count == 200
    train, held_out = images.range("train"), images.range("held_out")
    assert train.stop == held_out.start and len(train) == 1700
