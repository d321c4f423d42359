"""A store gives back what was written, or refuses with a reason."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.data.ahead import spread
from haste.files import artefact, progress
from haste.files import store as store_file
from haste.files.store import Store, differences, join, shard_path, shard_range, write_shard

FIELDS = {"image": ((3, 2), "float16"), "label": ((), "int64")}
RECIPE = {"source": "toy", "crop": {"size": 3}}


def toy(count):
    rng = np.random.default_rng(count)
    return {"image": rng.normal(size=(count, 3, 2)).astype(np.float16), "label": rng.integers(0, 10, count)}


def in_batches(data, span, size=3):
    for low in range(span.start, span.stop, size):
        yield {name: values[low : min(low + size, span.stop)] for name, values in data.items()}


def write(folder, data, shards, shard=None, **changes):
    count = len(data["label"])
    for number in range(shards) if shard is None else [shard]:
        settings_ = {"kind": "toy", "key": "k1", "recipe": RECIPE, "fields": FIELDS, "provenance": {"by": "test"}}
        settings_ |= {"batches": in_batches(data, shard_range(count, number, shards)), "total": count} | changes
        write_shard(folder, shard=number, shards=shards, **settings_)


def joined(folder, shards, **changes):
    settings_ = {"kind": "toy", "key": "k1", "recipe": RECIPE, "splits": {"train": [0, 1]}, "provenance": {}} | changes
    return join(folder, shards=shards, **settings_)


def make(folder, count=11, shards=3):
    data = toy(count)
    write(folder, data, shards)
    joined(folder, shards)
    return data


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_indices_read_as_numpy_would(data):
    count = data.draw(st.integers(1, 20))
    shards = data.draw(st.integers(1, 6))
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=30))
    with tempfile.TemporaryDirectory() as folder:
        expected = make(Path(folder), count, shards)
        with Store.open(folder) as store, spread(data.draw(st.integers(1, 5)), "reads") as reads:
            both = store.rows(list(FIELDS), indices, reads)
            for field in FIELDS:
                for found in (both[field], store.read(field, indices)):
                    assert found.dtype == expected[field].dtype
                    assert np.array_equal(found, expected[field][np.array(indices, dtype=int)])


def test_the_identity_is_that_of_the_content_in_any_number_of_shards(tmp_path):
    data = toy(7)
    for shards in (1, 2, 3, 7, 9):
        write(tmp_path / str(shards), data, shards)
        joined(tmp_path / str(shards), shards)
    stores = [Store.open(tmp_path / str(shards), verify="full") for shards in (1, 2, 3, 7, 9)]
    # The definition by hand: sha256 over blake2b-128 of each sample's fields in the order of their names.
    digests = [
        hashlib.blake2b(
            data["image"][i].astype("<f2").tobytes() + data["label"][i].astype("<i8").tobytes(), digest_size=16
        )
        for i in range(7)
    ]
    expected = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
    assert [store.identity for store in stores] == [expected] * 5


def test_the_identity_does_not_depend_on_the_order_of_the_fields(tmp_path):
    data = toy(4)
    write(tmp_path / "a", data, 1)
    write(tmp_path / "b", data, 1, fields=dict(reversed(FIELDS.items())))
    assert joined(tmp_path / "a", 1)["identity"] == joined(tmp_path / "b", 1)["identity"]


def test_another_order_is_another_identity(tmp_path):
    data = toy(4)
    write(tmp_path / "a", data, 1)
    write(tmp_path / "b", {name: values[::-1] for name, values in data.items()}, 1)
    assert joined(tmp_path / "a", 1)["identity"] != joined(tmp_path / "b", 1)["identity"]


def test_the_store_says_what_it_holds(tmp_path):
    write(tmp_path, toy(11), 3, facts={"classes": ["a", "b"]})
    joined(tmp_path, 3, splits={"train": [0, 9], "held_out": [9, 11]}, extra={"note": 1})
    store = Store.open(tmp_path, kind="toy", key="k1")
    assert store.count == 11 and store.recipe == RECIPE
    assert store.fields == {"image": ((3, 2), np.dtype("f2")), "label": ((), np.dtype("i8"))}
    assert store.range("held_out") == range(9, 11)
    assert store.manifest["classes"] == ["a", "b"] and store.manifest["note"] == 1
    assert [entry["start"] for entry in store.manifest["shards"]] == [0, 3, 7]


@settings(deadline=None)
@given(total=st.integers(0, 1000), shards=st.integers(1, 50))
def test_shards_cover_everything_once_and_evenly(total, shards):
    spans = [shard_range(total, shard, shards) for shard in range(shards)]
    assert [i for span in spans for i in span] == list(range(total))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_threads_read_at_once_from_more_shards_than_may_be_open(tmp_path, monkeypatch):
    data = make(tmp_path, 50, 9)
    monkeypatch.setattr(store_file, "_OPEN", 2)
    before = len(os.listdir("/proc/self/fd"))
    store, wrong = Store.open(tmp_path), []

    def reader(seed):
        rng = np.random.default_rng(seed)
        for _ in range(100):
            rows = rng.integers(0, 50, 8)
            if not np.array_equal(store.read("image", rows), data["image"][rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_a_row_is_one_read_since_labels_are_read_once_a_shard(tmp_path, monkeypatch):
    data, pread, reads = make(tmp_path, 40, 2), store_file._pread, []
    store = Store.open(tmp_path)
    monkeypatch.setattr(store_file, "_pread", lambda *given: reads.append(given) or pread(*given))
    for indices in ([30, 3, 9], [1, 39], [5]):
        found = store.rows(["image", "label"], indices)
        assert all(np.array_equal(values, data[name][indices]) for name, values in found.items())
    assert len(reads) == 6 + 2


def test_a_closed_store_opens_its_files_again(tmp_path):
    data = make(tmp_path)
    store = Store.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    store.read("label", range(11))
    assert len(os.listdir("/proc/self/fd")) == before + 3
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(store.read("label", [10, 0]), data["label"][[10, 0]])


def test_a_recipe_beyond_64_kib_is_kept(tmp_path):
    recipe = {"classes": ["x" * 100] * 2000}
    write(tmp_path, toy(3), 1, recipe=recipe)
    joined(tmp_path, 1, recipe=recipe)
    assert Store.open(tmp_path).recipe == recipe


def test_every_shard_says_how_far_it_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    caplog.set_level("INFO", logger="haste")
    write(tmp_path, toy(10), 2, shard=1)
    said = [message.partition(" images")[0] for message in caplog.messages]
    assert said == [f"{tmp_path.name}, shard 1 of 2: {done}/5" for done in (3, 5)]


def test_a_dropped_store_leaves_no_open_files(tmp_path):
    make(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    store = Store.open(tmp_path)
    store.read("label", range(11))
    del store
    assert len(os.listdir("/proc/self/fd")) == before


# ---- refusals


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_shard_cut_anywhere_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), 6, 2)
        path = shard_path(folder, 1, 2)
        cut = data.draw(st.integers(0, path.stat().st_size - 1))
        os.truncate(path, cut)
        with pytest.raises(ValueError, match=f"{path.name}: found {cut} bytes, expected"):
            Store.open(folder)
        with pytest.raises(ValueError, match=path.name):
            joined(folder, 2)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_manifest_cut_anywhere_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), 3, 1)
        path = Path(folder) / "manifest.json"
        os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 3)))
        with pytest.raises(ValueError, match="manifest.json"):
            Store.open(folder)


@pytest.mark.timeout(60)  # HDF5 can search damaged metadata for ever
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_byte_is_refused_or_harmless(data):
    with tempfile.TemporaryDirectory() as folder:
        expected = make(Path(folder), 4, 1)
        path = shard_path(folder, 0, 1)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            store = Store.open(folder, verify="full")
        except ValueError as error:
            assert folder in str(error)
        else:
            assert all(np.array_equal(store.read(field, range(4)), expected[field]) for field in FIELDS)


def test_a_damaged_sample_is_named_when_it_is_read_and_by_the_full_check(tmp_path):
    make(tmp_path)
    with h5py.File(shard_path(tmp_path, 1, 3), "r+") as file:
        images = file["image"]
        assert isinstance(images, h5py.Dataset)
        images[2, 0, 0] += 1  # sample 3 + 2
    quick = Store.open(tmp_path, verify="quick")
    quick.read("image", [0, 4])
    for field in FIELDS:
        with pytest.raises(ValueError, match="sample 5 does not fit its digest"):
            quick.read(field, [4, 5])
    with pytest.raises(ValueError, match=r"shard-00001-of-00003.h5: sample 5 is damaged"):
        Store.open(tmp_path, verify="full")


def test_a_missing_shard_is_refused(tmp_path):
    make(tmp_path)
    shard_path(tmp_path, 2, 3).unlink()
    with pytest.raises(ValueError, match="shard-00002-of-00003.h5: this shard is missing"):
        Store.open(tmp_path)
    with pytest.raises(ValueError, match="shard-00002-of-00003.h5: this shard is missing"):
        joined(tmp_path, 3)


def test_a_folder_without_a_manifest_is_no_store(tmp_path):
    write(tmp_path, toy(4), 1)
    with pytest.raises(ValueError, match="manifest.json"):
        Store.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(5000)])
def test_a_foreign_file_is_refused(tmp_path, content):
    make(tmp_path, 4, 1)
    path = shard_path(tmp_path, 0, 1)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        Store.open(tmp_path)
    with pytest.raises(ValueError, match="truncated or foreign"):
        joined(tmp_path, 1)


def test_an_hdf5_file_of_somebody_else_is_refused(tmp_path):
    with h5py.File(shard_path(tmp_path, 0, 1), "w") as file:
        file["image"] = np.zeros((3, 2))
    with pytest.raises(ValueError, match="foreign"):
        joined(tmp_path, 1)


def test_text_of_variable_length_is_left_unread(tmp_path):
    write(tmp_path, toy(2), 1)
    with h5py.File(shard_path(tmp_path, 0, 1), "r+") as file:
        assert {value.dtype.kind for value in map(np.asarray, file.attrs.values())} == {"S", "i"}
        file.attrs["recipe"] = json.dumps(RECIPE)
    with pytest.raises(ValueError, match=r"wrong or missing: \['recipe'\]"):
        joined(tmp_path, 1)


def test_a_link_to_another_file_is_refused(tmp_path):
    make(tmp_path, 4, 1)
    path = shard_path(tmp_path, 0, 1)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["label"] = np.arange(4)
    with h5py.File(path, "r+") as file:
        del file["label"]
        file["label"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "label")
    with pytest.raises(ValueError, match=r"not a shard.*label"):
        joined(tmp_path, 1)


@pytest.mark.parametrize(("schema", "word"), [(artefact.SCHEMA - 1, "older"), (artefact.SCHEMA + 1, "newer")])
def test_another_schema_is_refused_in_the_shard_and_in_the_manifest(tmp_path, schema, word):
    make(tmp_path, 4, 1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    with h5py.File(shard_path(tmp_path, 0, 1), "r+") as file:
        file.attrs["schema"] = schema  # the header's other entries stay
    with pytest.raises(ValueError, match=f"shard-00000-of-00001.h5: schema {schema} is {word}"):
        joined(tmp_path, 1)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema": schema}))
    with pytest.raises(ValueError, match=f"manifest.json: schema {schema} is {word}"):
        Store.open(tmp_path)


def test_another_key_is_refused_with_what_differs(tmp_path):
    make(tmp_path)
    wanted = {"source": "toy", "crop": {"size": 4}}
    with pytest.raises(ValueError, match=r"found key k1, expected k2 \(crop.size: found 3, expected 4\)"):
        Store.open(tmp_path, key="k2", recipe=wanted)
    with pytest.raises(ValueError, match="found key k1, expected k2"):
        Store.open(tmp_path, key="k2")
    with pytest.raises(ValueError, match=r"shard-00000.*found key k1, expected k2 \(crop.size: found 3, expected 4\)"):
        joined(tmp_path, 3, key="k2", recipe=wanted)


def test_another_kind_is_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="a store of toy, expected latents"):
        Store.open(tmp_path, kind="latents")


def test_shards_that_disagree_are_not_joined(tmp_path):
    write(tmp_path, toy(4), 2, facts={"from": "a"})
    write(tmp_path, toy(4), 2, shard=1, facts={"from": "b"})
    with pytest.raises(ValueError, match=r"shard-00001.*from: found 'b', expected 'a'"):
        joined(tmp_path, 2)
    write(tmp_path, toy(6), 2, shard=1, facts={"from": "a"})
    with pytest.raises(ValueError, match=r"shard-00001.*total: found 6, expected 4"):
        joined(tmp_path, 2)
    write(tmp_path, toy(4), 2, shard=1, facts={"from": "a"})
    joined(tmp_path, 2, expected_facts={"from": "a"})
    with pytest.raises(ValueError, match="from: found 'a', expected 'c'"):
        joined(tmp_path, 2, expected_facts={"from": "c"})


def test_a_shard_from_another_place_is_refused(tmp_path):
    make(tmp_path, 4, 2)
    shard_path(tmp_path, 1, 2).write_bytes(shard_path(tmp_path, 0, 2).read_bytes())
    with pytest.raises(ValueError, match=r"shard-00001.*shard: found 0, expected 1"):
        Store.open(tmp_path)


def test_a_shard_rewritten_with_other_content_is_refused_by_the_quick_check(tmp_path):
    make(tmp_path, 4, 1)
    shard_path(tmp_path, 0, 1).unlink()
    write(tmp_path, {name: values[::-1] for name, values in toy(4).items()}, 1)
    with pytest.raises(ValueError, match="identity"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": np.zeros((2, 3, 2), "f2")}, "found fields"),
        ({"image": np.zeros((2, 3, 2), "f4"), "label": np.zeros(2, "i8")}, "float32"),
        ({"image": np.zeros((2, 2, 3), "f2"), "label": np.zeros(2, "i8")}, r"\(2, 2, 3\)"),
        ({"image": np.zeros((2, 3, 2), "f2"), "label": np.zeros(1, "i8")}, "field"),
        ({"image": np.zeros((1, 3, 2), "f2"), "label": np.zeros(1, "i8")}, "found 1 samples, expected 2"),
        ({"image": np.zeros((3, 3, 2), "f2"), "label": np.zeros(3, "i8")}, "found 3 samples or more, expected 2"),
    ],
)
def test_wrong_batches_are_refused_and_leave_nothing(tmp_path, batch, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, toy(2), 1, batches=[batch])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_the_same_recipe_and_facts_is_not_written_again_and_any_other_is(tmp_path):
    data = make(tmp_path, 4, 1)
    other = {name: values[::-1] for name, values in data.items()}
    path, before = shard_path(tmp_path, 0, 1), shard_path(tmp_path, 0, 1).stat()
    write(tmp_path, other, 1)
    assert path.stat() == before
    for changes in ({"facts": {"images": "others"}}, {"key": "k2"}, {"recipe": {}}):
        before = path.stat().st_mtime_ns, path.read_bytes()
        write(tmp_path, other, 1, **changes)
        assert (path.stat().st_mtime_ns, path.read_bytes()) != before
    path.write_bytes(path.read_bytes()[:-9])  # cut short
    write(tmp_path, other, 1, recipe={})
    assert np.array_equal(joined(tmp_path, 1, recipe={})["count"], 4)


def test_an_interrupted_write_leaves_the_shard_before_it(tmp_path):
    data = make(tmp_path, 4, 1)

    def broken():
        yield from in_batches(data, range(3))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path, data, 1, batches=broken(), facts={"made of": "something else"})
    Store.open(tmp_path, verify="full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", shard_path("", 0, 1).name]


def test_a_killed_writer_leaves_nothing_readable(tmp_path):
    program = """
import os, sys, numpy as np
from haste.files.store import write_shard
def batches():
    yield {"x": np.zeros((5, 2))}
    os.kill(os.getpid(), 9)
write_shard(sys.argv[1], kind="toy", key="k1", recipe={}, shard=0, shards=1, total=10, fields={"x": ((2,), "f8")},
            batches=batches(), provenance={})
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert list(tmp_path.glob("*.h5")) == []
    with pytest.raises(ValueError, match="this shard is missing"):
        joined(tmp_path, 1)


def test_a_full_disk_leaves_nothing_readable(tmp_path):
    # A limit on the size of files gives the same failing write as a full disk, without needing one.
    program = """
import resource, signal, sys, numpy as np
from haste.files.store import write_shard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_shard(sys.argv[1], kind="toy", key="k1", recipe={}, shard=0, shards=1, total=100,
                fields={"x": ((1000,), "f8")}, batches=[{"x": np.ones((100, 1000))}], provenance={})
except OSError as error:
    print("refused", error)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.startswith("refused"), done.stderr
    assert list(tmp_path.glob("*.h5")) == []


@pytest.mark.parametrize("indices", [[-1], [11], [0.5], [[1, 2]]])
def test_indices_outside_the_store_are_refused(tmp_path, indices):
    make(tmp_path)
    with pytest.raises(ValueError, match="indices"):
        Store.open(tmp_path).read("label", indices)


def test_unknown_fields_splits_and_shards_are_refused(tmp_path):
    make(tmp_path)
    store = Store.open(tmp_path)
    for ask in (lambda: store.read("nothing", [0]), lambda: store.read("digest", [0]), lambda: store.range("nothing")):
        with pytest.raises(ValueError, match="expected one of"):
            ask()
    with pytest.raises(ValueError, match="shard 3 of 3"):
        shard_range(10, 3, 3)
    with pytest.raises(ValueError, match="split 'train'"):
        joined(tmp_path, 3, splits={"train": [0, 12]})


@pytest.mark.parametrize("change", [{"shards": []}, {"count": "11"}, {"shards": [{"file": "x"}]}, {"fields": {"a": 1}}])
def test_a_manifest_that_join_did_not_write_is_refused(tmp_path, change):
    make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match="not a manifest"):
        Store.open(tmp_path)


def test_differences_name_the_full_path():
    found = differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4})
    assert found == ["a.c: found 2, expected 5", "d: found 3, expected None", "e: found None, expected 4"]
