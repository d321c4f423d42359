"""What a configuration names by hub id is fetched once, and what lies in local files or is trained here is not."""

import copy
import dataclasses
import socket

import pytest
import yaml
from hub import serving
from huggingface_hub import constants

from haste import extensions
from haste.cli import main as cli
from haste.data import latents
from haste.metrics import detectors, dinov2, inception
from haste.networks import hub
from haste.networks.registry import DETECTORS
from haste.teachers import encoder


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the hub."""
    found = []
    monkeypatch.setattr(latents, "fetch", lambda where: found.append(where) or f"cache of {where}")
    monkeypatch.setattr(hub, "text_folder", lambda where, called: found.append(where) or f"cache of {where}")
    monkeypatch.setattr(encoder, "weight_file", lambda name: found.append(name) or f"cache of {name}")
    for name, known in DETECTORS.items():
        monkeypatch.setitem(DETECTORS, name, dataclasses.replace(known, smallest=1))  # images here are small
    monkeypatch.setattr(inception, "weight_file", lambda: found.append("inception") or "cache of inception")
    monkeypatch.setattr(dinov2, "weight_file", lambda name: found.append(name) or f"cache of {name}, who judges")
    return found


def configured(tiny, tmp_path, **changes):
    raw = {**copy.deepcopy(tiny), "results": str(tmp_path / "results"), **changes}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    return str(tmp_path / "c.yaml")


def test_what_the_configuration_names_by_hub_id_is_fetched_and_said(tiny, tmp_path, asked, capsys):
    public = {"encode": "some/encoder", "decode": "some/decoder", "factor": 2}
    teachers = {"vit": tiny["teachers"]["vit"], "dino": {"pretrained": {"name": "DINOv2-B"}}}
    teachers["own"] = {"pretrained": {"name": "CLIP-L", "weights": "here.safetensors"}}
    config = configured(tiny, tmp_path, autoencoder={"pretrained": public}, teachers=teachers)
    assert cli.main(["fetch", "-c", config]) == 0
    assert asked == ["some/encoder", "some/decoder", "DINOv2-B"]
    assert "teacher dino (DINOv2-B): cache of DINOv2-B" in capsys.readouterr().out


def test_a_text_encoder_is_fetched_and_words_and_one_that_is_trained_here_are_not(tiny, tmp_path, asked, capsys):
    joint = {"dot": {"architecture": "mmdit", "depth": 2, "width": 16, "heads": 2}}
    told = {"images": {**tiny["images"], "source": "moved-digits"}, "models": joint, "alignments": {}}
    told |= {"sampling": {"quick": {"steps": 2, "count": 8}}, "runs": {"vanilla": {}}}
    for encoder_name in ("some/clip", "words", {"trained": {"steps": 2}}):
        config = configured(tiny, tmp_path, **told, condition={"name": "captions", "encoder": encoder_name})
        assert cli.main(["fetch", "-c", config]) == 0
    assert asked == ["some/clip"] and "text encoder some/clip: cache of some/clip" in capsys.readouterr().out


def test_a_configuration_that_trains_everything_fetches_nothing(tiny, tmp_path, asked, capsys):
    assert cli.main(["fetch", "-c", configured(tiny, tmp_path)]) == 0
    assert not asked
    assert "nothing to fetch" in capsys.readouterr().out


def test_what_cannot_be_had_is_a_refusal(tiny, tmp_path, monkeypatch, capsys):
    def none(where):
        raise ValueError(f"autoencoder {where}: not to be had")

    monkeypatch.setattr(latents, "fetch", none)
    config = configured(tiny, tmp_path, autoencoder={"pretrained": {"encode": "some/encoder", "factor": 2}})
    assert cli.main(["fetch", "-c", config]) == 2
    assert "some/encoder: not to be had" in capsys.readouterr().err


def test_detectors_that_the_configuration_names_are_fetched_and_those_with_a_file_are_not(
    tiny, tmp_path, asked, monkeypatch, capsys
):
    monkeypatch.setitem(detectors.PUBLISHED, "added", lambda weights: asked.append("added"))  # as a package adds one
    named = {"fid": "inception", "fdd": "DINOv2-L", "other": "added"}
    judges = {**tiny["detector"], **{name: {"pretrained": {"name": kind}} for name, kind in named.items()}}
    judges["own"] = {"pretrained": {"name": "DINOv2-B", "weights": "here.safetensors"}}
    monkeypatch.setattr(extensions, "names", lambda group: ["added"] if group == "detectors" else [])
    assert cli.main(["fetch", "-c", configured(tiny, tmp_path, detector=judges)]) == 0
    assert sorted(asked) == ["DINOv2-L", "added", "inception"]
    said = capsys.readouterr().out
    assert "detector fid (inception): cache of inception" in said
    assert "detector fdd (DINOv2-L): cache of DINOv2-L, who judges" in said
    assert "detector other (added): it has what it needs" in said


def test_what_cannot_be_had_keeps_nothing_else_from_being_fetched_and_is_named_with_the_key_for_a_file(
    tiny, tmp_path, asked, monkeypatch, capsys
):
    def none(*name):
        raise ValueError(f"the weights of {name or 'inception'} cannot be had, fetch https://somewhere/weights.pth.")

    monkeypatch.setattr(inception, "weight_file", none)
    monkeypatch.setattr(encoder, "weight_file", none)
    teachers = {"vit": tiny["teachers"]["vit"], "dino": {"pretrained": {"name": "DINOv2-B"}}}
    judges = {name: {"pretrained": {"name": kind}} for name, kind in (("fid", "inception"), ("fdd", "DINOv2-L"))}
    assert cli.main(["fetch", "-c", configured(tiny, tmp_path, detector=judges, teachers=teachers)]) == 2
    said = capsys.readouterr()
    assert "detector fdd (DINOv2-L): cache of DINOv2-L" in said.out
    for key in ("detector.fid.pretrained.weights", "teachers.dino.pretrained.weights"):
        assert f"fetch https://somewhere/weights.pth. In the configuration that is {key}." in said.err


REPOSITORIES = {
    "own/vae": ("config.json", "diffusion_pytorch_model.safetensors", "pickled.bin"),
    "timm/vit_base_patch14_dinov2.lvd142m": ("config.json", "model.safetensors"),
}


def before_the_data(tiny, tmp_path):
    """A configuration of weights from the hub, and of pictures and a reference that are not there."""
    images = {"source": "folder", "path": str(tmp_path / "pictures"), "resolution": 64, "holdout": 0, "classes": 10}
    judge = {"name": "inception", "weights": str(tmp_path / "own.pth")}
    return configured(
        tiny,
        tmp_path,
        images=images,
        autoencoder={"pretrained": {"encode": "own/vae", "factor": 8}},
        teachers={"vit": {"pretrained": {"name": "DINOv2-B"}}},
        detector={"fid": {"pretrained": judge, "reference": str(tmp_path / "adm.npz")}},
    )


def test_weights_are_fetched_from_a_hub_before_pictures_and_a_reference_are_there(tiny, tmp_path, monkeypatch, capsys):
    config = before_the_data(tiny, tmp_path)
    with serving(monkeypatch, str(tmp_path / "cache")) as server:
        for repository, paths in REPOSITORIES.items():
            for path in paths:
                server.put(repository, path, f"{repository}/{path}".encode())
        assert cli.main(["fetch", "-c", config]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert f"snapshots/{'5' * 40}" in said and "teacher vit (DINOv2-B): " in said
        server.asked.clear()
        assert cli.main(["fetch", "-c", config]) == 0
        assert server.asked == [], "what is there is asked for again"
    kept = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert kept == {"config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"}


def test_where_nobody_answers_fetch_waits_once_and_says_what_to_bring_and_which_key_names_it(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert cli.main(["fetch", "-c", before_the_data(tiny, tmp_path)]) == 2
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    said = capsys.readouterr().err
    assert "diffusion_pytorch_model.safetensors" in said and "autoencoder.pretrained.encode" in said
    assert "model.safetensors from there" in said and "teachers.vit.pretrained.weights" in said
