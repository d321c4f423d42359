"""What the autoencoder alone costs: with one that loses nothing, the floor; with errors of a known size, their PSNR."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from haste import config
from haste.data.latents import Autoencoder
from haste.files.store import Store
from haste.ops.show import print_provenance
from haste.plan.names import SHOWN_CLASSES
from haste.plan.plan import Plan
from haste.sampling.grids import GAP, SCALE
from haste.score import jobs
from haste.score.reconstructions import Reconstructions, make


def made(plan):
    detector = plan.detectors["cnn"]
    make(plan, detector)
    return json.loads(Path(detector.reconstructed).read_text())


def test_an_autoencoder_that_loses_nothing_reaches_exactly_what_real_images_reach(make_plan, monkeypatch, capsys):
    plan = make_plan()
    monkeypatch.setattr(Reconstructions, "decoded", lambda self, rows: self.images.read("image", rows))
    found = made(plan)
    jobs.floor_of(plan.detectors["cnn"])
    floor = json.loads(Path(plan.detectors["cnn"].floor).read_text())
    held_out = floor["scores"].pop("class_accuracy")  # reconstructions have none: the detector saw these in training
    assert found["scores"] == pytest.approx(floor["scores"], rel=1e-6) and held_out is not None
    assert (found["samples"], found["reference"]) == (floor["samples"], floor["reference"])
    assert found["psnr"] == 100.0
    print_provenance(Path(plan.detectors["cnn"].reconstructed))
    shown = capsys.readouterr().out
    assert json.loads(shown)["psnr"] == 100.0 and found["pictures"]["png"] not in shown


def test_errors_of_sixteen_levels_are_a_psnr_of_24_db(make_plan, monkeypatch):
    plan = make_plan()
    sign = np.where(np.indices((8, 8, 3)).sum(axis=0) % 2, 16, -16)

    def worse(self, rows):
        images = self.images.read("image", rows).astype(int)
        return np.where((images + sign < 0) | (images + sign > 255), images - sign, images + sign).astype(np.uint8)

    monkeypatch.setattr(Reconstructions, "decoded", worse)
    assert made(plan)["psnr"] == pytest.approx(20 * math.log10(255 / 16), abs=1e-9)


def test_pictures_are_a_training_image_of_each_class_above_what_the_decoder_makes_of_its_latents_mean(make_plan):
    plan = make_plan(sampling={"quick": {"sampler": "euler", "steps": 2, "count": 20, "labels": "balanced"}})
    again = Reconstructions(plan)
    found = again.pictures(plan.data.shown_classes)
    assert found["classes"] == [*range(10)]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["png"]))).convert("RGB"))
    labels, images = (again.images.read(name, again.images.range("train")) for name in ("label", "image"))
    decoder, cell = Autoencoder.load(plan.decoder), 8 * SCALE + GAP
    for place, label in enumerate(found["classes"]):
        row = int(np.flatnonzero(labels == label)[0])
        mean = torch.from_numpy(again.latents.read("moments", [row])[:, : decoder.channels])
        with torch.no_grad():
            back = decoder.model.decode(mean).sample[0].permute(1, 2, 0)
        for line, expected in enumerate((images[row], ((back + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy())):
            top, left = line * cell + GAP // 2, place * cell + GAP // 2
            shown = picture[top : top + 8 * SCALE : SCALE, left : left + 8 * SCALE : SCALE]
            assert np.abs(shown.astype(int) - expected).max() <= 1


def test_without_classes_the_first_pictures_are_shown(make_plan):
    found = Reconstructions(make_plan()).pictures([])
    assert found["classes"] == []
    assert Image.open(io.BytesIO(base64.b64decode(found["png"]))).width == SHOWN_CLASSES * (8 * SCALE + GAP)


def test_it_is_made_once_for_an_autoencoder_and_again_for_classes_that_a_grid_is_to_show(make_plan):
    plan, way = make_plan(), {"sampler": "euler", "steps": 2, "count": 20}
    file = plan.detectors["cnn"].reconstructed
    runs = make_plan(runs={"vanilla": {"milestones": [4]}})
    assert runs.detectors["cnn"].reconstructed == file in runs.shown
    few = make_plan(sampling={"quick": {**way, "labels": [3, 1]}})
    assert few.detectors["cnn"].reconstructed == file  # among the first ten
    other = make_plan(autoencoder={"trained": {"steps": 3, "batch": 8, "width": 8, "factor": 2}, "dtype": "float32"})
    assert other.detectors["cnn"].reconstructed != file


def test_classes_beyond_the_first_that_samples_are_chosen_of_are_shown_too_and_named(tiny, tmp_path):
    def plan(**ways):
        images = {"source": "folder", "path": str(tmp_path), "resolution": 8, "classes": 1000, "holdout": 1}
        sampling = {name: {"sampler": "euler", "steps": 2, "count": 20, **way} for name, way in ways.items()}
        return Plan(config.resolve({**tiny, "images": images, "sampling": sampling}), ahead=True)

    usual, chosen = plan(quick={}), plan(quick={}, show={"labels": [360, 3, 207]})
    assert usual.data.shown_classes == [*range(10)] and chosen.data.shown_classes == [*range(10), 207, 360]
    assert usual.detectors["cnn"].reconstructed != chosen.detectors["cnn"].reconstructed


def test_checkpoints_from_elsewhere_alone_ask_for_no_latents(tiny, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    row = {"checkpoint": str(tmp_path / "a.pt"), "model": "dot", "method": "vanilla", "step": 8, "sampling": ["quick"]}
    plan = Plan(config.resolve({**tiny, "runs": {}, "evaluate": {"theirs": row}, "results": str(tmp_path)}))
    assert plan.detectors["cnn"].reconstructed is None
    assert not {"latents", "reconstruct"} & plan.jobs.every.keys()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("images", "made from the images 000000000000.*Remove the latents"),
        ("autoencoder", "its weights are .*, but the latents were encoded with 000000000000"),
    ],
)
def test_latents_of_other_images_or_of_another_autoencoder_are_refused(make_plan, monkeypatch, entry, said):
    plan, opened = make_plan(), Store.of

    def others(made):
        found = opened(made)
        if made.kind == "latents":
            found.manifest[entry] = "0" * 64
        return found

    monkeypatch.setattr(Store, "of", others)
    with pytest.raises(ValueError, match=said):
        Reconstructions(plan)
