"""Inception's outputs against a second instance of torch-fidelity's network, and its resize against a formula.

The weights are random, saved in torch-fidelity's own format.
"""

import pickle
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity import feature_extractor_inceptionv3 as port

from haste.files import artefact
from haste.metrics.detectors import open_detector
from haste.networks.registry import DETECTORS

ALL = ["64", "192", "768", "2048", "logits_unbiased", "logits"]


def random_state():
    """A state dict whose activations neither vanish nor explode, with every bias and running mean off zero."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(port, "load_state_dict_from_url", lambda *args, **options: {})
        network = port.FeatureExtractorInceptionV3("inception", ALL)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.7, 1.3)
    network.fc.bias.normal_(0, 1)
    return network.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights-inception.pth"
    torch.save(random_state(), path)
    return path


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (2, 40, 33, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(weights, pictures):
    return open_detector("inception", weights)(pictures)


@pytest.fixture(scope="module")
def witness(weights, pictures):
    """What another instance saw: its own outputs, the network's input, and the layer that sFID reads, by parts."""
    network = port.FeatureExtractorInceptionV3("witness", ALL, str(weights))
    seen = {}
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: seen.update(input=given[0].clone()))
    layer = network.Mixed_6d.branch1x1
    # The normalisation's output, before the ReLU, which works in place.
    layer.bn.register_forward_hook(lambda module, given, out: seen.update(before=out.clone()))
    network.Mixed_6e.branch1x1.bn.register_forward_hook(lambda module, given, out: seen.update(wrong=out.clone()))
    with torch.inference_mode():
        outputs = network(pictures.permute(0, 3, 1, 2).contiguous())
    seen |= dict(zip(ALL, outputs, strict=True))
    return seen | {"fc": network.fc}


def test_the_plan_reckons_with_the_networks_operations(weights):
    with FlopCounterMode(display=False) as counter:
        open_detector("inception", weights)(torch.zeros(1, 299, 299, 3, dtype=torch.uint8))
    assert counter.get_total_flops() == pytest.approx(DETECTORS["inception"].flops, rel=0.02)


def test_the_detector_says_what_it_is(weights):
    detector = open_detector("inception", weights)
    assert detector.outputs == {"pool": 2048, "spatial": 2023, "logits_unbiased": 1008}
    assert (detector.smallest, sum(detector.outputs.values())) == (
        DETECTORS["inception"].smallest,
        DETECTORS["inception"].numbers,
    )
    assert (detector.name, detector.width, detector.classes) == ("inception", 2048, None)
    assert detector.weights == artefact.file_identity(weights) and detector.published is False
    assert "299 x 299" in detector.preprocessing and "(x - 128) / 128" in detector.preprocessing
    assert not detector.network.training
    assert not any(parameter.requires_grad for parameter in detector.network.parameters())


def test_every_output_has_its_width_and_is_float32(found):
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {"pool": (2, 2048), "spatial": (2, 2023), "logits_unbiased": (2, 1008)}
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_pool_is_the_mean_of_the_last_block(found, witness):
    torch.testing.assert_close(found["pool"], witness["2048"], rtol=1e-5, atol=1e-6)
    assert found["pool"].std() > 1e-3


def test_logits_are_a_product_without_the_bias(found, witness):
    weight, bias = witness["fc"].weight.double(), witness["fc"].bias.double()
    expected = witness["2048"].double() @ weight.T
    torch.testing.assert_close(found["logits_unbiased"].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(witness["logits"].double() - bias, expected, rtol=1e-4, atol=1e-5)
    assert (found["logits_unbiased"] - witness["logits"]).abs().max() > 1
    # To a rounding of float32, so that no batch moves them.
    exact = found["pool"].double() @ weight.T
    torch.testing.assert_close(found["logits_unbiased"].double(), exact, rtol=2**-23, atol=1e-12)


def test_spatial_is_seven_channels_of_mixed_6d_after_the_relu_by_row_column_channel(found, witness):
    before = witness["before"].numpy()
    assert before.shape == (2, 192, 17, 17) and (before < 0).any()
    expected = np.empty((2, 2023), np.float32)
    for image in range(2):
        for row in range(17):
            for column in range(17):
                for channel in range(7):
                    place = (row * 17 + column) * 7 + channel
                    expected[image, place] = max(0.0, before[image, channel, row, column])
    np.testing.assert_allclose(found["spatial"].numpy(), expected, rtol=1e-4, atol=1e-5)
    # Each of the known mistakes would be seen: by channel first, before the ReLU, of the next layer.
    for wrong in (
        np.maximum(before[:, :7], 0).reshape(2, -1),
        before[:, :7].transpose(0, 2, 3, 1).reshape(2, -1),
        np.maximum(witness["wrong"].numpy()[:, :7], 0).transpose(0, 2, 3, 1).reshape(2, -1),
    ):
        assert np.abs(found["spatial"].numpy() - wrong).max() > 0.1


def resized(image, side=299, centre=0.0):
    """A bilinear resize of an image (H, W, 3), pixel by pixel, in float64.

    source + centre = (target + centre) in / out, with a centre of 0 in TensorFlow 1 and of 1/2 in pytorch-fid.
    """
    height, width, _ = image.shape
    result = np.empty((side, side, 3))
    for y in range(side):
        for x in range(side):
            v = max(0.0, (y + centre) * height / side - centre)
            u = max(0.0, (x + centre) * width / side - centre)
            top, left = min(int(v), height - 1), min(int(u), width - 1)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dv, du = v - top, u - left
            above = image[top, left] * (1 - du) + image[top, right] * du
            below = image[bottom, left] * (1 - du) + image[bottom, right] * du
            result[y, x] = above * (1 - dv) + below * dv
    return result


@pytest.mark.parametrize("size", [(40, 33), (320, 512)], ids=["enlarged", "reduced"])
def test_images_are_resized_by_tensorflow_1s_formula_and_scaled_by_128(weights, size):
    detector = open_detector("inception", weights)
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    seen = []
    layer = detector.network.extractor.Conv2d_1a_3x3
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].permute(1, 2, 0).numpy()))
    detector(torch.from_numpy(image)[None])
    expected = (resized(image.astype(np.float64)) - 128) / 128
    # The source coordinate is a float32, so near a pixel's border half a pixel's step can be 3e-5 off.
    np.testing.assert_allclose(seen[0], expected, atol=2e-4)


@pytest.mark.parametrize("size", [(40, 33), (320, 512)], ids=["enlarged", "reduced"])
def test_pytorch_fid_resizes_with_half_pixel_centres_to_2x_minus_1_and_pools_what_the_same_network_makes_of_it(
    weights, size
):
    detector = open_detector("pytorch-fid", weights)
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    seen = []
    first = next(iter(detector.network.layers))
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    pool = detector(torch.from_numpy(image)[None])["pool"]
    expected = 2 * resized(image.astype(np.float64) / 255, centre=0.5) - 1
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0), expected, atol=1e-4)
    assert np.abs(expected - (resized(image.astype(np.float64)) - 128) / 128).max() > 0.1  # the other convention's
    witness = port.FeatureExtractorInceptionV3("witness", ["2048"], str(weights))
    witness.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: (seen[0],))
    (by_witness,) = witness(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    torch.testing.assert_close(pool, by_witness, rtol=1e-5, atol=1e-6)


def test_the_two_conventions_are_two_detectors_of_one_file_whose_features_are_never_compared(weights):
    adm, other = open_detector("inception", weights), open_detector("pytorch-fid", weights)
    assert adm.weights == other.weights and adm.identity != other.identity
    assert other.outputs == {"pool": 2048} and DETECTORS["pytorch-fid"].numbers == 2048
    assert "half-pixel" in other.preprocessing and "2 x - 1" in other.preprocessing


def test_outputs_of_an_image_do_not_depend_on_its_batch(weights, pictures, found):
    alone = open_detector("inception", weights)(pictures[1:])
    for name, value in alone.items():
        torch.testing.assert_close(value, found[name][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["inception", "pytorch-fid"])
def test_copies_of_a_detector_which_look_side_by_side_see_what_it_sees(weights, pictures, name):
    detector = open_detector(name, weights).spread(["cpu", "cpu"])
    each = [pictures, pictures.flip(0), 255 - pictures, pictures.flip(1)]
    expected = [detector(one) for one in each]
    with ThreadPoolExecutor(3) as threads:  # so that one of them looks at two at once
        seen = [threads.submit(one, each[i]) for i, one in enumerate([detector, *detector.copies, detector, detector])]
    for found, alone in zip(seen, expected, strict=True):
        for output, value in found.result().items():
            torch.testing.assert_close(value, alone[output], rtol=0, atol=0)


def test_images_too_small_or_not_bytes_are_refused(weights, pictures):
    detector = open_detector("inception", weights)
    with pytest.raises(ValueError, match=r"32 x 32 px or more, found \(31, 33\)"):
        detector(pictures[:, :31])
    with pytest.raises(ValueError, match="uint8 NHWC"):
        detector(pictures.float() / 255)


def test_wrong_truncated_and_foreign_weights_are_refused_by_name(weights, tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message) as error:
            open_detector("inception", path)
        assert str(path) in str(error.value)

    path = tmp_path / "some.pth"
    refused("found no file")
    path.write_bytes(weights.read_bytes()[:-1000])
    refused("found a truncated file")
    path.write_text("<html>not found</html>")
    refused("expected the weights of inception, found a web page")
    torch.save(torch.zeros(3), path)
    refused("expected tensors by name, found Tensor")
    state = torch.load(weights, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "fc.bias"}, path)
    refused(r"other weights.*fc\.bias")
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path)
    refused(r"other weights.*fc\.weight")
    torch.save({**state, "fc.bias": torch.full((1008,), torch.nan)}, path)
    refused(r"the weights fc\.bias are not finite")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_weights_file_is_not_run(tmp_path):
    for name, save in (("torch", torch.save), ("pickle", lambda obj, path: path.write_bytes(pickle.dumps(obj, 2)))):
        save({"fc.bias": Trap(tmp_path / "sprung")}, tmp_path / name)
        with pytest.raises(ValueError, match="which could run code|could run code, so save"):
            open_detector("inception", tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_without_internet_the_message_says_how_to_pass_a_file(monkeypatch, tmp_path):
    def offline(url, *args, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        ValueError, match=r"\(no route\): fetch https://.*-6726825d\.pth .* pass the file or put it into"
    ):
        open_detector("inception")


def test_a_file_in_torchs_cache_is_used_without_internet(monkeypatch, tmp_path, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: pytest.fail("asked the internet"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / port.URL_INCEPTION_V3.rsplit("/", 1)[1]).symlink_to(weights)
    assert open_detector("inception").weights == artefact.file_identity(weights)


def test_the_published_weights_are_known_by_their_hash(monkeypatch, weights):
    monkeypatch.setattr(artefact, "file_identity", lambda path: "6726825d" + "0" * 56)
    assert open_detector("inception", weights).published is True
