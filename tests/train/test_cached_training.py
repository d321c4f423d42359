"""Targets on disk: training with them is training with the teacher, less the teacher."""

import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from haste import config
from haste.cli import main as cli
from haste.files import artefact, journal, provenance
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.ops import cost
from haste.plan.plan import Plan
from haste.plan.target_spec import TargetSpec
from haste.teachers import encoder
from haste.teachers.targets import PCA
from haste.train import loop, state

FORK = multiprocessing.get_context("fork")
VIT = {"steps": 2, "batch": 8, "depth": 2, "width": 16, "heads": 2, "patch": 4}
RUNS = {"HASTE": {"alignment": "HASTE"}}
SETTINGS = {"batch": 8, "lr": 0.001, "ema": 0.9}
DOUBLE = {**SETTINGS, "precision": "fp64"}


def teachers(cache, **more):
    return {"vit": {"trained": VIT, "cache": cache, **more}}


def make_targets(plan, name="vit"):
    if name in plan.pca:
        assert cli.main(["targets", name, "--fit", "-c", str(plan.file)]) == 0
    for shard in range(plan.targets[name].shards):
        assert cli.main(["targets", name, "--shard", str(shard), "-c", str(plan.file)]) == 0
    assert cli.main(["targets", name, "--join", "-c", str(plan.file)]) == 0
    return plan


def bits(plan, step, run="HASTE"):
    return load_file(plan.path(plan.state(run, step)))


def header(plan, step, run="HASTE"):
    return read_header(plan.path(plan.state(run, step)))


def remove_states(plan):
    shutil.rmtree(Path(plan.root, "states"))


def weights(tensors):
    return torch.cat([value.double().flatten() for name, value in sorted(tensors.items()) if name.startswith("model/")])


def test_a_store_that_a_run_can_be_trained_from_holds_every_image_and_only_what_is_asked(make_plan):
    plan = make_targets(make_plan(teachers=teachers("features+attention"), cache={"shards": 3}, runs=RUNS))
    made = plan.targets["vit"]
    store = Store.open(made.folder, kind="targets", key=made.key, recipe=made.recipe, verify="full")
    images = Store.open(plan.images.folder)
    assert store.count == images.count and store.splits == images.splits
    assert sorted(store.fields) == ["features", "keys.0", "keys.1", "queries.0", "queries.1"]
    rows = [0, 1000, 1796]
    teacher = encoder.Teacher.load(plan.teachers["vit"].folder)
    said = teacher(torch.from_numpy(images.read("image", rows)), features=True)
    np.testing.assert_allclose(store.read("features", rows), said.features, rtol=2**-10, atol=1e-6)
    size = sum(path.stat().st_size for path in Path(made.folder).glob("*.h5"))
    assert plan.target_bytes("vit", store.count) == pytest.approx(size, rel=0.1)
    record = provenance.provenance_of(Path(made.folder))
    assert record["teacher"] == artefact.read_json(plan.teachers["vit"].manifest, "part")["identity"]


@pytest.mark.parametrize("cache", ["features", "features+attention"])
def test_cached_training_agrees_with_online_training_to_half_precision(make_plan, cache):
    online = make_plan(training=DOUBLE, runs=RUNS)
    loop.train(online, online.state("HASTE", 8))
    path = Path(online.path(online.state("HASTE", 8)))
    expected, losses = bits(online, 8), journal.read(path.parent / "log.jsonl")
    remove_states(online)
    plan = make_targets(make_plan(training=DOUBLE, runs=RUNS, teachers=teachers(cache)))
    assert plan.path(plan.state("HASTE", 8)) == str(path)
    start = weights({f"model/{n}": v for n, v in _untrained(plan).items()})
    loop.train(plan, plan.state("HASTE", 8))
    found = journal.read(path.parent / "log.jsonl")
    assert len(found) == len(losses) == 4
    for one, other in zip(found, losses, strict=True):
        for term in ("denoising", "features", "attention"):
            assert one[term] == pytest.approx(other[term], rel=2e-3, abs=2e-4), term
    apart = (weights(bits(plan, 8)) - weights(expected)).norm() / (weights(expected) - start).norm()
    assert 0 < apart < 0.03  # not zero: it was the disk that spoke


def _untrained(plan):
    recipe = plan.trajectories[plan.state("HASTE", 8).trajectory].recipe
    return state.new_learner(recipe, {}, {}).model.state_dict()


def _train(plan, target, rank, size, port, errors):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        loop.train(plan, target)
    except BaseException as error:
        errors.put(repr(error))
        raise


def test_processes_and_accumulation_read_their_own_rows(make_plan):
    plan = make_targets(make_plan(training=DOUBLE, runs=RUNS, teachers=teachers("features+attention")))
    loop.train(plan, plan.state("HASTE", 8))
    expected = bits(plan, 8)
    remove_states(plan)
    runtime = {"processes": 2, "accumulate": 2, "log_every": 2}
    several = make_plan(training=DOUBLE, runs=RUNS, teachers=teachers("features+attention"), runtime=runtime)
    errors = FORK.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = several.state("HASTE", 8)
    children = [FORK.Process(target=_train, args=(several, target, rank, 2, port, errors)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert {child.exitcode for child in children} == {0}, errors.get(timeout=5)
    for name, value in bits(several, 8).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_with_everything_on_disk_no_teacher_is_loaded_and_no_image_read(make_plan, monkeypatch):
    plan = make_targets(make_plan(runs=RUNS, teachers=teachers("features+attention")))
    segment = plan.segment(plan.state("HASTE", 8))
    assert (segment.teachers, segment.targets) == ([], ["vit"])

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a teacher was asked for")

    monkeypatch.setattr(encoder.Teacher, "load", forbidden)
    Path(plan.images.manifest).unlink()
    shutil.rmtree(plan.teachers["vit"].folder)
    loop.train(plan, plan.state("HASTE", 8))
    assert header(plan, 8)["inputs"].keys() == {"latents", "teacher of features", "teacher of attention"}


def test_cutting_cached_training_changes_no_bit(make_plan):
    plan = make_targets(make_plan(runs=RUNS, teachers=teachers("features+attention")))
    loop.train(plan, plan.state("HASTE", 8))
    loop.train(plan, plan.state("HASTE", 16))
    expected = bits(plan, 16)
    remove_states(plan)
    defaults = {"model": "dot", "milestones": [5, 16], "sampling": ["quick"]}
    other = make_plan(runs=RUNS, teachers=teachers("features+attention"), defaults=defaults)
    loop.train(other, other.state("HASTE", 16))
    assert all(torch.equal(value, expected[name]) for name, value in bits(other, 16).items())


def test_going_on_with_another_source_of_targets_is_said_and_stays_on_record(make_plan, caplog):
    online = make_plan(runs={"HASTE-12": {"alignment": "HASTE", "stop": 12}})
    loop.train(online, online.state("HASTE-12", 8))
    assert header(online, 8, "HASTE-12")["provenance"]["targets"] == {"features": "online", "attention": "online"}
    plan = make_plan(runs={"HASTE-12": {"alignment": "HASTE", "stop": 12}}, teachers=teachers("features"))
    make_targets(plan)
    caplog.clear()
    loop.train(plan, plan.state("HASTE-12", 12))
    assert "its targets of features were online, going on with cached, " in caplog.text
    made = header(plan, 12, "HASTE-12")["provenance"]
    assert made["targets"]["attention"] == "online" and made["targets"]["features"].startswith("cached, ")
    (change,) = made["changes"]
    assert change.startswith("step 8: targets of features: online before, cached, ")
    loop.train(plan, plan.state("HASTE-12", 16))
    assert header(plan, 16, "HASTE-12")["provenance"]["changes"] == [change]


def test_components_narrow_the_projector_rename_the_states_and_may_not_change_under_a_run(make_plan):
    plain = make_plan(runs=RUNS, teachers=teachers("features"))
    plan = make_targets(make_plan(runs=RUNS, teachers=teachers("features", pca=5)))
    assert plan.path(plan.state("HASTE", 8)) != plain.path(plain.state("HASTE", 8))
    loop.train(plan, plan.state("HASTE", 8))
    widths = [v.shape[0] for n, v in bits(plan, 8).items() if n.startswith("projectors/") and v.ndim == 1]
    assert widths == [16, 16, 5]
    part = artefact.read_json(plan.pca["vit"].manifest, "part")
    assert 0 < part["quality"]["explained variance"] < 1
    shutil.rmtree(plan.targets["vit"].folder)
    path = Path(plan.pca["vit"].folder)
    basis = load_file(path / "basis.safetensors")
    PCA(basis["mean"], -basis["components"]).save(path, 0.5, {"key": plan.pca["vit"].key})
    for step in (["--shard", "0"], ["--join"]):
        assert cli.main(["targets", "vit", *step, "-c", str(plan.file)]) == 0
    with pytest.raises(ValueError, match=r"components of features \w+, but components of features is now"):
        loop.train(plan, plan.state("HASTE", 16))


def test_a_store_of_another_teacher_is_refused(make_plan):
    plan = make_targets(make_plan(runs=RUNS, teachers=teachers("features+attention")))
    part = artefact.read_json(plan.teachers["vit"].manifest, "part")
    artefact.write_json(plan.teachers["vit"].manifest, {**part, "identity": "0" * 64})
    with pytest.raises(ValueError, match=r"targets-\w+: holds targets of teacher \w+, but vit is now 0000"):
        loop.train(plan, plan.state("HASTE", 8))


def test_a_store_that_holds_more_serves_and_what_is_missing_makes_another(make_plan):
    both = make_targets(make_plan(runs=RUNS, teachers=teachers("features+attention")))
    less = make_plan(runs={"REPA": {"alignment": "REPA"}}, teachers=teachers("features"))
    assert less.targets["vit"].folder == both.targets["vit"].folder
    loop.train(less, less.state("REPA", 8))
    Path(both.targets["vit"].manifest).unlink()
    again = make_plan(runs={"REPA": {"alignment": "REPA"}}, teachers=teachers("features"))
    assert again.targets["vit"].folder != both.targets["vit"].folder
    make_targets(again)
    more = make_plan(runs=RUNS, teachers=teachers("features+attention"))
    assert more.targets["vit"].folder == both.targets["vit"].folder


def test_only_what_some_run_asks_is_cached(make_plan):
    plan = make_plan(runs={"REPA": {"alignment": "REPA"}}, teachers=teachers("features+attention"))
    assert TargetSpec.read(plan.targets["vit"].recipe).fields == ["features"]
    assert make_plan(runs={"vanilla": {}}, teachers=teachers("features+attention")).targets == {}
    stopped = make_plan(runs={"HASTE": {"alignment": "HASTE", "stop": 0}}, teachers=teachers("features+attention"))
    assert stopped.targets == {}


def test_more_bytes_than_allowed_are_refused_before_anything_runs_with_what_would_fit(make_plan, capsys):
    plan = make_plan(runs=RUNS, teachers=teachers("features+attention"), cache={"max_bytes": 400_000})
    # 4 tokens of 16 features; queries and keys of two layers, two heads of width 8: 128 and 512 bytes an image
    assert plan.target_bytes("vit", 1797) == 1797 * 640
    for command in (["plan"], ["targets", "vit", "--shard", "0"]):
        assert cli.main([*command, "-c", str(plan.file)]) == 2
        message = capsys.readouterr().err
        assert "cache.max_bytes: 400000 allows 400 kB, but for 1,797 images" in message
        assert "teachers.vit.cache: features+attention takes 1.15 MB" in message
        assert "what would fit: cache: features (230 kB)" in message
        assert not Path(plan.targets["vit"].folder).exists()
    tight = make_plan(runs=RUNS, teachers=teachers("features"), cache={"max_bytes": 100_000})
    with pytest.raises(ValueError, match=r"pca: 6 or less \(86.3 kB; other results\)"):
        tight.check_cache()
    fits = make_plan(runs=RUNS, teachers=teachers("features", pca=6), cache={"max_bytes": 100_000})
    fits.check_cache()
    hopeless = make_plan(runs=RUNS, teachers=teachers("features"), cache={"max_bytes": 10})
    with pytest.raises(ValueError, match="what would fit: cache: off"):
        hopeless.check_cache()


def test_the_plan_counts_the_bytes_and_the_jobs_of_the_cache(make_plan, capsys):
    plan = make_plan(runs=RUNS, teachers=teachers("features", pca=5), cache={"shards": 2})
    found = {stage.name: stage for stage in cost.stages(plan)[0]}
    assert (found["targets"].jobs, found["targets"].left) == (2, 2)
    assert found["targets"].megabytes == pytest.approx(1797 * 4 * 5 * 2 / 1e6)
    assert found["targets"].seconds > 0
    assert found["pca"].left == found["targets_join"].left == 1
    make_targets(plan)
    found = {stage.name: stage for stage in cost.stages(Plan(plan.config))[0]}
    assert found["targets"].left == found["pca"].left == found["targets_join"].left == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache": "on"}, "teachers.vit.cache"),
        ({"pca": 3}, "pca 3 is of cached features, and cache is 'off'"),
        ({"cache": "features", "pca": 17}, "teachers.vit.pca: 17, but its features have a width of 16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny, change, words):
    tiny["teachers"]["vit"] |= change
    with pytest.raises(ValueError) as refusal:
        config.resolve(tiny)
    assert words in str(refusal.value)


def test_off_may_be_written_as_yaml_reads_it_and_bytes_as_people_do(tiny):
    tiny["teachers"]["vit"]["cache"] = False
    tiny["cache"] = {"max_bytes": "2.0e12"}
    found = config.resolve(tiny)
    assert found.teachers["vit"].cache == "off"
    assert found.cache.max_bytes == 2_000_000_000_000
