"""Pruning frees what nobody needs, and only that; a dry run first, and nothing that somebody holds."""

import copy
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haste import config
from haste.cli import main as cli
from haste.files import artefact, provenance
from haste.ops import prune
from haste.plan.plan import Plan

TINY = yaml.safe_load(Path(__file__).parents[1].joinpath("tiny.yaml").read_text())
DEEPER = {"vit": {"trained": {**TINY["teachers"]["vit"]["trained"], "depth": 3}, "cache": "features+attention"}}
CHANGES = {
    "all": {},
    "stopped": {"runs": {"a": {"alignment": "HASTE", "stop": 12}, "b": {"alignment": "HASTE", "stop": 6}}},
    "watched": {"runs": {"a": {"alignment": "HASTE", "stop": {"trigger": "plateau", "after": 6}}}},
    "longer": {"runs": {"HASTE": {"alignment": "HASTE", "milestones": [16, 24]}}},
    "cached": {"teachers": DEEPER, "runs": {"HASTE": {"alignment": "HASTE"}}},
    "less": {"teachers": DEEPER, "runs": {"REPA": {"alignment": "REPA"}}},
    "judged": {"detector": {"cnn": {"trained": {"steps": 3, "batch": 8, "width": 8}}}, "runs": {"vanilla": {}}},
    "twice": {
        "detector": {**TINY["detector"], "other": {"trained": {"steps": 4, "batch": 8, "width": 8}}},
        "runs": {"vanilla": {"milestones": [8]}},
    },
    "other": {"images": {**TINY["images"], "holdout": 98}, "runs": {"vanilla": {"milestones": [8]}}},
    "measured": {
        "measures": {"cos": {"measure": "gradient-cosine", "images": 4, "shards": 2, "alignment": "HASTE"}},
        "runs": {"HASTE": {"alignment": "HASTE", "measures": ["cos"]}, "vanilla": {"measures": ["cos"]}},
    },
    "latent": {"autoencoder": {**TINY["autoencoder"], "dtype": "float16"}, "runs": {"vanilla": {"seed": 1}}},
}


def configuration(root, name):
    return config.resolve({**copy.deepcopy(TINY), **CHANGES[name], "name": name, "results": str(root)})


def plan_in(root, name):
    return Plan(configuration(root, name))


def files_of(plan):
    """Every file that the workflow makes for a configuration, report apart."""
    detectors = plan.detectors.values()
    stores = [plan.images, plan.latents, *(one.reference for one in detectors), *plan.targets.values()]
    stores += [one.features for evaluation in plan.evaluations.values() for one in evaluation.judgements]
    found = [path for store in stores for path in (*store.shard_files, store.manifest)]
    parts = [plan.autoencoder, *(one.part for one in detectors), *plan.teachers.values()]
    found += [part.manifest for part in parts if part]
    found += [plan.path(state) for state in plan.planned()] + plan.shown + plan.measure_files
    found += [path for evaluation in plan.evaluations.values() for path in evaluation.sample_files]
    return sorted({Path(path) for path in found})


def finish(plan):
    """Put a file wherever the workflow would."""
    for path in files_of(plan):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    for trajectory in plan.cuts:
        write_state_log(plan, trajectory)
    for made in plan.targets.values():
        header = {"schema": artefact.SCHEMA, "kind": "store", "key": made.key, "recipe": made.recipe, "shards": [0]}
        artefact.write_json(made.manifest, header)


def write_state_log(plan, trajectory):
    folder = Path(plan.root, "states", trajectory)
    if folder.is_dir():
        artefact.write_json(folder / "trajectory.json", {"kind": "trajectory"})
        (folder / "log.jsonl").write_text("".join(f'{{"step": {s}, "seconds": 2.0}}\n' for s in range(1, 25)))


def record(plan):
    artefact.write_json(plan.config_file, plan.config.model_dump(mode="json"))


def state(plan, trajectory, step, rolling=False):
    folder = Path(plan.root, "states", trajectory, *(["rolling"] if rolling else []))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    path.write_text("state")
    return path


def run_prune(root, *names, yes=True):
    prune.prune([configuration(root, name) for name in names], yes)


def contents(root):
    return {path for path in root.rglob("*") if path.is_file() and path.name not in (".lock", "lock")}


def wanted(plan):
    """What a configuration would still do: files that are missing, and where training would start from."""
    plan = Plan(plan.config)
    missing = [path for path in files_of(plan) if not path.exists()]
    starts = [plan.segment(s) for s in plan.planned() if s.step not in plan.on_disk(s.trajectory)]
    return missing, [(segment.state, segment.parent) for segment in starts]


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_is_kept_wants_no_more_than_before(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("prune") / "results"
    names = data.draw(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1), label="made")
    kept = data.draw(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1), label="kept")
    for name in sorted(names):
        finish(plan_in(root, name))
    trajectories = sorted({t for name in names for t in plan_in(root, name).trajectories})
    extra = st.tuples(st.sampled_from(trajectories), st.integers(1, 24), st.booleans())
    for trajectory, step, rolling in data.draw(st.lists(extra, max_size=6), label="more states"):
        state(plan_in(root, next(iter(names))), trajectory, step, rolling)
    everything, states = (sorted(root.glob(pattern)) for pattern in ("**/*", "states/*/step-*"))
    lost = st.lists(st.sampled_from(everything), max_size=3), st.lists(st.sampled_from(states), max_size=6)
    for path in {path for some in lost for path in data.draw(some, label="lost")}:
        if path.is_file():
            path.unlink()
    plans = [plan_in(root, name) for name in sorted(kept)]
    before = [wanted(plan) for plan in plans]
    run_prune(root, *sorted(kept))
    assert [wanted(plan) for plan in plans] == before
    # and what is left is somebody's
    needed = {path for plan in plans for path in files_of(Plan(plan.config))}
    starts = {
        Path(p.path(parent)) for p, (_, found) in zip(plans, before, strict=True) for _, parent in found if parent
    }
    for path in root.glob("states/*/step-*"):
        assert path in needed | starts
    for pattern in ("stores/*", "parts/*", "samples/*", "features/*/*", "scores/*"):
        for path in root.glob(pattern):
            assert path in needed or any(path in other.parents for other in needed), path


def test_intermediate_and_left_over_states_go_and_those_on_the_way_stay(tmp_path):
    root = tmp_path / "results"
    plan = plan_in(root, "longer")
    finish(plan)
    (name,) = {s.trajectory for s in plan.planned()}
    Path(plan.path(plan.state("HASTE", 24))).unlink()
    between = {step: state(plan, name, step) for step in (10, 18, 20)}
    rolling = {step: state(plan, name, step, rolling=True) for step in (12, 19, 22, 23)}
    run_prune(root, "longer")
    # 24 is still to be made: it starts from 20, the nearest, and rolling states after that are its own
    assert {step for step, path in between.items() if path.exists()} == {20}
    assert {step for step, path in rolling.items() if path.exists()} == {22, 23}


def test_a_dry_run_says_what_how_much_and_what_it_took_and_removes_nothing(tmp_path, capsys):
    root = tmp_path / "results"
    finish(plan_in(root, "all"))
    plan = plan_in(root, "stopped")
    before = contents(root)
    bench = root / "all" / "benchmarks" / f"detector-{plan.detector.part.key}.tsv"
    bench.parent.mkdir(parents=True)
    bench.write_text("s\th:m:s\n75.0\t0:01:15\n")
    run_prune(root, "judged", yes=False)
    said = capsys.readouterr().out
    assert contents(root) == before | {bench}
    assert "a dry run, nothing was removed" in said
    row = next(line for line in said.splitlines() if f" parts/detector-{plan.detector.part.key} " in line)
    assert "1 min 15 s" in row and f"{Path(plan.detector.part.manifest).stat().st_size} B" in row
    trunk = plan.state("a", 8).trajectory
    assert "48 s" in next(line for line in said.splitlines() if f" states/{trunk} " in line)
    run_prune(root, "judged")
    assert not Path(plan.detector.part.folder).exists() and not Path(root, "states", trunk).exists()


def test_where_no_job_was_timed_an_artefact_says_itself_what_it_took_and_the_sum_is_said(world, capsys):
    world.configure(runs={"HASTE": {"alignment": "vanilla", "seed": 5}})
    prune.prune([world.plan.config], yes=False)
    said = capsys.readouterr().out
    drawn = next(world.root.glob("samples/*/shard-*.npz"))
    assert provenance.provenance_of(drawn)["seconds"] > 0
    for line in said.splitlines():
        if " samples/" in line or " scores/" in line:
            assert "not known" not in line and re.search(r"\d s", line)
        if " features/" in line:
            assert "not known" in line
    assert re.search(r"To make them again would take \d+ s and an unknown time for \d+ of \d+ items\.", said)


def test_what_another_configuration_of_the_folder_needs_stays(tmp_path):
    root = tmp_path / "results"
    for name in ("all", "latent"):
        finish(plan_in(root, name))
    record(plan_in(root, "latent"))
    run_prune(root, "judged")
    assert wanted(plan_in(root, "latent")) == ([], [])
    assert wanted(plan_in(root, "all"))[0]


def test_a_state_that_another_configuration_evaluates_or_begins_from_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path("results")
    mine = plan_in(root, "all")
    finish(mine)
    kept = mine.path(mine.state("HASTE", 16))
    raw = {**copy.deepcopy(TINY), "name": "other", "results": str(root)}
    row = {"checkpoint": str(Path(kept).absolute()), "model": "dot", "sampling": ["quick"], "step": 16}
    uses = [{"runs": {}, "evaluate": {"a": row}}, {"runs": {"a": {"milestones": [8], "warm_start": kept}}}]
    for use in uses:
        needs = prune.Needs.of([Plan(config.resolve({**raw, **use}))])
        gone = {item.path for item in prune.unneeded(root, needs)}
        assert Path(kept) not in gone and Path(kept).parent not in gone
        assert Path(mine.path(mine.state("vanilla", 16))).parent in gone


def test_a_recorded_configuration_is_replaced_by_the_one_given_under_its_name(tmp_path):
    root = tmp_path / "results"
    old = plan_in(root, "all")
    finish(old)
    record(old)
    new = config.resolve({**copy.deepcopy(TINY), "name": "all", "results": str(root), "runs": {"vanilla": {}}})
    prune.prune([new], yes=True)
    assert wanted(Plan(new)) == ([], [])
    assert not Path(old.path(old.state("REPA", 8))).exists()


def test_a_results_folder_that_was_moved_is_still_understood(tmp_path):
    root = tmp_path / "results"
    plan = plan_in(root, "latent")
    finish(plan)
    record(plan)
    root.rename(tmp_path / "elsewhere")
    run_prune(tmp_path / "elsewhere", "judged")
    assert wanted(plan_in(tmp_path / "elsewhere", "latent")) == ([], [])


def test_a_recorded_configuration_that_cannot_be_read_refuses_everything(tmp_path, capsys):
    root = tmp_path / "results"
    plan = plan_in(root, "all")
    finish(plan)
    record(plan)
    Path(plan.config_file).write_text('{"name": ')
    before = contents(root)
    with pytest.raises(ValueError, match=r"all/config\.json: cannot be read, so its needs are unknown"):
        run_prune(root, "judged")
    assert contents(root) == before


def test_what_is_not_ours_stays(tmp_path):
    root = tmp_path / "results"
    finish(plan_in(root, "all"))
    files = ["notes.txt", "stores/mine/x", "parts/my-network/x", "samples/picked/x.npz", "scores/notes.json"]
    files += ["states/mine/step-00000001.safetensors", "elsewhere/x", "features/x"]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    linked = tmp_path / "other disk"
    linked.mkdir()
    (linked / "manifest.json").write_text("{}")
    os.symlink(linked, root / "stores" / "latents-0123456789ab")
    run_prune(root, "judged")
    assert all((root / name).read_text() == "mine" for name in files)
    assert (root / "stores" / "latents-0123456789ab" / "manifest.json").exists()


def test_a_text_encoder_that_nobody_needs_goes(tmp_path):
    root = tmp_path / "results"
    finish(plan_in(root, "judged"))
    part = root / "parts" / "text_encoder-0123456789ab" / "part.json"
    part.parent.mkdir()
    part.write_text("{}")
    run_prune(root, "judged")
    assert not part.parent.exists()


def test_where_nothing_is_forgotten_nothing_is_said_to_be_made_again(tmp_path, capsys):
    prune.forget(plan_in(tmp_path / "results", "stopped").config, "a", yes=True)
    assert "still a row" not in capsys.readouterr().out


def test_forgetting_a_run_takes_what_it_alone_needs(tmp_path, capsys):
    root = tmp_path / "results"
    plan = plan_in(root, "stopped")
    finish(plan)
    trunk = plan.state("a", 12).trajectory
    passing = state(plan, trunk, 10)
    prune.forget(plan.config, "a", yes=True)
    assert "a is still a row of stopped" in capsys.readouterr().out
    gone = {Path(plan.path(plan.state("a", step))) for step in (12, 16)}
    assert not any(path.exists() for path in gone)
    rest = config.resolve(
        {**copy.deepcopy(TINY), **CHANGES["stopped"], "runs": {"b": CHANGES["stopped"]["runs"]["b"]}, "name": "stopped"}
        | {"results": str(root)}
    )
    assert wanted(Plan(rest)) == ([], [])
    assert passing.exists()  # of the shared trunk: no run's own
    assert {row.run for row in plan.rows if Path(row.evaluation.score).exists()} == {"b"}
    left = [p.name for p in (root / "states").iterdir()]
    assert sorted(left) == sorted({plan.state("b", step).trajectory for step in (6, 16)})


def test_a_run_that_left_the_table_is_found_in_what_last_worked(tmp_path):
    root = tmp_path / "results"
    old = plan_in(root, "all")
    finish(old)
    record(old)
    new = config.resolve({**copy.deepcopy(TINY), "name": "all", "results": str(root), "runs": {"vanilla": {}}})
    prune.forget(new, "REPA", yes=True)
    assert not Path(old.path(old.state("REPA", 8))).exists()
    assert Path(old.path(old.state("HASTE", 8))).exists()
    with pytest.raises(ValueError, match=r"run 'REPAA': not in this configuration, which has HASTE, HASTE-12, REPA"):
        prune.forget(new, "REPAA", yes=True)


def with_rows(root, checkpoint, **changes):
    """A trained row, and two that evaluate one checkpoint, of which one is also sampled in a way of its own."""
    row = {"checkpoint": str(checkpoint), "model": "dot", "sampling": ["quick"], "step": 8}
    return config.resolve(
        {**copy.deepcopy(TINY), "name": "rows", "results": str(root), "runs": {"vanilla": {"milestones": [8]}}}
        | {"sampling": {**TINY["sampling"], "more": {**TINY["sampling"]["quick"], "count": 24}}}
        | {"evaluate": {"theirs": {**row, "sampling": ["quick", "more"]}, "again": row}}
        | changes
    )


@pytest.mark.parametrize("place", ["outside", "in the results folder"])
def test_forgetting_a_row_without_training_takes_its_samples_and_scores_and_never_its_checkpoint(
    tmp_path, place, capsys
):
    root = tmp_path / "results"
    trained = plan_in(root, "all")
    checkpoint = tmp_path / "theirs.pt"
    if place == "in the results folder":  # a state of a configuration that nobody gives
        checkpoint = Path(trained.path(trained.state("REPA", 8)))
        checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("weights")
    given = with_rows(root, checkpoint)
    finish(Plan(given))
    checkpoint.write_text("weights")
    before, rows = contents(root), Plan(given).rows
    (own,) = (row.evaluation for row in rows if row.evaluation.sampling_name == "more")
    prune.forget(given, "theirs", yes=False)
    assert contents(root) == before and own.name in capsys.readouterr().out
    prune.forget(given, "theirs", yes=True)
    gone = {path.relative_to(root).parts[0] for path in before - contents(root)}
    assert gone == {"samples", "features", "scores"}
    assert all(own.name in str(path) for path in before - contents(root))  # the rest is the other row's too
    assert checkpoint.read_text() == "weights"
    assert "theirs is still a row of rows" in capsys.readouterr().out
    alone = with_rows(root, checkpoint, evaluate={"again": given.evaluate["again"].model_dump()})
    assert wanted(Plan(alone)) == ([], [])
    prune.forget(alone, "again", yes=True)
    assert not list(root.glob("samples/*elsewhere*")) and checkpoint.exists()
    assert wanted(Plan(with_rows(root, checkpoint, evaluate={}))) == ([], [])


def test_a_row_without_training_whose_checkpoint_is_gone_can_be_forgotten(tmp_path):
    root, checkpoint = tmp_path / "results", tmp_path / "theirs.pt"
    checkpoint.write_text("weights")
    given = with_rows(root, checkpoint, runs={})
    finish(Plan(given))
    checkpoint.unlink()
    prune.forget(given, "theirs", yes=True)
    alone = with_rows(root, checkpoint, runs={}, evaluate={"again": given.evaluate["again"].model_dump()})
    assert wanted(Plan(alone))[0] == []
    prune.forget(alone, "again", yes=True)
    assert not list(root.glob("samples/*")) and not list(root.glob("scores/*elsewhere*"))


WAIT = "\n    print(1, flush=True)\n    time.sleep(60)"
HOLD = f"import sys, time\nfrom haste.files import locks\nwith locks.holding(sys.argv[1], 'x'):{WAIT}"
OPEN = f"import sys, time\nwith open(sys.argv[1]):{WAIT}"


@pytest.fixture
def doing():
    """A function from code and a path to a process that does it with the path."""
    running = []

    def start(code, path):
        running.append(subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "1\n"

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_while_a_workflow_is_at_work_nothing_is_removed(tmp_path, doing):
    root = tmp_path / "results"
    finish(plan_in(root, "all"))
    before = contents(root)
    doing(HOLD, root / ".lock")
    with pytest.raises(ValueError, match="is in use"):
        run_prune(root, "judged")
    assert contents(root) == before
    run_prune(root, "judged", yes=False)


def test_a_trajectory_in_training_and_a_store_that_is_read_are_left_alone(tmp_path, doing, capsys):
    root = tmp_path / "results"
    plan = plan_in(root, "longer")
    finish(plan)
    finish(plan_in(root, "latent"))
    passing = state(plan, plan.state("HASTE", 24).trajectory, 18)
    doing(HOLD, passing.parent / "lock")
    store = Path(plan_in(root, "latent").latents.folder)
    doing(OPEN, store / "shard-00000-of-00002.h5")
    run_prune(root, "longer")
    assert passing.exists() and (store / "manifest.json").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "is in use" in said and "has shard-00000-of-00002.h5 open" in said
    assert not Path(plan_in(root, "latent").path(plan_in(root, "latent").state("vanilla", 8))).exists()


def test_training_of_a_configuration_that_nobody_knows_here_refuses_everything(tmp_path, doing):
    root = tmp_path / "results"
    plan = plan_in(root, "latent")
    finish(plan)
    before = contents(root)
    doing(HOLD, Path(plan.path(plan.state("vanilla", 8))).parent / "lock")
    for yes in (False, True):
        with pytest.raises(ValueError, match="of no configuration given or recorded here, but being trained"):
            run_prune(root, "judged", yes=yes)
    assert contents(root) == before


@pytest.mark.parametrize("dies_at", [0, 15, *range(32, 56, 2)])
def test_a_removal_that_is_killed_leaves_nothing_half_that_looks_whole(tmp_path, monkeypatch, dies_at):
    root = tmp_path / "results"
    plan = plan_in(root, "latent")
    finish(plan)
    count = itertools.count()

    def dying(name):
        real = getattr(os, name)

        def call(*arguments, **more):
            if next(count) == dies_at:
                raise KeyboardInterrupt
            return real(*arguments, **more)

        return call

    for name in ("unlink", "replace", "rmdir"):
        monkeypatch.setattr(os, name, dying(name))
    monkeypatch.setattr(os, "getpid", lambda: 2**30)  # no such process is alive later
    with pytest.raises(KeyboardInterrupt):
        run_prune(root, "other")
    monkeypatch.undo()
    for store in (plan.images, plan.latents, plan.reference, *(e.features for e in plan.evaluations.values())):
        if Path(store.manifest).exists():
            assert all(Path(path).exists() for path in store.shard_files)
    run_prune(root, "other")
    for room in ("stores", "parts", "samples", "features", "scores"):
        artefact.tidy(root / room)  # as the workflow does when it starts
    assert contents(root) == set()


def test_the_commands_refuse_with_words_and_remove_with_yes(make_plan, capsys):
    plan = make_plan()
    path = state(plan, "SiT-d2w16p2-vanilla-s0-0123456789ab", 3)
    artefact.write_json(path.parent / "trajectory.json", {"kind": "trajectory"})
    assert cli.main(["prune", "-c", str(plan.file)]) == 0
    assert "1 items" in capsys.readouterr().out and path.exists()
    assert cli.main(["prune", "-c", str(plan.file), "--yes"]) == 0
    assert not path.parent.exists()
    assert cli.main(["prune", "-c", str(plan.file)]) == 0
    assert "there is nothing that is not needed by tiny" in capsys.readouterr().out
    assert cli.main(["forget", "nobody", "-c", str(plan.file)]) == 2
    assert "run 'nobody': not in this configuration" in capsys.readouterr().err
    assert cli.main(["forget", "vanilla", "-c", str(plan.file)]) == 0
    assert Path(plan.latents.manifest).exists()


def test_hundreds_of_runs_are_weighed_in_seconds(tmp_path):
    root = tmp_path / "results"
    runs = {f"run {seed}": {"seed": seed, "milestones": list(range(8, 88, 8))} for seed in range(40)}
    one = config.resolve({**copy.deepcopy(TINY), "name": "many", "results": str(root), "runs": runs})
    plan = Plan(one)
    for evaluation in plan.evaluations.values():
        Path(evaluation.folder).mkdir(parents=True)
    started = time.process_time()
    assert prune.unneeded(root, prune.Needs.of([Plan(one)])) == []
    assert time.process_time() - started < 5
    shutil.rmtree(root)
