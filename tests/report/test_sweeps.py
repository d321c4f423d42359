"""Figures of guidance sweeps: what varies is along the bottom, all else is the same for a line."""

from __future__ import annotations

import csv
import re

import pytest

from haste.report import page, papers, sweeps
from haste.report.content import Benchmark, Report, Row

IMAGENET = Benchmark("ImageNet", 256)
TABLE = list(csv.DictReader((papers.FOLDER / "imagenet256_cfg.csv").open()))


def row(w: float, high: float, fd: float, run: str = "a", seed: int = 0, **how) -> Row:
    score = {
        "detector": {"name": "inception", "kind": how.get("kind", "inception")},
        "scores": {"fd": fd},
        "samples": 50_000,
        "sampling": {"sampler": how.get("sampler", "heun"), "steps": 250, "guidance": w, "interval": [0, high]},
        "state": {"trajectory": run, "step": 4_000_000},
    }
    return Row(run, "SiT-XL/2", "REPA", "never", seed, how.get("step", 4_000_000), score, {"batch": "256"})


def panels(*rows: Row, benchmark=IMAGENET, **more):
    return sweeps.guidance_panels(Report("n", "t", "", rows, [], [], [], [], [], {}, "", benchmark=benchmark, **more))


def lowest(panel) -> str:
    return re.search('Lowest: ([^"]*)"', panel.svg)[1]


def test_a_sweep_of_the_scale_has_a_figure_over_w_with_what_papers_print():
    (panel,) = panels(row(1.3, 1, 1.9), row(1.35, 1, 1.85), row(1.4, 1, 1.95))
    assert panel.title == "FID, SiT-XL/2, step 4,000,000" and "guidance scale w" in panel.caption
    assert "Dotted: REPA, REPA Table 9; REPA, REPA Table 10." in panel.caption
    assert "REPA, REPA Table 9, [0, 1]: 1.79 at 1.325" in lowest(panel)
    assert "REPA, REPA Table 10, [0, 0.7]: 1.42 at 1.8" in lowest(panel)
    assert lowest(panel).endswith("a, [0, 1]: 1.85 at 1.35")


def test_a_sweep_of_the_interval_has_a_figure_over_its_end():
    (panel,) = panels(row(2.0, 0.6, 1.6), row(2.0, 0.7, 1.5), row(2.0, 0.8, 2.2))
    assert "upper end of the guidance interval" in panel.caption
    assert lowest(panel) == "REPA, REPA Table 10, w = 2: 1.44 at 0.65; a, w = 2: 1.5 at 0.7"


def test_both_are_drawn_of_a_grid_of_scales_and_intervals():
    grid = [row(w, high, w + high) for w in (1.5, 2.0) for high in (0.6, 0.7)]
    first, second = panels(*grid, benchmark=None)
    assert lowest(first) == "a, [0, 0.6]: 2.1 at 1.5; a, [0, 0.7]: 2.2 at 1.5"
    assert lowest(second) == "a, w = 1.5: 2.1 at 0.6; a, w = 2: 2.6 at 0.6"
    assert ">w = 1.5<" in second.svg and "Dotted" not in first.caption


@pytest.mark.parametrize(
    "other",
    [row(1.4, 1, 1.9, sampler="euler"), row(1.4, 1, 1.9, step=1000), row(1.4, 0.7, 1.9), row(1.0, 1, 1.9)],
    ids=["sampler", "step", "interval", "no guidance"],
)
def test_what_differs_in_more_than_the_guidance_is_no_sweep(other: Row):
    assert panels(row(1.3, 1, 1.8), other) == []


def test_a_point_of_a_missing_seed_is_left_out_and_of_several_is_a_mean():
    rows = [row(w, 1, w + seed, seed=seed) for w in (1.3, 1.5) for seed in (0, 1)]
    (panel,) = panels(*rows, benchmark=None, seeds={"a": [0, 1]})
    assert lowest(panel) == "a, [0, 1]: 1.8 at 1.3"
    assert panels(*rows[1:], benchmark=None, seeds={"a": [0, 1]}) == []


def test_distances_of_another_network_have_no_published_line():
    (panel,) = panels(row(1.3, 1, 8.0, kind="cnn"), row(1.4, 1, 9.0, kind="cnn"))
    assert "Dotted" not in panel.caption and panel.title.startswith("FD (inception)")


def test_every_guided_number_of_the_papers_is_on_a_line_where_its_table_sweeps():
    """Over w or over the interval's end; the others of their step vary both at once, or nothing."""
    for model, method, step in {(line["model"], line["method"], int(line["iteration"])) for line in TABLE}:
        one = Row("a", model, method, "never", 0, step, row(1.5, 1, 2.0).score, {})
        found = papers.of_model(one, IMAGENET)
        mine = [
            line for line in TABLE if (line["model"], line["method"], int(line["iteration"])) == (model, method, step)
        ]
        printed = [p for p in found if p.step == step and p.guidance[0] > 1]
        assert sorted(float(p.scores["fd"]) for p in printed) == sorted(float(line["fid"]) for line in mine)


def test_the_page_has_the_figures_below_those_over_steps(tmp_path):
    rows = [row(1.3, 1, 1.9), row(1.4, 1, 1.95)]
    page.write(Report("n", "t", "", rows, [], [], [], [], [], {}, ""), tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "Over guidance" in text and 'href="#scores"' in text
