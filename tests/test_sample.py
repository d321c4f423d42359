"""Image i depends on (seed, i) alone: not on the batch, not on the shards."""

from pathlib import Path

import numpy as np
import pytest

from haste import cli
from haste.data import drawn
from haste.data.store import Store, join
from haste.sample import Painter
from haste.train import loop


@pytest.fixture
def trained(make_plan):
    """A function from a way to sample to a plan whose vanilla state is trained, and the evaluation of it."""

    def make(shards=1, batch=7, **sampling):
        settings = {"sampler": "euler", "steps": 3, "count": 20, "labels": "balanced", **sampling}
        plan = make_plan(
            sampling={"quick": settings},
            runtime={"sample_shards": shards, "sample_batch": batch, "save_every": 100},
            runs={"vanilla": {"milestones": [8]}},
        )
        loop.train(plan, plan.state("vanilla", 8))
        return plan, plan.rows[0].evaluation

    return make


def draw(plan, evaluation):
    """All samples and labels of an evaluation, drawn by the command."""
    images, labels = [], []
    for shard in range(evaluation.features.shards):
        assert cli.main(["sample", evaluation.name, "--shard", str(shard), "-c", str(plan.file)]) == 0
        with np.load(evaluation.sample_file(shard), allow_pickle=False) as file:
            images.append(file["arr_0"])
            labels.append(file["arr_1"])
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"sampler": "heun", "guidance": 2.0, "interval": [0.0, 0.7]},
        {"sampler": "euler-maruyama", "steps": 5, "labels": "random"},
        {"sampler": "dopri5", "steps": None, "rtol": 0.01, "atol": 0.001, "guidance": 2.0, "interval": [0.0, 0.7]},
    ],
    ids=["euler", "heun-guided", "sde", "dopri5-guided"],
)
def test_image_i_is_the_same_from_1_and_3_shards_and_any_batch(trained, sampling):
    one, labels_one = draw(*trained(shards=1, batch=20, **sampling))
    three, labels_three = draw(*trained(shards=3, batch=4, **sampling))
    assert one.shape == (20, 8, 8, 3)
    assert one.dtype == np.uint8
    assert (labels_one == labels_three).all()
    assert np.abs(one.astype(int) - three.astype(int)).max() <= 1


def test_another_seed_gives_other_images(trained):
    first, _ = draw(*trained())
    second, _ = draw(*trained(seed=1))
    assert np.abs(first.astype(int) - second.astype(int)).max() > 1


def test_labels_are_balanced_or_random_as_asked(trained):
    _, balanced = draw(*trained())
    assert balanced.tolist() == [i % 10 for i in range(20)]
    _, drawn = draw(*trained(labels="random"))
    assert drawn.tolist() != balanced.tolist()
    assert 0 <= drawn.min() <= drawn.max() < 10


def test_features_belong_to_the_samples_beside_them(trained):
    from haste.metrics.detectors import open_detector

    plan, evaluation = trained(shards=3)
    images, labels = draw(plan, evaluation)
    made = evaluation.features
    join(made.folder, kind="features", key=made.key, recipe=made.recipe, shards=3, splits={}, provenance={})
    store, detector = Store.open(made.folder), open_detector(plan.detector.folder)
    import torch

    seen = detector(torch.from_numpy(images))
    rows = range(len(images))
    assert (store.read("label", rows) == labels).all()
    np.testing.assert_allclose(store.read("pool", rows), seen["pool"].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(store.read("logits", rows), seen["logits"].numpy(), rtol=1e-5, atol=1e-6)


def test_samples_come_from_the_average_and_not_from_the_raw_model(trained):
    from safetensors.torch import load_file, save_file

    plan, evaluation = trained()
    before, _ = draw(plan, evaluation)
    path = Path(plan.path(evaluation.state))
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    raw = {name: value + 1.0 if name.startswith("model/") else value for name, value in weights.items()}
    save_file(raw, path, metadata)
    assert (draw(plan, evaluation)[0] == before).all()
    averaged = {name: value + 1.0 if name.startswith("ema/final") else value for name, value in weights.items()}
    save_file(averaged, path, metadata)
    assert (draw(plan, evaluation)[0] != before).any()


def test_a_state_without_its_file_is_named(trained, capsys):
    plan, evaluation = trained()
    Path(plan.path(evaluation.state)).unlink()
    assert cli.main(["sample", evaluation.name, "-c", str(plan.file)]) == 2
    assert f"{plan.path(evaluation.state)}: this state is missing" in capsys.readouterr().err


def test_a_shard_that_is_killed_goes_on_from_its_finished_batches_to_the_same_bits(trained, monkeypatch, caplog):
    plan, evaluation = trained(batch=6, sampler="euler-maruyama", steps=5)
    whole, labels = draw(plan, evaluation)
    file, paint, asked = Path(evaluation.sample_file(0)), Painter.draw, []
    store = Path(evaluation.features.shard_files[0])
    features = store.read_bytes()
    for path in (file, store):
        path.unlink()

    def counted(painter, indices, told):
        asked.append(indices)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return paint(painter, indices, told)

    monkeypatch.setattr(Painter, "draw", counted)
    assert cli.main(["sample", evaluation.name, "-c", str(plan.file)]) == 130
    assert not file.exists() and not store.exists()
    assert [path.name for path in file.parent.iterdir()] == [".shard-00000-of-00001.batches"]
    again, labels_again = draw(plan, evaluation)
    assert [(rows.start, rows.stop) for rows in asked] == [(0, 6), (6, 12), (12, 18), (12, 18), (18, 20)]
    assert (again == whole).all() and (labels_again == labels).all()
    assert features_of(store) == features_of_bytes(features)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def features_of(path):
    import h5py

    with h5py.File(path, "r") as file:
        return {name: np.asarray(file[name]).tobytes() for name in file}


def features_of_bytes(data):
    import io

    return features_of(io.BytesIO(data))


def test_the_score_has_the_evaluations_that_were_counted(trained):
    import json

    plan, evaluation = trained(sampler="dopri5", steps=None, shards=2, count=20)
    draw(plan, evaluation)
    counts = []
    for shard in range(2):
        with np.load(evaluation.sample_file(shard), allow_pickle=False) as file:
            counts += file["nfe"].tolist()
            assert json.loads(str(file["haste"]))["nfe"] == pytest.approx(np.mean(counts[10 * shard :]))
    found = drawn.mean_nfe([evaluation.sample_file(shard) for shard in range(2)])
    assert found == pytest.approx(np.mean(counts)) and found > 7
    Path(evaluation.sample_file(1)).unlink()
    assert drawn.mean_nfe([evaluation.sample_file(shard) for shard in range(2)]) is None
