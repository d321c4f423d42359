"""`haste new` writes a configuration that is valid, plans and prepares the pictures, or says what to do."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from haste import config
from haste.cli import main as cli
from haste.files.store import Store
from haste.networks import driver
from haste.plan.plan import Plan

SHIPPED = Path(__file__).parents[2] / "config"


def png(mode="RGB", size=(40, 36)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, format="PNG")
    return file.getvalue()


def files(folder, names, content=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if content is None else content)
    return folder


def flat(folder, count=24, **more):
    return files(folder, [f"{i:02d}.png" for i in range(count)], **more)


def classes(folder, names=("cat", "dog"), each=12, deeper=""):
    return files(folder, [f"{name}/{deeper}{i:02d}.png" for name in names for i in range(each)])


def zipped(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, png())
    return path


def zips(folder):
    for name in "ab":
        zipped(folder / f"{name}.zip", [f"{i}.png" for i in range(12)])
    return folder


def table(folder):
    lines = [f"{i:02d}.png,{'odd' if i % 2 else 'even'}" for i in range(24)]
    (flat(folder) / "labels.csv").write_text("\n".join(["name,label", *lines]))
    return folder


def beside(folder):
    for i in range(24):
        files(folder, [f"{i:02d}.cls"], content=str(i % 3).encode())
    return flat(folder)


def rows(path):
    images = [{"bytes": png(), "path": f"{i}.png"} for i in range(24)]
    pq.write_table(pa.table({"image": images, "label": [i % 3 for i in range(24)]}), path)
    return path


def camera(folder):
    """What people's folders hold beside pictures, and pictures of all kinds."""
    for i, mode in enumerate(("RGBA", "LA", "L", "P", "1", "I;16") * 4):
        files(folder, [f"{i:02d}.png"], content=png(mode))
    files(folder, ["broken.jpg"], content=b"\xff\xd8\xff")
    files(folder, ["notes.txt", "moving.gif", ".DS_Store"], content=b"x")
    (folder / "again.png").symlink_to("00.png")
    return folder


# What lies there, and what the file says of it: source, classes, resolution.
FOUND = {
    "flat": (lambda at: flat(at / "pictures"), "folder", 0, 32),
    "class folders": (lambda at: classes(at / "pictures"), "folder", 2, 32),
    "folders in class folders": (lambda at: classes(at / "pictures", deeper="a/b/"), "folder", 2, 32),
    "one class": (lambda at: classes(at / "pictures", ["cat"], 24), "folder", 0, 32),
    "classes of one picture": (lambda at: classes(at / "pictures", [f"{i}" for i in range(24)], 1), "folder", 0, 32),
    "pictures beside class folders": (lambda at: flat(classes(at / "pictures")), "folder", 0, 32),
    "an empty class folder": (lambda at: (classes(at / "p") / "none").mkdir() or at / "p", "folder", 0, 32),
    "small ones": (lambda at: flat(at / "pictures", content=png(size=(18, 20))), "folder", 0, 16),
    "of all kinds": (lambda at: camera(at / "pictures"), "folder", 0, 32),
    "a table of labels": (lambda at: table(at / "pictures"), "folder", 2, 32),
    "labels beside": (lambda at: beside(at / "pictures"), "folder", 3, 32),
    "odd names": (lambda at: classes(at / 'a: "b" #c\'s 写真', ["été ☀", "- {x}"]), "folder", 2, 32),
    "a name of digits": (lambda at: flat(at / "2024"), "folder", 0, 32),
    "a zip": (lambda at: zipped(at / "p.zip", [f"{c}/{i}.png" for c in "abc" for i in range(8)]), "archive", 3, 32),
    "zips": (lambda at: zips(at / "z"), "archive", 2, 32),
    "rows": (lambda at: rows(at / "train.parquet"), "parquet", 3, 32),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where nothing is, on a machine without GPUs."""
    (tmp_path / "z").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "equipment", list)
    return tmp_path


def new(*arguments):
    return cli.main(["new", *map(str, arguments)])


@pytest.mark.parametrize("name", FOUND)
def test_what_is_written_for_a_folder_is_valid_plans_and_prepares_its_pictures(name, elsewhere, capsys):
    make, source, count, resolution = FOUND[name]
    place = make(elsewhere).relative_to(elsewhere)
    assert new(place) == 0, capsys.readouterr().err
    file = capsys.readouterr().out.split(": written for")[0]
    plan = Plan(config.load(file))
    assert (plan.config.images.source, plan.config.images.classes) == (source, count)
    assert plan.config.images.resolution == resolution and plan.config.images.path == str(place)
    plan.check()  # as `haste plan` and the start of the workflow do
    for command in ("--check",), ("--shard", "0"), ("--join",):
        assert cli.main(["images", *command, "-c", file]) == 0, capsys.readouterr().err
    made = Store.open(plan.images.folder)
    assert made.count == (48 if name == "pictures beside class folders" else 24)
    assert len(made.manifest["classes"]) == count
    assert 0 < len(made.range("held_out")) < 24


REFUSED = {
    "nothing": (lambda at: at / "none", ["none: found nothing there", "expected a folder of pictures"]),
    "an empty folder": (lambda at: at / "z", ["z: found no pictures, expected .png"]),
    "two pictures": (lambda at: flat(at / "p", 2), ["found 2 pictures, expected at least 20", "name the folder above"]),
    "no pictures": (
        lambda at: flat(at / "p", content=b"x"),
        ["none of the 24 pictures", "can be read", "expected PNG"],
    ),
    "other formats": (lambda at: files(at / "p", ["a.gif", "b.tif"]), ["p: found no pictures", ".gif"]),
    "a text": (lambda at: files(at, ["a.txt"]) / "a.txt", ["a.txt: found a file of .txt, expected a folder"]),
    "a variable": (lambda at: flat(at / "$HOME"), ["$HOME: a configuration cannot hold this path", "ln -s"]),
    "a line break": (lambda at: flat(at / "a\nb"), [r"a\nb: a configuration cannot hold", "rename it"]),
    "splits": (
        lambda at: classes(at / "p", ["train", "val"], deeper="cat/"),
        ["p: its pictures are in train and val, splits of a data set and not classes", "alone, as in", "p/train"],
    ),
    "the training split alone": (lambda at: classes(at / "p", ["train"], 24), ["pictures are in train,", "p/train"]),
    "splits in a zip": (
        lambda at: zipped(at / "p.zip", [f"{s}/{i}.png" for s in ("Test", "validation") for i in range(12)]),
        ["pictures are in Test and validation, splits"],
    ),
    "splits as shards": (
        lambda at: (
            [zipped(at / f"z/in1k-{s}-0{n}.zip", ["1.png"]) for s in ("train", "val") for n in range(12)] and at / "z"
        ),
        ["z: its archives are of the splits train and val of a data set", "alone, in a folder of their own"],
    ),
    "splits as zips": (
        lambda at: [zipped(at / f"z/{s}.zip", [f"{i}.png" for i in range(12)]) for s in ("train", "test")] and at / "z",
        ["its archives are of the splits test and train"],
    ),
    "MS-COCO": (
        lambda at: (files(at / "p", ["annotations/captions_train2014.json"]), classes(at / "p", ["train2014"], 24))[1],
        ["p: found MS-COCO with its captions", "a copy of config/coco256.yaml", "p/train2014"],
    ),
    "a compressed tar": (
        lambda at: files(at, ["im.tar.gz"]) / "im.tar.gz",
        ["im.tar.gz: compressed as a whole, so that no picture can be read without all before it", "gunzip"],
    ),
    "a torn zip": (lambda at: files(at, ["a.zip"], content=b"PK\x03\x04") / "a.zip", ["a.zip", "truncated"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_can_be_trained_on_is_refused_with_what_to_do(name, elsewhere, capsys):
    make, words = REFUSED[name]
    place = make(elsewhere)
    assert new(place, "-o", "mine.yaml") == 2 and not Path("mine.yaml").exists()
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said


def tarred(path):
    with tarfile.open(path, "w") as archive:
        for i in range(24):
            for name, content in (("png", png()), ("cls", b"%d" % (i % 3)), ("txt", b"a picture")):
                entry = tarfile.TarInfo(f"{i:02d}.{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "make", [lambda at: tarred(at / "p.tar"), lambda at: table(at / "p"), lambda at: beside(at / "p")]
)
def test_what_says_the_labels_is_not_called_unused(elsewhere, capsys, make):
    assert new(make(elsewhere)) == 0
    assert "classes, and a machine" in (said := capsys.readouterr().out) and "not used: " not in said


def test_captions_beside_the_pictures_are_named_with_the_keys_that_train_with_them(elsewhere, capsys):
    assert new(tarred(elsewhere / "p.tar")) == 0
    said = capsys.readouterr().out
    assert "24 of 24 pictures have a .txt beside them, which is not used; if these are captions" in said
    assert "images.captions: beside and condition: captions train with them" in said


@pytest.mark.parametrize(
    ("each", "words"), [((12, 12), "each with 12 pictures"), ((12, 13), "'a' with 12 pictures to 'b'")]
)
def test_sizes_of_classes_are_said_once_where_they_are_equal(elsewhere, each, words):
    for name, count in zip("ab", each, strict=True):
        classes(elsewhere / "pictures", [name], count)
    assert new("pictures") == 0
    assert f"classes: 2 # {words}" in Path("config/pictures.yaml").read_text()


def test_a_file_that_is_there_is_never_written_over(elsewhere, capsys):
    flat(elsewhere / "pictures")
    assert new("pictures") == 0
    before = Path("config/pictures.yaml").read_text()
    assert new("pictures") == 2 and Path("config/pictures.yaml").read_text() == before
    assert (
        "config/pictures.yaml: is there already and is not changed; remove it, or name another"
        in capsys.readouterr().err
    )


SETTINGS = ("autoencoder", "teachers", "detector", "models", "alignments", "sampling", "defaults", "runs")


def written(*arguments):
    assert new(*arguments, "-o", "mine.yaml") == 0
    return yaml.safe_load(Path("mine.yaml").read_text())


def test_on_a_laptop_the_settings_are_those_of_the_small_configuration_that_is_shipped(elsewhere):
    found, shipped = (
        written(flat(elsewhere / "pictures", 72)),
        yaml.safe_load((SHIPPED / "my-images-small.yaml").read_text()),
    )
    for section in (*SETTINGS, "training"):
        assert found[section] == shipped[section], section


@pytest.mark.parametrize("count", [20, 50])
def test_a_step_takes_no_more_pictures_than_there_are_to_train_on(elsewhere, count):
    found = written(flat(elsewhere / "pictures", count))
    assert found["training"]["batch"] == {20: 16, 50: 32}[count]
    Plan(config.load("mine.yaml")).check()


@pytest.mark.parametrize("small", [False, True])
def test_on_gpus_they_are_those_of_the_large_one_unless_small_ones_are_asked_for(elsewhere, monkeypatch, small):
    monkeypatch.setattr(driver, "equipment", lambda: [driver.Equipment(85.9, True)] * 3)
    flat(elsewhere / "pictures", content=png(size=(300, 260)))
    found = written("pictures", *["--small"] * small)
    shipped = yaml.safe_load((SHIPPED / ("my-images-small.yaml" if small else "my-images.yaml")).read_text())
    for section in SETTINGS:
        assert found.get(section) == shipped.get(section), section
    assert small == ("processes" not in found["runtime"])
    if not small:
        runtime = found["runtime"]
        assert (runtime["processes"], runtime["gpu_memory_gb"], found["images"]["resolution"]) == (2, 85, 256)
        assert found["training"]["batch"] % (runtime["processes"] * runtime["accumulate"]) == 0
        config.load("mine.yaml")


@pytest.mark.parametrize(
    ("cores", "memory", "expected"), [(2, 8, (1, 2)), (16, 64, (4, 16)), (8, 3, (8, 8)), (1, 1, (1, 1))]
)
def test_jobs_share_the_cores_as_far_as_memory_goes(elsewhere, monkeypatch, capsys, cores, memory, expected):
    monkeypatch.setattr("haste.ops.new.cores", lambda: cores)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": memory * 1e9}))
    found = written(flat(elsewhere / "pictures"))
    assert found["runtime"]["threads"] == expected[0] and f"--cores {expected[1]} " in capsys.readouterr().out


def test_the_driver_says_what_whole_gpus_are(elsewhere, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    script = elsewhere / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\ncase $1 in -L) echo 'GPU 0: NVIDIA A100 (UUID: GPU-a)'; echo 'GPU 1: Tesla V100 (UUID: GPU-b)';;"
        "*) echo 'GPU-a, 81920, 8.0'; echo 'GPU-b, 16384, 7.0'; echo 'GPU-c, 16384, 7.0'; "
        "echo 'GPU-b, [N/A], 12.1'; echo 'Warning: a, b';; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{elsewhere}:{os.environ['PATH']}")
    monkeypatch.delenv(driver.VISIBLE, raising=False)
    driver._machine.cache_clear()
    try:
        assert [(round(one.gigabytes, 1), one.bf16) for one in driver.equipment()] == [(80.0, True), (16.0, False)]
        monkeypatch.setenv(driver.VISIBLE, "1")
        assert len(driver.equipment()) <= 1  # whichever CUDA calls 1
    finally:
        driver._machine.cache_clear()


def test_every_line_of_settings_that_follows_from_the_pictures_says_why(elsewhere):
    camera(elsewhere / "pictures")
    assert new("pictures") == 0
    lines = Path("config/pictures.yaml").read_text().splitlines()
    for key in ("path", "resolution", "classes", "holdout", "on_bad_image", "threads"):
        (line,) = (line for line in lines if line.strip().startswith(f"{key}:"))
        assert " # " in line, line
    assert any("with transparent areas, which become white" in line for line in lines)
    assert any("some cannot be read" in line for line in lines)
