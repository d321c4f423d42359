"""Finished images come in one order with the same pixels, whatever they are packed in; what is not such is refused."""

import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from haste.sampling.samples import open_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 9, 9, 3)).astype(np.uint8)


def packed(kind, folder):
    path = folder / {"npz": "a.npz", "compressed": "b.npz", "shards": "c", "folder": "d", "zip": "e.zip"}[kind]
    if kind == "npz":
        np.savez(path, IMAGES, np.arange(23))
    elif kind == "compressed":
        np.savez_compressed(path, arr_0=IMAGES)
    elif kind == "shards":
        path.mkdir()
        for shard, rows in enumerate(np.split(IMAGES, [7, 7, 20])):
            np.savez(path / f"shard-{shard:05d}-of-00004.npz", arr_0=rows)
    else:
        inner = path if kind == "folder" else folder / "unpacked"
        for i, image in enumerate(IMAGES):
            target = inner / f"{i // 10}" / f"{i:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target)
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted(inner.rglob("*.png"), reverse=True):
                    archive.write(file, file.relative_to(inner))
                archive.writestr("readme.txt", "not an image")
    return path


@pytest.mark.parametrize("kind", ["npz", "compressed", "shards", "folder", "zip"])
def test_every_packing_gives_the_same_images_in_order_as_often_as_asked(kind, tmp_path):
    samples = open_samples(packed(kind, tmp_path))
    assert (samples.count, samples.size) == (23, (9, 9))
    for size in (1, 5, 64, 100):
        batches = list(samples.batches(size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert (np.concatenate(batches) == IMAGES).all()
    np.savez(tmp_path / "reference.npz", IMAGES)
    assert samples.identity() == open_samples(tmp_path / "reference.npz").identity()


def test_one_pixel_changes_the_identity(tmp_path):
    changed = IMAGES.copy()
    changed[20, 8, 8, 2] ^= 1
    np.savez(tmp_path / "a.npz", IMAGES)
    np.savez(tmp_path / "b.npz", changed)
    assert open_samples(tmp_path / "a.npz").identity() != open_samples(tmp_path / "b.npz").identity()


REFUSALS = {
    "floats": (IMAGES / 255.0, ["float64", "uint8 0..255", "clip(255 x)"]),
    "NCHW": (IMAGES.transpose(0, 3, 1, 2), ["(23, 3, 9, 9)", "channels come last"]),
    "grey": (IMAGES[..., 0], ["(23, 9, 9)", "expected (N, H, W, 3)"]),
    "alpha": (np.concatenate([IMAGES, IMAGES[..., :1]], axis=-1), ["(23, 9, 9, 4)"]),
    "16 bit": (IMAGES.astype(np.uint16), ["uint16"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_arrays_of_another_type_or_shape_are_refused_with_what_was_found(name, tmp_path):
    array, words = REFUSALS[name]
    np.savez(tmp_path / "x.npz", np.ascontiguousarray(array))
    with pytest.raises(ValueError) as refusal:
        open_samples(tmp_path / "x.npz")
    for word in [str(tmp_path / "x.npz"), *words]:
        assert word in str(refusal.value)


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "no.zip").write_bytes(b"PK\x03")
    (tmp_path / "a.txt").write_text("x")
    for name, words in {
        "missing.npz": "no such file",
        "empty": "found no pictures",
        "other.npz": "expected images under arr_0, found mu",
        "no.zip": "truncated or foreign",
        "a.txt": "found '.txt'",
    }.items():
        with pytest.raises(ValueError, match=words) as refusal:
            open_samples(tmp_path / name)
        assert str(tmp_path / name) in str(refusal.value)


@pytest.mark.parametrize(("mode", "words"), [("L", "mode L"), ("RGBA", "mode RGBA"), ("P", "mode P")])
def test_pictures_that_are_not_rgb_are_refused_by_name(mode, words, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[1]).convert(mode).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=rf"b\.png: {words}"):
        list(open_samples(tmp_path).batches(8))


def test_a_picture_of_another_size_is_refused_by_name(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[1][:5]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r": 1 of 2 .* of 9 x 9 px: \S+b\.png: mode RGB, 9 x 5 px\. Remove"):
        list(open_samples(tmp_path).batches(8))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_truncated_npz_is_refused_and_never_gives_other_images(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn")
    whole = packed(data.draw(st.sampled_from(["npz", "compressed"])), folder)
    content = whole.read_bytes()
    whole.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=whole.name):
        list(open_samples(whole).batches(8))
