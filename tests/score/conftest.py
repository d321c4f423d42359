"""Detectors of a moment: fixed random maps of an image's pixels, with the outputs that Inception or others have."""

import numpy as np
import pytest
import torch
from torch import nn

from haste.files import npz
from haste.metrics.detector import Detector

SIDE = 8
WIDTHS = {"pool": 5, "spatial": 4, "logits_unbiased": 6}


class Toy(nn.Module):
    def __init__(self, widths, seed):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.maps = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(SIDE * SIDE * 3, width, generator=rng)) for name, width in widths.items()}
        )

    def forward(self, images):
        # float64, then rounded: the same features in any batch
        flat = images.reshape(len(images), -1).double() / 255
        return {name: (flat @ matrix.double()).float() for name, matrix in self.maps.items()}


def toy(kind="inception", seed=0, widths=WIDTHS, **more):
    options = {"weights": f"{seed:064d}", "outputs": widths, "preprocessing": "as they are", "published": True}
    return Detector(Toy(widths, seed), kind=kind, **options | more)


@pytest.fixture
def detector():
    return toy()


@pytest.fixture
def make_detector():
    return toy


@pytest.fixture(autouse=True)
def few_channels(monkeypatch):
    """Files of statistics hold as many channels as the toy has."""
    monkeypatch.setattr(npz, "WIDTHS", WIDTHS)


def drawn(seed, count, low=0, high=256):
    """Images whose brightness varies, so that no row stands for another."""
    rng = np.random.default_rng(seed)
    images = rng.integers(low, high, (count, SIDE, SIDE, 3))
    return (images * rng.uniform(0.5, 1, (count, 1, 1, 3))).astype(np.uint8)


@pytest.fixture
def draw():
    return drawn


@pytest.fixture
def pack(tmp_path):
    """A function from a name and images to an .npz of them."""

    def save(name, images, **more):
        path = tmp_path / f"{name}.npz"
        np.savez(path, arr_0=images, **more)
        return path

    return save
