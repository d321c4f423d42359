"""Sets of samples that differ only in guidance share a job's network and noise, with the bits of each drawn alone."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste import config
from haste.cli import main as cli
from haste.config import Sampling
from haste.data import order
from haste.data.condition import Labels
from haste.diffusion.ddpm import DDPM
from haste.diffusion.interpolant import Interpolant
from haste.diffusion.samplers import SAMPLERS, Sampler
from haste.files import artefact, locks
from haste.models.dit import DiT
from haste.models.sit import SiT
from haste.plan.names import Evaluation
from haste.plan.plan import Plan
from haste.sampling import batches
from haste.sampling import shards as drawing
from haste.sampling.painter import Painter, drawn_together
from haste.score import jobs
from haste.train import loop

WAYS = [{}, {"guidance": 2.5, "interval": [0.2, 0.7]}, {"guidance": 1.5, "guided_channels": 3, "pixels": "round"}]
STEPS = {"dopri5": {"rtol": 0.01, "atol": 0.001}, "ddim": {"steps": 4, "eta": 0.5}}


class Decoder:
    """Images are the first channels of latents, which it keeps."""

    factor, identity, device, scale, shift = 1, "decoder", torch.device("cpu"), 1.0, 0.0

    def __init__(self):
        self.given = []

    def decode(self, z, *, scale, shift):
        self.given.append(z.clone())
        return torch.tanh(z[:, :3])


def painters(sampler):
    """One for each way, of one network with random weights in all its layers."""
    ddpm = SAMPLERS[sampler].process == "ddpm"
    kind, process = (DiT, DDPM()) if ddpm else (SiT, Interpolant())
    network = kind(input_size=4, in_channels=4, patch_size=2, depth=1, width=16, heads=2, classes=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    network.eval().requires_grad_(False)
    common = {"sampler": sampler, "count": 20, **STEPS.get(sampler, {"steps": 4})}
    ways = [Sampling(**common, **way) for way in WAYS]
    return [Painter(network, way, Decoder(), process, Labels(classes=4), 1.0, 0.0) for way in ways]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_of_every_sampler_what_is_drawn_together_has_the_bits_of_each_alone(sampler):
    together, alone = painters(sampler), painters(sampler)
    found = drawn_together(together, range(3, 10))
    for each, one, other in zip(found, together, alone, strict=True):
        expected = other.draw(range(3, 10))
        assert each.keys() == expected.keys()
        assert all(np.array_equal(each[name], expected[name]) for name in expected)
        assert torch.equal(torch.cat(one.autoencoder.given), torch.cat(other.autoencoder.given))
    assert not np.array_equal(found[0]["image"], found[1]["image"])
    assert not np.array_equal(found[1]["image"], found[2]["image"])


def test_noise_is_drawn_once_for_all_of_them(monkeypatch):
    drawn, real = [], order.normals
    monkeypatch.setattr(order, "normals", lambda *asked: drawn.append(asked[1:3]) or real(*asked))
    drawn_together(painters("euler-maruyama"), range(5))
    assert sorted(drawn) == [("sample noise", 0), ("sample noise", 1), ("sample noise", 2), ("sample start", 0)]


class Corrected(Interpolant):
    """What another package may do: it reads the settings of guidance, and a sample depends on the other rows."""

    def sample(self, sampler, field, x, sampling, noise):
        z = super().sample(sampler, field, x, sampling, noise)
        return z / sampling.guidance + z.mean(dim=0) / 2


@pytest.mark.parametrize("of", ["process", "sampler"])
def test_a_process_and_a_sampler_of_another_package_see_one_set_at_a_time(of, monkeypatch):
    def whole(velocity, x, steps):
        z = x.double() + velocity(x, 1.0).double()
        return z + z.std()

    if of == "sampler":
        monkeypatch.setitem(SAMPLERS, "euler", Sampler(whole, lambda steps: 1))
    process, shares = Corrected() if of == "process" else Interpolant(), []
    ways = [dataclasses.replace(one, process=process) for one in painters("euler")]
    found = drawn_together(ways, range(5), shares.append)
    for each, one in zip(found, ways, strict=True):
        assert {name: row.tolist() for name, row in each.items()} == {
            name: row.tolist() for name, row in one.draw(range(5)).items()
        }
    assert shares == sorted(shares) and 0 <= shares[0] < 0.4 and 0.6 < shares[-1] <= 1


# ---- kept batches


def tiled(data, size):
    """Batches of up to a size from 0 to 24, of which chance keeps some."""
    return [low for low in range(0, 24, size) if data.draw(st.booleans())]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.integers(1, 9), sets=st.integers(1, 3))
def test_each_set_gets_every_sample_once_in_order_and_a_sample_that_several_lack_is_drawn_in_one_call(
    data, size, sets, tmp_path_factory
):
    folder, calls, lacked = tmp_path_factory.mktemp("kept"), [], []
    kept = [batches.Kept(folder / str(place), {"of": str(place)}) for place in range(sets)]
    for one in kept:
        one.folder.mkdir()
        before = data.draw(st.integers(1, 9))
        lows = tiled(data, before)
        for low in lows:
            rows = np.arange(low, min(low + before, 24))
            batches._keep_batch(one.folder / f"{low:09d}.npz", {"row": rows}, one.source)
        lacked.append({i for i in range(24) if i // before * before not in lows})

    def draw(rows, places):
        calls.append((set(rows), places))
        return [{"row": np.array(rows)} for _ in places]

    found = {place: [] for place in range(sets)}
    for place, batch, _ in batches.drawn(kept, range(24), size, draw):
        found[place] += batch["row"].tolist()
    assert all(rows == list(range(24)) for rows in found.values())
    for place in range(sets):
        assert set().union(*(rows for rows, places in calls if place in places)) == lacked[place]
    assert sum(len(rows) for rows, _ in calls) == len(set().union(*lacked))
    shutil.rmtree(folder)


# ---- jobs


FAMILY = {
    "plain": {"sampler": "euler-maruyama", "steps": 4, "count": 20, "labels": "balanced"},
    "guided": {"sampler": "euler-maruyama", "steps": 4, "count": 20, "labels": "balanced", "guidance": 2.0},
}
LATE = {**FAMILY["guided"], "interval": [0.0, 0.7]}


def shard_of(job):
    return int(Path(job.makes[0]).name[6:11])


class World:
    """A trained state with ways to sample it, and the jobs that the workflow would start."""

    def __init__(self, make_plan, ways=FAMILY, **runtime):
        self.make = lambda ways: make_plan(
            sampling=ways,
            runtime={"sample_batch": 7, "save_every": 100, **runtime},
            runs={"vanilla": {"milestones": [8], "sampling": [*ways]}},
        )
        self.configure(ways)
        loop.train(self.plan, self.plan.state("vanilla", 8))

    def configure(self, ways):
        self.plan = self.make(ways)
        self.sets = {row.evaluation.sampling_name: row.evaluation for row in self.plan.rows}

    def left(self):
        """Rule -> what its jobs are called that are left, of those about samples."""
        found = Plan(config.load(self.plan.file)).jobs.left
        return {rule: found[rule] for rule in ("sample", "features", "score", "grid") if rule in found}

    def run(self, *command):
        return cli.main([*map(str, command), "-c", str(self.plan.file)])

    def draw(self):
        """Do the jobs on samples and features once, as a run of the workflow would; what is left then?"""
        left = self.left()
        for job in left.get("sample", []):
            assert self.run("sample", job.name, "--shard", shard_of(job), "--together") == 0
        for job in left.get("features", []):
            assert self.run("features", job.about[0].name, "--detector", job.name, "--shard", shard_of(job)) == 0
        return self.left()

    def step(self):
        """Do all jobs once."""
        left = self.draw()
        assert set(left) <= {"score", "grid"}
        for job in left.get("score", []):
            assert self.run("evaluate", job.about[0].name, "--detector", job.name) == 0
        for job in left.get("grid", []):
            assert self.run("grid", job.about.name) == 0
        assert not self.left()

    def forget(self):
        for one in self.sets.values():
            for folder in (one.folder, one.features.folder):
                shutil.rmtree(folder, ignore_errors=True)
            Path(one.score).unlink(missing_ok=True)


@pytest.fixture
def world(make_plan):
    return World(make_plan)


def content(path):
    """Arrays of an .npz, bytes and types, and its record without what differs from one time to the next."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: (file[name].dtype.str, file[name].shape, file[name].tobytes()) for name in file.files}
        record = json.loads(str(file["haste"]))
    del arrays["haste"]
    return arrays, {key: value for key, value in record.items() if key not in TIMES}


TIMES = {"made", "command", "seconds", "peak_memory_mb", "hardware"}


def scores(path):
    return json.loads(Path(path).read_text())["scores"]


def test_one_job_draws_both_sets_with_files_features_and_scores_as_drawn_alone(world, caplog):
    caplog.set_level("INFO", logger="haste")
    plain, guided = world.sets["plain"], world.sets["guided"]
    for one in (plain, guided):
        assert world.run("sample", one.name) == 0
        assert not Path(guided.folder).exists() or one is guided  # without --together only what is named
        assert world.run("evaluate", one.name) == 0
    world.step()  # grids
    files = [path for one in (plain, guided) for path in one.sample_files]
    expected = [content(path) for path in files], [scores(one.score) for one in (plain, guided)]
    world.forget()
    caplog.clear()
    (job,) = world.left()["sample"]
    assert (job.name, [one.name for one in job.beside]) == (plain.name, [guided.name])
    world.step()
    assert ([content(path) for path in files], [scores(one.score) for one in (plain, guided)]) == expected
    assert "samples, shard 0 of 1, of 2 sets: 40/40 images" in caplog.text


def test_a_way_that_is_added_later_is_drawn_alone_and_with_others_that_are_new(world):
    world.step()
    before = {path: Path(path).stat().st_mtime_ns for one in world.sets.values() for path in one.sample_files}
    world.configure({**FAMILY, "late": LATE, "later": {**LATE, "guidance": 3.0}, "other": {**LATE, "seed": 1}})
    late, later, other = (world.sets[name].name for name in ("late", "later", "other"))
    jobs = world.left()["sample"]
    assert {job.name: [one.name for one in job.beside] for job in jobs} == {late: [later], other: []}
    world.step()
    assert {path: Path(path).stat().st_mtime_ns for path in before} == before


class Kill(BaseException):
    """The process is gone: nothing is tidied but what the kernel would."""


FINISHED = (batches, "keep"), (jobs, "feature_shard"), (batches, "forget")  # in this order, for each set


def killed_after(calls, real):
    numbers = iter(range(calls))

    def until(*given, **more):
        if next(numbers, None) is None:
            raise Kill
        return real(*given, **more)

    return until


def test_after_a_kill_anywhere_the_same_files_are_made_and_nothing_that_was_kept_is_drawn_twice(world, monkeypatch):
    """In the middle of a batch, between the two sets' batches, files, features, and the clearing away."""
    places = [(drawing, "drawn_together", 1), *((batches, "_keep_batch", calls) for calls in (1, 2))]
    places += [(of, name, calls) for of, name in FINISHED for calls in (0, 1)]
    files = [path for one in world.sets.values() for path in one.sample_files]
    world.draw()
    expected = [content(path) for path in files]
    drawn = []

    def counted(painters, rows, told, real=drawing.drawn_together):
        drawn.extend((painter.sampling.guidance, i) for painter in painters for i in rows)
        return real(painters, rows, told)

    monkeypatch.setattr(drawing, "drawn_together", counted)
    for where, name, calls in places:
        world.forget()
        drawn.clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, killed_after(calls, getattr(where, name)))
            with pytest.raises(Kill):
                world.draw()
        assert set(world.draw()) == {"score", "grid"}, (name, calls)
        # Of each set the batch that was being drawn, and the one before if it was still being written.
        assert len(drawn) - 40 <= (28 if name == "_keep_batch" else 0) and len(set(drawn)) == 40, (name, calls)
        assert [content(path) for path in files] == expected, (name, calls)


def test_what_is_lost_of_one_set_is_made_again_for_that_alone(world, monkeypatch):
    world.step()
    plain, guided = world.sets["plain"], world.sets["guided"]
    expected = scores(guided.score)
    times = {path: Path(path).stat().st_mtime_ns for path in (*plain.sample_files, *plain.features.shard_files)}

    def lose(*paths):
        for path in (*paths, guided.score):
            Path(path).unlink()
        made = {rule: [job.makes[0] for job in found] for rule, found in world.left().items()}
        world.step()
        assert scores(guided.score) == expected
        assert {path: Path(path).stat().st_mtime_ns for path in times} == times
        return made

    assert lose(*guided.sample_files, *guided.features.shard_files)["sample"] == guided.sample_files
    assert lose(*guided.features.shard_files)["features"] == guided.features.shard_files
    for path in plain.sample_files:  # its score is there: nobody asks for these
        Path(path).unlink()
    times = {path: Path(path).stat().st_mtime_ns for path in plain.features.shard_files}
    assert lose(*guided.sample_files, *guided.features.shard_files)["sample"] == guided.sample_files
    assert not Path(plain.sample_file(0)).exists()


def test_a_job_that_is_run_again_goes_on_with_the_others_though_its_own_samples_are_there(world):
    plain, guided = world.sets["plain"], world.sets["guided"]
    assert world.run("sample", plain.name) == 0
    assert world.run("sample", plain.name, "--together") == 0
    assert guided.is_drawn and Path(guided.features.shard_files[0]).exists()
    Path(guided.features.shard_files[0]).unlink()  # as after a kill between its samples and its features
    assert world.run("sample", plain.name, "--together") == 0
    assert Path(guided.features.shard_files[0]).exists()


def test_two_configurations_that_name_the_sets_in_another_order_take_their_locks_in_the_same_one(world, monkeypatch):
    taken, real = [], locks.making
    monkeypatch.setattr(locks, "making", lambda path, **how: taken.append(Path(path)) or real(path, **how))
    for ways in (FAMILY, dict(reversed(FAMILY.items()))):
        world.configure(ways)
        world.forget()
        (job,) = world.left()["sample"]
        assert job.about.sampling_name == next(iter(ways)) and len(job.beside) == 1
        world.draw()
    samples = [path for path in taken if path.suffix == ".npz"]
    assert len(samples) == 4 and samples[:2] == samples[2:]


@pytest.mark.parametrize("broken", FAMILY)
def test_samples_that_are_not_finite_keep_no_other_set_from_its_samples(world, monkeypatch, capsys, caplog, broken):
    """The job is that of the first set: if that one is broken it fails, once it has drawn the others."""
    first, one = world.sets["plain"], world.sets[broken]
    other = next(other for name, other in world.sets.items() if name != broken)
    real = Painter.decoded

    def decoded(painter, z, indices):
        return real(painter, torch.full_like(z, torch.nan) if painter.sampling == one.sampling else z, indices)

    monkeypatch.setattr(Painter, "decoded", decoded)
    assert world.run("sample", first.name, "--together") == (2 if one is first else 0)
    said = "sample 0: its latents are not finite"
    assert said in (capsys.readouterr().err if one is first else caplog.text)
    assert world.run("evaluate", other.name) == 0
    assert not list(Path(one.folder).glob("*shard*"))
    assert [job.about.name for job in world.left()["sample"]] == [one.name]
    assert world.run("evaluate", one.name) == 2
    assert "this shard is missing, expected features from the job that draws these samples" in capsys.readouterr().err
    assert world.run("sample", one.name) == 2 and said in capsys.readouterr().err


def test_a_plan_counts_one_job_and_the_samples_of_both_sets(make_plan):
    world = World(make_plan, sample_shards=2)
    found = Plan(config.load(world.plan.file)).jobs
    assert len(found.left["sample"]) == len(found.every["sample"]) == 2
    assert sorted(one.sampling_name for one in found.to_draw) == ["guided", "guided", "plain", "plain"]
    world.step()
    assert len(Plan(config.load(world.plan.file)).jobs.every["sample"]) == 2


def lose_features(world, name):
    """Its samples are there, what was made of them is not; of the first set nothing is."""
    for path in (*world.sets[name].features.shard_files, world.sets[name].score):
        Path(path).unlink()
    first = next(iter(world.sets.values()))
    for path in (*first.sample_files, *first.features.shard_files, first.score):
        Path(path).unlink()
    shutil.rmtree(batches.folder_of(Path(first.folder)), ignore_errors=True)


def test_of_a_set_that_is_drawn_the_job_of_another_makes_features_and_never_draws_it_again(world):
    """Even if its samples say that they were made of other weights."""
    world.step()
    plain, guided = world.sets["plain"], world.sets["guided"]
    (path,) = map(Path, guided.sample_files)
    with np.load(path) as file:
        arrays = dict(file)
    record = json.loads(str(arrays["haste"]))
    record["inputs"]["weights"] = "0" * 64
    np.savez(path, **{**arrays, "haste": np.array(json.dumps(record))})
    before = path.read_bytes()
    lose_features(world, "guided")
    left = world.left()
    assert [(job.name, [one.name for one in job.beside]) for job in left["sample"]] == [(plain.name, [guided.name])]
    assert "features" not in left
    assert [one.name for one in Plan(config.load(world.plan.file)).jobs.to_draw] == [plain.name]
    world.step()
    assert path.read_bytes() == before


def test_features_that_fail_keep_no_other_set_from_theirs(world, monkeypatch, caplog, capsys):
    """Of both sets, of the second, of the first: the job fails for its own alone, and each is named."""
    plain, guided = world.sets["plain"], world.sets["guided"]
    real = jobs.feature_shard
    for broken in ((plain, guided), (guided,), (plain,)):
        folders = {Path(one.features.folder) for one in broken}

        def extract(*given, folder, folders=folders, **more):
            if folder in folders:
                raise PermissionError(13, "Permission denied", str(folder))
            return real(*given, folder=folder, **more)

        monkeypatch.setattr(jobs, "feature_shard", extract)
        world.forget()
        caplog.clear()
        assert world.run("sample", plain.name, "--together") == (2 if plain in broken else 0)
        assert (plain.features.folder in capsys.readouterr().err) == (plain in broken)
        assert (f"{guided.name}: shard 0 is given up" in caplog.text) == (guided in broken)
        for one in (plain, guided):
            assert one.is_drawn
            assert Path(one.features.shard_files[0]).exists() == (one not in broken)


@pytest.mark.parametrize("what", ["lock", "file"])
def test_a_set_whose_folder_takes_no_files_keeps_no_other_from_its_samples(world, monkeypatch, caplog, what):
    """And leaves nothing there."""
    plain, guided = world.sets["plain"], world.sets["guided"]

    def refuse(path, real, *given, **more):
        if str(path).startswith(guided.folder):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *given, **more)

    where, name = {"lock": (locks, "making"), "file": (artefact, "replacing")}[what]
    monkeypatch.setattr(where, name, functools.partial(refuse, real=getattr(where, name)))
    assert world.run("sample", plain.name, "--together") == 0
    assert Path(plain.features.shard_files[0]).exists() and not [*Path(guided.folder).rglob("*.npz")]
    assert f"{guided.name}: shard 0 is given up" in caplog.text and "Permission denied" in caplog.text


def test_a_file_that_cannot_be_begun_leaves_nothing_behind(world, monkeypatch, capsys):
    """A full disk, of the second set's file."""
    plain, guided = world.sets["plain"], world.sets["guided"]
    begun, real = [], np.lib.format.write_array_header_1_0

    def full(file, about):
        begun.append(file)
        if len(begun) == 2:
            raise OSError(28, "No space left on device")
        return real(file, about)

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    assert world.run("sample", plain.name, "--together") == 0
    assert not [path for path in Path(guided.folder).rglob("*") if path.is_file()]
    assert begun[1].closed


def test_what_is_drawn_is_asked_once_and_what_is_drawn_meanwhile_changes_no_plan(world, monkeypatch):
    asked, real = [], Evaluation.is_drawn.fget
    monkeypatch.setattr(Evaluation, "is_drawn", property(lambda one: asked.append(one.name) or real(one)))
    found = Plan(config.load(world.plan.file)).jobs
    world.draw()
    for one in world.sets.values():
        shutil.rmtree(one.features.folder)
    asked.clear()
    (job,) = found.left["sample"]
    assert (job.about.sampling_name, len(job.beside)) == ("plain", 1) and "features" not in found.left
    assert len(found.to_draw) == 2 and not found.drawn and not asked
    found = Plan(config.load(world.plan.file)).jobs
    assert len(found.left["features"]) == 2 and "sample" not in found.left
    assert sorted(asked) == sorted(found.drawn) == sorted(one.name for one in world.sets.values())


def test_a_grid_of_samples_that_nobody_drew_says_where_to_look(world, capsys):
    plain = world.sets["plain"]
    assert world.run("grid", plain.name) == 2
    said = capsys.readouterr().err
    assert "this shard is missing, expected images from the job that draws these samples" in said
    assert f"of other samples of {plain.state}, may say why; the same snakemake command draws them" in said
