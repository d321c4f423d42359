"""Results folders as chance makes them: files with names and no content, which is all that a plan and a dry run see."""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import yaml

from haste import config
from haste.files import artefact
from haste.plan.plan import Plan

TINY = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())
VIT, CNN = TINY["teachers"]["vit"], TINY["detector"]["cnn"]
COSINE = {"measure": "gradient-cosine", "images": 6, "shards": 2, "t": [0.2], "alignment": "HASTE"}
PLATEAU = {"trigger": "plateau", "after": 8, "every": 4, "fast": 0.5, "slow": 0.75, "margin": 1}
WAYS = {
    **TINY["sampling"],
    "heun": {"sampler": "heun", "steps": 3, "count": 20},
    "pictures": {"sampler": "euler", "steps": 2, "labels": [7, 2]},
}
#: Of these, all but the last share a job's network and noise.
FAMILY = {
    "plain": TINY["sampling"]["quick"],
    "guided": {**TINY["sampling"]["quick"], "guidance": 2.0},
    "late": {**TINY["sampling"]["quick"], "guidance": 2.0, "interval": [0.0, 0.7]},
    "another": {**TINY["sampling"]["quick"], "seed": 1},
}


class Chance:
    """A configuration and a results folder that follow from a seed.

    Attributes:
        raw: the configuration, after all changes of mind.
    """

    def __init__(self, seed: int, folder: Path, ways=None):
        """`ways`: the ways to sample that it chooses among, `WAYS` by default."""
        self.seed, self.random, self.folder, self.ways = seed, random.Random(seed), folder, ways or WAYS
        self.raw = self.configuration()
        self.finish(1.0)
        for _ in range(self.random.randint(0, 2)):
            self.change_of_mind()
            self.finish(self.random.choice([0.0, 0.0, 0.5, 0.9]))
        for _ in range(self.random.randint(0, 4)):
            self.lose()
        self.file = folder / "world.yaml"
        self.file.write_text(json.dumps(self.raw))

    def plan(self) -> Plan:
        return Plan(config.resolve(copy.deepcopy(self.raw)))

    def some(self, *given):
        """Some of these, at least one, in their order."""
        return self.random.sample(given, self.random.randint(1, len(given)))

    def configuration(self):
        pick, raw = self.random.choice, copy.deepcopy(TINY)
        raw |= {
            "results": str(self.folder / "results"),
            "name": "world",
            "sampling": self.ways,
            "measures": {"cos": COSINE},
        }
        raw["images"]["shards"], raw["autoencoder"]["shards"] = pick([1, 2]), pick([1, 2])
        raw["runtime"]["sample_shards"] = pick([1, 2])
        raw["teachers"] = {"vit": {**VIT, "cache": pick(["off", "off", "features", "features+attention"])}}
        if raw["teachers"]["vit"]["cache"] != "off":
            raw["teachers"]["vit"]["pca"], raw["cache"] = pick([None, 5]), {"shards": pick([1, 2])}
        raw["detector"] = {"cnn": CNN} | (
            {"wide": {"trained": {**CNN["trained"], "width": 16}}} if pick("yn") == "y" else {}
        )
        raw["runs"] = {}
        for name in self.some("a", "b", "c"):
            raw["runs"][name] = self.run()
        if self.seed % 3 == 0 and raw["teachers"]["vit"]["cache"] == "off":
            raw["runs"][name]["training"] = {"flip": True}
        return raw

    def run(self):
        pick = self.random.choice
        found = {
            "milestones": sorted(self.some(4, 8, 12, 16)),
            "sampling": self.some(*self.ways),
            "seeds": pick([[0], [0], [0, 1]]),
        }
        if pick("yyn") == "y":
            found["alignment"] = pick(["REPA", "HASTE"])
            found |= pick([{}, {}, {"stop": pick([4, 6, 8, 12])}, {"stop": PLATEAU}])
        return found | pick([{}, {}, {"measures": ["cos"]}])

    def change_of_mind(self):
        """A run, a milestone, a way to sample, a detector or a measure more; a run, or its name, less."""
        runs, what = (
            self.raw["runs"],
            self.random.choice(["run", "milestone", "way", "detector", "measure", "less", "title"]),
        )
        row = runs[self.random.choice(list(runs))]
        if what == "run":
            runs[f"r{len(runs)}"] = self.run()
        elif what == "milestone":
            row["milestones"] = sorted({*row["milestones"], self.random.choice([2, 6, 10, 14, 20])})
        elif what == "way":
            row["sampling"] = list(dict.fromkeys([*row["sampling"], self.random.choice([*self.ways])]))
        elif what == "detector":
            self.raw["detector"]["more"] = {"trained": {**CNN["trained"], "width": 24}}
        elif what == "measure":
            row["measures"] = ["cos"]
        elif what == "less" and len(runs) > 1:
            del runs[self.random.choice(list(runs))]
        else:
            self.raw["title"] = "another"

    def finish(self, share: float):
        """What a run of the workflow would make, or that share of it, at times of no order."""
        plan = self.plan()
        shards = [path for one in plan.detectors.values() for path in one.reference.shard_files]
        jobs = [one for jobs in plan.jobs.every.values() for job in jobs for one in (job, *job.beside)]
        for path in [*shards, *(path for job in jobs for path in job.makes)]:
            if not os.path.exists(path) and self.random.random() < share:
                self.make(plan, path)

    def make(self, plan: Plan, path: str):
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        stores = {one.manifest: one for one in (plan.images, *plan.targets.values())}
        store = stores.get(path)
        about = {"schema": artefact.SCHEMA, "kind": "store", "count": 1797, "classes": list("0123456789")}
        if store:
            about |= {"recipe": store.recipe, "key": store.key, "shards": [{}] * store.shards}
        place.write_text(json.dumps(about))
        when = 1e9 + self.random.randint(0, 1000)
        os.utime(place, (when, when))

    def lose_drawn(self):
        """Of some sets of samples some files, and most of what was made of them."""
        plan = self.plan()
        for one in plan.evaluations.values():
            files = [*one.sample_files, *(path for judged in one.judgements for path in judged.features.shard_files)]
            share = self.random.choice([0.0, 0.0, 0.3, 0.6, 1.0])
            results = [one.grid, *(judged.score for judged in one.judgements)]
            for path in [*files, *(path for path in results if self.random.random() < share + 0.2)]:
                if path in results or self.random.random() < share:
                    Path(path).unlink(missing_ok=True)

    def lose(self):
        """A file, some files, a store, or a whole room."""
        root = self.folder / "results"
        rooms = [room for room in root.iterdir() if room.is_dir()] if root.exists() else []
        if not rooms:
            return
        room, pick = self.random.choice(rooms), self.random.choice
        inside = sorted(room.iterdir())
        what = pick(["file", "files", "files", "folder", "folder", "room", "kind"])
        if what == "room":
            shutil.rmtree(room)
        elif what == "kind":
            kind = pick(["images-*", "latents-*", "targets-*", "autoencoder-*", "detector-*", "teacher-*", "pca-*"])
            for one in root.glob(f"*/{kind}"):
                shutil.rmtree(one)
        elif what == "folder" and inside:
            one = pick(inside)
            shutil.rmtree(one) if one.is_dir() else one.unlink()
        else:
            files = sorted(path for path in room.rglob("*") if path.is_file())
            for path in self.random.sample(files, min(len(files), 1 if what == "file" else self.random.randint(1, 8))):
                path.unlink()
