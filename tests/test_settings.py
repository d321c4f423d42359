"""What the report says of a run."""

from pathlib import Path

import yaml

from haste import config
from haste.plan.plan import Plan
from haste.report import gather

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())


def test_what_an_ablation_may_vary_has_words_for_times_bounds_and_ramps():
    features = {"teacher": "vit", "depth": 1, "similarity": "nt-xent", "t_min": 0.1, "warmup": 3}
    alignments = {"a": {"features": features, "attention": TINY["alignments"]["HASTE"]["attention"]}}
    timesteps = {"distribution": "lognormal", "mu": 1.0}
    row = {"alignment": "a", "stop": {"features": 8, "attention": 12}, "ramp": {"attention": 4}}
    runs = {"soft": {**row, "training": {"timesteps": timesteps}}, "sharp": {**row, "ramp": {}}}
    plan = Plan(config.resolve({**TINY, "alignments": alignments, "runs": runs}))
    soft, sharp = (gather.settings(plan, run) for run in ("soft", "sharp"))
    assert soft["ramp"] == "attention over 4 steps, cosine"
    assert soft["timesteps"] == "lognormal(1, 1)"
    assert (soft["feature similarity"], soft["feature t_min"], soft["feature warmup"]) == ("nt-xent", "0.1", "3")
    assert {key for key in soft if soft[key] != sharp.get(key)} == {"ramp", "timesteps"}
