"""Compressed rows are read as the pixels that were written, whatever their shard, or refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from haste.files import codecs
from haste.files.store import Store, join, shard_path, shard_range, write_shard

SIDE, COUNT, SHARDS = 24, 11, 3
COMMON = {"kind": "toy", "key": "k", "recipe": {}, "shards": SHARDS, "provenance": {}}
FIELDS = {"image": ((SIDE, SIDE, 3), "uint8"), "label": ((), "int64")}


def pictures() -> dict[str, np.ndarray]:
    """Noise, which compresses to more than it is, flat areas, and steps of one grey level."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3)).astype(np.uint8)
    images[1::3, :, :] = rng.integers(0, 256, 3)
    images[2::3] = np.arange(SIDE)[:, None] + np.arange(3)
    return {"image": images, "label": np.arange(COUNT)}


def write(folder, shard, codec, batch=4, **changes):
    span, data = shard_range(COUNT, shard, SHARDS), pictures()
    cut = ({n: v[low : min(low + batch, span.stop)] for n, v in data.items()} for low in span[::batch])
    how = {"coded": {"image": codec} if codec else {}, "workers": 2, "batches": cut, **changes}
    return write_shard(folder, **COMMON, shard=shard, total=COUNT, fields=FIELDS, **how)


def made(folder, *kinds):
    for shard, codec in enumerate(kinds):
        write(folder, shard, codec)
    join(folder, **COMMON, splits={"train": [0, COUNT]})
    return Store.open(folder)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_any_pixels_come_back_with_every_bit(pixels):
    for encode, decode in codecs.CODECS.values():
        assert np.array_equal(decode(encode(pixels), pixels.shape), pixels)


@pytest.mark.parametrize("kinds", [("webp",) * 3, ("webp", None, "webp")], ids=["all", "some"])
def test_a_store_of_compressed_shards_is_that_of_its_pixels_in_every_respect_but_its_size(tmp_path, kinds):
    raw, store, data = made(tmp_path / "raw", None, None, None), made(tmp_path / "coded", *kinds), pictures()
    assert store.identity == raw.identity and store.fields == raw.fields and store.count == COUNT
    assert {k: v for k, v in store.manifest.items() if k != "shards"} == {
        k: v for k, v in raw.manifest.items() if k != "shards"
    }
    assert [shard.get("coded", {}).get("image") for shard in store.manifest["shards"]] == [*kinds]
    orders = [np.random.default_rng(seed).integers(0, COUNT, 20) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for order, found in zip(orders, pool.map(lambda one: store.rows(["image", "label"], one), orders), strict=True):
            assert all(np.array_equal(found[name], data[name][order]) for name in FIELDS)
    Store.open(tmp_path / "coded", verify="full")


def test_a_finished_shard_stays_as_it_is_when_another_way_is_asked(tmp_path):
    before = {shard: write(tmp_path, shard, codec).read_bytes() for shard, codec in enumerate((None, "webp", None))}
    after = {shard: write(tmp_path, shard, codec, batches=iter(())).read_bytes() for shard, codec in
             enumerate(("webp", None, "webp"))}  # fmt: skip
    assert after == before


@pytest.mark.parametrize("again", [{"codec": "webp"}, {"codec": None, "provenance": {"words": "x" * 5000}}])
def test_a_lost_shard_may_be_made_again_in_another_way_and_size_and_the_store_is_the_same(tmp_path, again):
    store, lost = made(tmp_path, None, None, None), shard_path(tmp_path, 1, SHARDS)
    size = lost.stat().st_size
    lost.unlink()
    span = shard_range(COUNT, 1, SHARDS)
    rows = {name: values[span.start : span.stop] for name, values in pictures().items()}
    how = {**COMMON, "provenance": again.get("provenance", {}), "coded": {"image": "webp"} if again["codec"] else {}}
    write_shard(tmp_path, **how, shard=1, total=COUNT, fields=FIELDS, batches=iter([rows]))
    assert lost.stat().st_size != size
    found = Store.open(tmp_path, verify="full")
    assert found.identity == store.identity
    assert np.array_equal(found.rows(["image"], range(COUNT))["image"], pictures()["image"])


def test_the_number_of_threads_and_of_pictures_at_once_changes_no_byte_of_the_pixels(tmp_path):
    def coded(folder, **how):
        with h5py.File(write(tmp_path / folder, 0, "webp", **how)) as file:
            return np.asarray(file["image"]).tobytes()

    assert coded("one", workers=1) == coded("many", workers=3, batch=1)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded")
    made(folder, "webp", "webp", "webp").close()
    return folder


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["image", "image" + codecs.ENDS]), place=st.floats(0, 0.9999), change=st.integers(1, 255))
def test_a_changed_byte_of_compressed_pixels_or_of_their_ends_is_refused_or_harmless(coded, name, place, change):
    path = shard_path(coded, 1, SHARDS)
    before = path.read_bytes()
    with h5py.File(path) as file:
        start, size = file[name].id.get_offset(), file[name].id.get_storage_size()
    content = bytearray(before)
    content[start + int(place * size)] ^= change
    path.write_bytes(content)
    try:
        found = Store.open(coded).read("image", [*shard_range(COUNT, 1, SHARDS)])
    except ValueError as refusal:
        assert "shard" in str(refusal)
    else:
        assert np.array_equal(found, pictures()["image"][shard_range(COUNT, 1, SHARDS)])
    finally:
        path.write_bytes(before)


def test_a_row_that_cannot_be_decoded_is_named_with_its_shard_and_what_to_do(tmp_path):
    made(tmp_path, "webp", "webp", "webp").close()
    path, sample = shard_path(tmp_path, 1, SHARDS), shard_range(COUNT, 1, SHARDS).start
    with h5py.File(path, "r+") as file:
        file["image"][:4] = np.frombuffer(b"none", np.uint8)
    store = Store.open(tmp_path)
    said = f"{path.name}: sample {sample} is damaged: it cannot be decoded .*Remove the shard and the manifest"
    with pytest.raises(ValueError, match=said):
        store.read("image", [0, sample])
    with pytest.raises(ValueError, match=said):
        Store.open(tmp_path, verify="full")
    assert len(store.read("image", [0, sample + 1])) == 2


@pytest.mark.parametrize(
    "entry", ['{"image": {"codec": "zip", "shape": [24, 24, 3]}}', '{"image": "webp"}', "[]", "7", "no"]
)
def test_a_shard_coded_in_a_way_that_is_not_known_is_refused(tmp_path, entry):
    path = write(tmp_path, 0, "webp")
    with h5py.File(path, "r+") as file:
        file.attrs["coded"] = np.bytes_(entry.encode())
    for shard in (1, 2):
        write(tmp_path, shard, "webp")
    with pytest.raises(ValueError, match=path.name):
        join(tmp_path, **COMMON, splits={})


def test_a_disk_that_fills_while_rows_are_compressed_leaves_nothing(tmp_path, monkeypatch):
    def full(spool, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(codecs.Spool, "add", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 0, "webp")
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file() and path.parent.name != ".locks"]
