"""When to stop, from readings alone: no model, no torch."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import haste
from haste.align import triggers
from haste.align.triggers import TRIGGERS, Angle, Average, GradientAngle, Plateau, Reading, Trigger


def averaged(residuals, decay):
    """The normalised average after each step, by its definition: a sum over all steps so far."""
    found = []
    for step in range(1, len(residuals) + 1):
        weights = [decay ** (step - 1 - i) for i in range(step)]
        found.append(math.fsum(w * r for w, r in zip(weights, residuals, strict=False)) / math.fsum(weights))
    return found


def read(trigger, residuals, every=10):
    """The readings that training would make of these residuals, one a step."""
    columns = {name: averaged(residuals, need.decay) for name, need in trigger.needs.items()}
    first = max(need.steps for need in trigger.needs.values())
    steps = [step for step in range(every, len(residuals) + 1, every) if step >= first]
    return [Reading(step, {name: column[step - 1] for name, column in columns.items()}) for step in steps]


def test_plateau_goes_on_while_the_residual_falls_and_stops_once_it_is_flat():
    trigger = Plateau(fast=0.8, slow=0.98, margin=0.02)
    falling = [0.9 * 0.99**step for step in range(200)]
    flat = [falling[-1]] * 400
    history = read(trigger, falling + flat)
    stop, decision = triggers.replayed("plateau", trigger, history)
    # From step 200 on all is flat. The slow average comes down by 0.98 a step: from 49 / 100 above, 2 % are left
    # when 0.98^n is about 0.04, and the fast one is there already.
    assert 200 + 100 < stop < 200 + 220
    assert triggers.replayed("plateau", trigger, read(trigger, falling)) is None
    assert decision.reason.endswith(", not more than 2.00% below")


def test_plateau_is_decided_by_the_last_reading_and_its_margin():
    trigger = Plateau(margin=0.02)

    def stops(fast, slow):
        before = Reading(10, {"fast": 1.0, "slow": 1.0})
        return trigger.decide(20, [before, Reading(20, {"fast": fast, "slow": slow})]).stop

    assert [stops(fast, 0.5) for fast in (0.3, 0.489, 0.491, 0.5, 0.7)] == [False, False, True, True, True]
    assert stops(0.0, 0.0)
    above = trigger.decide(20, [Reading(20, {"fast": 0.51, "slow": 0.5})])
    assert "fast average 0.51 is 2.00% above its slow one 0.5, not more than 2.00% below" in above.reason


@given(
    residuals=st.lists(st.floats(0.01, 2), min_size=60, max_size=120),
    margin=st.floats(0, 1),
    scale=st.sampled_from([0.25, 1024.0]),
)
def test_plateau_does_not_depend_on_the_unit_of_the_residual(residuals, margin, scale):
    trigger = Plateau(fast=0.7, slow=0.95, margin=margin)
    plain, scaled = (
        [triggers.decided("plateau", trigger, history[: i + 1]).stop for i in range(len(history))]
        for history in (read(trigger, residuals), read(trigger, [scale * r for r in residuals]))
    )
    assert plain == scaled


@given(residuals=st.lists(st.floats(0.01, 2), min_size=60, max_size=120), margins=st.tuples(*[st.floats(0, 1)] * 2))
def test_a_larger_margin_never_stops_later(residuals, margins):
    stops = []
    for margin in sorted(margins):
        trigger = Plateau(fast=0.7, slow=0.95, margin=margin)
        found = triggers.replayed("plateau", trigger, read(trigger, residuals))
        stops.append(math.inf if found is None else found[0])
    assert stops[0] >= stops[1]


def test_nothing_is_decided_before_the_slow_average_has_seen_what_it_looks_back_on():
    assert {need.steps for need in Plateau().needs.values()} == {20_000}
    assert {need.steps for need in Plateau(fast=0.5, slow=0.9).needs.values()} == {10}


def cosines(*means, error=0.01):
    """Readings of angles, every 10 steps."""
    return [Reading(10 * (i + 1), {"mean": mean, "error": error}) for i, mean in enumerate(means)]


def stops_at(history, **parameters):
    found = triggers.replayed("gradient-angle", GradientAngle(threshold=-0.05, **parameters), history)
    return found and found[0]


def test_the_gradients_must_point_apart_by_the_threshold_at_so_many_readings_in_a_row_and_surely():
    history = cosines(0.1, -0.04, -0.05, -0.06, -0.02, -0.06, -0.051, -0.07, -0.09)
    assert [stops_at(history, patience=patience) for patience in (1, 2, 3, 4, 5)] == [40, 70, 80, 90, None]
    assert [stops_at(history, sure=sure) for sure in (0.5, 1.5, 3, 5)] == [40, 80, 90, None]
    assert stops_at(history, sure=0.5, patience=2) == 90  # -0.051 is not below by half an error
    assert stops_at(history[:3]) is None


def test_the_reason_tells_cosine_error_and_what_was_asked():
    trigger = GradientAngle(patience=3, sure=2)
    reasons = [trigger.decide(10 * n, cosines(-0.1, 0.02)[:n]).reason for n in (1, 2)]
    assert reasons[0] == (
        "the gradients' cosine -0.1000 ± 0.0100 is below -0.05 by 2 standard errors, at 1 of 3 readings in a row"
    )
    assert " 0.0200 ± 0.0100 is not below -0.05 by 2" in reasons[1] and "at 0 of 3" in reasons[1]
    assert GradientAngle().decide(10, cosines(0.0)).reason.endswith("0.0000 ± 0.0100 is not below -0.05")


def test_a_reading_has_the_cosine_at_every_time_their_mean_and_an_error_of_each():
    needs = GradientAngle(times=[0.5, 0.02], block=3, images=64, shards=4, of="own").needs
    assert list(needs) == ["t=0.5", "t=0.5 error", "t=0.02", "t=0.02 error", "mean", "error"]
    assert needs["t=0.02 error"] == Angle((0.02,), (3,), 64, 4, "own", error=True)
    assert needs["mean"] == Angle((0.5, 0.02), (3,), 64, 4, "own")
    assert GradientAngle().needs["mean"].block == () and GradientAngle(block=[5, 4]).needs["mean"].block == (5, 4)
    assert triggers.first_reading(GradientAngle(), 40_000, 10_000) == 50_000


def published(model, times):
    """HASTE's cosines, averaged over these times, as readings."""
    with open(Path(haste.__file__).parent / "report/published/gradient_cosine_haste.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["t"] in times]
    found = {}
    for row in rows:
        found.setdefault(int(row["iteration"]), []).append(float(row["cosine"]))
    return [Reading(step, {"mean": sum(c) / len(times), "error": 0.0}) for step, c in sorted(found.items())]


def test_the_published_readings_stop_the_small_model_where_the_paper_does_and_never_the_large_one():
    small = published("SiT-B/2", {"0.02", "0.1", "0.5", "0.8"})
    assert triggers.replayed("gradient-angle", GradientAngle(), small)[0] == 80_000
    large = published("SiT-XL/2", {"0.02", "0.1", "0.5", "0.9"})
    assert triggers.replayed("gradient-angle", GradientAngle(), large) is None
    lowest = sorted((reading.values["mean"], reading.step) for reading in large)[:2]
    assert lowest == [(pytest.approx(-0.004, abs=5e-4), 250_000), (pytest.approx(-0.0003, abs=1e-4), 200_000)]


@pytest.mark.parametrize("name", TRIGGERS)
def test_every_trigger_is_made_of_its_defaults_and_decides_by_what_it_is_given(name):
    trigger = triggers.made(name, {})
    history = [Reading(step, dict.fromkeys(trigger.needs, 0.5)) for step in (10, 20, 30)]
    decision = triggers.decided(name, trigger, history)
    assert isinstance(decision.stop, bool) and decision.reason
    assert triggers.decided(name, triggers.made(name, {}), history) == decision


def test_parameters_reach_the_trigger_and_others_are_refused_by_name():
    assert triggers.made("plateau", {"margin": 0.1}) == Plateau(margin=0.1)
    for wrong, said in {"margn": "margn", "margin": "less than or equal to 1"}.items():
        with pytest.raises(ValueError, match=said):
            triggers.made("plateau", {wrong: 2})
    with pytest.raises(ValueError, match=r"fast 0\.9 is not below slow 0\.5"):
        triggers.made("plateau", {"fast": 0.9, "slow": 0.5})
    for wrong, said in {
        "times": ([0.5, 0.5], "more than once"),
        "block": ([2, 2], "more than once"),
        "shards": (9, "shards 9 are more than images 8"),
        "patience": (0, "greater than or equal to 1"),
        "sure": (-1, "greater than or equal to 0"),
        "of": ("both", "'alignment' or 'own'"),
    }.items():
        with pytest.raises(ValueError, match=said[1]):
            triggers.made("gradient-angle", {"images": 8, "shards": 2, wrong: said[0]})
    for nothing in ("times", "block"):
        with pytest.raises(ValueError, match="at least 1 item"):
            triggers.made("gradient-angle", {nothing: []})
    with pytest.raises(ValueError, match="nothing is called 'platau'; did you mean 'plateau'"):
        triggers.made("platau", {})


def test_readings_come_every_so_many_steps_once_what_is_needed_has_been_seen():
    trigger = Plateau(fast=0.5, slow=0.9)  # ten steps
    assert [triggers.first_reading(trigger, 100, every) for every in (1, 4, 10, 25)] == [110, 112, 110, 125]


class Odd(Trigger):
    """A trigger that asks for what there is not, and decides in words."""

    @property
    def needs(self):
        return {"last": Average("loss", 0.0)}

    def decide(self, step, history):
        return "stop"


def test_a_trigger_that_needs_or_decides_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(TRIGGERS, "odd", Odd)
    with pytest.raises(ValueError, match="'odd' needs last = .* expected an Average of residual or denoising"):
        triggers.made("odd", {})
    with pytest.raises(ValueError, match="'odd': decide returned 'stop', expected a Decision"):
        triggers.decided("odd", Odd(), [Reading(1, {"last": 0.0})])


def made_with(monkeypatch, **parts):
    """What comes of a trigger from elsewhere whose class has these parts."""
    parts = {"needs": property(lambda self: {}), "decide": lambda *_: None, **parts}
    monkeypatch.setitem(TRIGGERS, "odd", type("Odd", (Trigger,), {k: v for k, v in parts.items() if v is not None}))
    return triggers.made("odd", {})


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (Average("residual", 1.0), "decay of at least 0 and below 1"),
        (Average("residual", -0.1), "decay of at least 0 and below 1"),
        (Average("residual", math.nan), "decay of at least 0 and below 1"),
        (Average("residual", "0.9"), "decay of at least 0 and below 1"),
        (Average("residual", 0.9, 2.5), "whole number of at least 1"),
        (Average("residual", 0.9, 0), "whole number of at least 1"),
        (Average("residual", 0.9, True), "whole number of at least 1"),
    ],
)
def test_an_average_that_could_never_be_read_is_refused(monkeypatch, measure, said):
    with pytest.raises(ValueError, match=rf"^trigger 'odd' needs left = Average\(.*expected .*{said}$"):
        made_with(monkeypatch, needs=property(lambda self: {"left": measure}))


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (Angle(()), "a tuple of times from 0 to 1"),
        (Angle([0.5]), "a tuple of times from 0 to 1"),
        (Angle((1.5,)), "a tuple of times from 0 to 1"),
        (Angle((math.nan,)), "a tuple of times from 0 to 1"),
        (Angle((0.5,), (0,)), "block to be a tuple of whole numbers of at least 1"),
        (Angle((0.5,), 3), "block to be a tuple of whole numbers of at least 1"),
        (Angle((0.5,), (), 4, 5), "at least 2 shards, and as many images"),
        (Angle((0.5,), (), 4, 1), "at least 2 shards, and as many images"),
        (Angle((0.5,), of="both"), "an Angle of alignment or own"),
        ("residual", "an Average or an Angle"),
    ],
)
def test_an_angle_that_could_never_be_measured_is_refused(monkeypatch, measure, said):
    with pytest.raises(ValueError, match=rf"^trigger 'odd' needs left = .*, expected {said}$"):
        made_with(monkeypatch, needs=property(lambda self: {"left": measure}))


@pytest.mark.parametrize("name", ["step", 3])
def test_what_a_reading_has_beside_its_values_is_no_name_for_one(monkeypatch, name):
    with pytest.raises(ValueError, match=rf"'odd' needs {name!r}, expected a name, and another than 'step'"):
        made_with(monkeypatch, needs=property(lambda self: {name: Average("residual", 0.9)}))


@pytest.mark.parametrize("part", ["needs", "decide"])
def test_a_trigger_that_lacks_a_part_is_refused_before_anything_runs(monkeypatch, part):
    with pytest.raises(ValueError, match=rf"trigger 'odd' has no {part} of its own"):
        made_with(monkeypatch, **{part: None})


def test_what_a_trigger_of_others_raises_is_told_in_a_line_with_its_place(monkeypatch):
    def fails(*_):
        raise RuntimeError("no\nluck")

    place = rf"failed with RuntimeError: no luck \({__file__}, line {fails.__code__.co_firstlineno + 1}\)$"
    with pytest.raises(ValueError, match=f"^trigger 'odd': needs {place}"):
        made_with(monkeypatch, needs=property(fails))
    with pytest.raises(ValueError, match=f"^trigger 'odd': checking its parameters {place}"):
        made_with(monkeypatch, model_post_init=fails)
    with pytest.raises(ValueError, match=f"^trigger 'odd': decide after step 7 {place}"):
        triggers.decided("odd", made_with(monkeypatch, decide=fails), [Reading(7, {})])
    with pytest.raises(ValueError, match=r"^trigger 'odd': needs is \['left'\], expected a mapping"):
        made_with(monkeypatch, needs=property(lambda self: ["left"]))
    TRIGGERS.pop("odd")
    with pytest.raises(ValueError, match=r"^trigger 'odd' \(test_triggers:Odd\): decide after"):
        triggers.decided(
            "odd", type("Odd", (Trigger,), {"decide": fails, "__module__": "test_triggers"})(), [Reading(7, {})]
        )


def test_triggers_import_no_torch():
    code = "import sys, haste.align.triggers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
