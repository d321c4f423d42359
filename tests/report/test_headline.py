"""The first screen: a sentence that is honest about noise, a figure, and the table."""

import re

import numpy as np
import pytest

from haste.report import page
from haste.report.content import Report, Row
from haste.report.finding import caution
from haste.report.headline import headline_panel

ONCE = "Each run was trained once: what another seed would change is not known."


def report(values, error=None):
    """Runs with a distance for each seed, and the same standard error of each."""
    more = {} if error is None else {"errors": {"fd": error}}
    rows = [
        Row(run, "SiT", run, "–", seed, 400, {"detector": {"name": "cnn"}, "samples": 10, "scores": {"fd": fd}, **more})
        for run, seeds in values.items()
        for seed, fd in enumerate(seeds)
    ]
    return Report("n", "t", "", rows, [], [], [], [], [], {}, "", seeds={r: range(len(v)) for r, v in values.items()})


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        # Two standard errors of a difference of two: 2 * sqrt(2) * 0.5 = 1.41.
        (
            {"HASTE": [7.0], "ATTA": [8.0], "REPA": [8.3], "vanilla": [13.0]},
            0.5,
            "Which of HASTE, ATTA and REPA is best is open: they differ by less than the noise of the samples, ±1.41."
            f" {ONCE}",
        ),
        (
            {"vanilla": [13.0], "HASTE": [7.0]},
            0.5,
            f"That is 6.00 less than vanilla, more than the noise of the samples, ±1.41. {ONCE}",
        ),
        # Over seeds: deviations of 1, so the standard error of a difference of means over 2 is 1; t of 2 degrees, 4.30.
        (
            {"vanilla": [13.0 - 0.5**0.5, 13.0 + 0.5**0.5], "HASTE": [7.0 - 0.5**0.5, 7.0 + 0.5**0.5]},
            0.1,
            "That is 6.00 less than vanilla, more than the noise over seeds, ±4.30.",
        ),
        (
            {"vanilla": [8.9 - 0.5**0.5, 8.9 + 0.5**0.5], "HASTE": [7.0 - 0.5**0.5, 7.0 + 0.5**0.5]},
            0.1,
            "Which of HASTE and vanilla is better is open: they differ by less than the noise over seeds, ±4.30.",
        ),
        ({"vanilla": [13.0], "HASTE": [7.0]}, None, ""),
        ({"HASTE": [7.0]}, 0.5, ""),
        ({"vanilla": [13.0, 12.0], "HASTE": [7.0]}, 0.5, ""),
    ],
)
def test_the_lead_of_the_best_is_said_to_be_open_or_more_than_noise(values, error, said):
    assert caution(report(values, error)) == said


@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_runs_of_few_seeds_are_rarely_said_to_differ_by_more_than_noise(seeds):
    draws = np.random.default_rng(0).normal(10.0, 1.0, (200, 2, seeds))
    told = [caution(report({"a": list(one), "b": list(two)})) for one, two in draws]
    assert sum("more than the noise" in said for said in told) <= 0.06 * len(told)


def test_a_single_step_is_drawn_by_run_best_first_with_bars_of_two_standard_errors():
    panel = headline_panel(report({"vanilla": [13.0], "HASTE": [7.0]}, 0.5))
    names = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", panel.svg) if text in ("vanilla", "HASTE")]
    assert names == ["HASTE", "vanilla"] and panel.caption == "Bars: twice the standard error."
    assert headline_panel(report({})) is None


def test_the_first_screen_has_the_sentence_then_figure_and_table():
    text = page.render(report({"vanilla": [13.0], "HASTE": [7.0]}, 0.5))
    words = ("HASTE reaches FD", "That is 6.00 less", 'class="opening"', "<svg viewBox", 'id="table-results"')
    places = [text.index(word) for word in words]
    assert places == sorted(places)
