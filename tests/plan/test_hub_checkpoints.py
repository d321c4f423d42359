"""Checkpoints by an id of the hub: rows and warm starts that are named by content, of the commit first seen."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub import serving
from huggingface_hub import constants

from haste import config
from haste.cli import main as cli
from haste.config import resolve
from haste.files import artefact
from haste.files.provenance import provenance_of
from haste.measure import jobs
from haste.models.exchange import open_weights
from haste.networks import hub
from haste.networks.headers import MissingError
from haste.networks.hub_files import local
from haste.networks.spec import sit_shapes
from haste.plan.plan import Plan
from haste.sampling import drawing

IT, FIRST, SECOND = "hub:own/sit/a.pt", "1" * 40, "2" * 40
ROW = {"model": "dot", "sampling": ["quick"], "step": 8, "method": "HASTE"}


@pytest.fixture
def server(monkeypatch, tmp_path, world):
    """A hub with the world's exported weights, and a configuration with a row of them."""
    hub._silence.cache_clear()
    with serving(monkeypatch, str(tmp_path / "cache")) as found:
        found.put("own/sit", "a.pt", (world.folder / "theirs.pt").read_bytes(), FIRST)
        world.local = planned(world, evaluate={"it": {**ROW, "checkpoint": str(world.folder / "theirs.pt")}})
        yield found
    hub._silence.cache_clear()


def planned(world, ahead=False, **changes):
    world.raw = {**world.raw, "runs": {}, **changes}
    world.file.write_text(yaml.safe_dump(world.raw))
    return Plan(resolve(world.raw), ahead=ahead)


def by_id(world, place=IT, ahead=False):
    return planned(world, ahead, evaluate={"it": {**ROW, "checkpoint": place}})


def trained_on(world):
    """The world's exported weights, some of them changed since."""
    found = torch.load(world.folder / "theirs.pt", weights_only=False)
    for weights in (found["model"], found["ema"]):
        weights["final_layer.linear.bias"] = weights["final_layer.linear.bias"] + 1
    torch.save(found, later := io.BytesIO())
    return later.getvalue()


def names(plan):
    return [row.evaluation.name for row in plan.rows]


def test_a_row_by_id_is_refused_before_the_first_job_fetched_by_the_command_and_then_named_by_its_content(
    world, server, capsys
):
    with pytest.raises(MissingError) as refused:
        by_id(world)
    for words in ("evaluate.it.checkpoint: hub:own/sit/a.pt", "`haste fetch -c", "models--own--sit", "bring a.pt"):
        assert words in str(refused.value)
    assert server.asked == [], "a plan asks nobody"
    assert cli.main(["plan", "-c", str(world.file)]) == 2  # the whole plan, and then what is missing
    said = capsys.readouterr()
    assert "evaluate.it.checkpoint: not there yet" in " ".join(said.out.split())
    assert "score" in said.out and "evaluate.it.checkpoint: hub:own/sit/a.pt" in said.err
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    assert f"checkpoint {IT}: " in capsys.readouterr().out
    plan = by_id(world)
    assert names(plan) == names(world.local), "the same content is the same row, wherever it lies"
    (row,) = plan.rows
    for command in ("sample", "evaluate"):
        assert cli.main([command, row.evaluation.name, "-c", str(world.file)]) == 0
    state = artefact.read_json(row.evaluation.score, "score")["state"]
    assert state["file"] == f"{IT}@{FIRST}" and state["sha256"] == plan.identities[IT]
    drawn = provenance_of(Path(row.evaluation.sample_file(0)))["checkpoint"]
    assert drawn == {"step": 8, "file": state["file"], "sha256": state["sha256"]}
    with np.load(row.evaluation.sample_file(0)) as drawn, np.load(world.row().sample_file(0)) as trained_here:
        assert (drawn["arr_0"] == trained_here["arr_0"]).all()


def test_a_row_stays_that_of_the_commit_first_seen_and_a_pinned_revision_wins(world, server):
    hub_row = by_id(world, ahead=True)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    first = names(by_id(world))
    assert names(hub_row) != first  # what it is was not known
    server.put("own/sit", "a.pt", trained_on(world), SECOND)
    by_id(world, f"{IT}@{SECOND}", ahead=True)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    second = names(by_id(world, f"{IT}@{SECOND}"))
    Path(constants.HF_HUB_CACHE, "models--own--sit", "refs", "main").write_text(SECOND)  # as another program would
    moved = by_id(world)
    assert names(moved) == first != second == names(by_id(world, f"{IT}@{SECOND}"))
    assert any(SECOND in note and FIRST[:12] in note for note in moved.notes)
    assert names(by_id(world, f"{IT}@{FIRST}")) == first


def test_a_command_given_a_rows_id_takes_the_commit_of_the_row_and_one_given_another_commit_does_not(world, server):
    row = {"evaluate": {"it": {**ROW, "checkpoint": IT}}, "measures": {"cos": {"measure": "denoising", "images": 8}}}
    planned(world, ahead=True, **row)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    of_row = {row.run: row.evaluation.state for row in planned(world, **row).rows}["it"]
    server.put("own/sit", "a.pt", trained_on(world), SECOND)
    local(f"{IT}@{SECOND}")
    Path(constants.HF_HUB_CACHE, "models--own--sit", "refs", "main").write_text(SECOND)  # as another program would
    made, drawn = config.resolve(world.raw), {}
    for given, commit in ((IT, FIRST), (f"{IT}@{FIRST}", FIRST), (f"{IT}@{SECOND}", SECOND)):
        plan, asked, _ = jobs.asked(made, "cos", given, model="dot")
        assert f"snapshots/{commit}/" in plan.path(asked.state)
        assert (asked.state == of_row) == (commit == FIRST) and (asked.run == "it") == (commit == FIRST)
        drawn[given] = drawing.painter_of_file(given, config=made, model="dot").inputs["weights"]
    assert drawn[IT] == drawn[f"{IT}@{FIRST}"] != drawn[f"{IT}@{SECOND}"]


def test_a_cache_that_was_emptied_changes_no_name_and_what_is_left_to_draw_is_refused_with_its_key(
    world, server, capsys
):
    by_id(world, ahead=True)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    before = names(by_id(world))
    shutil.rmtree(constants.HF_HUB_CACHE)
    server.put("own/sit", "a.pt", b"another", SECOND)
    after = by_id(world)
    assert names(after) == before and any("`haste fetch` loads it again" in note for note in after.notes)
    with pytest.raises(MissingError, match=f"evaluate.it.checkpoint: {IT}@{FIRST}: is not in this machine's cache"):
        after.check()
    assert cli.main(["fetch", "-c", str(world.file)]) == 2  # never another commit than the one that names the row
    assert f"has no revision {FIRST}" in capsys.readouterr().err


def test_a_damaged_copy_is_refused_by_the_plan_with_what_was_found(world, server):
    by_id(world, ahead=True)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    blob = next(Path(constants.HF_HUB_CACHE).rglob("blobs/*"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{IT}@{FIRST}: damaged: .* Remove \S+ and fetch it again"):
        by_id(world)


def test_in_a_cache_without_links_a_copy_that_changed_is_refused_once_it_was_seen(world, server):
    by_id(world, ahead=True)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    link = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*/a.pt"))
    content = link.read_bytes()
    link.unlink()
    link.write_bytes(content)
    assert names(by_id(world)) == names(world.local)
    link.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{IT}@{FIRST}: damaged: holds .* when it was first seen. Remove {link}"):
        by_id(world)


def test_a_warm_start_by_id_is_the_trajectory_of_the_same_file(world, server):
    def warm(place, ahead=False):
        run = {"alignment": "HASTE", "milestones": [3], "warm_start": str(place)}
        return planned(world, ahead, evaluate={}, runs={"warm": run})

    expected = warm(world.folder / "theirs.pt").state("warm", 3)
    with pytest.raises(MissingError, match=rf"runs.warm.warm_start.file: {IT}: is not in"):
        warm(IT)
    warm(IT, ahead=True)
    assert cli.main(["fetch", "-c", str(world.file)]) == 0
    plan = warm(IT)
    assert plan.state("warm", 3) == expected
    plan.check()
    assert cli.main(["train", str(expected), "-c", str(world.file)]) == 0
    assert provenance_of(Path(plan.path(expected)))["recipe"]["warm_start"] == plan.identities[IT]


def test_commands_and_python_take_an_id_where_they_take_a_file(world, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", IT, "ours.safetensors", "--heads", "2"]) == 0
    source = provenance_of(Path("ours.safetensors"))["source"]
    assert source == {"file": f"{IT}@{FIRST}", "sha256": open_weights(IT, heads=2).sha256, "layout": "REPA"}
    server.put("own/ours", "w.safetensors", Path("ours.safetensors").read_bytes())
    capsys.readouterr()
    assert cli.main(["show", "hub:own/ours/w.safetensors"]) == 0
    assert f"{IT}@{FIRST}" in capsys.readouterr().out
    assert cli.main(["export", IT, "theirs.safetensors", "--heads", "2", "--format", "safetensors"]) == 0
    assert provenance_of(Path("theirs.safetensors"))["source"]["file"] == f"{IT}@{FIRST}"
    vae = ["--decoder", str(world.autoencoder), "--sampling", "ode-50", "--device", "cpu"]
    assert cli.main(["draw", "hub:own/ours/w.safetensors", "--class", "3", "--count", "1", *vae]) == 0
    config_of_row = {"evaluate": {"it": {**ROW, "checkpoint": IT}}, "runs": {}}
    planned(world, **config_of_row, measures={"cos": {"measure": "denoising", "images": 8, "t": [0.5]}})
    assert cli.main(["measure", "cos", IT, "-c", str(world.file), "--json", "m.json"]) == 0
    assert artefact.read_json("m.json", "measure")["state"]["file"] == f"{IT}@{FIRST}"


def test_of_a_checkpoint_from_elsewhere_show_says_what_it_is_by_its_header(world, server, tmp_path, capsys):
    shapes = sit_shapes({**config.MODELS["SiT-XL/2"].model_dump(), "channels": 4, "input_size": 32}, 1000)
    out = [name for name in shapes if name.startswith("final_layer.linear")]
    shapes |= {name: (2 * shapes[name][0], *shapes[name][1:]) for name in out}  # with a variance
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "w.pt")
    server.put("own/sit", "SiT-XL-2-256.pt", (tmp_path / "w.pt").read_bytes(), FIRST)
    capsys.readouterr()
    assert cli.main(["show", "hub:own/sit/SiT-XL-2-256.pt"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == f"hub:own/sit/SiT-XL-2-256.pt@{FIRST}" and found["layout"] == "SiT"
    assert found["model"]["depth"] == 28 and found["model"]["input_size"] == 32 and found["weights"] == ["ema"]


def test_an_id_that_is_none_is_refused_with_its_key(tiny):
    tiny["evaluate"] = {"it": {**ROW, "checkpoint": "hub:a.pt"}}
    with pytest.raises(ValueError, match=r"evaluate\.it\.checkpoint: .*hub:OWNER/NAME/PATH"):
        config.resolve(tiny)
