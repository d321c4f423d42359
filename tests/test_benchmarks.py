"""The benchmarks follow the package: each still imports what it measures."""

import argparse
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import haste
from haste import config
from haste.teachers.encoder import Teacher

FOLDER = Path(haste.__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_prints_its_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python benchmarks/NAME.py` does: one imports another
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out


def test_the_loops_that_the_benchmark_compares_take_the_same_step(monkeypatch):
    """With one idea taken out, and with all of them, as published loops are: losses differ by rounding alone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    step, throughput = (importlib.import_module(name) for name in ("step", "throughput"))
    monkeypatch.setitem(step.MODELS, "toy", config.Model(depth=3, width=24, heads=2, patch_size=4))
    monkeypatch.setitem(config.MAPPINGS, "toy", (2, [0, 1], [1, 2]))
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0)
    teacher = Teacher(vit, identity="toy", norm=((0.5,) * 3, (0.5,) * 3))
    arguments = argparse.Namespace(model="toy", precision="fp32", eager=True)

    def losses(name, shape):
        torch.manual_seed(0)
        found = throughput.Loop(name, arguments, 2, teacher, torch.device("cpu"), shape).run(1)
        return {kind: float(value.detach()) for kind, value in found.items()}

    plain = {name: losses(name, throughput.Shape()) for name in (throughput.ALIGNED, throughput.STOPPED)}
    assert [len(kinds) for kinds in plain.values()] == [3, 1]
    for _, name, shape in throughput.IDEAS:
        assert losses(name, shape) == pytest.approx(plain[name], rel=1e-4)
