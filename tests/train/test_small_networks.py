import math
import re

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from haste.files import artefact
from haste.metrics.detectors import open_detector
from haste.teachers.encoder import Teacher
from haste.train import small_networks, text_encoder

WEIGHTS = {
    "autoencoder": "diffusion_pytorch_model.safetensors",
    "teacher": "model.safetensors",
    "detector": "model.safetensors",
    "text_encoder": "model.safetensors",
}


def squares(count, seed, size=8):
    """Images with a bright block in one of two corners, which is their label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    labels[:2] = [0, 1]
    images = rng.integers(0, 60, (count, size, size, 3))
    for image, label in zip(images, labels, strict=True):
        corner = slice(0, size // 2) if label == 0 else slice(size // 2, None)
        image[corner, corner] += 180
    return images.astype(np.uint8), labels


TRAIN, UNSEEN = squares(48, 0), squares(20, 1)


def make(part, out, seed=0, steps=3, **options):
    small = {"seed": seed, "steps": steps, "batch": 8, "lr": 3e-3, "out": out, **options}
    if part == "autoencoder":
        return small_networks.train_autoencoder(TRAIN[0], UNSEEN[0], width=8, **small)
    if part == "teacher":
        return small_networks.train_teacher(*TRAIN, *UNSEEN, depth=2, width=16, heads=2, **small)
    if part == "text_encoder":
        said = [[["up", "above"] if label == 0 else ["down"] for label in labels] for labels in (TRAIN[1], UNSEEN[1])]
        small |= {"tokens": 4, "width": 8, "depth": 1, "heads": 2}
        return text_encoder.train(TRAIN[0], said[0], UNSEEN[0], said[1], **small)
    return small_networks.train_detector(*TRAIN, *UNSEEN, **({"width": 4} | small))


@pytest.mark.parametrize("part", WEIGHTS)
def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(part, tmp_path):
    weights = WEIGHTS[part]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(part, tmp_path / name, seed)
        torch.rand(7)
    state = torch.get_rng_state()
    make(part, tmp_path / "a", 0)  # replaces what is there
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = ((tmp_path / name / weights).read_bytes() for name in "abc")
    assert a == b and a != c
    assert (tmp_path / "a" / "part.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_part_says_what_it_is_how_it_was_made_and_how_good_it_is(part, tmp_path):
    quality = make(part, tmp_path / "x", name="my part", key="abc", recipe={"steps": 3})
    found = artefact.read_json(tmp_path / "x" / "part.json", "part")
    assert (found["part"], found["name"], found["key"], found["recipe"]) == (part, "my part", "abc", {"steps": 3})
    assert found["identity"] == artefact.file_identity(tmp_path / "x" / WEIGHTS[part])
    assert found["quality"] == quality
    assert found["provenance"]["key"] == "abc" and found["provenance"]["seconds"] > 0


def test_detector_and_teacher_learn_and_are_read_back_as_they_were_measured(tmp_path):
    learnt = make("detector", tmp_path / "detector", steps=30)
    detector = open_detector(tmp_path / "detector")
    right = detector(torch.from_numpy(UNSEEN[0]))["logits"].argmax(1).numpy() == UNSEEN[1]
    assert learnt == {"accuracy": right.mean()} and right.mean() >= 0.95

    learnt = make("teacher", tmp_path / "teacher", steps=30)
    teacher = Teacher.load(tmp_path / "teacher")
    features = teacher(torch.from_numpy(UNSEEN[0]), features=True, attention=[1]).features
    with torch.no_grad():
        right = teacher.network.head(features.mean(1)).argmax(1).numpy() == UNSEEN[1]
    assert learnt == {"accuracy": right.mean()} and right.mean() >= 0.95
    assert features.shape == (20, 4, 16)


def test_autoencoder_learns_and_is_read_back_by_diffusers_as_it_was_measured(tmp_path):
    first = make("autoencoder", tmp_path / "first", steps=1)
    learnt = make("autoencoder", tmp_path / "last", steps=60)
    assert learnt["reconstruction_mse"] < first["reconstruction_mse"] / 2

    network = AutoencoderKL.from_pretrained(tmp_path / "last").eval()
    x = torch.from_numpy(UNSEEN[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        rebuilt = network.decode(network.encode(x).latent_dist.mode()).sample
    mse = float(((rebuilt - x) ** 2).mean())
    assert learnt["reconstruction_mse"] == pytest.approx(mse, rel=1e-5)
    assert learnt["psnr"] == pytest.approx(20 * math.log10(2) - 10 * math.log10(mse), rel=1e-5)


def test_scaled_latents_have_unit_variance(tmp_path):
    make("autoencoder", tmp_path / "x", steps=20, kl_weight=0.1)  # so that draws differ visibly from means
    network = AutoencoderKL.from_pretrained(tmp_path / "x").eval()
    x = torch.from_numpy(TRAIN[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = network.encode(x).latent_dist
        draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(200)])
    assert draws.shape[2:] == (4, 4, 4)
    assert float((draws * network.config["scaling_factor"]).std()) == pytest.approx(1, abs=0.01)


def test_every_image_is_seen_once_before_any_is_seen_again():
    steps = list(small_networks._batches(10, 12, 4, torch.Generator().manual_seed(0)))
    assert all(len(step) == 4 for step in steps)
    stream = torch.cat(steps).tolist()
    for start in range(0, 40, 10):
        assert sorted(stream[start : start + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]


def test_shifted_images_are_moved_whole_by_at_most_a_pixel():
    images = torch.arange(2 * 6 * 6, dtype=torch.uint8).reshape(2, 6, 6, 1).expand(2, 6, 6, 3)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="replicate")
    seen = set()
    for seed in range(30):
        moved = small_networks._shifted(images, 1, torch.Generator().manual_seed(seed))
        for image, border in zip(moved, padded.permute(0, 2, 3, 1).to(torch.uint8), strict=True):
            (offset,) = [(i, j) for i in range(3) for j in range(3) if torch.equal(border[i : i + 6, j : j + 6], image)]
            seen.add(offset)
    assert len(seen) == 9
    assert torch.equal(small_networks._shifted(images, 0, torch.Generator()), images)


def test_an_interrupted_write_leaves_the_older_part_as_it_was(tmp_path, monkeypatch):
    make("detector", tmp_path / "x")
    before = (tmp_path / "x" / "part.json").read_text()

    def full(path, obj):
        raise OSError("no space left on device")

    monkeypatch.setattr(artefact, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        make("detector", tmp_path / "x", seed=1)
    assert (tmp_path / "x" / "part.json").read_text() == before
    open_detector(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_training_that_diverges_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"detector: the loss is .* expected a lower lr"):
        make("detector", tmp_path / "x", steps=40, lr=1e30)
    assert not (tmp_path / "x").exists()


def test_unusable_images_labels_and_sizes_are_refused(tmp_path):
    images, labels = TRAIN
    options = {"out": tmp_path / "x", "seed": 0, "steps": 1, "batch": 4, "lr": 1e-3}
    with pytest.raises(ValueError, match=r"expected uint8 \(M, R, R, 3\), found float32"):
        small_networks.train_detector(images.astype(np.float32), labels, *UNSEEN, **options)
    with pytest.raises(ValueError, match="one for each of 48 images"):
        small_networks.train_detector(images, labels[:-1], *UNSEEN, **options)
    with pytest.raises(ValueError, match=r"expected 0\.\.1, found 0\.\.7"):
        small_networks.train_detector(images, labels, UNSEEN[0], np.where(UNSEEN[1] > 0, 7, 0), **options)
    with pytest.raises(ValueError, match="patch 3 must divide 8 px"):
        small_networks.train_teacher(images, labels, *UNSEEN, patch=3, **options)
    with pytest.raises(ValueError, match="factor 3 is not a power of 2"):
        small_networks.train_autoencoder(images, UNSEEN[0], factor=3, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("pause", "lines"), [(0.0, [1, 2, 3]), (60.0, [3])])
def test_how_far_it_is_is_said_by_time_and_at_the_end(tmp_path, monkeypatch, caplog, pause, lines):
    monkeypatch.setattr(small_networks, "PAUSE", pause)
    caplog.set_level("INFO", logger=small_networks.__name__)
    make("detector", tmp_path / "x", steps=3)
    assert [re.search(r"step (\d) of 3, loss \d", message)[1] for message in caplog.messages] == [*map(str, lines)]
