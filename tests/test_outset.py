"""What the first jobs would refuse, `haste plan` refuses in their words, by names and headers alone."""

import argparse
import copy
import io
import json
import math
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import yaml
from PIL import Image

from haste import config
from haste.cli import main as cli
from haste.config import resolve
from haste.data import prepare
from haste.data.captions import Captions
from haste.files import listing
from haste.files.npz import WIDTHS
from haste.networks import autoencoder
from haste.networks.registry import TEACHERS
from haste.networks.spec import sit_shapes
from haste.plan.inputs import INPUTS
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


def test_a_batch_of_more_pictures_than_there_are_to_train_on_is_refused_by_the_plan(tmp_path, capsys):
    images = {"source": "digits", "resolution": 8, "classes": 10, "holdout": 97}
    for more, count in (({}, "1,700"), ({"subset": 11}, "11")):
        words = f"training.batch: 8,192, but digits has {count} images to train on; expected no more"
        file = configured(tmp_path, images=images | more, training={**TINY["training"], "batch": 8192})
        assert words in said(capsys, "plan", "-c", file)
    fits = configured(tmp_path, images=images | {"subset": 11}, training={**TINY["training"], "batch": 11})
    assert cli.main(["plan", "-c", str(fits)]) == 0


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


def test_a_table_of_labels_that_the_first_job_refuses_is_refused_by_the_plan_in_its_words(tmp_path, capsys):
    path, table = source(tmp_path, "folder", TWELVE), tmp_path / "labels.csv"
    images = {"path": str(path), "labels": str(table), "resolution": 8, "classes": 2, "holdout": 2}
    file = configured(tmp_path, images=images)
    for written, words in (("name,label\na/0.png,x\n", "labels.csv: has no label for a/1.png"), ("x", "has columns x")):
        table.write_text(written)
        plan, job = (said(capsys, *command, "-c", file) for command in (["plan"], ["images", "--shard", 0]))
        assert plan == job and words in plan
    table.write_text("name,label\n" + "".join(f"{name},{name[0]}\n" for name in TWELVE))
    assert cli.main(["plan", "-c", str(file)]) == 0


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


def test_pictures_that_are_fewer_than_expected_are_refused_and_the_number_is_in_no_name(tmp_path, capsys):
    path = source(tmp_path, "folder", TWELVE)
    images = {"source": "folder", "path": str(path), "resolution": 8, "classes": 2, "holdout": 2}
    names = []
    for more in ({}, {"expected": 12}, {"expected": 13}):
        file = configured(tmp_path, images={**images, **more})
        plan = Plan(resolve(yaml.safe_load(file.read_text())))
        names.append((plan.images.folder, plan.latents.folder, plan.report_made, plan.shown))
    assert names[0] == names[1] == names[2]
    assert f"images.expected: 13 pictures, but {path} has 12. Complete them" in said(capsys, "plan", "-c", file)
    assert cli.main(["images", "--shard", "0", "-c", str(file)]) == 0
    assert "images.expected: 13 pictures" in said(capsys, "images", "--join", "-c", file)
    assert not Path(plan.images.manifest).exists()


def test_what_is_not_there_yet_is_planned_with_the_numbers_that_are_known_and_named_by_its_keys(tmp_path, capsys):
    images = {"source": "folder", "path": str(tmp_path / "pictures"), "resolution": 32, "classes": 2, "holdout": 2}
    for more, size in (({"expected": 1000}, "3.07 MB"), ({}, "")):
        file = configured(tmp_path, **{**judged_by(tmp_path / "adm.npz"), "images": {**images, **more}})
        assert cli.main(["plan", "-c", str(file)]) == 2
        out, err = capsys.readouterr()
        (line,) = [line for line in out.splitlines() if line.startswith("│ images ")]
        assert line.split("│")[5].strip() == size
        assert ("thenumberofpicturesisnotknownyet" in "".join(out.split())) == (not more)
        for key, what in (("images.path", "pictures"), ("detector.fid.reference", "adm.npz")):
            assert f"{key}: {tmp_path / what}: expected a" in err and "correct the path" in err
    with pytest.raises(ValueError, match="detector.fid.reference: .*adm.npz"):
        Plan(resolve(yaml.safe_load(file.read_text())))


@pytest.mark.parametrize(("name", "side"), [("VIRTUAL_imagenet256_labeled", 256), ("VIRTUAL_imagenet512", 512)])
def test_a_missing_reference_of_adms_is_named_with_its_address(tmp_path, capsys, name, side):
    file = configured(tmp_path, **judged_by(tmp_path / f"{name}.npz"))
    where = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{side}/{name}.npz"
    assert where in said(capsys, "plan", "-c", file)


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
    "no mu": (
        lambda path: adm(path, mu=None),
        "expected mu and sigma, as ADM's and other references hold, found arr_0",
    ),
    "no sigma": (lambda path: adm(path, sigma=None), "holds mu without sigma"),
    "nothing of it": (
        lambda path: np.savez(path, x=np.zeros(3)),
        "expected mu and sigma, as ADM's and other references hold, found x",
    ),
    "no array": (
        lambda path: np.savez(path),
        "expected mu and sigma, as ADM's and other references hold, found nothing",
    ),
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
        reference_of_file(path, SimpleNamespace(kind="inception"), folder=tmp_path / "out", key="k", recipe={})
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
    reference = Plan(resolve(yaml.safe_load(file.read_text()))).detector.reference
    made = Path(reference.manifest)
    made.parent.mkdir(parents=True)
    for there in (reference.manifest, *reference.shard_files):
        Path(there).touch()
    assert cli.main(["plan", "-c", str(file)]) == 0
    made.unlink()
    path.unlink()
    assert cli.main(["plan", "-c", str(file)]) == 0
    assert "ref.npz:isgone" in "".join(capsys.readouterr().out.split())  # lines end where the terminal does


# ---- everything else that is named outside the configuration


def texts(model=config.Config, path=""):
    """The keys whose values are free text or lists of it, by their paths; other values are checked by the schema."""
    found = []
    for name, field in model.model_fields.items():
        at = f"{path}.{name}".lstrip(".")
        found += texts_in(field.annotation, at)
    return found


def texts_in(kind, at):
    if isinstance(kind, type) and issubclass(kind, config.Strict):
        return texts(kind, at)
    if get_origin(kind) is dict:
        return texts_in(get_args(kind)[1], f"{at}.NAME")
    if get_origin(kind) is Literal:
        return []
    return [at] if kind is str else list(dict.fromkeys(one for part in get_args(kind) for one in texts_in(part, at)))


# Free text that names nothing outside the configuration: what it names is checked by `resolve`.
WITHIN = {
    *("name", "title", "description", "results", "evaluate.NAME.method"),
    *("alignments.NAME.features.teacher", "alignments.NAME.attention.teacher", "measures.NAME.alignment"),
    *("measures.NAME.measure", "condition.name", "training.process.name", "models.NAME.architecture"),
    *("runs.NAME.stop.features.trigger", "runs.NAME.stop.attention.trigger", "sampling.NAME.sampler"),
    *(f"{rows}.NAME.{key}" for rows in ("runs", "evaluate") for key in ("model", "sampling", "measures")),
    *("sampling.NAME.prompts", "runtime.save_every"),
    *("runs.NAME.alignment", "runs.NAME.watch.trigger", "measures.NAME.teacher"),
    *("forks.NAME.run", "forks.NAME.sampling", "forks.NAME.measures"),
}


def test_whatever_a_configuration_names_outside_itself_is_looked_at_by_the_plan():
    found = {*texts(), *texts(Captions.Settings, "condition")}
    assert found - WITHIN == set(INPUTS) - {"runtime.trackers"}, (
        "say in haste.plan.inputs.INPUTS what looks at it before the first job"
    )


def test_the_document_lists_what_is_looked_at():
    page = Path(__file__).parent.parent.joinpath("docs", "architecture.md").read_text()
    table = page.split("## What is checked before the first job")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(INPUTS)


def thrown(capsys, *command):
    """What a refused command says; a job says the same as the plan."""
    return said(capsys, *command).strip()


AUTOENCODER = {"autoencoder": {"pretrained": {"encode": "vae", "channels": 4, "factor": 2}}}


def vae(folder, more=MappingProxyType({}), **changes):
    """An autoencoder's folder, whose weights are a header alone."""
    folder.mkdir()
    settings = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "latent_channels": 4, **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = autoencoder.shapes({**settings, "latent_channels": 4})
    sparse(folder / "diffusion_pytorch_model.safetensors", {**shapes, **more})


def sparse(path, shapes, dtype="F32"):
    """A file of weights, well-formed and full of zeros, that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


VAES = {  # what lies there -> what is said
    "nothing": (lambda folder: None, "no such folder"),
    "a file": (lambda folder: folder.write_bytes(b"x"), "a file"),
    "an empty folder": (lambda folder: folder.mkdir(), "config.json: expected an AutoencoderKL configuration"),
    "another network": (
        lambda folder: vae(folder, _class_name="UNet2DModel"),
        "_class_name is 'UNet2DModel', expected",
    ),
    "no weights": (
        lambda folder: (vae(folder), next(folder.glob("*.safetensors")).unlink()),
        "found no diffusion_pytorch_model.safetensors",
    ),
    "pickled weights": (
        lambda folder: (vae(folder), next(folder.glob("*.safetensors")).rename(folder / "diffusion_pytorch_model.bin")),
        "diffusion_pytorch_model.bin: pickled weights, which are not loaded",
    ),
    "truncated weights": (
        lambda folder: (vae(folder), [os.truncate(path, path.stat().st_size - 100) for path in folder.glob("*.safe*")]),
        "expected the weights of an autoencoder, found a truncated or foreign file (",
    ),
    "a pointer of git-lfs": (
        lambda folder: (
            vae(folder),
            next(folder.glob("*.safetensors")).write_text("version https://git-lfs.github.com"),
        ),
        "expected the weights of an autoencoder, found a pointer of git-lfs",
    ),
    "other channels": (
        lambda folder: vae(folder, latent_channels=16),
        "encoder.conv_out.weight (found (8, 16, 3, 3), expected (32, 16, 3, 3))",
    ),
    "a weight too many": (lambda folder: vae(folder, more={"x": (1,)}), "not known: x"),
    "another factor": (
        lambda folder: vae(folder, block_out_channels=[8, 8, 16]),
        "has 4 channels and factor 4, the configuration says 4 and 2",
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_an_autoencoder_that_the_job_refuses_is_refused_by_the_plan_in_its_words(make_plan, tmp_path, capsys, name):
    make, words = VAES[name]
    make(tmp_path / "vae")
    pretrained = {"encode": str(tmp_path / "vae"), "channels": 4, "factor": 2}
    plan = make_plan(autoencoder={"pretrained": pretrained})
    refused = thrown(capsys, "plan", "-c", plan.file)
    assert (words in refused and str(tmp_path / "vae") in refused) or "the configuration says" in refused
    if name != "another factor":  # the job opens the weights first, which are zeros here
        assert thrown(capsys, "latents", "--shard", 0, "-c", plan.file) == refused
    plan = make_plan(
        autoencoder={"pretrained": {**pretrained, "encode": "some/autoencoder", "decode": str(tmp_path / "vae")}}
    )
    assert thrown(capsys, "plan", "-c", plan.file) == refused


@pytest.mark.parametrize("where", ["plain", "fp16", "pipeline"])
def test_an_autoencoder_that_the_job_takes_is_taken_by_the_plan(make_plan, tmp_path, where):
    folder = tmp_path / "all" / "vae"
    folder.parent.mkdir()
    vae(folder)
    if where == "fp16":
        weights = folder / "diffusion_pytorch_model.safetensors"
        weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    given = {"encode": str(folder.parent if where == "pipeline" else folder), "channels": 4, "factor": 2}
    make_plan(autoencoder={"pretrained": given}).check()


def test_offline_only_what_lies_in_the_cache_is_taken_by_the_plan(make_plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    plan = make_plan(autoencoder={"pretrained": {"encode": "some/autoencoder", "channels": 4, "factor": 2}})
    plan.check()  # a job would fetch it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "autoencoder some/autoencoder: its weights" in thrown(capsys, "plan", "-c", plan.file)
    cached = tmp_path / "cache" / "models--some--autoencoder"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    vae(cached / "snapshots" / "abc")
    plan.check()
    (cached / "snapshots" / "abc").rename(tmp_path / "vae")  # a pipeline's repository
    (cached / "snapshots" / "abc").mkdir()
    (tmp_path / "vae").rename(cached / "snapshots" / "abc" / "vae")
    plan.check()


VIT = {"patch_embed.proj.weight": (768, 3, 14, 14), **{f"blocks.{i}.attn.qkv.weight": (2304, 768) for i in range(12)}}
SMALL = {"patch_embed.proj.weight": (384, 3, 14, 14), **{f"blocks.{i}.attn.qkv.weight": (1152, 384) for i in range(12)}}
NETWORKS = {
    "nothing": (None, "expected the weights of {}, found no file"),
    "a smaller one": (
        SMALL,
        "not weights of {}: found 12 blocks of width 384, patches of 14 px, expected 12 blocks of w",
    ),
    "other patches": ({**VIT, "patch_embed.proj.weight": (768, 3, 16, 16)}, "patches of 16 px, expected 12 blocks"),
    "half of it": (dict(list(VIT.items())[:7]), "found 6 blocks of width 768"),
    "a SiT": ({**VIT, "x_embedder.proj.weight": (768, 4, 2, 2)}, "of {}, found the weights of a diffusion transformer"),
    "another network": ({"Mixed_6d.x.weight": (2, 2)}, "expected the weights of {}, found the weights of Inception"),
}


@pytest.mark.parametrize("role", ["teacher", "detector"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_teacher_or_detector_of_another_network_is_refused_by_the_plan(make_plan, tmp_path, capsys, role, name):
    shapes, words = NETWORKS[name]
    file = tmp_path / "weights.safetensors"
    if shapes is not None:
        sparse(file, shapes)
    network = {"pretrained": {"name": "DINOv2-B", "weights": str(file)}}
    images = {**TINY["images"], "resolution": 256}
    own = {"autoencoder": {"trained": {"steps": 2, "factor": 2}}, "images": images}
    plan = make_plan(**own, **({"teachers": {"vit": network}} if role == "teacher" else {"detector": {"d": network}}))
    refused = thrown(capsys, "plan", "-c", plan.file)
    assert refused.startswith(f"{file}: ") and words.format(f"{role} DINOv2-B") in refused


@pytest.mark.parametrize("name", ["DINOv2-B", "DINOv2-B-reg", "DINOv3-B", "DINO-B", "CLIP-L"])
def test_the_weights_that_timm_writes_are_taken_by_the_plan(make_plan, tmp_path, name):
    import timm
    import torch

    spec = TEACHERS[name]
    with torch.device("meta"):
        network = timm.create_model(spec.timm, **spec.overrides)
    sparse(tmp_path / "w.safetensors", {name: tuple(value.shape) for name, value in network.state_dict().items()})
    teacher = {"pretrained": {"name": name, "weights": str(tmp_path / "w.safetensors")}}
    make_plan(images={**TINY["images"], "resolution": 256}, teachers={"vit": teacher}).check()


@pytest.mark.parametrize("name", sorted(name for name, spec in TEACHERS.items() if not spec.by_file))
def test_a_public_teachers_weights_are_timms_of_this_name_on_the_hub(name):
    import timm

    on_hub = timm.get_pretrained_cfg(TEACHERS[name].timm).hf_hub_id
    assert on_hub == (f"timm/{TEACHERS[name].timm}" if TEACHERS[name].on_hub else None)


def test_a_teacher_that_timm_does_not_know_is_refused_by_the_plan(make_plan, capsys):
    plan = make_plan(teachers={"vit": {"pretrained": {"name": "vit_bse_patch16_224"}}})
    assert "teacher vit_bse_patch16_224: neither a folder, nor in timm" in thrown(capsys, "plan", "-c", plan.file)
    make_plan(teachers={"vit": {"pretrained": {"name": "vit_tiny_patch16_224.augreg_in21k"}}}).check()


def test_a_teacher_whose_weights_nobody_serves_is_refused_by_the_plan_without_its_authors_file(make_plan, capsys):
    images = {**TINY["images"], "resolution": 256}
    own = {"images": images, "autoencoder": {"trained": {"steps": 2, "factor": 2}}}
    plan = make_plan(**own, teachers={"vit": {"pretrained": {"name": "MoCov3-B"}}})
    assert "teacher MoCov3-B: timm has no weights of it; give its authors' file" in thrown(
        capsys, "plan", "-c", plan.file
    )


def test_a_layer_that_only_the_weights_of_a_teacher_tell_is_refused_by_key_before_the_first_job(
    make_plan, tmp_path, capsys
):
    file = tmp_path / "w.safetensors"
    sparse(file, dict(list(SMALL.items())[:4]))  # three blocks
    teacher = {"vit": {"pretrained": {"name": "vit_tiny_patch16_224.augreg_in21k", "weights": str(file)}}}
    own = {"images": {**TINY["images"], "resolution": 256}, "autoencoder": {"trained": {"steps": 2, "factor": 2}}}

    def asked(layer, layers):
        features = {**TINY["alignments"]["HASTE"]["features"], "layer": layer}
        attention = {**TINY["alignments"]["HASTE"]["attention"], "teacher_layers": layers}
        return make_plan(
            **own,
            teachers=teacher,
            alignments={"HASTE": {"features": features, "attention": attention}},
            runs={"a": {"alignment": "HASTE"}},
        )

    refused = thrown(capsys, "plan", "-c", asked(3, [2, 4]).file)
    assert "alignments.HASTE.features.layer: [3], but vit has layers 0 to 2" in refused
    assert "alignments.HASTE.attention.teacher_layers: [4], but vit has layers 0 to 2" in refused
    asked(1, [0, 1]).check()


def test_patches_that_do_not_fit_the_images_are_refused_by_the_plan(make_plan, capsys):
    plan = make_plan(teachers={"vit": {"pretrained": {"name": "DINOv2-B"}}})
    assert "images of 8 px give an input of 7 px, which is not a" in thrown(capsys, "plan", "-c", plan.file)


INCEPTIONS = {
    "torch-fidelity's": ((1008, 2048), "Mixed_6d.branch1x1.conv.weight", ""),
    "torchvision's": (
        (1000, 2048),
        "Mixed_6d.branch1x1.conv.weight",
        "fc.weight is (1000, 2048), expected (1008, 2048)",
    ),
    "another": ((1008, 2048), "x.weight", "Mixed_6d.branch1x1.conv.weight is none"),
}


@pytest.mark.parametrize("name", INCEPTIONS)
def test_another_inception_is_refused_by_the_plan(make_plan, tmp_path, capsys, name):
    import torch

    shape, layer, words = INCEPTIONS[name]
    torch.save({"fc.weight": torch.zeros(shape), layer: torch.zeros(192, 768, 1, 1)}, tmp_path / "inception.pth")
    network = {"pretrained": {"name": "inception", "weights": str(tmp_path / "inception.pth")}}
    plan = make_plan(images={**TINY["images"], "resolution": 32}, detector={"fid": network})
    if not words:
        return plan.check()
    refused = thrown(capsys, "plan", "-c", plan.file)
    assert f"{tmp_path}/inception.pth: expected torch-fidelity's Inception v3, found other weights" in refused
    assert words in refused


def sit(path, classes=10, size=4, time="linear", depth=2, channels=4, **more):
    """Weights of the tiny configuration's SiT in REPA's layout, with something changed."""
    import torch

    shape = {"depth": depth, "width": 16, "patch_size": 2, "mlp_ratio": 4.0, "input_size": size, "channels": channels}
    weights = {name: torch.zeros(shape) for name, shape in sit_shapes(shape, classes).items()}
    torch.save({"ema": weights, "args": argparse.Namespace(path_type=time), **more}, path)


WEIGHTS = {
    "other classes": ({"classes": 1000}, "not the model that was asked for; classes: found 1000, expected 10"),
    "another grid": ({"size": 8}, "not the model that was asked for; input_size: found 8, expected 4"),
    "another depth": ({"depth": 3}, "depth: found 3, expected 2"),
    "other channels": ({"channels": 16}, "in_channels: found 16, expected 4"),
    "code": ({"hook": os.system}, "refused: it holds posix.system, which could run code"),
}


@pytest.mark.parametrize("role", ["warm_start", "evaluate"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_the_rows_model_are_refused_by_the_plan_in_the_jobs_words(
    make_plan, tmp_path, capsys, role, name
):
    changes, words = WEIGHTS[name]
    sit(tmp_path / "theirs.pt", **changes)
    row = {"checkpoint": str(tmp_path / "theirs.pt"), "model": "dot", "sampling": ["quick"], "step": 8}
    rows = {"evaluate": {"a": row}, "runs": {}}
    if role == "warm_start":
        rows = {"runs": {"a": {"milestones": [3], "warm_start": str(tmp_path / "theirs.pt")}}}
    plan = make_plan(**rows)
    refused = thrown(capsys, "plan", "-c", plan.file)
    assert refused.startswith(f"{tmp_path}/theirs.pt: ") and words in refused
    job = ["sample", plan.rows[0].evaluation.name] if role == "evaluate" else ["train", str(plan.state("a", 3))]
    assert thrown(capsys, *job, "-c", plan.file) == refused


@pytest.mark.parametrize("role", ["warm_start", "evaluate"])
def test_a_folder_in_the_place_of_weights_is_named_for_what_it_is(tiny, tmp_path, role):
    (tmp_path / "model_index.json").touch()
    row = {"checkpoint": str(tmp_path), "model": "dot", "sampling": ["quick"], "step": 8}
    rows = {"evaluate": {"a": row}} if role == "evaluate" else {"runs": {"a": {"warm_start": str(tmp_path)}}}
    with pytest.raises(ValueError, match="expected a checkpoint, found a folder: diffusers' pipeline"):
        Plan(resolve({**tiny, **rows}))


@pytest.mark.parametrize(
    ("changes", "row", "words"),
    [
        ({"time": "cosine"}, {}, "was trained on the cosine path, but the row says linear"),
        ({}, {"weights": "model"}, "has no 'model' weights, only 'ema'"),
        ({}, {"layout": "DiT"}, "expected twice as many in DiT's"),
    ],
)
def test_a_checkpoint_that_is_not_what_the_row_says_is_refused_by_the_plan(
    make_plan, tmp_path, capsys, changes, row, words
):
    sit(tmp_path / "theirs.pt", **changes)
    given = {"checkpoint": str(tmp_path / "theirs.pt"), "model": "dot", "sampling": ["quick"], "step": 8, **row}
    plan = make_plan(runs={}, evaluate={"a": given})
    refused = thrown(capsys, "plan", "-c", plan.file)
    assert refused.startswith(f"{tmp_path}/theirs.pt: ") and words in refused
    assert thrown(capsys, "sample", plan.rows[0].evaluation.name, "-c", plan.file) == refused


def test_weights_of_other_classes_begin_with_a_new_table_where_the_run_says_so(make_plan, tmp_path):
    sit(tmp_path / "theirs.pt", classes=1000)
    start = {"file": str(tmp_path / "theirs.pt"), "classes": "new"}
    make_plan(runs={"a": {"milestones": [3], "warm_start": start}}).check()


def test_a_tracker_that_is_not_installed_is_refused_by_the_plan(make_plan, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    plan = make_plan(runtime={"trackers": ["wandb"]})
    assert thrown(capsys, "plan", "-c", plan.file) == "runtime.trackers: wandb is not installed (`pip install wandb`)"


def test_the_plan_reads_no_numbers_of_weights(make_plan, tmp_path, monkeypatch):
    import torch

    sit(tmp_path / "theirs.pt", classes=10)
    rows = {"runs": {"a": {"milestones": [3], "warm_start": str(tmp_path / "theirs.pt")}}}
    plan = make_plan(**rows)
    monkeypatch.setattr(torch, "frombuffer", lambda *given, **named: pytest.fail("numbers were read"))
    monkeypatch.setattr(torch, "load", lambda *given, **named: pytest.fail("numbers were read"))
    plan.check()
