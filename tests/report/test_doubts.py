"""Parts that are too poor to judge by are said in words, and good ones are not."""

import html

import pytest

from haste.report import page, tables
from haste.report.content import Part, Report, Row
from haste.report.doubts import doubts

SHARED = {"detector": {"name": "cnn"}, "samples": 100, "reference": {"images": 100}}


def report(fds, floor=2.0, decoded=None, psnr=30.0, parts=()):
    rows = [Row(f"run {fd}", "SiT", "vanilla", "–", 0, 8, {**SHARED, "scores": {"fd": fd}}) for fd in fds]
    again = [] if decoded is None else [{**SHARED, "scores": {"fd": decoded}, "psnr": psnr}]
    floors = [{**SHARED, "scores": {"fd": floor}}]
    return Report("n", "t", "", rows, floors, [], [], list(parts), [], {}, "", reconstructed=again)


def part(kind, classes=10, **quality):
    return Part("mine", kind, quality, {}, classes)


def test_good_parts_are_passed_over_in_silence():
    parts = [part("autoencoder", psnr=32.9), part("teacher", accuracy=0.94), part("detector", accuracy=0.98)]
    assert doubts(report([12.0, 7.0], decoded=2.1, psnr=33.0, parts=parts)) == []


@pytest.mark.parametrize(("psnr", "said"), [(14.4, True), (19.9, True), (20.0, False), (27.0, False)])
def test_an_autoencoder_below_20_db_is_named_whether_it_was_measured_here_or_where_it_was_trained(psnr, said):
    measured, trained = report([7.0], decoded=2.1, psnr=psnr), report([7.0], parts=[part("autoencoder", psnr=psnr)])
    for found in (doubts(measured), doubts(trained)):
        assert [f"PSNR of {psnr} dB" in one for one in found] == [True] * said


@pytest.mark.parametrize(("decoded", "said"), [(4.4, False), (4.6, True), (7.5, True), (2.2, False)])
def test_more_than_half_of_the_best_runs_way_to_real_images_is_too_much_for_an_autoencoder(decoded, said):
    found = doubts(report([12.0, 7.0], decoded=decoded))  # 2 is the floor, 7 the best run: half is at 4.5
    assert len(found) == said
    if said:
        assert f"distance of {decoded}" in found[0] and ("the whole distance between" in found[0]) == (decoded > 7)


def test_a_run_at_the_floor_is_no_fault_of_the_autoencoder():
    assert doubts(report([2.1], decoded=2.2)) == []
    assert doubts(report([1.9], decoded=4.0)) == []


@pytest.mark.parametrize(
    ("classes", "accuracy", "said"), [(10, 0.54, True), (10, 0.56, False), (4, 0.62, True), (4, 0.63, False)]
)
@pytest.mark.parametrize("kind", ["teacher", "detector"])
def test_a_classifier_nearer_to_guessing_than_to_being_right_is_named(kind, classes, accuracy, said):
    found = doubts(report([7.0], parts=[part(kind, classes, accuracy=accuracy)]))
    assert [one.startswith(f"The {kind} mine is right on {100 * accuracy:.0f} %") for one in found] == [True] * said


def test_of_a_network_that_tells_nothing_nothing_is_said():
    assert doubts(report([7.0], parts=[part("detector", 0, accuracy=0.1), part("teacher", 10)])) == []


def test_doubts_stand_on_the_page_and_in_the_terminal():
    built = report([12.0, 7.0], decoded=6.0, psnr=14.4)
    first, second = doubts(built)
    text = html.unescape(page.render(built))
    assert text.index(first) < text.index('id="results"') and second in text
    assert first in page.text(built)


def test_what_decoded_latents_reach_is_a_line_below_what_real_images_reach():
    built = report([7.0], decoded=6.0)
    (table,) = tables.main_tables(built)
    assert [(e.cells[0].text, e.kind) for e in table.entries[-2:]] == [
        (tables.FLOOR_NAME, "floor"),
        (tables.RECONSTRUCTED_NAME, "floor"),
    ]
    assert table.column("FD (cnn)")[-1].value == 6.0 and "PSNR of 30.0 dB" in " ".join(table.notes)
    frame = tables.results(built)
    assert frame["run"].tolist()[-1] == tables.RECONSTRUCTED_NAME and frame["FD (cnn)"].tolist()[-1] == 6.0
    assert "made-reconstructed" in page.render(built)
