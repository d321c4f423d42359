"""The benchmarks follow the package: each still imports what it measures."""

import runpy
import sys
from pathlib import Path

import pytest

import haste

FOLDER = Path(haste.__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_prints_its_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python benchmarks/NAME.py` does: one imports another
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out
