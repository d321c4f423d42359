"""Figures: what a line is made of, and that an SVG can stand in a page with others."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from haste.report import figures
from haste.report.content import Curve, Report, Row

DETECTOR = {"name": "cnn$x_1$", "identity": "d"}


def row(run: str, step: int, fd: float, stop: str = "–") -> Row:
    score = {"detector": DETECTOR, "scores": {"fd": fd, "class_accuracy": 0.5}, "samples": 10}
    return Row(run, "SiT", "HASTE", stop, 0, step, score)


def report(rows: list[Row], curves: list[Curve], floor: float | None = None) -> Report:
    real = [] if floor is None else [{"detector": DETECTOR, "scores": {"fd": floor}}]
    return Report("n", "t", "", rows, real, curves, [], [], [], {}, "")


def curve(run: str, **values: list) -> Curve:
    steps = range(1, 1 + len(next(iter(values.values()))))
    return Curve(run, 0, [{"step": s} | {k: v[s - 1] for k, v in values.items()} for s in steps])


TWO = [row("a", 100, 50.0, "150"), row("a", 200, 20.0, "150"), row("b", 100, 60.0), row("b", 200, 40.0)]


def test_a_run_has_one_colour_in_every_figure():
    lines = [curve("b", loss=[1.0, 0.9]), curve("a", loss=[1.0, 0.8])]
    built = report(TWO, lines)
    style = figures.styles(built)
    assert style["a"].colour != style["b"].colour
    for panel in figures.score_panels(built) + figures.loss_panels(built):
        assert style["a"].colour.lower() in panel.svg
        assert style["b"].colour.lower() in panel.svg


def test_runs_that_share_a_colour_differ_in_their_dashes():
    style = figures.styles(report([row(f"r{i}", 1, 1.0) for i in range(12)], []))
    assert len({(s.colour, s.dash) for s in style.values()}) == 12


def test_the_stop_is_marked_on_runs_that_stop():
    (panel, *_) = figures.score_panels(report(TWO, []))
    assert "stop 150" in panel.svg
    (panel, *_) = figures.score_panels(report([row("b", 100, 6.0, "never"), row("b", 200, 4.0, "never")], []))
    assert "stop" not in panel.svg


def test_a_stop_of_some_seeds_alone_is_marked_nowhere():
    stop = "features 150 by plateau in 1 of 3 seeds, attention 120 by plateau"
    (panel, *_) = figures.score_panels(report([row("b", 100, 6.0, stop), row("b", 200, 4.0, stop)], []))
    assert "stop 120" in panel.svg and "stop 150" not in panel.svg


def test_a_point_lies_where_its_value_is():
    # Three points on a line by construction, so the middle one must lie halfway in the drawing too.
    (panel, *_) = figures.score_panels(report([row("a", s, v) for s, v in ((0, 10.0), (50, 20.0), (100, 30.0))], []))
    colour = figures.PALETTE[0].lower()
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {colour}', panel.svg)
    assert path is not None
    xy = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1]), dtype=float)
    assert xy.shape == (3, 2)
    np.testing.assert_allclose(xy[1], (xy[0] + xy[2]) / 2, atol=1e-3)
    assert xy[0][0] < xy[2][0]
    assert xy[0][1] > xy[2][1]  # SVG counts downwards


def test_an_axis_is_logarithmic_only_where_values_span_much():
    wide = figures.score_panels(report([row("a", s, v) for s, v in ((0, 1.0), (50, 10.0), (100, 100.0))], []))[0].svg
    colour = figures.PALETTE[0].lower()
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {colour}', wide)
    assert path is not None
    y = np.array(re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1]), dtype=float)
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=1e-3)  # equal ratios, equal distances


def test_the_floor_is_drawn_and_said():
    (with_floor, *_), (without, *_) = (figures.score_panels(report(TWO, [], floor)) for floor in (3.5, None))
    assert "3.5" in with_floor.caption
    assert "floor" in with_floor.svg
    assert "floor" not in without.svg


def test_scores_of_a_single_step_make_no_figure():
    assert figures.score_panels(report([row("a", 100, 50.0), row("b", 100, 60.0)], [])) == []


def test_quantities_nobody_logged_have_no_figure():
    built = report(TWO, [curve("a", loss=[1.0, 0.9], features=[None, None])])
    assert [panel.title for panel in figures.loss_panels(built)] == ["denoising loss"]


def test_the_parts_of_a_processs_loss_are_drawn_where_a_run_has_them():
    built = report(
        TWO, [curve("a", loss=[1.0, 0.9], denoising=[1.0, 0.9], mse=[0.9, 0.8], vlb=[0.1, 0.1], grad_norm=[1, 1])]
    )
    titles = [panel.title for panel in figures.loss_panels(built)]
    assert titles == ["denoising loss", "mse, of the denoising loss", "vlb, of the denoising loss"]


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 1, "loss": math.nan}]])
def test_empty_curves_do_not_break(records: list):
    assert figures.loss_panels(report([], [Curve("a", 0, records)])) == []


def test_a_curve_of_one_record_is_drawn():
    assert len(figures.loss_panels(report([], [curve("a", loss=[1.0])]))) == 1


def test_smoothing_agrees_with_the_weighted_sum_it_stands_for():
    values = np.random.default_rng(0).normal(size=200)
    steps, smooth = figures.series(curve("a", loss=list(values)), "loss")
    weights = 0.5 ** (np.arange(200)[::-1] / (200 / 50))
    assert smooth[-1] == pytest.approx(float((weights * values).sum() / weights.sum()))
    assert smooth[0] == pytest.approx(values[0])
    assert steps.tolist() == list(range(1, 201))


def test_smoothing_never_shows_an_effect_before_its_cause():
    _, smooth = figures.series(curve("a", loss=[1.0] * 100 + [2.0] * 100), "loss")
    np.testing.assert_allclose(smooth[:100], 1.0)


def test_a_jump_of_the_speed_stays_a_jump():
    _, speed = figures.series(curve("a", images_per_s=[500.0] * 100 + [750.0] * 100), "images_per_s")
    assert speed.tolist() == [500.0] * 100 + [750.0] * 100


def test_long_logs_are_reduced_without_losing_their_mean():
    values = np.random.default_rng(1).normal(size=4000)
    steps, binned = figures.series(curve("a", loss=list(values)), "loss")
    assert len(steps) == len(binned) == figures.POINTS
    assert steps.mean() == pytest.approx(2000.5)


class Ids(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.references.append(str(value).removeprefix("#"))
            self.references += re.findall(r"url\(#([^)]*)\)", str(value))


def test_figures_do_not_disturb_one_another_in_one_page():
    built = report(TWO, [curve("a", loss=[1.0, 0.9], features=[-0.1, -0.2])], floor=3.0)
    panels = figures.score_panels(built) + figures.loss_panels(built)
    found = Ids("".join(panel.svg for panel in panels))
    assert len(panels) == 4
    assert len(found.ids) == len(set(found.ids))
    assert found.references
    assert set(found.references) <= set(found.ids)


def test_a_figure_is_well_formed_and_says_what_it_shows():
    panel = figures.score_panels(report([row('"a" <b>', 1, 2.0), row('"a" <b>', 2, 1.0)], []))[0]
    root = ElementTree.fromstring(panel.svg)
    assert root.get("role") == "img"
    assert '"a" <b> 1 at step 2' in str(root.get("aria-label"))
    assert "cnn$x_1$" in "".join(root.itertext())  # not read as mathematics
    assert "#010203" not in panel.svg
    assert "http" not in panel.svg
