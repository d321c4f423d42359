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
        for name in ("vanilla", "REPA", "HASTE", "DiT HASTE"):
            own = dit if name.startswith("DiT") else plan
            state = own.state(name.removeprefix("DiT "), 10)
            loop.train(own, state)
            records = journal.read(Path(own.path(state)).parent / "log.jsonl")
            drop = ("step", "images_per_s", "seconds", "time", "waiting", "memory_mb")
            golden[name] = [{n: round(v, 6) for n, v in r.items() if n not in drop} for r in records]
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
