"""Several teachers whose features are followed at once: a projector each, from the configuration to the measures."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cached_training import make_targets
from test_several_teachers import MODELS, TEACHERS, first_losses, write_teacher

from haste import config
from haste.files import journal
from haste.files.provenance import read_header
from haste.measure import jobs
from haste.models.exchange import export_weights
from haste.plan import memory
from haste.report import gather
from haste.teachers.targets import load_teacher
from haste.train import loop
from haste.train.state import new_learner
from haste.train.step import total_loss
from haste.train.warm_start import warm_start

COARSE = {"teacher": "coarse", "depth": 2, "hidden": 16}
VIT = {"teacher": "vit", "depth": 1, "hidden": 8, "weight": 0.25}
ALIGNMENTS = {
    "both": {
        "features": [COARSE, VIT],
        "attention": {"teacher": "vit", "student_layers": [2], "teacher_layers": [1]},
    },
    "one": {"features": [COARSE]},
    "plain": {"features": COARSE},
}
RUNS = {
    "both": {"alignment": "both", "stop": {"features": 3}, "milestones": [2, 5], "measures": ["angles", "progress"]}
}
MEASURES = {
    "angles": {"measure": "gradient-cosine", "images": 4, "shards": 2, "t": [0.4], "blocks": [1]},
    "progress": {"measure": "progress", "images": 3, "t": [0.5]},
}
PROJECTORS = {
    f"projectors/{term}/{layer}.{part}"
    for term in ("features", "features-2")
    for layer in (0, 2, 4)
    for part in ("weight", "bias")
}


@pytest.fixture
def planned(make_plan):
    def made(**changes):
        common = {"models": MODELS, "teachers": TEACHERS, "alignments": ALIGNMENTS, "runs": RUNS, "measures": MEASURES}
        common["runtime"] = {"log_every": 1, "save_every": 1, "trackers": []}
        found = make_plan(**{**common, **changes})
        if not Path(found.teachers["coarse"].folder).exists():
            write_teacher(Path(found.teachers["coarse"].folder))
        return found

    return made


def test_each_teacher_has_a_projector_and_a_loss_of_its_own_until_the_stop_and_a_kill_changes_no_bit(
    planned, monkeypatch
):
    plan = planned()
    expected = first_losses(plan, "both")
    assert list(expected) == ["features", "features-2", "attention"]
    paths = [Path(plan.path(plan.state("both", step))) for step in (2, 5)]
    segment = plan.segment(plan.state("both", 2))
    for step in (2, 3, 5):
        loop.train(plan, plan.state("both", step))
    assert "features-features-2-attention" in paths[0].parent.name

    first = journal.read(paths[0].parent / "log.jsonl")[0]
    assert {term: first[term] for term in expected} == pytest.approx(expected, rel=1e-5)
    held = load_file(paths[0])
    assert {name for name in held if name.startswith("projectors/")} == PROJECTORS
    assert all(held[f"optimizer/exp_avg/{name}"].any() for name in PROJECTORS)
    weights = sum(held[name].numel() for name in PROJECTORS if name.endswith("weight"))
    assert memory.head_parameters(plan, segment) == weights
    header = read_header(paths[0])
    own = {term: load_teacher(plan, name).identity for term, name in (("features", "coarse"), ("features-2", "vit"))}
    assert {term: header["inputs"][f"teacher of {term}"] for term in own} == own
    assert header["provenance"]["targets"] == dict.fromkeys(expected, "online")
    assert plan.segment(plan.state("both", 5)).teachers == ["vit"]  # of attention alone
    ended = load_file(paths[1])
    assert not any(name.startswith("projectors/") for name in ended)

    for path in (*paths, Path(plan.path(plan.state("both", 3)))):
        path.unlink()
    given = loop.total_loss
    for killed_at in (1, 4):

        def killed(found, terms, step, at=killed_at):
            if step == at:
                raise KeyboardInterrupt
            return given(found, terms, step)

        monkeypatch.setattr(loop, "total_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(plan, plan.state("both", 2 if killed_at < 2 else 5))
        monkeypatch.setattr(loop, "total_loss", given)
        for step in (2, 3) if killed_at < 2 else (5,):
            loop.train(plan, plan.state("both", step))
    for path, before in zip(paths, (held, ended), strict=True):
        again = load_file(path)
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], value) for name, value in before.items())


def test_losses_are_summed_by_the_weight_of_each_term(planned):
    segment = (plan := planned()).segment(plan.state("both", 2))
    found = {"denoising": torch.tensor(1.0), "features": torch.tensor(10.0)}
    found |= {"features-2": torch.tensor(100.0), "attention": torch.tensor(1000.0)}
    assert total_loss(found, segment.terms, 0).item() == 1 + 0.5 * 10 + 0.25 * 100 + 0.5 * 1000


def test_stored_targets_of_all_of_them_train_as_their_teachers_do(planned):
    expected = first_losses(planned(), "both")
    teachers = {name: {**one, "cache": "features"} for name, one in TEACHERS.items()}
    plan = planned(teachers=teachers)
    for name in teachers:
        make_targets(plan, name)
    path = loop.train(plan, plan.state("both", 2))
    first = journal.read(path.parent / "log.jsonl")[0]
    assert {term: first[term] for term in expected} == pytest.approx(expected, rel=2e-3)
    said = read_header(path)["provenance"]["targets"]
    assert {term: how.split(",")[0] for term, how in said.items()} == {
        "features": "cached",
        "features-2": "cached",
        "attention": "online",
    }


def test_measures_and_the_report_name_every_term_and_projectors_leave_and_come_back_in_order(planned, tmp_path):
    plan = planned()
    state = loop.train(plan, plan.state("both", 2))
    terms = {}
    for one in plan.measured:
        if one.measurement.state.step == 2:
            found = jobs.measure(plan, one.measurement, keep=False)
            assert not any("there is no projector" in note for note in found["notes"])
            terms[one.measurement.label] = {row["term"] for row in found["rows"]}
    assert {"features", "features-2", "attention"} <= terms["angles"]
    assert {"projected features, cosine", "projected features-2, cosine"} <= terms["progress"]
    said = gather.settings(plan, "both")
    assert said["feature-2 depth"] == "1" and "feature depth" not in said
    assert said["feature weight"] == "0.5" and said["feature-2 weight"] == "0.25"
    assert "features coarse" in said["teacher"] and "features-2 vit" in said["teacher"]
    assert gather.method(plan, "both") == "HASTE"
    assert gather.stop(plan, "both") == "features 3, features-2 3, attention never"

    export_weights(state, tmp_path / "out.pt", form="repa")
    start = {"warm_start": str(tmp_path / "out.pt"), "alignment": "both", "milestones": [2]}
    plan = planned(runs={"again": start})
    segment = plan.segment(plan.state("again", 2))
    recipe = plan.trajectories[segment.state.trajectory].recipe
    widths = {name: load_teacher(plan, name).width for name in ("coarse", "vit")}
    learner = new_learner(recipe, segment.terms, widths)
    warm_start(plan, segment.state.trajectory, learner)
    held = load_file(state)
    for name in PROJECTORS:
        _, term, weight = name.split("/")
        assert torch.equal(learner.projectors[term].state_dict()[weight], held[name]), name


def test_a_list_of_one_is_that_one(planned):
    plan = planned(runs={name: {"alignment": name, "milestones": [2]} for name in ("one", "plain")})
    assert plan.path(plan.state("one", 2)) == plan.path(plan.state("plain", 2))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ([COARSE, {**COARSE, "depth": 1}], r"alignments\.A\.features: teacher coarse is there more than once"),
        ([COARSE, {**VIT, "dpth": 1}], r"alignments\.A\.features\.1\.dpth: unknown key; did you mean 'depth'"),
        ([COARSE, {**VIT, "teacher": "vt"}], r"alignments\.A\.features\.1\.teacher: nothing is called 'vt'"),
        ([], r"alignments\.A\.features: found no term, expected one"),
        (
            [COARSE, {**VIT, "similarity": "nt-xent", "negatives": "batch"}],
            r"alignments\.A\.features\.1\.negatives: batch is for one teacher of features, found 2",
        ),
        ([COARSE, {**VIT, "depth": 9}], r"alignments\.A\.features\.1\.depth: 9, but dot has blocks 1 to 3"),
    ],
)
def test_faults_of_several_teachers_are_said_by_their_key(tiny, features, words):
    tiny |= {"models": MODELS, "teachers": copy.deepcopy(TEACHERS), "alignments": {"A": {"features": features}}}
    tiny["runs"] = {"a": {"alignment": "A", "milestones": [2]}}
    with pytest.raises(ValueError, match=words):
        config.resolve(tiny)
