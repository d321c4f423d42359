"""When to stop, from readings alone: no model, no torch."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haste.align import triggers
from haste.align.triggers import TRIGGERS, Average, Plateau, Reading, Trigger


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
