"""Progress of both alignment terms, trained or not: against values that are computed image by image in float64."""

import contextlib
import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_gradients import ALIGNED, Toy, coarser

from haste import config
from haste.cli import main as cli
from haste.data import order
from haste.files.store import Store
from haste.measure import jobs
from haste.measure.subject import opened
from haste.plan.plan import Plan
from haste.teachers import targets
from haste.train import loop
from haste.train.distributed import Group

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
SPEC = {"measure": "progress", "alignment": "HASTE", "images": 5, "t": [0.1, 0.625]}
OTHER = {**ALIGNED["attention"], "student_layers": [0], "teacher_layers": [1]}
ALIGNMENTS = {
    "HASTE": ALIGNED,
    "ATTA": {"attention": OTHER},
    "REPA-3": {"features": {**ALIGNED["features"], "depth": 3}},
}
ATTENTION, FEATURES, PROJECTED = "attention, cross-entropy", "features, cosine", "projected features, cosine"


@pytest.fixture(scope="module")
def plan(_finished_data, once, pictures):
    """Of a toy in float64, trained for 4 steps with each alignment and with none; nothing is written to it."""
    measures = {"all": SPEC, "train": {**SPEC, "split": "train", "images": 4, "t": [0.3]}}
    measures["others"] = {**SPEC, "split": "evaluation"}
    runs = {
        name: {"alignment": name, "milestones": [4], "measures": list(measures)} for name in ("vanilla", *ALIGNMENTS)
    }
    runs["wide"] = {"alignment": "HASTE", "model": "wide", "milestones": [4], "measures": ["all"]}
    raw = {
        **copy.deepcopy(TINY),
        "models": {"dot": {"architecture": "Toy", "width": 16}, "wide": {"architecture": "Toy", "width": 24}},
        "alignments": ALIGNMENTS,
        "training": {"batch": 4, "lr": 1.0e-2, "ema": 0.9, "precision": "fp64"},
        "measures": measures,
        "runs": runs,
    }
    raw["defaults"]["model"] = "dot"

    def planned(folder):
        evaluation = {"source": "folder", "path": str(folder / "val")}
        return Plan(config.resolve({**raw, "results": str(folder / "results"), "evaluation": evaluation}))

    def fill(folder):
        shutil.copytree(_finished_data, folder / "results")
        pictures(folder / "val", count=1)
        (folder / "it.json").write_text(planned(folder).config.model_dump_json())
        for command, shards in (("images", 1), ("latents", 2)):
            for step in (*(["--shard", str(shard)] for shard in range(shards)), ["--join"]):
                assert cli.main([command, "-c", str(folder / "it.json"), "--evaluation", *step]) == 0
        for state in planned(folder).planned():
            loop.train(planned(folder), state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.DENOISERS, "Toy", "toy_gradients:Toy")
        yield planned(once("progress", fill))


def measured(plan, run, label="all"):
    (what,) = (one.measurement for one in plan.measured if (one.measurement.label, one.run) == (label, run))
    found = jobs.measure(plan, what, keep=False)
    return {(row["term"], row["t"]): (row["value"], row["error"]) for row in found["rows"]}, found["notes"]


@torch.no_grad()
def values(plan, run, image, t, split="held_out"):
    """Of one image; knows how the toy, the path and the two losses are computed, no more."""
    tensors, stores = load_file(plan.path(plan.state(run, 4))), plan.of(split)
    with Store.open(stores.latents.folder) as latents, Store.open(stores.images.folder) as images:
        mean, std = torch.from_numpy(latents.read("moments", [image])).double().chunk(2, dim=1)
        label, pixels = (torch.from_numpy(s.read(n, [image])) for s, n in ((latents, "label"), (images, "image")))
        scale, shift = latents.manifest["scale"], latents.manifest["shift"]
    teacher = targets.load_teacher(plan, "vit").to(torch.device("cpu"), torch.float64)
    seen = teacher(pixels, features=True, attention=[0, 1])
    n, eps = (
        torch.from_numpy(order.normals(0, purpose, 0, [image], mean.shape[1:])).double()
        for purpose in ("measured latent draw", "measured noise")
    )
    z, t = (mean + std * n - shift) * scale, float(np.float32(t))
    model = Toy(input_size=4, in_channels=4, classes=10, width=16).double()
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    wanted = {"tokens.2", "attention.1", "attention.2"}
    _, taps = model((1 - t) * z + t * eps, torch.tensor([t], dtype=torch.float64), label, taps=wanted)
    pairs = []
    for mine, theirs in ((1, 0), (2, 1)):
        (q, k), (q_t, k_t) = (coarser(x) for x in taps[f"attention.{mine}"][:2]), seen.attention[theirs]
        logits = (q @ k.mT / math.sqrt(8)).log_softmax(-1)
        pairs.append(float(-((q_t @ k_t.mT / math.sqrt(8)).softmax(-1) * logits).sum(-1).mean()))
    tokens = coarser(taps["tokens.2"])
    found = {ATTENTION: sum(pairs) / 2, FEATURES: torch.cosine_similarity(tokens, seen.features, dim=-1).mean().item()}
    if "projectors/features/0.weight" in tensors:
        head = torch.nn.Sequential(*(torch.nn.Linear(16, 16) if i % 2 == 0 else torch.nn.SiLU() for i in range(5)))
        head.double().load_state_dict(
            {k.removeprefix("projectors/features/"): v for k, v in tensors.items() if k.startswith("projectors/")}
        )
        found[PROJECTED] = torch.cosine_similarity(head(tokens), seen.features, dim=-1).mean().item()
    return found


@pytest.mark.parametrize("run", ["vanilla", "HASTE", "ATTA"])
def test_values_and_errors_are_those_of_held_out_images_one_by_one_whether_or_not_the_terms_were_trained(plan, run):
    held = Store.open(plan.latents.folder).range("held_out")
    images = held.start + order.choice(0, "measured images", 0, 5, len(held))
    rows, notes = measured(plan, run)
    for t in SPEC["t"]:
        each = [values(plan, run, image, t) for image in images]
        assert each[0].keys() == {term for term, _ in rows} and (PROJECTED in each[0]) == (run == "HASTE")
        for term in each[0]:
            mine = np.array([one[term] for one in each])
            assert rows[term, t][0] == pytest.approx(mine.mean(), abs=3e-8), (term, t)
            assert rows[term, t][1] == pytest.approx(mine.std(ddof=1) / math.sqrt(5), abs=3e-8), (term, t)
    assert notes == []  # the band of the alignment, t_min 0.3, is of training


def test_images_of_their_own_are_compared_with_what_the_teacher_says_of_them(plan):
    rows, notes = measured(plan, "HASTE", "others")
    each = [values(plan, "HASTE", image, 0.1, "evaluation") for image in order.choice(0, "measured images", 0, 5, 10)]
    for term in (ATTENTION, FEATURES, PROJECTED):
        assert rows[term, 0.1][0] == pytest.approx(np.mean([one[term] for one in each]), abs=3e-8)
    assert notes == []
    (what,) = (one.measurement for one in plan.measured if (one.measurement.label, one.run) == ("others", "HASTE"))
    assert {*plan.of("evaluation").images.files, *plan.of("evaluation").latents.files} <= {*plan.measured_from(what)}


@pytest.mark.parametrize("split", ["held_out", "evaluation"])
def test_targets_are_stored_of_training_s_images_alone(tiny, split):
    tiny["teachers"]["vit"]["cache"] = "features+attention"
    tiny |= {"evaluation": {"path": "val"}, "measures": {"how": {"measure": "progress", "split": split}}}
    tiny["runs"] = {"HASTE": {"alignment": "HASTE", "measures": ["how"]}}
    cached = {one.measurement.cached for one in Plan(config.resolve(tiny)).measured}
    assert cached == ({("features", "attention")} if split == "held_out" else {()})
    tiny["teachers"]["vit"]["pca"] = 4
    said = pytest.raises(
        ValueError, match=r"measures\.how\.split: evaluation, but features are compared with principal"
    )
    with said if split == "evaluation" else contextlib.nullcontext():
        config.resolve(tiny)


def test_on_a_batch_of_training_images_they_are_the_values_of_the_training_losses_themselves(plan):
    rows, _ = measured(plan, "HASTE", "train")
    (what,) = (one.measurement for one in plan.measured if (one.measurement.label, one.run) == ("train", "HASTE"))
    subject, _ = opened(plan, what, "model", 0, Group(0, 1, torch.device("cpu")))
    batch = subject.inputs.batches.measured(subject.inputs.batches.reading_indices(4), range(4))
    batch.t.fill_(0.3)
    with torch.no_grad():
        losses = subject.inputs.objective(subject.learner)(batch, subject.inputs.targets(batch))
    assert rows[ATTENTION, 0.3][0] == pytest.approx(losses["attention"].item(), rel=1e-12)
    assert rows[PROJECTED, 0.3][0] == pytest.approx(-losses["features"].item(), rel=1e-12)


def test_a_projector_of_another_block_is_not_used_and_widths_that_differ_are_left_out_with_a_note(plan):
    rows, notes = measured(plan, "REPA-3")
    assert {term for term, _ in rows} == {ATTENTION, FEATURES}
    assert notes == ["the state's projector is of another block or teacher, and not used"]
    rows, notes = measured(plan, "wide")
    assert {term for term, _ in rows} == {ATTENTION, PROJECTED}
    assert notes == ["features without a projector left out: tokens after block 2 have width 24, those of vit 16"]


def test_ranks_share_the_images_and_find_together_what_one_finds_alone(plan, monkeypatch):
    (what,) = (one.measurement for one in plan.measured if (one.measurement.label, one.run) == ("all", "HASTE"))
    summed, kind = [], plan.config.measures["all"].made
    monkeypatch.setattr(Group, "total", lambda self, values: summed.append(values.clone()) or values)
    for size in (1, 4):
        for rank in range(size):
            subject, _ = opened(plan, what, kind.weights, kind.seed, Group(rank, size, torch.device("cpu")))
            list(kind.run(subject))
    whole, *parts = summed
    assert [int((part[0, 0] != 0).sum()) for part in parts] == [1, 1, 1, 2]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_a_row_without_an_alignment_needs_the_name_of_one(tiny):
    tiny |= {"measures": {"how": {"measure": "progress"}}}
    tiny["runs"] = {"plain": {"measures": ["how"]}}
    with pytest.raises(
        ValueError, match=r"runs\.plain\.measures: how \(progress\) compares with an alignment, but plain"
    ):
        config.resolve(tiny)
    tiny["measures"]["how"]["alignment"] = "REPA"  # features are compared without a projector too
    assert config.resolve(tiny).measures["how"].alignment == "REPA"
