"""Accuracy of linear probes beside distances: a column next to the papers', and a figure."""

from __future__ import annotations

import pytest

from haste.report import page, probes, tables
from haste.report.content import Benchmark, Measured, Report, Row

IMAGENET = Benchmark("ImageNet", 256)
SETTINGS = {"batch": "256", "teacher": "DINOv2-B", "layers": "depth 4"}


def scored(run: str, step: int, fd: float, seed: int = 0, method: str = "REPA", kind: str = "inception") -> Row:
    score = {
        "detector": {"name": kind, "kind": kind},
        "scores": {"fd": fd, "is": 30.0},
        "samples": 50_000,
        "sampling": {"sampler": "euler-maruyama", "steps": 250, "guidance": 1.0},
        "state": {"trajectory": run, "step": step},
    }
    return Row(run, "SiT-B/2", method, "never", seed, step, score, SETTINGS)


def probed(run: str, step: int, *accuracies: float, seed: int = 0, kind: str = "probe", value: str = "accuracy"):
    rows = [{"layer": i % 3 + 1, "t": 0.1 * (i // 3), value: a, "error": 0.01} for i, a in enumerate(accuracies)]
    found = {"measure": kind, "settings": {}, "axes": ["layer", "t"], "values": {value: "error"}, "rows": rows}
    state = {"trajectory": run, "step": step, "file": "f"}
    return Measured("lin", run, seed, step, {**found, "notes": [], "state": state, "provenance": {}}, "lin.json")


def report(rows, measures, benchmark=IMAGENET, **more) -> Report:
    return Report("n", "t", "", rows, [], [], [], [], [], {}, "", benchmark=benchmark, measures=measures, **more)


ROWS = [scored("a", 50_000, 80.0), scored("a", 100_000, 50.0), scored("plain", 400_000, 34.0, method="vanilla")]
PROBES = [probed("a", 50_000, 0.40, 0.44, 0.41, 0.42), probed("a", 100_000, 0.50, 0.515)]


def test_the_best_accuracy_in_percent_stands_beside_the_published_one_and_leads_to_its_file():
    (table,) = tables.published_tables(report(ROWS, PROBES))
    found = list(zip(*(table.column(name) for name in ("run", "step", "Acc.")), strict=True))
    assert [tuple(cell.text for cell in cells) for cells in found] == [
        ("a", "50,000", "44.0"),
        ("REPA Table 8", "50,000", "43.2"),
        ("a", "100,000", "51.5"),
        ("REPA Table 8", "100,000", "50.9"),
        ("plain", "400,000", "–"),
        ("REPA Table 8", "400,000", "–"),
    ]
    assert [cells[2].link for cells in found] == ["made-measure-0", "", "made-measure-1", "", "", ""]


def test_without_a_probe_there_is_neither_column_nor_figure():
    others = [probed("a", 50_000, 0.4, kind="cknna"), probed("a", 50_000, 0.4, value="loss"), probed("a", 50_000)]
    for measures in ([], others):
        built = report(ROWS, measures)
        (table,) = tables.published_tables(built)
        assert "Acc." not in [head.name for head in table.heads]
        assert probes.scatter(built) is None


def test_distances_are_drawn_against_accuracies_with_the_published_pairs_of_the_same_model():
    panel = probes.scatter(report(ROWS, PROBES))
    assert panel is not None
    assert "a 50 at 51.5 %" in panel.svg and "plain" not in panel.svg
    assert "Rings: what papers print for SiT-B/2, 50,000 samples." in panel.caption
    for rows, benchmark in ((ROWS, None), ([scored("a", 50_000, 80.0, kind="cnn")], IMAGENET)):
        panel = probes.scatter(report(rows, PROBES, benchmark))
        assert panel is not None and "Rings" not in panel.caption


def test_over_seeds_an_accuracy_is_a_mean_with_its_spread_and_none_while_a_seed_is_missing():
    rows = [scored("a", 100_000, 50.0 + seed, seed) for seed in (0, 1)]
    both = [probed("a", 100_000, 0.50, seed=0), probed("a", 100_000, 0.52, seed=1)]
    (table,) = tables.published_tables(report(rows, both, seeds={"a": [0, 1]}))
    cell = table.column("Acc.")[0]
    assert (cell.text, cell.spread) == ("51.0", pytest.approx(2**0.5))
    assert probes.accuracies(report(rows, both[:1], seeds={"a": [0, 1]})) == {}


def test_the_page_shows_the_figure(tmp_path):
    page.write(report(ROWS, PROBES), tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "Distance against accuracy" in text and "Acc." in text
