"""DINOv2's class token on random weights in the libraries' own files, against torchvision and formulas."""

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from haste.files import artefact
from haste.metrics import dinov2 as room
from haste.metrics.detectors import open_detector
from haste.networks.registry import DETECTORS

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two narrow blocks in place of 24: timm still reads, checks and renames the files."""
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made(name, **{**options, **SMALL}))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = timm.create_model("vit_large_patch14_dinov2.lvd142m", num_classes=0, **SMALL).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network


@pytest.fixture
def weights(network, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


def pictures(size=(48, 48), count=3):
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, *size, 3), np.uint8))


def cubic(distance):
    """Keys' kernel with a = -3/4, which torch's bicubic takes."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resampled(positions, side, before=37, offset=0.1):
    """DINOv2's own resampling of positions (before, before, D), point by point: the grid is taken for 16.1 wide."""
    weights = np.zeros((side, before))
    for target in range(side):
        source = (target + 0.5) * before / (side + offset) - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            weights[target, min(max(tap, 0), before - 1)] += cubic(source - tap)
    return np.einsum("yv,xu,vud->yxd", weights, weights, positions)


def expected(network, images):
    """The class token, by torchvision's preprocessing and timm's blocks, one after the other."""
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    x = torch.stack([prepare(Image.fromarray(image.numpy())) for image in images])
    positions = network.pos_embed.detach().numpy()[0].astype(np.float64)
    grid = resampled(positions[1:].reshape(37, 37, -1), 16)
    positions = torch.from_numpy(np.concatenate([positions[:1], grid.reshape(256, -1)])).float()
    with torch.no_grad():
        patches = network.patch_embed.proj(x).flatten(2).mT
        tokens = torch.cat([network.cls_token.expand(len(x), -1, -1), patches], dim=1) + positions
        for block in network.blocks:
            tokens = block(tokens)
        return network.norm(tokens)[:, 0]


@pytest.mark.parametrize("size", [(48, 48), (224, 224), (300, 260)], ids=["enlarged", "as-it-is", "reduced"])
def test_the_class_token_is_that_of_the_published_protocol(network, weights, size):
    images = pictures(size)
    found = open_detector("DINOv2-L", weights)(images)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"pool": (3, 24)}
    torch.testing.assert_close(found["pool"], expected(network, images), rtol=1e-3, atol=1e-4)


def test_positions_are_resampled_as_dinov2s_authors_do(network):
    positions = network.pos_embed.detach()
    found = room.with_grid(positions, 16)
    wanted = resampled(positions[0, 1:].numpy().astype(np.float64).reshape(37, 37, -1), 16)
    np.testing.assert_allclose(found[0, 1:].numpy(), wanted.reshape(256, -1), rtol=1e-4, atol=1e-5)
    assert (found[0, 0] == positions[0, 0]).all() and room.with_grid(positions, 37) is positions


def test_images_are_resized_as_pillow_resizes_bytes():
    images = pictures((64, 50))
    wanted = np.stack([np.asarray(Image.fromarray(i.numpy()).resize((224, 224), Image.BICUBIC)) for i in images])
    assert (room.resized(images).numpy() == wanted).all()


def test_the_authors_file_gives_what_timms_gives(network, weights, tmp_path):
    state = {**network.state_dict(), "mask_token": torch.zeros(1, 24)}
    torch.save(state, tmp_path / "dinov2_vitl14_pretrain.pth")
    authors = open_detector("DINOv2-L", tmp_path / "dinov2_vitl14_pretrain.pth")(pictures())["pool"]
    torch.testing.assert_close(authors, open_detector("DINOv2-L", weights)(pictures())["pool"], rtol=0, atol=0)


def test_the_detector_says_what_it_is(weights):
    detector = open_detector("DINOv2-L", weights, called="judge")
    assert (detector.name, detector.kind, detector.width, detector.classes) == ("judge", "DINOv2-L", 24, None)
    assert detector.weights == artefact.file_identity(weights)
    assert "antialiasing to 224 x 224" in detector.preprocessing
    assert not detector.network.training
    assert not any(parameter.requires_grad for parameter in detector.network.parameters())


@pytest.mark.parametrize("name", sorted(room.TIMM))
def test_the_networks_are_timms_with_this_patch_and_normalisation(name):
    source = timm.get_pretrained_cfg(room.TIMM[name])
    assert (source.mean, source.std) == (room.MEAN, room.STD)
    with torch.device("meta"):
        network = timm.create_model(room.TIMM[name], num_classes=0)
    assert network.patch_embed.patch_size == (room.PATCH, room.PATCH)
    assert network.patch_embed.grid_size == (37, 37) and network.num_prefix_tokens == 1
    with torch.device("meta"):
        whole = timm.models.create_model(room.TIMM[name])
    assert (DETECTORS[name].smallest, DETECTORS[name].numbers) == (1, whole.embed_dim)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        timm.models.create_model(room.TIMM[name], num_classes=0, img_size=224)(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() == pytest.approx(DETECTORS[name].flops, rel=0.01)


def test_wrong_truncated_and_foreign_weights_are_refused_by_name(network, weights, tmp_path):
    with pytest.raises(ValueError, match="nowhere: expected the weights of detector DINOv2-B, found no file"):
        open_detector("DINOv2-B", tmp_path / "nowhere")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the weights of detector DINOv2-L, found a tr"):
        open_detector("DINOv2-L", weights)
    state = network.state_dict()
    safetensors.torch.save_file({**state, "norm.bias": torch.full((24,), torch.nan)}, weights)
    with pytest.raises(ValueError, match=r"the weights norm\.bias are not finite"):
        open_detector("DINOv2-L", weights)


def test_without_a_network_the_message_says_how_to_give_a_file(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="detector DINOv2-L: its weights .* Give a local file"):
        open_detector("DINOv2-L")
