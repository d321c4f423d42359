"""Checkpoints from elsewhere: rows without training, named by content, and runs that begin from one."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from haste.cli import main as cli
from haste.config import resolve
from haste.data.condition import Labels
from haste.data.latents import Autoencoder
from haste.diffusion.interpolant import Interpolant
from haste.files import artefact
from haste.models.exchange import open_weights
from haste.networks.layouts import LABELS
from haste.ops import cost
from haste.plan.plan import Plan
from haste.sampling.painter import Painter
from haste.train import loop
from haste.train.state import tensors_of, trained_model

ROW = {"model": "dot", "sampling": ["quick"], "step": 8, "method": "REPA"}


@pytest.fixture
def exported(make_plan, tmp_path):
    """A trained state, its plan, and the same weights as REPA would have saved them."""
    plan = make_plan(runs={"REPA": {"alignment": "REPA", "milestones": [8]}})
    state = loop.train(plan, plan.state("REPA", 8))
    assert cli.main(["export", str(state), str(tmp_path / "out.pt"), "--format", "repa"]) == 0
    return plan, state, tmp_path / "out.pt"


def samples(plan, row):
    """Samples and scores of a row, made by the commands that the workflow calls."""
    for command in ("sample", "evaluate"):
        assert cli.main([command, row.evaluation.name, "-c", str(plan.file)]) == 0
    with np.load(row.evaluation.sample_file(0)) as file:
        return file["arr_0"]


def elsewhere(make_plan, file, **changes):
    return make_plan(runs={}, evaluate={"theirs": {**ROW, "checkpoint": str(file), **changes}})


def test_weights_that_ran_away_stop_sampling_at_a_sample_instead_of_scoring_black_ones(exported, make_plan, capsys):
    held = torch.load(exported[2], weights_only=False)
    for which in ("model", "ema"):
        held[which]["final_layer.linear.bias"].fill_(3e38)  # finite
    torch.save(held, exported[2])
    plan = elsewhere(make_plan, exported[2])
    assert cli.main(["sample", plan.rows[0].evaluation.name, "-c", str(plan.file)]) == 2
    said = capsys.readouterr().err
    assert "sample 0: its latents are not finite" in said and "Traceback" not in said
    assert not Path(plan.rows[0].evaluation.sample_file(0)).exists()


def test_a_row_from_elsewhere_draws_the_samples_that_the_same_weights_draw_here(exported, make_plan):
    plan, _, path = exported
    own = samples(plan, plan.rows[0])
    other = elsewhere(make_plan, path)
    assert (samples(other, other.rows[0]) == own).all()
    assert (
        not other.planned() and not (Path(other.root) / "states" / other.rows[0].evaluation.state.trajectory).exists()
    )
    score = artefact.read_json(other.rows[0].evaluation.score, "score")
    assert score["scores"] == artefact.read_json(plan.rows[0].evaluation.score, "score")["scores"]
    assert score["state"]["step"] == 8 and score["state"]["file"] == str(path)
    assert score["state"]["sha256"] == artefact.file_identity(path)


def test_a_report_of_rows_from_elsewhere_alone_shows_them(exported, make_plan):
    _, _, path = exported
    plan = elsewhere(make_plan, path)
    samples(plan, plan.rows[0])
    for command in (["grid", plan.rows[0].evaluation.name], ["floor"], ["report"]):
        assert cli.main([*command, "-c", str(plan.file)]) == 0
    page = Path(plan.report).read_text()
    assert "theirs" in page and "REPA" in page


def test_raw_weights_are_drawn_from_when_asked(exported, make_plan):
    _, _, path = exported
    ema = elsewhere(make_plan, path)
    averaged = samples(ema, ema.rows[0])
    raw = elsewhere(make_plan, path, weights="model")
    assert ema.rows[0].evaluation.name != raw.rows[0].evaluation.name
    assert (samples(raw, raw.rows[0]) != averaged).any()
    how = artefact.read_json(raw.rows[0].evaluation.score, "score")["sampling"]
    assert (how["weights"], how["decoder"]) == ("model", raw.rows[0].evaluation.recipe["decoder"])


def test_the_scale_of_the_latents_is_the_autoencoders_where_there_is_no_store_of_latents(exported, make_plan):
    plan, state, path = exported
    other = elsewhere(make_plan, path)
    for file in Path(plan.latents.folder).iterdir():
        file.unlink()
    drawn = samples(other, other.rows[0])
    model, _ = trained_model(state, key=plan.trajectories[plan.rows[0].evaluation.state.trajectory].key)
    decoder = Autoencoder.load(plan.decoder)
    assert decoder.scale != 1.0
    sampling = plan.rows[0].evaluation.sampling
    seams = Interpolant(), Labels(classes=10)
    expected, _ = Painter(model, sampling, decoder, *seams, decoder.scale, decoder.shift).paint(range(20))
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_another_content_is_another_name_also_with_the_same_size_and_time(exported, make_plan):
    _, _, path = exported
    before = elsewhere(make_plan, path).rows[0].evaluation.name
    found = os.stat(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == found.st_mtime_ns
    assert elsewhere(make_plan, path).rows[0].evaluation.name != before


def test_a_file_under_another_name_and_what_is_only_shown_change_no_name(exported, make_plan, tmp_path):
    _, _, path = exported
    first = elsewhere(make_plan, path).rows[0]
    path.rename(tmp_path / "moved.pt")
    second = elsewhere(make_plan, tmp_path / "moved.pt", step=99, method="x", seed=3, layout="REPA").rows[0]
    assert first.evaluation.name == second.evaluation.name
    assert (second.step, second.seed) == (99, 3)


def test_a_file_is_read_once_for_its_name(exported, make_plan, monkeypatch):
    _, _, path = exported
    elsewhere(make_plan, path)
    monkeypatch.setattr(artefact, "file_identity", lambda path: pytest.fail(f"{path} was read again"))
    elsewhere(make_plan, path)


def test_a_file_that_is_gone_keeps_its_name_and_is_said_and_an_unknown_one_is_refused(exported, make_plan, tmp_path):
    _, _, path = exported
    before = elsewhere(make_plan, path)
    path.unlink()
    after = elsewhere(make_plan, path)
    assert after.rows[0].evaluation.name == before.rows[0].evaluation.name
    assert any("is gone" in note for note in after.notes)
    assert cli.main(["sample", after.rows[0].evaluation.name, "-c", str(after.file)]) == 2
    with pytest.raises(ValueError, match=r"other\.pt: expected a file, found nothing"):
        elsewhere(make_plan, tmp_path / "other.pt")


def test_a_file_that_changes_while_it_is_in_use_is_refused(exported, make_plan, monkeypatch, capsys):
    _, _, path = exported
    plan = elsewhere(make_plan, path)
    monkeypatch.setattr("haste.plan.outside.remembered_identity", lambda path, memory: "0" * 64)
    name = elsewhere(make_plan, path).rows[0].evaluation.name
    assert cli.main(["sample", name, "-c", str(plan.file)]) == 2
    assert "It changed while" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "SiT-S/2"}, "depth: found 2, expected 12"),
        ({"path": "cosine"}, "was trained on the linear path, but the row says cosine"),
        ({"layout": "SiT"}, "is said to be SiT's, but its header says that it is of REPA"),
    ],
)
def test_a_checkpoint_that_is_not_what_the_row_says_is_refused(exported, make_plan, capsys, change, words):
    _, _, path = exported
    plan = elsewhere(make_plan, path, **change)
    assert cli.main(["sample", plan.rows[0].evaluation.name, "-c", str(plan.file)]) == 2
    assert f"{path}: " in (message := capsys.readouterr().err) and words in message


def test_a_configuration_needs_a_row_and_rows_have_names_of_their_own(tiny, tmp_path):
    row = {**ROW, "checkpoint": "x.pt"}
    for change, words in [
        ({"runs": {}}, "found no row in runs or evaluate"),
        ({"evaluate": {"REPA": row}}, "evaluate.REPA: runs has a row of this name too"),
        (
            {"evaluate": {"a": {**row, "model": "dott"}}},
            "evaluate.a.model: nothing is called 'dott'; did you mean 'dot'",
        ),
        ({"evaluate": {"a": {**row, "sampling": ["quik"]}}}, "evaluate.a.sampling: nothing is called 'quik'"),
        ({"evaluate": {"a": {k: v for k, v in row.items() if k != "step"}}}, "evaluate.a.step: missing"),
    ]:
        with pytest.raises(ValueError, match=words):
            resolve({**tiny, **change})


def test_the_plan_counts_no_latents_and_no_training_for_rows_from_elsewhere(exported, make_plan, capsys):
    _, _, path = exported
    other = elsewhere(make_plan, path)
    found = {stage.name: stage.jobs for stage in cost.stages(other)[0]}
    assert not {"latents", "train", "train_plain"} & found.keys()
    assert found["sample"] == found["score"] == 1


# ---- warm start


def warm(make_plan, path, **changes):
    start = str(path) if isinstance(path, Path) else path
    return make_plan(runs={"warm": {"alignment": "REPA", "milestones": [3], "warm_start": start, **changes}})


def test_a_warm_start_takes_model_average_and_projector_and_a_new_optimiser(exported, make_plan, monkeypatch):
    _, state, path = exported
    plan = warm(make_plan, path)
    found = begun(plan, monkeypatch, plan.state("warm", 3))
    assert not any(name.startswith("optimizer/") for name in found)  # no moments
    kept = {name: value for name, value in load_file(state).items() if not name.startswith("optimizer/")}
    assert set(kept) <= set(found) and all(torch.equal(found[name], value) for name, value in kept.items())


def test_a_warm_started_run_goes_on_after_a_kill_to_the_same_bits_and_without_its_file(exported, make_plan):
    _, _, path = exported
    plan = warm(make_plan, path, milestones=[4, 8])
    whole = load_file(loop.train(plan, plan.state("warm", 8)))
    Path(plan.path(plan.state("warm", 8))).unlink()
    path.unlink()  # the state at 4 has all that is needed
    again = load_file(loop.train(plan, plan.state("warm", 8)))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_warm_start_is_part_of_the_name_by_its_content(exported, make_plan, tmp_path):
    _, _, path = exported
    cold = make_plan(runs={"warm": {"alignment": "REPA", "milestones": [3]}})
    names = [plan.state("warm", 3).trajectory for plan in (cold, warm(make_plan, path))]
    path.rename(tmp_path / "moved.pt")
    names.append(warm(make_plan, tmp_path / "moved.pt").state("warm", 3).trajectory)
    assert names[0] != names[1] == names[2]


def test_one_set_of_weights_begins_both_and_another_projector_begins_anew(exported, make_plan, tmp_path, caplog):
    _, _, path = exported
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(path, weights_only=True)["ema"]
    found["projectors.0.4.bias"] = torch.zeros(7)
    torch.save(found, tmp_path / "bare.pt")
    plan = warm(make_plan, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="2 blocks of width 16 are no published size"):
        open_weights(tmp_path / "bare.pt")  # a bare file says nothing of its heads; the run does
    with caplog.at_level("INFO"):
        loop.train(plan, plan.state("warm", 3))
    assert "the projector of features begins anew" in caplog.text


def test_a_convolution_goes_out_under_irepas_names_and_comes_back_by_a_warm_start(make_plan, monkeypatch, tmp_path):
    conv = {"features": {"teacher": "vit", "depth": 1, "head": "conv", "normalise": "spatial"}}
    common, run = {"alignments": {"conv": conv}}, {"alignment": "conv", "milestones": [3]}
    plan = make_plan(**common, runs={"conv": run})
    state = loop.train(plan, plan.state("conv", 3))
    kept = {name: value for name, value in load_file(state).items() if not name.startswith("optimizer/")}
    weight = kept["projectors/features/projection_layer.weight"]
    for command, out in {"export": "theirs.pt", "import": "ours.safetensors"}.items():
        form = ["--format", "repa"] if command == "export" else []
        assert cli.main([command, str(state), str(tmp_path / out), *form]) == 0
        warmed = make_plan(**common, runs={"warm": {**run, "warm_start": str(tmp_path / out)}})
        with monkeypatch.context() as patched:
            found = begun(warmed, patched, warmed.state("warm", 3))
        assert all(torch.equal(found[name], value) for name, value in kept.items())
    held = torch.load(tmp_path / "theirs.pt", weights_only=False)
    assert torch.equal(held["ema"]["projectors.0.projection_layer.weight"], weight)
    assert held["args"].projector_embed_dims == "16"


def test_a_warm_start_of_another_size_is_refused(exported, make_plan):
    _, _, path = exported
    plan = warm(make_plan, path, model="SiT-S/2", alignment="vanilla")
    with pytest.raises(ValueError, match=r"out\.pt: not the model that was asked for; depth: found 2, expected 12"):
        loop.train(plan, plan.state("warm", 3))


def begun(plan, monkeypatch, state):
    """The tensors that training begins with."""
    found = {}

    def stop(learner, **_):
        found.update({name: value.clone() for name, value in tensors_of(learner).items()})
        raise InterruptedError

    monkeypatch.setattr(loop, "update", stop)
    with pytest.raises(InterruptedError):
        loop.train(plan, state)
    return found


def test_a_warm_start_with_new_classes_takes_all_but_the_table_which_is_the_seeds(
    exported, make_plan, tmp_path, monkeypatch
):
    _, _, path = exported
    with torch.serialization.safe_globals([argparse.Namespace]):
        held = torch.load(path, weights_only=True)
    for which in ("model", "ema"):  # a thousand classes in the place of ten
        held[which][LABELS] = torch.ones(1001, 16)
    torch.save(held, tmp_path / "thousand.pt")
    plan = warm(make_plan, tmp_path / "thousand.pt")
    with pytest.raises(
        ValueError, match=r"thousand\.pt: not the model that was asked for; classes: found 1000, expected 10"
    ):
        plan.check()
    plan = warm(make_plan, {"file": str(tmp_path / "thousand.pt"), "classes": "new"})
    plan.check()
    cold = make_plan(runs={"warm": {"alignment": "REPA", "milestones": [3]}})
    found, fresh = begun(plan, monkeypatch, plan.state("warm", 3)), begun(cold, monkeypatch, cold.state("warm", 3))
    for which in ("model", "ema"):
        assert torch.equal(found[f"{which}/{LABELS}"], fresh[f"{which}/{LABELS}"])
        kept = {name: value for name, value in held[which].items() if name != LABELS and "projector" not in name}
        assert all(torch.equal(found[f"{which}/{name}"], value) for name, value in kept.items())


def test_new_classes_are_part_of_the_name_and_kept_ones_are_written_as_the_file_alone(exported, make_plan):
    _, _, path = exported
    short, kept, new = (
        warm(make_plan, way) for way in (path, {"file": str(path)}, {"file": str(path), "classes": "new"})
    )
    assert short.state("warm", 3) == kept.state("warm", 3) != new.state("warm", 3)
    assert short.report_made == kept.report_made != new.report_made
    assert kept.config.model_dump(mode="json")["runs"]["warm"]["warm_start"] == str(path)
    for plan in (short, new):
        assert resolve(plan.config.model_dump(mode="json")) == plan.config


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"classes": "new"}, "runs.warm.warm_start.file: missing"),
        ({"file": "x.pt", "classes": "other"}, "runs.warm.warm_start.classes: "),
        ({"file": "x.pt", "clases": "new"}, "runs.warm.warm_start.clases: unknown key; did you mean 'classes'?"),
        (7, "runs.warm.warm_start: "),
    ],
)
def test_a_warm_start_that_says_something_else_is_refused_with_its_key(tiny, start, words):
    with pytest.raises(ValueError) as refusal:
        resolve({**tiny, "runs": {"warm": {"milestones": [3], "warm_start": start}}})
    assert words in str(refusal.value)


def test_plans_without_files_from_elsewhere_have_the_names_that_they_had(tiny):
    plan = Plan(resolve(tiny))
    recipe = plan.trajectories[plan.state("vanilla", 8).trajectory].recipe
    assert "warm_start" not in recipe and plan.identities == {}
