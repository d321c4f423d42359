"""Replays and readings as people see them: a table, a picture, and figures of the page."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import haste
from haste import config
from haste.align.triggers import GradientAngle, Plateau, Reading
from haste.ops.replay import grid, outcomes
from haste.ops.sources import of_run, published
from haste.plan.plan import Plan
from haste.report import figures, gather, page
from haste.report.content import Read, Report
from haste.report.replay import draw, reading_panels, terminal

PUBLISHED = Path(haste.__file__).parent / "report/published/gradient_cosine_haste.csv"
FLAT = {"trigger": "plateau", "after": 4, "every": 2, "fast": 0.5, "slow": 0.75, "margin": 0.02}


def replays(model, *texts):
    return outcomes(published(PUBLISHED, model), grid(texts))


def row(text, *words):
    """The line of a table that holds some words, its cells apart by single spaces."""
    return next(" ".join(line.split()) for line in text.splitlines() if all(word in line for word in words))


def test_the_table_has_a_line_for_every_setting_and_below_it_what_they_share():
    text = terminal("SiT-XL/2", replays("SiT-XL/2", "gradient-angle.threshold=-0.05,-0.002,0.01"), width=200)
    assert row(text, "-0.002 ").startswith(
        "SiT-XL/2, block 8 gradient-angle set, threshold -0.002 250,000 mean -0.003725"
    )
    assert "200,000 mean -0.00035 the gradients' cosine -0.0003 is below 0.01" in row(text, "threshold 0.01")
    assert "never, up to 290,000 mean 0.01673" in row(text, "threshold -0.05")
    shared = text.split("gradient-angle: ")[1]
    assert "times [0.02, 0.1, 0.5, 0.9]" in shared and "patience 1" in shared and "threshold" not in shared


def test_what_cannot_be_said_is_a_line_with_its_reason():
    asked = grid(["gradient-angle.times=[0.02],[0.3]"])
    text = terminal("x", outcomes(published(PUBLISHED, "SiT-B/2"), asked), width=300)
    assert "set, times [0.3] – – was not measured with these settings: the angle" in row(text, "[0.3]")
    assert "never, up to 80,000 mean -0.0032" in row(text, "[0.02]")


def test_the_picture_has_the_readings_and_a_line_where_each_stops(tmp_path):
    said = replays("SiT-XL/2", "gradient-angle.threshold=-0.05,-0.002,0.01", "gradient-angle.patience=1,2")
    draw("SiT-XL/2", said, tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text()
    assert "gradient-angle of SiT-XL/2, block 8" in svg and ">mean<" in svg
    labels = re.findall(r">(stops at [^<]*)<", svg)
    assert labels == [
        "stops at 200,000: threshold 0.01, patience 1",
        "stops at 250,000: threshold -0.002, patience 1; threshold 0.01, patience 2",
    ]
    draw("SiT-XL/2", said, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        image.load()
    both = [*said, *replays("SiT-B/2")]
    draw("both", both, tmp_path / "x.svg")  # written whole over the one before, a panel for each
    assert len(re.findall(r">gradient-angle of SiT-[^<]*<", (tmp_path / "x.svg").read_text())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.svg"]


def test_other_measurements_have_a_panel_of_their_own(tmp_path):
    draw("x", replays("SiT-B/2", "gradient-angle.times=[0.1],[0.5]"), tmp_path / "x.svg")
    assert len(re.findall(r">gradient-angle of SiT-B/2, block 5<", (tmp_path / "x.svg").read_text())) == 2


def report(*read):
    return Report("n", "t", "", [], [], [], [], [], [], {}, "", read=read)


def path_of(svg, colour):
    found = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; [^"]*stroke: {colour.lower()}', svg)
    assert found is not None
    return np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", found[1]), dtype=float)


def test_readings_are_drawn_a_figure_a_trigger_and_term_and_a_line_a_run():
    angles = [Reading(10 * n, {"mean": 0.1 * n, "error": 0.5}) for n in (1, 2, 3)]
    flat = [Reading(10 * n, {"fast": 0.5, "slow": 0.1 * n}) for n in (1, 2, 3)]
    read = [Read(run, 0, "features", "gradient-angle", GradientAngle().shown, angles) for run in ("a", "b")]
    read[1] = dataclasses.replace(read[1], threshold=-0.05)
    read += [Read("a", 0, kind, "plateau", Plateau().shown, flat) for kind in ("features", "attention")]
    panels = reading_panels(report(*read))
    titles = ["gradient-angle of features", "plateau of features", "plateau of attention"]
    assert [panel.title for panel in panels] == titles
    assert [panel.caption for panel in panels[:2]] == ["Dashed: the threshold, -0.05.", "Faint: slow."]
    assert "a 0.3 at step 30; b 0.3 at step 30" in panels[0].svg
    xy = path_of(panels[0].svg, figures.PALETTE[0])
    np.testing.assert_allclose(xy[1], (xy[0] + xy[2]) / 2, atol=1e-3)  # on a line by construction
    assert path_of(panels[0].svg, figures.PALETTE[1]).shape == (3, 2)
    first = path_of(panels[1].svg, figures.PALETTE[0])
    assert np.ptp(first[:, 1]) == 0  # the fast average is flat


@pytest.fixture
def watched(tiny, tmp_path):
    """A plan whose run was watched: a state with no more in it than its header, and a log."""
    raw = {**tiny, "results": str(tmp_path / "results"), "runs": {"a": {"alignment": "REPA", "watch": FLAT}}}
    plan = Plan(config.resolve(raw))
    state = plan.state("a", 16)
    path = Path(plan.path(state))
    path.parent.mkdir(parents=True)
    readings = [{"step": step, "fast": 1 / step, "slow": 0.1} for step in (8, 10, 12, 14, 16)]
    record = {"trigger": FLAT, "term": "features", "since": 4, "seconds": 0.5, "readings": readings}
    own = plan.trajectories[state.trajectory]
    header = {"schema": 1, "kind": "state", "key": own.key, "trajectory": own.name, "recipe": own.recipe, "step": 16}
    header |= {"inputs": {}, "provenance": {}, "watched": {"features/x": record}}
    save_file({"x": np.zeros(1)}, path, metadata={"haste": json.dumps(header)})
    lines = [{"step": step, "denoising": 1.0, "features": -0.5, "images_per_s": 3.0} for step in range(1, 17)]
    (path.parent / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plan


def test_the_page_shows_what_was_read_of_watched_runs(watched):
    (read,) = gather._read(watched)
    assert (read.run, read.term, read.trigger, list(read.shown)) == ("a", "features", "plateau", ["fast", "slow"])
    assert [reading.step for reading in read.history] == [8, 10, 12, 14, 16]
    html = page.render(report(read))
    assert 'aria-label="plateau of features over training steps: a 0.0625 at step 16"' in html


def test_readings_of_a_trigger_that_is_not_known_any_more_break_no_page(watched, caplog):
    path = Path(watched.path(watched.state("a", 16)))
    path.write_bytes(path.read_bytes().replace(b"plateau", b"plateeu"))
    assert gather._read(watched) == []
    assert "a: passing over readings of features: nothing is called 'plateeu'" in caplog.text


def test_a_run_that_only_watched_is_replayed(watched):
    said = outcomes(of_run(watched, "a", 0), {})
    assert [(one.whose, one.step) for one in said if one.source.found == "watch"] == [("as watched", 8)]
    text = terminal("a", said, width=200)
    assert "as watched 8 fast 0.125, slow 0.1 the residual's fast average 0.125 is 25.00% above" in row(
        text, "as watched"
    )
