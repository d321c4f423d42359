"""Labels are those that the data's own layout states, in folders and archives alike; the rest is named."""

import json
import zipfile

import pytest
from PIL import Image

from haste.data import prepare
from haste.files import labels, listing, walk


def lying(root, files):
    """Files in a folder: name -> content, None for a picture whose shade is its place."""
    for place, (name, content) in enumerate(files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8), (place, 0, 0)).save(root / name)
        else:
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def packed(root):
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root))
    return root.with_suffix(".zip")


@pytest.fixture(params=["folder", "archive"])
def opened(request):
    """A function that opens a folder, or the same packed."""

    def both(root, **options):
        path = root if request.param == "folder" else packed(root)
        return prepare.open_source(request.param, resolution=8, holdout=0, path=path, **options)

    return both


def labelled(source):
    """Picture -> label, by what is loaded."""
    return {source.name(i): source.load(i)[1] for i in range(source.count)}


def edm(entries):
    return json.dumps({"labels": entries})


PAIRS = {f"{i // 4:05d}/img{i:08d}.png": i % 2 for i in range(8)}
COUNTED = dict.fromkeys(PAIRS)


def test_folders_that_count_pictures_are_no_classes_where_dataset_json_has_labels(tmp_path, opened):
    root = lying(tmp_path / "in", {**COUNTED, "dataset.json": edm(list(PAIRS.items()))})
    source = opened(root)
    assert source.classes == ["0", "1"] and labelled(source) == PAIRS and source.unused == []
    assert [label for _, label in source._files] == [0] * 4 + [1] * 4


def test_dataset_json_may_stand_in_a_folder_with_its_pictures_beside_other_things(tmp_path, opened):
    files = {f"images/{name}": None for name in PAIRS} | {"images/dataset.json": edm(list(PAIRS.items()))}
    latents = {f"vae-sd/00000/img-mean-std-{i:08d}.npy": b"x" for i in range(8)}
    source = opened(lying(tmp_path / "in", {**files, **latents, "vae-sd/dataset.json": edm([["a.npy", 0]])}))
    assert {name.removeprefix("images/"): label for name, label in labelled(source).items()} == PAIRS
    reasons = {one["reason"]: one["count"] for one in walk.grouped(source.unused)}
    assert reasons == {"no pictures by their names (.npy)": 8, labels.NO_PICTURE: 1}


def test_without_known_labels_the_pictures_of_dataset_json_are_one_class(tmp_path, opened):
    source = opened(lying(tmp_path / "in", {**COUNTED, "dataset.json": json.dumps({"labels": None})}))
    assert source.classes == ["0"] and set(labelled(source).values()) == {0}


def test_a_dataset_json_of_another_kind_is_a_file_that_is_not_used(tmp_path, opened):
    for other in ({"name": "cats"}, {"labels": ["cat", "dog"]}, [1, 2], {"labels": {"a": 1}}):
        source = opened(lying(tmp_path / "in", {"a/1.png": None, "b/2.png": None, "dataset.json": json.dumps(other)}))
        assert source.classes == ["a", "b"]
        assert source.unused == [("dataset.json", "no pictures by their names (.json)")]
    for elsewhere in (edm([["1.png", 0]]), json.dumps({"labels": None})):
        source = opened(lying(tmp_path / "in", {"dataset.json": "{}", "a/meta/dataset.json": elsewhere}))
        assert source.classes == ["a", "b"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (edm([*PAIRS.items()][:-1]), "dataset.json gives 00001/img00000007.png no label"),
        (
            edm([[name, [0.5, 1.0]] for name in PAIRS]),
            "dataset.json gives 00000/img00000000.png [0.5, 1.0], expected a",
        ),
        (edm([[name, -1] for name in PAIRS]), "gives 00000/img00000000.png -1, expected a number from 0"),
        (edm([[name, 2 * label] for name, label in PAIRS.items()]), "labels up to 2, but no picture has 1"),
        (edm([[name, 10**18 * label] for name, label in PAIRS.items()]), "labels up to 1000000000000000000, but no"),
        ("{", "dataset.json is no JSON"),
    ],
)
def test_labels_that_are_incomplete_are_refused_by_name(tmp_path, opened, written, words):
    root = lying(tmp_path / "in", {**COUNTED, "dataset.json": written})
    with pytest.raises(ValueError) as error:
        opened(root)
    assert words in str(error.value) and str(tmp_path / "in") in str(error.value)


def test_numbers_beside_pictures_are_labels_in_a_flat_folder_and_class_folders_are_kept(tmp_path):
    flat = {f"{i}.png": None for i in range(4)} | {f"{i}.cls": str(i % 2) for i in range(4)}
    root = lying(tmp_path / "flat", {**flat, "9.cls": "1"})
    source = prepare.open_source("folder", resolution=8, holdout=0, path=root)
    assert labelled(source) == {f"{i}.png": i % 2 for i in range(4)}
    assert source.unused == [("9.cls", "no pictures by their names (.cls)")]
    one = prepare.open_source("folder", resolution=8, holdout=0, path=root, classes=1)
    assert one.classes == ["all"] and len(one.unused) == 5
    root = lying(tmp_path / "in", {"a/1.png": None, "b/2.png": None, "a/1.cls": "1", "b/2.cls": "0"})
    source = prepare.open_source("folder", resolution=8, holdout=0, path=root)
    assert source.classes == ["a", "b"] and labelled(source) == {"a/1.png": 0, "b/2.png": 1}
    assert {name for name, _ in source.unused} == {"a/1.cls", "b/2.cls"}


def test_an_empty_number_beside_a_picture_is_refused_by_name(tmp_path, opened):
    files = {"0.png": None, "1.png": None, "0.cls": "0", "1.cls": b""}
    with pytest.raises(ValueError, match=r"in.*: the label of 1\.png is 'an empty file', expected a number"):
        opened(lying(tmp_path / "in", files))


# ---- a table


NAMES = ("a/1.png", "a/2.jpg.png", "b.png")
TABLES = {
    "as hubs have it": "file_name,caption,label\na/1.png,x,dog\na/2.jpg.png,y,cat\nb.png,z,dog\n",
    "without suffixes": "id,breed\na/1,dog\na/2.jpg,cat\nb,dog\n",
    "turned round": "breed,id\ndog,a/1\ncat,a/2.jpg\ndog,b\n",
    "of any names": '\ufeffPicture,Breed\r\n./a/1.png,dog\r\n\r\na\\2.jpg.png,cat\r\n"b.png", dog\r\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_names_and_labels_comes_before_folders(tmp_path, opened, name):
    (tmp_path / "labels.csv").write_text(TABLES[name], encoding="utf-8", newline="")
    source = opened(lying(tmp_path / "in", dict.fromkeys(NAMES)), labels=str(tmp_path / "labels.csv"))
    assert source.classes == ["cat", "dog"]
    assert labelled(source) == {"a/1.png": 1, "a/2.jpg.png": 0, "b.png": 1}


def test_labels_that_are_numbers_are_in_the_order_of_numbers_and_lost_names_are_named(tmp_path, opened):
    rows = "\n".join(["name,label", *(f"{i}.png,{i}" for i in range(12)), "gone.png,3"])
    (tmp_path / "labels.csv").write_text(rows)
    source = opened(lying(tmp_path / "in", {f"{i}.png": None for i in range(12)}), labels=str(tmp_path / "labels.csv"))
    assert source.classes == [str(i) for i in range(12)]
    assert labelled(source) == {f"{i}.png": i for i in range(12)}
    assert source.unused == [("gone.png", labels.NO_PICTURE)]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("name,label\na/1.png,1\n", "labels.csv: has no label for "),
        ("name,label\na/1.png,1\na/1.png,2\n", "labels.csv: 'a/1.png' has the labels '1' and '2', expected one"),
        ("name,x,y\na/1.png,1,2\n", "labels.csv: has columns name, x, y, expected a name and a column 'label'"),
        ("name,label\na/1.png\n", "labels.csv: line 2 has 1 columns, expected 2"),
        ("", "labels.csv: has columns none, expected"),
        (None, "labels.csv: expected a .csv of names and labels"),
    ],
)
def test_a_table_that_is_none_is_refused_by_name(tmp_path, table, words):
    if table is not None:
        (tmp_path / "labels.csv").write_text(table)
    root = lying(tmp_path / "in", dict.fromkeys(NAMES))
    with pytest.raises(ValueError) as error:
        prepare.open_source("folder", resolution=8, holdout=0, path=root, labels=str(tmp_path / "labels.csv"))
    assert words in str(error.value)


# ---- all the rest


def test_pictures_of_formats_that_are_not_read_and_all_other_files_are_named_with_the_reason(tmp_path, opened):
    others = ["a/x.gif", "b/deep/y.TIFF", "notes.txt", "a/no-suffix", "a/z.tar"]
    source = opened(lying(tmp_path / "in", {"a/1.png": None, "b/2.JPG": None, **dict.fromkeys(others, "x")}))
    assert source.count == 2
    assert dict(source.unused) == {
        "a/x.gif": "pictures of a format that is not read (.gif)",
        "b/deep/y.TIFF": "pictures of a format that is not read (.tiff)",
        "notes.txt": "no pictures by their names (.txt)",
        "a/no-suffix": "no pictures by their names (no suffix)",
        "a/z.tar": "files of .tar, which another images.source reads",
    }


def test_where_no_picture_is_found_it_is_said_what_lies_there(tmp_path):
    root = lying(tmp_path / "in", {"a/1.heic": "x", "2.txt": "x"})
    with pytest.raises(ValueError, match=r"in: found no pictures, .*; not used: .*no pictures by .*2.txt"):
        listing.survey("folder", str(root), 0)
