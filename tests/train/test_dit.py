"""DiT in the same trainer: cut, killed, divided among processes, aligned, with cached targets, measured, stopped."""

import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import train_with

from haste import config
from haste.cli import main as cli
from haste.config import process_in
from haste.diffusion.ddpm import DDPM
from haste.files import journal
from haste.files.provenance import read_header
from haste.measure import jobs
from haste.models.build import build_model
from haste.train import loop

DIT = {"dot": {"architecture": "dit", "depth": 2, "width": 16, "heads": 2, "patch_size": 2}}
SAMPLING = {"few": {"sampler": "ddpm", "steps": 4, "count": 20, "labels": "balanced", "guidance": 2.0}}
DEFAULTS = {"model": "dot", "milestones": [8, 16], "sampling": ["few"]}
DOUBLE = {"batch": 8, "lr": 1.0e-3, "ema": 0.9, "precision": "fp64"}


@pytest.fixture
def make(make_plan):
    """A function from changes to a plan of DiT runs."""
    return lambda **changes: make_plan(**{"models": DIT, "sampling": SAMPLING, "defaults": DEFAULTS, **changes})


def bits(plan, run, step):
    return load_file(plan.path(plan.state(run, step)))


def remove_states(plan):
    shutil.rmtree(Path(plan.root, "states"))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_cuts_and_a_stop_change_no_bit_and_the_log_has_the_parts_of_the_loss(make):
    whole = make(defaults={**DEFAULTS, "milestones": [16]})
    for step in (12, 16):
        loop.train(whole, whole.state("HASTE-12", step))
    expected = bits(whole, "HASTE-12", 16)
    for record in journal.read(Path(whole.path(whole.state("HASTE-12", 16))).parent / "log.jsonl"):
        assert record["denoising"] == pytest.approx(record["mse"] + record["vlb"], rel=1e-6)
        assert record["mse"] > 0 and record["vlb"] > 0
    remove_states(whole)
    cut = make(defaults={**DEFAULTS, "milestones": [3, 8, 14, 16]})
    for step in (3, 8, 12, 14, 16):
        loop.train(cut, cut.state("HASTE-12", step))
    assert_same_bits(bits(cut, "HASTE-12", 16), expected)


RUNS = {"HASTE": {"alignment": "HASTE", "milestones": [24]}}


def test_four_killed_processes_end_in_the_same_bits(make):
    plan = make(runs=RUNS, runtime={"processes": 4, "save_every": 3, "log_every": 3})
    state = plan.state("HASTE", 24)
    assert not train_with(plan, state, 4)
    expected = bits(plan, "HASTE", 24)
    records = journal.read(Path(plan.path(state)).parent / "log.jsonl")
    remove_states(plan)
    assert train_with(plan, state, 4, die_after=0.4 * sum(record["seconds"] for record in records))
    assert not train_with(plan, state, 4)
    assert_same_bits(bits(plan, "HASTE", 24), expected)


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (4, 1), (1, 2)])
def test_processes_and_accumulation_change_float64_training_by_rounding_only(make, processes, accumulate):
    alone = make(training=DOUBLE, runs=RUNS)
    loop.train(alone, alone.state("HASTE", 24))
    expected = bits(alone, "HASTE", 24)
    remove_states(alone)
    plan = make(training=DOUBLE, runs=RUNS, runtime={"processes": processes, "accumulate": accumulate})
    train_with(plan, plan.state("HASTE", 24), processes)
    for name, value in bits(plan, "HASTE", 24).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


def test_cached_targets_train_as_the_teacher_does_to_half_precision(make, tiny):
    online = make(training=DOUBLE, runs=RUNS)
    loop.train(online, online.state("HASTE", 24))
    log = Path(online.path(online.state("HASTE", 24))).parent / "log.jsonl"
    expected = journal.read(log)
    remove_states(online)
    cached = {"vit": {**tiny["teachers"]["vit"], "cache": "features+attention"}}
    plan = make(training=DOUBLE, runs=RUNS, teachers=cached)
    for shard in ("--shard 0", "--join"):
        assert cli.main(["targets", "vit", *shard.split(), "-c", str(plan.file)]) == 0
    loop.train(plan, plan.state("HASTE", 24))
    for one, other in zip(journal.read(log), expected, strict=True):
        for term in ("mse", "vlb", "features", "attention"):
            assert one[term] == pytest.approx(other[term], rel=5e-3, abs=5e-4), term


def test_gradients_are_compared_at_t_by_a_trigger_and_by_a_measure(make):
    stop = {"trigger": "gradient-angle", "after": 4, "every": 4, "images": 8, "times": [0.1, 0.5], "threshold": -1.0}
    measures = {"cosine": {"measure": "gradient-cosine", "images": 6, "shards": 2, "t": [0.1, 0.5]}}
    runs = {"HASTE": {"alignment": "HASTE", "stop": {"features": stop, "attention": stop}, "measures": ["cosine"]}}
    plan = make(runs=runs, measures=measures)
    loop.train(plan, plan.state("HASTE", 8))
    readings = read_header(plan.path(plan.state("HASTE", 8)))["triggers"]["features"]["readings"]
    numbers = [value for reading in readings for value in reading.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
    (what,) = (one.measurement for one in plan.measured if one.measurement.state == plan.state("HASTE", 8))
    found = jobs.measure(plan, what, keep=True)
    assert {row["t"] for row in found["rows"]} == {0.1, 0.5} and len(found["rows"]) == 2 * 3  # terms


def test_samples_are_drawn_with_guidance_and_depend_on_their_seed_alone(make):
    plan = make(runs={"vanilla": {}}, runtime={"sample_batch": 7, "trackers": []})
    loop.train(plan, plan.state("vanilla", 8))
    evaluation = next(row.evaluation for row in plan.rows if row.step == 8)

    def drawn(**runtime):
        again = make(runs={"vanilla": {}}, runtime={"trackers": [], **runtime})
        shutil.rmtree(evaluation.folder, ignore_errors=True)
        shutil.rmtree(Path(plan.root, "features"), ignore_errors=True)
        for shard in range(again.config.runtime.sample_shards):
            assert cli.main(["sample", evaluation.name, "--shard", str(shard), "-c", str(again.file)]) == 0
        files = sorted(Path(evaluation.folder).glob("shard-*.npz"))
        return np.concatenate([np.load(file)["arr_0"] for file in files]).astype(int)

    whole = drawn(sample_batch=20)
    assert np.abs(whole - drawn(sample_batch=3, sample_shards=2)).max() <= 1
    assert zipfile.is_zipfile(next(Path(evaluation.folder).glob("shard-*.npz")))


def test_the_network_has_twice_the_channels_and_is_given_the_step(make):
    plan = make()
    recipe = plan.trajectories[plan.state("vanilla", 8).trajectory].recipe
    assert recipe["training"]["process"] == {"name": "ddpm"} and "path" not in recipe["training"]
    model, process = build_model(recipe), process_in(recipe)
    x, t, y = torch.zeros(3, 4, 4, 4), torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3, dtype=torch.int64)
    assert model(x, process.time(t), y)[0].shape == (3, 8, 4, 4)
    assert process.time(t).tolist() == [0, 500, 999]  # of 499.5 the even one


def test_t_min_counts_the_step_that_lies_there(make, tiny):
    for t_min in (0.1, 0.2, 0.5):
        process = DDPM()
        place, times = process.place(t_min), process.times(lambda _: np.arange(1000) / 1000 + 1e-9, None)
        counted = process.time(times[times.double() >= place])
        assert counted.min().item() == round(999 * t_min)
        assert process.time(times[times.double() <= place]).max().item() == round(999 * t_min)  # as a t_max


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"few": {"sampler": "euler", "steps": 2}}}, "euler, which is a sampler for interpolant"),
        ({"models": {"dot": {**DIT["dot"], "architecture": "sit"}}}, "ddpm, which is a sampler for ddpm"),
        ({"training": {"path": "cosine"}}, "training.path is of interpolant, but dot is for ddpm"),
        ({"training": {"timesteps": {"distribution": "lognormal"}}}, "training.timesteps is of interpolant"),
        ({"sampling": {"few": {"sampler": "ddpm", "steps": 1001}}}, "more than the 1,000 steps"),
        ({"sampling": {"few": {"sampler": "ddim", "steps": 1}}}, "too few for ddim"),
        ({"sampling": {"few": {"sampler": "ddpm", "steps": 9, "eta": 0.5}}}, "eta 0.5 is a key of ddim"),
        ({"training": {"process": "interpolant"}}, "expected no process"),
    ],
)
def test_what_belongs_to_the_other_process_is_refused_before_the_first_job(make, changes, words):
    with pytest.raises(ValueError, match=words):
        config.check_samplers(make(**changes).config)
