"""Any measure's table and figures: from the columns that its files name, whatever the measure is."""

from __future__ import annotations

import csv
import dataclasses
import io

import numpy as np
import pytest

from haste.measure.pictures import Picture
from haste.report import cosines, formats, measures, page, papers
from haste.report.content import Benchmark, Measured, Report, Row

AXES, VALUES = ["term", "t", "block"], {"cosine": "error"}


def measured(run, step, rows, seed=0, axes=AXES, values=VALUES, notes=(), name="cos"):
    state = {"trajectory": "T", "step": step, "file": "f"}
    found = {"measure": "kind", "settings": {"images": 14}, "axes": axes, "values": values, "rows": rows}
    return Measured(
        name, run, seed, step, {**found, "notes": list(notes), "state": state, "provenance": {}}, f"{run}.json"
    )


def rows(scale=1.0, blocks=(1,), times=(0.1, 0.5)):
    return [
        {"term": term, "t": t, "block": block, "cosine": scale * sign * t * block, "error": 0.01}
        for term, sign in (("features", 1), ("attention", -1))
        for t in times
        for block in blocks
    ]


def report(*ones, **more):
    score = {"detector": {"name": "d", "identity": "d"}, "scores": {"fd": 2.0}, "samples": 10, "state": {"step": 1}}
    lines = [Row(run, "SiT", "HASTE", "–", 0, 8, score) for run in dict.fromkeys(one.run for one in ones)]
    return Report("n", "t", "", lines, [], [], [], [], [], {}, "", measures=ones, **more)


def as_csv(built):
    (table,) = measures.measure_tables(built)
    return list(csv.reader(io.StringIO(formats.to_csv(table)))), table


def test_places_of_the_first_axis_of_numbers_stand_side_by_side_and_what_is_the_same_for_all_is_a_note():
    found, table = as_csv(report(measured("a", 8, rows()), measured("b", 8, rows(2.0), notes=["x left out: no y"])))
    assert found[0] == ["run", "term", "t 0.1", "t 0.1 ±", "t 0.5", "t 0.5 ±"]
    assert found[1] == ["a", "features", "0.1", "0.01", "0.5", "0.01"]
    assert [line[:3] for line in found[3:]] == [["b", "features", "0.2"], ["b", "attention", "-0.2"]]
    assert table.notes[0] == "kind: block 1, images 14." and "X left out: no y: b at step 8." in table.notes


def test_many_places_are_lines_of_the_table():
    found, _ = as_csv(report(measured("a", 8, rows(times=[i / 20 for i in range(1, 15)]))))
    assert found[0] == ["run", "term", "t", "cosine", "cosine ±"] and len(found) == 1 + 2 * 14


def test_steps_and_further_axes_have_columns_where_they_differ():
    found, _ = as_csv(report(measured("a", 8, rows(blocks=(1, 2))), measured("a", 16, rows(blocks=(1, 2)))))
    assert found[0][:4] == ["run", "step", "term", "block"]
    assert [line[1] for line in found[1:]] == ["8"] * 4 + ["16"] * 4


def test_over_seeds_a_value_is_a_mean_with_its_spread_and_none_where_a_seed_is_missing():
    both = [measured("a", 8, rows(), seed=0), measured("a", 8, rows(3.0), seed=1)]
    found, _ = as_csv(report(*both, seeds={"a": [0, 1]}))
    assert [float(x) for x in found[1][2:4]] == pytest.approx([0.2, 0.1 * 2**0.5])
    _, table = as_csv(report(*both, seeds={"a": [0, 1, 2]}))
    assert table.column("t 0.1")[0].text == "0.10; 0.30" and table.column("t 0.1")[0].value is None


def test_measures_whose_names_differ_have_tables_in_different_files():
    built = report(*(measured("a", 8, rows(), name=name) for name in ("a b", "a-b", "a_b", "ab", "ä")))
    assert len({table.name for table in measures.measure_tables(built)}) == 5


def test_a_terminal_is_told_the_run_and_state_once_and_each_place_has_a_line_of_its_own():
    run = "a run with a name as long as a state's, with all that it aligns and until when"
    words = measures.terminal("cos", run, measured("a", 8, rows()).found)
    assert words.splitlines()[0] == f"cos of {run} (T), step 8" and words.count("a run") == 1
    assert [line.split()[0] for line in words.splitlines() if "0.01" in line] == ["features", "attention"]


def test_a_measure_of_several_values_has_a_column_for_each():
    ones = [{"layer": i, "accuracy": 0.1 * i, "loss": 2.0} for i in (1, 2)]
    found, _ = as_csv(report(measured("a", 8, ones, axes=["layer"], values={"accuracy": "", "loss": ""})))
    assert found[:2] == [["run", "layer", "accuracy", "loss"], ["a", "1", "0.1", "2.0"]]
    assert len(measures.measure_panels(report(measured("a", 8, ones, axes=["layer"], values={"accuracy": ""})))) == 1


def test_a_line_a_run_a_panel_a_word_and_a_heat_map_where_there_are_many_blocks():
    ((name, few),) = measures.measure_panels(report(measured("a", 8, rows(blocks=(1, 2))), measured("b", 8, rows())))
    assert name == "cos"
    assert [panel.title for panel in few] == [
        f"cosine, {term}, block {block}"
        for term, block in (("features", 1), ("features", 2), ("attention", 1), ("attention", 2))
    ]
    assert "a 0.5 at t 0.5; b 0.5 at t 0.5" in few[0].svg
    ((_, many),) = measures.measure_panels(
        report(measured("a", 8, rows(blocks=range(1, 9))), measured("a", 16, rows(2.0, range(1, 9))))
    )
    assert [panel.title for panel in many] == ["cosine, a, features", "cosine, a, attention"]
    assert many[1].caption == "cosine, a, attention, step 16." and "from -8 to -0.2" in many[1].svg


def test_where_there_is_one_place_alone_steps_are_the_axis_and_one_step_makes_no_figure():
    one = [{"cost": 2.0}]
    several = report(*(measured("a", step, one, axes=[], values={"cost": ""}) for step in (8, 16)))
    ((_, panels),) = measures.measure_panels(several)
    assert "cost over step: a 2 at step 16" in panels[0].svg
    assert measures.measure_panels(report(measured("a", 8, one, axes=[], values={"cost": ""}))) == []
    assert as_csv(several)[0][1:] == [["a", "8", "2.0"], ["a", "16", "2.0"]]


def test_every_value_leads_to_the_place_that_says_how_it_was_made(tmp_path):
    built = report(measured("a", 8, rows()), measured("a<b>", 8, rows(2.0)))
    page.write(dataclasses.replace(built, seeds={"a": [0], "a<b>": [0]}), tmp_path)
    text = (tmp_path / "index.html").read_text()
    for number, file in ((0, "a.json"), (1, "a&lt;b&gt;.json")):
        assert f'href="#made-measure-{number}"' in text
        assert file in text.split(f'id="made-measure-{number}"')[1]
    assert (tmp_path / "measure-cos.csv").exists() and "a<b>" not in text
    page.write(report(measured("a", 8, [])), tmp_path)  # it found nothing
    assert not (tmp_path / "measure-cos.csv").exists()


# Published cosines


FILES = {method: list(csv.DictReader((papers.FOLDER / name).open())) for method, name in cosines.FILES.items()}


def imagenet(method: str, model: str, block: int, times, steps=(100_000,), batch="256", beside=()) -> Report:
    """Cosines of one run on ImageNet, as the measure gives them: of each term and, of two, of both together."""
    terms = ["features"] if method == "REPA" else ["features", "attention", "alignment"]
    ones = []
    for step in steps:
        places = [{"term": term, "t": t, "block": b} for t in times for b in (block, *beside) for term in terms]
        one = measured("mine", step, [{**place, "cosine": 0.5, "error": 0.01} for place in places])
        ones.append(dataclasses.replace(one, found={**one.found, "measure": cosines.MEASURE}))
    built = report(*ones, benchmark=Benchmark("ImageNet", 256))
    row = dataclasses.replace(built.rows[0], model=model, method=method, settings={"batch": batch})
    return dataclasses.replace(built, rows=[row])


@pytest.mark.parametrize(
    ("method", "model", "block"), [("REPA", "SiT-XL/2", 8), ("HASTE", "SiT-XL/2", 8), ("HASTE", "SiT-B/2", 5)]
)
def test_every_published_cosine_stands_as_printed_below_those_of_a_run_of_its_model_and_method(method, model, block):
    lines = [line for line in FILES[method] if line["model"] == model]
    assert lines and all(int(line["block"]) == block for line in lines)
    built = imagenet(method, model, block, [0.1, 0.35])
    (table,) = measures.measure_tables(built)
    heads = [head.name for head in table.heads]
    shown = {}
    for entry in table.entries:
        cells = dict(zip(heads, entry.cells, strict=True))
        assert (entry.kind == "published") == (cells["run"].text != "mine")
        if entry.kind == "published":
            assert cells["term"].text == ("features" if method == "REPA" else "alignment")
            assert not any(cell.link or cell.bold for cell in entry.cells)
            source, step = cells["run"].text.split(":")[0], cells["step"].value
            shown |= {(source, step, head): cell.text for head, cell in cells.items() if head.startswith("t ")}
        else:
            assert all(cell.link for head, cell in cells.items() if head.startswith("t ") and cell.value is not None)
    for line in lines:
        if line["t"] != "mean":
            assert shown[line["source"], int(line["iteration"]), f"t {float(line['t']):g}"] == line["cosine"]
    assert "no results of this code" in " ".join(table.notes)


def test_the_means_over_t_that_are_left_out_follow_from_the_cosines_that_are_shown():
    means = [line for lines in FILES.values() for line in lines if line["t"] == "mean"]
    assert len(means) == 4
    for mean in means:
        same = [line for line in FILES["HASTE"] if all(line[k] == mean[k] for k in ("model", "block", "iteration"))]
        values = [float(line["cosine"]) for line in same if line["t"] != "mean"]
        assert sum(values) / len(values) == pytest.approx(float(mean["cosine"]), abs=1e-4)


@pytest.mark.parametrize(
    "built",
    [
        imagenet("HASTE", "SiT-XL/2", 5, [0.1]),
        imagenet("ATTA", "SiT-XL/2", 8, [0.1]),
        imagenet("HASTE", "SiT-L/2", 8, [0.1]),
        imagenet("HASTE", "SiT-XL/2", 8, [0.1], batch="128"),
        dataclasses.replace(imagenet("HASTE", "SiT-XL/2", 8, [0.1]), benchmark=Benchmark("ImageNet", 512)),
        dataclasses.replace(imagenet("HASTE", "SiT-XL/2", 8, [0.1]), benchmark=None),
    ],
    ids=["block", "method", "model", "batch", "images of 512 px", "other images"],
)
def test_no_published_cosine_stands_beside_a_run_that_differs(built: Report):
    assert not any(entry.kind == "published" for table in measures.measure_tables(built) for entry in table.entries)


def test_many_steps_have_a_heat_map_of_t_against_step_for_us_and_for_the_paper_in_the_same_colours(tmp_path):
    built = imagenet("REPA", "SiT-XL/2", 8, [0.02, 0.1], steps=(100_000, 200_000, 300_000, 400_000))
    ((_, panels),) = measures.measure_panels(built)
    maps = [panel for panel in panels if "over steps" in panel.caption]
    paper = "HASTE Table 1: SiT-XL/2, REPA"
    assert [panel.title for panel in maps] == ["cosine, mine, features", f"cosine, {paper}, features"]
    assert f"cosine, {paper}, features by step and t: from -0.494 to 0.0692" in maps[1].svg
    assert ">4M<" in maps[1].svg and f"Dotted: {paper}." in panels[0].caption
    page.write(built, tmp_path)  # a run that is on no legend


def test_many_blocks_and_steps_have_a_heat_map_of_the_means_over_t_too():
    ones = [measured("a", step, rows(blocks=range(1, 9))) for step in (8, 16, 24, 32)]
    ((_, panels),) = measures.measure_panels(report(*ones))
    assert [panel.caption.partition(", step ")[0] for panel in panels] == [
        "cosine, a, features",
        "cosine, a, attention",
        "cosine, a, features, over steps, the mean over t.",
        "cosine, a, attention, over steps, the mean over t.",
    ]
    assert "by step and block: from 0.3 to 2.4" in panels[2].svg  # (0.1 + 0.5) / 2, times the block


def test_a_teacher_beside_is_a_dashed_line_and_the_last_line_of_the_table():
    one = measured("a", 8, rows())
    one = dataclasses.replace(one, found={**one.found, "teachers": {"DINO": {"cosine": 0.845, "error": 0.02}}})
    found, _ = as_csv(report(one))
    assert found[-1] == ["teacher DINO", "", "0.845", "0.02", "0.845", "0.02"]
    ((_, panels),) = measures.measure_panels(report(one))
    assert len(panels) == 2 and all("teacher DINO 0.845" in panel.svg for panel in panels)
    assert all(panel.caption == "Dashed: teachers, of the clean images." for panel in panels)


def test_a_teacher_beside_a_heat_map_is_a_line_on_its_scale_of_colours_which_reaches_it():
    one = measured("a", 8, rows(blocks=range(1, 9)))  # of -4 to 4
    one = dataclasses.replace(one, found={**one.found, "teachers": {"DINO": {"cosine": 6.5, "error": 0.02}}})
    ((_, panels),) = measures.measure_panels(report(one))
    assert [panel.caption for panel in panels] == [
        f"cosine, a, {term}, step 8. Lines on the scale: teachers, of the clean images: DINO 6.5."
        for term in ("features", "attention")
    ]
    assert all("cosine; lines: DINO" in panel.svg and ">6<" in panel.svg for panel in panels)


def test_what_papers_print_of_one_block_is_drawn_beside_ours_where_there_are_maps_of_many():
    built = imagenet("HASTE", "SiT-XL/2", 8, [0.1, 0.35], beside=(5, 6, 7, 9))
    ((_, panels),) = measures.measure_panels(built)
    lines = [panel for panel in panels if "Dotted" in panel.caption]
    assert [panel.title for panel in lines] == ["cosine, alignment, block 8"]
    assert "mine 0.5 at t 0.35; HASTE Table 2: SiT-XL/2, HASTE" in lines[0].svg
    assert [panel.title for panel in panels if panel not in lines] == [
        f"cosine, mine, {term}" for term in ("features", "attention", "alignment")
    ]


def test_pictures_are_shown_by_step_with_what_they_show_in_words_and_lead_to_their_file():
    def shown(run, step, seed=0):
        cell = np.full((2, 2, 3), step, np.uint8)
        picture = Picture.of("t 0.5", "Four <tokens> in one colour", [("image", [cell]), ("vit\n1.2", [cell])]).entry
        one = measured(run, step, rows(), seed=seed)
        return dataclasses.replace(one, found={**one.found, "pictures": [picture]})

    html = page.render(report(shown("a", 8), shown("a", 16), shown("a", 16, seed=1), measured("b", 8, rows())))
    assert html.count("cos, pictures") == 1 and html.count("<img") == 2
    assert "a at step 16. Four &lt;tokens&gt; in one colour" in html and "<span>vit\n1.2</span>" in html
    last = html.index("a at step 16. Four")
    assert '<a href="#made-measure-1">a: t 0.5</a>' in html[:last] and 'id="made-measure-1"' in html
    assert last < html.index("<summary>Step 8</summary>") < html.index("a at step 8. Four")


# Steps along the bottom, and published costs


def test_a_measure_along_steps_has_a_line_a_run_of_the_mean_over_t():
    def one(run, step, scale):
        return [
            {"term": term, "t": t, "value": scale * t, "error": 0.01}
            for term in ("features", "attention")
            for t in (0.1, 0.5)
        ]

    def built(steps):
        ones = [
            measured(run, step, one(run, step, step * way), axes=["term", "t"], values={"value": "error"})
            for run, way in (("a", 1), ("b", -1))
            for step in steps
        ]
        ones = [dataclasses.replace(it, found={**it.found, "along": "step"}) for it in ones]
        ((_, panels),) = measures.measure_panels(report(*ones, seeds={"a": [0], "b": [0]}))
        return panels

    for steps in ((8, 16), (4, 8, 12, 16)):
        panels = built(steps)
        assert [panel.title for panel in panels] == ["features", "attention"]
        assert "over step: a 4.8 at step 16; b -4.8 at step 16" in panels[0].svg  # 0.3 on average
        assert panels[0].caption == "The mean over t."
    assert all("mean" not in panel.caption for panel in built((8,)))  # over t


def costs(model="SiT-XL/2", batch=32, teacher="DINOv2-B", **more):
    names = ("vanilla", "features", "attention", "features + attention")
    found = [
        {
            "terms": name,
            "batch": batch,
            "peak MB": 25000.0 + i,
            "teacher GMAC": 23.161 if i else 0.0,
            "images/s": 99.5 - i,
        }
        for i, name in enumerate(names)
    ]
    values = {"peak MB": "", "teacher GMAC": "", "images/s": ""}
    one = measured("mine", 8, found, axes=["terms", "batch"], values=values, notes=["images/s are of a machine"])
    terms = {"attention": {"teacher": teacher, "student_layers": [4, 5, 6, 7]}, "features": {"teacher": teacher}}
    one = dataclasses.replace(one, found={**one.found, "measure": "cost", "along": "nothing", "terms": terms})
    built = report(one, benchmark=more.get("benchmark", Benchmark("ImageNet", 256)))
    row = dataclasses.replace(built.rows[0], model=model, method="vanilla", settings={"batch": "256"})
    return dataclasses.replace(built, rows=[row])


def test_published_memory_and_speed_stand_as_printed_below_those_of_the_same_network_and_nothing_is_made_up():
    found, table = as_csv(costs())
    assert found[0] == ["run", "terms", "peak MB", "teacher GMAC", "images/s"]
    reply, repa = "HASTE review reply Q5: SiT-XL/2", "REPA Appendix D, 8x H100 80GB, fp16: SiT-XL/2"
    printed = [[cell.text for cell in entry.cells] for entry in table.entries[4:]]
    assert printed == [
        [reply, "features", "27818.01", "23.19", "–"],
        [reply, "features + attention", "30666.84", "23.19", "–"],
        [repa, "features", "–", "–", "172.8"],
    ]
    assert [entry.kind for entry in table.entries] == [""] * 4 + ["published"] * 3
    assert [cell.text for cell in table.entries[0].cells] == ["mine", "vanilla", "25000", "0.0", "100"]
    assert any("a multiplication with its addition, a GMAC. They are no results" in note for note in table.notes)
    assert any(note.startswith("Images/s are of a machine: mine") for note in table.notes)
    assert measures.measure_panels(costs()) == []
    sections = page.all_tables(costs())
    assert [table.name for table in sections["costs"]] == ["measure-cos"] and not sections["measures"]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "SiT-L/2"},
        {"batch": 16},
        {"teacher": "DINOv2-L"},
        {"teacher": "DINOv2-B with low_pass 0.5"},
        {"benchmark": Benchmark("ImageNet", 512)},
        {"benchmark": None},
    ],
)
def test_published_costs_of_another_network_batch_teacher_or_data_are_not_shown(other):
    assert len(as_csv(costs(**other))[1].entries) == 4


def test_what_the_reply_calls_gflop_of_its_teacher_are_multiplications_with_their_additions():
    width, tokens = 768, 257
    macs = 12 * (12 * width**2 * tokens + 2 * tokens**2 * width) + 256 * 14 * 14 * 3 * width
    (printed,) = {float(line["teacher_forward_gflops"]) for line in papers.lines_of("overhead.csv")}
    assert printed == pytest.approx(macs / 1e9, rel=2e-3)  # 23.16; it may count the normalisations too
