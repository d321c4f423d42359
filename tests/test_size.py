"""What a stage holds in memory follows from its pieces, not from how many images or samples there are: 1,281,167 images
as in ImageNet and 50,000 samples as in its tables, with small rows. Bounds are in bytes that Python allocates."""

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from haste.data.latents import Autoencoder
from haste.files import artefact
from haste.files.store import Store, join, write_shard
from haste.metrics.neighbours import precision_recall
from haste.metrics.scores import METRICS, NEIGHBOURS
from haste.sampling import grids, looks
from haste.score import workflow
from haste.train.jobs import _spread

IMAGES, SAMPLES, WIDTH, SIDE = 1_281_167, 50_000, 32, 16
PIECE = 2**16  # images
MB = 1_000_000


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that are allocated while it runs."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def features() -> Iterator[np.ndarray]:
    """A detector's features of as many images as ImageNet has: 164 MB."""
    drawn = np.random.default_rng(0).standard_normal((PIECE, WIDTH), dtype=np.float32)
    return (drawn[: min(PIECE, IMAGES - low)] + np.float32(low / IMAGES) for low in range(0, IMAGES, PIECE))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Store:
    """A store of them, each compared with its digest already, which takes a minute under `peak`."""
    folder = tmp_path_factory.mktemp("real")
    common: dict[str, Any] = {"kind": "features", "key": "k", "recipe": {}, "shards": 1, "provenance": {}}
    batches = ({"pool": part, "label": np.zeros(len(part), np.int64)} for part in features())
    fields = {"pool": ((WIDTH,), "float32"), "label": ((), "int64")}
    write_shard(folder, shard=0, total=IMAGES, fields=fields, batches=batches, facts={"detector": "d" * 64}, **common)
    join(folder, splits={}, **common)
    store = Store.open(folder)
    for low in range(0, IMAGES, PIECE):
        store.read("pool", np.arange(low, min(low + PIECE, IMAGES)))
    return store


def test_a_store_of_1281167_rows_is_opened_without_its_rows(reference):
    assert peak(lambda: Store.open(reference.folder)) < 3 * 16 * IMAGES  # a digest of 16 bytes each


def test_the_moments_of_1281167_real_images_are_computed_once_and_in_pieces(reference, monkeypatch):
    assert peak(lambda: workflow.kept_moments(reference)) < 50 * MB  # their numbers and one piece; features are 164 MB
    rows = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, field, some: rows.append(len(some)) or read(self, field, some))
    stats, _ = workflow.real_statistics(reference)
    near = [name for name in stats if METRICS[name].reference_rows]
    assert len(near) == 2 and sum(rows) == NEIGHBOURS  # precision and recall, and KID, use the same rows
    whole = np.concatenate(list(features())).astype(np.float64)
    np.testing.assert_allclose(stats["frechet"].mean, whole.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(stats["frechet"].covariance, np.cov(whole.T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["damaged", "of other features"])
def test_kept_moments_that_are_damaged_or_of_other_features_are_computed_again(tmp_path, how):
    stores = []
    for seed in (0, 1):
        folder, rows = tmp_path / str(seed), np.random.default_rng(seed).standard_normal((50, 4)).astype(np.float32)
        common: dict[str, Any] = {"kind": "features", "key": "k", "recipe": {}, "shards": 1, "provenance": {}}
        facts = {"detector": "d" * 64}
        write_shard(
            folder,
            shard=0,
            total=50,
            fields={"pool": ((4,), "float32")},
            batches=[{"pool": rows}],
            facts=facts,
            **common,
        )
        join(folder, splits={}, **common)
        stores.append(Store.open(folder))
    expected, other = (workflow.kept_moments(store)["pool"].mean for store in stores)
    assert not np.allclose(expected, other)
    file = stores[0].folder / workflow.MOMENTS
    file.write_bytes(b"no npz" if how == "damaged" else (stores[1].folder / workflow.MOMENTS).read_bytes())
    for _ in range(2):
        np.testing.assert_array_equal(workflow.kept_moments(stores[0])["pool"].mean, expected)
    assert artefact.read_json(stores[0].folder / "manifest.json", "store")["identity"] == stores[0].identity


def test_precision_and_recall_hold_at_most_5_float32_copies_of_the_samples_features():
    real, fake = (np.random.default_rng(n).standard_normal((n, 512), dtype=np.float32) for n in (600, 3000))
    assert peak(lambda: precision_recall(real, fake)) < 5 * fake.nbytes  # in float64 and around the mean


@pytest.fixture
def drawn(make_plan) -> Any:
    """The evaluation of 50,000 samples of 16 px in two shards, which are 38 MB; its plan is beside it."""
    sampling = {"quick": {"sampler": "euler", "steps": 2, "count": SAMPLES}}
    plan = make_plan(sampling=sampling, runtime={"sample_shards": 2})
    evaluation, block = plan.rows[0].evaluation, np.zeros((SAMPLES // 2, SIDE, SIDE, 3), np.uint8)
    header = np.array(artefact.canonical({"schema": artefact.SCHEMA, "kind": "samples", "inputs": {}}))
    for shard, path in enumerate(evaluation.sample_files):
        numbers = np.arange(SAMPLES // 2) + shard * (SAMPLES // 2)
        block[...] = (numbers % 251)[:, None, None, None]
        labels = np.where(numbers < SAMPLES // 2 + 3, numbers % 9, numbers % 10)  # the first nines are in the second
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, arr_0=block, arr_1=labels, haste=header)
    return plan, evaluation


def test_the_grid_of_50000_samples_in_two_shards_holds_its_40_images_alone(drawn):
    plan, evaluation = drawn
    assert peak(lambda: grids.paint_grid(plan, evaluation)) < 10 * MB
    cell = SIDE * grids.SCALE + grids.GAP
    shown = np.asarray(Image.open(evaluation.grid))[cell // 2 :: cell, cell // 2 :: cell, 0]
    expected = [[column + 9 * row for row in range(4)] for column in range(9)]  # the first four of each label
    expected.append([(25_009 + 10 * row) % 251 for row in range(4)])
    np.testing.assert_array_equal(shown, np.array(expected).T)


def test_50000_samples_whose_facts_were_not_kept_are_read_in_pieces(drawn):
    _, evaluation = drawn
    found: dict[str, Any] = {}
    assert peak(lambda: found.update(looks.facts_of_shards(evaluation.sample_files))) < 10 * MB
    assert (found["images"], found["copies"]) == (SAMPLES, SAMPLES - 251)


@pytest.mark.parametrize(("side", "most"), [(8, 64), (256, 64), (512, 16)])
def test_as_many_images_are_encoded_at_once_as_have_4_million_pixels(side, most):
    seen = []

    def encode(signal):
        seen.append(len(signal))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=signal[:, :1, :1, :1], std=signal[:, :1, :1, :1]))

    network: Any = SimpleNamespace(encode=encode)
    for name in ("to", "eval", "requires_grad_"):
        setattr(network, name, lambda *_, **__: network)
    config = {"latent_channels": 1, "block_out_channels": [1], "scaling_factor": 1.0}
    images = np.zeros((64, side, side, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(64)
    found = Autoencoder(network, config, "it", "cpu").moments(images)
    assert set(seen) == {most}
    np.testing.assert_allclose(found[:, 0, 0, 0], np.arange(64) / 127.5 - 1, rtol=1e-6)


@pytest.mark.parametrize(("side", "count"), [(8, 49_276), (64, 49_276), (256, 10_858)])
def test_networks_that_are_trained_here_see_at_most_50000_images_and_2_gb_of_their_pixels(side, count):
    rows = _spread(range(IMAGES), side * side * 3)
    assert len(rows) == count and len(rows) * side * side * 3 <= 2**31
    assert rows[-1] >= IMAGES - (rows[1] - rows[0])  # from the whole set
