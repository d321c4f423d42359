"""The page as a reader has it: in a headless Chromium, on a wide screen, on a phone and on paper."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from haste.report import page
from haste.report.content import Curve, Grid, Real, Report, Row

RUNS = {"vanilla": 1.0, "REPA with a rather long name that has to break": 0.8, "HASTE": 0.6}
SEEDS = [0, 1, 2]


def score(run: str, step: int, seed: int, **sampling) -> dict:
    fd = 80 * math.exp(-step / 200) * RUNS[run] + seed
    return {
        "key": f"key-{run}-{step}-{seed}",
        "state": {"trajectory": "t", "step": step, "file": "results/states/" + "t" * 80 + ".safetensors"},
        "sampling": {"sampler": "euler", "steps": 25, "guidance": 1.0, "labels": "balanced", **sampling},
        "detector": {"name": "digits-cnn", "identity": "d" * 64},
        "samples": 1000,
        "reference": {"images": 1500, "identity": "r" * 64},
        "scores": {"fd": fd, "precision": 0.7, "recall": 0.6, "class_accuracy": 1 / fd},
        "provenance": {"made": "2026", "code": {"version": "0.1"}, "versions": {"torch": "2"}, "seconds": 3.0},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    Image.fromarray(np.zeros((64, 160, 3), np.uint8)).save(folder / "grid.png")
    strip = io.BytesIO()
    Image.fromarray(np.full((32, 160, 3), 200, np.uint8)).save(strip, "PNG")
    rows = [
        Row(run, "SiT", run.split()[0], "–" if run == "vanilla" else "200", seed, step, score(run, step, seed, **how))
        for how in ({}, {"guidance": 1.5})
        for run in RUNS
        for step in (100, 200, 400)
        for seed in SEEDS
    ]
    logged = [{"step": s, "loss": 1 / s, "images_per_s": 100.0} for s in range(1, 400, 5)]
    report = Report(
        name="a",
        title="A title",
        description="",
        rows=rows,
        floors=[{**score("HASTE", 400, 0), "sampling": {}}],
        curves=[Curve(run, seed, logged) for run in RUNS for seed in SEEDS],
        grids=[Grid(run, 400, folder / "grid.png", [str(c) for c in range(10)]) for run in RUNS],
        parts=[],
        stages=[],
        provenance={"command": ["haste", "x" * 100]},
        config_text="name: a\n",
        seeds=dict.fromkeys(RUNS, SEEDS),
        real=Real(strip.getvalue(), [str(c) for c in range(10)]),
    )
    return page.write(report, folder / "report")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_loads_without_errors_whole_and_never_wider_than_the_screen(browser, written, width, scheme):
    browser.open(written, width=width, scheme=scheme)
    assert browser.errors == []
    sizes = browser.run("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert sizes == [[True, 160]] * len(RUNS)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().height > 50)")
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c > 128)")
    assert light == (scheme == "light")


def test_the_page_alone_in_another_place_lacks_nothing(browser, written, tmp_path):
    sent = shutil.copy(written, tmp_path / "sent.html")
    browser.open(sent)
    assert browser.errors == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {sent.absolute().as_uri()}
    failed = [event for event in browser.events if event["method"] == "Network.loadingFailed"]
    assert failed == []
    links = browser.run("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) > 20 and all(link.startswith(("#", "data:")) for link in links)
    csv = "[...document.querySelectorAll('a')].find(a => a.download === 'results.csv').href"
    text = browser.run(f"fetch({csv}).then(answer => answer.text())")
    assert text == (written.parent / "results.csv").read_text()


def test_below_every_grid_are_real_pictures_as_wide_as_it_and_embedded_once(browser, written):
    browser.open(written)
    grids = "[...document.querySelectorAll('.grid')]"
    widths = browser.run(f"{grids}.map(g => ['img', '.real svg'].map(s => g.querySelector(s).clientWidth))")
    assert len(widths) == len(RUNS) and all(picture == real > 100 for picture, real in widths)
    drawn = f"{grids}.every(g => g.querySelector('.real use').getBoundingClientRect().height > 20)"
    assert browser.run(drawn) and browser.run("document.querySelectorAll('defs > image').length") == 1


@pytest.mark.parametrize("width", [1280, 1920])
def test_on_a_screen_the_sentence_the_figure_and_the_table_are_seen_without_scrolling(browser, written, width):
    browser.open(written, width=width, height=900)
    tops = (
        "['.finding', '.opening figure', '#table-results'].map(s => document.querySelector(s).getBoundingClientRect())"
    )
    sentence, figure, table = browser.run(f"{tops}.map(r => [r.top, r.bottom, r.left, r.right])")
    assert sentence[1] < figure[0] and figure[1] < 900 and table[0] < 600
    assert figure[3] < table[2]  # beside one another
    assert browser.run("document.querySelector('main').getBoundingClientRect().width") > 0.9 * width


# Class accuracy, the last score: decimals of many digits, which sorted as text come out wrong.
COLUMN = "[...document.querySelectorAll('#table-results tbody tr')].map(r => r.cells[6].dataset.v)"
HEADING = "#table-results thead th:nth-child(7) button"


def test_a_heading_sorts_up_then_down_then_as_it_was(browser, written):
    browser.open(written)
    original = browser.run(COLUMN)
    browser.click(HEADING)
    assert browser.run(COLUMN) == sorted(original, key=float) != original
    assert browser.run("document.querySelector('th[aria-sort]').innerText.trim()").startswith("class accuracy")
    browser.click(HEADING)
    assert browser.run(COLUMN) == sorted(original, key=float, reverse=True)
    browser.click(HEADING)
    assert browser.run(COLUMN) == original
    assert browser.run("document.querySelector('th[aria-sort]')") is None
    assert browser.errors == []


def test_the_keyboard_is_enough_to_sort_and_to_see_how_a_number_was_made(browser, written):
    browser.open(written)
    browser.run(f"document.querySelector('{HEADING}').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run(COLUMN) == sorted(browser.run(COLUMN), key=float)
    browser.run("document.querySelector('#table-results td a').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run("document.querySelector('dialog').open")
    browser.press("Escape", 27)
    assert not browser.run("document.querySelector('dialog').open")
    assert browser.errors == []


@pytest.mark.parametrize("width", [1200, 390])
def test_a_click_on_a_number_shows_how_each_of_its_seeds_was_made(browser, written, width):
    browser.open(written, width=width)
    browser.run("document.querySelector('#table-results tr:nth-child(2) td a').scrollIntoView({inline: 'center'})")
    browser.click("#table-results tr:nth-child(2) td a")
    shown = browser.run("document.querySelector('dialog').innerText")
    run = list(RUNS)[1]
    assert shown.startswith(f"{run}, step 100")
    for said in (*(f"key-{run}-100-{seed}" for seed in SEEDS), "torch 2", "balanced", "d" * 64, "took\n3.0 s"):
        assert said.replace("\n", "") in shown.replace("\n", "")
    assert browser.run("(d => d.scrollWidth <= d.clientWidth)(document.querySelector('dialog'))")
    browser.click("dialog button")
    assert not browser.run("document.querySelector('dialog').open")


def test_headings_and_names_stay_in_sight_while_a_table_scrolls_on_a_phone(browser, written):
    browser.open(written, width=390, height=500)
    box = "document.querySelector('#table-results').parentElement"
    browser.run(f"{box}.scrollTo(150, 200)")
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.run(f"[{box}.scrollLeft, {box}.scrollTop].every(x => x > 50)")
    edge = f"{box}.getBoundingClientRect()"
    head = "document.querySelector('#table-results thead th').getBoundingClientRect()"
    name = "document.querySelector('#table-results tbody tr:last-child th').getBoundingClientRect()"
    assert browser.run(f"Math.abs({head}.top - {edge}.top) < 2")
    assert browser.run(f"Math.abs({name}.left - {edge}.left) < 20")


def test_on_paper_every_table_is_whole(browser, written):
    browser.open(written, width=1000, height=200)
    browser.ask("Emulation.setEmulatedMedia", media="print")
    hidden = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollHeight > s.clientHeight + 1).length"
    assert browser.run(hidden) == 0
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.pdf().startswith(b"%PDF-")


def test_without_scripts_a_number_still_leads_to_how_it_was_made(browser, written):
    browser.open(written)
    missing = "[...document.querySelectorAll('td a')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    assert browser.run(missing) == 0
    browser.run("location.hash = '#made-0'")
    browser.run("new Promise(done => setTimeout(done, 50))")
    assert browser.run("document.getElementById('made-0').checkVisibility()")
