"""Images from anywhere are scored as their features by hand say, whatever they are packed in."""

import json
import shutil
import time
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from haste.files.store import join, write_shard
from haste.metrics import inception_score, kid
from haste.metrics.frechet import update
from haste.metrics.uncertainty import frechet_error
from haste.networks.devices import devices_named
from haste.sampling.samples import open_samples
from haste.score import sides, views
from haste.score.columns import OF_SAMPLES, OVER_SPLITS, OVER_SUBSETS
from haste.score.images import Scorer, score_images

ALL = ["FID", "sFID", "IS", "precision", "recall", "KID"]


def seen(detector, images):
    """Features in float64, by name."""
    return {name: value.numpy().astype(np.float64) for name, value in detector(torch.from_numpy(images)).items()}


def frechet(a, b):
    """By scipy's general square root, from means and covariances."""
    (m, s), (n, r) = a, b
    root = scipy.linalg.sqrtm(s @ r).real
    return float(((m - n) ** 2).sum() + np.trace(s + r - 2 * root))


def moments(features):
    return features.mean(0), np.cov(features.T)


def inside(points, centres, k=3):
    """Share of points in a ball around some centre, pair by pair."""
    balls = [
        sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
    ]
    return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, balls, strict=True)) for p in points])


def inception_score_of(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def discrepancy(x, y):
    """The unbiased estimator with the cubic kernel."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    own = (kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1))
    other = (kernel(y, y).sum() - np.trace(kernel(y, y))) / (m * (m - 1))
    return own + other - 2 * kernel(x, y).mean()


def by_hand(fake, real):
    return {
        "FID": frechet(moments(fake["pool"]), moments(real["pool"])),
        "sFID": frechet(moments(fake["spatial"]), moments(real["spatial"])),
        "IS": inception_score_of(fake["logits_unbiased"]),
        "precision": inside(fake["pool"], real["pool"]),
        "recall": inside(real["pool"], fake["pool"]),
        "KID": discrepancy(real["pool"], fake["pool"]),
    }


@pytest.fixture
def sets(draw):
    return draw(0, 40), draw(1, 31, high=230)


def test_scores_are_those_of_the_features_by_hand(detector, sets, pack):
    fake, real = sets
    found = score_images(pack("fake", fake), pack("real", real), detectors=[detector])
    expected = by_hand(seen(detector, fake), seen(detector, real))
    assert list(found.columns) == ALL
    assert found.values == pytest.approx(expected, rel=1e-6)
    assert expected["recall"] > 0 and expected["precision"] < 1
    assert found["FID"] == found.values["FID"]


def test_a_reference_of_statistics_is_read_as_it_stands_and_its_images_give_precision_and_recall(detector, sets, pack):
    fake, real = sets
    others = np.random.default_rng(5).normal(size=(90, 9))
    mu, sigma = others[:, :5].mean(0), np.cov(others[:, :5].T)
    mu_s, sigma_s = others[:, 5:].mean(0), np.cov(others[:, 5:].T)
    reference = pack("reference", real, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = score_images(pack("fake", fake), reference, detectors=[detector])
    mine = seen(detector, fake)
    expected = by_hand(mine, seen(detector, real))
    expected["FID"] = frechet(moments(mine["pool"]), (mu, sigma))
    expected["sFID"] = frechet(moments(mine["spatial"]), (mu_s, sigma_s))
    assert found.values == pytest.approx(expected, rel=1e-6)


def packings(images, folder):
    """The same images in every form."""
    folder.mkdir()
    np.savez_compressed(folder / "compressed.npz", arr_0=images)
    (folder / "shards").mkdir()
    for shard, rows in enumerate(np.split(images, [7, 7, 20])):
        np.savez(folder / "shards" / f"shard-{shard:05d}-of-00004.npz", arr_0=rows)
    (folder / "pictures").mkdir()
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / "pictures" / f"{i:03d}.png")
            archive.write(folder / "pictures" / f"{i:03d}.png", f"{i:03d}.png")
    common = {"kind": "images", "key": "i", "recipe": {}, "shards": 2, "provenance": {}}
    for shard, rows in enumerate((range(0, len(images) // 2), range(len(images) // 2, len(images)))):
        fields = {"image": (images.shape[1:], "uint8"), "label": ((), "int64")}
        batch = {"image": images[rows], "label": np.arange(len(rows))}
        write_shard(folder / "store", shard=shard, total=len(images), fields=fields, batches=[batch], **common)
    join(folder / "store", splits={}, **common)
    return sorted(folder.iterdir())


def test_packing_batch_size_and_shards_never_change_a_score(detector, sets, pack, tmp_path, monkeypatch):
    fake, real = sets
    whole = score_images(pack("fake", fake), pack("real", real), detectors=[detector])
    assert len(packings(fake, tmp_path / "fakes")) == 5
    for side, other in zip(packings(fake, tmp_path / "a"), packings(real, tmp_path / "b"), strict=True):
        for batch in (1, 7, 100):
            monkeypatch.setattr(sides, "READ", batch)
            found = score_images(side, other, detectors=[detector], batch=batch)
            assert found.values == pytest.approx(whole.values, rel=1e-9), (side, batch)
            assert found.samples["identity"] == whole.samples["identity"]


def odd(folder, images):
    """Images as people have them, of one size, in files, and what a page shows of them by hand, (N, H, W, 3)."""
    folder.mkdir()
    shown = images.copy()
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        if i % 4 == 1:  # half of it is half transparent
            alpha = np.full(image.shape[:2], 255, np.uint8)
            alpha[:4] = 102  # two fifths
            picture.putalpha(Image.fromarray(alpha))
            shown[i, :4] = np.rint(image[:4] * 0.4 + 255 * 0.6)
        elif i % 4 == 2:
            picture = picture.convert("L")
            shown[i] = np.asarray(picture)[..., None]
        elif i % 4 == 3:  # on its side, as a camera was held
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(folder / f"{i:02d}.png", exif=exif)
            shown[i] = np.rot90(image, -1)
            continue
        picture.save(folder / f"{i:02d}.png")
    return shown


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_pictures_that_are_converted_score_as_those_that_were_made_rgb_by_hand(detector, sets, pack, tmp_path, packed):
    fake, real = (images[:24] for images in sets)
    shown = {name: odd(tmp_path / name, images) for name, images in (("fake", fake), ("real", real))}
    if packed:
        shutil.make_archive(str(tmp_path / "fake"), "zip", tmp_path / "fake")
    samples = tmp_path / ("fake.zip" if packed else "fake")
    found = score_images(samples, tmp_path / "real", detectors=[detector], convert=True, features=tmp_path / "kept")
    read = np.concatenate([*open_samples(samples, convert=True).batches(5)])
    assert np.abs(read.astype(int) - shown["fake"]).max() <= 1  # Pillow's rounding of what is half transparent
    plain = score_images(
        pack("fake", read),
        pack("real", np.concatenate([*open_samples(tmp_path / "real", convert=True).batches(5)])),
        detectors=[detector],
    )
    assert found.values == plain.values
    for side in ("samples", "reference"):
        assert found.json()[side]["converted"] == 18 and "converted" not in plain.json()[side]
    assert sum("18 images of" in note and "transparency on white" in note for note in found.notes) == 2


def test_features_of_converted_pictures_are_never_taken_for_those_of_the_files_as_they_are(
    sets, tmp_path, make_detector
):
    """A PNG may be RGB and name a colour that is transparent: both readings are possible."""
    (tmp_path / "fake").mkdir()
    for i, image in enumerate(sets[0][:8]):
        Image.fromarray(image).save(tmp_path / "fake" / f"{i}.png", transparency=tuple(map(int, image[0, 0])))
    real, options = tmp_path / "real.npz", {"features": tmp_path / "kept", "detectors": [make_detector()]}
    np.savez(real, arr_0=sets[1][:8])
    first, second = (score_images(tmp_path / "fake", real, convert=how, **options) for how in (False, True))
    assert first.samples["identity"] != second.samples["identity"] and first["KID"] != second["KID"]


def test_another_order_changes_no_score_but_those_that_are_taken_over_splits(detector, sets, pack, monkeypatch):
    fake, real = sets
    whole = score_images(pack("fake", fake), pack("real", real), detectors=[detector])
    turned = score_images(pack("turned", fake[::-1]), pack("back", real[::-1]), detectors=[detector])
    assert turned.values == pytest.approx(whole.values, rel=1e-9)  # one split, and all pairs
    monkeypatch.setattr(inception_score, "SPLIT", 10)
    split = score_images(pack("fake", fake), pack("real", real), detectors=[detector])
    assert split["IS"] != pytest.approx(whole["IS"], rel=1e-3) and split.columns["IS"].error > 0


def test_features_that_are_kept_are_found_again_and_nothing_is_looked_at_twice(sets, pack, tmp_path, make_detector):
    fake, real = sets
    looked = []

    def counting(**options):
        detector = make_detector(**options)
        detector.network.register_forward_pre_hook(lambda module, given: looked.append(len(given[0])))
        return detector

    paths, folder = (pack("fake", fake), pack("real", real)), tmp_path / "features"
    first = score_images(*paths, detectors=[counting()], features=folder, batch=16)
    assert sum(looked) == 71
    again = score_images(*paths, detectors=[counting()], features=folder, batch=5)
    assert sum(looked) == 71 and again.values == pytest.approx(first.values, rel=1e-12)
    assert again.samples == first.samples
    # The same pixels in other files are known by their content.
    np.savez_compressed(tmp_path / "copy.npz", arr_0=fake)
    assert score_images(tmp_path / "copy.npz", paths[1], detectors=[counting()], features=folder).values == first.values
    assert sum(looked) == 71
    # Another detector, or one other pixel, is looked at.
    other = score_images(*paths, detectors=[counting(seed=1)], features=folder)
    assert sum(looked) == 142 and other["FID"] != pytest.approx(first["FID"], rel=1e-3)
    fake[3, 2, 1, 0] ^= 1
    score_images(pack("fake", fake), paths[1], detectors=[counting()], features=folder)
    assert sum(looked) == 182


def test_several_devices_share_the_images_and_features_and_scores_are_those_of_one_to_the_bit(
    sets, pack, make_detector
):
    paths, looked = (pack("fake", sets[0]), pack("real", sets[1])), [0, 0, 0]
    several = make_detector().spread(["cpu"] * 3)
    for device, one in enumerate([several, *several.copies]):

        def see(module, given, device=device):
            time.sleep(0.02 * (device == 0))  # the first is the slowest
            looked[device] += len(given[0])

        one.network.register_forward_pre_hook(see)
    alone, shared = (views.extract_features(open_samples(paths[0]), d, batch=4) for d in (make_detector(), several))
    for whole, part in zip(alone.batches(), shared.batches(), strict=True):
        assert all(np.array_equal(part[name], value) for name, value in whole.items())
    assert sum(looked) == 40 and min(looked) >= 12
    assert shared.facts() == alone.facts()
    expected = score_images(*paths, detectors=[make_detector()], batch=4)
    assert score_images(*paths, detectors=[several], batch=4).values == expected.values


def test_a_feature_that_is_not_finite_is_named_by_its_image_whichever_device_found_it(sets, pack, make_detector):
    several = make_detector().spread(["cpu"] * 2)
    several.copies[0].network.register_forward_hook(lambda module, given, found: {**found, "pool": found["pool"] / 0})
    with pytest.raises(ValueError, match="image 4: its pool"):
        score_images(pack("fake", sets[0]), None, detectors=[several], metrics=["is"], batch=4)


@pytest.mark.parametrize(("gpus", "found"), [(0, ["cpu"]), (2, ["cuda:0", "cuda:1"])])
def test_all_devices_are_every_gpu_or_the_cpu_where_there_is_none(monkeypatch, gpus, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices_named("all") == found


def test_an_interrupted_pass_goes_on_from_its_last_whole_shard(sets, pack, tmp_path, monkeypatch, make_detector):
    monkeypatch.setattr(views, "SHARD", 10)
    detector, seen_rows = make_detector(), []

    def falter(module, given):
        seen_rows.append(len(given[0]))
        if sum(seen_rows) == 31 + 28:  # the reference comes first
            raise KeyboardInterrupt

    hook = detector.network.register_forward_pre_hook(falter)
    paths = pack("fake", sets[0]), pack("real", sets[1])
    with pytest.raises(KeyboardInterrupt):
        score_images(*paths, detectors=[detector], features=tmp_path / "kept", batch=4)
    hook.remove()
    seen_rows.clear()
    detector.network.register_forward_pre_hook(lambda module, given: seen_rows.append(len(given[0])))
    found = score_images(*paths, detectors=[detector], features=tmp_path / "kept", batch=4)
    assert sum(seen_rows) == 20  # the reference and the first two of four shards are whole
    plain = score_images(*paths, detectors=[detector])
    assert found.values == pytest.approx(plain.values, rel=1e-9)
    assert found.samples == plain.samples


def test_stored_features_are_scored_without_a_detector(detector, sets, pack, tmp_path):
    fake, real = pack("fake", sets[0]), pack("real", sets[1])
    direct = score_images(fake, real, detectors=[detector], features=tmp_path / "kept")
    stored = {path.name.split("-")[0]: path for path in (tmp_path / "kept").iterdir()}
    found = score_images(stored["fake"], stored["real"])
    assert found.values == direct.values
    assert found.detectors == [detector.about]


def test_statistics_that_are_saved_stand_for_the_reference(detector, sets, pack, tmp_path):
    fake, real = pack("fake", sets[0]), pack("real", sets[1])
    scorer = Scorer(real, detectors=[detector])
    direct = scorer(fake)
    scorer.save_reference(tmp_path / "statistics.npz")
    found = score_images(fake, tmp_path / "statistics.npz", detectors=[detector])
    assert found.values == pytest.approx(direct.values, rel=1e-9)
    assert found.reference["images"] == 31 and found.reference["source"]["identity"] == direct.reference["identity"]
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as file:  # as others' tools read it
        mean, covariance = moments(seen(detector, sets[1])["pool"])
        np.testing.assert_allclose(file["mu"], mean, rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], covariance, rtol=1e-5, atol=1e-8)


def test_only_statistics_that_stand_for_one_view_of_a_reference_are_saved(sets, pack, tmp_path, make_detector):
    fake, real = pack("fake", sets[0]), pack("real", sets[1])
    path, other = tmp_path / "statistics.npz", make_detector(kind="DINOv2-L", widths={"pool": 7})
    few = Scorer(real, detectors=[make_detector()], metrics=["kid"])
    with pytest.raises(ValueError, match="one detector, found none"):
        few.save_reference(path)
    few(fake)
    with pytest.raises(ValueError, match="need the Frechet distance among the metrics"):
        few.save_reference(path)
    both = Scorer(real, detectors=[make_detector(), other])
    both(fake)
    with pytest.raises(ValueError, match="one detector, found inception, DINOv2-L"):
        both.save_reference(path)
    assert not path.exists()


def test_features_that_the_workflow_stored_are_scored_under_the_detector_that_is_named(
    sets, pack, tmp_path, make_detector
):
    detector = make_detector(kind="cnn", widths={"pool": 5, "logits": 3})
    stores = []
    for name, images in zip(("fake", "real"), sets, strict=True):
        common = {"kind": "features", "key": "k", "recipe": {}, "shards": 1, "provenance": {}}
        fields = {name: ((width,), "float32") for name, width in detector.outputs.items()} | {"label": ((), "int64")}
        batch = {name: value.numpy() for name, value in detector(torch.from_numpy(images)).items()}
        batch["label"] = np.zeros(len(images), np.int64)
        facts = {"detector": detector.identity}
        write_shard(tmp_path / name, shard=0, total=len(images), fields=fields, batches=[batch], facts=facts, **common)
        join(tmp_path / name, splits={}, **common)
        stores.append(tmp_path / name)
    direct = score_images(pack("fake", sets[0]), pack("real", sets[1]), detectors=[detector])
    named = score_images(*stores, detectors=[detector])
    assert named.values == direct.values and "FD (cnn)" in named.columns
    assert f"FD (detector {detector.identity[:8]})" in score_images(*stores).columns
    assert score_images(stores[0], pack("real", sets[1]), detectors=[detector]).values == direct.values


def test_error_bars_are_of_the_kind_that_they_say(sets, pack, detector, monkeypatch):
    fake, real = sets
    found = score_images(pack("fake", fake), pack("real", real), detectors=[detector]).columns
    mine, theirs = seen(detector, fake), seen(detector, real)
    for name, output in (("FID", "pool"), ("sFID", "spatial")):
        expected = frechet_error(*(update(None, side[output]) for side in (mine, theirs)), [mine[output]])
        assert found[name].error == pytest.approx(expected, rel=1e-4) and found[name].what == OF_SAMPLES
    share = found["precision"].value
    assert 0 < share < 1 and found["precision"].error == pytest.approx((share * (1 - share) / 40) ** 0.5)
    assert found["recall"].error is None and found["IS"].error is None and found["KID"].error is None
    monkeypatch.setattr(inception_score, "SPLIT", 10)
    monkeypatch.setattr(kid, "SIZE", 10)
    spread = [
        score_images(pack("fake", fake), pack("real", real), detectors=[detector], seed=seed) for seed in (1, 1, 2)
    ]
    first, again, other = (one.columns for one in spread)
    assert first["IS"].what == OVER_SPLITS and first["IS"].error > 0
    assert first["KID"].what == OVER_SUBSETS and first["KID"] == again["KID"] != other["KID"]
    assert first["IS"] == other["IS"]


def test_a_large_reference_gives_balls_around_evenly_spaced_images(detector, sets, pack, monkeypatch):
    monkeypatch.setattr("haste.score.images.NEIGHBOURS", 10)
    fake, real = sets
    found = score_images(pack("fake", fake), pack("real", real), detectors=[detector])
    mine, theirs = seen(detector, fake), seen(detector, real)
    few = theirs["pool"][np.arange(10) * 31 // 10]
    assert found["precision"] == inside(mine["pool"], few) and found["recall"] == inside(few, mine["pool"])
    assert found["FID"] == pytest.approx(frechet(moments(mine["pool"]), moments(theirs["pool"])), rel=1e-6)


def test_the_reference_is_looked_at_once_for_many_sets(sets, pack, detector):
    looked = []
    detector.network.register_forward_pre_hook(lambda module, given: looked.append(len(given[0])))
    scorer = Scorer(pack("real", sets[1]), detectors=[detector])
    for name in "abc":
        scorer(pack(name, sets[0]))
    assert sum(looked) == 31 + 3 * 40


def test_several_detectors_never_share_a_column_and_give_what_their_layers_allow(sets, pack, make_detector):
    other = make_detector(kind="DINOv2-L", seed=3, widths={"pool": 7})
    detectors = [make_detector(), other]
    found = score_images(pack("fake", sets[0]), pack("real", sets[1]), detectors=detectors)
    theirs = ["FD (DINOv2-L)", "precision (DINOv2-L)", "recall (DINOv2-L)", "KID (DINOv2-L)"]
    assert list(found.columns) == [*ALL, *theirs]
    mine = [seen(other, images)["pool"] for images in sets]
    assert found["FD (DINOv2-L)"] == pytest.approx(frechet(*map(moments, mine)), rel=1e-6)
    assert not found.absent


def test_moments_of_inception_are_never_used_for_another_detector(sets, pack, make_detector):
    fake, real = sets
    reference = pack("reference", real, mu=np.zeros(5), sigma=np.eye(5), mu_s=np.zeros(4), sigma_s=np.eye(4))
    other = make_detector(kind="DINOv2-L", seed=3, widths={"pool": 5})
    found = score_images(pack("fake", fake), reference, detectors=[other])
    expected = frechet(*(moments(seen(other, images)["pool"]) for images in sets))
    assert found["FD (DINOv2-L)"] == pytest.approx(expected, rel=1e-6)


def test_without_a_reference_there_is_the_score_that_needs_none(sets, pack, detector):
    found = score_images(pack("fake", sets[0]), None, detectors=[detector])
    assert list(found.columns) == ["IS"] and found.reference is None and found.json()["reference"] is None


def test_only_what_is_asked_for_is_taken(sets, pack, detector):
    found = score_images(pack("fake", sets[0]), pack("real", sets[1]), detectors=[detector], metrics=["recall", "fid"])
    assert list(found.columns) == ["FID", "recall"]


# ---- limits


def test_identical_sets_score_nothing_apart_and_it_is_said(sets, pack, detector):
    found = score_images(pack("fake", sets[0]), pack("real", sets[0]), detectors=[detector])
    assert found["FID"] == pytest.approx(0, abs=1e-9) and found["sFID"] == pytest.approx(0, abs=1e-9)
    assert found["precision"] == found["recall"] == 1
    assert found["KID"] < 0
    assert "samples and reference are the same images" in found.notes


def test_copies_and_black_images_are_counted_and_said(sets, pack, detector, tmp_path):
    fake = np.concatenate([sets[0], sets[0][:7], np.zeros((2, *sets[0].shape[1:]), np.uint8)])
    found = score_images(pack("fake", fake), pack("real", sets[1]), detectors=[detector], features=tmp_path / "kept")
    assert (found.samples["copies"], found.samples["black"]) == (8, 2)  # one black image is a copy of the other
    assert found.samples["brightness"] == pytest.approx(fake.mean())
    assert any("8 of 49 samples are copies" in note for note in found.notes)
    assert any("2 of 49 samples are black" in note for note in found.notes)


def test_fewer_images_than_channels_still_have_a_distance(pack, draw, make_detector):
    detector = make_detector(widths={"pool": 30, "spatial": 4, "logits_unbiased": 6})
    fake, real = draw(0, 12), draw(1, 20, high=200)
    found = score_images(pack("fake", fake), pack("real", real), detectors=[detector])
    expected = frechet(*(moments(seen(detector, images)["pool"]) for images in (fake, real)))
    assert found["FID"] == pytest.approx(expected, rel=1e-4)
    assert found.columns["FID"].error is None


def test_one_sample_has_no_distance_and_two_no_balls(pack, draw, detector):
    real = pack("real", draw(1, 20))
    one = score_images(pack("one", draw(0, 1)), real, detectors=[detector])
    assert list(one.columns) == ["IS"]
    assert "needs 2 images or more, found 1" in one.absent["FID"]
    with pytest.raises(ValueError, match="FID: a covariance needs 2 images or more, found 1"):
        score_images(pack("one", draw(0, 1)), real, detectors=[detector], metrics=["fid"])
    two = score_images(pack("two", draw(0, 2)), real, detectors=[detector])
    assert set(two.columns) == {"FID", "sFID", "IS", "KID"}
    assert "needs more than 3 images, found 2" in two.absent["recall"]


def test_features_that_are_not_finite_are_refused_with_the_images_number(pack, draw, make_detector):
    detector = make_detector()

    def spoil(module, given, found):
        if len(given[0]) == 20:
            found["pool"][3] = torch.nan

    detector.network.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"fake\.npz: image 3: its pool by inception is not finite"):
        score_images(pack("fake", draw(0, 20)), pack("real", draw(1, 21)), detectors=[detector])


def test_the_json_says_all_that_decides_comparability(sets, pack, detector):
    found = score_images(pack("fake", sets[0]), pack("real", sets[1]), detectors=[detector], batch=9, seed=7)
    whole = json.loads(json.dumps(found.json(), allow_nan=False))
    assert whole["scores"] == found.values
    assert whole["detectors"] == [detector.about]
    assert whole["settings"]["batch"] == 9 and whole["settings"]["kid"]["seed"] == 7
    assert whole["settings"]["kid"]["pairs"] == "all"  # too few for subsets of a thousand
    assert whole["settings"]["precision_recall"]["reference_images"] == 31
    assert (whole["samples"]["images"], whole["reference"]["images"]) == (40, 31)
    assert whole["samples"]["identity"] == open_samples(pack("fake", sets[0])).identity()
    assert whole["provenance"]["versions"]["torch"]
    assert whole["errors"]["FID"]["what"].startswith("standard error")
