"""Scores are those of the right rows: both sides in their places, every block read, the training images alone."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from haste.cli import main as cli
from haste.files import artefact, npz
from haste.files.store import Store, join, shard_range, write_shard
from haste.metrics import inception_score
from haste.metrics.detector import Detector
from haste.metrics.detectors import open_detector
from haste.metrics.scores import METRICS
from haste.score import workflow as score
from haste.score.features import reference_of_file, reference_shard
from haste.score.views import view_of

CLASSES = 3


@pytest.fixture(params=[3, 4096], ids=["blocks-of-3", "one-block"])
def read(request, monkeypatch):
    """Rows that are read at once."""
    monkeypatch.setattr(score, "READ", request.param)


def features(folder, pool, logits, labels, detector="d" * 64):
    """A features store of the rows given."""
    fields = {"pool": ((pool.shape[1],), "float32"), "logits": ((CLASSES,), "float32"), "label": ((), "int64")}
    common = {"kind": "features", "key": "k", "recipe": {}, "shards": 1, "provenance": {}}
    rows = {"pool": pool, "logits": logits, "label": labels}
    facts = {"detector": detector}
    write_shard(folder, shard=0, total=len(pool), fields=fields, batches=[rows], facts=facts, **common)
    join(folder, splits={}, **common)
    return Store.open(folder)


def drawn(seed, count, centre, spread):
    """Features (count, 2), logits and labels; features drift with the row, so that no block stands for all."""
    rng = np.random.default_rng(seed)
    pool = np.asarray(centre) + spread * rng.standard_normal((count, 2)) + 0.05 * np.arange(count)[:, None]
    return (
        pool.astype(np.float32),
        rng.standard_normal((count, CLASSES)).astype(np.float32),
        rng.integers(0, CLASSES, count),
    )


# ---- the metrics by hand


def frechet_of_planes(a, b):
    """For width 2, where the trace of a matrix's root is closed: (tr M + 2 sqrt(det M))^(1/2), M = S S'."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    s, r = np.cov(a.T), np.cov(b.T)
    root = math.sqrt(np.trace(s @ r) + 2 * math.sqrt(np.linalg.det(s) * np.linalg.det(r)))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(r) - 2 * root)


def share_inside(points, centres, k=3):
    """Share of the points within some centre's distance to its k-th nearest other centre, one pair at a time."""
    points, centres = points.astype(np.float64).tolist(), centres.astype(np.float64).tolist()
    balls = [sorted(math.dist(c, o) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
    inside = [any(math.dist(p, c) <= r for c, r in zip(centres, balls, strict=True)) for p in points]
    return sum(inside) / len(points)


def accuracy(logits, labels):
    return float(np.mean([list(row).index(max(row)) == label for row, label in zip(logits, labels, strict=True)]))


def kernel_distance(a, b):
    """KID over all pairs (k(x, y) = (x.y / D + 1)^3, a point never with itself), one pair at a time."""
    a, b = a.astype(np.float64).tolist(), b.astype(np.float64).tolist()

    def kernel(x, y):
        return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(points):
        return np.mean([kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

    return float(within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def by_hand(fake, real):
    """Every score of two sides, each (pool, logits, labels)."""
    return {
        "fd": pytest.approx(frechet_of_planes(fake[0], real[0]), rel=1e-9),
        "precision": share_inside(fake[0], real[0]),
        "recall": share_inside(real[0], fake[0]),
        "kid": pytest.approx(kernel_distance(fake[0], real[0]), rel=1e-9),
        "class_accuracy": accuracy(fake[1], fake[2]),
    }


def test_a_score_is_that_of_all_samples_against_all_real_images(read, tmp_path):
    # Samples wider than the real ones: few hit, most of the real ones are covered.
    fake, real = drawn(0, 23, (0.0, 0.0), 3.0), drawn(1, 31, (0.3, 0.0), 1.0)
    expected = by_hand(fake, real)
    assert expected["precision"] < expected["recall"] - 0.2
    assert expected["class_accuracy"] != accuracy(*real[1:])
    found = score.score(
        features(tmp_path / "fake", *fake),
        features(tmp_path / "real", *real),
        detector="plane",
        about={"nfe": 5},
        key="abc",
        path=tmp_path / "score.json",
    )
    assert found["scores"] == expected
    assert (found["samples"], found["reference"]["images"], found["nfe"]) == (23, 31, 5)
    assert json.loads((tmp_path / "score.json").read_text()) == found
    rng = np.random.default_rng(0)
    draws = [frechet_of_planes(fake[0][rng.integers(0, 23, 23)], real[0]) for _ in range(2000)]
    assert found["errors"]["fd"] == pytest.approx(np.std(draws), rel=0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_never_written(tmp_path, monkeypatch, value):
    sides = [features(tmp_path / name, *drawn(seed, 23, (0.0, 0.0), 3.0)) for seed, name in enumerate(("fake", "real"))]
    kid = replace(METRICS["kid"], value=lambda stats, real: {"kid": value})
    monkeypatch.setattr(score, "METRICS", {**METRICS, "kid": kid})
    with pytest.raises(FloatingPointError, match=f"kid is {value}, expected a finite number: nothing is scored"):
        score.score(*sides, detector="plane", about={}, key="abc", path=tmp_path / "score.json")
    assert not (tmp_path / "score.json").exists()


def test_the_floor_compares_the_even_rows_with_the_odd_rows(read, tmp_path):
    pool, logits, labels = drawn(2, 27, (0.0, 0.0), 1.0)
    # The even rows lie wider and elsewhere, so that no other halves give these numbers.
    pool[::2] = 2.5 * pool[::2] + 0.5
    real = (pool, logits, labels)
    expected = by_hand([side[::2] for side in real], [side[1::2] for side in real])
    assert expected["precision"] != expected["recall"]
    found = score.floor(
        features(tmp_path / "real", *real),
        detector="plane",
        held_out_accuracy=0.875,
        key="abc",
        path=tmp_path / "floor.json",
    )
    assert found["scores"] == {**expected, "class_accuracy": 0.875}
    assert (found["samples"], found["reference"]["images"], found["floor"]) == (14, 13, True)
    assert json.loads((tmp_path / "floor.json").read_text()) == found


def test_statistics_are_of_the_rows_asked_for_alone(read, tmp_path):
    fake, real = drawn(3, 20, (0.0, 0.0), 2.0), drawn(4, 21, (0.0, 1.0), 1.0)
    mine, theirs = features(tmp_path / "fake", *fake), features(tmp_path / "real", *real)
    rows = np.array([19, 2, 3, 11, 7, 5, 13])
    found = score.values(score.statistics(mine, rows), score.statistics(theirs, rows + 1))
    assert found == by_hand([side[rows] for side in fake], [side[rows + 1] for side in real])


def test_a_large_reference_is_measured_whole_by_moments_and_thinned_evenly_by_neighbours(monkeypatch, tmp_path):
    for name in ("precision_recall", "kid"):
        monkeypatch.setitem(score.METRICS, name, replace(score.METRICS[name], reference_rows=8))
    fake, real = drawn(3, 20, (0.0, 0.0), 2.0), drawn(4, 21, (0.0, 1.0), 1.0)
    mine, theirs = features(tmp_path / "fake", *fake), features(tmp_path / "real", *real)
    thinned = real[0][[0, 2, 5, 7, 10, 13, 15, 18]]
    found = score.values(score.statistics(mine), score.reference_statistics(theirs))
    assert found["fd"] == pytest.approx(frechet_of_planes(fake[0], real[0]), rel=1e-9)
    assert (found["precision"], found["recall"]) == (share_inside(fake[0], thinned), share_inside(thinned, fake[0]))
    assert found["kid"] == pytest.approx(kernel_distance(fake[0], thinned), rel=1e-9)


def test_inception_score_is_of_splits_in_the_samples_order_however_they_are_stored_and_read(monkeypatch, tmp_path):
    monkeypatch.setattr(inception_score, "SPLIT", 8)
    logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32) + 3 * np.eye(5)[np.arange(20) // 4]

    def found(shards, read, rows=None):
        monkeypatch.setattr(score, "READ", read)
        folder = tmp_path / f"{shards}-{read}"
        common = {"kind": "features", "key": "k", "recipe": {}, "shards": shards, "provenance": {}}
        fields = {"logits_unbiased": ((5,), "float32"), "label": ((), "int64")}
        for shard in range(shards):
            mine = list(shard_range(20, shard, shards))
            batch = {"logits_unbiased": logits[mine].astype(np.float32), "label": np.zeros(len(mine), np.int64)}
            write_shard(folder, shard=shard, total=20, fields=fields, batches=[batch], **common)
        join(folder, splits={}, **common)
        return score.values(score.statistics(Store.open(folder), rows), {})

    def split_score(rows):
        p = np.exp(logits[rows].astype(np.float32).astype(np.float64))
        p /= p.sum(1, keepdims=True)
        return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())

    splits = [split_score(slice(low, low + 8)) for low in (0, 8, 16)]
    for shards, read in ((1, 4096), (3, 3), (5, 7)):
        assert found(shards, read) == {
            "is": pytest.approx(np.mean(splits), rel=1e-9),
            "is_std": pytest.approx(np.std(splits), rel=1e-9),
        }
    backwards = np.arange(20)[::-1].copy()
    again = [split_score(backwards[low : low + 8]) for low in (0, 8, 16)]
    assert found(2, 3, backwards)["is"] == pytest.approx(np.mean(again), rel=1e-9) != np.mean(splits)


def test_sides_that_different_detectors_saw_are_refused(tmp_path):
    fake = features(tmp_path / "fake", *drawn(5, 8, (0.0, 0.0), 1.0), detector="a" * 64)
    real = features(tmp_path / "real", *drawn(6, 8, (0.0, 0.0), 1.0), detector="b" * 64)
    with pytest.raises(ValueError, match=r"by detector a{12}, but those of the reference .* by b{12}"):
        score.score(fake, real, detector="plane", about={}, key="abc", path=tmp_path / "score.json")
    assert not (tmp_path / "score.json").exists()


# ---- the reference: the training images and no others


class Means(nn.Module):
    """Width 3: an image's mean of each channel; logits: its first three red pixels."""

    def forward(self, images):
        return {"pool": images.float().mean((1, 2)), "logits": images[:, 0, :CLASSES, 0].float()}


def test_the_reference_is_the_detectors_view_of_each_training_image_and_of_no_other(tmp_path):
    rng = np.random.default_rng(7)
    pictures, labels = rng.integers(0, 256, (13, 4, 4, 3), np.uint8), rng.integers(0, CLASSES, 13)
    common = {"kind": "images", "key": "i", "recipe": {}, "shards": 1, "provenance": {}}
    fields = {"image": ((4, 4, 3), "uint8"), "label": ((), "int64")}
    rows = {"image": pictures, "label": labels}
    write_shard(tmp_path / "images", shard=0, total=13, fields=fields, batches=[rows], **common)
    # Held-out images before and behind, so that rows are not numbers of images.
    join(tmp_path / "images", splits={"held_out": [0, 2], "train": [2, 10], "spare": [10, 13]}, **common)
    detector = Detector(
        Means(),
        kind="means",
        weights="m" * 64,
        outputs={"pool": 3, "logits": CLASSES},
        preprocessing="none",
        resolution=4,
    )
    images, folder = Store.open(tmp_path / "images"), tmp_path / "reference"
    reference_shard(images, detector, folder=folder, key="r", recipe={}, batch=3)
    join(folder, kind="features", key="r", recipe={}, shards=1, splits={}, provenance={})
    store = Store.open(folder)
    assert store.count == 8
    assert store.manifest["detector"] == detector.identity
    assert view_of(store).detector == {**detector.about, "name": "means"}  # so that `haste score` takes it too
    train = pictures[2:10].astype(np.float64)
    np.testing.assert_allclose(store.read("pool", range(8)), train.mean((1, 2)), rtol=1e-6)
    assert (store.read("logits", range(8)) == train[:, 0, :CLASSES, 0]).all()
    assert (store.read("label", range(8)) == labels[2:10]).all()


def test_the_reference_of_a_configuration_leaves_its_held_out_images_out(make_plan):
    plan = make_plan()
    images, store = Store.open(plan.images.folder), Store.open(plan.reference.folder)
    assert images.count == 1797  # scikit-learn's digits, of which the configuration holds 97 out
    assert store.count == 1700
    detector = open_detector(plan.detector.part.folder)
    rows = [0, 1, 255, 256, 850, 1699]  # on both sides of a batch's end
    chosen = [images.range("train")[row] for row in rows]
    seen = detector(torch.from_numpy(images.read("image", chosen)))
    np.testing.assert_allclose(store.read("pool", rows), seen["pool"].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(store.read("logits", rows), seen["logits"].numpy(), rtol=1e-4, atol=1e-5)
    assert (store.read("label", rows) == images.read("label", chosen)).all()
    assert not set(images.range("held_out")) & set(chosen)


# ---- a reference file: its own statistics, and its images


class Outputs(nn.Module):
    """What looks like Inception: widths 2 and 3, of the image's means."""

    def forward(self, images):
        means = images.float().mean((1, 2)) / 50
        return {"pool": means[:, :2], "spatial": means * means, "logits_unbiased": means}


def adm_file(path, pictures, **changes):
    rng = np.random.default_rng(8)
    arrays = {"arr_0": pictures}
    for suffix, width in (("", 2), ("_s", 3)):
        rows = rng.normal(size=(40, width))
        arrays |= {f"mu{suffix}": rows.mean(0), f"sigma{suffix}": np.cov(rows.T)}
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(path, **arrays)
    return arrays


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """A function from a reference file to the score of 20 pictures against it."""
    monkeypatch.setattr(npz, "WIDTHS", {"pool": 2, "spatial": 3})
    outputs = {"pool": 2, "spatial": 3, "logits_unbiased": 3}
    detector = Detector(Outputs(), kind="inception", weights="w", outputs=outputs, preprocessing="none")
    fake = np.random.default_rng(9).integers(0, 256, (20, 4, 4, 3), np.uint8)
    seen = {name: value.numpy() for name, value in detector(torch.from_numpy(fake)).items()}

    def judge(path):
        folder = tmp_path / f"seen-{path.stem}"
        reference_of_file(path, detector, folder=folder, key="r", recipe={}, batch=5)
        common = {"kind": "features", "recipe": {}, "shards": 1, "provenance": {}}
        join(folder, key="r", splits={}, **common)
        fields = {**{name: ((width,), "float32") for name, width in outputs.items()}, "label": ((), "int64")}
        rows = {**seen, "label": np.zeros(20, np.int64)}
        facts = {"detector": detector.identity}
        write_shard(tmp_path / "fake", key="f", shard=0, total=20, fields=fields, batches=[rows], facts=facts, **common)
        join(tmp_path / "fake", key="f", splits={}, **common)
        mine, real = Store.open(tmp_path / "fake"), Store.open(folder)
        made = score.score(mine, real, detector="inception", about={}, key="k", path=tmp_path / "score.json")
        images = np.load(path).get("arr_0", fake)
        return made, seen, {n: v.numpy() for n, v in detector(torch.from_numpy(images)).items()}, real

    return judge


def test_a_reference_file_gives_its_own_moments_for_fid_and_sfid_and_its_images_for_the_rest(judged, tmp_path):
    pictures = np.random.default_rng(10).integers(0, 256, (13, 4, 4, 3), np.uint8)
    held = adm_file(tmp_path / "adm.npz", pictures)
    found, fake, real, _ = judged(tmp_path / "adm.npz")

    def distance(features, mu, sigma):
        s, gap = np.cov(features.astype(np.float64).T), features.astype(np.float64).mean(0) - mu
        return gap @ gap + np.trace(s + sigma) - 2 * np.sqrt(np.linalg.eigvals(s @ sigma).real.clip(0)).sum()

    assert found["scores"]["fd"] == pytest.approx(distance(fake["pool"], held["mu"], held["sigma"]), rel=1e-6)
    assert found["scores"]["sfid"] == pytest.approx(distance(fake["spatial"], held["mu_s"], held["sigma_s"]), rel=1e-6)
    assert found["scores"]["precision"] == share_inside(fake["pool"], real["pool"])
    assert found["scores"]["recall"] == share_inside(real["pool"], fake["pool"])
    assert found["scores"]["kid"] == pytest.approx(kernel_distance(fake["pool"], real["pool"]), rel=1e-9)
    about = {"images": 13, "file": "adm.npz", "sha256": artefact.file_identity(tmp_path / "adm.npz")}
    assert about.items() <= found["reference"].items()
    said = "FID and sFID against the statistics in adm.npz, precision, recall and KID against its 13 images"
    assert said in found["notes"]


@pytest.mark.parametrize("spatial", [True, False])
def test_a_reference_without_images_gives_inception_what_needs_none_and_says_what_it_left_out(
    judged, tmp_path, spatial
):
    less = {} if spatial else {"mu_s": None, "sigma_s": None}
    pictures = np.random.default_rng(10).integers(0, 256, (13, 4, 4, 3), np.uint8)
    adm_file(tmp_path / "adm.npz", pictures)
    adm_file(tmp_path / "mar.npz", pictures, arr_0=None, **less)
    whole, found = (judged(tmp_path / name)[0] for name in ("adm.npz", "mar.npz"))
    same = {"fd", *(["sfid"] if spatial else []), *(name for name in whole["scores"] if name.startswith("is"))}
    assert found["scores"] == {name: whole["scores"][name] for name in same} and found["errors"] == whole["errors"]
    assert found["reference"]["images"] is None and found["reference"]["file"] == "mar.npz"
    fid = "FID and sFID" if spatial else "FID"
    assert f"{fid} against the statistics in mar.npz, of images that the file does not name" in found["notes"]
    assert "precision, recall, KID: left out, because the reference mar.npz holds no images" in found["notes"]
    assert spatial != ("sFID: left out, because the reference mar.npz holds no mu_s and sigma_s" in found["notes"])
    unknown = "nothing in mar.npz says how its mu and sigma were made; they are taken to be by this detector"
    assert spatial != (unknown in found["notes"])


def test_statistics_of_pytorch_fid_alone_give_the_workflow_its_fid_and_nothing_that_needs_images(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "WIDTHS", {"pool": 3, "spatial": 3})
    kind = {"kind": "pytorch-fid", "weights": "w", "outputs": {"pool": 3}, "preprocessing": "none"}
    detector, rng = Detector(Means(), **kind), np.random.default_rng(12)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(20, 3)).astype(np.float32)
    np.savez(tmp_path / "stats.npz", mu=real.mean(0), sigma=np.cov(real.T))
    common = {"kind": "features", "key": "r", "recipe": {}, "shards": 1, "provenance": {}}
    reference_of_file(tmp_path / "stats.npz", detector, folder=tmp_path / "seen", key="r", recipe={})
    join(tmp_path / "seen", splits={}, **common)
    fields, facts = {"pool": ((3,), "float32"), "label": ((), "int64")}, {"detector": detector.identity}
    rows = {"pool": fake, "label": np.zeros(20, np.int64)}
    write_shard(tmp_path / "fake", shard=0, total=20, fields=fields, batches=[rows], facts=facts, **common)
    join(tmp_path / "fake", splits={}, **common)
    stores = [Store.open(tmp_path / name) for name in ("fake", "seen")]
    made = score.score(*stores, detector="coco", about={}, key="k", path=tmp_path / "score.json")
    gap, product = fake.astype(np.float64).mean(0) - real.mean(0), np.cov(fake.astype(np.float64).T) @ np.cov(real.T)
    spread = np.trace(np.cov(fake.astype(np.float64).T) + np.cov(real.T))
    expected = gap @ gap + spread - 2 * np.sqrt(np.linalg.eigvals(product).real).sum()
    assert made["scores"] == {"fd": pytest.approx(expected)} and made["reference"]["images"] is None
    assert "FID against the statistics in stats.npz, of images that the file does not name" in made["notes"]
    floor = score.floor(stores[1], detector="coco", held_out_accuracy=None, key="k", path=tmp_path / "floor.json")
    assert floor["scores"] == {}  # no image against another
    adm_file(tmp_path / "adm.npz", np.zeros((2, 4, 4, 3), np.uint8), mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="expected pytorch-fid's mu and sigma alone, found arr_0"):
        reference_of_file(tmp_path / "adm.npz", detector, folder=tmp_path / "no", key="r", recipe={})


def test_samples_may_be_compared_with_the_held_out_images(make_plan):
    spec = {"trained": {"steps": 2, "batch": 8, "width": 8}}
    plan = make_plan(detector={"cnn": spec, "val": {**spec, "split": "held_out"}})
    train, val = plan.detectors.values()
    assert train.reference.folder != val.reference.folder and train.part.folder == val.part.folder
    assert cli.main(["reference", "-c", str(plan.file)]) == 0
    images, store = Store.open(plan.images.folder), Store.open(val.reference.folder)
    assert store.count == 97
    assert (store.read("label", range(97)) == images.read("label", images.range("held_out"))).all()


def test_weights_that_are_known_not_to_be_the_published_ones_are_said(tmp_path):
    fake, real = (features(tmp_path / name, *drawn(11, 9, (0.0, 0.0), 1.0)) for name in ("fake", "real"))
    said = {}
    for published in (True, False, None):
        fake.manifest["about"] = {"name": "inception", "published": published}
        made = score.score(fake, real, detector="i", about={}, key="k", path=tmp_path / "score.json")
        said[published] = [note for note in made["notes"] if "not the weights" in note]
    assert said == {
        True: [],
        None: [],
        False: ["inception: these are not the weights that published scores were made with"],
    }


def test_a_reference_file_without_spatial_statistics_gives_no_sfid_and_one_without_others_is_refused(judged, tmp_path):
    pictures = np.random.default_rng(10).integers(0, 256, (13, 4, 4, 3), np.uint8)
    adm_file(tmp_path / "part.npz", pictures, mu_s=None, sigma_s=None)
    found, *_, real = judged(tmp_path / "part.npz")
    assert "fd" in found["scores"] and "sfid" not in found["scores"]
    (real.folder / score.MOMENTS).write_bytes(b"others")
    with pytest.raises(ValueError, match=r"moments\.npz: missing, or not what was stored"):
        score.real_statistics(real)
    adm_file(tmp_path / "bare.npz", pictures, mu=None)
    with pytest.raises(ValueError, match=r"bare\.npz: expected mu and sigma, .* found arr_0"):
        judged(tmp_path / "bare.npz")
