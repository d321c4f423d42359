"""From a plan's finished files to a report: what is there is shown, what is missing is named."""

import base64
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from haste import config
from haste.files import artefact, journal
from haste.plan.plan import Plan
from haste.report import compare, embed, figures, gather, page, papers, pictures, systems, tables
from haste.report.content import NONE, Benchmark, Grid, Real
from haste.sampling import grids
from haste.sampling.grids import GAP

ROOT = Path(__file__).parents[2]
RAMP = "features over 4 steps, attention over 4 steps, cosine"


def plan_of(tiny, folder, **changes):
    return Plan(config.resolve({**tiny, "results": str(folder), **changes}))


def imagenet(folder):
    """The configuration of the papers' tables; the reference lies elsewhere, and its content does not matter here."""
    raw = config.read(ROOT / "config" / "imagenet256.yaml")
    (folder / "reference.npz").write_bytes(b"")
    raw["detector"]["inception"]["reference"] = str(folder / "reference.npz")
    return Plan(config.resolve({**raw, "results": str(folder)}))


def write_scores(plan, skip=(), **detector):
    """Hand-made scores of every row but some (run, seed, step)."""
    for place, row in enumerate(plan.rows):
        if (row.run, row.seed, row.step) in skip:
            continue
        path = Path(row.evaluation.score)
        path.parent.mkdir(parents=True, exist_ok=True)
        score = {
            "schema": 1,
            "kind": "score",
            "state": {"trajectory": row.evaluation.state.trajectory, "step": row.step},
            "sampling": row.evaluation.sampling.model_dump(mode="json"),
            "detector": {"name": "called otherwise", "identity": "d", **detector},
            "samples": 20,
            "nfe": row.evaluation.sampling.steps,
            "reference": {"images": 1700, "identity": "r"},
            "scores": {"fd": 50.0 + place},
            "provenance": {"made": "by hand"},
        }
        path.write_text(json.dumps(score))


ROWS = {"vanilla": {"seeds": [0, 1, 2]}, "HASTE-12": {"alignment": "HASTE", "stop": 12, "seed": 1}}


def test_every_seed_is_gathered_and_a_line_is_their_mean(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path, runs=ROWS)
    write_scores(plan)
    found = gather.report(plan)
    assert [(r.run, r.seed, r.step) for r in found.rows] == [(r.run, r.seed, r.step) for r in plan.rows]
    assert found.seeds == {"vanilla": [0, 1, 2], "HASTE-12": [1]}
    assert not any("Not scored" in note for note in found.notes)
    (table,) = tables.main_tables(found)
    # Rows are counted seed by seed, two steps each: vanilla at step 8 has 50, 52 and 54.
    cell = table.column("FD (cnn)")[0]
    assert (cell.value, cell.spread) == (52.0, 2.0)
    assert {row.score["detector"]["name"] for row in found.rows} == {"cnn"}  # as this configuration calls it


def test_a_score_that_another_configuration_made_is_told_in_this_ones_words(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path)
    write_scores(plan)
    for row in plan.rows:
        made = json.loads(Path(row.evaluation.score).read_text())
        made["sampling"] |= {"name": "theirs", "preset": "sde-250", "decoder": "their words"}
        Path(row.evaluation.score).write_text(json.dumps({**made, "state": {**made["state"], "step": 999}}))
    found = gather.report(plan)
    for shown, row in zip(found.rows, plan.rows, strict=True):
        sampling = shown.score["sampling"]
        assert (sampling["name"], sampling["preset"]) == (row.evaluation.sampling_name, None)
        assert shown.score["state"]["step"] == row.step
    assert set(tables.results(found)["decoder"]) == {"trained here"}


def test_every_row_names_its_decoder(tmp_path):
    plan = imagenet(tmp_path)
    write_scores(plan, kind="inception")
    found = gather.report(plan)
    assert set(tables.results(found)["decoder"]) == {"stabilityai/sd-vae-ft-ema"}
    assert all("decoder stabilityai/sd-vae-ft-ema" in " ".join(table.notes) for table in tables.main_tables(found))


def test_what_is_not_scored_yet_is_named_and_the_rest_is_shown(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path, runs=ROWS)
    write_scores(plan, skip=[("vanilla", 2, 16), ("HASTE-12", 1, 16)])
    found = gather.report(plan)
    assert found.notes == ["Not scored yet: vanilla (seed 2) at step 16; HASTE-12 at step 16."]
    (table,) = tables.main_tables(found)
    assert [entry.cells[0].text for entry in table.entries] == ["vanilla", "HASTE-12", "vanilla"]
    assert table.column("seeds")[-1].text == "2 of 3: 2 missing"
    assert "Not scored yet" in page.text(found)
    page.write(found, tmp_path / "page")


def test_scores_that_are_older_than_the_state_of_their_name_are_said(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path, runs=ROWS)
    write_scores(plan)
    for row in plan.rows:
        score, state = Path(row.evaluation.score), Path(plan.path(row.evaluation.state))
        made = {"made": f"2026-11-{20 if row.run == 'vanilla' else 28}T10:00:00+00:00"}
        score.write_text(json.dumps({**json.loads(score.read_text()), "provenance": made}))
        header = {"schema": 1, "kind": "state", "provenance": {"made": "2026-11-24T10:00:00+00:00"}}
        if (row.seed, row.step) != (2, 8):  # a state that is gone says nothing
            state.parent.mkdir(parents=True, exist_ok=True)
            save_file({"x": np.zeros(1)}, state, metadata={"haste": json.dumps(header)})
    (note,) = gather.report(plan).notes
    names = [r.evaluation.name for r in plan.rows if r.run == "vanilla" and (r.seed, r.step) != (2, 8)]
    assert note.startswith("Older than the states that are there now: vanilla (seed 0) at step 8 (")
    assert [name for name in (r.evaluation.name for r in plan.rows) if name in note] == names
    assert len(names) == 5 and f"{tmp_path}/samples/NAME*" in note


def test_nothing_scored_is_refused_with_what_to_do_and_the_first_file(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path)
    with pytest.raises(ValueError, match="none of its [0-9]+ scores exists yet.* `haste status`") as refusal:
        gather.report(plan)
    assert str(refusal.value).endswith(plan.rows[0].evaluation.score)


def test_a_broken_score_is_refused_by_name(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path)
    write_scores(plan)
    broken = Path(plan.rows[1].evaluation.score)
    broken.write_text(broken.read_text()[:40])
    with pytest.raises(ValueError, match=broken.name):
        gather.report(plan)


def test_a_seeds_curve_is_of_its_own_trajectories(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path, runs=ROWS)
    write_scores(plan)
    for (run, seed), pieces in plan.pieces.items():
        for piece in pieces:
            log = Path(plan.root, "states", piece.trajectory, "log.jsonl")
            log.parent.mkdir(parents=True, exist_ok=True)
            steps = [step for step in range(1, 17) if piece.holds(step)]
            lines = [{"step": step, "denoising": seed + len(run) / 100} for step in steps]
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for curve in gather.report(plan).curves:
        assert [record["step"] for record in curve.records] == list(range(1, 17))
        assert {record["loss"] for record in curve.records} == {curve.seed + len(curve.run) / 100}


def test_a_line_whose_steps_were_all_skipped_has_no_loss_and_is_no_error(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path)
    write_scores(plan)
    log = Path(plan.root, "states", plan.pieces["vanilla", 0][0].trajectory, "log.jsonl")
    log.parent.mkdir(parents=True)
    with journal.Journal(log, 0, 4, batch=8, may_skip=True) as lines:  # as fp16 begins
        for step, norm in ((1, math.inf), (2, math.inf), (3, 1.0), (4, 1.0)):
            lines.add({"denoising": 2.0, "grad_norm": norm})
            if not step % 2:
                lines.write(step, memory_mb=1.0)
    found = gather.report(plan)
    curve = next(curve for curve in found.curves if curve.run == "vanilla")
    assert figures.series(curve, "loss")[0].tolist() == [4.0]
    assert figures.loss_panels(found)


def test_what_an_ablation_may_vary_is_told_in_words(tiny, tmp_path):
    runs = {
        "plain": {"training": {"timesteps": {"distribution": "lognormal", "mu": 0, "s": 1}}},
        "HASTE": {"alignment": "HASTE", "stop": 12, "ramp": 4},
    }
    plan = plan_of(tiny, tmp_path, runs=runs)
    plain, haste = (gather.settings(plan, run) for run in runs)
    assert (plain["timesteps"], plain["batch"], plain["lr"]) == ("lognormal(0, 1)", "8", "0.001")
    assert "teacher" not in plain
    expected = {"teacher": "vit", "layers": "depth 1; 0, 1 to 1, 0", "feature weight": "0.5", "ramp": RAMP}
    assert expected.items() <= haste.items()
    assert haste["timesteps"] == "uniform"
    assert "stop" not in haste  # an axis of its own
    term = {
        "teacher": "soft",
        "depth": 1,
        "head": "conv",
        "kernel": 3,
        "normalise": "spatial",
        "t_max": 0.9,
        "layer": 0,
    }
    soft = {**tiny["teachers"]["vit"], "filter": {"low_pass": 0.25}}
    runs, alignments = {"iREPA": {"alignment": "iREPA"}}, {"iREPA": {"features": term}}
    iREPA = gather.settings(plan_of(tiny, tmp_path, runs=runs, alignments=alignments, teachers={"soft": soft}), "iREPA")
    expected = {"teacher": "soft, low_pass 0.25", "feature head": "conv, 3", "feature normalise": "spatial, 1"}
    assert {**expected, "feature t_max": "0.9", "feature layer": "0"}.items() <= iREPA.items()


@pytest.mark.parametrize(("classes", "resolution"), [(1000, 256), (1000, 512), (10, 256)])
def test_a_folder_of_a_thousand_classes_is_taken_for_imagenet(tiny, tmp_path, classes, resolution):
    images = {"source": "folder", "path": "x", "classes": classes, "resolution": resolution, "holdout": 3}
    expected = Benchmark("ImageNet", resolution) if classes == 1000 else None
    assert gather.benchmark(plan_of(tiny, tmp_path, images=images)) == expected


@pytest.mark.parametrize(("change", "images"), [({}, 82_783), ({"subset": 20_000}, 20_000), ({"holdout": 5_000}, None)])
def test_coco_2014_is_known_by_the_number_of_its_pictures_to_validate(change, images):
    raw = config.read(ROOT / "config" / "coco256.yaml")
    plan = Plan(config.resolve({**raw, "images": {**raw["images"], **change}}))
    assert gather.benchmark(plan) == (images and Benchmark("COCO", 256, images))


def test_the_configuration_for_imagenet_stands_beside_every_result_of_the_papers_main_tables_up_to_850k(tmp_path):
    plan = imagenet(tmp_path)
    write_scores(plan, kind="inception")
    plain, guided = tables.published_tables(gather.report(plan))
    found = {tuple(cell.text for cell in entry.cells) for entry in plain.entries if entry.kind}
    names = [head.name for head in plain.heads]
    shown = {tuple(line[names.index(n)] for n in ("model", "method", "step", "FID")) for line in found}
    with open(papers.FOLDER / "imagenet256_no_cfg.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if int(line["iteration"]) <= 850_000]
    expected = {(line["model"], line["method"], f"{int(line['iteration']):,}", line["fid"]) for line in lines}
    expected |= {("SiT-B/2", "HASTE", "50,000", "71.32")}  # of the ablation of training times, which they are drawn by
    assert len(expected) > 20
    assert shown == expected
    assert [cell.text for e in guided.entries if e.kind for cell in e.cells][:1] == ["HASTE Table 4"]
    assert sum(bool(entry.kind) for entry in guided.entries) == 3


@pytest.mark.parametrize("name", ["coco256", "coco256-20k"])
def test_the_configurations_for_coco_stand_beside_every_model_of_the_papers_tables_by_pytorch_fid_alone(tmp_path, name):
    plan = Plan(config.resolve({**config.read(ROOT / "config" / f"{name}.yaml"), "results": str(tmp_path)}))
    write_scores(plan, kind="pytorch-fid")
    found = gather.report(plan)
    (table,) = tables.published_tables(found)
    names = ["method", "stop", "step", "w", "sampler", "FID (pytorch-fid, fid)"]
    columns = [table.column(head) for head in names if head in [one.name for one in table.heads]]
    shown = {tuple(column[i].text for column in columns) for i, entry in enumerate(table.entries) if entry.kind}
    with open(papers.FOLDER / "coco256.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["train_images"] == str(found.benchmark.images)]
    of = {"ODE": "euler", "SDE": "euler-maruyama", "": NONE}
    expected = {
        (
            line["method"],
            NONE
            if line["method"] == "vanilla"
            else f"{int(line['termination']):,}"
            if line["termination"]
            else "never",
            f"{int(line['iteration']):,}",
            f"{float(line['cfg_scale']):g}" if line["cfg_scale"] else NONE,
            of[line["sampler"]],
            line["fid"],
        )
        for line in lines
    }
    if name == "coco256-20k":  # all drawn in one way, and nothing stops
        expected = {(method, stop, step, w, fid) for method, stop, step, w, _, fid in expected}
    assert shown == expected and len(shown) == {"coco256": 10, "coco256-20k": 4}[name]
    assert "pytorch-fid" in page.render(found)
    write_scores(plan, kind="inception")  # ADM's FID of the same samples
    assert not tables.published_tables(gather.report(plan)) and not systems.system_tables(gather.report(plan))


def test_the_systems_of_cocos_table_stand_below_our_last_steps_and_never_beside_a_part_of_its_images(tmp_path):
    for name, expected in (("coco256", 1), ("coco256-20k", 0)):
        root = tmp_path / name
        plan = Plan(config.resolve({**config.read(ROOT / "config" / f"{name}.yaml"), "results": str(root)}))
        write_scores(plan, kind="pytorch-fid")
        found = systems.system_tables(gather.report(plan))
        assert len(found) == expected
        for table in found:
            texts = {entry.cells[0].text: [cell.text for cell in entry.cells[1:]] for entry in table.entries}
            assert texts["AttnGAN"] == [NONE, NONE, "35.49", NONE, "REPA Table 12"]
            assert texts["MM-DiT + REPA, ODE 50"] == ["464", "2.0", "4.73", NONE, "REPA Table 12"]
            assert texts["HASTE"][:2] == ["773", "3.5"]  # epochs of 82,783 images


def test_the_configuration_for_imagenet_trains_on_all_of_it_and_shares_what_it_can(tmp_path):
    plan = imagenet(tmp_path)
    assert plan.config.images.holdout == 0
    assert plan.pieces["XL HASTE", 0] == plan.pieces["XL HASTE guided", 0]
    stops = {"B HASTE": 100_000, "L HASTE": 250_000, "XL HASTE": 250_000}  # HASTE, Table 5
    assert {run: plan.config.runs[run].stop.features for run in stops} == stops


def test_the_digits_have_no_published_numbers(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path)
    write_scores(plan)
    assert tables.published_tables(gather.report(plan)) == []


def painted(tiny, folder, classes, labels):
    """The grid of so many samples with these labels, and its entry in the report."""
    runs = {"vanilla": {"milestones": [8]}}
    plan = plan_of(tiny, folder, images={**tiny["images"], "classes": classes}, runs=runs)
    evaluation = plan.rows[0].evaluation
    Path(evaluation.folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    header = artefact.canonical({"schema": 1, "kind": "samples", "inputs": {}})
    np.savez(evaluation.sample_file(0), arr_0=pixels, arr_1=np.array(labels), haste=np.array(header))
    grids.paint_grid(plan, evaluation)
    (grid,) = pictures.grids(plan)
    return Image.open(evaluation.grid), grid


@pytest.mark.parametrize(
    ("classes", "labels", "columns", "rows"),
    [
        *((0, [0] * count, *size) for count, size in {1: (1, 1), 3: (3, 1), 10: (10, 1), 11: (6, 2)}.items()),
        *((0, [0] * count, *size) for count, size in {40: (10, 4), 500: (10, 4)}.items()),
        (1, [0, 0, 0], 1, 3),
        (10, [3], 1, 1),
        (10, [3, 1, 3], 2, 2),
        (10, list(range(10)), 10, 1),
        (10, [*range(10)] * 4, 10, 4),
        (1000, list(range(960, 1000)), 10, 1),
    ],
)
def test_a_grid_is_no_larger_than_what_it_shows(tiny, tmp_path, classes, labels, columns, rows):
    image, grid = painted(tiny, tmp_path, classes, labels)
    cell = 8 * grids.SCALE + GAP
    assert image.size == (columns * cell, rows * cell)
    filled = np.asarray(image)[..., 3].reshape(rows, cell, columns, cell).any(axis=(1, 3))
    assert filled.any(axis=0).all() and filled.any(axis=1).all()
    named = sorted(set(labels))[:10] if classes else []
    assert filled.sum() == (sum(min(4, labels.count(label)) for label in named) or min(40, len(labels)))
    assert grid.columns == columns
    assert grid.labels == list(map(str, named))
    assert embed.grid_of(grid, embed.Shared(None, 2))["most"] == columns * embed.CELL


def test_columns_of_grids_are_called_as_the_manifest_calls_the_classes(tiny, tmp_path):
    runs = {"vanilla": {"milestones": [8]}}
    plan = plan_of(tiny, tmp_path, images={**tiny["images"], "classes": 10}, runs=runs)
    names = ["a cat", "b", "c", "a dog", *"effhij"]
    artefact.write_json(plan.images.manifest, {"schema": 1, "kind": "store", "classes": names, "count": 3})
    _, grid = painted(tiny, tmp_path, 10, [3, 0, 3])
    assert grid.labels == ["a cat", "a dog"]
    chosen = pictures.named(plan, {"sampling": {"labels": [3, 9]}, "samples": 4})
    assert chosen == {"sampling": {"labels": ["a dog", "j"]}, "samples": 4}
    assert compare.protocol_text(chosen) == "no guidance, a dog, j labels, 4 samples"
    twice = pictures.named(plan, {"sampling": {"labels": [4, 5, 6]}})
    assert twice["sampling"]["labels"] == ["e", "f (5)", "f (6)"]


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ({}, "'pictures' is nothing"),
        ({"pictures": {"classes": 3, "png": ""}}, "'classes' is 3"),
        ({"pictures": {"classes": []}}, "'png' is nothing"),
        ({"pictures": {"classes": [], "png": "no base64"}}, "no PNG"),
        ({"pictures": {"classes": [], "png": "AAAA"}}, "no PNG"),
    ],
)
def test_damaged_pictures_of_decoded_latents_are_refused_by_their_file(tiny, tmp_path, damaged, said):
    with pytest.raises(ValueError, match=f"reconstructed-k.json: damaged or edited: .*{said}"):
        pictures.real(plan_of(tiny, tmp_path), {"reconstructed-k.json": damaged})


def test_below_a_grid_are_the_real_pictures_of_its_own_columns():
    colours = np.arange(40, 240, 20, dtype=np.uint8)  # of ten classes; reconstructions are 5 levels darker
    whole = np.stack([colours, colours - 5]).repeat(16, 0).repeat(16, 1)[..., None].repeat(3, 2)
    content = io.BytesIO()
    Image.fromarray(whole).save(content, "PNG")
    names = [f"class {place}" for place in range(10)]
    shared = embed.Shared(Real(content.getvalue(), names), 2)

    def levels(labels, columns):
        found = shared.below(Grid("run", 8, Path(), labels), columns)
        strip = Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2])))
        pixels = np.asarray(strip)[8::16, 8::16]
        return [[int(p[0]) if p[3] else None for p in row] for row in pixels]

    assert levels(["class 3", "class 1", "unknown"], 3) == [[100, 60, None], [95, 55, None]]
    assert shared.below(Grid("run", 8, Path(), ["unknown"]), 1) is None
    assert shared.below(Grid("run", 8, Path(), []), 4) is None  # pictures of classes belong to no unlabelled column
    shared = embed.Shared(Real(content.getvalue(), []), 2)
    assert levels([], 4) == [[40, 60, 80, 100], [35, 55, 75, 95]]


def test_enlarged_pictures_are_said_where_they_were_counted(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path)
    made = {"schema": 1, "kind": "store", "classes": [], "count": 1906, "resolution": 256}
    artefact.write_json(plan.images.manifest, made)
    assert pictures.enlarged(plan) == []
    artefact.write_json(plan.images.manifest, {**made, "enlarged": {"count": 312, "median": 113}})
    (said,) = pictures.enlarged(plan)
    assert said.startswith(
        "312 of 1,906 pictures of digits were enlarged: median 113 px along the shorter side, made 256"
    )
    artefact.write_json(plan.images.manifest, {**made, "enlarged": {"count": 0, "median": None}})
    assert pictures.enlarged(plan) == []


def test_a_score_that_is_no_finite_number_is_named_with_its_file_and_not_shown(tiny, tmp_path):
    plan = plan_of(tiny, tmp_path, runs=ROWS)
    write_scores(plan)
    file = Path(plan.rows[0].evaluation.score)
    file.write_text(file.read_text().replace('"fd": 50.0', '"fd": NaN'))
    with pytest.raises(ValueError, match=f"{file}: fd is nan, expected a finite number; remove the file"):
        gather.report(plan)
