"""Inception with random weights in torch-fidelity's format: scores of files are torch-fidelity's of the same images.

The reference is laid out as ADM's, its statistics made by torch-fidelity's own network.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import prc_features_to_metric

from haste.metrics.detectors import open_detector
from haste.score.images import score_images

COUNT = 12


class Images(torch.utils.data.Dataset):
    """uint8 CHW, as torch-fidelity reads them."""

    def __init__(self, images):
        self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(autouse=True)
def few_channels():
    """Here files of statistics hold Inception's own channels."""


def random_state():
    path = Path(__file__).parent.parent / "metrics" / "test_inception.py"
    spec = importlib.util.spec_from_file_location("inception_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.random_state()


def textured(seed, contrast):
    """Images of 32 px, coarse enough to survive the network's resize."""
    coarse = np.random.default_rng(seed).integers(0, 256, (COUNT, 8, 8, 3)) * contrast
    return coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def world(once):
    """Two sets, weights, and what torch-fidelity says of them."""

    def fill(folder):
        torch.save(random_state(), folder / "weights.pth")
        fake, real = textured(0, 0.9), textured(1, 1.0)
        fake[:4] = real[:4]
        fake[:4, ::5] += 3  # near, so that precision and recall are not 0
        theirs = torch_fidelity.calculate_metrics(
            input1=Images(fake),
            input2=Images(real),
            feature_extractor_weights_path=str(folder / "weights.pth"),
            **{"cuda": False, "fid": True, "kid": True, "isc": True, "verbose": False, "save_cpu_ram": True},
            **{"kid_subsets": 1, "kid_subset_size": COUNT, "isc_splits": 1, "batch_size": 4, "cache": False},
        )
        network = FeatureExtractorInceptionV3("witness", ["2048"], str(folder / "weights.pth"))
        with torch.inference_mode():
            pools = [network(Images(images).images)[0] for images in (fake, real)]
        # Its own precision and recall are by VGG's features if it is left to choose.
        theirs |= prc_features_to_metric(pools[0].double(), pools[1].double(), verbose=False)
        pool = pools[1].numpy().astype(np.float64)
        np.savez(folder / "fake.npz", arr_0=fake)
        np.savez(folder / "VIRTUAL.npz", arr_0=real, mu=pool.mean(0), sigma=np.cov(pool.T))
        (folder / "theirs.json").write_text(json.dumps({name: float(value) for name, value in theirs.items()}))

    folder = once("fidelity", fill)
    return folder, json.loads((folder / "theirs.json").read_text())


def test_scores_of_files_are_torch_fidelitys(world):
    folder, theirs = world
    detector = open_detector("inception", folder / "weights.pth")
    found = score_images(folder / "fake.npz", folder / "VIRTUAL.npz", detectors=[detector], batch=5)
    assert found["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert found["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4, abs=1e-7)
    assert found["precision"] == pytest.approx(theirs["precision"])
    assert found["recall"] == pytest.approx(theirs["recall"])
    assert found["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert 0 < found["precision"] < 1
    assert "holds no mu_s and sigma_s" in found.absent["sFID"]
    assert not found.detectors[0]["published"]
