"""GPU memory of training, known before a GPU is asked for: what `haste memory` measured, and what follows. No torch.

A step's peak depends on the network, the alignment terms, the precision and the images that a rank computes at once,
not on numbers: it is measured once (`haste/train/memory.py`), on tensors without any, and kept under what decides it.

n images of a rank's microbatch, k microbatches of a step. MB are 10^6 bytes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste import __version__, extensions
from haste.align.terms import of_features
from haste.config import facts_in, model_in
from haste.files import artefact
from haste.plan.names import Segment
from haste.plan.runs import readable_name
from haste.plan.target_spec import TargetSpec

if TYPE_CHECKING:
    from haste.plan.plan import Plan

GB = 1e9  # gpu_memory_gb counts 10^9 bytes, makers 2^30: the rest, 7 %, is for CUDA itself and the allocator's gaps
# What a term's settings say of its weight: it changes no memory.
_WEIGHING = {"weight", "warmup", "t_min", "t_max", "ramp", "trigger", "release", "temperature", "normalise_factor"}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step is computed.

    gpus: ranks, each on a GPU of its own; accumulate: microbatches of each; checkpoint_blocks: keep only the blocks'
    inputs for the backward pass.
    """

    gpus: int
    accumulate: int
    checkpoint_blocks: bool

    def images(self, batch: int) -> int:
        """Images that a rank computes at once, n, of a batch."""
        return math.ceil(batch / (self.gpus * self.accumulate))


@dataclasses.dataclass(frozen=True)
class Memory:
    """A training step's memory, as measured, in MB.

    update: the peak while the parameters are updated; batch: of one image's inputs; ahead: batches that are on the
    device before their step; lines: (gradients kept, blocks
    checkpointed) -> constant and MB an image of the peak in the forward and backward pass. Gradients are kept where
    several microbatches, or DDP's buckets, add to them.
    """

    update: float
    batch: float
    ahead: int
    lines: Mapping[tuple[bool, bool], tuple[float, float]]

    @classmethod
    def read(cls, path: str, key: str) -> Memory:
        """What `haste memory` wrote. ValueError for a damaged or foreign file."""
        found = artefact.read_json(path, "memory")
        artefact.check_entries(path, found, key=str, update_mb=float, batch_mb=float, ahead=int, lines=list)
        if found["key"] != key:
            raise ValueError(f"{path}: the memory of {found['key']}, expected {key}; remove it")
        lines = {(kept, checkpointed): (base, each) for kept, checkpointed, base, each in found["lines"]}
        return cls(found["update_mb"], found["batch_mb"], found["ahead"], lines)

    def knows(self, way: Way) -> bool:
        """Whether it was measured: not every network can have its blocks checkpointed."""
        return (way.gpus * way.accumulate > 1, way.checkpoint_blocks) in self.lines

    def peak(self, way: Way, images: int) -> float:
        """MB at the height of a step with n images at once."""
        base, each = self.lines[way.gpus * way.accumulate > 1, way.checkpoint_blocks]
        waiting = self.batch * images * (way.accumulate * (1 + self.ahead) - 1)
        return max(self.update + self.batch * images, base + each * images) + waiting

    def most(self, way: Way, room: float) -> int:
        """The most images at once that fit into so many MB; 0 if not one does."""
        waiting = self.batch * (way.accumulate * (1 + self.ahead) - 1)
        base, each = self.lines[way.gpus * way.accumulate > 1, way.checkpoint_blocks]
        found = min((room - base) / (each + waiting), (room - self.update) / (self.batch + waiting))
        return max(0, math.floor(found))


def recipe_of(plan: Plan, segment: Segment) -> dict[str, Any] | None:
    """What decides the memory of a segment's steps; None if that is unknown before a teacher is loaded."""
    recipe = plan.trajectories[segment.state.trajectory].recipe
    training = {key: recipe["training"][key] for key in ("process", "time_dtype") if key in recipe["training"]}
    half = "bf16" if recipe["training"]["precision"] == "fp16" else recipe["training"]["precision"]  # the same bytes
    names = list(dict.fromkeys(term["teacher"] for term in segment.terms.values()))
    teachers = [_teacher(plan, segment, name) for name in names]
    if None in teachers:
        return None
    terms = {
        kind: {key: value for key, value in term.items() if key not in _WEIGHING}
        | {"teacher": str(names.index(term["teacher"])), "cached": kind in segment.cached}
        for kind, term in segment.terms.items()
    }
    return {
        "haste": __version__,
        "torch": importlib.metadata.version("torch"),
        **{key: recipe[key] for key in ("model", "classes", "condition") if key in recipe},
        "training": {**training, "precision": half},
        "resolution": plan.config.images.resolution,
        "terms": terms,
        "teachers": {str(place): teacher for place, teacher in enumerate(teachers)},
    }


def _teacher(plan: Plan, segment: Segment, name: str) -> dict[str, Any] | None:
    """A teacher's network, if a term asks it while training, and the rows of its stored targets, if one reads them."""
    chosen, mine = plan.config.teachers[name], {k: t for k, t in segment.terms.items() if t["teacher"] == name}
    found: dict[str, Any] = {}
    if name in segment.teachers:
        found["low_pass"] = chosen.filter.low_pass if chosen.filter else None
        if chosen.trained:
            found["trained"] = chosen.trained.model_dump(include={"depth", "width", "heads", "patch"})
        elif chosen.pretrained and chosen.pretrained.name not in extensions.names("teachers"):
            found["pretrained"] = chosen.pretrained.name
        else:
            return None
    for kind in set(mine) & set(segment.cached):
        if (shape := plan.teacher_size(name)) is None:
            return None
        rows = TargetSpec.of(kind, mine[kind]).layout(shape, chosen.pca)
        found["stored"] = found.get("stored", {}) | {field: list(row) for field, (row, _) in rows.items()}
    return found


def file_of(plan: Plan, recipe: Mapping[str, Any]) -> str:
    """Where the measurement of a recipe is kept."""
    return f"{plan.root}/memory/{artefact.fingerprint(recipe)}.json"


@dataclasses.dataclass(frozen=True)
class Need:
    """What some runs' training takes of each GPU.

    who: the runs, in words; recipe: what decides it, or None; memory: if it is measured; way: how a step is computed;
    batch: images of a step, over all ranks; state: MB of what is saved, of which rank 0 has a copy in host memory.
    """

    who: str
    recipe: Mapping[str, Any] | None
    memory: Memory | None
    way: Way
    batch: int
    state: float

    @property
    def key(self) -> str:
        """Equal for equal needs."""
        return artefact.fingerprint([self.recipe or self.who, self.batch, dataclasses.astuple(self.way)])

    @property
    def peak(self) -> float | None:
        """MB of a rank, or None if that is not measured."""
        return None if self.memory is None else self.memory.peak(self.way, self.way.images(self.batch))

    def fitting(self, room: float) -> list[Way]:
        """Other ways to compute a step, by which results differ by rounding only, and which fit into so many MB."""
        way, sparing = self.way, dataclasses.replace(self.way, checkpoint_blocks=True)
        more = range(1, self.batch + 1)

        def first(of: Way, key: str) -> Way | None:
            greater: Iterable[dict[str, Any]] = ({key: number} for number in more if number > getattr(of, key))
            found = (dataclasses.replace(of, **changed) for changed in greater)
            return next((one for one in found if self._fits(one, room)), None)

        one_change = [first(way, "accumulate"), sparing if sparing != way and self._fits(sparing, room) else None]
        two = [] if any(one_change) else [first(sparing, "accumulate")]
        return [one for one in (*one_change, *two, first(way, "gpus")) if one]

    def _fits(self, way: Way, room: float) -> bool:
        whole = not self.batch % (way.gpus * way.accumulate)
        assert self.memory is not None
        return whole and self.memory.knows(way) and self.memory.peak(way, way.images(self.batch)) <= room

    def _said(self, way: Way) -> str:
        assert self.memory is not None
        words = {
            f"runtime.accumulate: {way.accumulate}": way.accumulate != self.way.accumulate,
            "runtime.checkpoint_blocks: true": way.checkpoint_blocks != self.way.checkpoint_blocks,
            f"{way.gpus} GPUs": way.gpus != self.way.gpus,
        }
        images, peak = way.images(self.batch), self.memory.peak(way, way.images(self.batch))
        return (
            f"{' with '.join(one for one, new in words.items() if new)} ({images} images at once, {peak / 1e3:.1f} GB)"
        )

    def refusal(self, gigabytes: float, whose: str) -> str:
        """Why it does not fit into a GPU's memory, and what would; empty if it fits, or nobody knows."""
        room = gigabytes * GB / 1e6
        if self.memory is None or self.peak is None or self.peak <= room:
            return ""
        images, fits = self.way.images(self.batch), self.memory.most(self.way, room)
        said = (
            f"{self.who}: {images} images at once take {self.peak / 1e3:.1f} GB of a GPU, {whose} is {gigabytes:g} GB"
        )
        offers = [self._said(way) for way in self.fitting(room)]
        other = f"a smaller training.batch, which is another run ({fits} at once fit)" if fits else "a smaller network"
        return f"{said}. These would fit: {'; '.join([*offers, *([] if offers else [other])])}"


def needs(plan: Plan, gpus: int | None = None) -> list[Need]:
    """What the training that is left takes, each kind once; nothing on CPUs.

    Args:
        plan: of the configuration.
        gpus: ranks of a training job; None is `runtime.processes`.
    """
    if plan.config.runtime.device == "cpu":
        return []
    runtime = plan.config.runtime
    way = Way(gpus or runtime.processes, runtime.accumulate, runtime.checkpoint_blocks)
    found = (need(plan, plan.segment(state), way) for state in plan.jobs.to_train)
    return list({one.key: one for one in found}.values())


def check(needs: Iterable[Need], gigabytes: float, whose: str) -> None:
    """Refuse training that does not fit into a GPU's memory, as far as that is measured.

    Args:
        needs: of a plan, or of its jobs.
        gigabytes: of a GPU's memory.
        whose: where that number is from, in words.

    Raises:
        ValueError: a line for each kind of training, with the settings that would fit.
    """
    if found := [said for one in needs if (said := one.refusal(gigabytes, whose))]:
        raise ValueError("\n".join(found))


def need(plan: Plan, segment: Segment, way: Way) -> Need:
    """What a segment's training takes."""
    recipe, trajectory = recipe_of(plan, segment), plan.trajectories[segment.state.trajectory]
    memory = None
    if recipe is not None and Path(file_of(plan, recipe)).exists():
        memory = Memory.read(file_of(plan, recipe), artefact.fingerprint(recipe))
    who = " + ".join([readable_name(model_in(trajectory.recipe), {}, "").strip("-"), *segment.terms])
    return Need(who, recipe, memory, way, trajectory.recipe["training"]["batch"], state_megabytes(plan, segment))


def head_parameters(plan: Plan, segment: Segment) -> int:
    """Weights of the heads of a segment's feature terms."""
    recipe = plan.trajectories[segment.state.trajectory].recipe
    return sum(parameters_of_head(plan, recipe, term) for term in of_features(segment.terms).values())


def parameters_of_head(plan: Plan, recipe: dict[str, Any], term: Mapping[str, Any]) -> int:
    """Weights of the head of a feature term. Where only loading the teacher can tell its width, the student's is
    taken."""
    width, shape = facts_in(recipe).taps[f"tokens.{term['depth']}"].width, plan.teacher_size(term["teacher"])
    wide = plan.config.teachers[term["teacher"]].pca or (shape.width if shape else width)
    if term["head"] == "mlp":
        return (width + term["hidden"] + wide) * term["hidden"]
    return width * wide * (term["kernel"] or 1) ** 2


def state_megabytes(plan: Plan, segment: Segment) -> float:
    """MB of a segment's state: weights, their average and two moments; heads have no average."""
    recipe = plan.trajectories[segment.state.trajectory].recipe
    size = 8 if recipe["training"]["precision"] == "fp64" else 4
    return size * (4 * facts_in(recipe).parameters + 3 * head_parameters(plan, segment)) / 1e6
