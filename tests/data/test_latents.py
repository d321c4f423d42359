"""The autoencoder is diffusers' own, latents are what it says, and pixels come back."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from haste.data.condition import Labels
from haste.data.jobs import join_latents
from haste.data.latents import Autoencoder, draw, encode_shard, to_pixels
from haste.files.artefact import file_identity
from haste.files.store import Store, join, shard_range, write_shard
from haste.networks.autoencoder import PATTERNS, shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(**changes):
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "latent_channels": 3, "norm_num_groups": 4, "sample_size": 8}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**shape, **blocks, **changes).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    model = tiny(scaling_factor=0.5, shift_factor=0.25)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def pixels(count, side=8):
    return np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def image_store(folder, count=9, classes=("a", "b")):
    images, common = pixels(count), {"kind": "images", "key": "i", "recipe": {}, "shards": 2, "provenance": {}}
    for shard in range(2):
        span = shard_range(count, shard, 2)
        batch = {"image": images[span.start : span.stop], "label": np.array(span) % 2}
        fields = {"image": ((8, 8, 3), "u1"), "label": ((), "i8")}
        facts = {"classes": list(classes), "resolution": 8}
        write_shard(folder, shard=shard, total=count, fields=fields, batches=[batch], facts=facts, **common)
    join(folder, splits={"train": [0, 6], "held_out": [6, count]}, **common)
    return Store.open(folder)


def encoded(folder, images, autoencoder, shards=2, **options):
    common = {"key": "l", "recipe": {}, "shards": shards, "provenance": {}}
    for shard in range(shards):
        encode_shard(folder, images, autoencoder, shard=shard, condition=Labels(classes=2), **common, **options)
    join_latents(folder, images, **common)
    return Store.open(folder, kind="latents", verify="full")


def test_the_configuration_of_the_weights_is_kept(saved):
    found = Autoencoder.load(saved[0])
    assert (found.channels, found.factor, found.scale, found.shift) == (3, 2, 0.5, 0.25)
    assert found.identity == file_identity(saved[0] / WEIGHTS)
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())


def test_without_a_shift_factor_the_shift_is_zero(tmp_path):
    tiny(scaling_factor=0.18215).save_pretrained(tmp_path)
    found = Autoencoder.load(str(tmp_path))
    assert (found.scale, found.shift) == (0.18215, 0.0)


def test_moments_are_diffusers_mean_and_exp_of_half_the_log_variance(saved):
    images = pixels(4)
    found = Autoencoder.load(saved[0]).moments(images)
    signal = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) * (2 / 255) - 1)
    with torch.no_grad():
        mean, logvar = saved[1].encode(signal).latent_dist.parameters.chunk(2, dim=1)
    assert found.shape == (4, 6, 4, 4) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, :3], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 3:], torch.exp(0.5 * logvar), rtol=1e-4, atol=1e-5)
    assert found[:, 3:].min() > 0


def test_decoding_undoes_scale_and_shift_and_does_not_clip(saved):
    autoencoder = Autoencoder.load(saved[0])
    raw = 30 * torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = saved[1].decode(raw).sample
    scaled = draw(
        torch.cat([raw, torch.ones_like(raw)], 1), torch.zeros_like(raw), autoencoder.scale, autoencoder.shift
    )
    found = autoencoder.decode(scaled)
    assert found.shape == (2, 3, 8, 8) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        autoencoder.model.decoder.conv_out.bias += 7
    assert autoencoder.decode(scaled).min() > 1


@settings(max_examples=30, deadline=None)
@given(
    mean=st.floats(-9, 9, width=16),
    std=st.floats(0, 9, width=16),
    noise=st.floats(-4, 4, width=16),
    scale=st.floats(0.125, 2, width=16),
    shift=st.floats(-2, 2, width=16),
)
def test_draw_is_mean_plus_std_noise_shifted_then_scaled(mean, std, noise, scale, shift):
    moments = torch.tensor([mean, mean, std, std], dtype=torch.float16).reshape(1, 4, 1, 1)
    found = draw(moments, torch.full((1, 2, 1, 1), noise, dtype=torch.float16), scale, shift)
    assert found.dtype == torch.float32 and found.shape == (1, 2, 1, 1)
    assert found.flatten().tolist() == pytest.approx([(mean + std * noise - shift) * scale] * 2, rel=1e-5, abs=1e-5)


def test_drawn_latents_have_the_posteriors_moments():
    moments = torch.tensor([2.0, 0.5]).reshape(1, 2, 1, 1).expand(20_000, 2, 1, 1)
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    z = draw(moments, noise, 0.5, 1.0)
    assert z.mean().item() == pytest.approx(0.5, abs=0.01) and z.std().item() == pytest.approx(0.25, abs=0.01)


def test_pixels_follow_both_conventions():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.499, 0.9999, 1.0, 2.0]).reshape(1, 1, 1, 8)
    # By hand: 255 (x + 1) / 2 and 127.5 x + 128, clipped to 0..255, cut to integers.
    assert to_pixels(x, "truncate").flatten().tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    assert to_pixels(x, "round").flatten().tolist() == [0, 0, 0, 128, 191, 255, 255, 255]
    assert to_pixels(x.double()).dtype == torch.uint8
    with pytest.raises(ValueError, match="'floor': expected 'truncate' or 'round'"):
        to_pixels(x, "floor")  # pyright: ignore[reportArgumentType]


def test_rounded_pixels_of_encodable_values_return_themselves():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    signal = levels.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(to_pixels(signal, "round"), levels)
    assert (to_pixels(signal).int() - levels.int()).abs().max() <= 1  # the other cuts what lies just below


def test_a_latents_store_holds_the_moments_of_every_image_in_order(saved, tmp_path):
    autoencoder, images = Autoencoder.load(saved[0]), image_store(tmp_path / "images")
    store = encoded(tmp_path / "latents", images, autoencoder, batch=2)
    found = store.read("moments", range(9))
    assert found.dtype == np.float16 and found.shape == (9, 6, 4, 4)
    np.testing.assert_allclose(found, autoencoder.moments(pixels(9)).numpy(), rtol=2e-3, atol=1e-3)
    assert store.read("label", range(9)).tolist() == [i % 2 for i in range(9)]
    assert store.splits == {"train": range(6), "held_out": range(6, 9)}
    facts = {"channels": 3, "scale": 0.5, "shift": 0.25, "factor": 2, "size": 4, "classes": ["a", "b"]}
    facts |= {"autoencoder": autoencoder.identity, "images": images.identity}
    assert {name: store.manifest[name] for name in facts} == facts


def test_latents_of_other_images_or_autoencoders_are_not_joined(saved, tmp_path):
    autoencoder, images = Autoencoder.load(saved[0]), image_store(tmp_path / "images")
    other = image_store(tmp_path / "other", count=8)
    encoded(tmp_path / "latents", images, autoencoder)
    common = {"key": "l", "recipe": {}, "shards": 2, "provenance": {}}
    with pytest.raises(ValueError, match="images: found"):
        join_latents(tmp_path / "latents", other, **common)
    autoencoder.identity = "another"
    encode_shard(tmp_path / "latents", images, autoencoder, shard=1, condition=Labels(classes=2), **common)
    with pytest.raises(ValueError, match="autoencoder: found 'another'"):
        join_latents(tmp_path / "latents", images, **common)


def test_latents_beyond_the_dtype_are_refused_with_the_image(saved, tmp_path, monkeypatch):
    autoencoder, images = Autoencoder.load(saved[0]), image_store(tmp_path / "images")
    plain = autoencoder.moments
    monkeypatch.setattr(autoencoder, "moments", lambda batch: plain(batch) * 1e6)
    with pytest.raises(ValueError, match=r"image 0 are not finite in float16"):
        encoded(tmp_path / "latents", images, autoencoder)
    assert not list((tmp_path / "latents").glob("*.h5"))


def test_a_resolution_that_cannot_be_halved_is_refused(saved, tmp_path):
    autoencoder, images = Autoencoder.load(saved[0]), image_store(tmp_path / "images")
    autoencoder.factor = 3
    with pytest.raises(ValueError, match="images of 8 pixels, expected a multiple of 3"):
        encoded(tmp_path / "latents", images, autoencoder)


# ---- weights from outside


def test_weights_in_parts_load_as_the_whole(saved, tmp_path):
    saved[1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    images = pixels(2)
    whole, parts = Autoencoder.load(saved[0]), Autoencoder.load(tmp_path)
    assert torch.equal(whole.moments(images), parts.moments(images)) and parts.identity != whole.identity


def test_the_older_names_of_attention_load_as_the_newer(saved, copied):
    # The public VAEs of Stable Diffusion still carry these names.
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(copied / WEIGHTS)
    for new, old in older.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    save_file(weights, copied / WEIGHTS, metadata={"format": "pt"})
    images = pixels(2)
    assert torch.equal(Autoencoder.load(copied).moments(images), Autoencoder.load(saved[0]).moments(images))


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=4),
    layers=st.integers(1, 3),
    channels=st.integers(1, 8),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_the_shapes_that_a_configuration_stands_for_are_diffusers(widths, layers, channels, flags):
    names = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    config = {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": channels}
    config |= dict(zip(names, flags, strict=True)) | {"norm_num_groups": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    with torch.device("meta"):
        model = AutoencoderKL(**config, **{key: value * len(widths) for key, value in blocks.items()})
    assert shapes(config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def halved(folder):
    """The variant that people download: half precision, under a name that says so."""
    weights = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / WEIGHTS.replace(".safe", ".fp16.safe"), metadata={"format": "pt"})
    return weights


def test_the_half_precision_variant_alone_is_taken(saved, copied):
    weights = halved(copied)
    found = Autoencoder.load(copied)
    for name, value in found.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[name].float())
    images = pixels(2)
    torch.testing.assert_close(found.moments(images), Autoencoder.load(saved[0]).moments(images), rtol=0.01, atol=0.01)


def test_the_whole_precision_goes_before_the_half(saved, copied):
    weights = halved(copied)
    shutil.copy(saved[0] / WEIGHTS, copied)
    assert weights and Autoencoder.load(copied).identity == file_identity(saved[0] / WEIGHTS)


@pytest.mark.parametrize("half", [False, True])
def test_a_whole_pipelines_folder_is_taken_by_its_autoencoder(saved, tmp_path, half):
    shutil.copytree(saved[0], tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    if half:
        halved(tmp_path / "vae")
    name = WEIGHTS.replace(".safe", ".fp16.safe") if half else WEIGHTS
    assert Autoencoder.load(tmp_path).identity == file_identity(tmp_path / "vae" / name)


def test_of_a_hubs_repository_no_pickle_and_no_other_network_is_fetched():
    files = [
        "config.json",
        WEIGHTS,
        "vae/config.json",
        f"vae/{WEIGHTS}",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    others = ["diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "unet/" + WEIGHTS, "model_index.json"]
    fetched = list(filter_repo_objects(files + others, allow_patterns=PATTERNS))
    assert fetched == files


BARE = {
    "vae-ft-mse-840000-ema-pruned.safetensors": "one bare file, which does not say its architecture; ",
    "diffusion_pytorch_model.bin": "pickled weights, which are not loaded, because they can run code; save_pretrained",
    "vae.pt": "pickled weights",
}


@pytest.mark.parametrize("name", BARE)
def test_bare_files_are_named_for_what_they_are_alone_and_in_a_folder(saved, tmp_path, name):
    shutil.copy(saved[0] / WEIGHTS, tmp_path / name)
    for where in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError) as refusal:
            Autoencoder.load(where)
        assert f"{name}: {BARE[name]}" in str(refusal.value)


@pytest.mark.parametrize("change", ["missing", "added", "reshaped"])
def test_weights_that_do_not_fit_are_refused(copied, change):
    weights = load_file(copied / WEIGHTS)
    if change == "missing":
        del weights["encoder.conv_in.bias"]
    elif change == "added":
        weights["encoder.extra"] = torch.zeros(1)
    else:
        weights["encoder.conv_in.bias"] = torch.zeros(5)
    save_file(weights, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=WEIGHTS):
        Autoencoder.load(copied)


@pytest.mark.parametrize("content", [b"", b"junk", "cut"])
def test_broken_weights_are_refused_with_the_file(copied, content):
    path = copied / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content)
    with pytest.raises(ValueError, match=WEIGHTS):
        Autoencoder.load(copied)


def test_pickled_weights_are_refused(copied):
    torch.save(load_file(copied / WEIGHTS), copied / "diffusion_pytorch_model.bin")
    (copied / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="pickled weights"):
        Autoencoder.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"_class_name": "VQModel"}, "'VQModel', expected 'AutoencoderKL'"), ({"latents_mean": [0.0]}, "latents_mean")],
)
def test_other_kinds_of_autoencoder_are_refused(copied, change, message):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Autoencoder.load(copied)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_configuration_is_refused(copied, content):
    (copied / "config.json").unlink()
    if content is not None:
        (copied / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: expected an AutoencoderKL"):
        Autoencoder.load(copied)


@pytest.mark.parametrize("where", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_refused_with_what_to_give(where):
    with pytest.raises(ValueError, match=r"no such folder. Give a folder with config.json"):
        Autoencoder.load(where)


def test_an_unreachable_hub_is_refused_with_what_to_give(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"sd-vae-ft-mse: not a folder.*Give a folder with config.json"):
        Autoencoder.load("stabilityai/sd-vae-ft-mse")
