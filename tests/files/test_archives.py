"""Pictures in archives are those of the folder, in its order; what cannot be trusted is refused by name."""

import io
import json
import os
import random
import resource
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from haste.cli import main as cli
from haste.data import prepare
from haste.files.archives import Archives
from haste.files.store import Store

CLASSES = ("cat", "dog", "emu")


def picture(level, suffix="png"):
    file = io.BytesIO()
    Image.new("RGB", (12, 9), (level, level // 2, 255 - level)).save(file, format="PNG" if suffix == "png" else "JPEG")
    return file.getvalue()


def pictures():
    """Name -> content, three classes of four, one of them deeper."""
    found = {f"{name}/{i}.png": picture(60 * place + i) for place, name in enumerate(CLASSES) for i in range(3)}
    return {**found, **{f"{name}/deep/x.jpg": picture(60 * place + 9, "jpg") for place, name in enumerate(CLASSES)}}


def unpacked(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def packed(path, files, seed=0, method=zipfile.ZIP_STORED):
    """An archive of files in an order that means nothing."""
    names = list(files)
    random.Random(seed).shuffle(names)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in names:
                archive.writestr(name, files[name])
        return path
    with tarfile.open(path, "w") as archive:
        for name in names:
            add(archive, name, files[name])
    return path


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def opened(path, source="archive", holdout=4, **options):
    return prepare.open_source(source, resolution=8, holdout=holdout, path=path, **options)


def seen(source):
    """Classes, and every picture with its label in order."""
    loaded = [source.load(i) for i in range(source.count)]
    return source.classes, [(image.tobytes(), label) for image, label in loaded]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("above", ["", "train/", "./"])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "deflated.zip"])
def test_an_archive_gives_what_the_folder_gives_in_whatever_order_it_was_packed(tmp_path, name, above, labelled):
    folder = opened(unpacked(tmp_path / "in", pictures()), "folder", labelled=labelled)
    method = zipfile.ZIP_DEFLATED if name.startswith("deflated") else zipfile.ZIP_STORED
    files = {above + name: content for name, content in pictures().items()}
    files |= {f"__MACOSX/{above}cat/._0.png": b"no picture", f"{above}notes.txt": b"x"}
    for seed in (1, 2):
        archive = opened(packed(tmp_path / name, files, seed, method), labelled=labelled)
        assert seen(archive) == seen(folder)
        assert (archive.count, archive.holdout) == (12, 4) and archive.listing == folder.listing


def test_archives_of_a_folder_are_taken_together(tmp_path):
    files, shards = pictures(), tmp_path / "shards"
    shards.mkdir()
    packed(shards / "0.tar", dict(list(files.items())[::2]))
    packed(shards / "1.zip", dict(list(files.items())[1::2]))
    (shards / "README").write_text("x")
    assert seen(opened(shards)) == seen(opened(unpacked(tmp_path / "in", files), "folder"))


def test_numbers_beside_the_pictures_are_their_labels(tmp_path):
    files = {f"{i:06d}.jpg": picture(10 * i, "jpg") for i in range(8)}
    packed(tmp_path / "a.tar", {**files, **{f"{i:06d}.cls": str(i % 3).encode() for i in range(8)}})
    classes, found = seen(opened(tmp_path / "a.tar", holdout=0))
    assert classes == ["0", "1", "2"] and [label for _, label in found] == [0, 0, 0, 1, 1, 1, 2, 2]
    expected = seen(opened(unpacked(tmp_path / "in", files), "folder", holdout=0))[1]
    assert found[3][0] == expected[1][0]  # the first of label 1 is 000001
    packed(tmp_path / "b.tar", {**files, **{f"{i:06d}.cls": b"1" for i in range(7)}})
    with pytest.raises(ValueError, match=r"b\.tar: the label of 000007\.jpg is 'no \.cls beside it'"):
        opened(tmp_path / "b.tar")
    packed(tmp_path / "c.tar", {**files, **{f"{i:06d}.cls": b"2" for i in range(8)}})
    with pytest.raises(ValueError, match="labels up to 2, but no picture has 0"):
        opened(tmp_path / "c.tar")


def labelled(source):
    """Picture -> class, by what is loaded."""
    return {source.name(i): source.classes[source.load(i)[1]] for i in range(source.count)}


def test_shards_whose_names_begin_anew_in_each_are_kept_apart(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        images = {f"{i:06d}.jpg": picture(60 * shard + i, "jpg") for i in range(3)}
        packed(shards / f"{shard}.tar", {**images, **{f"{i:06d}.cls": b"%d" % ((i + shard) % 2) for i in range(3)}})
    source = opened(shards, holdout=0)
    expected = {f"{shard}.tar/{i:06d}.jpg": str((i + shard) % 2) for shard in range(2) for i in range(3)}
    assert labelled(source) == expected and not source.unused
    unlabelled = opened(shards, holdout=0, labelled=False)
    assert unlabelled.count == 6 and [unlabelled.name(i) for i in range(6)] == sorted(expected)
    for shard in range(2):
        packed(shards / f"{shard}.tar", {f"{name}/0.png": picture(60 * shard) for name in "ab"})
    assert labelled(opened(shards, holdout=0)) == {f"{s}.tar/{name}/0.png": name for s in range(2) for name in "ab"}


def test_numbers_in_another_archive_than_their_pictures_are_labels_too(tmp_path):
    (tmp_path / "both").mkdir()
    packed(tmp_path / "both/images.tar", {f"{i}.jpg": picture(i, "jpg") for i in range(4)})
    packed(tmp_path / "both/labels.tar", {f"{i}.cls": b"%d" % (i % 2) for i in range(4)})
    source = opened(tmp_path / "both", holdout=0)
    assert labelled(source) == {f"{i}.jpg": str(i % 2) for i in range(4)} and not source.unused


def test_two_archives_with_a_dataset_json_each_have_their_own_labels(tmp_path):
    (tmp_path / "both").mkdir()
    for part in range(2):
        table = json.dumps({"labels": [[f"00000/{i}.png", (i + part) % 2] for i in range(2)]}).encode()
        packed(
            tmp_path / f"both/{part}.zip", {"dataset.json": table, **{f"00000/{i}.png": picture(i) for i in range(2)}}
        )
    expected = {f"{part}.zip/00000/{i}.png": str((i + part) % 2) for part in range(2) for i in range(2)}
    assert labelled(opened(tmp_path / "both", holdout=0)) == expected


@pytest.mark.parametrize("form", ["a folder of class tars", "a tar of class tars"])
def test_a_tar_called_name_is_class_name_where_archives_alone_part_the_pictures(tmp_path, form):
    (tmp_path / "in").mkdir()
    for place, name in enumerate(CLASSES):
        packed(tmp_path / f"in/{name}.tar", {f"{name}_{i}.JPEG": picture(60 * place + i, "jpg") for i in range(3)})
    path = tmp_path / "in"
    if form == "a tar of class tars":
        path = packed(tmp_path / "train.tar", {f"{name}.tar": (path / f"{name}.tar").read_bytes() for name in CLASSES})
    source = opened(path, holdout=0)
    assert labelled(source) == {f"{name}_{i}.JPEG": name for name in CLASSES for i in range(3)}
    as_folder = {
        f"{name}/{name}_{i}.JPEG": picture(60 * p + i, "jpg") for p, name in enumerate(CLASSES) for i in range(3)
    }
    assert seen(source) == seen(opened(unpacked(tmp_path / "out", as_folder), "folder", holdout=0))
    # As it was before such archives were classes: where one class is expected, they are one.
    assert opened(path, holdout=0, classes=1).classes == ["all"]


def test_many_class_tars_are_read_with_few_files_open_at_once(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "in").mkdir()
    for place in range(100):
        packed(tmp_path / f"in/{place:03d}.tar", {"0.png": picture(place), "1.png": picture(place)})
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert prepare.check(opened(tmp_path / "in")) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_zips_of_classes_are_classes_and_as_many_are_opened_as_there_are(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "in").mkdir()
    for place in range(60):
        packed(tmp_path / f"in/{place:03d}.zip", {f"{place}.png": picture(place)})
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert labelled(opened(tmp_path / "in", holdout=0)) == {f"{place}.png": f"{place:03d}" for place in range(60)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.timeout(60)
def test_an_entry_whose_size_leads_back_to_the_first_one_is_refused(tmp_path):
    content = bytearray(packed(tmp_path / "a.tar", {"a.png": bytes(10), "b.png": bytes(10)}).read_bytes())
    header = content[1024:1536]
    header[124:136] = (-1536).to_bytes(12, "big", signed=True)  # as GNU's tar writes large numbers
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar: expected a \.tar, found .* has no size"):
        Archives(tmp_path / "a.tar")


def test_a_tar_beside_pictures_in_a_tar_is_named_and_not_opened(tmp_path):
    inner = packed(tmp_path / "inner.tar", {"cat/9.png": picture(9)}).read_bytes()
    source = opened(packed(tmp_path / "a.tar", {**pictures(), "cat/more.tar": inner}))
    assert source.count == 12
    assert source.unused == [("cat/more.tar", "files of .tar, which another images.source reads")]


def test_what_cannot_be_read_is_no_archive_whatever_its_name(tmp_path):
    (tmp_path / "in" / "folder.tar").mkdir(parents=True)
    packed(tmp_path / "in/a.tar", pictures())
    (tmp_path / "in/b.tar").symlink_to("nowhere")
    (tmp_path / "in/c.tar").touch()
    os.mkfifo(tmp_path / "in/d.zip")
    reasons = {"b.tar": "a link to nothing", "c.tar": "an empty file", "d.zip": "not a regular file"}
    assert dict(opened(tmp_path / "in").unused) == reasons


def test_tars_that_were_joined_by_cat_are_read_to_the_end_and_such_zips_are_refused(tmp_path):
    files = pictures()
    halves = dict(list(files.items())[::2]), dict(list(files.items())[1::2])
    for kind in ("tar", "zip"):
        parts = [packed(tmp_path / f"{i}.{kind}", half).read_bytes() for i, half in enumerate(halves)]
        (tmp_path / f"all.{kind}").write_bytes(b"".join(parts))
    assert seen(opened(tmp_path / "all.tar")) == seen(opened(unpacked(tmp_path / "in", files), "folder"))
    with pytest.raises(ValueError, match=r"all\.zip: has [\d,]+ bytes before its first file: archives joined by cat"):
        opened(tmp_path / "all.zip")
    whole = packed(tmp_path / "a.tar", files).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + bytes(5000) + b"more")
    with pytest.raises(ValueError, match=r"a\.tar: .*\(.* bytes behind its end are no archive"):
        opened(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole + bytes(5000))
    assert opened(tmp_path / "a.tar").count == len(files)


def test_all_that_is_not_used_in_or_beside_archives_is_named_with_the_reason(tmp_path):
    shards = tmp_path / "shards"
    (shards / "deeper").mkdir(parents=True)
    packed(shards / "0.tar", {**pictures(), ".DS_Store": b"x", "__MACOSX/cat/x.png": b"x", "cat/x.gif": b"x"})
    packed(shards / "deeper/1.tar", pictures())
    (shards / "loose.png").write_bytes(picture(1))
    with tarfile.open(shards / "2.tar.gz", "w:gz"):
        pass
    source = opened(shards)
    assert source.count == 12 and dict(source.unused) == {
        "0.tar/.DS_Store": "hidden, or left there by a program",
        "0.tar/__MACOSX/cat/x.png": "hidden, or left there by a program",
        "0.tar/cat/x.gif": "pictures of a format that is not read (.gif)",
        "2.tar.gz": "compressed as a whole",
        "deeper/1.tar": "an archive in a folder below",
        "loose.png": "beside the archives, not in one",
    }
    (shards / "0.tar").unlink()
    with pytest.raises(ValueError, match="a folder without archives, expected .zip or .tar; they are in deeper"):
        opened(shards)


SMALL = {f"{name}/{i}.png": bytes([65 + i]) * (300 + i) for name in "ab" for i in range(3)}
EDITS = st.lists(
    st.tuples(st.integers(0, 20_000), st.integers(0, 255), st.sampled_from("ssszc+")), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Archives of `SMALL`, by kind, and a place to write damaged ones to."""
    folder = tmp_path_factory.mktemp("whole")
    made = {kind: packed(folder / f"a.{kind}", SMALL, method=zipfile.ZIP_DEFLATED) for kind in ("zip", "tar")}
    with tarfile.open(folder / "long.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in SMALL.items():
            add(archive, "x" * 120 + name, content)
    nested = packed(folder / "nested.tar", {"a.tar": made["tar"].read_bytes()})
    whole = {**made, "long": folder / "long.tar", "nested": nested}
    return {
        kind: path.read_bytes().rstrip(b"\0") + bytes(1024) * (kind != "zip") for kind, path in whole.items()
    }, folder


@settings(max_examples=2000, deadline=None)
@given(kind=st.sampled_from(["zip", "tar", "long", "nested"]), edits=EDITS)
def test_of_a_damaged_archive_every_file_is_right_or_refused_by_name(whole, kind, edits):
    contents, folder = whole
    content = bytearray(contents[kind])
    for at, byte, how in edits:
        at %= len(content) + 1
        if how == "s" and at < len(content):
            content[at] = byte
        elif how == "z":
            content[at : at + 12] = b"\xff" * 12
        elif how == "c":
            content = content[:at]
        else:
            content[at:at] = bytes([byte]) * (byte % 20)
    path = folder / f"damaged.{'zip' if kind == 'zip' else 'tar'}"
    path.write_bytes(content)
    try:
        found = Archives(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}")
        return
    for name in found.names:
        assert ".." not in name and not any("/" in part for part in name)
        try:
            read = found.read(name)
        except ValueError:
            continue
        if kind == "zip":  # whose files have checksums; a .tar has one of each header only
            assert read in SMALL.values()


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_file_that_climbs_out_is_refused_by_name(tmp_path, name, kind):
    packed(tmp_path / f"a.{kind}", {**pictures(), name: picture(1)})
    with pytest.raises(ValueError, match="leads out of the archive") as error:
        opened(tmp_path / f"a.{kind}")
    assert repr(name) in str(error.value)


def test_an_encrypted_file_is_refused_by_name(tmp_path):
    path = packed(tmp_path / "a.zip", {"cat/0.png": picture(1), "cat/1.png": picture(2)})
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")  # the last entry of the directory; its flags say that it is encrypted
    content[place + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: 'cat/[01]\.png' is encrypted"):
        opened(path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_refused_by_name(tmp_path, kind, share):
    path = packed(tmp_path / f"a.{kind}", pictures())
    content = path.read_bytes()
    if kind == "tar":
        content = content.rstrip(b"\0")  # what stands behind its end says nothing
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"a\.{kind}: .*truncated"):
        opened(path)


def test_a_tar_that_is_cut_between_two_files_is_refused(tmp_path):
    path = packed(tmp_path / "a.tar", pictures())
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[5].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="truncated after 5 entries, it has no end"):
        opened(path)


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        add(archive, "cat/0.png", picture(1))
    (tmp_path / "empty").mkdir()
    packed(tmp_path / "none.tar", {"cat/notes.txt": b"x"})
    for name, words in [
        ("a.tar", "expected a .tar, found a truncated or foreign file"),
        ("a.zip", "expected a .zip, found a truncated or foreign file"),
        ("a.tar.gz", "compressed as a whole"),
        ("empty", "a folder without archives"),
        ("gone.zip", "found nothing"),
        ("none.tar", "found no pictures"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            opened(tmp_path / name)
        assert name in str(error.value)


def test_a_name_that_stands_there_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "cat/0.png", picture(1))
        add(archive, "./cat/0.png", picture(2))
    with pytest.raises(ValueError, match=r"'\./cat/0\.png' is twice|'cat/0\.png' is twice"):
        opened(tmp_path / "a.tar")


def test_a_damaged_file_or_a_link_is_one_bad_picture_and_the_others_can_be_used(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            add(archive, f"cat/{i}.png", picture(i))
        link = tarfile.TarInfo("cat/3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "cat/4.png", b"")
    bad = prepare.check(opened(tmp_path / "a.tar", holdout=1))
    assert sorted(bad) == [("3.png", "a link in the archive, or no regular file"), ("4.png", "an empty file")]
    path = packed(tmp_path / "a.zip", {f"cat/{i}.png": picture(i) for i in range(3)})
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255  # inside one picture: its checksum is wrong
    path.write_bytes(content)
    ((name, reason),) = prepare.check(opened(path, holdout=1))
    assert name.endswith(".png") and "damaged in the archive (Bad CRC-32" in reason


def test_threads_read_the_same_pictures(tmp_path):
    for kind in ("zip", "tar"):
        path = packed(tmp_path / f"a.{kind}", {f"cat/{i:03d}.png": picture(i) for i in range(100)})
        source = opened(path, holdout=0)
        alone, together = (
            [image for batch in prepare._attempts(source, range(100), workers) for image, _ in batch]
            for workers in (1, 4)
        )
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_configuration_with_an_archive_makes_the_latents_of_the_folder(tiny, tmp_path):
    import yaml

    files = {f"{name}/{i}.png": picture(80 * place + i) for place, name in enumerate("ab") for i in range(20)}
    unpacked(tmp_path / "in", files)
    packed(tmp_path / "in.zip", {f"in/{name}": content for name, content in files.items()})
    found = []
    for source, path in (("folder", "in"), ("archive", "in.zip")):
        images = {"source": source, "path": str(tmp_path / path), "resolution": 8, "classes": 2, "holdout": 8}
        root = tmp_path / f"results-{source}"
        autoencoder = {**tiny["autoencoder"], "shards": 1}
        config = {**tiny, "images": images, "autoencoder": autoencoder, "results": str(root)}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        for step in (["images", "--shard", "0"], ["images", "--join"], ["autoencoder"], ["latents", "--shard", "0"],
                     ["latents", "--join"], ["plan"]):  # fmt: skip
            assert cli.main([*step, "-c", str(tmp_path / "c.yaml")]) == 0, step
        (folder,) = root.glob("stores/latents-*")
        with Store.open(folder) as store:
            found.append({name: store.read(name, range(store.count)).tobytes() for name in store.fields})
    assert found[0] == found[1] and found[0]
