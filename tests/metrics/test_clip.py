"""CLIP's embeddings against transformers' own whole model, on random weights in the public format."""

import shutil

import captioned
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from haste.cli import main as cli
from haste.files import artefact
from haste.metrics.detectors import open_detector
from haste.networks import weights
from haste.networks.registry import CLIP

WORDS = ["a cat", "three", "", "a red bus " * 20, "ein Zähler, „drei“"]


@pytest.fixture(scope="module")
def folder(once):
    return once("clip", captioned.save_clip)


@pytest.fixture(scope="module")
def detector(folder):
    return open_detector("clip", str(folder))


def whole(folder, images, words):
    """Cosines (N,) by the logits of transformers' CLIPModel, for images of its own size."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    cut = AutoTokenizer.from_pretrained(folder)(
        words, padding=True, truncation=True, max_length=captioned.TOKENS, return_tensors="pt"
    )
    mean, std = (np.array(values, np.float32) for values in CLIP)
    pixels = torch.from_numpy(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
    with torch.inference_mode():
        found = model(input_ids=cut["input_ids"], attention_mask=cut["attention_mask"], pixel_values=pixels)
    return found.logits_per_image.numpy() / np.exp(model.logit_scale.item())


def pictures(seed, *size):
    return np.random.default_rng(seed).integers(0, 256, (5, *size, 3), np.uint8)


def test_cosines_are_those_of_the_whole_model(folder, detector):
    images, crossed = pictures(0, 8, 8), whole(folder, pictures(0, 8, 8), WORDS)
    pool = detector.arrays(images, "images")["pool"]
    np.testing.assert_allclose(detector.cosines(pool, WORDS), crossed.diagonal(), rtol=1e-4, atol=1e-5)
    assert np.abs(crossed - crossed.diagonal()).max() > 1e-2  # another text's would be seen
    np.testing.assert_allclose(detector.cosines(pool[3:], WORDS[3:]), crossed.diagonal()[3:], rtol=1e-4, atol=1e-5)


def test_images_are_resized_on_their_short_side_by_pillows_bicubic_filter_and_cut_to_the_centre(detector):
    images, bicubic = pictures(1, 24, 17), Image.Resampling.BICUBIC
    small = [np.asarray(center_crop(Image.fromarray(one).resize((8, 11), bicubic), 8)) for one in images]
    np.testing.assert_array_equal(
        detector.arrays(images, "images")["pool"], detector.arrays(np.stack(small), "images")["pool"]
    )


def test_the_score_is_the_mean_of_100_max_cos_0_with_its_standard_error_and_the_encoder_on_record(
    folder, detector, tmp_path, capsys
):
    images, prompts = pictures(0, 8, 8), tmp_path / "prompts.txt"
    np.savez(tmp_path / "samples.npz", arr_0=images)
    crossed = whole(folder, images, WORDS)
    told = [WORDS[row.argmin() if number % 2 else row.argmax()] for number, row in enumerate(crossed)]
    prompts.write_text("\n".join(told) + "\n", encoding="utf-8")
    command = ["score", tmp_path / "samples.npz", "--prompts", prompts, "--detector", f"clip={folder}"]
    assert cli.main([*map(str, command), "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 0
    values = 100 * np.maximum(whole(folder, images, told).diagonal().astype(np.float64), 0)
    found, column = artefact.read_json(tmp_path / "out.json", "image scores"), f"CLIP score ({folder.name})"
    assert (values > 0).any() and (values == 0).any()  # some cosine is below 0
    assert found["scores"] == {column: pytest.approx(values.mean(), rel=1e-4)}
    assert found["errors"][column]["value"] == pytest.approx(values.std(ddof=1) / 5**0.5, rel=1e-3)
    (who,) = found["detectors"]
    assert (who["kind"], who["encoder"], who["revision"]) == ("clip", str(folder), None) and len(who["weights"]) == 64
    assert found["settings"]["clip_score"]["sha256"] == artefact.file_identity(prompts)
    assert f"CLIP score ({folder.name})" in capsys.readouterr().out
    prompts.write_text("one\ntwo")
    assert cli.main([*map(str, command), "--device", "cpu"]) == 2
    assert "2 prompts, but" in capsys.readouterr().err


def test_a_clip_of_the_hub_may_be_asked_for_by_its_revision_which_is_on_record(folder, detector, tmp_path, monkeypatch):
    own, other = "c0ffee" * 6 + "abcd", "0ddba11" * 5 + "12345"
    place = tmp_path / "models--some--clip"
    for revision, files in ((own, folder), (other, tmp_path / "other")):
        if not files.exists():
            captioned.save_clip(files, seed=1)
        shutil.copytree(files, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(other)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, latest = (open_detector("clip", f"some/clip{at}") for at in (f"@{own}", ""))
    assert (found.encoder, found.revision, found.weights) == ("some/clip", own, detector.weights)
    assert (latest.encoder, latest.revision) == ("some/clip", other) and latest.weights != found.weights
    assert weights.in_cache(f"some/clip@{own}", "it", "config.json").parent.name == own
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids"):
        weights.in_cache("some/clip@" + 40 * "0", "it", "config.json")
    with pytest.raises(ValueError, match="not available from the hub"):
        open_detector("clip", "some/clip@" + 40 * "0")


def test_what_is_no_clip_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_detector("clip", str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"found no model\.safetensors"):
        open_detector("clip", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": null}')
    with pytest.raises(ValueError, match=r"config\.json: expected a configuration of transformers"):
        open_detector("clip", str(tmp_path))
