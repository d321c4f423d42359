"""Speed-ups: read off between measured points, and nothing claimed beyond them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from haste.report import finding
from haste.report.content import Report, Row


def row(run: str, step: int, fd: float, seed: int = 0, **sampling) -> Row:
    score = {"detector": {"name": "cnn"}, "scores": {"fd": fd}, "sampling": sampling, "samples": 10}
    return Row(run, "SiT", run.split()[0], "–", seed, step, score)


def report(curves: dict[str, dict[int, float]], **more) -> Report:
    rows = [row(run, step, fd) for run, curve in curves.items() for step, fd in curve.items()]
    return Report("n", "t", "", rows, [], [], [], [], [], {}, "", **more)


def said(curves: dict[str, dict[int, float]]) -> list[str]:
    return [str(one) for one in finding.speedups(report(curves))]


def test_a_distance_is_read_off_on_a_line_in_its_logarithm():
    # Halves every 100 steps: 40, 20, 10, 5; so 13.1 is reached log2(40 / 13.1) hundreds after step 100.
    curves = {"vanilla": {200: 30.0, 400: 13.1}, "HASTE": {100: 40.0, 200: 20.0, 300: 10.0, 400: 5.0}}
    (one,) = finding.speedups(report(curves))
    assert one.at == pytest.approx(100 + 100 * math.log2(40 / 13.1))
    assert one.ratio == pytest.approx(400 / one.at)
    assert str(one) == "HASTE reaches vanilla's FD of step 400 (13.10) at step 261: 1.5×."


def test_at_a_measured_point_the_measured_step_is_said():
    curves = {"vanilla": {400: 10.0}, "HASTE": {100: 40.0, 200: 10.0, 300: 5.0}}
    assert said(curves) == ["HASTE reaches vanilla's FD of step 400 (10.00) at step 200: 2.0×."]


def test_before_the_first_measured_step_only_a_bound_is_claimed():
    curves = {"vanilla": {400: 13.0}, "HASTE": {200: 12.0, 400: 5.0}}
    assert said(curves) == ["HASTE reaches vanilla's FD of step 400 (13.00) at step 200 or before: at least 2.0×."]


def test_after_the_last_measured_step_nothing_is_claimed():
    curves = {"vanilla": {400: 13.0}, "HASTE": {200: 30.0, 400: 13.5}}
    assert said(curves) == ["HASTE does not reach vanilla's FD of step 400 (13.0) by step 400."]


def test_one_measured_step_says_nothing_of_speed():
    assert said({"vanilla": {400: 13.0}, "HASTE": {400: 5.0}}) == []


def test_the_first_crossing_counts_though_a_curve_rises_again():
    curves = {"vanilla": {400: 10.0}, "HASTE": {100: 40.0, 200: 5.0, 300: 20.0, 400: 5.0}}
    (one,) = finding.speedups(report(curves))
    assert 100 < one.at < 200


def test_repa_is_a_baseline_too_and_vanilla_is_timed_against_nobody():
    curves = {name: {100: 40.0, 200: value} for name, value in (("vanilla", 20.0), ("REPA", 15.0), ("HASTE", 10.0))}
    assert [(s.run, s.baseline) for s in finding.speedups(report(curves))] == [
        ("REPA", "vanilla"),
        ("HASTE", "vanilla"),
        ("HASTE", "REPA"),
    ]


def test_guided_runs_are_timed_against_guided_ones_only():
    curve = {"vanilla": {100: 40.0, 200: 20.0}, "HASTE": {100: 30.0, 200: 10.0}}
    rows = [row(run, s, fd / 4, guidance=1.5) for run, found in curve.items() for s, fd in found.items()]
    built = Report("n", "t", "", [*report(curve).rows, *rows], [], [], [], [], [], {}, "")
    found = finding.speedups(built)
    assert [(s.column, s.value) for s in found] == [("FD", 20.0), ("FD at w=1.5", 5.0)]


def test_over_seeds_the_curves_are_of_means_of_steps_where_none_is_missing():
    rows = [row("vanilla", 400, v, seed) for seed, v in enumerate((9.0, 11.0))]
    rows += [row("HASTE", 100, v, seed) for seed, v in enumerate((39.0, 41.0))]
    rows += [row("HASTE", 200, 3.0, 0), *(row("HASTE", 300, v, s) for s, v in enumerate((9.0, 11.0)))]
    built = Report("n", "t", "", rows, [], [], [], [], [], {}, "", seeds={"vanilla": [0, 1], "HASTE": [0, 1]})
    (one,) = finding.speedups(built)
    assert (one.value, one.at) == (10.0, 300.0)


@given(
    st.lists(st.floats(0.1, 1e3), min_size=1, max_size=6),
    st.floats(0.1, 1e3),
)
@example([1000.0, 999.9999999999999], 999.9999999999999)
def test_what_is_read_off_lies_between_measured_points_that_enclose_the_target(values, target):
    curve = [(100.0 * (i + 1), v) for i, v in enumerate(values)]
    found = finding.reached(curve, target)
    if found is None:
        assert min(values) > target
        return
    at, first = found
    assert first == (values[0] <= target)
    steps, logs = np.array(curve).T[0], np.log(values)
    assert math.exp(np.interp(at, steps, logs)) == pytest.approx(target, rel=1e-6) or first


def test_the_lead_is_the_largest_speed_up_over_plain_training():
    curves = {
        "vanilla": {100: 40.0, 400: 10.0},
        "REPA": {100: 20.0, 200: 10.0},
        "HASTE": {50: 20.0, 100: 10.0},
    }
    assert finding.lead(report(curves)) == "HASTE reaches vanilla's FD of step 400 (10.0) at step 100: 4.0×."
    assert finding.lead(report({"vanilla": {100: 40.0}})) == ""
