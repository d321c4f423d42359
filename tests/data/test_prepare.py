"""Pictures become squares with the right labels, and held-out ones come last."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from haste.data import prepare
from haste.data.store import Store

GREY = (120, 120, 120)


def save(path, size=(8, 8), colour=GREY, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def stored(folder, source, shards=2, workers=1):
    common = {"key": "k", "recipe": {"made": "for a test"}, "shards": shards, "provenance": {}}
    for shard in range(shards):
        prepare.prepare_shard(folder, source, shard=shard, workers=workers, **common)
    prepare.prepare_join(folder, source, **common)
    return Store.open(folder, kind="images", verify="full")


def test_digits_are_scikit_learns_in_its_order(tmp_path):
    store = stored(tmp_path, prepare.open_source("digits", resolution=8, holdout=300))
    expected: Any = load_digits()
    images = store.read("image", range(1797))
    assert store.count == 1797 and images.dtype == np.uint8
    # At their own size nothing is resampled: 0..16 becomes 0..255 in all three channels.
    assert np.array_equal(images, np.rint(expected.images * 255 / 16).astype(np.uint8)[..., None].repeat(3, -1))
    assert np.array_equal(store.read("label", range(1797)), expected.target)
    assert store.range("train") == range(1497) and store.range("held_out") == range(1497, 1797)
    assert store.manifest["classes"] == [str(i) for i in range(10)] and store.manifest["resolution"] == 8


def test_resized_digits_keep_their_mean_and_stay_grey():
    source = prepare.open_source("digits", resolution=16, holdout=0)
    expected: Any = load_digits()
    for i in range(20):
        image, label = source.load(i)
        assert image.shape == (16, 16, 3) and label == expected.target[i]
        assert np.ptp(image, axis=2).max() == 0
        assert image.mean() == pytest.approx((expected.images[i] * 255 / 16).mean(), abs=6)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 40))
def test_every_crop_is_the_square_that_was_asked(width, height, size):
    image = prepare.centre_crop(Image.new("RGB", (width, height), GREY), size)
    assert image.size == (size, size)
    assert set(np.asarray(image).ravel()) == {120}


def test_the_crop_takes_the_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert np.asarray(prepare.centre_crop(Image.fromarray(pixels), 10)).min() == 255


def test_halving_averages_boxes_of_two_by_two():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    # 16 -> 8 by one halving; the BICUBIC step to the same size changes nothing.
    expected = pixels.reshape(8, 2, 8, 2, 3).astype(float).mean(axis=(1, 3))
    found = np.asarray(prepare.centre_crop(Image.fromarray(pixels), 8)).astype(float)
    assert np.abs(found - expected).max() <= 1  # Pillow rounds after each of the two axes


def test_halving_stops_above_the_target():
    # 15 is below 2 x 8, so BICUBIC does it all; halving first would go to 7 and have to enlarge.
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (15, 15, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(prepare.centre_crop(image, 8)), expected)


def test_class_folders_are_labels_in_sorted_order(tmp_path):
    for name, colour in [("n02", (0, 0, 200)), ("n01", (0, 200, 0)), ("n01-b", (200, 0, 0))]:
        for file in ("b.PNG", "a.jpeg", "deep/c.png"):
            save(tmp_path / "in" / name / file, colour=colour)
    (tmp_path / "in" / "n01" / "notes.txt").write_text("not a picture")
    (tmp_path / "in" / ".cache").mkdir()
    store = stored(tmp_path / "out", prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in"))
    assert store.manifest["classes"] == ["n01", "n01-b", "n02"]
    labels = store.read("label", range(9))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    brightest = store.read("image", range(9))[:, 4, 4].argmax(axis=1)
    assert [brightest[labels == label][0] for label in range(3)] == [1, 0, 2]


def test_pictures_of_a_class_come_in_the_order_of_their_paths(tmp_path):
    paths = ["a-b/0.png", "a/0.png", "a/x/0.png", *(f"a/{i}.png" for i in (7, 3, 5, 1, 9, 2))]
    for level, path in enumerate(paths):
        save(tmp_path / "c" / path, colour=(20 * level, 0, 0))
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path)
    found = [paths[int(source.load(i)[0][0, 0, 0]) // 20] for i in range(len(paths))]
    assert found == sorted(paths, key=lambda path: path.split("/"))


def test_a_flat_folder_is_one_class_in_sorted_order(tmp_path):
    for i in reversed(range(5)):
        save(tmp_path / "in" / f"{i}.png", colour=(40 * i, 0, 0))
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    assert source.classes == ["all"]
    assert [(int(source.load(i)[0][0, 0, 0]), source.load(i)[1]) for i in range(5)] == [(40 * i, 0) for i in range(5)]


def test_held_out_pictures_come_last_and_every_picture_once(tmp_path):
    for i in range(40):
        save(tmp_path / "in" / f"{i:02d}.png", colour=(6 * i, 0, 0))
    source = prepare.open_source("folder", resolution=8, holdout=15, path=tmp_path / "in")
    again = prepare.open_source("folder", resolution=8, holdout=15, path=tmp_path / "in")
    other = prepare.open_source("folder", resolution=8, holdout=15, path=tmp_path / "in", seed=1)
    order = [[int(s.load(i)[0][0, 0, 0]) // 6 for i in range(40)] for s in (source, again, other)]
    assert sorted(order[0]) == list(range(40)) and order[0] == order[1] != order[2]
    assert order[0][:25] == sorted(order[0][:25]) and order[0][25:] == sorted(order[0][25:])
    assert order[0][25:] != list(range(25, 40))  # chosen over the whole, not the last ones
    store = stored(tmp_path / "out", source)
    assert store.range("train") == range(25) and store.range("held_out") == range(25, 40)


def test_workers_change_nothing(tmp_path):
    for i in range(10):
        save(tmp_path / "in" / f"{i}.png", size=(9 + i, 12), colour=(20 * i, 3, 9))
    source = prepare.open_source("folder", resolution=8, holdout=3, path=tmp_path / "in")
    assert stored(tmp_path / "1", source).identity == stored(tmp_path / "3", source, 3, workers=3).identity


def test_exif_turns_the_picture(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the top goes to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image, _ = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path).load(0)
    assert image[:, 4:].min() == 255 and image[:, :4].max() == 0


def test_transparency_is_white():
    half = Image.new("RGBA", (2, 2), (100, 0, 0, 128))
    clear = Image.new("LA", (2, 2), (0, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert np.asarray(prepare.upright_rgb(clear)).min() == 255
    assert np.asarray(prepare.upright_rgb(palette)).min() == 255
    expected = [100 * 128 / 255 + 127, 127, 127]
    assert np.abs(np.asarray(prepare.upright_rgb(half))[0, 0] - expected).max() <= 1


@pytest.mark.parametrize(("mode", "level"), [("L", 200), ("1", 255), ("CMYK", 255)])
def test_other_modes_become_rgb(mode, level):
    value = {"L": 200, "1": 1, "CMYK": (0, 0, 0, 0)}[mode]
    assert np.unique(np.asarray(prepare.upright_rgb(Image.new(mode, (3, 3), value)))).tolist() == [level]


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    image, _ = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path).load(0)
    assert np.unique(image).tolist() == [40_000 // 256]


def test_floating_point_pictures_are_refused():
    with pytest.raises(ValueError, match="mode 'F'"):
        prepare.upright_rgb(Image.new("F", (2, 2), 0.5))


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_bad_picture_is_named_and_leaves_no_shard(tmp_path, content):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png", size=(64, 64))
    whole = (tmp_path / "in" / "b.png").read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    with pytest.raises(ValueError, match=r"in/b\.png: not a picture"):
        stored(tmp_path / "out", source)
    assert not list((tmp_path / "out").glob("*-00001-of-*.h5"))


def test_a_folder_that_changed_between_shards_is_refused(tmp_path):
    for i in range(4):
        save(tmp_path / "in" / f"{i}.png")
    common = {"key": "k", "recipe": {}, "shards": 2, "provenance": {}}
    before = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    prepare.prepare_shard(tmp_path / "out", before, shard=0, **common)
    (tmp_path / "in" / "0.png").rename(tmp_path / "in" / "9.png")
    after = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    prepare.prepare_shard(tmp_path / "out", after, shard=1, **common)
    with pytest.raises(ValueError, match="listing"):
        prepare.prepare_join(tmp_path / "out", after, **common)


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    def ask(path, **options):
        prepare.open_source("folder", resolution=8, path=tmp_path / path, **{"holdout": 0, **options})

    with pytest.raises(ValueError, match="found nothing"):
        ask("missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no pictures"):
        ask("empty")
    save(tmp_path / "mixed" / "a" / "1.png")
    save(tmp_path / "mixed" / "2.png")
    with pytest.raises(ValueError, match="both class folders"):
        ask("mixed")
    save(tmp_path / "hollow" / "a" / "1.png")
    (tmp_path / "hollow" / "b").mkdir()
    with pytest.raises(ValueError, match="hollow/b: a class folder without pictures"):
        ask("hollow")
    save(tmp_path / "one" / "1.png")
    with pytest.raises(ValueError, match="1 pictures to hold out of 1"):
        ask("one", holdout=1)


def test_unknown_sources_and_options_are_refused():
    with pytest.raises(ValueError, match=r"'cifar': expected one of \['digits', 'folder'\]"):
        prepare.open_source("cifar", resolution=8, holdout=0)
    with pytest.raises(ValueError, match="'digits' with options"):
        prepare.open_source("digits", resolution=8, holdout=0, path="x")
    with pytest.raises(ValueError, match="path"):
        prepare.open_source("folder", resolution=8, holdout=0)
    with pytest.raises(ValueError, match="resolution 0"):
        prepare.open_source("digits", resolution=0, holdout=0)
