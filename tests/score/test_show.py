"""The table says what it compares, marks the best only of what compares, and warns of what does not."""

import csv as reader
import dataclasses
import io

import numpy as np
import pytest

from haste.score import show
from haste.score.columns import Score
from haste.score.comparable import known_reference, notes
from haste.score.images import Scores

INCEPTION = {"name": "inception", "kind": "inception", "identity": "a" * 64, "weights": "b" * 64, "published": True}
DINO = {**INCEPTION, "name": "DINOv2-L", "kind": "DINOv2-L", "identity": "c" * 64, "published": None}
FULL = {"path": "x/samples.npz", "kind": ".npz", "images": 50_000, "size": [256, 256], "identity": "d", "copies": 0}
FULL |= {"black": 0, "brightness": 110.0, "lossy": 0}
ADM = {"path": "refs/VIRTUAL_imagenet256_labeled.npz", "kind": "statistics", "images": None, "identity": "e"}
ADM |= {"holds": ["arr_0", "mu", "mu_s", "sigma", "sigma_s"], "pictures": 10_000, "size": [256, 256]}


def scores(path="a.npz", images=50_000, said=(), **columns):
    columns = columns or {"FID": (2.27, 0.04, "standard error", "lower"), "IS": (278.2, 3.1, "over splits", "higher")}
    found = {name: Score(*column) for name, column in columns.items()}
    return Scores(found, {**FULL, "path": path, "images": images}, ADM, [INCEPTION], {}, list(said), {}, 1.0)


def test_fifty_thousand_samples_against_adms_reference_need_no_word():
    assert notes(FULL, ADM, [INCEPTION], ["FID", "IS"]) == []
    (word,) = notes(FULL, ADM, [INCEPTION, DINO], ["FID", "FD (DINOv2-L)"])
    assert "DINOv2-L are against the 10,000 images" in word


WORDS = {
    "few samples": (
        {"images": 10_000},
        {},
        {},
        "10,000 samples; published scores are of 50,000; fewer make FID too high",
    ),
    "many samples": ({"images": 60_000}, {}, {}, "60,000 samples; published scores are of 50,000"),
    "copies": ({"copies": 25_000}, {}, {}, "25,000 of 50,000 samples are copies of another one"),
    "black": ({"black": 3}, {}, {}, "3 of 50,000 samples are black"),
    "nearly black": ({"brightness": 1.2}, {}, {}, "nearly black, their mean value is 1.2 of 255"),
    "JPEG": ({"lossy": 7}, {}, {}, "7 samples come from JPEG"),
    "other weights": ({}, {}, {"published": False}, "the weights of inception (sha256 bbbbbbbbbbbb) are not those"),
    "another file": (
        {},
        {"path": "mine.npz"},
        {},
        "the reference mine.npz (statistics of unknown images) is none of",
    ),
    "pictures": ({}, {"kind": "zip of pictures", "images": 9, "holds": []}, {}, "(9 images) is none of ADM's"),
    "fewer pictures": ({}, {"pictures": 9_999}, {}, "is none of ADM's"),
    "another size": ({}, {"size": [128, 128]}, {}, "is none of ADM's"),
    "no sFID": ({}, {"holds": ["arr_0", "mu", "sigma"]}, {}, "is none of ADM's"),
    "the same images": ({"identity": "e"}, {}, {}, "samples and reference are the same images"),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_keeps_scores_from_being_compared_is_said(name):
    samples, reference, detector, words = WORDS[name]
    (found,) = notes({**FULL, **samples}, {**ADM, **reference}, [{**INCEPTION, **detector}], ["FID"])
    assert words in found


def test_adms_references_are_known_by_name_and_layout():
    assert known_reference(ADM) == "VIRTUAL_imagenet256_labeled.npz"
    big = {**ADM, "path": "VIRTUAL_imagenet512.npz", "size": [512, 512]}
    assert known_reference(big) == "VIRTUAL_imagenet512.npz"
    assert known_reference({**big, "size": [256, 256]}) is None


def test_the_json_names_adms_reference_where_it_is_known():
    found = scores()
    assert found.json()["reference"]["adm"] == "VIRTUAL_imagenet256_labeled.npz"
    other = dataclasses.replace(found, reference={**ADM, "path": "mine.npz"})
    assert other.json()["reference"]["adm"] is None


def test_the_best_is_marked_where_counts_agree_and_nowhere_else():
    other = {"FID": (2.11, 0.04, "standard error", "lower"), "IS": (262.0, 3.0, "over splits", "higher")}
    pair = [scores("a.npz"), scores("b.npz", **other)]

    def marked(found):
        grid = show._parts(found, 200)[1]
        return {
            (str(column.header), str(cell))
            for column in grid.columns
            for cell in column._cells
            if "bold" in str(getattr(cell, "style", ""))
        }

    assert marked(pair) == {("b.npz", "2.110 ± 0.040"), ("a.npz", "278.200 ± 3.100")}
    uneven = [pair[0], scores("b.npz", images=10_000, **other)]
    assert marked(uneven) == marked(pair[:1]) == set()
    assert "sets of different counts" in show.text(uneven) and "different counts" not in show.text(pair)


def test_the_table_names_reference_detector_bars_and_whose_note_it_is():
    shown = show.text([scores("a.npz", said=["odd"]), scores("b.npz", said=["odd", "strange"])], width=200)
    assert "against refs/VIRTUAL_imagenet256_labeled.npz, by inception aaaaaaaa" in shown
    assert "± standard error (FID); over splits (IS)" in shown
    assert "! odd\n" in shown and "! b.npz: strange" in shown
    assert "FID ↓" in shown and "IS ↑" in shown and "50,000" in shown


def test_sets_are_called_by_the_shortest_ends_of_their_paths_that_differ():
    assert show.names([scores("/r/a/x.npz"), scores("/r/b/x.npz")]) == ["a/x.npz", "b/x.npz"]
    assert show.names([scores("/r/a.npz"), scores("/r/a.npz")]) == ["a.npz (1)", "a.npz (2)"]


def test_the_csv_has_every_number_in_full():
    value = float(np.nextafter(2.27, 3))
    found = [scores("a.npz", FID=(value, 0.1, "e", "lower")), scores("b.npz", IS=(9.5, None, None, "higher"))]
    first, second = reader.DictReader(io.StringIO(show.csv(found)))
    assert float(first["FID"]) == value and float(first["FID error"]) == 0.1 and first["IS"] == ""
    assert second["IS"] == "9.5" and second["count"] == "50000" and second["reference_identity"] == "e"
