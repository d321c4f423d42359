"""The jobs of a plan: what each makes, what it waits for, and which of them a run of the workflow would do now.

The workflow's rules ask here for their inputs, and `haste plan` for what is left, so both have the same jobs. No torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from haste.files.provenance import STATE_NAME
from haste.plan.names import Artefact, Evaluation, State

Plan = Any  # haste.plan.plan.Plan, which has these as its jobs

TRAINING = ("train", "train_plain")
#: In the order in which they are listed.
RULES = (
    *("images_check", "images", "images_join", "autoencoder", "teacher", "detector", "latents", "latents_join"),
    *("text_encoder", "text", "text_join", "pca", "targets", "targets_join", *TRAINING, "reference", "sample"),
    *("features", "score", "floor", "reconstruct", "grid", "measure", "report"),
)
#: Sets of samples of one job at most: the jobs of a sweep over guidance should run side by side too.
MOST_TOGETHER = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One job of the workflow.

    rule: its rule; makes: its files, of which the first names it; reads: returns the files that these are made from;
    about: the set of images (a plan), artefact, detector, state, evaluation (with the judgement) or measurement; name:
    what its command calls that; wanted: those of its files that something else is still made from, if only some are;
    beside: jobs of its rule that it does too (`Jobs.beside`); of sets that are drawn, features alone.
    """

    rule: str
    makes: tuple[str, ...]
    reads: Callable[[], Iterable[str]]
    about: Any = None
    name: str = ""
    wanted: tuple[str, ...] = ()
    beside: tuple[Job, ...] = ()

    @property
    def lacks(self) -> list[str]:
        """Those of `wanted` that are not there."""
        return [path for path in self.wanted if not os.path.exists(path)]

    @property
    def log(self) -> str:
        """The name of its log and of its benchmark file, as in the rules, without suffix."""
        place = Path(self.makes[0])
        folder, shard = place.parent.name, place.stem.removeprefix("shard-")
        if self.rule in ("images", "latents", "text", "targets"):
            return f"{folder}-{shard}"
        if self.rule in ("teacher", "detector", "pca"):
            return folder
        if self.rule == "images_check" or self.rule.endswith("_join"):
            return f"{folder}-{self.rule.rpartition('_')[2]}"
        if self.rule in TRAINING:
            return f"train-{folder}-{place.stem.removeprefix('step-')}"
        words = {"sample": f"{folder}-{shard}", "reference": f"{place.parent.parent.name}-{folder}", "grid": folder}
        words |= {"features": f"{words['reference']}-{shard}", "score": place.stem, "measure": f"{folder}-{place.stem}"}
        words |= {"floor": place.stem.removeprefix("floor-"), "reconstruct": place.stem.removeprefix("reconstructed-")}
        return f"{self.rule}-{words[self.rule]}" if self.rule in words else self.rule

    @property
    def waits_for(self) -> list[str]:
        """The files that it waits for: none if what it makes is there.

        Otherwise an input that only others need, and that is made again, would be a reason to make these again too.
        """
        return [] if all(map(os.path.exists, self.wanted or self.makes)) else [*self.reads()]


class Jobs:
    """All jobs of a plan, and those that are left."""

    def __init__(self, plan: Plan):
        self.plan = plan
        #: Names of the sets of samples that were complete when this was asked for: whatever is made meanwhile, all that
        #: is decided by it, here and in the workflow's rules, is decided alike.
        self.drawn = frozenset(name for name, one in plan.evaluations.items() if one.is_drawn)
        families = _families(plan, self.drawn)
        self._kin = {job.makes[0]: kin for kin in families for job in kin}
        results = _result_jobs(plan, families, self.drawn)
        made = (*_data_jobs(plan), *_network_jobs(plan), *_target_jobs(plan), *results)
        # Of networks with two names, the first one's.
        self._features = {path: job for job in reversed(made) if job.rule == "features" for path in job.makes}
        self._makers = {path: job for job in reversed(made) if job.rule != "features" for path in job.makes}

    def of(self, rule: str, path: str) -> Job:
        """The job of a rule that makes a file of this plan, or a state that a run of it passes through.

        Raises:
            ValueError: this plan has no such file.
        """
        return (self._features.get(path) if rule == "features" else None) or self._maker(path)

    @property
    def targets(self) -> list[str]:
        """What a run of the workflow is for."""
        return [self.plan.report, self.plan.report_made, *self.plan.shown, *self.plan.measure_files]

    @cached_property
    def left(self) -> dict[str, list[Job]]:
        """Rule -> the jobs that a run of the workflow would do now."""
        # There are two ways to features. New samples get them in the same job; of existing ones nothing is drawn again.
        alone = {path: job for path, job in self._features.items() if job.about[0].name in self.drawn}
        asked = [path for path in self.targets if not os.path.exists(path)]
        found = self._reached(alone, asked, lambda job: (p for p in job.waits_for if not os.path.exists(p)))
        report = self._makers[self.plan.report]
        if report not in found and (found or _is_older(report.makes, report.reads())):
            found.append(report)
        return _by_rule(found)

    @property
    def to_train(self) -> list[State]:
        """The states that a run of the workflow would train now."""
        return [job.about for rule in TRAINING for job in self.left.get(rule, [])]

    @property
    def to_draw(self) -> list[Evaluation]:
        """The sets of samples that a run of the workflow would draw now, each as often as shards are left of it."""
        found = (one.about for job in self.left.get("sample", []) for one in (job, *job.beside))
        return [one for one in found if one.name not in self.drawn]

    def beside(self, evaluation: Evaluation, shard: int) -> list[Evaluation]:
        """The sets of samples of which the job of one set's shard makes the same shard too: those that differ only in
        guidance, come later in the plan, and of which something is still made from it; `MOST_TOGETHER` with itself.
        Those that are drawn by then lack features alone.

        These are `Job.beside` when the workflow began, less what is finished by now: a job that is run again, by then
        perhaps on another node, goes on with the others though its own samples, or theirs, are there.
        """
        job = self._maker(evaluation.sample_file(shard))
        kin = self._kin[job.makes[0]]
        return [one.about for one in kin[kin.index(job) + 1 :] if one.lacks]

    @cached_property
    def every(self) -> dict[str, list[Job]]:
        """Rule -> the jobs that a run of the workflow would do if nothing were there, and those that are left."""
        found = self._reached({}, self.targets, lambda job: (p for p in job.reads() if p in self._makers))
        drawn = {one.makes[0] for job in found for one in (job, *job.beside)}
        jobs = dict[str, Job]()
        for job in found:
            if job.rule == "sample":
                first, *others = (one for one in self._kin[job.makes[0]] if one.makes[0] in drawn)
                job = dataclasses.replace(first, beside=tuple(others))
            jobs.setdefault(job.makes[0], job)
        for job in (job for of in self.left.values() for job in of):
            jobs.setdefault(job.makes[0], job)
        return _by_rule(jobs.values())

    def _reached(self, alone: dict[str, Job], asked: list[str], reads: Callable[[Job], Iterable[str]]) -> list[Job]:
        found: dict[str, Job] = {}
        while asked:
            path = asked.pop()
            job = alone.get(path) or self._maker(path)
            if job.makes[0] not in found:
                found[job.makes[0]] = job
                asked.extend(reads(job))
        return list(found.values())

    def _maker(self, path: str) -> Job:
        if path in self._makers:
            return self._makers[path]
        place = Path(path)
        if (step := STATE_NAME.match(place.name)) is None:
            raise ValueError(f"{path}: no job of this configuration makes it")
        return _training_job(self.plan, self.plan.parse(f"{place.parent.name}/{step[1]}"))


def _by_rule(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    found: dict[str, list[Job]] = {rule: [] for rule in RULES}
    for job in jobs:
        found[job.rule].append(job)
    return {rule: its for rule, its in found.items() if its}


def _is_older(made: Iterable[str], inputs: Iterable[str]) -> bool:
    """Whether files are there that are newer than what is made of them."""
    return max(map(os.path.getmtime, inputs), default=0.0) > min(map(os.path.getmtime, made))


def _files(*made: Artefact | None) -> list[str]:
    return [path for one in made if one for path in one.files]


def _joined(store: Artefact, *made: Artefact) -> list[str]:
    return [*_files(*made), *store.shard_files]


def _data_jobs(plan: Plan) -> Iterator[Job]:
    for one in plan.image_sets:
        checked = [one.checked_images] if one.checked_images else []
        yield from (Job("images_check", (path,), list, one) for path in checked)
        yield from (Job("images", (path,), checked.copy, one) for path in one.images.shard_files)
        yield Job("images_join", (one.images.manifest,), [*one.images.shard_files, *checked].copy, one)
        if one.text:
            said = partial(_files, one.images, plan.text_encoder)
            yield from (Job("text", (path,), said, one) for path in one.text.shard_files)
            yield Job("text_join", (one.text.manifest,), partial(_joined, one.text, one.images), one)
    for one in plan.encoded:
        seen = partial(_files, one.images, plan.autoencoder)
        yield from (Job("latents", (path,), seen, one) for path in one.latents.shard_files)
        yield Job("latents_join", (one.latents.manifest,), partial(_joined, one.latents, one.images), one)


def _network_jobs(plan: Plan) -> Iterator[Job]:
    networks = [plan.autoencoder, *plan.teachers.values(), *(one.part for one in plan.detectors.values())]
    networks.append(plan.text_encoder)
    for part in filter(None, networks):
        yield Job(part.kind, (part.manifest,), partial(_files, plan.images), part, part.name)
    coded = plan.images, plan.latents, plan.autoencoder
    for detector in plan.detectors.values():
        pictures = None if detector.reference_file else plan.images
        made = (detector.reference.manifest,)
        yield Job("reference", made, partial(_files, pictures, detector.part), detector, detector.name)
        floor = lambda one=detector: [one.reference.manifest, *_files(one.part)]  # noqa: E731
        yield Job("floor", (detector.floor,), floor, detector, detector.name)
        if detector.reconstructed:
            both = lambda one=detector: [one.reference.manifest, *_files(*coded, one.part)]  # noqa: E731
            yield Job("reconstruct", (detector.reconstructed,), both, detector, detector.name)


def _target_jobs(plan: Plan) -> Iterator[Job]:
    for name, store in plan.targets.items():
        teacher, pca = plan.teachers[name], plan.pca.get(name)
        if pca:
            yield Job("pca", (pca.manifest,), partial(_files, plan.images, teacher), pca, name)
        looks = partial(_files, plan.images, teacher, pca)
        yield from (Job("targets", (path,), looks, store, name) for path in store.shard_files)
        yield Job("targets_join", (store.manifest,), partial(_joined, store, plan.images), store, name)


def _result_jobs(plan: Plan, families: list[list[Job]], drawn: Collection[str]) -> Iterator[Job]:
    yield from (_training_job(plan, state) for state in plan.planned())
    yield from (job for kin in families for job in kin)
    leads = {one.makes[0]: job for kin in families for job in kin for one in job.beside}
    for evaluation in plan.evaluations.values():
        yield from _evaluation_jobs(plan, evaluation, leads, evaluation.name in drawn)
    for one in plan.measurements.values():
        yield Job("measure", (one.file,), partial(plan.measured_from, one), one, one.label)
    yield Job("report", (plan.report, plan.report_made), lambda: [*plan.shown, *plan.measure_files])


def _training_job(plan: Plan, state: State) -> Job:
    """Whether a state's own steps align decides between two rules, to which a profile may give different resources."""

    def reads() -> list[str]:
        segment = plan.segment(state)
        earlier = [plan.path(one) for one in (segment.parent, segment.after, segment.twin) if one]
        mirrored = plan.flipped if plan.trajectories[state.trajectory].flips else None
        return [*_files(plan.latents, mirrored), *plan.told_from, *earlier, *plan.aligned_from(segment)]

    rule = "train" if plan.aligns(state.trajectory) else "train_plain"
    return Job(rule, (plan.path(state),), reads, state)


def _families(plan: Plan, drawn: Collection[str]) -> list[list[Job]]:
    """The jobs that draw the same shard of the sets of a family, each by itself, in the plan's order. Of those that a
    run of the workflow would do now, the first does what later ones lack too: of drawn ones, features."""
    shown, latest, found = set(plan.shown), dict[tuple[str, int], list[Job]](), list[list[Job]]()
    for evaluation in plan.evaluations.values():
        for shard, job in enumerate(_drawing_jobs(plan, evaluation, shown)):
            if len(latest.get((evaluation.family, shard), [])) in (0, MOST_TOGETHER):
                latest[evaluation.family, shard] = []
                found.append(latest[evaluation.family, shard])
            latest[evaluation.family, shard].append(job)
    for kin in found:
        lacking = [job for job in kin if job.lacks]
        while lacking and lacking[0].about.name in drawn:  # these have jobs for features alone
            del lacking[0]
        if lacking:
            kin[kin.index(lacking[0])] = dataclasses.replace(lacking[0], beside=tuple(lacking[1:]))
    return found


def _drawing_jobs(plan: Plan, evaluation: Evaluation, shown: set[str]) -> Iterator[Job]:
    """Of a set of samples: its shards with every detector's features."""
    results = [evaluation.grid, *(one.score for one in evaluation.judgements)]
    ahead = {path for path in results if path in shown and not os.path.exists(path)}
    parts = [*filter(None, (one.part for one in plan.detectors.values()))]
    for shard in range(evaluation.shards):
        file = evaluation.sample_file(shard)
        looks = [(one, one.features.shard_files[shard]) for one in evaluation.judgements]
        wanted = [path for one, path in looks if one.score in ahead] + ([file] if evaluation.grid in ahead else [])
        drawn = lambda: [*plan.drawn_from(evaluation), *_files(*parts)]  # noqa: E731
        makes = (file, *(path for _, path in looks))
        yield Job("sample", makes, drawn, evaluation, evaluation.name, tuple(wanted))


def _evaluation_jobs(plan: Plan, evaluation: Evaluation, leads: Mapping[str, Job], drawn: bool) -> Iterator[Job]:
    """Of a set of samples: features alone, scores and the grid. Of a shard that the job of another set makes, they wait
    for what that one makes; `drawn`: whether all its samples are there."""
    files = evaluation.sample_files
    for one in evaluation.judgements:
        for file, path in zip(files, one.features.shard_files, strict=True):
            seen = lambda file=file, part=one.detector.part: [file, *plan.meant_from, *_files(part)]  # noqa: E731
            yield Job("features", (path,), seen, (evaluation, one), one.detector.name)
        read = [one.detector.reference.manifest, *_waited(files, one.features.shard_files, leads)].copy
        yield Job("score", (one.score,), read, (evaluation, one), one.detector.name)
    yield Job("grid", (evaluation.grid,), [*_waited(files, files, {} if drawn else leads)].copy, evaluation)


def _waited(samples: list[str], read: list[str], leads: Mapping[str, Job]) -> Iterator[str]:
    for file, path in zip(samples, read, strict=True):
        yield from leads[file].lacks if file in leads else [path]
