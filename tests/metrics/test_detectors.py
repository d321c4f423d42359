import json

import pytest
import safetensors.torch
import torch

from haste.files import artefact
from haste.metrics.detector import Detector
from haste.metrics.detectors import PUBLISHED, SmallCNN, open_detector
from haste.networks.registry import DETECTORS


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    network = SmallCNN(16, 8, 10)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    part = {
        "schema": artefact.SCHEMA,
        "kind": "part",
        "part": "detector",
        "name": "judge",
        "architecture": {"kind": "cnn", "resolution": 16, "width": 8, "classes": 10},
        "identity": artefact.file_identity(tmp_path / "model.safetensors"),
    }
    artefact.write_json(tmp_path / "part.json", part)
    return tmp_path


def images(count=5, size=16):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def edit(folder, **changes):
    path = folder / "part.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_loaded_detector_says_what_it_is_and_gives_features_and_logits(folder):
    detector = open_detector(folder)
    found = detector(images())
    assert found["pool"].shape == (5, detector.width) and found["logits"].shape == (5, detector.classes)
    assert (detector.name, detector.width, detector.classes) == ("judge", 32, 10)
    assert detector.weights == artefact.file_identity(folder / "model.safetensors")
    assert detector.outputs == {name: value.shape[1] for name, value in found.items()}
    assert found["pool"].dtype == found["logits"].dtype == torch.float32
    assert found["pool"].is_inference() and not detector.network.training
    assert "-1..1" in detector.preprocessing


def test_its_weights_are_those_of_the_file(folder):
    torch.manual_seed(0)
    expected = SmallCNN(16, 8, 10)(images())
    for name, value in open_detector(folder)(images()).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_features_of_an_image_do_not_depend_on_its_batch(folder):
    detector, batch = open_detector(folder), images()
    alone = detector(batch[2:3])["pool"]
    torch.testing.assert_close(detector(batch)["pool"][2:3], alone, rtol=1e-5, atol=1e-6)


def test_logits_are_a_linear_reading_of_the_features(folder):
    detector = open_detector(folder)
    found = detector(images())
    network = detector.network
    expected = found["pool"].double() @ network.head.weight.double().T + network.head.bias.double()
    torch.testing.assert_close(found["logits"].double(), expected, rtol=1e-5, atol=1e-6)


def test_images_of_another_kind_or_size_are_refused(folder):
    detector = open_detector(folder)
    with pytest.raises(ValueError, match="16 x 16"):
        detector(images(size=20))
    with pytest.raises(ValueError, match="uint8 NHWC"):
        detector(images().float())
    with pytest.raises(ValueError, match="uint8 NHWC"):
        detector(images().permute(0, 3, 1, 2))


def test_a_wrong_truncated_or_foreign_folder_is_refused(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights"):
        open_detector(folder)
    edit(folder, identity=artefact.file_identity(weights))
    with pytest.raises(ValueError, match="do not fit"):
        open_detector(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="found no file"):
        open_detector(folder)
    edit(folder, architecture={"kind": "resnet"})
    with pytest.raises(ValueError, match="unknown kind of detector 'resnet'"):
        open_detector(folder)
    edit(folder, part="teacher")
    with pytest.raises(ValueError, match="expected a detector, found 'teacher'"):
        open_detector(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"part\.json"):
        open_detector(empty)
    with pytest.raises(ValueError, match="nowhere': neither a folder nor"):
        open_detector(empty / "nowhere")


def test_anything_else_that_is_asked_for_is_refused_with_what_there_is(folder, tmp_path):
    with pytest.raises(
        ValueError,
        match="detector 'resnet': neither a folder nor one of DINOv2-B, DINOv2-L, clip, inception, pytorch-fid",
    ):
        open_detector("resnet")
    with pytest.raises(ValueError, match="a folder has weights of its own, found weights x"):
        open_detector(folder, "x")


def test_an_identity_follows_from_weights_and_preprocessing_and_not_from_the_name(folder):
    def identity(**changes):
        about = {"kind": "cnn", "weights": "w", "outputs": {"pool": 3}, "preprocessing": "none", **changes}
        return Detector(torch.nn.Identity(), **about).identity

    assert identity() == identity(name="x") == identity(smallest=9)
    others = [{"weights": "v"}, {"preprocessing": "resized"}, {"outputs": {"pool": 4}}, {"kind": "inception"}]
    assert len({identity(), *(identity(**change) for change in others)}) == 5
    detector = open_detector(folder, called="judge")
    assert json.loads(json.dumps(detector.about)) == detector.about
    assert {"name": "judge", "identity": detector.identity}.items() <= detector.about.items()


@pytest.mark.parametrize("name", DETECTORS)
def test_what_makes_a_published_detector_is_where_its_line_says(name, tmp_path):
    (tmp_path / "foreign").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="foreign"):
        PUBLISHED[name](tmp_path / "foreign")
