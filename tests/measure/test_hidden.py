"""Hidden states of a state, by layer and t: against a network that is built and run by hand; made once, and kept."""

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from measure_cells import cells
from safetensors.torch import load_file, save_file
from toy_gradients import hidden_state

from haste.cli import main as cli
from haste.config import resolve
from haste.data import order
from haste.data.batches import Batches
from haste.files.provenance import read_header
from haste.files.store import Store
from haste.measure import jobs, passes
from haste.ops import prune
from haste.plan.plan import Plan

CKNNA = {"measure": "cknna", "images": 40, "shards": 4, "neighbours": 5, "t": [0.25, 0.75]}


def state(plan):
    return plan.path(plan.state("plain", 8))


def counted(monkeypatch):
    """The images of every pass of the network from now on."""
    seen, whole = [], passes._states
    monkeypatch.setattr(passes, "_states", lambda *given: (seen.extend(given[-1]), whole(*given))[1])
    return seen


def test_hidden_states_are_the_mean_tokens_of_the_split_s_images_at_t_with_the_null_condition(toy, measured):
    plan = toy(all=CKNNA, raw={**CKNNA, "weights": "model", "layers": [2], "t": [0.25], "split": "train"})
    for label, places in {"all": [(1, 0.25), (2, 0.75), (3, 0.25)], "raw": [(2, 0.25)]}.items():
        measured(plan, label)
        ((split, one),) = next(m.hidden.items() for m in plan.measurements.values() if m.label == label)
        store, whole = Store.of(one), Store.open(plan.images.folder).range({"all": "held_out", "raw": "train"}[label])
        images = whole.start + order.choice(0, "measured images", 0, 40, len(whole))
        assert list(store.splits) == [split]
        assert store.count == 40 and len(store.fields) == {"all": 6, "raw": 1}[label]
        for layer, t in places:
            found = store.read(f"layer {layer}, t {t:g}", [0, 39])
            weights = {"all": "ema", "raw": "model"}[label]
            expected = torch.cat(
                [hidden_state(plan, load_file(state(plan)), images[i], t, layer, weights) for i in (0, 39)]
            )
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_measures_that_ask_for_the_same_make_one_pass_and_a_state_with_other_weights_another(
    toy, measured, monkeypatch
):
    plan, seen = toy(hsic=CKNNA, centred={**CKNNA, "formula": "centred"}), counted(monkeypatch)
    found = measured(plan, "hsic")
    assert len(seen) == len(set(seen)) == 40
    assert measured(plan, "centred")["rows"] != found["rows"] and len(seen) == 40
    for file in Path(plan.root).glob("measures/*/*.json"):
        file.unlink()
    assert measured(plan, "hsic")["rows"] == found["rows"] and len(seen) == 40
    tensors, header = load_file(state(plan)), read_header(state(plan))
    tensors["ema/cells.weight"] = 2 * tensors["ema/cells.weight"]
    save_file(tensors, state(plan), metadata={"haste": json.dumps(header)})
    for file in Path(plan.root).glob("measures/*/*.json"):
        file.unlink()
    assert measured(plan, "hsic")["rows"] != found["rows"] and len(seen) == 80


def test_a_hidden_state_that_is_no_number_is_refused_with_its_place_and_nothing_is_kept(toy, measured, monkeypatch):
    plan, whole = toy(hsic=CKNNA), passes._states

    def broken(*given):
        rows = whole(*given)
        rows["layer 2, t 0.75"][3, 5] = np.nan
        return rows

    monkeypatch.setattr(passes, "_states", broken)
    with pytest.raises(FloatingPointError, match=r"hidden-\w+: layer 2, t 0\.75 of image \d+ is not finite"):
        measured(plan, "hsic")
    assert not [path for path in Path(plan.root, "measures").rglob("*") if path.is_file()]


SMALL = {"measure": "cknna", "images": 60, "shards": 4, "neighbours": 5}


def rank_measures(plan, rank, port, seen):
    whole = passes._states

    def noted(*given):
        with open(seen, "a") as file:
            file.writelines(f"{image}\n" for image in given[-1])
        return whole(*given)

    passes._states = noted
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    passes.SPAN = 20
    for what in plan.measurements.values():
        jobs.measure(plan, what, keep=True)


def test_two_jobs_of_two_processes_share_the_passes_of_one_and_find_the_same_as_a_process_alone(
    toy, measured, tmp_path
):
    pca = {"measure": "pca", "images": 2, "layers": [1], "beside": ["vit"]}
    plan, fork = toy(hsic=CKNNA | {"images": 60}, pca=pca), multiprocessing.get_context("fork")
    what = next(one for one in plan.measurements.values() if one.label == "hsic")
    with contextlib.ExitStack() as bound:
        free = [bound.enter_context(socket.socket()) for _ in range(3)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    seen = tmp_path / "seen"
    jobs_of = [(plan, rank, port, seen) for port in ports for rank in "01"]
    *ranks, late = [fork.Process(target=rank_measures, args=mine) for mine in jobs_of]
    for rank in ranks:
        rank.start()
    for rank in ranks[:4]:
        rank.join(60)
    late.start()  # when all is there that the other rank of its job began to wait with it for
    for rank in [*ranks, late]:
        rank.join(60)
        rank.kill()
    assert [rank.exitcode for rank in [*ranks, late]] == [0] * 6
    assert len(looked := seen.read_text().split()) == 62  # no image was passed twice for one store
    assert len({*looked}) == 60
    together, shown = measured(plan, "hsic")["rows"], measured(plan, "pca")["pictures"]
    assert len(list(Path(what.hidden["held_out"].folder).glob("shard-*-of-00003.h5"))) == 3
    shutil.rmtree(Path(what.file).parent)
    for one, other in zip(together, measured(plan, "hsic")["rows"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    for one, other in zip(shown, measured(plan, "pca")["pictures"], strict=True):
        pairs = zip(cells(one, 2).values(), cells(other, 2).values(), strict=True)
        assert max(np.abs(np.subtract(a, b, dtype=int)).max() for a, b in pairs) <= 1


def test_an_imported_checkpoint_is_measured_without_a_trace_and_finds_what_the_state_that_it_was_does(world, tmp_path):
    world.configure(measures={"cknna": SMALL})
    own, theirs = (tmp_path / f"{name}.json" for name in ("own", "theirs"))
    for file, out, more in ((world.state, own, []), (world.folder / "theirs.pt", theirs, ["--model", "dot"])):
        assert cli.main(["measure", "cknna", str(file), "--json", str(out), *more, "-c", str(world.file)]) == 0
    found, other = (json.loads(path.read_text()) for path in (own, theirs))
    assert found["rows"] == other["rows"] and found["settings"]["teacher"] == "vit"
    assert not Path(world.root, "measures").exists() and not list(Path(world.root).glob(".hidden*"))


def test_hidden_states_stay_while_a_configuration_measures_them(world):
    world.configure(measures={"cknna": SMALL}, runs={"HASTE": {"alignment": "HASTE", "measures": ["cknna"]}})
    what = next(one.measurement for one in world.plan.measured if one.step == 8)
    assert cli.main(["measure", "cknna", what.name, "-c", str(world.file)]) == 0
    folder = Path(what.hidden["held_out"].folder)
    folder.with_name("hidden-0123456789ab").mkdir()
    gone = {item.path for item in prune.unneeded(Path(world.root), prune.Needs.of([world.plan]))}
    assert folder.with_name("hidden-0123456789ab") in gone
    assert not gone & {folder, Path(what.seen["vit"]["held_out"].folder), Path(what.file)}


def test_fewer_images_in_the_store_than_the_measure_asks_for_are_refused(toy, measured, monkeypatch):
    """As where pictures that cannot be read were left out."""
    plan, whole = toy(hsic=CKNNA), Batches.reading_indices
    monkeypatch.setattr(Batches, "reading_indices", lambda *given: whole(*given)[:39])
    with pytest.raises(ValueError, match=r"has 39 images of held_out, but measured are 40; ask for fewer"):
        measured(plan, "hsic")


# ---- what is refused before the first job


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        (SMALL | {"layers": [2, 3]}, {}, "measures.it.layers: [3], expected of those that dot has, 1 to 2"),
        (SMALL | {"layers": [2, 2]}, {}, "measures.it: layers [2, 2] has a value more than once"),
        (SMALL | {"t": [0.5, 1.5]}, {}, "measures.it.t.1: Input should be less than or equal to 1"),
        (
            SMALL | {"images": 98},
            {},
            "measures.it.images: 98 images that are not trained on, but images.holdout keeps 97",
        ),
        (
            {"measure": "cknna"},
            {},
            "measures.it.images: 10,000 images that are not trained on, but images.holdout keeps",
        ),
        (SMALL | {"teacher": "vot"}, {}, "measures.it.teacher: vot, expected one of vit"),
        (SMALL, {"teachers": {}, "alignments": {}}, "teacher: none is named, expected one of teachers, which has none"),
        (
            SMALL | {"neighbours": 45},
            {},
            "without one of 4 shards 45 images are left, expected more than neighbours",
        ),
        (SMALL | {"shards": 61}, {}, "measures.it: shards 61 are more than images 60, expected at most as many"),
        (SMALL | {"formula": "cka"}, {}, "measures.it.formula: Input should be 'hsic' or 'centred'"),
        (SMALL | {"alignment": "HASTE"}, {}, "measures.it.alignment: 'HASTE' given, but cknna compares with no"),
        ({"measure": "probe", "judged": 98}, {}, "measures.it.judged: 98 images that are not trained on, but"),
        ({"measure": "probe", "layers": [7]}, {}, "measures.it.layers: [7], expected of those that dot has, 1 to 2"),
        ({"measure": "probe", "epochs": 9}, {}, "measures.it: warmup 10 epochs, expected less than all epochs, 9"),
    ],
)
def test_what_cannot_be_measured_of_hidden_states_is_refused_by_its_key(tiny, spec, changes, words):
    runs = {"plain": {"measures": ["it"]}}
    with pytest.raises(ValueError) as refused:
        resolve({**tiny, **changes, "measures": {"it": spec}, "runs": runs})
    assert words in str(refused.value)


def test_a_probe_needs_held_out_images_and_classes(tiny):
    public = {"autoencoder": {"pretrained": {"encode": "a", "factor": 2}}, "teachers": {}, "alignments": {}}
    public |= {"detector": {"d": {"pretrained": {"name": "DINOv2-B"}}}}
    folder = {"source": "folder", "path": "a", "resolution": 32, "classes": 0, "holdout": 0}
    runs, sampling = {"plain": {"measures": ["it"], "sampling": ["it"]}}, {"it": {"count": 20}}
    changed = {**tiny, **public, "images": folder, "sampling": sampling, "runs": runs}
    with pytest.raises(ValueError) as refused:
        resolve({**changed, "measures": {"it": {"measure": "probe"}}})
    assert "measures.it.judged: 1 images that are not trained on, but images.holdout keeps 0" in str(refused.value)
    assert "found condition labels and images.classes 0; expected labels of 2 classes or more" in str(refused.value)


def test_more_training_images_than_there_are_are_refused_before_the_first_job(tiny, tmp_path):
    measures = {"it": {"measure": "probe", "images": 1701}}
    raw = {**tiny, "results": str(tmp_path), "measures": measures, "runs": {"plain": {"measures": ["it"]}}}
    with pytest.raises(ValueError, match=r"measures\.it\.images: 1,701, but there are 1,700 training images"):
        Plan(resolve(raw)).check()
    measures["it"]["images"] = 1700
    Plan(resolve(raw)).check()
