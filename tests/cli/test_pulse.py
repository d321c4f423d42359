"""A job that says nothing for long is known to be alive by its log."""

import contextlib
import re
import subprocess
import sys

import pytest

from haste.cli import main as cli
from haste.cli import pulse

JOB = """
import logging, sys, time
from haste.cli import pulse
logging.basicConfig(level=logging.INFO)
pulse.QUIET, pulse.WAITING = 0.3, 60.0
with pulse.beating():
    print("begun", file=sys.stderr, flush=True)
    end = time.time() + 1.0
    while time.time() < end:
        sum(range(1000)) if "busy" in sys.argv else time.sleep(0.2)
"""


@pytest.mark.parametrize("how", ["busy", "waiting"])
def test_a_silent_job_that_computes_says_so_in_its_log_and_one_that_waits_is_rarer(tmp_path, how):
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", JOB, how], stderr=log, check=True, timeout=60)
    first, *lines = (tmp_path / "log").read_text().splitlines()
    assert first == "begun"
    assert bool(lines) == (how == "busy")
    assert all(re.fullmatch(r"INFO:haste:at work for [01] s, computes for [01] s of [01] s", line) for line in lines)


def test_commands_that_answer_a_person_have_none(make_plan, monkeypatch, capsys):
    plan, beats = make_plan(), []
    monkeypatch.setattr(pulse, "beating", lambda: beats.append(1) or contextlib.nullcontext())
    assert cli.main(["table", "-c", str(plan.file)]) == 2 and not beats
    assert cli.main(["images", "--join", "-c", str(plan.file)]) == 0 and beats
