"""The papers' tables as configurations: each is accepted, and has the row of every published result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from haste import config
from haste.config import teacher_tokens
from haste.models.build import build_model
from haste.plan.plan import Plan
from haste.report import cosines, overhead, papers, systems
from haste.report.content import NONE, Row
from haste.report.gather import benchmark, row_of

FOLDER = Path(__file__).parent.parent / "config"
TABLES = sorted(path for kind in ("imagenet*", "coco*", "ablations/*") for path in FOLDER.glob(f"{kind}.yaml"))
EPOCH = 5000  # steps on ImageNet, in the papers' counting
# Systems of SiT and DiT in the papers' last tables that have no row, and why.
NO_ROW = {
    (512, "DiT-XL/2", "600"): "the source states neither its guidance nor its steps",
    (512, "SiT-XL/2", "600"): "the source states neither its guidance nor its steps",
    (256, "SiT + HASTE", "80"): "the size is not stated; its FID is that of SiT-XL/2 + HASTE at 400,000 steps",
    (256, "SiT + TREAD", "80"): "another method",
    (256, "DiT + TREAD", "740"): "another method",
}


def rows(plan: Plan) -> list[Row]:
    """The rows of its table as a report would have them."""
    ways = [(row, row.evaluation.sampling) for row in plan.rows]
    return [row_of(plan, row, {"sampling": way.model_dump(mode="json"), "nfe": way.steps}) for row, way in ways]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Plan]:
    folder = str(tmp_path_factory.mktemp("papers"))  # nothing that their user brings is there
    return {path: Plan(config.resolve({**config.read(path), "results": folder}), ahead=True) for path in TABLES}


def acts(text: str, step: int) -> str:
    """Where a stop has acted before a step; a trigger's is known when it has fired."""
    if " by " in text:
        return text.rpartition(" ")[2]
    return text if text not in (NONE, "never") and int(text) < step else ""


def fitting(one: papers.Published, measured: list[tuple[Row, Any]]) -> list[Row]:
    """The rows beside which a published result stands, with its stop."""
    mine = [
        pair for pair in measured if (pair[0].model, pair[0].method, pair[0].step) == (one.model, one.method, one.step)
    ]
    beside = [
        (row, [*papers.along(row, data, one.step), *(o for axis in one.axes for o in papers.beside(row, data, axis))])
        for row, data in mine
    ]
    return [
        row
        for row, found in beside
        if one in found and (one.stop == NONE or acts(one.stop, one.step) == acts(row.stop, one.step))
    ]


def test_every_published_result_has_its_row_in_a_configuration(tables):
    measured = [(row, benchmark(plan)) for plan in tables.values() for row in rows(plan)]
    assert [one for one in papers.published() if not fitting(one, measured)] == []


def test_what_the_authors_published_of_files_that_they_gave_away_stands_beside_rows_that_need_no_training(tables):
    (plan,) = (plan for path, plan in tables.items() if path.name == "imagenet256-system.yaml")
    away = [(row, benchmark(plan)) for row in rows(plan) if row.run in plan.config.evaluate]
    beside = [one for one in papers.published() if fitting(one, away)]
    theirs = {("SiT-XL/2", "vanilla", 7_000_000), ("SiT-XL/2", "REPA", 4_000_000), ("DiT-XL/2", "vanilla", 7_000_000)}
    expected = [one for one in papers.published() if (one.model, one.method, one.step) in theirs]
    assert beside == expected and len(expected) >= 15
    named = {spec.checkpoint for spec in plan.config.evaluate.values()}
    assert "hub:nyu-visionx/SiT-collections/SiT-XL-2-256.pt" in named
    assert named == plan.data.missing.keys() & named, "planned with none of the files there"


def test_every_published_system_of_these_models_has_its_row_or_a_reason_to_have_none(tables):
    planned = {
        (data.data, data.resolution, row.score["sampling"]["guidance"] > 1, row.model, row.method, row.step)
        for plan in tables.values()
        if (data := benchmark(plan))
        for row in rows(plan)
    }
    without = set()
    for kind in systems.FILES:
        for one in systems.published(*kind):
            model, _, method = one.name.partition(" + ")
            if model.split("-")[0] not in ("SiT", "DiT"):  # those of MM-DiT are all published results with their steps
                continue
            step = round(float(one.epochs)) * EPOCH if one.epochs else 0
            near = [key for key in planned if key[:5] == (*kind, model, method or "vanilla")]
            if not any(abs(key[5] - step) <= EPOCH for key in near):
                without.add((kind[1], one.name, one.epochs))
    assert without == set(NO_ROW)


OWN_FILE = 4_000_000  # REPA's cosines at this step are of the authors' own checkpoint


def test_every_published_cosine_and_cost_is_measured_of_a_row_of_its_model_step_block_and_t(tables):
    (plan,) = (plan for path, plan in tables.items() if path.name == "measures.yaml")
    measured, costs = set(), set()
    for one in plan.measured:
        run, terms, settings = plan.config.runs[one.run], one.measurement.terms, one.measurement.recipe["settings"]
        if plan.config.measures[one.measurement.label].measure == "gradient-cosine":
            method = "HASTE" if "attention" in terms else "REPA"
            measured |= {(run.model, method, terms["features"]["depth"], one.step, t) for t in settings["t"]}
        elif plan.config.measures[one.measurement.label].measure == "cost":
            costs |= {(run.model, method, settings["batch"]) for method in ("REPA", "HASTE") if len(terms) == 2}
    lines = [(method, line) for method, file in cosines.FILES.items() for line in papers.lines_of(file)]
    steps = [(method, line) for method, line in lines if line["t"] != "mean" and int(line["iteration"]) < OWN_FILE]
    found = [(x["model"], way, int(x["block"]), int(x["iteration"]), float(x["t"])) for way, x in steps]
    assert [one for one in found if one not in measured] == [] and len(found) > 70
    assert costs == {(x["model"], x["method"], int(x["local_batch"])) for x in papers.lines_of(overhead.MEMORY)}


MILLIONS = {"SiT-B": 130, "SiT-L": 458, "SiT-XL": 675, "MM-DiT": 505}  # parameters without the projector, as published


def test_the_networks_of_all_tables_have_the_published_sizes_and_a_token_for_each_of_the_teacher_s(tables):
    built = {}
    for plan in tables.values():
        for row in plan.rows:
            name = (plan.config.evaluate.get(row.run) or plan.config.runs[row.run]).model
            if (name, plan.config.images.resolution) in built:
                continue
            with torch.device("meta"):  # shapes without memory
                model = build_model(plan.trajectories[row.evaluation.state.trajectory].recipe)
            built[name, plan.config.images.resolution] = model
            grid = model.taps["tokens.1"].grid
            assert grid[0] * grid[1] == teacher_tokens(plan.config, "dinov2-b")[1]
    for (name, _), model in built.items():
        size = sum(one.numel() for one in model.parameters()) / 1e6
        assert size == pytest.approx(
            MILLIONS[name.split("/")[0].replace("DiT-", "SiT-") if "/" in name else name], abs=1
        )
    assert {*built} >= {("SiT-XL/2", 512), ("DiT-L/2", 256), ("SiT-B/2", 256)}
