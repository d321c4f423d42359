"""Training on pictures and their mirror images: which are mirrored, what network and teacher see, and the names."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from haste.cli import main as cli
from haste.cluster import staging
from haste.data import order
from haste.data.batches import Batches
from haste.data.latents import Autoencoder
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.ops import cost, prune
from haste.teachers.encoder import Teacher
from haste.train import loop
from haste.train.distributed import Group
from haste.train.inputs import Inputs

PLAIN = {"batch": 8, "lr": 0.001, "ema": 0.9}
SHARDS = (["--shard", "0"], ["--shard", "1"], ["--join"])


@pytest.fixture
def make_flipped(make_plan, once):
    """A function to a plan whose rows flip unless they say otherwise, with latents of both orientations."""

    def make(**changes):
        plan = make_plan(**{"training": {**PLAIN, "flip": True}, **changes})

        def fill(folder):
            for how in SHARDS:
                assert cli.main(["latents", "--flipped", "-c", str(plan.file), *how]) == 0
            shutil.copytree(plan.flipped.folder, folder / "store")

        shutil.copytree(once("flipped", fill) / "store", plan.flipped.folder, dirs_exist_ok=True)
        return plan

    return make


def batches_of(plan, run="HASTE"):
    recipe = plan.trajectories[plan.state(run, 8).trajectory].recipe
    return Batches.of(recipe, Store.of(plan.latents), Store.of(plan.images), flipped=Store.of(plan.flipped))


def bit(seed, step, place):
    """The documented bit: the first of what Philox gives for (seed, "flip", step, place)."""
    return int(order.generator(seed, "flip", step, place).bit_generator.random_raw()) >> 63


def seen(plan, step):
    """The pictures of a step's batch as they are to be seen, and their bits; knows nothing of how batches are made."""
    chosen, bits = order.batch_indices(0, step, 8, 1700), [bit(0, step, place) for place in range(8)]
    with Store.open(plan.images.folder) as images:
        pictures = [images.read("image", [int(index)])[0] for index in chosen]
    return np.stack([np.flip(p, axis=1) if b else p for p, b in zip(pictures, bits, strict=True)]), bits


@pytest.mark.parametrize("stored_as", ["raw", "webp"])
def test_a_batch_has_the_pixels_and_the_encoders_moments_of_np_flip_where_the_documented_bit_says_so(
    make_flipped, tiny, stored_as
):
    plan = make_flipped(images={**tiny["images"], "stored_as": stored_as})
    if stored_as == "webp":
        shutil.rmtree(plan.images.folder)
        for how in SHARDS:
            assert cli.main(["images", "-c", str(plan.file), *how]) == 0
    batches, encoder = batches_of(plan), Autoencoder.load(plan.encoder)
    for step in (0, 5):
        batch, (pictures, bits) = batches(step), seen(plan, step)
        assert 0 < sum(bits) < 8
        assert np.array_equal(batch.images.numpy(), pictures)
        torch.testing.assert_close(batch.moments, encoder.moments(pictures.copy()), rtol=1e-5, atol=1e-5)
        flipped_latents = batches.latents.read("moments", order.batch_indices(0, step, 8, 1700))[..., ::-1].copy()
        turned = torch.tensor(bits, dtype=torch.bool)
        apart = (batch.moments - torch.from_numpy(flipped_latents))[turned].abs().max()
        assert apart > 1e-2  # so a latent that is mirrored in place of its picture would be another


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 2**30), st.integers(1, 20))
def test_which_samples_are_mirrored_follows_from_seed_step_and_place_alone(seed, step, first, count):
    places = range(first, first + count)
    assert order.flips(seed, step, places).tolist() == [bool(bit(seed, step, place)) for place in places]


def test_half_of_the_draws_are_mirrored():
    drawn = sum(int(order.flips(1, step, range(100)).sum()) for step in range(100))
    assert 4800 < drawn < 5200  # 5,000 expected, standard deviation 50


def test_a_rank_has_its_rows_of_the_whole_batch_and_readers_ahead_have_the_same(make_flipped):
    batches = batches_of(make_flipped())
    for read in batches.ahead(range(3), range(2, 6), readers=3):
        whole = batches(read.step)
        for name in ("moments", "images", "draw", "noise", "t", "condition"):
            assert torch.equal(getattr(read, name), getattr(whole, name)[2:6]), name


def test_the_teacher_sees_the_picture_mirrored_before_its_preprocessing_which_is_the_preprocessed_one_mirrored(
    make_flipped,
):
    plan = make_flipped()
    state = plan.state("HASTE", 8)
    group = Group(0, 1, torch.device("cpu"))
    inputs = Inputs(plan, plan.segment(state), plan.trajectories[state.trajectory].recipe, group)
    pictures = torch.from_numpy(seen(plan, 0)[0].copy())
    found = inputs.targets(inputs.batches(0))["vit"]
    with inputs.precision():
        expected = Teacher.load(plan.teachers["vit"].folder)(pictures, features=True, attention=[0, 1])
    assert torch.equal(found.features, expected.features)
    for layer, pair in expected.attention.items():
        assert all(torch.equal(one, other) for one, other in zip(found.attention[layer], pair, strict=True))
    for resize_first in (False, True):
        teacher = inputs.teachers["vit"]
        teacher.resize_first, teacher.size = resize_first, (14, 14)
        prepared = teacher.prepare(pictures.flip(2))
        torch.testing.assert_close(prepared, teacher.prepare(pictures).flip(3), rtol=1e-4, atol=1e-5)


def _dies(plan, state, step, after):
    given = loop.total_loss

    def dying(found, terms, at):
        if at == step:
            while not after.exists():  # it is saved in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return given(found, terms, at)

    torch.set_num_threads(1)
    loop.total_loss = dying
    loop.train(plan, state)


def test_six_steps_on_copies_are_three_a_kill_and_three_and_the_state_says_what_it_was_trained_on(
    make_flipped, tiny, tmp_path
):
    plan = make_flipped(defaults={**tiny["defaults"], "milestones": [6]})
    state, scratch = plan.state("HASTE", 6), tmp_path / "scratch"
    path = Path(plan.path(state))
    scratch.mkdir()
    assert list(staging.wanted(plan, state)) == ["latents", "images", "flipped latents"]
    with staging.staged(plan, state, str(scratch)) as near:
        assert scratch in Path(near.flipped.folder).parents
        loop.train(near, state)
    whole, header = load_file(path), read_header(path)
    assert header["recipe"]["training"]["flip"] is True
    with Store.open(plan.flipped.folder) as store:
        assert header["inputs"]["flipped latents"] == store.identity
    shutil.rmtree(path.parent)
    saved = path.parent / "rolling" / "step-00000003.safetensors"
    child = multiprocessing.get_context("fork").Process(target=_dies, args=(plan, state, 4, saved))
    child.start()
    try:
        child.join(timeout=100)
    finally:
        ended = child.exitcode
        child.kill()
    assert ended == -signal.SIGKILL and not path.exists()
    assert list(path.parent.glob("rolling/*.safetensors")) == [saved]
    loop.train(plan, state)
    again = load_file(path)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_key_names_the_states_of_the_rows_that_have_it_and_a_store_of_their_own_and_nothing_else(make_plan, tiny):
    before, said = make_plan(), make_plan(training={**PLAIN, "flip": False})
    rows = {**tiny["runs"], "flips": {"training": {"flip": True}}}
    one, every = make_plan(runs=rows), make_plan(training={**PLAIN, "flip": True})
    assert said.trajectories.keys() == before.trajectories.keys() and said.flipped is before.flipped is None
    assert said.report_made == before.report_made
    assert one.trajectories.keys() > before.trajectories.keys()
    assert one.trajectories.keys() - before.trajectories.keys() == {one.state("flips", 8).trajectory}
    assert not every.trajectories.keys() & before.trajectories.keys()
    for plan in (one, every):
        assert plan.latents == before.latents and plan.images == before.images
        assert plan.detector.reference == before.detector.reference and plan.flipped.key != plan.latents.key
        assert plan.detector.reconstructed == before.detector.reconstructed
        assert Path(plan.flipped.folder) in prune.named(plan)
    reads = {run: set(one.jobs.of("train", one.path(one.state(run, 8))).reads()) for run in ("vanilla", "flips")}
    assert reads["flips"] - reads["vanilla"] == {one.flipped.manifest}
    assert "flipped latents" not in staging.wanted(one, one.state("vanilla", 8))


def test_the_plan_counts_latents_of_both_orientations_and_says_who_flips(make_plan, tiny, capsys):
    sizes = []
    for flip in (False, True):
        plan = make_plan(training={**PLAIN, "flip": flip})
        shutil.rmtree(plan.latents.folder, ignore_errors=True)
        sizes.append({one.name: (one.jobs, one.megabytes) for one in cost.stages(plan)[0]}["latents"])
    (jobs, megabytes), both = sizes
    assert both == (2 * jobs, pytest.approx(2 * megabytes)) and megabytes == pytest.approx(1797 * 8 * 4 * 4 * 4 / 1e6)
    assert cli.main(["plan", "-c", str(plan.file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "training.flip: in all runs half of the pictures of a step are mirrored, with latents of their own." in said
    make_plan(runs={**tiny["runs"], "flips": {"training": {"flip": True}}})
    assert cli.main(["plan", "-c", str(plan.file)]) == 0
    assert "training.flip: in flips half of the pictures" in " ".join(capsys.readouterr().out.split())


def test_targets_on_disk_are_refused_to_a_row_that_flips_and_follows_them(make_plan, tiny, capsys):
    teachers = {"vit": {**tiny["teachers"]["vit"], "cache": "features"}}
    make_plan(teachers=teachers, runs={"v": {"training": {"flip": True}}, "HASTE": {"alignment": "HASTE"}})
    rows = {"HASTE": {"alignment": "HASTE", "training": {"flip": True}}}
    with pytest.raises(ValueError) as refusal:
        make_plan(teachers=teachers, runs=rows)
    assert str(refusal.value).splitlines()[-1] == (
        "runs.HASTE: training.flip: true, but teachers.vit.cache: features keeps targets of pictures as they are, not "
        "mirrored; expected teachers.vit.cache: off, or training.flip: false"
    )
    rows["HASTE"]["stop"] = {"features": 0}  # only the attention is followed, online
    make_plan(teachers=teachers, runs=rows)


def test_what_is_measured_is_never_mirrored_and_needs_no_latents_of_mirrored_pictures(make_flipped, tiny):
    measures = {
        "loss": {"measure": "denoising", "images": 8, "groups": 8, "t": [0.5]},
        "cos": {"measure": "gradient-cosine", "images": 4, "shards": 2, "t": [0.5]},
    }
    rows = {"HASTE": {"alignment": "HASTE", "milestones": [1], "measures": list(measures)}}
    plan = make_flipped(measures=measures, runs=rows)
    batches, chosen = batches_of(plan), np.arange(5)
    batch = batches.measured(chosen, range(5))
    assert np.array_equal(batch.moments.numpy(), batches.latents.read("moments", chosen))
    assert np.array_equal(batch.images.numpy(), batches.images.read("image", chosen))
    assert batches.of_all(batches.latents, batches.condition).flipped is None
    loop.train(plan, plan.state("HASTE", 1))
    shutil.rmtree(plan.flipped.folder)
    for one in plan.measured:
        assert plan.flipped.manifest not in plan.measured_from(one.measurement)
        assert cli.main(["measure", one.measurement.label, one.measurement.name, "-c", str(plan.file)]) == 0
        inputs = json.loads(Path(one.measurement.file).read_text())["provenance"]["inputs"]
        assert "latents" in inputs and "flipped latents" not in inputs


def test_latents_of_mirrored_pictures_by_another_autoencoder_or_of_other_images_are_refused(make_flipped):
    plan = make_flipped()
    latents, other = Store.of(plan.latents), Store.of(plan.flipped)
    how = {"condition": batches_of(plan).condition}
    recipe = plan.trajectories[plan.state("HASTE", 8).trajectory].recipe
    for entry, said in (("autoencoder", "was encoded by another autoencoder than"), ("images", "encoded from images")):
        kept = other.manifest[entry]
        other.manifest[entry] = "another"
        with pytest.raises(ValueError, match=said):
            Batches.of(recipe, latents, flipped=other, **how)
        other.manifest[entry] = kept


def test_latents_of_mirrored_pictures_are_not_made_where_no_row_flips(make_plan, capsys):
    assert cli.main(["latents", "--flipped", "--join", "-c", str(make_plan().file)]) == 2
    assert "training.flip: false in every run" in capsys.readouterr().err
