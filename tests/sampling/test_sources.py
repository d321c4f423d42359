"""Finished images are found as an image source's files are: each is used or named, and odd ones are named together."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from haste.sampling.samples import open_samples

RNG = np.random.default_rng(0)


def images(folder, count, size=(16, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(RNG.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def read(samples):
    return np.concatenate(list(samples.batches(7)))


def test_a_folder_of_samples_that_is_a_link_is_read_and_none_is_taken_twice(tmp_path):
    images(tmp_path / "samples/rank0", 20)
    images(tmp_path / "elsewhere/rank1", 20)
    (tmp_path / "samples/rank1").symlink_to("../elsewhere/rank1")
    (tmp_path / "samples/again").symlink_to("rank0")
    (tmp_path / "samples/.hidden.png").touch()
    found = open_samples(tmp_path / "samples")
    assert found.count == len(read(found)) == 40
    assert {one["reason"]: one["names"] for one in found.unused} == {
        "hidden, or left there by a program": [".hidden.png"],
        "a link to what is here too": ["again/"],
    }


def test_of_a_set_that_is_not_of_one_kind_the_odd_ones_are_named_with_the_way_to_crops(tmp_path):
    folder = images(tmp_path / "photos", 20)
    Image.open(folder / "003.png").convert("L").save(folder / "grey.jpg")
    for i in range(3):
        images(tmp_path / "large", 1, (20, 16))
        (tmp_path / "large/000.png").rename(folder / f"0-large-{i}.png")
    with pytest.raises(ValueError) as error:
        read(open_samples(folder))
    with pytest.raises(ValueError) as early:
        open_samples(folder).check()
    assert (said := str(error.value)) == str(early.value)
    assert said.startswith(f"{folder}: 4 of 24 images do not fit")
    assert "expected RGB of 16 x 16 px: " in said and "..." not in said
    for name in ("0-large-0.png", "0-large-1.png", "0-large-2.png"):
        assert f"{name}: mode RGB, 20 x 16 px" in said
    assert "grey.jpg: mode L, 16 x 16 px" in said
    assert "`haste images` makes RGB crops of one size" in said and "003.png" not in said


def test_a_tar_of_samples_is_read_in_the_order_of_names(tmp_path):
    folder = images(tmp_path / "set", 9)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.add(path, path.name)
    assert np.array_equal(read(open_samples(tmp_path / "set.tar")), read(open_samples(folder)))


def test_an_array_of_another_name_is_read_and_fortrans_order_is_named(tmp_path):
    pixels = RNG.integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "named.npz", samples=pixels, labels=np.zeros(5), weights=np.zeros((2, 2, 2, 2)))
    assert np.array_equal(read(open_samples(tmp_path / "named.npz")), pixels)
    np.savez(tmp_path / "two.npz", samples=pixels, others=pixels)
    with pytest.raises(ValueError, match="two.npz: expected images under arr_0, found samples, others"):
        open_samples(tmp_path / "two.npz")
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(pixels))
    with pytest.raises(ValueError, match=r"fortran.npz: arr_0 is in Fortran's order; save it anew by numpy\.ascont"):
        open_samples(tmp_path / "fortran.npz")


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_a_sample_that_cannot_be_read_is_named(tmp_path, damage):
    folder = images(tmp_path / "set", 5)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[:100] if damage is None else damage)
    with pytest.raises(ValueError, match=r"set/003\.png: cannot be read as an image \("):
        read(open_samples(folder))


def test_a_format_that_pillow_knows_and_the_name_hides_is_refused(tmp_path):
    folder, file = images(tmp_path / "set", 2), io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "TIFF")
    (folder / "001.png").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=r"001\.png: cannot be read as an image \(cannot identify image file\)"):
        read(open_samples(folder))
