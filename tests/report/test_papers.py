"""The tables of the papers, from hand-made scores of ImageNet; published numbers beside measured ones."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from haste.report import compare, cosines, figures, finding, overhead, page, papers, systems, tables
from haste.report.content import NONE, Benchmark, Measured, Report, Row

INCEPTION = {"name": "inception", "kind": "inception", "identity": "i"}
OTHER = {"name": "dinov2", "kind": "DINOv2-L", "identity": "d"}
BASE = {"batch": "256", "lr": "0.0001"}
B, XL = "depth 5; 2, 3, 4 to 7, 9, 11", "depth 8; 4, 5, 6, 7 to 8, 9, 10, 11"


def aligned(layers: str, weight: str = "0.5", teacher: str = "DINOv2-B") -> dict[str, str]:
    return {**BASE, "layers": layers, "feature weight": weight, "teacher": teacher}


def row(
    run: str, model: str, method: str, stop: str, step: int, fid: float, settings: dict | None = None, **how
) -> Row:
    sampling = {"sampler": "euler-maruyama", "steps": 250, "guidance": how.get("w", 1.0), "labels": "random"}
    sampling["interval"] = how.get("interval", [0, 1])
    score = {
        "state": {"trajectory": run, "step": step},
        "sampling": sampling,
        "detector": how.get("detector", INCEPTION),
        "samples": how.get("samples", 50_000),
        "reference": {"images": 1_271_167},
        "scores": {"fd": fid, "sfid": 5.0, "is": 100.0, "precision": 0.7, "recall": 0.6, "kid": 0.01},
    }
    return Row(run, model, method, stop, 0, step, score, BASE if settings is None else settings)


ROWS = [
    row("b", "SiT-B/2", "vanilla", NONE, 400_000, 33.4),
    row("b REPA", "SiT-B/2", "REPA", "never", 100_000, 50.1, aligned("depth 4")),
    row("b REPA", "SiT-B/2", "REPA", "never", 400_000, 24.7, aligned("depth 4")),
    row("b HASTE", "SiT-B/2", "HASTE", "100000", 100_000, 40.2, aligned(B)),
    row("b HASTE", "SiT-B/2", "HASTE", "100000", 400_000, 19.8, aligned(B)),
    row("xl", "SiT-XL/2", "vanilla", NONE, 400_000, 17.4),
    row("xl REPA", "SiT-XL/2", "REPA", "never", 400_000, 8.0, aligned("depth 8")),
    row("xl 250K", "SiT-XL/2", "HASTE", "250000", 400_000, 7.4, aligned(XL)),
    row("xl 290K", "SiT-XL/2", "HASTE", "290000", 400_000, 7.6, aligned(XL)),
    row("xl 1.25", "SiT-XL/2", "HASTE", "250000", 500_000, 2.2, aligned(XL), w=1.25),
    row("xl 1.5", "SiT-XL/2", "HASTE", "250000", 500_000, 1.8, aligned(XL), w=1.5, interval=[0, 0.7]),
]


def report(rows: list[Row] = ROWS, resolution: int = 256, **more) -> Report:
    benchmark = more.pop("benchmark", Benchmark("ImageNet", resolution))
    return Report("imagenet", "ImageNet", "", rows, [], [], [], [], [], {}, "", benchmark=benchmark, **more)


def texts(table, *names: str) -> list[tuple[str, ...]]:
    """The lines of a table under some headings; the first is `published` or nothing."""
    columns = [table.column(name) for name in names]
    return [(entry.kind, *(column[i].text for column in columns)) for i, entry in enumerate(table.entries)]


def test_the_main_table_of_the_papers_comes_out_by_model_and_iteration():
    table = tables.published_tables(report())[0]
    assert [head.name for head in table.heads] == [
        *("run", "model", "method", "stop", "step"),
        *("FID", "sFID", "IS", "precision", "recall", "samples"),
    ]
    found = texts(table, "run", "step", "FID")
    assert ("", "b", "400,000", "33.40") in found
    # As printed in the files of published numbers, each after what was measured.
    for measured, source, step, fid in (
        ("b", "REPA Table 8", "400,000", "33.0"),
        ("b REPA", "REPA Table 8", "100,000", "49.5"),
        ("b HASTE", "HASTE Table 3", "400,000", "19.6"),
        ("xl", "REPA Table 3", "400,000", "17.2"),
    ):
        place = found.index(("published", source, step, fid))
        assert found[place - 1][1:3] == (measured, step)


def test_the_guided_table_has_interval_and_scale_and_no_unguided_number():
    plain, guided = tables.published_tables(report())
    assert texts(guided, "run", "w", "interval", "FID") == [
        ("", "xl 1.25", "1.25", "[0, 1]", "2.20"),
        ("published", "HASTE Table 4", "1.25", "[0, 1]", "2.18"),
        ("", "xl 1.5", "1.5", "[0, 0.7]", "1.80"),
        ("published", "HASTE Table 4", "1.5", "[0, 0.7]", "1.80"),
    ]
    assert guided.column("stop")[1].text == NONE  # the paper's table does not say
    assert not {cell.text for cell in plain.column("FID")} & {"2.18", "1.80", "2.20"}


def test_published_numbers_are_never_bold_and_link_to_nothing_and_nor_is_what_stands_beside_them():
    for table in tables.published_tables(report()):
        for entry in table.entries:
            assert not any(cell.bold for cell in entry.cells)
            assert entry.kind != "published" or not any(cell.link for cell in entry.cells)
            assert entry.kind == "published" or any(cell.link for cell in entry.cells)
    assert "no results of this code" in " ".join(tables.published_tables(report())[0].notes)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "SiT-S/2"},
        {"method": "ATTA"},
        {"step": 123_456},
        {"settings": {**aligned("depth 4"), "batch": "128"}},
        {"settings": aligned("depth 4", teacher="MAE-L")},
        {"settings": {**aligned("depth 4"), "feature head": "conv, 3"}},
        {"settings": {**aligned("depth 4"), "feature t_max": "0.5"}},
        {"settings": {**aligned("depth 4"), "ramp": "20000, cosine"}},
        {"settings": {**aligned("depth 4"), "flip": "yes"}},
        {"settings": aligned("depth 4", teacher="DINOv2-B, low_pass 0.25")},
        {"score": {**ROWS[2].score, "detector": OTHER}},
        {"score": row("x", "SiT-B/2", "REPA", "never", 1, 2.0, w=9.0).score},
    ],
    ids=[
        "model",
        "method",
        "step",
        "batch",
        "teacher",
        "head",
        "band",
        "ramp",
        "flip",
        "filter",
        "detector",
        "guidance",
    ],
)
def test_what_does_not_agree_stands_beside_nothing(change: dict):
    assert tables.published_tables(report([ROWS[2]]))
    assert tables.published_tables(report([dataclasses.replace(ROWS[2], **change)])) == []


def test_a_sampler_that_is_not_the_papers_is_named_beside_their_numbers():
    dit, sit = row("dit", "DiT-XL/2", "vanilla", NONE, 400_000, 19.5), ROWS[0]
    dit.score["sampling"] |= {"sampler": "ddpm"}
    heun = dataclasses.replace(sit, run="quick", score={**sit.score, "sampling": {**sit.score["sampling"]}})
    heun.score["sampling"] |= {"sampler": "heun", "steps": 50}
    assert "The papers draw" not in " ".join(tables.published_tables(report([dit, sit]))[0].notes)
    assert "Drawn here: quick with Heun, 50 steps." in tables.published_tables(report([dit, sit, heun]))[0].notes[-1]


@pytest.mark.parametrize("benchmark", [None, Benchmark("ImageNet", 512), Benchmark("ImageNet", 64)])
def test_other_images_have_no_published_numbers(benchmark):
    unguided = report(ROWS[:-2], benchmark=benchmark)
    assert tables.published_tables(unguided) == []
    assert "published" not in page.render(unguided).split("</style>")[1].split("<script>")[0]


def test_images_of_512_px_have_their_own_numbers():
    rows = [row("a", "SiT-XL/2", "HASTE", "300000", 400_000, 2.5, aligned(XL), w=1.25)]
    (table,) = tables.published_tables(report(rows, 512))
    assert texts(table, "run", "FID")[1] == ("published", "HASTE review reply Q8", "2.49")


def test_another_number_of_samples_is_said():
    built = report([row("a", "SiT-B/2", "vanilla", NONE, 400_000, 40.0, samples=10_000)])
    (table,) = tables.published_tables(built)
    assert [cell.text for cell in table.column("samples")] == ["10,000", "50,000"]
    assert "Measured here on 10,000 samples" in " ".join(table.notes)


def test_scores_of_another_detector_have_no_column_beside_published_ones():
    both = [ROWS[0], dataclasses.replace(ROWS[0], score={**ROWS[0].score, "detector": OTHER})]
    (table,) = tables.published_tables(report(both))
    assert not any("dinov2" in head.name for head in table.heads)
    names = [head.name for head in tables.main_tables(report(both))[0].heads]
    assert [n for n in names if "inception" in n or "dinov2" in n] == [
        *("sFID (inception)", "KID (inception)", "IS (inception)", "precision (inception)", "recall (inception)"),
        *("FD (dinov2)", "sFID (dinov2)", "KID (dinov2)", "IS (dinov2)", "precision (dinov2)", "recall (dinov2)"),
    ]
    assert len(names) == len(set(names))


def ablation(name: str, rows: list[Row]):
    return next(table for table in tables.ablations(report(rows)) if table.name == f"ablation-{name}")


def test_ablation_of_the_termination_step():
    table = ablation("stop", ROWS)
    assert texts(table, "stop", "run", "FID") == [
        ("", NONE, "xl", "17.40"),
        ("", "250,000", "xl 250K", "7.40"),
        ("", "290,000", "xl 290K", "7.60"),
        ("published", "never", "HASTE camera-ready Table 4", "5.5"),
        ("published", "250,000", "HASTE camera-ready Table 4", "7.3"),
    ]
    assert [cell.bold for cell in table.column("FID")] == [False, True, False, False, False]


def test_a_published_stop_by_a_trigger_says_so():
    rows = [
        row(stop, "SiT-B/2", "HASTE", stop, 100_000, fid, aligned(B))
        for stop, fid in (("80000 by gradient-angle", 39.0), ("never", 40.0))
    ]
    assert texts(ablation("stop", rows), "stop", "FID")[2:] == [
        ("published", "never", "39.86"),
        ("published", "80,000 by gradient-angle", "38.69"),
    ]


def test_runs_that_still_share_their_trunk_are_no_ablation_of_its_end():
    trunk = {**ROWS[7].score, "state": {"trajectory": "trunk", "step": 400_000}}
    rows = [dataclasses.replace(r, score=trunk) for r in ROWS[7:9]]
    assert tables.ablations(report(rows)) == []


def test_ablation_of_the_weight_beside_the_papers():
    rows = [row(f"w{w}", "SiT-XL/2", "REPA", "never", 400_000, fid, aligned("depth 8", w)) for w, fid in
            (("1", 7.9), ("0.25", 8.7), ("0.5", 8.0))]  # fmt: skip
    table = ablation("feature-weight", [*rows, ROWS[5]])
    assert texts(table, "feature weight", "run", "FID") == [
        ("", NONE, "xl", "17.40"),
        ("", "0.25", "w0.25", "8.70"),
        ("", "0.5", "w0.5", "8.00"),
        ("", "1", "w1", "7.90"),
        ("published", "0.25", "REPA Table 5", "8.6"),
        ("published", "0.5", "REPA Table 5", "7.9"),
        ("published", "1", "REPA Table 5", "7.8"),
    ]


def test_ablation_of_layers_and_of_teachers_beside_the_papers():
    deep = "depth 7; 4, 5, 6 to 7, 9, 11"
    rows = [
        row("usual", "SiT-B/2", "HASTE", "never", 100_000, 40.2, aligned(B)),
        row("deep", "SiT-B/2", "HASTE", "never", 100_000, 40.9, aligned(deep)),
        row("clip", "SiT-B/2", "HASTE", "never", 100_000, 48.9, aligned(B, teacher="CLIP-B/16")),
    ]
    assert texts(ablation("layers", rows), "run", "FID") == [
        ("", "usual", "40.2"),
        ("", "deep", "40.9"),
        ("published", "HASTE review reply Q2", "39.86"),
        ("published", "HASTE review reply Q2", "40.59"),
    ]
    assert texts(ablation("teacher", rows), "teacher", "FID") == [
        ("", "CLIP-B/16", "48.9"),
        ("", "DINOv2-B", "40.2"),
        ("published", "CLIP-B/16", "48.74"),
        ("published", "DINOv2-B", "39.86"),
    ]


def test_ablation_of_the_distribution_of_training_times_beside_the_papers():
    rows = [
        row(name, "SiT-B/2", "vanilla", NONE, 50_000, fid, {**BASE, "timesteps": name})
        for name, fid in (("uniform", 95.0), ("lognormal(0, 1)", 92.5))
    ]
    assert texts(ablation("timesteps", rows), "timesteps", "FID") == [
        ("", "lognormal(0, 1)", "92.5"),
        ("", "uniform", "95.0"),
        ("published", "lognormal(0, 1)", "92.27"),
    ]


def test_runs_that_differ_in_two_settings_are_no_ablation():
    rows = [
        row("a", "SiT-B/2", "HASTE", "never", 100_000, 40.2, aligned(B)),
        row("b", "SiT-B/2", "HASTE", "never", 100_000, 40.9, aligned("depth 7", "0.25")),
    ]
    assert tables.ablations(report(rows)) == []


def test_every_published_number_is_one_of_the_files_as_printed():
    lines = [line for path in papers.FOLDER.glob("*.csv") for line in csv.DictReader(path.open())]
    printed = {(line["source"], line["fid"]) for line in lines if "fid" in line}
    found = papers.published()
    assert len(found) > 80
    assert {(one.source, one.scores["fd"]) for one in found} <= printed
    assert all(one.guidance and one.guidance[0] > 1 for one in found if one.resolution == 512)


def test_tables_that_are_gone_leave_no_files(tmp_path: Path):
    page.write(report(), tmp_path)
    (tmp_path / "mine.csv").touch()
    assert (tmp_path / "published.tex").exists()
    page.write(report(benchmark=None), tmp_path)
    assert not list(tmp_path.glob("published*"))
    assert (tmp_path / "mine.csv").exists()


# Every row of every file


def lines(name: str) -> list[dict[str, str]]:
    with open(papers.FOLDER / name, newline="") as file:
        return list(csv.DictReader(file))


READ = {*papers.FILES, *systems.FILES.values(), *cosines.FILES.values(), papers.CLAIMS, overhead.MEMORY, overhead.SPEED}


def test_every_file_of_published_numbers_has_a_reader_or_a_reason_to_have_none():
    assert {path.name for path in papers.FOLDER.glob("*.csv")} == READ | {*papers.UNREAD}
    assert not READ & {*papers.UNREAD} and all(papers.UNREAD.values())
    # The reason of one of them: its distances are in a file that is read.
    components = {line["fid"] for line in lines("ablation_components.csv")}
    assert {line["fid"] for line in lines("ablation_teacher_data.csv")} <= components


SETTINGS = {"lambda": "feature weight", "lambda_attention": "attention weight"}  # of a run, in the report's words
FORMS = {"NT-Xent": "nt-xent", "Cos. sim.": "cosine"}


def like(line: dict[str, str], run: str) -> Row:
    """A measured row with all that a published one states."""
    method = line.get("method") or ("vanilla" if line["target"] == "vanilla" else "REPA")
    settings = {**BASE, **{name: f"{float(line[key]):g}" for key, name in SETTINGS.items() if line.get(key)}}
    if line.get("timestep_sampling"):
        settings["timesteps"] = line["timestep_sampling"].replace(";", ", ")
    if method != "vanilla":
        settings["teacher"] = line.get("teacher") or line.get("target") or "DINOv2-B"
        layers = [f"depth {line.get('feature_depth') or line.get('depth') or 8}"]
        if line.get("student_layers"):
            layers.append(" to ".join(line[key].replace(",", ", ") for key in ("student_layers", "teacher_layers")))
        settings["layers"] = "; ".join(layers)
    if line.get("objective"):
        settings["feature similarity"] = FORMS[line["objective"]]
    by = f" by {line['trigger']}" if line.get("trigger") == "gradient-angle" else ""
    stop = NONE if method == "vanilla" else line.get("termination", "") + by or "never"
    how = {"interval": [float(line.get("interval_low") or 0), float(line.get("interval_high") or 1)]}
    how["w"] = float(line.get("cfg_scale") or 1)
    return row(run, line["model"], method, stop, int(line["iteration"]), float(line["fid"]), settings, **how)


def digits(text: str) -> int:
    return len(text.partition(".")[2])


def same(printed: str, shown: str) -> bool:
    places = min(digits(printed), digits(shown))
    return shown != NONE and round(float(printed), places) == round(float(shown), places)


HEADS = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}


@pytest.mark.parametrize("name", sorted(name for name in papers.FILES if name != "coco256.csv"))  # see test_gather
def test_every_published_result_stands_beside_runs_like_those_of_its_table(name: str):
    resolution, groups = papers.FILES[name][0], {}
    for line in lines(name):
        if line["iteration"] and (name not in papers.GUIDED or line["cfg_scale"]):
            groups.setdefault((line["model"], line["iteration"]), []).append(line)
    assert groups
    for part in groups.values():
        built = report([like(line, f"run {i}") for i, line in enumerate(part)], resolution)
        shown = [
            {head.name: cell.text for head, cell in zip(table.heads, entry.cells, strict=True)}
            for table in [*tables.published_tables(built), *tables.ablations(built)]
            for entry in table.entries
            if entry.kind == "published"
        ]
        for line in part:
            scores = {head: line[key] for key, head in HEADS.items() if line.get(key)}
            assert any(all(same(text, one[head]) for head, text in scores.items()) for one in shown), line


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (row("a", "SiT-XL/2", "vanilla", NONE, 7_000_000, 8.4), {("FID", "8.3"), ("FID", "8.6")}),
        (row("a", "SiT-XL/2", "REPA", "never", 200_000, 11.0, aligned("depth 8")), {("FID", "11.1"), ("FID", "10.7")}),
        (row("a", "SiT-L/2", "REPA", "never", 400_000, 9.9, aligned("depth 8")), {("FID", "9.7"), ("FID", "10.0")}),
        (row("a", "DiT-XL/2", "vanilla", NONE, 7_000_000, 9.6), {("FID", "9.6"), ("FID", "9.62")}),
        (row("a", "SiT-L/2", "HASTE", "never", 400_000, 8.8, aligned(XL)), {("IS", "118.9"), ("IS", "119.0")}),
        (
            row("a", "SiT-B/2", "HASTE", "100000", 150_000, 36.0, aligned(B, teacher="CLIP-B/16")),
            {("IS", "40.5"), ("IS", "40.6")},
        ),
    ],
    ids=["8.3 or 8.6", "11.1 or 10.7", "9.7 or 10.0", "9.6 or 9.62", "IS 118.9 or 119.0", "IS 40.5 or 40.6"],
)
def test_where_sources_differ_both_are_shown(found: Row, said: set):
    (table,) = tables.published_tables(report([found]))
    shown = {
        (head.name, cell.text)
        for entry in table.entries
        if entry.kind == "published"
        for head, cell in zip(table.heads, entry.cells, strict=True)
    }
    assert said <= shown


def test_a_result_of_an_ablation_stands_beside_the_run_that_has_its_settings_and_no_other():
    alone = {
        weight: tables.published_tables(
            report([row("a", "SiT-L/2", "HASTE", "300000", 400_000, 9.0, aligned(XL) | {"attention weight": weight})])
        )[0]
        for weight in ("3", "4")
    }
    for weight, there in (("3", True), ("4", False)):
        assert (("published", "HASTE camera-ready Table 5", "9.0") in texts(alone[weight], "run", "FID")) == there


def test_the_ablation_of_the_weight_of_attention_is_not_one_of_the_weight_of_features():
    rows = [
        row(f"w{w}", "SiT-L/2", "HASTE", "250000", 400_000, 8.0, {**aligned(XL), "attention weight": w})
        for w in ("0.5", "3")
    ]
    assert texts(ablation("attention-weight", rows), "attention weight", "FID")[2:] == [
        ("published", "0.5", "7.9"),
        ("published", "3", "9.0"),
    ]
    assert [table.name for table in tables.ablations(report(rows))] == ["ablation-attention-weight"]


# Curves and speed-ups


def test_what_papers_print_along_a_run_is_drawn_as_rings_as_far_as_the_stop_agrees():
    steps = (100_000, 200_000, 400_000, 500_000)
    fids = {
        "250000": ["15.9", "9.9", "8.4", "7.3", "5.3"],
        "never": ["15.9", "9.9", "8.4", "5.5", "8.1"],  # until it acts, a stop is none
        "400000 by plateau": ["15.9", "9.9", "8.4", "5.5", "7.4"],
        "300000 to 400000 by plateau": ["15.9", "9.9", "8.4"],
        "100000": ["15.9"],
    }
    for stop, expected in fids.items():
        rows = [row("a", "SiT-XL/2", "HASTE", stop, step, 9.0 - step / 1e5, aligned(XL)) for step in steps]
        found = papers.along(rows[0], Benchmark("ImageNet", 256), steps[-1])
        assert sorted(one.scores["fd"] for one in found) == sorted(expected)
        panel = next(panel for panel in figures.score_panels(report(rows)) if panel.title == "FID")
        assert panel.svg.count("fill-opacity: 0;") == len(found)
        assert panel.caption == "Rings: what papers print for the same model and method."
    for other in (report(rows, benchmark=None), report(rows, 512)):
        assert all(not panel.caption for panel in figures.score_panels(other))


@pytest.mark.parametrize("claim", lines(papers.CLAIMS), ids=lambda claim: claim["source"])
def test_every_claim_of_a_speed_up_stands_below_ours_of_the_same_model_and_methods(claim: dict[str, str]):
    guided = {"w": 1.5 if claim["guided"] == "yes" else 1.0}
    base, method, late = claim["baseline"], claim["method"], int(claim["baseline_iteration"])
    rows = [row("base", claim["model"], base, "never", late, 9.0, **guided)]
    rows += [row("fast", claim["model"], method, "never", step, fid, **guided) for step, fid in ((1000, 20), (2000, 5))]
    table = finding.speedup_table(report(rows, int(claim["resolution"])))
    found = [entry for entry in table.entries if entry.kind == "published"]
    assert [entry.cells[0].text for entry in found] == [f"{claim['model']} {method}, {claim['source']}"]
    assert [cell.text for cell in found[0].cells[1:]] == [
        base,
        f"{late:,}",
        NONE,
        f"{int(claim['iteration']):,}" if claim["iteration"] else NONE,
        f"{claim['factor']}×" if claim["factor"] else NONE,
    ]
    assert not any(cell.link for cell in found[0].cells)
    others = [dataclasses.replace(one, model="SiT-B/2") for one in rows]
    for other in (report(others, int(claim["resolution"])), report(rows, benchmark=None), report(rows, 64)):
        assert not any(entry.kind == "published" for entry in finding.speedup_table(other).entries)


def test_a_speed_up_leads_to_both_scores_that_it_was_read_off():
    rows = [row("base", "SiT", "vanilla", NONE, 400, 9.0)]
    rows += [row("fast", "SiT", "HASTE", "never", step, fid) for step, fid in ((100, 20.0), (200, 5.0), (300, 4.0))]
    built = report(rows)
    (entry,) = finding.speedup_table(built).entries
    of = {f"made-{i}": (line.first.run, line.first.step) for i, line in enumerate(compare.lines(built))}
    assert [of[cell.link] for cell in entry.cells if cell.link] == [("base", 400), ("fast", 200), ("fast", 200)]


# Whole systems


def test_every_runs_last_step_stands_above_the_systems_of_its_kind_of_guidance():
    plain, guided = systems.system_tables(report())
    assert texts(plain, "system", "epochs", "FID", "source") == [
        *(("", "b", "80", "33.40", "here, step 400,000"), ("", "b REPA", "80", "24.70", "here, step 400,000")),
        *(("", "b HASTE", "80", "19.80", "here, step 400,000"), ("", "xl", "80", "17.40", "here, step 400,000")),
        *(("", "xl REPA", "80", "8.00", "here, step 400,000"), ("", "xl 250K", "80", "7.40", "here, step 400,000")),
        ("", "xl 290K", "80", "7.60", "here, step 400,000"),
        *(
            ("published", line["model"], line["epochs"], line["fid"], line["source"])
            for line in lines("imagenet256_system_no_cfg.csv")
        ),
    ]
    found = texts(guided, "system", "epochs", "guidance", "FID")
    assert found[:2] == [
        ("", "xl 1.25", "100", "1.25", "2.20"),
        ("", "xl 1.5", "100", "1.5 on [0, 0.7]", "1.80"),
    ]
    assert ("published", "SiT-XL/2 + HASTE", "600", "–", "1.41") in found
    assert ("published", "SiT-XL/2 + REPA", "800", "interval or schedule", "1.42") in found


@pytest.mark.parametrize("key", sorted(systems.FILES))
def test_every_number_of_a_published_system_is_as_printed(key):
    with open(papers.FOLDER / systems.FILES[key], newline="") as file:
        printed = [line for line in csv.DictReader(file) if line.get("train_images") != "20000"]
    found = systems.published(*key)
    assert len(found) == len(printed) > 2
    for system, line in zip(found, printed, strict=True):
        assert system.name.startswith(papers.CALLED.get(line["model"], line["model"]))
        assert system.scores == {m: line[n] for m, n in papers.SCORES.items() if line.get(n)}
        assert system.source == line["source"]


@pytest.mark.parametrize("key", [key for key in sorted(systems.FILES) if key[0] == "ImageNet"])
def test_every_published_system_stands_below_our_runs_at_their_ends(key):
    _, resolution, guided = key
    ours = row("a", "SiT-XL/2", "HASTE", "300000", 400_000, 2.5, aligned(XL), w=1.25 if guided else 1.0)
    (table,) = systems.system_tables(report([ours], resolution))
    found = [(source, fid) for kind, source, fid in texts(table, "source", "FID") if kind]
    assert found == [(line["source"], line["fid"]) for line in lines(systems.FILES[key])]


def test_every_measured_number_of_every_table_leads_to_how_it_was_made():
    sweep = [row("sweep", "SiT-XL/2", "REPA", "never", 4_000_000, w, aligned("depth 8"), w=w) for w in (1.3, 1.35)]
    found = [{"layer": 8, "t": 0.5, "accuracy": 0.7, "cosine": 0.1, "block": 8, "term": "features", "error": 0.01}]
    state = {"trajectory": "t", "step": 400_000}
    measured = [
        Measured(kind, "xl REPA", 0, 400_000, {
            "measure": kind, "axes": axes, "values": {value: "error"}, "rows": found, "notes": [], "settings": {},
            "state": state, "provenance": {},
        })
        for kind, axes, value in (
            ("probe", ["layer", "t"], "accuracy"), ("gradient-cosine", ["term", "t", "block"], "cosine")
        )
    ]  # fmt: skip
    built = report([*ROWS, *sweep], measures=measured)
    made, seen = page.render(built), set()
    for section, tables_of in page.all_tables(built).items():
        for table in tables_of:
            for entry in (entry for entry in table.entries if entry.kind != "published"):
                for head, cell in zip(table.heads, entry.cells, strict=True):
                    if head.number and isinstance(cell.value, float) and head.name != "epochs":
                        assert cell.link and f'id="{cell.link}"' in made, (table.name, head.name)
                        seen.add(section)
    assert seen == {"results", "speed", "published", "ablations", "measures"}


def test_epochs_that_a_source_gives_as_steps_are_of_its_batch():
    rows = [row("a", "SiT-XL/2", "HASTE", "300000", 400_000, 2.5, aligned(XL), w=1.25)]
    (table,) = systems.system_tables(report(rows, 512))
    assert ("published", "SiT-XL/2 + HASTE", "80", "1.25", "2.49") in texts(
        table, "system", "epochs", "guidance", "FID"
    )
    assert ("published", "SiT-XL/2", "600", "–", "2.62") in texts(table, "system", "epochs", "guidance", "FID")


def test_nothing_stands_beside_systems_but_scores_of_inception_on_imagenet():
    assert systems.system_tables(report(benchmark=None)) == []
    assert systems.system_tables(report(benchmark=Benchmark("ImageNet", 64))) == []
    other = dataclasses.replace(ROWS[0], score={**ROWS[0].score, "detector": OTHER})
    assert systems.system_tables(report([other])) == []
    (table,) = systems.system_tables(report([ROWS[0], other]))
    assert [head.name for head in table.heads if "dinov2" in head.name] == []


def test_a_run_whose_seed_is_missing_has_no_number_there():
    assert systems.system_tables(report([ROWS[0]], seeds={"b": [0, 1]})) == []
    (table,) = systems.system_tables(report([ROWS[0], ROWS[2]], seeds={"b": [0, 1], "b REPA": [0]}))
    assert [text for kind, text in texts(table, "system") if not kind] == ["b REPA"]


def test_the_page_and_the_files_have_the_systems(tmp_path):
    page.write(report(), tmp_path)
    assert "MDTv2-XL/2" in (tmp_path / "index.html").read_text()
    for end in ("csv", "md", "tex"):
        assert "VDM++" in (tmp_path / f"published-systems-guided.{end}").read_text()
    page.write(report(benchmark=None), tmp_path)
    assert not list(tmp_path.glob("published*"))
