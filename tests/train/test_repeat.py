"""Bits on a GPU, and the record of how a state was made."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from haste import config
from haste.files.provenance import read_header
from haste.plan.plan import Plan
from haste.train import checkpoint, loop

DEVICE = "cuda"
RUNS = {"HASTE-6": {"alignment": "HASTE", "stop": 6, "milestones": [6, 12]}}


def _train(file, step, kill):
    """Make a state; killed in the fifth of its six steps, once the one of the third is on disk."""
    plan, taken = Plan(config.resolve(yaml.safe_load(Path(file).read_text()))), loop.Loop._step

    def armed(self, batch):
        if kill and batch.step == step - 2:
            self.checkpoints.background.settle()
            os.kill(os.getpid(), signal.SIGKILL)
        return taken(self, batch)

    loop.Loop._step = armed
    loop.train(plan, plan.state("HASTE-6", step))


def _in_a_process(plan, step, kill=False):
    """CUDA does not survive a fork: this file is run as a program."""
    given = [sys.executable, __file__, str(plan.file), str(step), *(["kill"] if kill else [])]
    done = subprocess.run(given, timeout=300, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-2000:]


@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_six_steps_on_a_gpu_are_three_a_kill_and_three_before_and_after_the_stop(make_plan, tiny, compiled):
    training = {**tiny["training"], "precision": "bf16"}
    runtime = {"device": DEVICE, "save_every": 3, "trackers": [], "compile": compiled}
    plan, found = make_plan(training=training, runs=RUNS, runtime=runtime), {}
    for kill in (False, True):
        for step in (6, 12):
            path = Path(plan.path(plan.state("HASTE-6", step)))
            if kill:
                path.unlink()
                _in_a_process(plan, step, kill=True)
                assert [file.name for file in path.parent.glob("rolling/*")] == [f"step-{step - 3:08d}.safetensors"]
            _in_a_process(plan, step)
            found[kill, step] = load_file(path)
            assert read_header(path)["provenance"]["deterministic"]
    for step in (6, 12):
        for name, value in found[False, step].items():
            assert torch.equal(found[True, step][name], value), (step, name)


def test_the_record_of_a_state_says_whether_its_bits_repeat_and_since_when(make_plan, monkeypatch, caplog):
    plan = make_plan()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "kernels", {"deterministic": False})  # as on a GPU that was asked so
        loop.train(plan, plan.state("vanilla", 8))
    made = read_header(loop.train(plan, plan.state("vanilla", 16)))["provenance"]
    assert made["deterministic"] and made["changes"] == ["step 8: deterministic: False before, True from here on"]
    assert "was made with deterministic: False, going on with True" in caplog.text


if __name__ == "__main__":
    _train(sys.argv[1], int(sys.argv[2]), kill=sys.argv[3:] == ["kill"])
