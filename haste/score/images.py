"""Scores of images from any source: sample files, folders, archives, stores or stored features, against a reference."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from haste.files import artefact
from haste.files.store import MANIFEST, Store
from haste.metrics import inception_score, kid
from haste.metrics.clip import Clip
from haste.metrics.detector import Detector
from haste.metrics.detectors import open_detector
from haste.metrics.scores import METRICS, NEIGHBOURS
from haste.networks.devices import devices_named
from haste.sampling.samples import Samples, open_samples
from haste.score import comparable
from haste.score.columns import VALUES, Score, column, compare, refuse, typed
from haste.score.prompts import Prompts
from haste.score.sides import Reference, Side, gather, holds_statistics, read_reference, write_reference
from haste.score.views import View, check_size, extract_features, probe, view_of

log = logging.getLogger("haste.score")

MOST_KEPT = 100_000  # samples whose features are held for error bars


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one set of images, with everything that determines what they may be compared with.

    columns: name -> score, in the order of a table, see `haste.score.columns.column`.
    samples, reference: what was compared, JSON; detectors: by which detectors, JSON; settings: seeds, splits, batch,
    JSON; notes: remarks on the numbers, a sentence each; absent: name -> why there is no such score.
    """

    columns: Mapping[str, Score]
    samples: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    detectors: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    notes: Sequence[str]
    absent: Mapping[str, str]
    seconds: float

    def __getitem__(self, name: str) -> float:
        """The value of a column. Raises KeyError, with the reason if it is known."""
        if name not in self.columns:
            raise KeyError(f"{name}: {self.absent.get(name, 'not among ' + ', '.join(self.columns))}")
        return self.columns[name].value

    @property
    def values(self) -> dict[str, float]:
        """Column -> value."""
        return {name: score.value for name, score in self.columns.items()}

    def json(self) -> dict[str, Any]:
        """All of it as a JSON artefact."""
        inputs, reference = {"samples": self.samples["identity"]}, None
        if self.reference is not None:
            inputs["reference"] = self.reference["identity"]
            reference = {**self.reference, "adm": comparable.known_reference(self.reference)}
        return {
            "schema": artefact.SCHEMA,
            "kind": "image scores",
            "scores": self.values,
            "errors": {n: {"value": s.error, "what": s.what} for n, s in self.columns.items() if s.error is not None},
            "absent": dict(self.absent),
            "notes": list(self.notes),
            "samples": dict(self.samples),
            "reference": reference,
            "detectors": [dict(detector) for detector in self.detectors],
            "settings": dict(self.settings),
            "provenance": artefact.provenance(inputs=inputs, seconds=self.seconds),
        }


def score_images(
    samples: Path | str,
    reference: Path | str | None,
    *,
    detectors: Sequence[Detector] | None = None,
    metrics: Sequence[str] | None = None,
    features: Path | str | None = None,
    prompts: Path | str | None = None,
    batch: int = 64,
    device: str = "cpu",
    seed: int = kid.SEED,
    convert: bool = False,
) -> Scores:
    """Score one set of images; a `Scorer` scores several and extracts the reference's features once.

    Args:
        samples: ADM's .npz (`arr_0`), a folder or .zip of pictures, shards of samples, an image store, or a features
            store.
        reference: the same, or an .npz of statistics, such as ADM's references; None for scores that need none.
        detectors: the detectors; None is the detector of stored features, otherwise Inception.
        metrics: of fid (or fd), sfid, is, precision, recall, kid. None is all that can be computed; a named one that
            cannot be computed is an error.
        features: a folder in which features are kept and found again; None keeps none.
        prompts: a file of what the images were told, a line each in their order, for the CLIP score.
        batch: batch size of a detector.
        device: of Inception, if no detector is given, "all" is every GPU; a given detector stays on its device.
        seed: of KID's subsets.
        convert: make pictures in files RGB that are not, on both sides, as `haste.sampling.samples.open_samples` says.

    Raises:
        ValueError: an input is wrong; the message says where, what was found and what was expected.
    """
    options: dict[str, Any] = {"features": features, "prompts": prompts, "batch": batch, "device": device, "seed": seed}
    return Scorer(reference, detectors=detectors, metrics=metrics, convert=convert, **options)(samples)


class Scorer:
    """Scores sets of images against one reference. Arguments as in `score_images`."""

    def __init__(
        self,
        reference: Path | str | None,
        *,
        detectors: Sequence[Detector] | None = None,
        metrics: Sequence[str] | None = None,
        features: Path | str | None = None,
        prompts: Path | str | None = None,
        batch: int = 64,
        device: str = "cpu",
        seed: int = kid.SEED,
        convert: bool = False,
    ):
        if batch < 1:
            raise ValueError(f"batch: expected 1 or more, found {batch}")
        self.strict, self.wanted = metrics is not None, list(VALUES) if metrics is None else typed(metrics)
        self.convert = convert
        self.source = None if reference is None else open_source(reference, statistics=True, convert=convert)
        if self.source is None and not self.strict:
            self.wanted = [name for name in self.wanted if not METRICS[VALUES[name][0]].reference]
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, found {seed}")
        self.detectors = None if detectors is None else list(detectors)
        self.prompts = None if prompts is None else Prompts(Path(prompts))
        if self.prompts and not any(isinstance(one, Clip) for one in self.detectors or []):
            raise ValueError(f"{prompts}: of the detectors only clip reads prompts, and it is not among them")
        self.columns: dict[str, str] = {}  # column of a distance -> the identity of its detector
        for detector in self.detectors or []:
            self._claim(detector.about)
        self.features = None if features is None else Path(features)
        self.batch, self.devices, self.seed = batch, devices_named(device), seed
        self.references: dict[str, Side] = {}

    def _claim(self, about: Mapping[str, Any]) -> None:
        """Refuse two detectors for one column: they would not be comparable, or would hide one another."""
        name, identity = column("fd", about), about["identity"]
        if self.columns.setdefault(name, identity) != identity:
            raise ValueError(
                f"detectors: {self.columns[name][:12]} and {identity[:12]} would both give {name}; expected one "
                "detector of a name, and the same one for all sets"
            )

    def check(self, samples: Path | str) -> Samples | Store | Reference:
        """Open a set of images and check that it can be scored, without extracting features. Raises ValueError."""
        source = open_source(samples, statistics=False, convert=self.convert)
        _check_sizes(source, self.source)
        if self.prompts:
            assert not isinstance(source, Reference)
            self.prompts.check(samples, source.count)
        return source

    def __call__(self, samples: Path | str) -> Scores:
        """Score a set of images. Raises ValueError as in `score_images`."""
        started = time.monotonic()
        source = self.check(samples)
        for one in (source, self.source):
            if isinstance(one, Samples):
                probe(one)
        columns, absent, said, who = dict[str, Score](), dict[str, str](), list[str](), list[dict[str, Any]]()
        about: dict[str, Any] = {}
        reference: dict[str, Any] | None = None
        near: int | None = None
        for seen, detector, see in self._views(source):
            self._claim(seen)
            # Cheap checks that may refuse come first: hours of feature extraction must not end in a refusal.
            real = None if self.source is None else self._reference(seen, detector)
            if self.strict and self._alone:
                told = {"cosine": 1} if self.prompts else {}
                refuse({**seen, "outputs": {**seen["outputs"], **told}}, real, self.wanted)
            view = dataclasses.replace(see(), detector=seen)
            if self.prompts and isinstance(detector, Clip):
                view = self.prompts.beside(view, detector)
            side = self._gather_samples(view)
            # Inception's default is all five scores; scores that other networks lack need no remark.
            wanted = [name for name in self.wanted if self.strict or VALUES[name][0] not in side.absent]
            found = compare(side, real, wanted, strict=self.strict and self._alone, seed=self.seed)
            columns, absent, said = columns | found.columns, absent | found.absent, said + found.notes
            about = side.about
            who.append(dict(side.detector))
            if real is not None:
                near = next((len(s.index) for name, s in real.stats.items() if METRICS[name].reference_rows), near)
                # The same reference, but one detector may have its statistics and another only some of its images.
                who[-1] |= {"reference_moments": real.about["moments"]} if "moments" in real.about else {}
                reference = {name: fact for name, fact in real.about.items() if name != "moments"}
        if not columns:
            raise ValueError(f"{_path(source)}: no score can be computed: {'; '.join(sorted(set(absent.values())))}")
        self._check_named(columns, absent, who)
        notes = list(dict.fromkeys([*comparable.notes(about, reference, who, columns), *said]))
        seconds = round(time.monotonic() - started, 3)
        return Scores(columns, about, reference, who, self._settings(about["images"], near), notes, absent, seconds)

    def _check_named(
        self, columns: Collection[str], absent: Mapping[str, str], who: Sequence[Mapping[str, Any]]
    ) -> None:
        """A metric that is requested by name must come from at least one of the detectors."""
        for value in self.wanted if self.strict else ():
            labels = [column(value, detector) for detector in who]
            if not set(labels) & set(columns):
                raise ValueError(f"{', '.join(labels)}: {'; '.join(sorted({absent.get(one, '?') for one in labels}))}")

    def save_reference(self, path: Path | str) -> None:
        """Write the statistics of the reference by its only detector, after something was scored against it.

        Raises:
            ValueError: nothing has been scored against a reference yet, or there are several detectors.
        """
        if len(self.references) != 1:
            who = ", ".join(side.detector["name"] for side in self.references.values()) or "none"
            raise ValueError(f"{path}: a file of statistics is by one detector, found {who}")
        (side,) = self.references.values()
        write_reference(Path(path), side)

    @property
    def _alone(self) -> bool:
        # With several detectors a named metric is computed by those that support it.
        return self.detectors is None or len(self.detectors) == 1

    # ---- both sides

    @cached_property
    def _inception(self) -> Detector:
        return open_detector("inception").spread(self.devices)

    @property
    def _metrics(self) -> list[str]:
        """Names in METRICS that are requested."""
        wanted = {VALUES[name][0] for name in self.wanted}
        return [name for name in METRICS if name in wanted]

    def _settings(self, count: int, near: int | None) -> dict[str, Any]:
        """The settings: `count` samples, and `near` images of the reference for precision, recall and KID."""
        subsets: dict[str, Any] = {"pairs": "all"}
        if near is not None and min(count, near) > kid.SIZE:
            subsets = {"subsets": kid.SUBSETS, "subset_size": kid.SIZE}
        return {
            "batch": self.batch,
            "precision": "float32 in the detector, float64 in the statistics",
            "precision_recall": {"neighbours": 3, "reference_images": near},
            "inception_score": {"split": inception_score.SPLIT, "splits": -(-count // inception_score.SPLIT)},
            "kid": {**subsets, "seed": self.seed},
            **({"clip_score": {"formula": "mean of 100 max(cos, 0)", **self.prompts.about}} if self.prompts else {}),
        }

    def _views(
        self, source: Samples | Store | Reference
    ) -> Iterator[tuple[Mapping[str, Any], Detector | None, Callable[[], View]]]:
        """For each detector of the samples: its description, the detector if it is loaded, and its view."""
        if isinstance(source, Store):
            view = view_of(source)
            mine = [one for one in self.detectors or [] if one.identity == view.detector["identity"]]
            if self.detectors is not None and len(mine) != len(self.detectors):
                other = next(one for one in self.detectors if one not in mine)
                raise ValueError(
                    f"{source.folder}: features by detector {view.detector['identity'][:12]}, but requested are scores "
                    "by "
                    f"{other.name} {other.identity[:12]}"
                )
            yield (mine[0].about, mine[0], lambda: view) if mine else (view.detector, None, lambda: view)
            return
        assert isinstance(source, Samples)
        detectors = [self._inception] if self.detectors is None else self.detectors
        for one in detectors:
            check_size(source, one)
        for one in detectors:
            yield one.about, one, partial(extract_features, source, one, batch=self.batch, folder=self.features)

    def _gather_samples(self, view: View) -> Side:
        outputs = {"frechet": "pool", "sfid": "spatial"}
        keep = [outputs[name] for name in self._metrics if name in outputs] if view.count <= MOST_KEPT else []
        return gather(view, self._metrics, keep=keep)

    def _reference(self, about: Mapping[str, Any], detector: Detector | None) -> Side:
        """The statistics of the reference by a detector, computed once."""
        identity = about["identity"]
        if identity not in self.references:
            self.references[identity] = self._compute_reference(about, detector)
        return self.references[identity]

    def _compute_reference(self, about: Mapping[str, Any], detector: Detector | None) -> Side:
        source, metrics = self.source, [name for name in self._metrics if METRICS[name].reference]
        if isinstance(source, Store):
            view = view_of(source)
            _check_detector(source.folder, view.detector, about)
            return gather(view, metrics, most=NEIGHBOURS)
        if isinstance(source, Reference):
            return self._of_statistics(source, metrics, about, detector)
        assert isinstance(source, Samples)
        return self._look(source, metrics, about, detector)

    def _look(
        self, source: Samples, metrics: Sequence[str], about: Mapping[str, Any], detector: Detector | None
    ) -> Side:
        if detector is None:  # the samples are stored features: the reference needs the detector that made them
            detector = self._inception
            _check_detector(source.path, detector.about, about)
        return gather(
            extract_features(source, detector, batch=self.batch, folder=self.features), metrics, most=NEIGHBOURS
        )

    def _of_statistics(
        self, source: Reference, metrics: Sequence[str], about: Mapping[str, Any], detector: Detector | None
    ) -> Side:
        if source.detector is not None:
            _check_detector(source.path, source.detector, about)
        elif about.get("kind") not in ("inception", None) and not _is_by_pytorch_fid(source, about):
            return self._moments_of_another(source, metrics, about, detector)
        side = Side(source.about, about)
        for name, output in (("frechet", "pool"), ("sfid", "spatial")):
            if output in source.moments:
                side.stats[name] = source.moments[output]
            elif name in metrics:
                side.absent[name] = f"the reference {source.path} holds no mu_s and sigma_s"
        near = [name for name in metrics if METRICS[name].reference_rows]
        if near and source.near is not None:
            side.stats |= dict.fromkeys(near, source.near)
        elif near and source.samples is not None:
            side.stats |= self._look(source.samples, near, about, detector).stats
        else:
            side.absent |= dict.fromkeys(near, f"the reference {source.path} holds no images")
        return side

    def _moments_of_another(
        self, source: Reference, metrics: Sequence[str], about: Mapping[str, Any], detector: Detector | None
    ) -> Side:
        if source.samples is None:
            raise ValueError(
                f"{source.path}: holds mu and sigma of Inception and no images, but the samples' features "
                f"are by {about['name']}"
            )
        side = self._look(source.samples, metrics, about, detector)
        return dataclasses.replace(side, about={**source.about, "moments": "of its images under arr_0"})


def _is_by_pytorch_fid(source: Reference, about: Mapping[str, Any]) -> bool:
    """Whether statistics that name no detector can be pytorch-fid's, whose files hold nothing else."""
    return about.get("kind") == "pytorch-fid" and source.samples is None and "spatial" not in source.moments


def open_source(path: Path | str, *, statistics: bool, convert: bool = False) -> Samples | Store | Reference:
    """What a path holds: images, stored features, or (if `statistics` are allowed) statistics;
    pictures that are not RGB may be there only with `convert`.

    Raises:
        ValueError: none of these; the message says what was found.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        store = Store.open(path)
        if store.manifest["store"] == "features":
            return store
        if store.manifest["store"] != "images":
            raise ValueError(f"{path}: a store of {store.manifest['store']}, expected one of images or features")
    elif below := sorted(path.glob(f"*/{MANIFEST}")):
        raise ValueError(f"{path}: holds stores, name one of them, such as {below[0].parent}")
    if statistics and holds_statistics(path):
        return read_reference(path)
    return open_samples(path, convert)


def _size(source: Samples | Store | Reference | None) -> list[int] | None:
    """Height and width of a source's images, if known."""
    if isinstance(source, Samples):
        return list(source.size)
    if isinstance(source, Store):
        return source.manifest.get("pixels", {}).get("size")
    return None if source is None else source.about.get("size")


def _check_sizes(samples: Samples | Store | Reference, reference: Samples | Store | Reference | None) -> None:
    mine, theirs = _size(samples), _size(reference)
    if mine is not None and theirs is not None and mine != theirs:
        raise ValueError(
            f"{_path(samples)}: images of {mine[0]} x {mine[1]} px, but those of the reference {_path(reference)} are "
            f"{theirs[0]} x {theirs[1]} px; images of different sizes cannot be compared"
        )


def _path(source: Samples | Store | Reference | None) -> Path | None:
    return source.folder if isinstance(source, Store) else None if source is None else source.path


def _check_detector(path: Path, seen: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if seen["identity"] != asked["identity"]:
        who = [f"{one.get('name') or 'a detector'} {one['identity'][:12]}" for one in (seen, asked)]
        raise ValueError(
            f"{path}: features of the reference by {who[0]}, of the samples by {who[1]}: they cannot be compared"
        )


def detectors_asked(
    names: Sequence[str], weights: Path | None, device: str, told: Sequence[str] = ()
) -> list[Detector] | None:
    """The detectors that `haste score` is given; None if it is given none.

    Args:
        names: NAME or NAME=WEIGHTS of each.
        weights: the weights file of the only one, if its name does not include it.
        device: where to compute; "all" is every GPU.
        told: those that prompts ask for, where none of the names is clip.

    Raises:
        ValueError: `weights` with several detectors, or in addition to NAME=WEIGHTS; or as in `open_detector`.
    """
    asked = [name.partition("=")[::2] for name in names]
    if weights is not None:
        if len(asked) > 1 or any(own for _, own in asked):
            raise ValueError("--weights: is for one detector without weights of its own, see --detector NAME=WEIGHTS")
        asked = [(asked[0][0] if asked else "inception", str(weights))]
    asked += [(name, "") for name in told if not any(one == "clip" for one, _ in asked)]
    devices = devices_named(device)
    return [open_detector(name, own or None).spread(devices) for name, own in asked] or None
