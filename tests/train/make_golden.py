"""Write golden.json anew: `python tests/train/make_golden.py`. Say in the commit why the losses changed."""

import copy
import json
import tempfile
from pathlib import Path

import torch
import yaml

from haste import config
from haste.cli import main as cli
from haste.files import journal
from haste.plan.plan import Plan
from haste.train import loop

HERE = Path(__file__).parent
VIT = {"trained": {"steps": 2, "batch": 8, "depth": 2, "width": 16, "heads": 2, "patch": 4}}  # as in tiny.yaml
# Variants of the feature term and its teacher, of rows with these names.
VARIANTS = {
    "teachers": {"vit": VIT, "low": VIT | {"filter": {"low_pass": 0.5}}},
    "alignments": {
        "iREPA": {"features": {"teacher": "vit", "depth": 1, "head": "conv", "normalise": "spatial"}},
        "low band": {
            "features": {"teacher": "low", "depth": 1, "head": "linear", "layer": 0, "t_min": 0.2, "t_max": 0.9}
        },
    },
    "runs": {name: {"alignment": name} for name in ("iREPA", "low band")},
}


def main() -> None:
    torch.set_num_threads(1)
    tiny = yaml.safe_load((HERE.parent / "tiny.yaml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        raw = {**copy.deepcopy(tiny), "results": f"{folder}/results", "runtime": {"log_every": 1, "save_every": 100}}
        raw["defaults"]["milestones"] = [10]
        path = Path(folder, "tiny.yaml")
        path.write_text(yaml.safe_dump(raw))
        shards = [["--shard", "0"], ["--shard", "1"], ["--join"]]
        jobs = [["images", *how] for how in shards] + [["autoencoder"], ["teacher", "vit"]]
        for job in [*jobs, *(["latents", *how] for how in shards)]:
            assert cli.main([job[0], "-c", str(path), *job[1:]]) == 0
        plan, golden = Plan(config.resolve(raw)), {}
        dit = Plan(config.resolve(raw | {"models": {"dot": {**raw["models"]["dot"], "architecture": "dit"}}}))
        other = Plan(config.resolve(raw | VARIANTS))
        for name in ("vanilla", "REPA", "HASTE", "DiT HASTE", *VARIANTS["runs"]):
            own = dit if name.startswith("DiT") else other if name in VARIANTS["runs"] else plan
            state = own.state(name.removeprefix("DiT "), 10)
            loop.train(own, state)
            records = journal.read(Path(own.path(state)).parent / "log.jsonl")
            drop = ("step", "images_per_s", "seconds", "time", "waiting", "memory_mb")
            golden[name] = [{n: round(v, 6) for n, v in r.items() if n not in drop} for r in records]
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
