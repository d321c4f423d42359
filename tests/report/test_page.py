"""The page: one file, nothing from outside, nothing unescaped, every number traceable."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from haste.report import embed, page
from haste.report.content import Curve, Grid, Part, Report, Row, Stage

EVIL = "<script>alert('x')</script>\"&'"
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


def score(fd: float, key: str = "5c0e") -> dict:
    return {
        "key": key,
        "state": {"trajectory": "trunk-1", "step": 300, "file": f"results/states/{key}/300.safetensors"},
        "sampling": {"sampler": "euler", "steps": 50, "guidance": 1.0, "interval": [0, 1], "labels": "balanced"},
        "nfe": 50,
        "detector": {"name": "digits-cnn", "identity": "d1"},
        "samples": 100,
        "reference": {"images": 150, "identity": "r1"},
        "scores": {"fd": fd, "class_accuracy": 0.5},
        "provenance": {"code": {"version": "0.1"}, "made": "2026", "seconds": 70.0},
    }


@pytest.fixture
def full(tmp_path: Path) -> Report:
    image = tmp_path / "grid.png"
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(image)
    rows = [Row(n, "SiT", n, "–", 0, s, score(v, f"key-{n}-{s}")) for n, s, v in
            (("vanilla", 300, 60.0), ("HASTE", 300, 40.0), ("vanilla", 600, 30.0), ("HASTE", 600, 20.0))]  # fmt: skip
    curves = [Curve("HASTE", 0, [{"step": s, "loss": 1 / s, "features": -0.1} for s in range(1, 20)])]
    return Report(
        name="digits",
        title="A title",
        description="What this is.\n\nAnd more.",
        rows=rows,
        floors=[score(3.0, "key-floor")],
        curves=curves,
        grids=[Grid("vanilla", 600, image, ["0", "1"]), Grid("HASTE", 600, image, ["0", "1"])],
        parts=[Part("cnn", "detector", {"accuracy": 0.98}, {"seconds": 6.0})],
        stages=[Stage("train", 4, 125.0), Stage("score", 4, 4000.0)],
        provenance={
            "code": {"version": "0.1"},
            "versions": {"numpy": "2"},
            "hardware": {"cpus": 2},
            "command": ["haste"],
        },
        config_text="name: digits\n",
        notes=["A note."],
    )


class Page(HTMLParser):
    """Elements with their attributes, text, and whether every element that opened was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] not in (["script"], ["style"]) else ""

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_whole_and_one_file(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make, made = page._files, []
    monkeypatch.setattr(page, "_files", lambda report: made.append(report) or make(report))
    index = page.write(full, tmp_path / "report")
    assert made == [full]  # the files of tables are made once
    tables = [f"{name}.{kind}" for name in ("results", "speed-up", "parts", "time") for kind in ("csv", "md", "tex")]
    assert sorted(p.name for p in index.parent.iterdir()) == sorted(["index.html", *tables])
    parsed = Page(index.read_text())
    assert parsed.open == []
    assert len(parsed.all("h1")) == 1
    assert len(parsed.all("title")) == 1


def test_the_page_needs_nothing_from_outside_and_holds_the_files_of_its_tables(full: Report, tmp_path: Path):
    html = page.write(full, tmp_path / "report").read_text()
    parsed = Page(html)
    targets = [
        v for _, a in parsed.elements for k, v in a.items() if k in ("src", "href", "xlink:href", "srcset", "data")
    ]
    assert targets and all(t.startswith(("#", "data:")) for t in targets)
    kept = {a["download"]: base64.b64decode(a["href"].partition(",")[2]) for a in parsed.all("a") if "download" in a}
    written = {path.name: path.read_bytes() for path in (tmp_path / "report").glob("*.*") if path.name != "index.html"}
    assert kept == written and "results.csv" in kept
    assert parsed.all("link") == []
    assert not re.search(r"@import|url\((?!#)", html)


def test_a_page_that_would_be_too_large_to_send_has_pictures_of_half_the_resolution(
    full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(page, "MOST", 500)
    for size, kept in ((100, 2), (300, 1)):
        monkeypatch.setattr(page, "render", lambda report, dense=2, files=None, size=size: str(dense) * size * dense)
        assert page.write(full, tmp_path / "report").read_text()[0] == str(kept)
    image = Image.fromarray(np.zeros((400, 800, 3), np.uint8))
    image.save(full.grids[0].image)
    shown = embed.grid_of(full.grids[0], embed.Shared(None, 1))["src"]  # of two columns
    assert Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).width == 2 * embed.CELL


def test_links_within_the_page_lead_somewhere_and_ids_are_unique(full: Report):
    parsed = Page(page.render(full))
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    links = [a["href"][1:] for a in parsed.all("a") if a["href"].startswith("#")]
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)


def test_a_number_leads_to_how_it_was_made(full: Report):
    html = page.render(full)
    link = re.search(r'href="#(made-\d+)"><strong>40\.0<', html)
    assert link is not None
    target = html[html.index(f'id="{link[1]}"') :].split("</details>")[0]
    assert "key-HASTE-300" in target
    assert "results/states/key-HASTE-300/300.safetensors" in target
    assert "1 min 10 s" in target


def test_every_picture_is_described_and_every_heading_of_a_table_has_a_scope(full: Report):
    parsed = Page(page.render(full))
    assert len(parsed.all("img")) == 2
    assert all(a.get("alt") for a in parsed.all("img"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in parsed.all("svg"))
    assert parsed.all("th")
    assert all(a.get("scope") in ("col", "row") for a in parsed.all("th"))


def test_the_page_says_the_finding_the_floor_and_the_notes(full: Report):
    text = " ".join(Page(page.render(full)).text.split())
    assert "At step 600 HASTE reaches FD 20.0, vanilla 30.0." in text
    assert "Real images against real ones (100 against 150) measure 3.0." in text
    for said in (
        "A title",
        "What this is.",
        "And more.",
        "A note.",
        "accuracy 0.98",
        "2 min 05 s",
        "1 h 07 min",
        "name: digits",
    ):
        assert said in text


def test_pictures_are_embedded_byte_for_byte(full: Report):
    source = Page(page.render(full)).all("img")[0]["src"]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == Path(full.grids[0].image).read_bytes()


def test_a_picture_much_larger_than_its_place_on_the_page_is_embedded_at_twice_that_place(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (1036, 2590, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    source = embed.data_uri(tmp_path / "grid.png", 1360)
    content = base64.b64decode(source.removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(content)).size == (1360, 544)
    assert len(content) < (tmp_path / "grid.png").stat().st_size / 8


def test_a_grid_without_classes_is_as_wide_as_its_columns_and_none_is_said_to_be_a_class(full: Report):
    assert "One column per class" in page.render(full)
    grids = [dataclasses.replace(grid, labels=[], columns=7) for grid in full.grids]
    text = page.render(dataclasses.replace(full, grids=grids))
    assert f"--columns: 7; --most: {7 * embed.CELL}px" in text and "column a class" not in text


def test_every_picture_has_its_words_under_it_as_text_cut_after_80_characters_and_whole_where_one_points(
    full: Report, tmp_path: Path
):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)  # 2 x 3 pictures of 10 px
    Image.fromarray(pixels).save(tmp_path / "told.png")
    long = "a very " * 40 + "red bus"
    words = [EVIL, "a \"red\" bus & 'its' <driver>", "أوتوبيس أحمر \u202e!", long, "", "one\nline"]
    grids = [Grid("vanilla", 600, tmp_path / "told.png", [], columns=3, words=words)]
    parsed = Page(page.render(dataclasses.replace(full, grids=grids)))
    assert parsed.open == [] and len(parsed.all("script")) == 1
    told = [images for images in parsed.all("img") if images["src"].startswith("data:image/webp")]
    assert [one["alt"].partition(": ")[2] for one in told] == words
    assert [one["title"] for one in parsed.all("div") if "title" in one] == words
    assert all(text in parsed.text for text in (*words[:3], long[:79].rstrip() + "…")) and long not in parsed.text
    assert sum(one.get("dir") == "auto" for one in parsed.all("p")) == 6
    for place, one in enumerate(told):
        with Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))) as image:
            top, left = place // 3 * 10, place % 3 * 10
            assert (np.asarray(image.convert("RGB")) == pixels[top : top + 10, left : left + 10]).all()


def test_whatever_things_are_called_is_text(full: Report):
    renamed = dataclasses.replace(
        full,
        name=EVIL,
        title=EVIL,
        description=EVIL,
        rows=[dataclasses.replace(row, run=EVIL, model=EVIL, method=EVIL) for row in full.rows],
        curves=[dataclasses.replace(curve, run=EVIL) for curve in full.curves],
        grids=[dataclasses.replace(grid, run=EVIL, labels=[EVIL, "1"]) for grid in full.grids],
        parts=[Part(EVIL, EVIL, {EVIL: EVIL}, {"code": {EVIL: EVIL}})],
        stages=[Stage(EVIL, 1, 1.0)],
        provenance={"command": [EVIL], "versions": {EVIL: EVIL}},
        config_text=EVIL,
        notes=[EVIL],
    )
    parsed = Page(page.render(renamed))
    assert parsed.open == []
    assert len(parsed.all("script")) == 1
    assert parsed.text.count(EVIL) > 20


def test_a_report_of_nothing_is_a_page(tmp_path: Path):
    empty = Report("n", "t", "", [], [], [], [], [], [], {}, "")
    parsed = Page(page.write(empty, tmp_path).read_text())
    assert parsed.open == []
    assert "No scores yet." in parsed.text


def test_a_row_without_sampling_or_state_is_a_row(full: Report):
    bare = Row("mine", "other", "imported", "–", 0, 0, {"detector": {"name": "cnn"}, "scores": {"fd": 5.0}})
    assert "imported" in page.render(dataclasses.replace(full, rows=[*full.rows, bare]))


def test_what_is_not_a_png_is_refused_and_nothing_is_written(full: Report, tmp_path: Path):
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"GIF89a.....")
    for path, found in ((fake, "begins with b'GIF89a"), (tmp_path / "gone.png", "FileNotFoundError")):
        broken = dataclasses.replace(full, grids=[Grid("a", 1, path, [])])
        with pytest.raises(ValueError, match=f"{path.name}: expected a PNG.*{found}"):
            page.write(broken, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_same_report_gives_the_same_page(full: Report):
    assert page.render(full) == page.render(full)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7790, "2 h 10 min"),
        (None, "–"),
    ],
)
def test_durations_read_well(seconds: float | None, text: str):
    assert page.duration(seconds) == text
