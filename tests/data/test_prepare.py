"""Pictures become squares with the right labels, and held-out ones come last."""

import os
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from haste.data import pictures, prepare
from haste.files.store import Store, write_shard

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
    image = pictures.centre_crop(Image.new("RGB", (width, height), GREY), size)
    assert image.size == (size, size)
    assert set(np.asarray(image).ravel()) == {120}


def test_the_crop_takes_the_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert np.asarray(pictures.centre_crop(Image.fromarray(pixels), 10)).min() == 255


def test_halving_averages_boxes_of_two_by_two():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    # 16 -> 8 by one halving; the BICUBIC step to the same size changes nothing.
    expected = pixels.reshape(8, 2, 8, 2, 3).astype(float).mean(axis=(1, 3))
    found = np.asarray(pictures.centre_crop(Image.fromarray(pixels), 8)).astype(float)
    assert np.abs(found - expected).max() <= 1  # Pillow rounds after each of the two axes


def test_halving_stops_above_the_target():
    # 15 is below 2 x 8, so BICUBIC does it all; halving first would go to 7 and have to enlarge.
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (15, 15, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(pictures.centre_crop(image, 8)), expected)


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
    assert np.asarray(pictures.upright_rgb(clear)).min() == 255
    assert np.asarray(pictures.upright_rgb(palette)).min() == 255
    expected = [100 * 128 / 255 + 127, 127, 127]
    assert np.abs(np.asarray(pictures.upright_rgb(half))[0, 0] - expected).max() <= 1


@pytest.mark.parametrize(("mode", "level"), [("L", 200), ("1", 255), ("CMYK", 255)])
def test_other_modes_become_rgb(mode, level):
    value = {"L": 200, "1": 1, "CMYK": (0, 0, 0, 0)}[mode]
    assert np.unique(np.asarray(pictures.upright_rgb(Image.new(mode, (3, 3), value)))).tolist() == [level]


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    image, _ = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path).load(0)
    assert np.unique(image).tolist() == [40_000 // 256]


def test_floating_point_pictures_are_refused():
    with pytest.raises(ValueError, match="mode 'F'"):
        pictures.upright_rgb(Image.new("F", (2, 2), 0.5))


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
    with pytest.raises(ValueError, match="pictures were changed after some shards were made"):
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
    with pytest.raises(
        ValueError,
        match=r"'cifar': expected one of \['archive', 'coco', 'digits', 'folder', 'moved-digits', 'parquet'\]",
    ):
        prepare.open_source("cifar", resolution=8, holdout=0)
    with pytest.raises(ValueError, match="'digits' with options"):
        prepare.open_source("digits", resolution=8, holdout=0, path="x")
    with pytest.raises(ValueError, match="path"):
        prepare.open_source("folder", resolution=8, holdout=0)
    with pytest.raises(ValueError, match="resolution 0"):
        prepare.open_source("digits", resolution=0, holdout=0)


# ---- pictures as people have them


def only(path, **options):
    """The one picture in a folder, prepared."""
    return prepare.open_source("folder", **{"resolution": 8, "holdout": 0, "path": path, **options}).load(0)[0]


def test_a_cmyk_jpeg_has_the_colours_that_its_inks_say(tmp_path):
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 64], [0, 0, 0, 255]], np.uint8)
    pixels = np.repeat(np.repeat(inks.reshape(2, 2, 4), 8, 0), 8, 1)
    Image.fromarray(pixels, mode="CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    found = only(tmp_path, resolution=16)
    c, m, y, k = (pixels[..., i].astype(float) / 255 for i in range(4))
    expected = 255 * np.stack([(1 - c) * (1 - k), (1 - m) * (1 - k), (1 - y) * (1 - k)], -1)
    assert np.abs(found[4::8, 4::8] - expected[4::8, 4::8]).max() <= 6  # a JPEG is lossy


@pytest.mark.parametrize(
    ("name", "picture", "level"),
    [
        ("palette.png", Image.new("P", (8, 8), 1), (9, 8, 7)),
        ("grey.png", Image.new("L", (8, 8), 77), (77, 77, 77)),
        ("bits.png", Image.new("1", (8, 8), 1), (255, 255, 255)),
        ("alpha.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
        ("grey-alpha.png", Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        ("deep.png", Image.fromarray(np.full((8, 8), 51_400, np.uint16)), (200, 200, 200)),
        ("lossless.webp", Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
        ("alpha.webp", Image.new("RGBA", (8, 8), (5, 5, 5, 0)), (255, 255, 255)),
        ("CAPITALS.JPEG", Image.new("L", (8, 8), 90), (90, 90, 90)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_of_every_kind_become_rgb_by_way_of_a_file(tmp_path, name, picture, level):
    if picture.mode == "P":
        picture.putpalette([0, 0, 0, 9, 8, 7])
    picture.save(tmp_path / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
    assert np.unique(only(tmp_path).reshape(-1, 3), axis=0).tolist() == [list(level)]


def test_a_camera_picture_with_a_preview_behind_it_is_its_first_picture(tmp_path):
    first, second = Image.new("RGB", (8, 8), (200, 200, 200)), Image.new("RGB", (8, 8), (9, 9, 9))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert np.unique(only(tmp_path)).tolist() == [200]


def bad_pictures(folder):
    """One good picture, and every kind of bad one; name -> what its reason says."""
    save(folder / "good.png")
    save(folder / "big.png", size=(64, 64))
    whole = (folder / "big.png").read_bytes()
    (folder / "big.png").unlink()
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    save(folder / "other.png", format="BMP")
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 200, 99)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return {
        "empty.png": "an empty file",
        "half.png": "",
        "link.png": "a link to nothing",
        "moving.webp": "animated: 3 pictures, expected one",
        "other.png": "cannot identify image file",
        "pipe.png": "not a regular file",
        "script.png": "cannot identify image file",
        "text.jpg": "cannot identify image file",
    }


def test_every_bad_picture_of_a_shard_is_named_with_its_reason_at_once(tmp_path):
    expected = bad_pictures(tmp_path / "in")
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    with pytest.raises(ValueError, match="8 of 9 pictures of this shard cannot be used") as refusal:
        stored(tmp_path / "out", source, shards=1)
    for name, reason in expected.items():
        assert f"in/{name}: not a picture that can be read ({reason}" in str(refusal.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.h5"))


def test_a_check_finds_the_same_pictures_and_what_is_left_is_a_store_that_says_so(tmp_path):
    expected = bad_pictures(tmp_path / "in")
    for i in range(20):
        save(tmp_path / "in" / f"x{i:02d}.png", colour=(10 * i, 0, 0))
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    bad = prepare.check(source)
    assert prepare.check(source, workers=3) == bad
    assert {name: reason.startswith(expected[name]) for name, reason in bad} == dict.fromkeys(expected, True)
    assert "8 pictures cannot be used: 3 cannot identify image file" in prepare.told(bad)
    prepare.write_checked(tmp_path / "checked.json", source, bad, key="k")
    read = prepare.read_checked(tmp_path / "checked.json", source)
    names = frozenset(name for name, _ in read)
    left = prepare.open_source("folder", resolution=8, holdout=4, path=tmp_path / "in", without=names)
    assert left.count == 21
    stores = []
    for shards in (1, 3):
        common = {"key": "k", "recipe": {}, "shards": shards, "provenance": {}}
        for shard in range(shards):
            prepare.prepare_shard(tmp_path / str(shards), left, shard=shard, **common)
        prepare.prepare_join(tmp_path / str(shards), left, **common, skipped=read)
        stores.append(Store.open(tmp_path / str(shards), kind="images", verify="full"))
    assert stores[0].identity == stores[1].identity  # every picture keeps its place in any number of shards
    assert [tuple(entry) for entry in stores[0].manifest["skipped"]] == bad
    # and it is the store of a folder that never had them
    for name in names:
        (tmp_path / "in" / name).unlink()
    clean = prepare.open_source("folder", resolution=8, holdout=4, path=tmp_path / "in")
    assert clean.listing == left.listing and stored(tmp_path / "clean", clean).identity == stores[0].identity


@pytest.mark.parametrize("error", [TypeError, MemoryError, RecursionError, struct.error, KeyError, AssertionError])
def test_no_error_of_a_picture_of_whatever_class_leaves_without_the_files_name(tmp_path, monkeypatch, error):
    save(tmp_path / "in" / "a.png")
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    assert prepare.check(source) == [("a.png", error.__name__)]
    with pytest.raises(ValueError, match=r"in/a\.png: not a picture that can be read"):
        source.load(0)


def test_a_folder_that_changed_since_it_was_checked_is_refused(tmp_path):
    save(tmp_path / "in" / "a.png")
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    prepare.write_checked(tmp_path / "checked.json", source, prepare.check(source), key="k")
    save(tmp_path / "in" / "b.png")
    changed = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    with pytest.raises(ValueError, match="1 pictures were checked, but others are there now .2."):
        prepare.read_checked(tmp_path / "checked.json", changed)


def test_a_class_or_a_folder_of_bad_pictures_alone_is_refused(tmp_path):
    save(tmp_path / "in" / "a" / "1.png")
    (tmp_path / "in" / "b").mkdir()
    (tmp_path / "in" / "b" / "2.png").touch()
    with pytest.raises(ValueError, match="class 'b' has no picture that can be read"):
        prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in", without=frozenset({"b/2.png"}))
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in" / "b")
    with pytest.raises(ValueError, match="1 picture cannot be used"):
        prepare.write_checked(tmp_path / "checked.json", source, prepare.check(source), key="k")


def test_without_labels_pictures_anywhere_below_are_taken(tmp_path):
    for name in ("a/1.png", "2.png", "b/deep/3.png", ".hidden/4.png", "b/.thumbs/5.png"):
        save(tmp_path / "in" / name)
    source = prepare.open_source("folder", resolution=8, holdout=1, path=tmp_path / "in", labelled=False)
    assert source.count == 3 and source.classes == [] and {source.load(i)[1] for i in range(3)} == {0}
    digits = prepare.open_source("digits", resolution=8, holdout=0, labelled=False)
    assert digits.classes == [] and {digits.load(i)[1] for i in range(20)} == {0}


def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(tmp_path, monkeypatch):
    save(tmp_path / "in" / "a" / "1.png")
    save(tmp_path / "in" / "a" / "locked" / "2.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):  # root, as whom tests may run, can read everything
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"in/a/locked: cannot be read \(Permission denied\)"):
        prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")


def test_names_that_are_no_text_are_kept_apart_and_can_be_written_down(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    Image.new("RGB", (8, 8), GREY).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    for name, content in ((b"\xff.png", good), (b"\xfe.png", b""), ("ü.png".encode(), good)):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in")
    bad = prepare.check(source)
    assert [os.fsencode(name) for name, _ in bad] == [b"\xfe.png"]
    prepare.write_checked(tmp_path / "checked.json", source, bad, key="k")
    assert prepare.read_checked(tmp_path / "checked.json", source) == bad
    assert prepare.told(bad).encode() == b"1 picture cannot be used: an empty file (\\udcfe.png)"
    without = frozenset(name for name, _ in bad)
    assert prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "in", without=without).count == 2


def test_pictures_that_were_enlarged_are_counted_with_the_median_of_their_shorter_sides(tmp_path):
    sizes = [(8, 8), (5, 20), (20, 3), (6, 6), (30, 9), (7, 40)]  # made 8: sides of 5, 3, 6 and 7 are too short
    for place, size in enumerate(sizes):
        save(tmp_path / "pictures" / f"{place}.png", size)
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "pictures")
    store = stored(tmp_path / "store", source, shards=3, workers=2)
    assert store.manifest["enlarged"] == {"count": 4, "median": 5.5}


def test_a_store_with_a_shard_that_did_not_count_says_nothing_of_enlarged_pictures(tmp_path, monkeypatch):
    save(tmp_path / "pictures" / "a.png", (4, 4))
    save(tmp_path / "pictures" / "b.png", (4, 4))
    source = prepare.open_source("folder", resolution=8, holdout=0, path=tmp_path / "pictures")
    common = {"key": "k", "recipe": {}, "shards": 2, "provenance": {}}
    prepare.prepare_shard(tmp_path / "store", source, shard=0, **common)
    with monkeypatch.context() as old:
        old.setattr(prepare, "write_shard", lambda *given, learned, **more: write_shard(*given, **more))
        prepare.prepare_shard(tmp_path / "store", source, shard=1, **common)
    assert "enlarged" not in prepare.prepare_join(tmp_path / "store", source, **common)
