"""Image i depends on (seed, i) alone: not on the batch, not on the shards."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
import yaml
from PIL import Image

from haste import config
from haste.cli import main as cli
from haste.data.condition import Labels
from haste.files import artefact
from haste.files.store import Store, join
from haste.ops import status
from haste.plan.plan import Plan
from haste.sampling import batches, grids
from haste.sampling import shards as drawing
from haste.train import loop

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())


@pytest.fixture
def trained(make_plan):
    """A function from a way to sample to a plan whose vanilla state is trained, and the evaluation of it."""

    def make(shards=1, batch=7, **sampling):
        settings = {"sampler": "euler", "steps": 3, "count": 20, "labels": "balanced", **sampling}
        plan = make_plan(
            sampling={"quick": settings},
            runtime={"sample_shards": shards, "sample_batch": batch, "save_every": 100},
            runs={"vanilla": {"milestones": [8]}},
        )
        loop.train(plan, plan.state("vanilla", 8))
        return plan, plan.rows[0].evaluation

    return make


def draw(plan, evaluation):
    """All samples and labels of an evaluation, drawn by the command."""
    images, labels = [], []
    for shard in range(evaluation.features.shards):
        assert cli.main(["sample", evaluation.name, "--shard", str(shard), "-c", str(plan.file)]) == 0
        with np.load(evaluation.sample_file(shard), allow_pickle=False) as file:
            images.append(file["arr_0"])
            labels.append(file["arr_1"])
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"sampler": "heun", "guidance": 2.0, "interval": [0.0, 0.7]},
        {"sampler": "euler-maruyama", "steps": 5, "labels": "random"},
        {"sampler": "dopri5", "steps": None, "rtol": 0.01, "atol": 0.001, "guidance": 2.0, "interval": [0.0, 0.7]},
    ],
    ids=["euler", "heun-guided", "sde", "dopri5-guided"],
)
def test_image_i_is_the_same_from_1_and_3_shards_and_any_batch(trained, sampling):
    one, labels_one = draw(*trained(shards=1, batch=20, **sampling))
    three, labels_three = draw(*trained(shards=3, batch=4, **sampling))
    assert one.shape == (20, 8, 8, 3)
    assert one.dtype == np.uint8
    assert (labels_one == labels_three).all()
    assert np.abs(one.astype(int) - three.astype(int)).max() <= 1


def test_compile_holds_for_sampling_too_with_one_graph_and_the_same_names(trained, monkeypatch):
    plan, evaluation = trained(guidance=2.0, interval=[0.0, 0.7])
    plain, _ = draw(plan, evaluation)
    emptied(evaluation)
    raw = yaml.safe_load(plan.file.read_text())
    raw["runtime"]["compile"] = True
    plan.file.write_text(yaml.safe_dump(raw))
    assert evaluation.name in Plan(config.resolve(raw)).evaluations
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced alike, and in no time
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, _ = draw(plan, evaluation)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert np.abs(compiled.astype(int) - plain.astype(int)).max() <= 1


def test_another_seed_gives_other_images(trained):
    first, _ = draw(*trained())
    second, _ = draw(*trained(seed=1))
    assert np.abs(first.astype(int) - second.astype(int)).max() > 1


def test_labels_are_balanced_or_random_as_asked(trained):
    _, balanced = draw(*trained())
    assert balanced.tolist() == [i % 10 for i in range(20)]
    _, drawn = draw(*trained(labels="random"))
    assert drawn.tolist() != balanced.tolist()
    assert 0 <= drawn.min() <= drawn.max() < 10


def test_sample_i_is_of_the_i_th_chosen_class_and_the_grid_has_these_as_columns_with_all_samples(trained):
    plan, evaluation = trained(shards=2, labels=[7, 2, 5], count=20)
    images, labels = draw(plan, evaluation)
    assert labels.tolist() == [[7, 2, 5][i % 3] for i in range(20)]
    kept = batches.folder_of(Path(evaluation.folder))
    assert kept.is_dir()
    assert cli.main(["grid", evaluation.name, "-c", str(plan.file)]) == 0
    assert not kept.exists()  # no score will ask for them
    cell = 8 * grids.SCALE + grids.GAP
    with Image.open(evaluation.grid) as grid:
        assert grid.size == (3 * cell, 7 * cell)
        assert json.loads(grid.info["haste"])["classes"] == [7, 2, 5]
        for i in range(20):
            left, top = (i % 3) * cell + grids.GAP // 2, (i // 3) * cell + grids.GAP // 2
            shown = np.asarray(grid.crop((left, top, left + 16, top + 16)))[::2, ::2, :3]
            np.testing.assert_array_equal(shown, images[i])


def upcoming(plan):
    return status.snapshot(Plan(config.load(plan.file))).next  # a plan reads the disk once


def test_chosen_classes_alone_are_a_report_of_pictures_whose_jobs_say_how_far_they_are(trained, caplog):
    caplog.set_level(logging.INFO, logger="haste")
    plan, evaluation = trained(labels=[7, 2], count=8)
    draw(plan, evaluation)
    assert upcoming(plan) == ["sample and score 1 sets of samples, 1 of them of states on disk"]
    assert cli.main(["grid", evaluation.name, "-c", str(plan.file)]) == 0
    assert cli.main(["report", "-c", str(plan.file)]) == 0
    said = [f"grid of {evaluation.name}: 8/8 images", "report: reading scores, logs and measures"]
    said += ["report: drawing tables, figures and pictures", f"{plan.report}: written, "]
    assert all(words in caplog.text for words in said)
    text = Path(plan.report).read_text()
    assert "Samples of vanilla at step 8, one column per class: 7, 2" in text
    assert "samples of chosen classes are shown and not scored" in text
    assert upcoming(plan) == []
    assert cli.main(["evaluate", evaluation.name, "-c", str(plan.file)]) == 0  # whoever asks gets one
    assert artefact.read_json(evaluation.score, "score")["sampling"]["labels"] == [7, 2]


def test_features_belong_to_the_samples_beside_them(trained):
    from haste.metrics.detectors import open_detector

    plan, evaluation = trained(shards=3, batch=4)
    images, labels = draw(plan, evaluation)
    made = evaluation.features
    join(made.folder, kind="features", key=made.key, recipe=made.recipe, shards=3, splits={}, provenance={})
    store, detector = Store.open(made.folder), open_detector(plan.detector.part.folder)
    seen = detector(torch.from_numpy(images))
    rows = range(len(images))
    assert (store.read("label", rows) == labels).all()
    np.testing.assert_allclose(store.read("pool", rows), seen["pool"].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(store.read("logits", rows), seen["logits"].numpy(), rtol=1e-5, atol=1e-6)


def test_a_detector_that_comes_later_sees_what_it_would_have_seen_at_once_and_draws_nothing(trained):
    wide = {"trained": {"steps": 2, "batch": 8, "width": 16}}
    plan, evaluation = trained(shards=3)
    raw = {**yaml.safe_load(plan.file.read_text()), "detector": {**TINY["detector"], "wide": wide}}
    plan.file.write_text(yaml.safe_dump(raw))
    both = Plan(config.resolve(raw))
    both.file = plan.file
    assert cli.main(["detector", "wide", "-c", str(plan.file)]) == 0
    draw(both, both.evaluations[evaluation.name])
    made = both.evaluations[evaluation.name].judgement("wide").features
    at_once = [Path(path).read_bytes() for path in made.shard_files]
    samples = {path: (Path(path).read_bytes(), Path(path).stat().st_mtime_ns) for path in evaluation.sample_files}
    seen = joined(made)
    shutil.rmtree(made.folder)
    Path(plan.path(evaluation.state)).unlink()
    for shard in range(3):
        command = ["features", evaluation.name, "--detector", "wide", "--shard", str(shard), "-c", str(plan.file)]
        assert cli.main(command) == 0
    later = joined(made)
    assert len(at_once) == 3 and later.identity == seen.identity
    assert (later.read("pool", range(20)) == seen.read("pool", range(20))).all()
    assert {p: (Path(p).read_bytes(), Path(p).stat().st_mtime_ns) for p in samples} == samples


def joined(made):
    common = {"kind": "features", "key": made.key, "recipe": made.recipe, "shards": made.shards}
    join(made.folder, splits={}, provenance={}, **common)
    return Store.open(made.folder)


def test_a_shard_of_samples_that_another_wrote_or_a_kill_cut_short_is_refused_by_name(trained, capsys):
    plan, evaluation = trained()
    draw(plan, evaluation)
    path = Path(evaluation.sample_file(0))
    command = ["features", evaluation.name, "--detector", "cnn", "-c", str(plan.file)]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert cli.main(command) == 2
    np.savez(path.with_suffix(""), arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    assert cli.main(command) == 2
    messages = capsys.readouterr().err
    assert messages.count(str(path)) == 2 and "expected samples with their labels and record" in messages
    assert cli.main(["features", evaluation.name, "--detector", "dog", "-c", str(plan.file)]) == 2
    assert "detector 'dog': not in this configuration, which has cnn" in capsys.readouterr().err


def test_samples_come_from_the_average_and_not_from_the_raw_model(trained):
    from safetensors.torch import load_file, save_file

    plan, evaluation = trained()
    before, _ = draw(plan, evaluation)
    path = Path(plan.path(evaluation.state))
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = {"haste": file.metadata()["haste"]}  # without digests, which would refuse other tensors
    weights = load_file(path)
    raw = {name: value + 1.0 if name.startswith("model/") else value for name, value in weights.items()}
    save_file(raw, path, metadata)
    assert (draw(plan, evaluation)[0] == before).all()
    averaged = {name: value + 1.0 if name.startswith("ema/final") else value for name, value in weights.items()}
    save_file(averaged, path, metadata)
    assert (draw(plan, evaluation)[0] != before).any()


def test_a_state_without_its_file_is_named(trained, capsys):
    plan, evaluation = trained()
    Path(plan.path(evaluation.state)).unlink()
    assert cli.main(["sample", evaluation.name, "-c", str(plan.file)]) == 2
    assert f"{plan.path(evaluation.state)}: this state is missing" in capsys.readouterr().err


def test_a_shard_that_is_killed_goes_on_from_its_finished_batches_to_the_same_bits(trained, monkeypatch, caplog):
    plan, evaluation = trained(batch=6, sampler="euler-maruyama", steps=5)
    whole, labels = draw(plan, evaluation)
    file, paint, asked = Path(evaluation.sample_file(0)), drawing.drawn_together, []
    store = Path(evaluation.features.shard_files[0])
    features = store.read_bytes()
    for path in (file, store):
        path.unlink()
    batches.close(batches.folder_of(file.parent))

    def counted(painters, indices, told):
        asked.append(indices)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return paint(painters, indices, told)

    monkeypatch.setattr(drawing, "drawn_together", counted)
    assert cli.main(["sample", evaluation.name, "-c", str(plan.file)]) == 130
    assert not file.exists() and not store.exists()
    assert [path.name for path in file.parent.iterdir()] == [".batches"]
    caplog.set_level("INFO", logger="haste")
    again, labels_again = draw(plan, evaluation)
    assert "20/20 images (12 kept from before)" in caplog.text and "0 s to go" in caplog.text
    assert [(rows.start, rows.stop) for rows in asked] == [(0, 6), (6, 12), (12, 18), (12, 18), (18, 20)]
    assert (again == whole).all() and (labels_again == labels).all()
    assert features_of(store) == features_of_bytes(features)
    assert sorted(path.name for path in batches.folder_of(file.parent).iterdir()) == [file.name]  # no batches


def test_a_finished_shard_is_drawn_again_only_where_it_is_damaged_or_of_other_weights(trained, monkeypatch, caplog):
    plan, evaluation = trained(batch=20)
    whole, labels = draw(plan, evaluation)
    file, paint, asked = Path(evaluation.sample_file(0)), drawing.drawn_together, []
    second = batches.folder_of(file.parent) / file.name
    assert second.samefile(file)
    monkeypatch.setattr(drawing, "drawn_together", lambda *given: asked.append(1) or paint(*given))

    def same(times):
        found = draw(plan, evaluation)
        assert (found[0] == whole).all() and (found[1] == labels).all()
        assert len(asked) == times
        assert second.samefile(file)

    same(0)
    file.unlink()
    same(0)
    file.write_bytes(file.read_bytes()[:-200])  # both names
    same(1)
    data = bytearray(file.read_bytes())
    data[400] ^= 1  # a pixel
    file.unlink()
    second.write_bytes(data)
    same(2)
    np.savez(file, arr_0=whole, arr_1=labels)
    second.unlink()
    same(3)
    assert "expected samples" in caplog.text
    monkeypatch.setattr("haste.sampling.painter.weights_identity", lambda model: "of others")
    draw(plan, evaluation)
    assert len(asked) == 4


class Still:
    """Grey images without a network: what a painter is to a shard; `before` is called with each batch's first index."""

    sampling, condition = SimpleNamespace(count=12), Labels(classes=3)
    autoencoder, model = SimpleNamespace(factor=2), SimpleNamespace(input_size=2)

    def __init__(self, before):
        self.before = before

    def draw(self, indices):
        self.before(indices.start)
        grey = np.broadcast_to(np.array(indices, np.uint8)[:, None, None, None], (len(indices), 4, 4, 3))
        return {"image": grey, "label": np.array(indices) % 3, "nfe": np.full(len(indices), 7)}


def draw_still(folder, monkeypatch, before):
    path = folder / "shard.npz"
    monkeypatch.setattr(drawing, "drawn_together", lambda painters, rows, told: [one.draw(rows) for one in painters])
    drawing.draw_shards([drawing.Wanted(Still(before), path, "k", {})], shard=0, shards=1, batch=4, inputs={})
    return path


def test_a_batch_is_written_while_the_next_one_is_drawn_and_all_are_in_their_order(tmp_path, monkeypatch):
    begun, keep = [threading.Event() for _ in range(3)], batches._keep_batch

    def kept(path, *rest):
        following = int(path.stem) // 4 + 1
        assert following == 3 or begun[following].wait(120)
        keep(path, *rest)

    monkeypatch.setattr(batches, "_keep_batch", kept)
    with np.load(draw_still(tmp_path, monkeypatch, lambda low: begun[low // 4].set())) as file:
        assert file["arr_0"][:, 0, 0, 0].tolist() == list(range(12))
        assert file["arr_1"].tolist() == [0, 1, 2] * 4 and file["total"].tolist() == [48 * i for i in range(12)]


def test_a_disk_that_is_full_stops_the_job_and_leaves_no_shard(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batches, "_keep_batch", full)
    drawn = []
    with pytest.raises(OSError, match="No space left"):
        draw_still(tmp_path, monkeypatch, drawn.append)
    assert drawn == [0, 4] and not (tmp_path / "shard.npz").exists()


def features_of(path):
    import h5py

    with h5py.File(path, "r") as file:
        return {name: np.asarray(file[name]).tobytes() for name in file}


def features_of_bytes(data):
    import io

    return features_of(io.BytesIO(data))


def sample_in_a_process(plan, evaluation, before_batch):
    """The command in a process of its own, which calls `before_batch` with the number of each batch that it draws."""

    def work():
        paint, numbers = drawing.drawn_together, itertools.count()
        drawing.drawn_together = lambda *given: before_batch(next(numbers)) or paint(*given)
        os._exit(cli.main(["sample", evaluation.name, "-c", str(plan.file)]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def emptied(evaluation):
    for folder in (Path(evaluation.folder), Path(evaluation.features.folder)):
        shutil.rmtree(folder)


def assert_drawn(plan, evaluation, images, features):
    with np.load(evaluation.sample_file(0), allow_pickle=False) as file:
        assert (file["arr_0"] == images).all()
    assert features_of(evaluation.features.shard_files[0]) == features
    left = [path.name for path in Path(evaluation.folder).rglob("*") if path.is_file()]
    assert set(left) == {Path(evaluation.sample_file(0)).name}  # under one name or two, and nothing half


def test_two_processes_that_draw_one_shard_in_step_write_what_one_writes(trained, monkeypatch):
    monkeypatch.setenv("HASTE_LOCKS", "none")  # else one waits for the other
    plan, evaluation = trained(batch=6)
    images, _ = draw(plan, evaluation)
    features = features_of(evaluation.features.shard_files[0])
    emptied(evaluation)
    barrier = multiprocessing.get_context("fork").Barrier(2)
    both = [sample_in_a_process(plan, evaluation, lambda number: barrier.wait(120) and None) for _ in range(2)]
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]
    assert_drawn(plan, evaluation, images, features)


def test_a_process_that_was_overtaken_changes_nothing_of_what_the_other_made(trained, monkeypatch):
    monkeypatch.setenv("HASTE_LOCKS", "none")
    plan, evaluation = trained(batch=6)
    images, _ = draw(plan, evaluation)
    features = features_of(evaluation.features.shard_files[0])
    emptied(evaluation)
    begun, go = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def before_batch(number):
        if number == 1:
            begun.set()
            go.wait(240)

    late = sample_in_a_process(plan, evaluation, before_batch)
    assert begun.wait(240)
    scores = []
    assert cli.main(["reference", "-c", str(plan.file)]) == 0
    for _ in range(2):
        assert cli.main(["sample", evaluation.name, "-c", str(plan.file)]) == 0
        assert cli.main(["evaluate", evaluation.name, "-c", str(plan.file)]) == 0  # also clears the kept batches away
        scores.append(artefact.read_json(evaluation.score, "score")["scores"])
        go.set()
        late.join(240)
    assert late.exitcode == 0 and scores[0] == scores[1]
    assert_drawn(plan, evaluation, images, features)


def test_the_score_has_the_evaluations_that_were_counted(trained):
    import json

    plan, evaluation = trained(sampler="dopri5", steps=None, shards=2, count=20)
    draw(plan, evaluation)
    counts = []
    for shard in range(2):
        with np.load(evaluation.sample_file(shard), allow_pickle=False) as file:
            counts += file["nfe"].tolist()
            assert json.loads(str(file["haste"]))["nfe"] == pytest.approx(np.mean(counts[10 * shard :]))
    found = batches.mean_nfe([evaluation.sample_file(shard) for shard in range(2)])
    assert found == pytest.approx(np.mean(counts)) and found > 7
    Path(evaluation.sample_file(1)).unlink()
    assert batches.mean_nfe([evaluation.sample_file(shard) for shard in range(2)]) is None
