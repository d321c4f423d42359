import pytest

from haste.align.triggers import Decision, FixedStop


def test_fixed_stop_stops_from_its_step_on():
    trigger = FixedStop(250)
    assert [trigger.decide(step).stop for step in (0, 249, 250, 251, 400)] == [False, False, True, True, True]


def test_a_decision_says_step_and_reason():
    decision = FixedStop(3).decide(7, [{"step": 6, "cosine": -0.9}])
    assert decision == Decision(stop=True, reason="fixed stop at step 3", step=7)


def test_decisions_replay_whatever_the_history():
    trigger = FixedStop(5)
    assert trigger.decide(4, []) == trigger.decide(4, [{"cosine": -1.0}])


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="-1"):
        FixedStop(-1)
