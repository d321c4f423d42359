"""The page on Python shows code that runs."""

import re
from pathlib import Path

from haste.cli import main as cli
from haste.train import loop

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_code_of_the_page_runs_as_it_stands(make_plan, capsys):
    plan = make_plan(runs={"HASTE": {"alignment": "HASTE", "milestones": [8]}})
    loop.train(plan, plan.state("HASTE", 8))
    (row,) = plan.rows
    for command in ("sample", "evaluate"):
        assert cli.main([command, row.evaluation.name, "-c", str(plan.file)]) == 0
    code = BLOCKS[0].replace("results/digits/config.json", str(plan.file)).replace("200", "8")
    found = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert set(found["losses"]) == {"denoising", "features", "attention"}
    assert found["pictures"].shape == (8, 8, 8, 3)
    printed = capsys.readouterr().out
    for name in ("fd", "precision", "recall", "class_accuracy", "attention"):
        assert f"'{name}': " in printed


def test_weights_from_elsewhere_are_drawn_from_with_noise_of_ones_own(make_plan, tmp_path):
    plan = make_plan(runs={"vanilla": {"milestones": [3]}})
    state = loop.train(plan, plan.state("vanilla", 3))
    code = BLOCKS[1].replace("0400000.pt", str(state)).replace("stabilityai/sd-vae-ft-ema", plan.decoder)
    found = {}
    exec(compile(code, str(PAGE), "exec"), found)
    pictures = found["pictures"]
    assert pictures.shape == (8, 8, 8, 3) and (pictures[0] != pictures[1]).any() and (pictures[0] != pictures[4]).any()


def test_the_code_of_the_page_is_short():
    assert len(BLOCKS) == 2
    for code in BLOCKS:
        lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len([line for line in lines if not re.match(r"from |import ", line)]) <= 22
