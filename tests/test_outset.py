"""What the first jobs would refuse, `haste plan` refuses in their words, by names and headers alone."""

import copy
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from haste.cli import main as cli
from haste.config import resolve
from haste.data import prepare
from haste.files import listing
from haste.files.npz import WIDTHS
from haste.plan.plan import Plan
from haste.score.features import reference_of_file

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())


def configured(folder, **changes):
    """A configuration without results, on disk."""
    raw = {**copy.deepcopy(TINY), "results": str(folder / "results"), **changes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return folder / "tiny.yaml"


def said(capsys, *command):
    """What a refused command says, without its own name."""
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == 2
    return capsys.readouterr().err.split(f"haste {command[0]}: ")[-1]


# ---- pictures


def png():
    file = io.BytesIO()
    Image.new("RGB", (12, 9)).save(file, format="PNG")
    return file.getvalue()


def source(folder, kind, names):
    """These files, empty unless they are pictures, in a folder or packed; where they are."""
    if kind == "folder":
        for name in names:
            (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "in" / name).write_bytes(png())
        (folder / "in").mkdir(exist_ok=True)
        return folder / "in"
    with zipfile.ZipFile(folder / "in.zip", "w") as archive:
        for name in names:
            archive.writestr(name, png())
    return folder / "in.zip"


TWELVE = [f"{name}/{i}.png" for name in "ab" for i in range(6)]
FLAT = [f"{i}.png" for i in range(12)]
PICTURES = {  # files, classes, holdout, what is said
    "all held out": (FLAT, 0, 12, "12 pictures to hold out of 12, expected 0..11"),
    "more held out": (TWELVE, 2, 99, "99 pictures to hold out of 12, expected 0..11"),
    "no pictures": (["a/b.txt"], 0, 2, "found no pictures, expected .png"),
    "no pictures of classes": (["a.txt"], 2, 2, "found no pictures, expected .png"),
    "nothing": ([], 0, 2, "found no pictures, expected .png"),
    "hidden ones": ([".a.png", "._b.png"], 0, 2, "found no pictures, expected .png"),
    "other classes": (TWELVE, 3, 2, "images.classes: 3, but "),
    "pictures beside classes": ([*TWELVE, "0.png"], 2, 2, "found both class folders ('a') and pictures ('0.png')"),
}


@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_the_first_job_refuses_are_refused_by_the_plan_in_its_words(tmp_path, capsys, name, kind):
    files, classes, holdout, words = PICTURES[name]
    images = {"source": kind, "path": str(source(tmp_path, kind, files)), "resolution": 8}
    file = configured(tmp_path, images={**images, "classes": classes, "holdout": holdout})
    plan, job = (said(capsys, *command, "-c", file) for command in (["plan"], ["images", "--shard", 0]))
    assert plan == job
    assert words in plan and str(tmp_path / "in") in plan


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"source": "digits", "holdout": 1797, "classes": 10}, "digits: 1797 pictures to hold out of 1797"),
        (
            {"source": "digits", "holdout": 97, "classes": 9},
            "images.classes: 9, but digits has 10 (0, 1, 2, 3, 4, ...)",
        ),
        ({"source": "folder", "path": "nowhere"}, "nowhere: expected a folder of images, found nothing"),
        ({"source": "folder", "path": __file__}, "test_outset.py: expected a folder of images, found a file"),
        (
            {"source": "archive", "path": __file__},
            "test_outset.py: expected .zip, .tar or a folder of these, found .py",
        ),
    ],
)
def test_a_source_that_is_none_is_refused_by_the_plan_in_the_words_of_the_job(tmp_path, capsys, images, words):
    file = configured(tmp_path, images={"resolution": 8, "classes": 2, "holdout": 2, **images})
    plan, job = (said(capsys, *command, "-c", file) for command in (["plan"], ["images", "--shard", 0]))
    assert plan == job and words in plan


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_what_the_plan_counts_is_what_the_job_reads(tmp_path, kind, classes):
    path = source(tmp_path, kind, [*TWELVE, "a/.hidden.png", ".cache/x.png", "a/deep/x.JPG", "b/notes.txt"])
    found = prepare.open_source(kind, resolution=8, holdout=2, path=path, labelled=bool(classes))
    counted = listing.survey(kind, str(path), classes)
    assert (len(counted.files), counted.classes) == (found.count, found.classes) == (13, found.classes)
    assert sorted(counted.unused) == sorted(found.unused)
    assert {name for name, _ in found.unused} == {
        "a/.hidden.png",
        ".cache/" if kind == "folder" else ".cache/x.png",
        "b/notes.txt",
    }


def test_labels_beside_the_pictures_are_left_to_the_job_for_each_is_a_file_to_read(tmp_path, monkeypatch):
    path = source(tmp_path, "archive", ["0.jpg", "0.cls", "1.jpg"])
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("read"))
    counted = listing.survey("archive", str(path), 2)
    assert (len(counted.files), counted.classes, counted.unused) == (2, None, [])


def test_a_finished_store_needs_its_source_no_more(make_plan, capsys):
    images = {**TINY["images"], "source": "folder", "path": "gone", "classes": 2}
    plan = make_plan(images=images)
    assert "gone" in said(capsys, "plan", "-c", plan.file)
    shutil.copytree(make_plan().images.folder, plan.images.folder)
    plan = make_plan(images=images)
    assert plan.image_count == 1797
    assert cli.main(["plan", "-c", str(plan.file)]) == 0


def test_a_source_is_walked_once_a_plan(tmp_path, monkeypatch):
    images = {"source": "folder", "path": str(source(tmp_path, "folder", FLAT)), "resolution": 8, "classes": 0}
    walked, survey = [], listing.survey
    monkeypatch.setattr(listing, "survey", lambda *given: (walked.append(given), survey(*given))[1])
    runs = {f"{name} {i}": {"alignment": name, "stop": i} for name in ("REPA", "HASTE") for i in range(1, 51)}
    file = configured(tmp_path, images={**images, "holdout": 2}, runs=runs)
    assert cli.main(["plan", "-c", str(file)]) == 0
    assert len(walked) == 1


# ---- a reference


def adm(path, **changes):
    """A file as ADM's, with some arrays replaced; None leaves one out."""
    arrays = {"arr_0": np.zeros((5, 32, 32, 3), np.uint8)}
    arrays |= {f"mu{end}": np.zeros(WIDTHS[name]) for name, end in (("pool", ""), ("spatial", "_s"))}
    arrays |= {f"sigma{end}": np.zeros(2 * (WIDTHS[name],)) for name, end in (("pool", ""), ("spatial", "_s"))}
    np.savez_compressed(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})


def truncated_inside(path):
    """An .npz whose directory is whole and whose `mu` ends before it should."""
    adm(path)
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in found.items():
            archive.writestr(name, content[:-8] if name == "mu.npy" else content)


def cut(path):
    adm(path)
    path.write_bytes(path.read_bytes()[:-100])


REFERENCES = {
    "no images": (lambda path: adm(path, arr_0=None), "expected ADM's mu, sigma and arr_0 (images), found mu and"),
    "no mu": (lambda path: adm(path, mu=None), "expected ADM's mu, sigma and arr_0 (images), found arr_0 and mu_s"),
    "no sigma": (lambda path: adm(path, sigma=None), "holds mu without sigma"),
    "nothing of it": (
        lambda path: np.savez(path, x=np.zeros(3)),
        "expected ADM's mu, sigma and arr_0 (images), found x",
    ),
    "no array": (lambda path: np.savez(path), "expected ADM's mu, sigma and arr_0 (images), found nothing"),
    "another width": (lambda path: adm(path, mu=np.zeros(64)), "mu and sigma are (64,) and (2048, 2048), expected"),
    "a sigma of no square": (
        lambda path: adm(path, sigma_s=np.zeros((2023, 3))),
        "mu_s and sigma_s are (2023,) and (2023, 3)",
    ),
    "whole numbers": (lambda path: adm(path, mu=np.zeros(2048, int)), "mu and sigma are int64 and float64, expected"),
    "pickled": (lambda path: adm(path, mu=np.array([None] * 2048)), "mu is pickled, which is never read"),
    "images of floats": (lambda path: adm(path, arr_0=np.zeros((5, 32, 32, 3))), "arr_0 holds float64, expected uint8"),
    "images of one channel": (lambda path: adm(path, arr_0=np.zeros((5, 32, 32), "u1")), "arr_0 has shape (5, 32, 32)"),
    "no image": (lambda path: adm(path, arr_0=np.zeros((0, 32, 32, 3), "u1")), "found no images under arr_0"),
    "truncated": (cut, "expected an .npz, found a truncated or foreign file"),
    "truncated inside": (truncated_inside, "mu is truncated or damaged: found 16,504 bytes, expected 16,512"),
    "no zip": (lambda path: path.write_bytes(b"hello"), "expected an .npz, found a truncated or foreign file"),
    "empty": (lambda path: path.write_bytes(b""), "expected an .npz, found a truncated or foreign file"),
    "one bare array": (lambda path: np.save(path.open("wb"), np.zeros(3)), "expected an .npz, found a truncated or"),
}


def judged_by(path):
    images = {**TINY["images"], "resolution": 32}
    return {"images": images, "detector": {"fid": {"pretrained": {"name": "inception"}, "reference": str(path)}}}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_that_the_job_refuses_is_refused_by_the_plan_in_its_words(tmp_path, capsys, name):
    make, words = REFERENCES[name]
    path = tmp_path / "ref.npz"
    make(path)
    plan = said(capsys, "plan", "-c", configured(tmp_path, **judged_by(path)))
    assert f"{path}: {words}" in plan
    with pytest.raises(ValueError) as job:
        reference_of_file(path, None, folder=tmp_path / "out", key="k", recipe={})
    assert str(job.value) == plan.rstrip("\n")


def test_of_a_reference_the_headers_alone_are_read(tmp_path, monkeypatch):
    path, given, read = tmp_path / "ref.npz", [], zipfile.ZipExtFile.read
    adm(path)
    plan = Plan(resolve({**copy.deepcopy(TINY), "results": str(tmp_path / "results"), **judged_by(path)}))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *asked: (given.append(read(*asked)), given[-1])[1])
    plan.check()
    assert 0 < sum(map(len, given)) < 5 * 200


def test_a_reference_that_is_gone_since_or_changed_after_it_was_used_stops_no_plan(tmp_path, capsys):
    path = tmp_path / "ref.npz"
    path.write_bytes(b"no longer one")
    file = configured(tmp_path, **judged_by(path))
    made = Path(Plan(resolve(yaml.safe_load(file.read_text()))).detector.reference.manifest)
    made.parent.mkdir(parents=True)
    made.touch()
    assert cli.main(["plan", "-c", str(file)]) == 0
    made.unlink()
    path.unlink()
    assert cli.main(["plan", "-c", str(file)]) == 0
    assert "ref.npz: is gone" in " ".join(capsys.readouterr().out.split())  # lines end where the terminal does
