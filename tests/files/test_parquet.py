"""Rows of parquet files, as hubs keep data sets, are the pictures and labels that they say."""

import io
import json
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from haste.data import prepare
from haste.files.parquet import Rows

CLASSES = ["cat", "dog", "emu"]


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def features(**names):
    """What a hub's file says of its columns."""
    said = {name: {"names": classes, "_type": "ClassLabel"} for name, classes in names.items()}
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, **said}}}).encode()}


def write(path, levels, metadata=None, group=3, **columns):
    """Rows of these levels in groups of three, with columns beside them."""
    image = [{"bytes": png(level), "path": f"{level}.png"} for level in levels]
    table = pa.table({"image": image, **columns}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path


def opened(path, holdout=0, **options) -> Any:
    return prepare.open_source("parquet", resolution=8, holdout=holdout, path=path, **options)


def seen(source):
    """Level and label of every picture in order."""
    loaded = [source.load(i) for i in range(source.count)]
    return [(int(image[0, 0, 0]), label) for image, label in loaded]


def test_rows_come_in_their_order_with_the_classes_that_the_file_names(tmp_path):
    labels = [2, 0, 1, 2, 0, 1, 1]
    path = write(tmp_path / "a.parquet", range(7), features(label=CLASSES), label=labels)
    source = opened(path)
    assert source.classes == CLASSES and seen(source) == [*zip(range(7), labels, strict=True)]
    assert [source.name(i) for i in (0, 6)] == ["a.parquet/0", "a.parquet/6"]
    held = opened(path, holdout=3)
    assert sorted(seen(held)) == seen(source) and seen(held)[4:] == sorted(seen(held)[4:])


def test_a_split_of_several_files_is_one_data_set_and_what_lies_beside_it_is_named(tmp_path):
    for part in range(2):
        write(tmp_path / f"train-0000{part}-of-00002.parquet", range(4 * part, 4 * part + 4), label=[0, 1, 0, 1])
    (tmp_path / "README.md").touch()
    source = opened(tmp_path)
    assert seen(source) == [(i, i % 2) for i in range(8)] and source.classes == ["0", "1"]
    assert source.unused == [("README.md", "no .parquet files")]
    write(tmp_path / "test-00000-of-00001.parquet", [9], label=[0])
    with pytest.raises(ValueError, match=r"has 2 sets of rows \(test\*, train\*\); expected one, such as .*/train\*"):
        opened(tmp_path)
    assert seen(opened(tmp_path / "train-*.parquet")) == seen(source)
    assert opened(tmp_path / "train-00001-of-00002.parquet").count == 4


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["b", "a", "c", "a"], ["a", "b", "c"], [1, 0, 2, 0]),
        ([10, 2, 2, 7], ["2", "7", "10"], [2, 0, 0, 1]),
        ([0, 1, 1, 0], ["0", "1"], [0, 1, 1, 0]),
    ],
)
def test_labels_without_names_are_classes_in_sorted_order(tmp_path, labels, classes, expected):
    source = opened(write(tmp_path / "a.parquet", range(4), fine=labels), labels="fine")
    assert source.classes == classes and [label for _, label in seen(source)] == expected


def test_without_labels_or_with_one_class_no_column_is_needed(tmp_path):
    path = write(tmp_path / "a.parquet", range(4), caption=["x"] * 4)
    assert opened(path, labelled=False).classes == [] and opened(path, classes=1).classes == ["all"]
    with pytest.raises(ValueError, match=r"which of its columns holds the labels \(image, caption\)"):
        opened(path)
    two = write(
        tmp_path / "b.parquet", range(4), features(fine=CLASSES, coarse=["a", "b"]), fine=[0, 1, 2, 0], coarse=[0] * 4
    )
    with pytest.raises(ValueError, match="Name it in images.labels"):
        opened(two)
    assert opened(two, labels="fine").classes == CLASSES


def test_a_row_without_a_picture_is_one_bad_picture_by_its_row(tmp_path):
    image = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "x.png"}, None, {"bytes": b"", "path": ""}]
    parquet.write_table(pa.table({"image": image, "label": [0] * 4}), tmp_path / "a.parquet")
    assert prepare.check(opened(tmp_path / "a.parquet")) == [
        ("a.parquet/1", "a row without a picture's bytes"),
        ("a.parquet/2", "a row without a picture's bytes"),
        ("a.parquet/3", "an empty file"),
    ]


def test_a_column_of_bytes_is_taken_and_of_several_the_one_called_image(tmp_path):
    parquet.write_table(pa.table({"png": [png(5)], "label": [0]}), tmp_path / "a.parquet")
    assert seen(opened(tmp_path / "a.parquet")) == [(5, 0)]
    parquet.write_table(pa.table({"mask": [png(1)], "image": [png(2)], "label": [0]}), tmp_path / "b.parquet")
    assert seen(opened(tmp_path / "b.parquet")) == [(2, 0)]
    parquet.write_table(pa.table({"left": [png(1)], "right": [png(2)], "label": [0]}), tmp_path / "c.parquet")
    with pytest.raises(
        ValueError, match="expected a column 'image' of structs with bytes, found 2 of them: left, right"
    ):
        opened(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("label", "words"),
    [([0, None], "row a.parquet/1 has label None"), ([0, -1], "has label -1"), ([0, 7], "expected one of 3 classes")],
)
def test_a_row_whose_label_is_none_is_refused_by_name(tmp_path, label, words):
    with pytest.raises(ValueError, match=words):
        opened(write(tmp_path / "a.parquet", range(2), features(label=CLASSES), label=label))


def test_what_is_no_such_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no rows PAR1")
    for path, words in [
        ("a.parquet", "a.parquet: expected a .parquet, found a truncated or foreign file"),
        ("gone.parquet", "gone.parquet: expected .parquet files, found none"),
        ("b*", "expected .parquet files, found none"),
    ]:
        with pytest.raises(ValueError, match=words.replace("*", r"\*")):
            opened(tmp_path / path)


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", range(2), label=[0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"a\.parquet: reading \.parquet needs pyarrow: pip install 'haste\[parquet\]'"
    ):
        opened(path)


def test_threads_read_the_same_rows_and_two_groups_are_held(tmp_path):
    source = opened(write(tmp_path / "a.parquet", range(60), label=[0] * 60), classes=1)
    alone, together = (
        [image[0, 0, 0] for batch in prepare._attempts(source, range(60), workers) for image, _ in batch]
        for workers in (1, 4)
    )
    assert alone == together == [*range(60)]
    rows = Rows(tmp_path / "a.parquet")
    for name in rows.names:
        rows.read(name)
    assert len(rows._held) == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("whole") / "a.parquet", range(6), features(label=CLASSES), label=[0, 1, 2] * 2)
    return path.read_bytes(), path


@settings(max_examples=500, deadline=None)
@given(at=st.lists(st.integers(0, 10_000), min_size=1, max_size=4), byte=st.integers(0, 255), cut=st.booleans())
def test_of_a_damaged_file_every_picture_is_read_or_refused_by_name(whole, at, byte, cut):
    content, path = bytearray(whole[0]), whole[1]
    for place in at:
        content[place % len(content)] = byte
    path.write_bytes(content[: at[0] % len(content)] if cut else content)
    try:
        source = opened(path, labelled=False)
        bad = prepare.check(source)
    except ValueError as error:
        assert "a.parquet: " in str(error)
    else:
        assert all(name.startswith("a.parquet/") for name, _ in bad)
        assert all(
            isinstance(source.load(i)[0], np.ndarray) for i in range(source.count) if source.name(i) not in dict(bad)
        )
