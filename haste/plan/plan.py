"""From the table of runs to files: runs -> trajectories -> states, and what it costs. No torch.

A *state* is what training has made of a model by some step. Its name follows from what decides it and from nothing
else: the recipe (data, model, optimiser, seed, ...), which alignment terms were active on which steps so far, and the
step. So runs that agree up to a step share that trunk, and where training is cut never shows in a name.

A *trajectory* is a folder of states. A term that is still active writes its interval as open, [0, None): the
trajectory of a run that will stop at tau is, up to tau, the very trajectory of the run that never stops. From tau on
the interval is closed, [0, tau), which is another name: a branch. A weight that falls before tau is a branch from where
it begins to fall. A run's way through trajectories is a list of `Piece`s.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from haste import config as configuration
from haste.config import (
    Config,
    Evaluate,
    Model,
    OtherModel,
    Sampling,
)
from haste.files import artefact, units
from haste.files.artefact import fingerprint, remembered_identity
from haste.files.provenance import STATE_NAME
from haste.plan import target_spec
from haste.plan.data import image_count
from haste.plan.names import (
    RECIPE,
    Artefact,
    Detector,
    Evaluation,
    Judgement,
    Piece,
    Row,
    Segment,
    State,
    Trajectory,
)
from haste.plan.target_spec import TargetSpec


class Plan:
    """Everything that a configuration asks for, by name and by path."""

    def __init__(self, config: Config):
        self.config = config
        self.root = config.results.rstrip("/")
        self._plan_files()
        self._plan_data()
        self._plan_targets()
        self._plan_runs()
        self._plan_evaluations()

    # -- data and parts ------------------------------------------------------------------------------------------

    def _plan_data(self) -> None:
        config = self.config
        recipe = {"recipe": RECIPE, **config.images.model_dump(exclude={"shards", "on_bad_image"})}
        if (
            config.images.on_bad_image == "skip"
        ):  # a store that may leave pictures out is not taken for one that may not
            recipe["on_bad_image"] = "skip"
        self.images = self._store("images", recipe, config.images.shards)
        trained = config.autoencoder.trained
        self.autoencoder = self._part("autoencoder", "autoencoder", trained.model_dump()) if trained else None
        recipe = {
            "recipe": RECIPE,
            "images": self.images.key,
            "autoencoder": self.autoencoder.key if self.autoencoder else self.encoder,
            "dtype": config.autoencoder.dtype,
            **config.condition.entry,
        }
        self.latents = self._store("latents", recipe, config.autoencoder.shards)
        self.teachers: dict[str, Artefact | None] = {
            name: self._part("teacher", name, teacher.trained.model_dump()) if teacher.trained else None
            for name, teacher in config.teachers.items()
        }
        self.detectors = {name: self._detector(name, spec) for name, spec in config.detector.items()}

    @property
    def detector(self) -> Detector:
        """The leading detector: its Frechet distance orders curves and grids."""
        return next(iter(self.detectors.values()))

    @property
    def reference(self) -> Artefact:
        """What the leading detector sees in the real images."""
        return self.detector.reference

    @property
    def references(self) -> list[str]:
        """What the detectors see in the real images."""
        return [detector.reference.manifest for detector in self.detectors.values()]

    @property
    def references_missing(self) -> list[str]:
        """The references that are still to be made."""
        return [path for path in self.references if not Path(path).exists()]

    @property
    def floor(self) -> str:
        """The leading detector's scores of real images against real ones."""
        return self.detector.floor

    def _detector(self, name: str, spec: configuration.Detector) -> Detector:
        part = self._part("detector", name, spec.trained.model_dump()) if spec.trained else None
        kind, weights = (spec.pretrained.name, spec.pretrained.weights) if spec.pretrained else ("cnn", None)
        key = fingerprint({"recipe": RECIPE, "detector": part.key if part else [kind, weights]})
        of, source = self.images.folder.rsplit("/", 1)[1], self.images.key
        if spec.reference is not None:
            source = self.identity_of(spec.reference)
            of = f"reference-{source[:12]}"
        reference = self._features(of, source, kind, key, shards=1)
        floor = f"{self.root}/scores/floor-{fingerprint([reference.key, 'halves'])}.json"
        return Detector(name, kind, weights, key, part, reference, spec.reference, floor)

    def feature_bytes(self, detector: Detector) -> int | None:
        """Disk that what a detector sees in one image takes: float32 numbers, and a label.

        None for a detector of another package, which is known when it is loaded.
        """
        spec, public = self.config.detector[detector.name].trained, configuration.DETECTORS.get(detector.kind)
        if spec is not None:
            return 4 * (4 * spec.width + self.config.images.classes) + 8
        return None if public is None else 4 * public.numbers + 8

    def _store(self, kind: str, recipe: dict[str, Any], shards: int) -> Artefact:
        key = fingerprint({"store": kind, **recipe})
        return Artefact(kind, key, recipe, f"{self.root}/stores/{kind}-{key}", shards)

    def _part(self, kind: str, name: str, settings: dict[str, Any]) -> Artefact:
        recipe = {"recipe": RECIPE, "part": kind, "images": self.images.key, **settings}
        key = fingerprint(recipe)
        return Artefact(kind, key, recipe, f"{self.root}/parts/{kind}-{key}", name=name)

    def _features(self, of: str, source: str, kind: str, detector: str, shards: int) -> Artefact:
        recipe = {"recipe": RECIPE, "of": source, "detector": detector}
        return Artefact("features", fingerprint(recipe), recipe, f"{self.root}/features/{of}/{kind}-{detector}", shards)

    def teacher_key(self, name: str) -> str:
        """What names a teacher in a recipe: a trained one's key, or the pretrained one's name and file of weights."""
        part, spec = self.teachers[name], self.config.teachers[name].pretrained
        if part:
            return part.key
        assert spec
        return spec.name if spec.weights is None else f"{spec.name} from {spec.weights}"

    # -- targets on disk -----------------------------------------------------------------------------------------

    def _plan_targets(self) -> None:
        """One store for each teacher that is cached and that some run asks, with what the runs together ask for."""
        self.wanted: dict[str, TargetSpec] = {}
        for run, row in self.config.runs.items():
            stops = row.stop.model_dump()
            for kind, term in configuration.terms_of(self.config, run).items():
                name = term["teacher"]
                if self.config.teachers[name].caches(kind) and stops[kind] != 0:
                    self.wanted[name] = self.wanted.get(name, TargetSpec()) | TargetSpec.of(kind, term)
        self.pca: dict[str, Artefact] = {
            name: self._part("pca", name, {"teacher": self.teacher_key(name), "components": components})
            for name, wanted in self.wanted.items()
            if wanted.features and (components := self.config.teachers[name].pca)
        }
        self.targets = {name: self._targets(name, wanted) for name, wanted in self.wanted.items()}

    def _targets(self, name: str, wanted: TargetSpec) -> Artefact:
        """A teacher's store: a finished one that holds what is wanted, and perhaps more, else one to be made."""
        pca = self.pca[name].key if name in self.pca else None
        base = {"recipe": RECIPE, "images": self.images.key, "teacher": self.teacher_key(name)}
        base |= {"pca": pca, "dtype": target_spec.DTYPE}
        new = self._store("targets", {**base, **wanted.recipe()}, self.config.cache.shards)
        finished = {made.folder: made for made in self._finished_targets(base, wanted)}
        if not finished or new.folder in finished:
            return finished.get(new.folder, new)
        return min(finished.values(), key=lambda made: (len(TargetSpec.read(made.recipe).fields), made.key))

    def _finished_targets(self, base: dict[str, Any], wanted: TargetSpec) -> Iterator[Artefact]:
        for manifest in sorted(Path(self.root, "stores").glob("targets-*/manifest.json")):
            try:
                found = artefact.read_json(manifest, "store")
                recipe, key, shards = found["recipe"], found["key"], len(found["shards"])
                fits = base.items() <= recipe.items() and TargetSpec.read(recipe).covers(wanted)
            except (ValueError, KeyError, TypeError, AttributeError):  # nobody's store: a new one is made beside it
                continue
            if fits and manifest.parent.name == f"targets-{key}":
                yield Artefact("targets", key, recipe, f"{self.root}/stores/targets-{key}", shards)

    def teacher_size(self, name: str) -> target_spec.Shape | None:
        """What the size of a teacher's targets follows from; None where only loading it can tell."""
        tokens = configuration.teacher_tokens(self.config, name)
        shape = configuration.teacher_shape(self.config.teachers[name])
        return target_spec.Shape(tokens[1], tokens[0], shape[1], shape[0]) if tokens and shape else None

    def target_bytes(self, name: str, images: int, shape: target_spec.Shape | None = None) -> int | None:
        """Bytes that a teacher's store takes for so many images; None where only loading the teacher can tell."""
        shape, components = shape or self.teacher_size(name), self.config.teachers[name].pca
        return None if shape is None else images * target_spec.bytes_per_image(self._held(name), shape, components)

    def _held(self, name: str) -> TargetSpec:
        return TargetSpec.read(self.targets[name].recipe)

    def check(self) -> None:
        """Refuse, before anything is submitted, what the first jobs would refuse, and in their words.

        Only what is still to be made needs its source: one that is gone since is no fault. Of pictures the names are
        looked at, of a reference the headers.

        Raises:
            ValueError: pictures or a reference that cannot be used, a sampler that does not suit a network, or more
                disk than the configuration allows itself.
        """
        from haste.files import npz  # numpy takes its time, and few commands come here

        image_count(self)
        configuration.check_samplers(self.config)
        for detector in self.detectors.values():
            made, file = Path(detector.reference.manifest), detector.reference_file
            if file is not None and Path(file).is_file() and not made.exists():
                npz.check_reference(file)
        self.check_cache()

    def check_cache(self, images: int | None = None, shapes: dict[str, target_spec.Shape] | None = None) -> None:
        """Refuse cached targets that take more disk than they may.

        Args:
            images: how many there are; None counts them.
            shapes: of teachers that were loaded; the size of others is known by their name or not at all.

        Raises:
            ValueError: beyond `cache.max_bytes`; the message says what each teacher takes and what would fit.
        """
        if not self.targets:
            return
        images = image_count(self) if images is None else images
        known = {name: (shapes or {}).get(name) or self.teacher_size(name) for name in self.targets}
        taken = {name: self.target_bytes(name, images, shape) or 0 for name, shape in known.items()}
        room = self.config.cache.max_bytes
        if sum(taken.values()) <= room:
            return
        lines = [f"cache.max_bytes: {room} allows {units.readable(room)}, but for {images:,} images"]
        for name, size in taken.items():
            setting, shape = self.config.teachers[name], known[name]
            left = room - sum(taken.values()) + size
            fits = shape and list(target_spec.fitting(self._held(name), shape, setting.pca, images, left))
            lines.append(
                f"teachers.{name}.cache: {setting.cache} takes {units.readable(size)}; "
                f"what would fit: {' or '.join(fits or ['cache: off'])}"
            )
        raise ValueError("\n".join(lines))

    # -- runs ----------------------------------------------------------------------------------------------------

    def _plan_runs(self) -> None:
        self.trajectories: dict[str, Trajectory] = {}
        # By run and seed: every seed of a row is trained on its own.
        self.pieces: dict[tuple[str, int], tuple[Piece, ...]] = {
            (run, seed): tuple(self._pieces(run, seed))
            for run, row in self.config.runs.items()
            for seed in row.all_seeds
        }
        self.cuts: dict[str, set[int]] = {name: set() for name in self.trajectories}
        for (run, seed), pieces in self.pieces.items():
            milestones = self.config.runs[run].milestones
            ends = {piece.high for piece in pieces if piece.high is not None and piece.high <= milestones[-1]}
            for step in {*milestones, *ends}:
                state = self.state(run, step, seed)
                self.cuts[state.trajectory].add(step)
        self.notes = [
            f"{run}: {found}"
            for run, row in self.config.runs.items()
            for kind, begin in configuration.falls_from(self.config, run).items()
            if (found := _beyond(getattr(row.stop, kind), kind, begin, row.milestones[-1]))
        ]
        self.notes += [
            f"{file}: is gone; what was made from it stays, and nothing more can be made"
            for file in self.identities
            if not Path(file).is_file()
        ]

    def _pieces(self, run: str, seed: int) -> Iterator[Piece]:
        """A new piece begins where a term's weight begins to fall, where a trigger begins to watch it, and where the
        term stops at a step that the configuration names.

        Up to there nothing of the stop is in the recipe: the trunk is that of the run that never stops.
        """
        terms, row = configuration.terms_of(self.config, run), self.config.runs[run]
        triggers, falls = configuration.triggers_of(self.config, run), configuration.falls_from(self.config, run)
        stops = {kind: None if kind in triggers else getattr(row.stop, kind) for kind in terms}
        # a stop at step 0 starts no piece of its own
        bounds = sorted({step for kind in terms for step in (falls[kind], stops[kind]) if step})
        for low, high in zip([0, *bounds], [*bounds, None], strict=True):
            active = {}
            for kind, term in terms.items():
                stop, begin = stops[kind], falls[kind]
                if stop == 0:
                    continue
                active[kind] = {**term, "active": [0, stop if stop is not None and stop <= low else None]}
                if begin is None or begin > low:
                    continue
                if kind in triggers:
                    active[kind]["trigger"] = triggers[kind].decided
                elif stop is not None and begin < stop:
                    active[kind]["ramp"] = {"from": begin, "to": stop, "shape": row.ramp.shape}
            yield Piece(self._trajectory(run, seed, active).name, low, high)

    def _trajectory(self, run: str, seed: int, terms: dict[str, dict[str, Any]]) -> Trajectory:
        row = self.config.runs[run]
        model = configuration.model_named(self.config, row.model)
        named = {
            kind: {
                **configuration.decides(configuration.TERMS[kind], term),
                "teacher": self.teacher_key(term["teacher"]),
            }
            for kind, term in terms.items()
        }
        # Where targets come from is no part of a name: on disk they are rounded, and that is all. Components are.
        if "features" in terms and (components := self.config.teachers[terms["features"]["teacher"]].pca):
            named["features"]["pca"] = components
        recipe = {
            "recipe": RECIPE,
            "latents": self.latents.key,
            **configuration.condition_entry(self.config),
            "model": configuration.model_entry(self.config, model),
            "training": configuration.training_entry(self.config, run),
            "seed": seed,
            "terms": named,
        }
        if row.warm_start is not None:
            recipe["warm_start"] = self.identity_of(row.warm_start)
        key = fingerprint(recipe)
        trajectory = Trajectory(f"{_slug(model, named)}-s{seed}-{key}", key, recipe)
        self.trajectories[trajectory.name] = trajectory
        return trajectory

    def label(self, run: str, seed: int) -> str:
        """What to call one seed of a run: by the run's name alone where it has no other."""
        seeds = [] if run in self.config.evaluate else self.config.runs[run].all_seeds
        return f"{run} (seed {seed})" if len(seeds) > 1 else run

    def leads(self, row: Row) -> bool:
        """Whether a row is of its run's first seed, whose pictures are shown."""
        return row.run in self.config.evaluate or row.seed == self.config.runs[row.run].seed

    def state(self, run: str, step: int, seed: int | None = None) -> State:
        """The state of a run after `step` steps, with one of its seeds; None is the first."""
        seed = self.config.runs[run].all_seeds[0] if seed is None else seed
        piece = next(piece for piece in self.pieces[run, seed] if piece.holds(step))
        return State(piece.trajectory, step)

    def path(self, state: State) -> str:
        """Where a state lies."""
        if state.trajectory in self.elsewhere:
            return self.elsewhere[state.trajectory].checkpoint
        return f"{self.root}/states/{state.trajectory}/{state.file}"

    def parse(self, name: str) -> State:
        """The state behind `trajectory/step`, as rules and people write it.

        Raises:
            ValueError: no run of this configuration passes through it.
        """
        trajectory, _, step = name.rpartition("/")
        if trajectory not in self.trajectories or not step.isdigit():
            raise ValueError(
                f"state {name!r}: expected TRAJECTORY/STEP with one of this configuration's trajectories: "
                f"{', '.join(sorted(name for name, steps in self.cuts.items() if steps))}"
            )
        state = State(trajectory, int(step))
        if self._owner_of(state) is None:
            raise ValueError(f"state {name!r}: this trajectory has no step {state.step} in this configuration")
        return state

    def trained(self, aligned: bool) -> list[str]:
        """Names of the trajectories that training makes and on whose own steps a loss is active, or none."""
        terms = {name: it.recipe["terms"] for name, it in self.trajectories.items() if "terms" in it.recipe}
        active = {name: any(term["active"][1] is None for term in found.values()) for name, found in terms.items()}
        return [name for name, found in active.items() if found == aligned]

    def planned(self) -> list[State]:
        """Every state that some run asks for, or that a branch starts from."""
        return sorted(State(name, step) for name, steps in self.cuts.items() for step in steps)

    def lineage(self, state: State) -> tuple[Piece, ...]:
        """The pieces from the beginning of training up to the one that holds a state."""
        owner = self._owner_of(state)
        assert owner is not None, state
        pieces = self.pieces[owner]
        return pieces[: next(i for i, piece in enumerate(pieces) if piece.trajectory == state.trajectory) + 1]

    def _owner_of(self, state: State) -> tuple[str, int] | None:
        """A run and seed that pass through a state; any will do, for up to it they are one run."""
        for owner, pieces in self.pieces.items():
            if any(piece.trajectory == state.trajectory and piece.holds(state.step) for piece in pieces):
                return owner
        return None

    def segment(self, state: State) -> Segment:
        """The job that makes a state: from the nearest earlier state that exists on disk or is planned."""
        pieces = self.lineage(state)
        parent = None
        for piece in pieces:
            steps = self.cuts[piece.trajectory] | self.on_disk(piece.trajectory)
            earlier = [step for step in steps if piece.holds(step) and step < state.step]
            if earlier:
                parent = State(piece.trajectory, max(earlier))
        owner = self._owner_of(state)
        assert owner is not None, state
        terms = configuration.terms_of(self.config, owner[0])
        recipe = self.trajectories[state.trajectory].recipe["terms"]
        active = {
            kind: {**term, "ramp": recipe[kind].get("ramp"), "trigger": recipe[kind].get("trigger")}
            for kind, term in terms.items()
            if kind in recipe and recipe[kind]["active"][1] is None
        }
        missing = {s for s in self.cuts[state.trajectory] if s < state.step} - self.on_disk(state.trajectory)
        before = State(state.trajectory, max(missing)) if missing else None
        cached = tuple(kind for kind, term in active.items() if self.config.teachers[term["teacher"]].caches(kind))
        return Segment(state, parent, None if before == parent else before, active, pieces, cached)

    @functools.cache
    def on_disk(self, trajectory: str) -> frozenset[int]:
        """Steps of the finished states that a trajectory's folder holds (looked up once)."""
        folder = Path(self.root, "states", trajectory)
        names = [STATE_NAME.match(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        return frozenset(int(match[1]) for match in names if match)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _plan_evaluations(self) -> None:
        self.rows: list[Row] = []
        self.evaluations: dict[str, Evaluation] = {}
        for run, seed in self.pieces:
            row = self.config.runs[run]
            for step, name in itertools.product(row.milestones, row.sampling):
                evaluation = self._evaluation(self.state(run, step, seed), name)
                self.evaluations[evaluation.name] = evaluation
                self.rows.append(Row(run, step, evaluation, seed))
        for name, spec in self.config.evaluate.items():
            state = self._state_elsewhere(spec)
            for sampling in spec.sampling:
                evaluation = self._evaluation(state, sampling)
                self.evaluations[evaluation.name] = evaluation
                self.rows.append(Row(name, spec.step, evaluation, spec.seed))

    def _evaluation(self, state: State, name: str) -> Evaluation:
        sampling = self.config.sampling[name]
        decoder = self.autoencoder.key if self.autoencoder else self.decoder
        settings = configuration.decides(Sampling, sampling.model_dump())
        recipe = {"recipe": RECIPE, "state": str(state), "sampling": settings, "decoder": decoder}
        draw = f"{state.trajectory}.{state.step:08d}.{fingerprint(recipe, 8)}"
        shards = self.config.runtime.sample_shards
        judgements = []
        for detector in self.detectors.values():
            features = self._features(draw, draw, detector.kind, detector.key, shards)
            score = f"{self.root}/scores/{draw}.{fingerprint([features.key, detector.reference.key], 8)}.json"
            judgements.append(Judgement(detector, features, score))
        folder = f"{self.root}/samples/{draw}"
        return Evaluation(draw, state, name, sampling, folder, shards, recipe, tuple(judgements))

    # -- weights from elsewhere ------------------------------------------------------------------------------------

    def _plan_files(self) -> None:
        """Identities of the files that come from outside; those that are gone since are said."""
        starts = {row.warm_start for row in self.config.runs.values() if row.warm_start is not None}
        files = [*(spec.checkpoint for spec in self.config.evaluate.values()), *sorted(starts)]
        files += [spec.reference for spec in self.config.detector.values() if spec.reference is not None]
        memory = f"{self.root}/identities.json"
        self.identities = {file: remembered_identity(file, memory) for file in dict.fromkeys(files)}
        self.elsewhere: dict[str, Evaluate] = {}

    def identity_of(self, file: str) -> str:
        """The sha256 of a file from outside: it is named by its content, so another content is another name."""
        return self.identities[file]

    def _state_elsewhere(self, spec: Evaluate) -> State:
        """A state that nobody trains. Its step says nothing of what it is, so it stands in the row alone."""
        model = configuration.model_named(self.config, spec.model)
        recipe = {
            "recipe": RECIPE,
            "checkpoint": self.identity_of(spec.checkpoint),
            "weights": spec.weights,
            **configuration.condition_entry(self.config),
            "model": configuration.model_entry(self.config, model),
            "training": configuration.training_elsewhere(self.config, spec),
        }
        key = fingerprint(recipe)
        trajectory = Trajectory(f"{_slug(model, {}, 'elsewhere')}-{key}", key, recipe)
        self.trajectories[trajectory.name] = trajectory
        self.elsewhere[trajectory.name] = spec
        return State(trajectory.name, 0)

    def evaluation(self, name: str) -> Evaluation:
        """A set of samples by its name.

        Raises:
            ValueError: this configuration has none of that name.
        """
        if name not in self.evaluations:
            raise ValueError(
                f"samples {name!r}: not in this configuration, which has {', '.join(sorted(self.evaluations))}"
            )
        return self.evaluations[name]

    def detector_named(self, name: str) -> Detector:
        """A detector by its name.

        Raises:
            ValueError: this configuration has none of that name.
        """
        if name not in self.detectors:
            raise ValueError(f"detector {name!r}: not in this configuration, which has {', '.join(self.detectors)}")
        return self.detectors[name]

    def drawn_from(self, evaluation: Evaluation) -> list[str]:
        """The files beside the detector's that a set of samples is drawn from.

        A checkpoint from elsewhere needs the decoder alone, which knows the latents' scale. The checkpoint itself is
        not among the files: its content is in the samples' name, and samples that exist outlive it.
        """
        if evaluation.state.trajectory in self.elsewhere:
            return [self.autoencoder.manifest] if self.autoencoder else []
        return [self.path(evaluation.state), self.latents.manifest]

    @property
    def checked_images(self) -> str | None:
        """The list of pictures that cannot be used, where such are left out: made once, before the shards."""
        return f"{self.images.folder}/checked.json" if self.config.images.on_bad_image == "skip" else None

    # -- the configuration's own folder ------------------------------------------------------------------------------

    @property
    def encoder(self) -> str:
        """What encodes images: the folder of the autoencoder trained here, or the pretrained one's folder or hub id."""
        return self.autoencoder.folder if self.autoencoder else _pretrained(self.config.autoencoder)["encode"]

    @property
    def decoder(self) -> str:
        """What decodes samples; a pretrained pair may share an encoder and differ here."""
        return self.autoencoder.folder if self.autoencoder else _pretrained(self.config.autoencoder)["decode"]

    @property
    def folder(self) -> str:
        """results/<configuration>."""
        return f"{self.root}/{self.config.name}"

    @property
    def config_file(self) -> str:
        """The resolved configuration that every job reads."""
        return f"{self.folder}/config.json"

    @property
    def report(self) -> str:
        """The page that everything ends in."""
        return f"{self.folder}/report/index.html"

    @property
    def report_made(self) -> str:
        """How the page was made. Its name follows from the whole configuration: another table is another file."""
        shown = self.config.model_dump(mode="json", exclude={"results"})
        return f"{self.folder}/report/made-{fingerprint(shown)}.json"

    @property
    def shown(self) -> list[str]:
        """The files that the page shows: every score, and the pictures of each row's first seed."""
        scores = [judgement.score for row in self.rows for judgement in row.evaluation.judgements]
        grids = [row.evaluation.grid for row in self.rows if self.leads(row)]
        return [*dict.fromkeys(scores + grids), *(detector.floor for detector in self.detectors.values())]


def _pretrained(part: Any) -> dict[str, Any]:
    settings = part.pretrained.model_dump()
    return {**settings, "decode": settings.get("decode") or settings.get("encode")}


def _beyond(stop: Any, kind: str, begin: int | None, last: int) -> str:
    """What to say of a stop that cannot come before the last milestone; nothing where it can, or where there is none.

    begin: where the term leaves what it would be without the stop, as `falls_from` says.
    """
    if isinstance(stop, configuration.Trigger) and stop.first > last:
        where = (
            f"step {stop.first}, where {stop.trigger} first decides on {kind}, lies beyond the last milestone {last}"
        )
        own = f"but the last {last - stop.after} steps are trained apart from those without it, which they are equal to"
        return f"{where}: it {f'stops nothing yet, {own}' if stop.after < last else 'has no effect yet'}"
    if not isinstance(stop, configuration.Trigger) and begin is not None and begin > last:
        return f"stop of {kind} at step {stop} lies beyond the last milestone {last}: it has no effect yet"
    return ""


def _slug(model: Model | OtherModel, terms: dict[str, dict[str, Any]], otherwise: str = "vanilla") -> str:
    """A name that people can tell apart, made of nothing but the recipe (labels may differ between configurations)."""
    if isinstance(model, Model):
        size = next((n.replace("/", "-") for n, m in configuration.MODELS.items() if m == model), None)
        words = [size or f"SiT-d{model.depth}w{model.width}p{model.patch_size}"]
    else:
        words = [re.sub(r"[^A-Za-z0-9._]", "-", model.architecture)]
    for kind, term in terms.items():
        end, ramp, trigger = term["active"][1], term.get("ramp"), term.get("trigger")
        by = "-" + re.sub(r"[^\w.]", "-", trigger["trigger"]) if trigger else ""
        words.append(kind + by + (f"-ramp{ramp['from']}" if ramp else "") + ("" if end is None else f"-to{end}"))
    return "-".join(words if terms else [*words, otherwise])
