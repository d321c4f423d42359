"""Everything that a configuration needs, with names and paths: the one object that commands and rules use.

Its parts, each made from those above it:

    names         artefacts, trajectories, states, segments, detectors, evaluations
    outside       checkpoints and references from elsewhere, by path or by an id of the hub
    data          stores, networks trained here, detectors and their references
    targets       teacher targets that are cached on disk
    runs          from the table of runs to trajectories, states and the jobs that make them
    evaluations   samples, features and scores; imported checkpoints
    measures      other diagnostics of states
    inputs        what the configuration names outside itself, looked at before the first job
    jobs          what each job makes and waits for, and which are left
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from haste.config import (
    EVALUATION,
    TERMS,
    Config,
    Detector,
    Evaluate,
    Images,
    Run,
    Runtime,
    Sampling,
    Strict,
    Teacher,
    Training,
    Trigger,
    branches,
    check_samplers,
    decides,
)
from haste.files.artefact import fingerprint
from haste.plan import inputs
from haste.plan.data import Data
from haste.plan.evaluations import Evaluations
from haste.plan.jobs import Jobs
from haste.plan.measures import Measurement, Measures
from haste.plan.names import Evaluation, Segment, State
from haste.plan.runs import Runs
from haste.plan.targets import Targets

# Keys that are younger than people's reports, in any section or in that of one class: while they are at their defaults,
# reports keep their names.
_YOUNG = {
    *("process", "time_dtype", "eta", "filter", "layer", "normalise", "normalise_factor", "head", "kernel", "t_max"),
    *("release", "weights", "prompts", "split", "jobs_per_gpu", "gpu_memory_gb", "flip"),
    *("deterministic", "compress_gradients", "loader_threads", "Sampling.precision", "Sampling.decoder_precision"),
}


class Plan:
    """What a configuration needs. Attributes that `__init__` copies from the parts are documented there.

    Attributes:
        data: the stores and their source.
        root, folder: of all results; of this configuration, results/<configuration>.
        config_file: the resolved configuration that every job reads.
        report: the final page.
        trajectories: by name, both trained ones and those of imported checkpoints.
        notes: which settings have no effect, or ask for what can no longer be made; which samples are not scored.
    """

    def __init__(self, config: Config, content: str | None = None, ahead: bool = False):
        """
        Args:
            config: the configuration.
            content: of the images' source, as for `Data`.
            ahead: plan although external files are not there yet, as for `Data`; `check` refuses that.
        """
        self.config = config
        data = Data(config, content, ahead)
        targets, runs = Targets(config, data), Runs(config, data)
        evaluations = Evaluations(config, data, runs)

        self.data, self.root, self.identities = data, data.root, data.identities
        self.folder = f"{data.root}/{config.name}"
        self.config_file, self.report = f"{self.folder}/config.json", f"{self.folder}/report/index.html"
        self.images, self.latents, self.checked_images = data.images, data.latents, data.checked_images
        self.flipped, self.text, self.text_encoder = data.flipped, data.text, data.text_encoder
        self.autoencoder, self.encoder, self.decoder = data.autoencoder, data.encoder, data.decoder
        self.teachers, self.detectors, self.detector_named = data.teachers, data.detectors, data.detector_named
        self.feature_bytes = data.feature_bytes
        self.detector = next(iter(data.detectors.values()))
        self.reference, self.floor = self.detector.reference, self.detector.floor

        self.targets, self.pca = targets.stores, targets.pca
        self.teacher_size, self.target_bytes, self.check_cache = targets.shape, targets.bytes_of, targets.check

        self.trajectories = runs.trajectories | evaluations.trajectories
        self.pieces, self.cuts, self.planned = runs.pieces, runs.cuts, runs.planned
        self.trained, self.aligns = runs.trained, runs.aligns
        self.state, self.parse, self.segment, self.on_disk = runs.state, runs.parse, runs.segment, runs.on_disk
        self.notes = runs.notes + data.notes + evaluations.notes

        self.rows, self.elsewhere = evaluations.rows, evaluations.elsewhere
        self.evaluations, self.evaluation = evaluations.by_name, evaluations.named
        self.weights = evaluations.weights

        measures = Measures(config, data, evaluations.states)
        self._parts = config, data, targets, runs, evaluations, measures
        self.measured, self.measurements, self.measurement = measures.rows, measures.by_name, measures.of

    @functools.cached_property
    def _about_evaluation(self) -> Plan:
        data = self.data.of(EVALUATION)
        found = copy.copy(self)
        found.config, found.data, found.checked_images = data.config, data, data.checked_images
        found.images, found.latents, found.flipped, found.text = data.images, data.latents, None, data.text
        return found

    @functools.cached_property
    def mirrored(self) -> Plan:
        """The plan about training's images seen in a mirror, whose latents are `flipped`.

        Raises:
            ValueError: no run is trained on these.
        """
        if self.flipped is None:
            raise ValueError("training.flip: false in every run, so latents of mirrored images are not needed")
        found = copy.copy(self)
        found.latents = self.flipped
        return found

    def of(self, split: str) -> Plan:
        """The plan about the images of a split: of `evaluation`, with `images`, `latents`, `text` and `data` of its
        own, or one of those that training is about."""
        return self._about_evaluation if split == EVALUATION else self

    @property
    def image_sets(self) -> list[Plan]:
        """The plan about each set of images: that of training, and `evaluation`."""
        return [self, *([self.of(EVALUATION)] if self.data.evaluation else [])]

    @property
    def encoded(self) -> list[Plan]:
        """The plan about each set of images that has latents: also training's mirrored ones, if a run flips."""
        return [*self.image_sets, *([self.mirrored] if self.flipped else [])]

    @property
    def image_count(self) -> int:
        """Images of the store or, before it exists, of its source; raises as `Data.image_count`."""
        return self.data.image_count

    @property
    def count(self) -> int | None:
        """`image_count`, as far as it is known before there is a source."""
        return self.data.count

    @property
    def unused(self) -> list[dict[str, Any]]:
        """What lies among the images and is not used, as `haste.files.walk.grouped`; raises as `image_count`."""
        return self.data.unused

    @property
    def changes(self) -> list[str]:
        """How the images' source differs from what they were made from, and what to do; nothing if it does not."""
        said = [changed for plan in self.image_sets if (changed := plan.data.source_changes)]
        return [f"{changed}. `haste images --update` takes the change up, under new names" for changed in said]

    def check(self) -> None:
        """Refuse, before anything is submitted, what the first jobs would refuse, with the same messages.

        Only what is still to be made needs its sources; a source that was removed later is not an error. Only names
        and headers are read.

        Raises:
            ValueError: an input that a job would refuse (`haste.plan.inputs.INPUTS` has all of them), a sampler that
                does not suit a network, or more disk than the configuration allows; of what is missing all of it, as
                MissingError.
        """
        check_samplers(self.config)
        inputs.check(inputs.Parts(*self._parts, self.jobs))
        self.check_cache()

    def path(self, state: State) -> str:
        """The path of a state."""
        if state.trajectory in self.elsewhere:
            return self.data.outside.files[self.elsewhere[state.trajectory].checkpoint]
        return f"{self.root}/states/{state.trajectory}/{state.file}"

    @functools.cached_property
    def jobs(self) -> Jobs:
        """All jobs, and those that a run of the workflow would do now."""
        return Jobs(self)

    def drawn_from(self, evaluation: Evaluation) -> list[str]:
        """The files that a set of samples is drawn from, except the detector's.

        An imported checkpoint needs only the decoder, which knows the latents' scale. The checkpoint itself is
        not listed: its content is in the samples' name, and existing samples remain valid without it.
        """
        parts = [self.autoencoder, self.text_encoder if evaluation.sampling.prompts else None]
        made = [*(file for part in parts if part for file in part.files), *self.told_from, *self.meant_from]
        if evaluation.state.trajectory in self.elsewhere:
            return made
        return [self.path(evaluation.state), self.latents.manifest, *made]  # the latents' scale is in their manifest

    @property
    def told_from(self) -> list[str]:
        """The files that a job looks up what samples are told in: none for labels."""
        texts = [self.images.manifest] if self.config.condition.name == "captions" else []
        states = self.text or self.text_encoder
        return [*texts, *(states.files if states else [])]

    @property
    def meant_from(self) -> list[str]:
        """The files that a job looks up in what samples were told, and which classes that means: none for labels."""
        if self.config.condition.name != "captions":
            return []
        return self.images.files if self.config.images.classes else [self.images.manifest]

    def aligned_from(self, segment: Segment) -> list[str]:
        """The files that a job reads its alignment targets from."""
        stores = [self.targets[name] for name in segment.targets] + ([self.images] if segment.teachers else [])
        made = stores + [part for name in segment.teachers if (part := self.teachers[name])]
        return [path for one in made for path in one.files]

    def measured_from(self, measurement: Measurement) -> list[str]:
        """The files that a measure is made from. For an imported checkpoint see `drawn_from`."""
        state = measurement.state
        own = [] if state.trajectory in self.elsewhere else [self.path(state)]
        parts = [part for name in measurement.unseen if (part := self.teachers[name])]
        if self.autoencoder and "decoder" in self.config.measures[measurement.label].made.needs:
            parts.append(self.autoencoder)
        looked_at = measurement.unseen or measurement.segment.teachers
        parts += [self.of(split).images for split in measurement.splits if looked_at]
        shown = [file for part in parts for file in part.files]
        sets = [self, *(self.of(split) for split in measurement.splits)]
        files = [file for one in sets for file in (*one.latents.files, *one.told_from)]
        return list(dict.fromkeys([*files, *own, *self.aligned_from(measurement.segment), *shown]))

    @property
    def measure_files(self) -> list[str]:
        """The measurements of states, one per file."""
        return [measurement.file for measurement in self.measurements.values()]

    def label(self, run: str, seed: int) -> str:
        """Label of one seed of a run: only the run's name if it has no other seed."""
        seeds = [] if run in self.config.evaluate else self.config.runs[run].all_seeds
        return f"{run} (seed {seed})" if len(seeds) > 1 else run

    @property
    def report_made(self) -> str:
        """The page's provenance record. Its name follows from the whole configuration: other tables, other files."""
        shown = decides(Config, self.config.model_dump(mode="json", exclude={"results"}))
        for kind, schema in (("runs", Run), ("evaluate", Evaluate)):
            shown[kind] = {name: decides(schema, row) for name, row in shown[kind].items()}
        shown["images"] = decides(Images, shown["images"])
        if shown.get("evaluation"):
            del shown["evaluation"]["expected"]
            if shown["evaluation"]["reader"] == Images.model_fields["reader"].default:
                del shown["evaluation"]["reader"]
        if self.config.condition.name == "labels":
            del shown["condition"]
        sections: list[tuple[type[Strict], dict[str, Any]]] = [(Training, shown["training"])]
        sections += [(Runtime, shown["runtime"])]
        given = [pair for one in shown["alignments"].values() for pair in one.items() if pair[1]]
        sections += [(TERMS[k], term) for k, terms in given for term in (terms if isinstance(terms, list) else [terms])]
        sections += [(Teacher, teacher) for teacher in shown["teachers"].values()]
        sections += [(Detector, one) for one in shown["detector"].values()]
        sections += [(Sampling, way) for way in shown["sampling"].values()]
        stops = (stop for row in shown["runs"].values() for stop in row["stop"].values())
        sections += [(Trigger, stop) for stop in stops if isinstance(stop, dict)]
        for model, section in sections:
            for key in section.keys() & model.model_fields.keys():
                young = key in _YOUNG or f"{model.__name__}.{key}" in _YOUNG
                if young and section[key] == model.model_fields[key].default:
                    del section[key]
        return f"{self.folder}/report/made-{fingerprint(shown)}.json"

    @property
    def shown(self) -> list[str]:
        """The files that the page shows: every score, and the grids of each row's first seed, except of branches."""
        scores = [judgement.score for row in self.rows for judgement in row.evaluation.judged]
        apart = branches(self.config)
        first = {run: None if run in apart else row.seed for run, row in self.config.runs.items()}
        grids = [row.evaluation.grid for row in self.rows if row.seed == first.get(row.run, row.seed)]
        real = [path for one in self.detectors.values() for path in (one.floor, one.reconstructed) if path]
        return [*dict.fromkeys(scores + grids), *real]
