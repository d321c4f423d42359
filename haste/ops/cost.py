"""What will run and its cost: `haste plan`. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from haste import extensions
from haste.align import triggers
from haste.align.terms import of_features
from haste.config import Sampling, branches, facts_in, written
from haste.files import journal, units
from haste.files.codecs import expected_share
from haste.files.provenance import provenance_of
from haste.networks.registry import AUTOENCODERS, DETECTORS
from haste.networks.spec import blocks
from haste.ops.pace import Pace
from haste.plan import memory
from haste.plan.jobs import TRAINING, Job
from haste.plan.machines import Machine, gpu_of
from haste.plan.measures import Measurement
from haste.plan.names import MOST_COMPARED, Artefact, Detector, Evaluation, Judgement, Segment
from haste.plan.plan import Plan
from haste.plan.target_spec import Shape, flops_per_image

MB = 1e6
# Seconds that follow from no operations, of which small networks have most: of a job's start, which imports torch,
# diffusers for the small autoencoder, and opens what a measure looks at.
START, STARTS = 2.0, {"latents": 5.0, "reconstruct": 5.0, "sample": 5.0, "measure": 3.5}
# Rules whose jobs take no GPU; those of training take one for each rank, others one.
WITHOUT_GPU = {"images_check", "images", "images_join", "latents_join", "text_join", "targets_join", "grid"}
WITHOUT_GPU |= {"report", "autoencoder", "teacher", "detector", "text_encoder"}


def parameters(recipe: dict[str, Any]) -> int:
    """Parameters of a model without projectors, from a trajectory's recipe."""
    return facts_in(recipe).parameters


def training_flops(recipe: dict[str, Any]) -> float:
    """Floating-point operations of one image's forward and backward pass; backward costs twice the forward."""
    return 3.0 * facts_in(recipe).flops


@dataclasses.dataclass(frozen=True)
class Stage:
    """One line of the plan: jobs of a kind, how many are left, and their cost.

    seconds: of the jobs whose time can be estimated, one after another or, on a machine's GPUs, side by side; unknown:
    whether there are others; gpu_seconds: with each GPU counted.
    """

    name: str
    jobs: int
    left: int
    seconds: float
    megabytes: float
    unknown: bool = False
    gpu_seconds: float = 0.0

    @property
    def time(self) -> str:
        """Of what is left, in words."""
        known = units.duration(self.seconds) if self.seconds and self.left else ""
        return " + ".join(word for word in (known, "unknown" if self.unknown else "") if word)


def training_seconds(plan: Plan, segment: Segment, pace: Pace) -> tuple[float, bool]:
    """Seconds that a segment will take, and whether that is measured (by a journal on its lineage) or computed.

    A computed time includes heads, the forward passes of teachers of known size, and the triggers' measurements.
    """
    recipe = plan.trajectories[segment.state.trajectory].recipe
    steps, batch = segment.state.step - segment.start, recipe["training"]["batch"]
    for piece in reversed(segment.pieces):
        if rate := _rate(Path(plan.root, "states", piece.trajectory), pace.machine):
            return steps * batch / rate, True
    work = training_flops(recipe) + sum(_teacher_flops(plan, name) or 0.0 for name in segment.teachers)
    terms, layers = segment.terms, 0
    for term in of_features(terms).values():
        work += 6.0 * memory.parameters_of_head(plan, recipe, term) * _tokens(recipe, term["depth"])
    if "attention" in terms:
        layers = len(terms["attention"]["student_layers"])
    work = steps * batch * work + angle_flops(plan, segment)
    return pace.training(steps, batch, 1 + layers, work, recipe["training"]["precision"]), False


def _rate(folder: Path, machine: Machine | None) -> float | None:
    """Images a second on a machine, by the log of a trajectory: on any of the kind that trained it, as many as GPUs."""
    lines = journal.read(folder / "log.jsonl")
    rate = median(line["images_per_s"] for line in lines[-9:]) if lines else None  # the last may include a start
    if rate is None or machine is None:
        return rate
    newest = max(folder.glob("**/step-*.safetensors"), key=lambda path: path.name, default=None)
    made = provenance_of(newest).get("provenance", {}) if newest else {}
    if gpu_of(made.get("hardware", {}).get("gpu", "")) != machine.name:
        return None
    return rate * machine.count / made.get("processes", 1)


def _tokens(recipe: dict[str, Any], depth: int) -> int:
    """Tokens of an image after a block."""
    rows, columns = facts_in(recipe).taps[f"tokens.{depth}"].grid
    return rows * columns


def angle_flops(plan: Plan, segment: Segment) -> float:
    """Operations of the angles that triggers measure on a segment, if they stop nothing.

    At most a forward and a backward pass of each image at each time, and a forward pass of each teacher for each image.
    """
    times: dict[tuple[Any, ...], set[float]] = {}  # measured together -> at which times
    asked = [(kind, term["trigger"]) for kind, term in segment.terms.items() if term["trigger"]]
    for kind, settings in [*asked, *segment.watches]:
        own = dict(settings)
        name, after, every = own.pop("trigger"), own.pop("after"), own.pop("every")
        for angle in triggers.made(name, own).needs.values():
            if isinstance(angle, triggers.Angle):
                whose = kind if angle.of == "own" else ""
                times.setdefault((after, every, angle.images, angle.shards, whose), set()).update(angle.times)
    recipe = plan.trajectories[segment.state.trajectory].recipe
    look = sum(_teacher_flops(plan, name) or 0.0 for name in segment.teachers)
    return sum(
        (max(segment.state.step - after, 0) // every - max(segment.start - after, 0) // every)
        * images
        * (len(at) * training_flops(recipe) + look)
        for (after, every, images, *_), at in times.items()
    )


def _teacher_flops(plan: Plan, name: str) -> float | None:
    """Operations of a teacher's forward pass on an image; None if they are unknown until it is loaded."""
    shape = plan.teacher_size(name)
    return None if shape is None else flops_per_image(shape)


def sampling_seconds(plan: Plan, evaluation: Evaluation, pace: Pace) -> float | None:
    """Seconds that one shard of samples will take, computed: one forward pass per evaluation, two with guidance.

    None for an adaptive sampler, whose NFE is known only afterwards.
    """
    sampling, recipe = evaluation.sampling, plan.trajectories[evaluation.state.trajectory].recipe
    evaluations = _evaluations(sampling)
    if evaluations is None:
        return None
    if sampling.guidance > 1:
        evaluations *= 1 + sampling.interval[1] - sampling.interval[0]
    pixels = plan.config.images.resolution**2
    image = facts_in(recipe).flops * evaluations + (_autoencoder_flops(plan.decoder, 1) or 0.0) * pixels
    return image * sampling.count / evaluation.shards / pace.of(getattr(sampling, "precision", "fp32"))


def _evaluations(sampling: Sampling) -> float | None:
    """NFE of a sample; None for an adaptive sampler."""
    if sampling.steps is None:
        return None
    if sampling.sampler in extensions.names("samplers"):
        found = extensions.one("samplers", sampling.sampler, ()).evaluations
        return None if found is None else found(sampling.steps)
    return 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps


def _autoencoder_flops(name: str, way: int) -> float | None:
    """Operations per pixel of a pretrained autoencoder's encoding (way 0) or decoding (1); None if unknown."""
    return next((both[way] for start, both in AUTOENCODERS.items() if name.startswith(start)), None)


def detector_flops(plan: Plan, detector: Detector) -> float | None:
    """Operations of a detector's forward pass on an image; None for a detector of another package."""
    spec, public = plan.config.detector[detector.name].trained, DETECTORS.get(detector.kind)
    if spec is None:
        return None if public is None else public.flops
    # Three 3 x 3 convolutions, each on a quarter of the previous one's pixels, and two linear layers.
    pixels, width, classes = plan.config.images.resolution**2, spec.width, plan.config.images.classes
    stages = 9 * pixels * (3 * width + 2 * width * width / 4 + 4 * width * width / 16)
    return 2.0 * (stages + 2 * width * pixels / 16 * 4 * width + 4 * width * classes)


def _network_flops(plan: Plan, part: Artefact) -> float | None:
    """Operations of training a small network; None if unknown."""
    if part.kind == "teacher":
        spec = plan.config.teachers[part.name].trained
        assert spec is not None
        tokens = (plan.config.images.resolution // spec.patch) ** 2
        return 3 * spec.steps * spec.batch * flops_per_image(Shape(tokens, spec.width, spec.heads, spec.depth))
    if part.kind == "text_encoder":
        told, size = plan.config.condition.trained, part.recipe
        assert told is not None
        lengths = (plan.config.images.resolution // told.patch) ** 2, size["tokens"]
        pair = sum(flops_per_image(Shape(tokens, size["width"], told.heads, told.depth)) for tokens in lengths)
        return 3 * told.steps * told.batch * pair
    if part.kind == "detector":
        judge, small = plan.detectors[part.name], plan.config.detector[part.name].trained
        assert small is not None
        return 3 * small.steps * small.batch * (detector_flops(plan, judge) or 0.0)
    return None


def stages(plan: Plan, pace: Pace | None = None) -> tuple[list[Stage], bool]:
    """The lines of the plan, one a rule of the workflow, and whether every training time in them was measured."""
    pace = pace or Pace.of_plan(plan)
    training, measured = _training_stages(plan, pace)
    known = [
        *_data_stages(plan, pace),
        *_target_stages(plan, pace),
        *training,
        _sampling_stage(plan, pace),
        _feature_stage(plan, pace),
        *_measure_stages(plan, pace),
    ]
    by_rule = {stage.name: stage for stage in known}
    return [_started(by_rule.get(rule) or _stage(plan, rule), pace) for rule in plan.jobs.every], measured


def _started(stage: Stage, pace: Pace) -> Stage:
    """A stage with the start of its jobs, and with what they take of the machine."""
    seconds = stage.seconds + STARTS.get(stage.name, START) * stage.left
    gpus = 0 if stage.name in WITHOUT_GPU else pace.ranks if stage.name in TRAINING else 1
    return dataclasses.replace(stage, seconds=pace.wall(seconds, gpus), gpu_seconds=seconds * gpus)


def _stage(plan: Plan, rule: str, megabytes: float = 0.0) -> Stage:
    """Jobs whose time cannot be estimated; megabytes: of those that are left."""
    left = len(_left(plan, rule))
    return Stage(rule, len(plan.jobs.every.get(rule, [])), left, 0.0, megabytes, unknown=left > 0)


def _left(plan: Plan, rule: str) -> list[Job]:
    return plan.jobs.left.get(rule, [])


def _timed(stage: Stage, work: Iterable[float | None], speed: float) -> Stage:
    """A stage with the operations of each job that is left, None if unknown."""
    known = list(work)
    seconds = sum(one for one in known if one is not None) / speed
    return dataclasses.replace(stage, seconds=seconds, unknown=None in known)


def _feature_stage(plan: Plan, pace: Pace) -> Stage:
    """Features of samples that are there."""
    todo = [job.about for job in _left(plan, "features")]
    return _timed(_stage(plan, "features", _feature_bytes(plan, todo) / MB), _looks(plan, todo), pace.of())


def _feature_bytes(plan: Plan, todo: list[tuple[Evaluation, Judgement]]) -> float:
    """Bytes of a shard of samples' features for each of these."""
    return sum((plan.feature_bytes(one.detector) or 0) * e.sampling.count / e.shards for e, one in todo)


def _looks(plan: Plan, todo: list[tuple[Evaluation, Judgement]]) -> list[float | None]:
    """Operations of a detector on a shard of samples for each of these."""
    return [_seen(plan, one.detector, e.sampling.count / e.shards) for e, one in todo]


def _measure_stages(plan: Plan, pace: Pace) -> list[Stage]:
    """What is measured of states, as far as the measures say what it takes."""
    todo = [job.about for job in _left(plan, "measure")]
    work: list[float | None] = []
    for one in todo:
        if one.hidden:
            continue
        asked = {term["teacher"] for kind, term in one.terms.items() if kind not in one.cached}
        look = sum(_teacher_flops(plan, name) or 0.0 for name in asked)
        forward = facts_in(plan.trajectories[one.state.trajectory].recipe).flops
        work.append(plan.config.measures[one.label].made.flops(len(one.terms), forward, look))
    passes = _passes(plan, todo)
    work += [each for each, _ in passes]
    size = sum(size for _, size in passes) / MB
    return [_timed(_stage(plan, "measure", size), work, pace.of())]


def _passes(plan: Plan, todo: Iterable[Measurement]) -> list[tuple[float, float]]:
    """Operations and bytes of the hidden states that are still to be made, which several measurements may read, and
    operations of the teachers' passes, whose features are few beside them. What is made of them takes less."""
    found: dict[str, tuple[float, float]] = {}
    for one in todo:
        facts = facts_in(plan.trajectories[one.state.trajectory].recipe)
        for store in one.hidden.values():
            look = store.recipe["look"]
            layers = blocks(facts.taps, "tokens") if look["layers"] == "all" else look["layers"]
            taps = [facts.taps[f"tokens.{layer}"] for layer in layers]
            numbers = sum(tap.width * (1 if look["pooled"] else tap.grid[0] * tap.grid[1]) for tap in taps)
            views = _looked_at(plan, look) * len(look["t"])
            found[store.manifest] = views * facts.flops, 4.0 * views * numbers
        for name, stores in one.seen.items():
            each = _teacher_flops(plan, name) or 0.0
            found |= {s.manifest: (each * _looked_at(plan, s.recipe["look"]), 0.0) for s in stores.values()}
    return [cost for manifest, cost in found.items() if not Path(manifest).exists()]


def _looked_at(plan: Plan, look: Mapping[str, Any]) -> int:
    """Images of a look at hidden states."""
    if look["images"]:
        return look["images"]
    held_out, count = plan.config.images.holdout, plan.of(look["split"]).count or 0
    return {"held_out": held_out, "train": count - held_out}.get(look["split"], count)


def _seen(plan: Plan, detector: Detector, images: float | None) -> float | None:
    each = detector_flops(plan, detector)
    return None if each is None or images is None else each * images


def _data_stages(plan: Plan, pace: Pace) -> list[Stage]:
    config, speed = plan.config, pace.of()
    latent = 2 * config.autoencoder.channels * config.latent_size**2
    pixels, number = config.images.resolution**2, 2 if config.autoencoder.dtype == "float16" else 4
    drawn = sum(_image_bytes(job.about) for job in _left(plan, "images"))
    encoded = [job.about.count and job.about.count / job.about.latents.shards for job in _left(plan, "latents")]
    latents = _stage(plan, "latents", latent * number * sum(filter(None, encoded)) / MB)
    if (encoding := _autoencoder_flops(plan.encoder, 0)) is not None:
        latents = _timed(latents, [each and encoding * pixels * each for each in encoded], speed)
    said = sum(job.about.data.text_bytes / job.about.text.shards for job in _left(plan, "text"))
    sights = [job.about for job in _left(plan, "reference")]
    decoded = min(MOST_COMPARED, plan.count // 2) if plan.count else None
    decoding = _autoencoder_flops(plan.decoder, 1)
    again = [_seen(plan, job.about, decoded) for job in _left(plan, "reconstruct")]
    return [
        _stage(plan, "images", drawn / MB),
        latents,
        _stage(plan, "text", said / MB),
        _timed(
            _stage(plan, "reference"),
            [_seen(plan, one, None if one.reference_file else plan.count) for one in sights],
            speed,
        ),
        _timed(
            _stage(plan, "reconstruct"),
            [each and decoding and decoded and each + decoding * pixels * decoded for each in again],
            speed,
        ),
        *(
            _timed(_stage(plan, kind), [_network_flops(plan, job.about) for job in _left(plan, kind)], speed)
            for kind in ("autoencoder", "teacher", "detector", "text_encoder")
        ),
    ]


def _image_bytes(plan: Plan) -> float:
    """Bytes of a shard of images; if they are compressed, by what photographs take."""
    spec = plan.config.images
    share = expected_share(spec.stored_as, spec.resolution)
    return share * 3 * spec.resolution**2 * (plan.count or 0) / plan.images.shards


def compressed(plan: Plan) -> list[str]:
    """One line for every set of images that is still to be compressed, or that is there in another way than asked."""
    lines = []
    for one in plan.image_sets:
        asked, side, found = one.config.images.stored_as, one.config.images.resolution, one.data.stored_as
        if asked != "raw" and any(job.about.images == one.images for job in _left(plan, "images")):
            lines.append(
                f"{one.data.where}: the size of images stored as {asked} is an estimate, "
                f"{expected_share(asked, side):.0%} of their pixels, as photographs took. Drawings take less."
            )
        if found and found != [asked]:
            lines.append(
                f"{one.data.where}: the store of images is finished, as {' and '.join(found)}. It stays so although "
                f"stored_as is {asked} now: the pixels are the same."
            )
    return lines


def _target_stages(plan: Plan, pace: Pace) -> list[Stage]:
    """The cost of teachers' targets on disk: the teacher's forward pass on every image, once.

    A teacher of unknown size adds neither time nor disk; `unknown_targets` names it.
    """
    megabytes, work = 0.0, list[float | None]()
    for job in _left(plan, "targets"):
        shape, images = plan.teacher_size(job.name), plan.count and plan.count / job.about.shards
        work.append(flops_per_image(shape) * images if shape and images else None)
        if shape and images:
            megabytes += (plan.target_bytes(job.name, 1) or 0) / MB * images
    return [_timed(_stage(plan, "targets", megabytes), work, pace.of())]


def unknown_targets(plan: Plan) -> list[str]:
    """One line for every cached teacher whose size is unknown until it is loaded."""
    return [
        f"These figures leave out the targets of {name}: their size is known only once it is loaded. More than "
        "cache.max_bytes is refused then, before anything is written."
        for name in plan.targets
        if plan.teacher_size(name) is None
    ]


def _training_stages(plan: Plan, pace: Pace) -> tuple[list[Stage], bool]:
    found, measured = [], True
    for rule in TRAINING:
        mine = [plan.segment(job.about) for job in _left(plan, rule)]
        times = [training_seconds(plan, segment, pace) for segment in mine]
        measured &= all(known for _, known in times)
        asked = [segment.teachers for segment, (_, known) in zip(mine, times, strict=True) if not known]
        unknown = any(_teacher_flops(plan, name) is None for names in asked for name in names)
        stage = _stage(plan, rule, sum(_kept_megabytes(plan, segment) for segment in mine))
        found.append(dataclasses.replace(stage, seconds=sum(seconds for seconds, _ in times), unknown=unknown))
    return found, measured


def _sampling_stage(plan: Plan, pace: Pace) -> Stage:
    """Samples, and every detector's features of them."""
    todo = plan.jobs.to_draw
    made = [one.about for job in _left(plan, "sample") for one in (job, *job.beside)]  # with drawn ones, for features
    looked = [(e, one) for e in made for one in e.judgements]
    size = sum(3 * plan.config.images.resolution**2 * e.sampling.count / e.shards for e in todo)
    work = _looks(plan, looked)
    seen = _timed(_stage(plan, "sample"), work, pace.of()).seconds
    drawn = _timed(
        _stage(plan, "sample", (size + _feature_bytes(plan, looked)) / MB),
        [sampling_seconds(plan, e, pace) for e in todo],
        1.0,
    )
    return dataclasses.replace(drawn, seconds=drawn.seconds + seen, unknown=drawn.unknown or None in work)


def _kept_megabytes(plan: Plan, segment: Segment) -> float:
    """Disk that a segment's states take, including those kept on the way."""
    every = plan.config.runtime.keep_every
    kept = 1 + ((segment.state.step - 1) // every - segment.start // every if every else 0)
    return kept * memory.state_megabytes(plan, segment)


def uncounted(plan: Plan) -> list[str]:
    """One line for every set of images whose number is unknown."""
    return [
        f"{one.data.where}: the number of pictures is not known yet, so times and sizes leave out all that is made "
        "from them. Set `expected` beside the path to include them"
        for one in plan.image_sets
        if one.count is None
    ]


def price_of_forks(plan: Plan, pace: Pace) -> list[str]:
    """What forks add to a plan, and a line for every state of a trunk that was not kept and is trained again."""
    if not plan.config.forks:
        return []
    without = Plan(written(plan.config).model_copy(update={"forks": {}}), ahead=True)
    (steps, seconds), (fewer, less) = _left_to_train(plan, pace), _left_to_train(without, pace)
    more = (plan.evaluations[name] for name in plan.evaluations.keys() - without.evaluations)
    draws = [one.score for one in more if one.judged]
    measured = [plan.measurements[name].file for name in plan.measurements.keys() - without.measurements]
    unscored, unmeasured = (sum(not Path(file).exists() for file in files) for files in (draws, measured))
    time = f" ({units.duration(seconds - less)})" if seconds > less else ""
    training = f"{steps - fewer:,} more steps of training{time}"
    added = f"{training}, {unscored} more sets of samples, {unmeasured} more measurements"
    again = []
    for name, branch in branches(plan.config).items():
        for seed in plan.config.runs[name].all_seeds if branch.stopped else ():
            state = plan.state(name, branch.at, seed)
            kept = plan.on_disk(state.trajectory)
            if branch.at not in kept and max(kept, default=0) > branch.at:
                start, run = plan.segment(state).start, plan.label(branch.run, seed)
                again.append(
                    f"{branch.fork}: {run} is finished beyond step {branch.at:,}, of which no state was kept: "
                    f"{branch.at - start:,} steps are trained again from step {start:,}. runtime.keep_every keeps more."
                )
    return [f"Forks add {added}.", *again]


def _left_to_train(plan: Plan, pace: Pace) -> tuple[int, float]:
    """Steps and seconds."""
    left = [plan.segment(state) for state in plan.jobs.to_train]
    return sum(one.state.step - one.start for one in left), sum(training_seconds(plan, one, pace)[0] for one in left)


def shared_trunks(plan: Plan) -> list[str]:
    """One line for every stretch of training that several runs share, with the step up to which each shares it."""
    users: dict[str, dict[str, int]] = {}
    for (run, seed), pieces in plan.pieces.items():
        last = plan.config.runs[run].milestones[-1]
        for piece in pieces:
            if piece.low < last:
                end = last if piece.high is None else min(last, piece.high)
                users.setdefault(piece.trajectory, {})[plan.label(run, seed)] = end
    return [f"{_shares(t, ends)}: it is trained once." for t, ends in users.items() if len(ends) > 1]


def _shares(trajectory: str, ends: Mapping[str, int]) -> str:
    """`A and B share T up to step 12, C up to step 3`, given where each leaves it."""
    second = sorted(ends.values())[-2]  # beyond it only the longest run continues
    groups: dict[int, list[str]] = {}
    for name, end in ends.items():
        groups.setdefault(min(end, second), []).append(name)
    (first, names), *others = sorted(groups.items(), reverse=True)
    more = "".join(f", {' and '.join(names)} up to step {end}" for end, names in others)
    return f"{' and '.join(names)} share {trajectory} up to step {first}{more}"
