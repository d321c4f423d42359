"""Training on pictures and their mirror images: which are mirrored, what the network and the teacher see, and names."""

import os
import signal

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from haste import config
from haste.cli import main as cli
from haste.cluster import staging
from haste.data import order
from haste.data.batches import Batches
from haste.data.latents import Autoencoder
from haste.files.provenance import read_header
from haste.files.store import Store, join, shard_range, write_shard
from haste.plan.plan import Plan
from haste.teachers.encoder import Teacher
from haste.train import loop

TRAINING = {"batch": 8, "lr": 0.001, "ema": 0.9}


@pytest.fixture
def make_flipped(make_plan):
    """A function to a plan whose rows flip, with latents of both orientations, made as the workflow makes them."""

    def make(**changes):
        plan = make_plan(training={**TRAINING, "flip": True}, **changes)
        for how in (["--shard", "0"], ["--shard", "1"], ["--join"]):
            assert cli.main(["latents", "--flipped", "-c", str(plan.file), *how]) == 0
        return plan

    return make


def batches_of(plan, run="HASTE", **more):
    recipe = plan.trajectories[plan.state(run, 8).trajectory].recipe
    return Batches.of(recipe, Store.of(plan.latents), Store.of(plan.images), flipped=Store.of(plan.flipped), **more)


def test_a_batch_has_the_encoders_moments_and_the_pixels_of_np_flip_where_the_documented_bit_says_so(make_flipped):
    plan = make_flipped()
    batches, images = batches_of(plan), Store.of(plan.images)
    autoencoder = Autoencoder.load(plan.encoder)
    for step in (0, 5):
        batch = batches(step)
        # Philox keyed by the seed and the purpose, counted by step and place: the first bit of its first word.
        bits = [int(order.generator(0, "flip", step, row).bit_generator.random_raw()) >> 63 for row in range(8)]
        assert 0 < sum(bits) < 8
        for row, index in enumerate(order.batch_indices(0, step, 8, 1700)):
            picture = images.read("image", [int(index)])[0]
            seen = np.flip(picture, axis=1).copy() if bits[row] else picture
            assert np.array_equal(batch.images[row].numpy(), seen)
            expected = autoencoder.moments(seen[None])[0]
            torch.testing.assert_close(batch.moments[row], expected, rtol=1e-5, atol=1e-5)
