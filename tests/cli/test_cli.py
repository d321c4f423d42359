"""What people type: every artefact says how it was made, and bad input ends in one message and exit code 2."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from haste.cli import main as cli
from haste.files import artefact, provenance
from haste.models.build import build_model
from haste.ops import cost
from haste.plan import memory
from haste.plan.plan import Plan
from haste.train import loop


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_every_artefact_says_how_it_was_made(make_plan):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE", "milestones": [8]}})
    loop.train(plan, plan.state("HASTE", 8))
    (row,) = plan.rows
    for command in (["sample", row.evaluation.name], ["evaluate", row.evaluation.name], ["grid", row.evaluation.name]):
        assert run(*command, "-c", plan.file) == 0
    for command in ("floor", "reconstruct"):
        assert run(command, "-c", plan.file) == 0
    assert run("report", "-c", plan.file) == 0
    state = plan.path(plan.state("HASTE", 8))
    files = [
        *(plan.images.folder, plan.images.manifest, plan.images.shard_files[0], plan.latents.manifest),
        *(plan.autoencoder.manifest, plan.teachers["vit"].folder, plan.detector.part.folder),
        *(state, Path(state).parent, row.evaluation.sample_file(0), row.evaluation.features.shard_files[0]),
        *(
            row.evaluation.score,
            row.evaluation.grid,
            plan.floor,
            plan.detector.reconstructed,
            plan.report,
            Path(plan.report).parent,
        ),
        *(Path(plan.report).with_name("results.csv"), next(Path(plan.detector.part.folder).glob("*.safetensors"))),
    ]
    for file in files:
        header = provenance.provenance_of(Path(file))
        made = header.get("provenance", header)
        assert made["code"] == artefact.code_version(), file
        assert made["versions"]["torch"], file
        assert made["hardware"]["host"], file
        assert made["made"], file
        assert run("show", file) == 0


def test_a_state_that_says_nothing_of_itself_is_not_spoken_for_by_its_folder(world, capsys):
    save_file({"a": np.zeros(1)}, world.state)
    assert run("show", world.state) == 2
    assert "does not say how" in capsys.readouterr().err
    log = Path(world.plan.folder) / "logs" / "x.log"
    log.parent.mkdir(parents=True)
    log.touch()
    assert run("show", log) == 2
    assert "expected one of .safetensors" in capsys.readouterr().err


def test_a_grid_names_its_samples_and_a_resolved_configuration_shows_itself(world, capsys):
    grid = provenance.provenance_of(Path(world.row().grid))
    assert (grid["kind"], grid["samples"], grid["provenance"]["key"]) == ("grid", world.row().name, world.row().key)
    drawn = provenance.provenance_of(Path(world.row().sample_file(0)))
    assert grid["provenance"]["inputs"] == drawn["inputs"] and "weights" in drawn["inputs"]
    artefact.write_json(world.plan.config_file, world.plan.config.model_dump(mode="json"))
    assert run("show", world.plan.config_file) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["name"]) == ("configuration", "tiny")
    assert "resolved by the workflow" in shown["how"] and shown["configuration"]["runs"]["HASTE"]["milestones"] == [
        8,
        16,
    ]
    Path(world.row().grid).write_bytes(Path(world.row().grid).read_bytes()[:60])
    assert run("show", world.row().grid) == 2
    assert world.row().grid in capsys.readouterr().err


def test_show_refuses_what_is_not_ours(tmp_path, capsys):
    Image.new("RGB", (3, 3)).save(tmp_path / "g.png")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.h5").write_bytes(b"not hdf5")
    (tmp_path / "d.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "e.npz").write_bytes(b"PK")
    (tmp_path / "f.txt").write_text("x")
    for name in ["a.json", "b.json", "c.h5", "d.safetensors", "e.npz", "f.txt", "g.png", "missing.json", "."]:
        assert run("show", tmp_path / name) == 2, name
        message = capsys.readouterr().err
        assert str(tmp_path / name).rstrip("/.") in message
        assert "Traceback" not in message


def test_the_plans_parameter_count_is_the_models(make_plan):
    plan = make_plan()
    recipe = plan.trajectories[plan.state("vanilla", 8).trajectory].recipe
    model = build_model(recipe)
    assert cost.parameters(recipe) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_plans_disk_is_near_what_states_take(make_plan):
    plan = make_plan()
    state = plan.state("vanilla", 8)
    expected = memory.state_megabytes(plan, plan.segment(state))
    loop.train(plan, state)
    size = Path(plan.path(state)).stat().st_size / 1e6
    assert expected == pytest.approx(size, rel=0.3)  # the header and names weigh something in so small a state


def test_the_plan_says_what_is_left_and_what_is_shared(make_plan, capsys):
    plan = make_plan()
    assert run("plan", "-c", plan.file) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "computed from operation counts" in text
    assert "HASTE and HASTE-12 share" in text
    stages, measured = cost.stages(plan)
    left = {stage.name: (stage.jobs, stage.left) for stage in stages}
    assert left["images"] == (2, 0)
    assert left["train"] == (5, 5)
    assert left["train_plain"] == (3, 3)
    assert left["sample"] == left["score"] == left["grid"] == (7, 7)
    assert left["floor"] == left["report"] == (1, 1)
    assert not measured
    loop.train(plan, plan.state("vanilla", 8))
    stages, _ = cost.stages(Plan(plan.config))  # a plan reads the disk once
    assert {s.name: s.left for s in stages}["train_plain"] == 2


def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_lost(make_plan, capsys):
    plan = make_plan()
    loop.train(plan, plan.state("vanilla", 8))
    folder = Path(plan.path(plan.state("vanilla", 8))).parent
    before = sorted(path.name for path in folder.iterdir())
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        os.chmod(folder, 0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("root without the right to mount: nothing here can be read-only")
    else:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    try:
        assert run("train", plan.state("vanilla", 16), "-c", plan.file) == 2
        message = capsys.readouterr().err
        assert str(folder) in message
        assert "Traceback" not in message
        assert sorted(path.name for path in folder.iterdir()) == before
    finally:
        subprocess.run(["umount", folder], capture_output=True)
        os.chmod(folder, 0o700)


@pytest.fixture
def small_disk(tmp_path):
    """A function from bytes to a folder on a disk of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a small disk")
        return folder

    yield make
    subprocess.run(["umount", folder], capture_output=True)


def test_a_full_disk_stops_a_shard_with_a_message_and_leaves_no_half(make_plan, small_disk, capsys):
    plan = make_plan()
    shutil.rmtree(plan.images.folder)
    disk = small_disk(100_000)
    os.symlink(disk, plan.images.folder)
    assert run("images", "--shard", 0, "-c", plan.file) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message or "errno = 28" in message
    assert "Traceback" not in message
    assert not list(disk.iterdir())


def test_a_full_disk_stops_a_save_with_a_message_and_keeps_the_state_before(make_plan, small_disk, capsys):
    plan = make_plan()
    loop.train(plan, plan.state("vanilla", 8))
    folder = Path(plan.path(plan.state("vanilla", 8))).parent
    size = (folder / "step-00000008.safetensors").stat().st_size
    good = (folder / "step-00000008.safetensors").read_bytes()
    disk = small_disk(int(1.5 * size))
    shutil.copytree(folder, disk, dirs_exist_ok=True)
    shutil.rmtree(folder)
    os.symlink(disk, folder)
    assert run("train", plan.state("vanilla", 16), "-c", plan.file) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert (folder / "step-00000008.safetensors").read_bytes() == good
    assert [path.name for path in folder.rglob("step-*")] == ["step-00000008.safetensors"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nonsense/00000008"],
        ["train", "nonsense"],
        ["sample", "nonsense"],
        ["evaluate", "nonsense"],
        ["grid", "nonsense"],
        ["teacher", "nonsense"],
        ["images", "--shard", "7"],
        ["latents", "--shard", "7"],
        ["table"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_refused_by_name(make_plan, arguments, capsys):
    plan = make_plan()
    assert run(*arguments, "-c", plan.file) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"haste {arguments[0]}: ")
    assert "Traceback" not in message


@pytest.mark.parametrize("command", ["latents", "targets", "reference"])
def test_what_runs_a_network_over_all_images_runs_it_on_the_device_that_is_asked_for(
    make_plan, tiny, command, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = make_plan(teachers={"vit": {**tiny["teachers"]["vit"], "cache": "features"}}, runtime={"device": "cuda"})
    shutil.rmtree(plan.reference.folder)
    which = {"latents": ["--shard", 0], "targets": ["vit", "--shard", 0], "reference": []}[command]
    assert run(command, *which, "-c", plan.file) == 2
    assert "runtime.device is cuda: process 0 of this machine needs a GPU" in capsys.readouterr().err


def test_a_configuration_that_is_refused_ends_in_exit_code_2_without_a_traceback(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps({"nmae": "x"}))
    command = [sys.executable, "-m", "haste.cli", "plan", "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nmae: unknown key; did you mean 'name'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_subcommand_explains_itself_with_an_example_that_can_be_typed(capsys):
    parser = cli.parser()
    (commands,) = (action.choices for action in parser._actions if hasattr(action, "choices") and action.choices)
    assert len(commands) >= 14
    for name in commands:
        with pytest.raises(SystemExit) as done:
            run(name, "--help")
        assert done.value.code == 0
        *rest, example = capsys.readouterr().out.splitlines()
        assert len(rest) > 3 and rest[-1] == "example:"
        asked = parser.parse_args(shlex.split(example)[1:])
        assert asked.command == name
        file = getattr(asked, "config", None)
        assert all(Path(one).exists() for one in ([file] if isinstance(file, str) else file or []) if "mine" not in one)


def test_output_that_nobody_reads_on_is_no_fault():
    readings = Path("haste/report/published/gradient_cosine_haste.csv").resolve()
    command = f"set -o pipefail; {sys.executable} -m haste.cli replay --readings {readings} --model SiT-XL/2 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_score_and_a_page_are_made_although_a_tracker_cannot_write(world, command, caplog):
    world.configure(runtime={**world.raw["runtime"], "trackers": ["tensorboard"]})
    (world.root / "tiny").mkdir(exist_ok=True)
    (world.root / "tiny" / "tensorboard").write_text("in the way")
    draw = [world.row().name] if command == "evaluate" else []
    assert run(command, *draw, "-c", world.file) == 0
    assert "`haste track` writes what is missing" in caplog.text
