"""Captions from outside: COCO's annotations, tables, the .txt beside a picture. What went in comes back."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import tarfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from haste.data import pictures, prepare
from haste.files import captions, listing, texts

STRANGE = [
    "\ufeffa cat",
    "two\nlines\r\nthree",
    "<b>&amp;</b>",
    "a, \"b\" 'c'",
    "nul\0nul",
    "\u2028\u0085 x",
    "é" * 10_000,
]
TEXT = st.one_of(st.sampled_from(STRANGE), st.text(st.characters(exclude_categories=["Cs"]))).filter(str.strip)
LISTS = st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=5)
FUZZ = settings(max_examples=25, deadline=None)


def picture(path, size=(12, 10), shade=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 20, 30)).save(path)


def said(source):
    return [source.captions(i) for i in range(source.count)]


def opened(path, place, source="folder", holdout=0, **more):
    return prepare.open_source(
        source, resolution=8, holdout=holdout, labelled=False, path=str(path), captions=place and str(place), **more
    )


# ---- what went in comes back


@FUZZ
@given(LISTS)
@example([STRANGE])
def test_texts_that_come_back_from_the_store_are_those_that_went_in(tmp_path_factory, lists):
    folder = tmp_path_factory.mktemp("texts")
    entry = texts.write(folder, iter(lists))
    lines = (folder / texts.FILE).read_bytes().split(b"\n")[:-1]
    found = texts.Texts(lines, entry["sha256"], {})
    assert [found.of_image(i) for i in range(len(lists))] == lists and found.all() == [*itertools.chain(*lists)]
    assert entry["count"] == found.count == len(found.all()) and found.counts.tolist() == [*map(len, lists)]
    assert all(found.all()[found.first[i] + k] == text for i, one in enumerate(lists) for k, text in enumerate(one))


def coco(lists):
    images = [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(len(lists))]
    said = [(i, text) for i, one in enumerate(lists) for text in one]
    notes = [{"id": n, "image_id": 10 + i, "caption": text} for n, (i, text) in enumerate(said)]
    return json.dumps({"images": images, "annotations": notes[::-1]})


def json_lines(lists):
    return "".join(json.dumps({"file_name": f"{i}.png", "text": one}) + "\n" for i, one in enumerate(lists))


def table(lists):
    whole = io.StringIO()
    rows = csv.writer(whole)
    rows.writerow(["image", "caption"])
    rows.writerows([f"{i}.png", text] for i, one in enumerate(lists) for text in one)
    return whole.getvalue()


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "with a byte order mark"])
@pytest.mark.parametrize(("suffix", "written"), [(".json", coco), (".jsonl", json_lines), (".csv", table)])
@FUZZ
@given(lists=LISTS)
@example(lists=[STRANGE])
def test_texts_that_come_back_from_a_file_are_those_that_went_in(tmp_path_factory, suffix, written, mark, lists):
    file = tmp_path_factory.mktemp("files") / f"captions{suffix}"
    file.write_bytes((mark + written(lists)).encode())
    assert captions.read(file).texts == {f"{i}.png": one for i, one in enumerate(lists)}


@FUZZ
@given(TEXT.filter(lambda text: text[0] != "\ufeff" and text[-1] not in "\r\n"), st.sampled_from(["", "\n", "\r\n"]))
def test_a_text_beside_a_picture_comes_back_without_the_line_break_that_editors_add(text, end):
    content = ("\ufeff" + text + end).encode()
    (found,) = captions.beside({("a.txt",): ("a.txt",)}, lambda _: content, {("a.png",): ("a.png",)})
    assert found == (("a.png",), text)


# ---- sources


@pytest.fixture
def published(tmp_path):
    """COCO's layout: ids in another order than names."""
    root = tmp_path / "coco"
    ids = {"train2014": [9, 30, 25, 100], "val2014": [8, 7]}
    (root / "annotations").mkdir(parents=True)
    for split, numbers in ids.items():
        name = {n: f"COCO_{split}_{n}.png" for n in numbers}
        for n in numbers:
            picture(root / split / name[n], shade=n)
        notes = [{"id": 5 * n - k, "image_id": n, "caption": f"{n} {k}"} for n in numbers for k in range(1 + n % 2)]
        whole = {"images": [{"id": n, "file_name": name[n]} for n in numbers], "annotations": notes}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(whole))
        (root / "annotations" / f"instances_{split}.json").write_text("{}")
    picture(root / "test2014" / "a.png")
    return root


def test_coco_is_in_the_order_of_its_numbers_and_its_val_is_held_out(published):
    source = opened(published, None, "coco", holdout=2)
    assert [source.name(i).rpartition("_")[2] for i in range(6)] == [f"{n}.png" for n in (9, 25, 30, 100, 7, 8)]
    assert said(source) == [["9 1", "9 0"], ["25 1", "25 0"], ["30 0"], ["100 0"], ["7 1", "7 0"], ["8 0"]]
    assert (source.count, source.holdout) == (6, 2) and source.load(3)[0][0, 0, 0] == 100
    unused = {name for name, _ in source.unused}
    assert "test2014/a.png" in unused and not any("captions" in name for name in unused)
    with pytest.raises(ValueError, match="images.holdout: 3, but .* has 2 pictures of its own"):
        opened(published, None, "coco", holdout=3)
    some = opened(published, None, "coco", holdout=2, subset=3)
    kept = [some.name(i) for i in range(some.count)]
    assert some.count == 5 and kept == [name for i in range(6) if (name := source.name(i)) in kept]
    assert kept[3:] == [source.name(4), source.name(5)]


def test_files_as_coco_hands_them_out_are_read_with_all_that_stands_in_them(tmp_path):
    """Ids in no order, twelve digits in the names, grey and CMYK pictures, spaces and line breaks in captions."""
    said = {
        524291: ["A man  riding a wave on a surfboard. ", "Surfer on a wave\n"],
        42: ["A red bus."] * 2 + [" two words\n"],
        318219: ["A boy stands up.\n\n"],
    }
    about = {"description": "COCO 2014 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2014}
    licences = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}]
    (tmp_path / "annotations").mkdir()
    for split, numbers in {"train2014": [524291, 318219], "val2014": [42]}.items():
        (tmp_path / split).mkdir()
        images, notes = [], []
        for number in numbers:
            name = f"COCO_{split}_{number:012d}.jpg"
            mode = {42: "CMYK", 318219: "L", 524291: "RGB"}[number]
            Image.new(mode, (640, 480)).save(tmp_path / split / name, quality=95)
            images.append(
                {"license": 4, "file_name": name, "coco_url": f"http://images.cocodataset.org/{split}/{name}",
                 "height": 480, "width": 640, "date_captured": "2013-11-14 17:02:52",
                 "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg", "id": number}
            )  # fmt: skip
            notes += [
                {"image_id": number, "id": 900_000 - 7 * k - number, "caption": text}
                for k, text in enumerate(said[number])
            ]
        whole = {"info": {**about, "contributor": "COCO Consortium", "date_created": "2017/09/01"}, "images": images}
        whole |= {"licenses": licences, "annotations": notes}
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(whole))
    source = opened(tmp_path, None, "coco", holdout=1)
    assert [source.name(i) for i in range(3)] == [
        "train2014/COCO_train2014_000000318219.jpg",
        "train2014/COCO_train2014_000000524291.jpg",
        "val2014/COCO_val2014_000000000042.jpg",
    ]
    # a caption comes back to the character; those of an image are in the order of their annotations' ids
    assert [source.captions(i) for i in range(3)] == [said[n][::-1] for n in (318219, 524291, 42)]
    assert [source.load(i)[0].shape for i in range(3)] == [(8, 8, 3)] * 3
    assert source.load(0)[0].max() == 0 and source.load(2)[0].min() > 250  # CMYK of no ink is white


def test_annotations_order_the_pictures_of_a_folder_by_their_numbers(published):
    source = opened(published / "train2014", published / "annotations" / "captions_train2014.json")
    assert [one[-1] for one in said(source)] == ["9 0", "25 0", "30 0", "100 0"]


def test_what_is_missing_of_coco_is_named(published):
    (published / "train2014" / "COCO_train2014_25.png").unlink()
    with pytest.raises(ValueError, match=r"captions for 1 picture \(COCO_train2014_25.png\), which is not among"):
        opened(published, None, "coco", holdout=2)
    (published / "annotations" / "captions_train2014.json").unlink()
    with pytest.raises(ValueError, match="found no annotations/captions_trainYEAR.json"):
        opened(published, None, "coco", holdout=2)


def test_a_txt_beside_each_picture_is_its_caption_in_folders_and_in_archives(tmp_path):
    for name in ("000.a", "001.a"):
        picture(tmp_path / "shards" / f"{name}.png")
        (tmp_path / "shards" / f"{name[:3]}.txt").write_text(f"of {name}\n")
    assert said(opened(tmp_path / "shards", "beside")) == [["of 000.a"], ["of 001.a"]]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for path in sorted((tmp_path / "shards").iterdir()):
            archive.add(path, path.name)
    source = opened(tmp_path / "0.tar", "beside", "archive")
    assert said(source) == [["of 000.a"], ["of 001.a"]] and source.unused == []


@pytest.mark.parametrize("name", ["./in/a.jpg", "in\\a.jpg", "in/a.jpg", "./in/a"])
def test_a_pictures_name_may_be_written_as_tables_write_paths(tmp_path, name):
    picture(tmp_path / "p" / "in" / "a.jpg")
    for file, content in (
        ("a.jsonl", json.dumps({"file": name, "caption": "x"})),
        ("a.csv", f"file,caption\n{name},x"),
    ):
        (tmp_path / file).write_text(content)
        assert said(opened(tmp_path / "p", tmp_path / file)) == [["x"]]


def test_a_txt_that_cannot_be_read_is_refused_and_one_without_a_byte_is_an_empty_caption(tmp_path):
    for name in "ab":
        picture(tmp_path / "p" / f"{name}.png")
        (tmp_path / "p" / f"{name}.txt").write_text("" if name == "b" else "of a")
    assert said(opened(tmp_path / "p", "beside")) == [["of a"], []]
    (tmp_path / "p" / "b.txt").unlink()
    (tmp_path / "p" / "b.txt").symlink_to("nothing")
    with pytest.raises(ValueError, match="b.txt: a link to nothing, expected a caption"):
        opened(tmp_path / "p", "beside")


def test_pictures_without_a_caption_are_named_and_left_out_on_request(tmp_path):
    for name in "abc":
        picture(tmp_path / "p" / f"{name}.png")
    file = tmp_path / "said.jsonl"
    file.write_text('{"file": "a.png", "caption": ["one", " \\n", "two"]}\n{"file": "b", "caption": ""}\n')
    source = opened(tmp_path / "p", file)
    assert said(source) == [["one", "two"], [], []]
    assert sorted(source.unused) == [("a.png", "an empty caption"), ("b", "an empty caption")]
    found = listing.survey("folder", str(tmp_path / "p"), 0, None, str(file))
    with pytest.raises(ValueError, match=r"2 pictures \(b.png, c.png\) without a caption. .*on_bad_image: skip"):
        listing.check_captioned("p", found)
    bad = prepare.check(source)
    assert bad == [("b.png", "no caption"), ("c.png", "no caption")]
    assert said(opened(tmp_path / "p", file, without=frozenset(name for name, _ in bad))) == [["one", "two"]]


def test_an_edited_caption_changes_what_the_source_holds(tmp_path):
    picture(tmp_path / "p" / "a.png")
    file = tmp_path / "said.csv"

    def holds(text):
        file.write_text(f"file,caption\na.png,{text}\n")
        source = opened(tmp_path / "p", file)
        held = listing.held(listing.survey("folder", str(tmp_path / "p"), 0, None, str(file)))
        return source.listing, source.held(range(1)), held

    assert all(one != other for one, other in zip(holds("a"), holds("b"), strict=True))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "file,caption\nx.png,hello\n", "captions for 1 picture (x.png), which is not among the 1 pictures"),
        ("a.csv", b"file,caption\na.png,\xff\xfe\n", "a.csv: line 2: the caption of a.png is no UTF-8 text"),
        ("a.csv", "file,size,width\na.png,1,2\n", "columns file, size, width, expected a name and a column 'caption'"),
        ("a.jsonl", '{"file": "a.png", "caption": "x"}\n{"file": 3}\n', "line 2: has file, expected file_name"),
        ("a.jsonl", '{"file": "a.png", "caption": 3}\n', "line 1: the caption of a.png is '3', expected a text"),
        ("a.jsonl", '{"file": "a.png", "caption": "\\ud800"}\n', "is no UTF-8 text"),
        ("a.jsonl", "{", "line 1: is no JSON"),
        ("a.json", "[1]", "expected COCO's annotations"),
        ("a.json", '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 2, "caption":""}]}',
         "annotation 1 is of image 2, which is not among its images"),
        ("a.json", '{"images": [{"id": Infinity, "file_name": "a.png"}], "annotations": []}', "a.json: expected COCO"),
        ("a.json", '{"images": [], "annotations": [{"id": 1, "image_id": [1], "caption": ""}]}', "a.json: expected"),
        ("a.json", '{"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}], "annotations": []}',
         "of which some are equal"),
        ("a.xml", "<a/>", "expected captions in a .csv, .jsonl or COCO's .json, found .xml"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_of_captions_is_said_with_its_place(tmp_path, name, content, words):
    picture(tmp_path / "p" / "a.png")
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(words)):
        opened(tmp_path / "p", file)


# ---- the crop of U-ViT


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (9, 9), (64, 17)])
def test_centre_lanczos_is_uvits_crop(size):
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pixels = np.asarray(whole)
    side = min(size)
    square = pixels[(size[1] - side) // 2 : (size[1] + side) // 2, (size[0] - side) // 2 : (size[0] + side) // 2]
    expected = np.asarray(Image.fromarray(square).resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.asarray(pictures.centre_square(whole, 8)), expected)


def test_the_crop_of_a_source_is_the_one_that_is_asked_for(tmp_path):
    path = tmp_path / "p" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(path)
    with Image.open(path) as image:
        for crop, made in pictures.CROPS.items():
            expected = np.asarray(made(image.convert("RGB"), 8))
            np.testing.assert_array_equal(opened(tmp_path / "p", None, crop=crop).load(0)[0], expected)
