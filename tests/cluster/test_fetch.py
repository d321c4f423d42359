"""What a configuration names by hub id is fetched once, and what lies in local files or is trained here is not."""

import copy

import pytest
import yaml

from haste import cli
from haste.data import latents
from haste.teachers import encoder


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the hub."""
    found = []
    monkeypatch.setattr(latents, "fetch", lambda where: found.append(where) or f"cache of {where}")
    monkeypatch.setattr(encoder, "weight_file", lambda name: found.append(name) or f"cache of {name}")
    return found


def configured(tiny, tmp_path, **changes):
    raw = {**copy.deepcopy(tiny), "results": str(tmp_path / "results"), **changes}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    return str(tmp_path / "c.yaml")


def test_what_the_configuration_names_by_hub_id_is_fetched_and_said(tiny, tmp_path, asked, capsys):
    hub = {"encode": "some/encoder", "decode": "some/decoder", "factor": 2}
    teachers = {"vit": tiny["teachers"]["vit"], "dino": {"pretrained": {"name": "DINOv2-B"}}}
    teachers["own"] = {"pretrained": {"name": "CLIP-L", "weights": "here.safetensors"}}
    config = configured(tiny, tmp_path, autoencoder={"pretrained": hub}, teachers=teachers)
    assert cli.main(["fetch", "-c", config]) == 0
    assert asked == ["some/encoder", "some/decoder", "DINOv2-B"]
    assert "teacher dino (DINOv2-B): cache of DINOv2-B" in capsys.readouterr().out


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
