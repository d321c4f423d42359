"""The table: what stands in which column, what may be compared, what is said of it."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from haste.report import tables
from haste.report.tables import Report, Row

READ = {name: "Int64" for name in tables.NUMBERS} | {"run": str, "model": str, "method": str, "stop": str}


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


def report(rows: list[Row], floor: dict | None = None) -> Report:
    return Report("digits", "Digits", "", rows, floor, [], [], [], [], {}, "")


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
    assert list(frame.columns) == [*tables.IDENTITY, *scores, "sampler", "NFE", "guidance", "labels", "samples"]
    assert frame.loc[0, ["run", "step", "FD (digits-cnn)", "NFE", "samples"]].tolist() == [
        "vanilla",
        300,
        61.2,
        50,
        1000,
    ]


def test_the_detectors_name_comes_from_the_data():
    frame = tables.results(report([row("a", 1, 5.0, detector={"name": "inception", "identity": "i"})]))
    assert frame["FD (inception)"].tolist() == [5.0]


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
    assert tables.guidance_text(score(1.0, sampling=guided(1.0, 0, 0.7))) == "none"


def test_the_floor_is_the_last_line_of_every_form(tmp_path: Path):
    built = report([row("a", 1, 9.0), row("b", 1, 8.0)], FLOOR)
    frame = tables.results(built)
    assert frame.iloc[-1]["run"] == tables.FLOOR_NAME
    assert frame.iloc[-1]["FD (digits-cnn)"] == 3.4
    assert frame.iloc[-1]["samples"] == 750
    assert tables.to_markdown(built).strip().splitlines()[-1].startswith("| real against real |")
    assert Cells(tables.to_html(built)).rows[-1][0] == tables.FLOOR_NAME
    assert next(line for line in tables.to_text(built).splitlines() if "real against" in line).split()[-2:] == [
        "–",
        "–",
    ]


def test_the_floor_stands_only_under_its_own_detector():
    built = report([row("a", 1, 9.0), row("a", 1, 2.0, detector={"name": "other", "identity": "o"})], FLOOR)
    last = tables.results(built).iloc[-1]
    assert last["FD (digits-cnn)"] == 3.4
    assert pd.isna(last["FD (other)"])


def test_the_best_of_each_step_is_bold_and_the_floor_never_is():
    built = report([row("a", 1, 9.0), row("b", 1, 8.5), row("a", 2, 7.25), row("b", 2, 7.5)], FLOOR)
    assert Cells(tables.to_html(built)).bold == {"8.50", "7.25"}
    assert set(re.findall(r"\*\*(.*?)\*\*", tables.to_markdown(built))) == {"8.50", "7.25"}


def test_higher_is_better_for_accuracy():
    rows = [row(n, 1, 9.0, scores={"class_accuracy": v}) for n, v in (("a", 0.5), ("b", 0.9))]
    assert Cells(tables.to_html(report(rows))).bold == {"0.900"}


@pytest.mark.parametrize("changes", [{"samples": 5000}, {"sampling": {"steps": 250}}, {"reference": {"images": 10}}])
def test_scores_measured_in_different_ways_are_not_ranked(changes: dict):
    assert Cells(tables.to_html(report([row("a", 1, 9.0), row("b", 1, 8.0, **changes)]))).bold == set()


def test_the_seed_of_the_noise_does_not_keep_scores_apart():
    built = report([row("a", 1, 9.0), row("b", 1, 8.0, sampling={"seed": 7})])
    assert len([g for g in tables.comparisons(built) if g.column.metric == "fd"]) == 1


def test_a_csv_read_back_equals_the_table(tmp_path: Path):
    rows = [row('a,"b"\nc', 300, 1 / 3, stop="350"), row("b", 300, None), row("b", 300, 4.0, sampling=guided(1.5))]
    built = report(rows, FLOOR)
    tables.to_csv(built, tmp_path / "results.csv")
    frame = tables.results(built)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv", dtype=READ), frame, check_dtype=False)
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_markdown_keeps_its_columns_whatever_a_run_is_called():
    lines = tables.to_markdown(report([row("a|b*c*\n<i>", 1, 9.0)])).strip().splitlines()
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert r"a\|b\*c\* \<i\>" in lines[2]


def test_html_escapes_names():
    html = tables.to_html(report([row('<script>"&', 1, 9.0)]))
    assert "<script>" not in html
    assert Cells(html).rows[1][0] == '<script>"&'


def test_the_terminal_shows_names_that_look_like_markup():
    assert "[red]run[/red]" in tables.to_text(report([row("[red]run[/red]", 1, 9.0)]))


def test_the_terminal_never_cuts_a_number():
    rows = [row("a-rather-long-name-of-a-run", 400_000, 123.46, method="HASTE", stop="250000")]
    text = tables.to_text(report(rows, FLOOR), width=80)
    assert "…" not in text
    assert all(value in text for value in ("123.5", "400,000", "0.700", "0.500", "0.800", "3.4"))


def test_the_headline_and_the_table_round_alike():
    built = report([row("a", 1, 31.26), row("b", 1, 40.0), row("a", 2, 9.14), row("b", 2, 21.26)], FLOOR)
    assert tables.finding(built) == "At step 2 a reaches FD 9.14, b 21.26."
    assert "21.26" in tables.to_markdown(built)
    assert "3.40" in tables.context(built)


def test_model_and_seed_show_only_where_they_differ():
    rows = [row("a", 1, 9.0), row("a", 1, 8.0, seed=1)]
    assert Cells(tables.to_html(report(rows[:1]))).rows[0][:3] == ["run", "method", "stop"]
    assert Cells(tables.to_html(report(rows))).rows[0][:4] == ["run", "method", "stop", "seed"]


def test_the_finding_is_computed_from_the_last_step_that_all_runs_reached():
    rows = [row("vanilla", 600, 76.3), row("HASTE", 600, 52.1), row("HASTE", 900, 20.0), row("vanilla", 300, 90.0)]
    assert tables.finding(report(rows)) == "At step 600 HASTE reaches FD 52.1, vanilla 76.3."


def test_the_finding_says_so_when_the_baseline_wins():
    rows = [row("vanilla", 600, 50.0), row("HASTE", 600, 52.1)]
    assert tables.finding(report(rows)) == "At step 600 vanilla reaches FD 50.0, HASTE 52.1."


def test_the_finding_calls_runs_of_one_method_by_their_names():
    rows = [row(n, 1000, v, method="HASTE") for n, v in (("early", 30.0), ("late", 40.0))] + [
        row("vanilla", 1000, 60.0)
    ]
    assert tables.finding(report(rows)) == "At step 1,000 early reaches FD 30.0, late 40.0, vanilla 60.0."


def test_the_finding_averages_seeds_and_says_the_spread():
    rows = [row("HASTE", 600, v, seed=s) for s, v in enumerate((50.0, 52.0, 54.0))]
    assert tables.finding(report(rows)) == "At step 600 HASTE reaches FD 52.0 ± 2.0."
    assert "3 seeds" in tables.context(report(rows))


def test_the_finding_never_sets_a_guided_run_beside_an_unguided_one():
    rows = [row("vanilla", 600, 76.3), row("HASTE", 600, 5.0, sampling=guided(1.5))]
    assert tables.finding(report(rows)) == "At step 600 vanilla reaches FD 76.3."


def test_the_finding_speaks_of_what_most_runs_were_scored_in():
    quick = {"sampling": {"sampler": "heun"}}
    rows = [row("vanilla", 600, 11.0, **quick), row("vanilla", 600, 76.3), row("HASTE", 600, 52.1)]
    assert tables.finding(report(rows)) == "At step 600 HASTE reaches FD 52.1, vanilla 76.3."


def test_the_finding_keeps_vanilla_among_many_runs():
    rows = [row(f"r{i}", 600, 10.0 + i, method="HASTE") for i in range(6)] + [row("vanilla", 600, 99.0)]
    assert tables.finding(report(rows)) == (
        "At step 600 r0, the best of 7 runs, reaches FD 10.0, r1 11.0, r2 12.0, r3 13.0, vanilla 99.0."
    )


def test_nothing_scored_is_said_and_not_an_error():
    assert tables.finding(report([])) == "No scores yet."
    assert tables.results(report([])).empty
    assert tables.to_text(report([]))
    assert "real against real" in tables.to_html(report([], FLOOR))
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
    assert "| 103.4 |" in tables.to_markdown(found) and "| 50.0 |" in tables.to_markdown(found)
    named = [row("a", 1, 2.0, sampling={"preset": "ode-50"}), row("b", 1, 3.0, sampling={"preset": None})]
    assert all(len(group.points) == 2 for group in tables.comparisons(report(named)))
