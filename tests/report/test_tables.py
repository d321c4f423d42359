"""The table: what stands in which column, what may be compared, what is said of it."""

from __future__ import annotations

import csv
import dataclasses
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from haste import config
from haste.report import compare, finding, formats, page, tables
from haste.report.content import Report, Row

READ = (
    {name: "Int64" for name in tables.NUMBERS} | {"NFE": float} | {"run": str, "model": str, "method": str, "stop": str}
)


def score(fd: float | None, **changes) -> dict:
    sampling = {"sampler": "euler", "steps": 50, "guidance": 1.0, "interval": [0, 1], "labels": "balanced", "seed": 0}
    sampling |= changes.pop("sampling", {})
    return {
        "schema": 1,
        "kind": "score",
        "key": "k",
        "state": {"trajectory": "t", "step": 1, "file": "f"},
        "sampling": sampling,
        "nfe": 50,
        "detector": {"name": "digits-cnn", "identity": "d"},
        "samples": 1000,
        "reference": {"images": 1500, "identity": "r"},
        "scores": {"fd": fd, "precision": 0.7, "recall": 0.5, "class_accuracy": 0.8},
        "provenance": {},
    } | changes


FLOOR = {
    "schema": 1,
    "kind": "score",
    "floor": True,
    "detector": {"name": "digits-cnn", "identity": "d"},
    "samples": 750,
    "reference": {"images": 750},
    "scores": {"fd": 3.4, "precision": 0.98},
}


def row(run: str, step: int, fd: float | None, *, method: str = "", stop: str = "–", seed: int = 0, **changes) -> Row:
    return Row(run, "SiT", method or run, stop, seed, step, score(fd, **changes))


def report(rows: list[Row], floor: dict | None = None, **more) -> Report:
    return Report("digits", "Digits", "", rows, [] if floor is None else [floor], [], [], [], [], {}, "", **more)


def html(built: Report) -> str:
    return "".join(map(formats.to_html, tables.main_tables(built)))


def markdown(built: Report) -> str:
    return "\n".join(map(formats.to_markdown, tables.main_tables(built)))


def latex(built: Report) -> str:
    return "".join(formats.to_latex(table, tables.arrows(built)) for table in tables.main_tables(built))


def guided(weight: float, low: float = 0, high: float = 1) -> dict:
    return {"guidance": weight, "interval": [low, high]}


class Cells(HTMLParser):
    """Texts, boldness and links of the body's and foot's cells, row by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bold: set[str] = set()
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
            if "strong" in self.open:
                self.bold.add(data)


def test_the_table_has_these_columns_in_this_order():
    frame = tables.results(report([row("vanilla", 300, 61.2)]))
    scores = ["FD (digits-cnn)", "precision", "recall", "class accuracy"]
    how = ["sampler", "NFE", "guidance", "labels", "decoder", "weights", "samples"]
    assert list(frame.columns) == [*tables.IDENTITY, *scores, *how]
    assert frame.loc[0, ["run", "step", "FD (digits-cnn)", "NFE", "samples"]].tolist() == [
        "vanilla",
        300,
        61.2,
        50,
        1000,
    ]


def test_the_detectors_name_comes_from_the_data():
    frame = tables.results(report([row("a", 1, 5.0, detector={"name": "other", "identity": "i"})]))
    assert frame["FD (other)"].tolist() == [5.0]


def test_fid_by_pytorch_fid_names_its_convention_whatever_the_configuration_calls_the_detector():
    by = [{"name": name, "kind": "pytorch-fid", "identity": "p"} for name in ("pytorch-fid", "coco")]
    frames = [tables.results(report([row("a", 1, 5.0, detector=one)])) for one in by]
    assert [frame.columns[6] for frame in frames] == ["FID (pytorch-fid)", "FID (pytorch-fid, coco)"]


def test_only_inceptions_frechet_distance_is_called_fid():
    frame = tables.results(report([row("a", 1, 5.0, detector={"name": "inception", "identity": "i"})]))
    assert frame["FID"].tolist() == [5.0]


def test_guided_and_unguided_scores_never_share_a_column():
    rows = [row("a", 1, 9.0), row("a", 1, 4.0, sampling=guided(1.5)), row("a", 1, 3.0, sampling=guided(1.5, 0, 0.7))]
    frame = tables.results(report(rows))
    names = {9.0: "FD (digits-cnn)", 4.0: "FD (digits-cnn), w=1.5", 3.0: "FD (digits-cnn), w=1.5 on [0, 0.7]"}
    for value, name in names.items():
        assert frame[name].dropna().tolist() == [value]
    metrics = [c for c in frame.columns if c.startswith(("FD", "precision", "recall", "class"))]
    assert (frame[metrics].notna().sum() == 1).all()
    assert frame["guidance"].tolist() == ["none", "1.5", "1.5 on [0, 0.7]"]


def test_a_weight_of_one_is_no_guidance_whatever_its_interval():
    assert compare.guidance_text(score(1.0, sampling=guided(1.0, 0, 0.7))) == "none"


def test_the_floor_is_the_last_line_of_every_form(tmp_path: Path):
    built = report([row("a", 1, 9.0), row("b", 1, 8.0)], FLOOR)
    frame = tables.results(built)
    assert frame.iloc[-1]["run"] == tables.FLOOR_NAME
    assert frame.iloc[-1]["FD (digits-cnn)"] == 3.4
    assert frame.iloc[-1]["samples"] == 750
    lines = [line for line in markdown(built).splitlines() if line.startswith("|")]
    assert lines[-1].startswith("| real against real |")
    assert Cells(html(built)).rows[-1][0] == tables.FLOOR_NAME
    line = next(line for line in page.text(built).splitlines() if "real against" in line)
    assert line.split() == ["real", "against", "real", "3.40", "0.980", "–", "–"]
    assert latex(built).split("\\bottomrule")[0].split("\\midrule")[-1].startswith("\nreal against real")


def test_the_floor_stands_only_under_its_own_detector():
    built = report([row("a", 1, 9.0), row("a", 1, 2.0, detector={"name": "other", "identity": "o"})], FLOOR)
    last = tables.results(built).iloc[-1]
    assert last["FD (digits-cnn)"] == 3.4
    assert pd.isna(last["FD (other)"])


def test_the_best_of_each_step_is_bold_and_the_floor_never_is():
    built = report([row("a", 1, 9.0), row("b", 1, 8.5), row("a", 2, 7.25), row("b", 2, 7.5)], FLOOR)
    assert Cells(html(built)).bold == {"8.50", "7.25"}
    assert set(re.findall(r"\*\*(.*?)\*\*", markdown(built))) == {"8.50", "7.25"}


def test_higher_is_better_for_accuracy():
    rows = [row(n, 1, 9.0, scores={"class_accuracy": v}) for n, v in (("a", 0.5), ("b", 0.9))]
    assert Cells(html(report(rows))).bold == {"0.900"}


@pytest.mark.parametrize("changes", [{"samples": 5000}, {"sampling": {"steps": 250}}, {"reference": {"images": 10}}])
def test_scores_measured_in_different_ways_are_not_ranked(changes: dict):
    assert Cells(html(report([row("a", 1, 9.0), row("b", 1, 8.0, **changes)]))).bold == set()


def test_the_seed_of_the_noise_does_not_keep_scores_apart():
    built = report([row("a", 1, 9.0), row("b", 1, 8.0, sampling={"seed": 7})])
    assert len([g for g in compare.comparisons(built) if g.column.metric == "fd"]) == 1


def test_keys_that_older_scores_lack_keep_neither_seeds_nor_runs_apart():
    rows = [row("a", 1, 9.0), row("a", 1, 8.0, seed=1), row("b", 1, 7.0), row("b", 1, 6.0, seed=1)]
    old = [one.score["sampling"] | {"count": 1000, "pixels": "truncate"} for one in rows]
    for one, given, newer in zip(rows, old, (False, True, True, False), strict=True):
        now = config.Sampling.model_validate(given).model_dump()
        one.score["sampling"] = now | {"interval": [0, 1]} if newer else given
    assert {"weights", "prompts"} <= rows[1].score["sampling"].keys() - rows[0].score["sampling"].keys()
    (table,) = tables.main_tables(report(rows))
    assert [cell.text for cell in table.column("FD (digits-cnn)")] == ["8.50", "6.50"]
    assert len([group for group in compare.comparisons(report(rows)) if group.column.metric == "fd"]) == 1
    assert len(compare.lines(report([rows[2], row("b", 1, 7.0, sampling={"weights": "model"})]))) == 2


def test_which_captions_samples_were_told_is_said_and_keeps_scores_apart():
    rows = [row("a", 1, 9.0, sampling={"split": split, "seed": seed}) for split, seed in TOLD]
    for one in rows:
        del one.score["sampling"]["labels"]
    (table,) = tables.main_tables(report(rows))
    assert [cell.text for cell in table.column("captions")] == list(TOLD.values())
    assert tables.results(report(rows))["captions"].tolist() == list(TOLD.values())
    for one, said in zip(rows, TOLD.values(), strict=True):
        assert f", captions of {said}, " in compare.protocol_text(one.score)
    assert len([group for group in compare.comparisons(report(rows)) if group.column.metric == "fd"]) == 3


def test_a_precision_other_than_fp32_is_said_and_keeps_scores_apart():
    halves = {"fp32": {}, "bf16": {"precision": "bf16"}, "tf32, decoder fp16": {"precision": "tf32"}}
    halves["tf32, decoder fp16"] |= {"decoder_precision": "fp16"}
    rows = [row("a", 1, 9.0, sampling=asked) for asked in halves.values()]
    (table,) = tables.main_tables(report(rows))
    assert [cell.text for cell in table.column("computed in")] == list(halves)
    assert tables.results(report(rows))["computed in"].tolist() == list(halves)
    assert len([group for group in compare.comparisons(report(rows)) if group.column.metric == "fd"]) == 3
    assert ", computed in bf16, 1,000 samples" in compare.protocol_text(rows[1].score)
    older = report(rows[:1])
    assert "computed in" not in tables.results(older).columns and "computed" not in str(tables.main_tables(older))


TOLD = {
    ("held_out", 0): "held-out images, seed 0",
    ("train", 0): "training images, seed 0",
    ("held_out", 1): "held-out images, seed 1",
}


def test_one_state_sampled_with_several_noises_keeps_all_of_its_scores():
    drawn = [("a", 300, 9.0, 0), ("a", 300, 7.0, 1), ("b", 300, 8.0, 0), ("b", 300, 7.5, 1)]
    built = report([row(run, step, fd, sampling={"seed": noise}) for run, step, fd, noise in drawn])
    frame = tables.results(built)
    found = frame[["run", "step", "FD (digits-cnn)", "noise seed"]].itertuples(index=False, name=None)
    assert list(found) == drawn
    (table,) = tables.main_tables(built)
    assert [cell.text for cell in table.column("noise seed")] == ["0", "1", "0", "1"]
    groups = [group for group in compare.comparisons(built) if group.column.metric == "fd"]
    assert [[point.value for point in group.points] for group in groups] == [[9.0, 8.0], [7.0, 7.5]]
    assert Cells(html(built)).bold == {"8.00", "7.00"}  # what shares its noise is compared
    ways = [row("a", 300, 9.0), row("a", 300, 7.0, sampling={**guided(1.5), "seed": 1})]
    assert "noise seed" not in tables.results(report(ways)).columns


def test_a_csv_read_back_equals_the_table(tmp_path: Path):
    rows = [row('a,"b"\nc', 300, 1 / 3, stop="350"), row("b", 300, None), row("b", 300, 4.0, sampling=guided(1.5))]
    built = report(rows, FLOOR)
    page.write(built, tmp_path)
    frame = tables.results(built)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv", dtype=READ), frame, check_dtype=False)


def test_markdown_keeps_its_columns_whatever_a_run_is_called():
    text = markdown(report([row("a|b*c*\n<i>", 1, 9.0)]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert r"a\|b\*c\* \<i\>" in lines[2]


def test_html_escapes_names():
    found = html(report([row('<script>"&', 1, 9.0)]))
    assert "<script>" not in found
    assert Cells(found).rows[1][0] == '<script>"&'


def test_the_terminal_shows_names_that_look_like_markup():
    assert "[red]run[/red]" in page.text(report([row("[red]run[/red]", 1, 9.0)]))


def test_the_terminal_never_cuts_a_number():
    rows = [row("a-rather-long-name-of-a-run", 400_000, 123.46, method="HASTE", stop="250000")]
    text = page.text(report(rows, FLOOR), width=80)
    assert "…" not in text
    assert all(value in text for value in ("123.5", "400,000", "0.700", "0.500", "0.800", "3.4"))


def test_the_headline_and_the_table_round_alike():
    built = report([row("a", 1, 31.26), row("b", 1, 40.0), row("a", 2, 9.14), row("b", 2, 21.26)], FLOOR)
    assert finding.finding(built) == "At step 2 a reaches FD 9.14, b 21.26."
    assert "21.26" in markdown(built)
    assert "3.40" in finding.context(built)


def heads(built: Report) -> list[str]:
    return Cells(html(built)).rows[0]


@pytest.mark.parametrize(("fd", "text"), [(31.26, "31.3"), (9.14, "9.14"), (0.187, "0.187"), (0.0123, "0.0123")])
def test_a_distance_is_shown_to_three_digits(fd, text):
    (table,) = tables.main_tables(report([row("a", 1, fd)]))
    assert table.column("FD (digits-cnn)")[0].text == text


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert [formats.number_cell(v, 2).text for v in (-0.001, -0.01, 0.0)] == ["0.00", "-0.01", "0.00"]


def test_model_method_stop_seed_and_sampling_are_columns_only_where_they_differ():
    rows = [row("a", 1, 9.0), row("a", 2, 8.0)]
    assert heads(report(rows))[:3] == ["run", "step", "FD (digits-cnn)"]
    assert heads(report([*rows, row("b", 1, 8.0, seed=1)]))[-1] == "seeds"
    assert heads(report([*rows, row("b", 1, 8.0, method="HASTE", stop="5")]))[:4] == ["run", "method", "stop", "step"]
    assert heads(report([*rows, row("b", 1, 8.0, samples=50_000)]))[-1] == "samples"
    other = dataclasses.replace(rows[0], model="SiT-L")
    assert heads(report([*rows, other]))[:3] == ["run", "model", "step"]


def test_what_all_rows_share_is_said_below_the_table():
    (table,) = tables.main_tables(report([row("a", 1, 9.0)]))
    said = " ".join(table.notes)
    assert "Euler, 50 steps, no guidance, balanced labels, 1,000 samples against 1,500 real images." in said
    assert "Model SiT." in said
    assert "One training seed per run (0)." in said


SEEDS = [row("a", 1, value, seed=seed) for seed, value in enumerate((50.0, 52.0, 57.0))]


def test_a_scores_own_notes_are_repeated_below_the_table_with_the_rows_that_they_are_of():
    both, some = "KID: over all pairs", "12 of 1,000 samples are black"
    rows = [row("a", 100, 50.0, notes=[both]), row("b", 2000, 60.0, notes=[some, both])]
    (table,) = tables.main_tables(report(rows))
    assert {"KID: over all pairs.", "b at step 2,000: 12 of 1,000 samples are black."} <= set(table.notes)


def test_seeds_are_one_line_of_mean_and_sample_standard_deviation():
    (table,) = tables.main_tables(report([*SEEDS, *(row("b", 1, 60.0, seed=s) for s in range(3))]))
    cell = table.column("FD (digits-cnn)")[0]
    values = [50.0, 52.0, 57.0]
    mean = sum(values) / 3
    spread = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
    assert (cell.value, cell.spread) == (pytest.approx(mean), pytest.approx(spread))
    assert cell.text + cell.around == "53.0 ± 3.6"
    assert "over 3 training seeds" in " ".join(table.notes)
    assert len(table.entries) == 2
    for text in (html(report(SEEDS)), markdown(report(SEEDS)), page.text(report(SEEDS))):
        assert "± 3.6" in text
    assert r"53.0 $\pm$ 3.6" in latex(report(SEEDS))
    assert formats.to_csv(table).splitlines()[0].startswith("run,step,FD (digits-cnn),FD (digits-cnn) ±,")


def test_a_line_that_misses_a_seed_has_no_mean_and_is_never_the_best():
    built = report([*SEEDS[:2], row("b", 1, 60.0), row("c", 1, 70.0)], seeds={"a": [0, 1, 2], "b": [0], "c": [0]})
    (table,) = tables.main_tables(built)
    first, second, _ = table.column("FD (digits-cnn)")
    assert (first.text, first.around, first.value, first.bold) == ("50.0; 52.0", "", None, False)
    assert second.bold
    assert table.column("seeds")[0].text == "2 of 3: 2 missing"
    assert "without a mean" in " ".join(table.notes)


def test_every_seed_is_a_line_of_the_csv():
    assert tables.results(report(SEEDS))[["seed", "FD (digits-cnn)"]].values.tolist() == [[0, 50], [1, 52], [2, 57]]


def test_scores_of_several_detectors_are_columns_of_one_line():
    other = {"name": "other", "identity": "o"}
    floors = [FLOOR, {**FLOOR, "detector": other, "scores": {"fd": 0.5}}]
    built = report([row("a", 1, 9.0), row("a", 1, 2.0, detector=other), row("b", 1, 8.0)])
    built = dataclasses.replace(built, floors=floors)
    (table,) = tables.main_tables(built)
    assert [cell.text for cell in table.column("FD (other)")] == ["2.00", "–", "0.50"]
    assert [cell.text for cell in table.column("FD (digits-cnn)")] == ["9.00", "8.00", "3.40"]
    assert len(tables.results(built)) == 3


def test_a_scores_own_error_bar_stands_beside_it_and_is_no_column():
    scores = {"kid": 0.5, "kid_std": 0.0125, "fd": 9.0}
    built = report([row("a", 1, 9.0, scores=scores)])
    (table,) = tables.main_tables(built)
    assert [head.name for head in table.heads] == ["run", "step", "FD (digits-cnn)", "KID (digits-cnn)"]
    assert (cell := table.column("KID (digits-cnn)")[0]).text + cell.around == "0.500 ± 0.013"
    assert tables.results(built)["KID (digits-cnn) error"].tolist() == [0.0125]


def test_guided_results_have_a_table_of_their_own_with_scale_and_interval():
    rows = [row("a", 1, 9.0), row("a", 1, 4.0, sampling=guided(1.5)), row("a", 1, 3.0, sampling=guided(1.25, 0, 0.7))]
    plain, other = tables.main_tables(report(rows))
    assert (plain.name, other.name) == ("results", "guided")
    assert [cell.text for cell in plain.column("FD (digits-cnn)")] == ["9.00"]
    assert [cell.text for cell in other.column("FD (digits-cnn)")] == ["4.00", "3.00"]
    assert [cell.text for cell in other.column("w")] == ["1.5", "1.25"]
    assert [cell.text for cell in other.column("interval")] == ["[0, 1]", "[0, 0.7]"]
    assert not any(cell.bold for cell in other.column("FD (digits-cnn)"))  # two scales are not one comparison


def test_lines_are_grouped_by_model_and_step():
    rows = [dataclasses.replace(row(m, s, 9.0), model=m) for s in (2, 1) for m in ("L", "S")]
    (table,) = tables.main_tables(report(rows))
    found = [(e.cells[1].text, e.cells[2].text, e.first) for e in table.entries]
    assert found == [("L", "1", True), ("L", "2", True), ("S", "1", True), ("S", "2", True)]


def test_latex_is_a_table_of_booktabs_with_as_many_cells_in_every_line():
    built = report([row("50% & more_{}", 1, 9.0), row("b~^\\", 1, 8.0), row("c", 2, None)], FLOOR)
    lines = latex(built).splitlines()
    rules = [line for line in lines if line.endswith("rule")]
    assert rules == [r"\toprule", r"\midrule", r"\midrule", r"\midrule", r"\bottomrule"]
    rows = [line for line in lines if line.endswith(r"\\")]
    columns = re.search(r"tabular}{([lr]+)}", latex(built))
    assert columns is not None
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {len(columns[1])}
    assert r"50\% \& more\_\{\}" in rows[1]
    assert r"b\textasciitilde{}\textasciicircum{}\textbackslash{}" in rows[2]
    assert r"\textbf{8.00}" in rows[2]
    assert r"FD (digits-cnn) $\downarrow$" in rows[0]
    assert r"recall $\uparrow$" in rows[0]
    assert latex(built).count("{") == latex(built).count("}")


def test_every_sign_that_a_report_writes_and_every_greek_letter_is_known_to_plain_latex():
    sources = "".join(path.read_text() for path in Path(formats.__file__).parent.glob("*.py"))
    signs = {c for c in sources if not c.isascii() and not unicodedata.name(c).startswith("LATIN")}
    greek = {chr(n) for n in [*range(0x391, 0x3AA), *range(0x3B1, 0x3CA)] if n not in (0x3A2, 0x3C2)}
    for sign in signs | greek | {"≥"}:
        (entry,) = [
            line for line in latex(report([row(f"a{sign}b", 1, 9.0), row("c", 1, 8.0)])).splitlines() if "9.0" in line
        ]
        assert entry.isascii(), sign
    assert r"$\lambda$" in latex(report([row("λ", 1, 9.0), row("Größe", 1, 8.0)]))
    assert "Größe" in latex(report([row("λ", 1, 9.0), row("Größe", 1, 8.0)]))


def test_the_finding_is_computed_from_the_last_step_that_all_runs_reached():
    rows = [row("vanilla", 600, 76.3), row("HASTE", 600, 52.1), row("HASTE", 900, 20.0), row("vanilla", 300, 90.0)]
    assert finding.finding(report(rows)) == "At step 600 HASTE reaches FD 52.1, vanilla 76.3."


def test_the_finding_says_so_when_the_baseline_wins():
    rows = [row("vanilla", 600, 50.0), row("HASTE", 600, 52.1)]
    assert finding.finding(report(rows)) == "At step 600 vanilla reaches FD 50.0, HASTE 52.1."


def test_the_finding_calls_runs_of_one_method_by_their_names():
    rows = [row(n, 1000, v, method="HASTE") for n, v in (("early", 30.0), ("late", 40.0))] + [
        row("vanilla", 1000, 60.0)
    ]
    assert finding.finding(report(rows)) == "At step 1,000 early reaches FD 30.0, late 40.0, vanilla 60.0."


def test_the_finding_averages_seeds_and_says_the_spread():
    rows = [row("HASTE", 600, v, seed=s) for s, v in enumerate((50.0, 52.0, 54.0))]
    assert finding.finding(report(rows)) == "At step 600 HASTE reaches FD 52.0 ± 2.0."
    assert "3 seeds" in finding.context(report(rows))


def test_the_finding_says_where_seeds_are_missing():
    built = report([row("a", 1, 50.0), row("a", 1, 52.0, seed=1)], seeds={"a": [0, 1, 2]})
    assert finding.finding(built) == "At step 1 a reaches FD 51.0 (2 of 3 seeds)."


def test_the_finding_never_sets_a_guided_run_beside_an_unguided_one():
    rows = [row("vanilla", 600, 76.3), row("HASTE", 600, 5.0, sampling=guided(1.5))]
    assert finding.finding(report(rows)) == "At step 600 vanilla reaches FD 76.3."


def test_the_finding_speaks_of_what_most_runs_were_scored_in():
    quick = {"sampling": {"sampler": "heun"}}
    rows = [row("vanilla", 600, 11.0, **quick), row("vanilla", 600, 76.3), row("HASTE", 600, 52.1)]
    assert finding.finding(report(rows)) == "At step 600 HASTE reaches FD 52.1, vanilla 76.3."


def test_the_finding_keeps_vanilla_among_many_runs():
    rows = [row(f"r{i}", 600, 10.0 + i, method="HASTE") for i in range(6)] + [row("vanilla", 600, 99.0)]
    assert finding.finding(report(rows)) == (
        "At step 600 r0, the lowest of 7 runs, reaches FD 10.0, r1 11.0, r2 12.0, r3 13.0, vanilla 99.0."
    )


def test_nothing_scored_is_said_and_not_an_error():
    assert finding.finding(report([])) == "No scores yet."
    assert tables.results(report([])).empty
    assert page.text(report([]))
    assert "real against real" in html(report([], FLOOR))
    assert tables.results(report([], FLOOR))["run"].tolist() == [tables.FLOOR_NAME]


def test_a_row_that_is_no_score_is_refused_by_name():
    broken = Row("a", "SiT", "HASTE", "–", 0, 600, {"kind": "samples"})
    with pytest.raises(ValueError, match=r"run 'a', step 600: found keys \['kind'\], expected a score"):
        tables.results(report([broken]))


PUBLISHED = Path(tables.__file__).parent / "published"


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.csv")), ids=lambda path: path.name)
def test_published_numbers_are_whole_and_every_column_is_explained(path: Path):
    with open(path, newline="") as file:
        header, *lines = list(csv.reader(file))
    explained = (PUBLISHED / "README.md").read_text()
    assert lines
    assert all(len(line) == len(header) and line[-1].startswith(("REPA ", "HASTE ")) for line in lines)
    assert path.name in explained
    assert [name for name in header if f"`{name}`" not in explained] == []


def test_evaluations_that_were_counted_are_shown_as_their_mean_and_two_names_of_one_sampling_compare():
    adaptive = {"sampler": "dopri5", "steps": None, "preset": None}
    found = report([row("a", 1, 2.0, nfe=103.4375, sampling=adaptive), row("b", 1, 3.0)])
    assert tables.results(found)["NFE"].tolist() == [103.4375, 50.0]
    (table,) = tables.main_tables(found)
    assert [cell.text for cell in table.column("NFE")] == ["103.4", "50.0"]
    named = [row("a", 1, 2.0, sampling={"preset": "ode-50"}), row("b", 1, 3.0, sampling={"preset": None})]
    assert all(len(group.points) == 2 for group in compare.comparisons(report(named)))
