"""The data of a plan: stores of images and latents, networks trained here, detectors, external files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haste.config import DETECTORS, Config
from haste.config import Detector as DetectorSpec
from haste.files import artefact, listing
from haste.files.artefact import fingerprint, remembered_identity
from haste.networks import foreign
from haste.plan.names import RECIPE, Artefact, Detector


class Data:
    """The inputs of training, sampling and scoring.

    Attributes:
        identities: external file -> sha256 of its content, which enters names.
        images, latents: the two stores.
        autoencoder: the one trained here, or None.
        encoder, decoder: what encodes images and decodes samples: that part's folder, or a folder or hub id.
        teachers: name -> the network trained here, None for a public one.
        detectors: by name; the first one is the main one: its Frechet distance orders curves and grids.
        checked_images: the list of unusable images, if these are left out; else None.
    """

    def __init__(self, config: Config):
        self.config, self.root = config, config.results.rstrip("/")
        self.identities = _identities(config, self.root)
        self.images = self._images()
        skips = config.images.on_bad_image == "skip"
        self.checked_images = f"{self.images.folder}/checked.json" if skips else None

        trained, public = config.autoencoder.trained, config.autoencoder.pretrained
        self.autoencoder = self.part("autoencoder", "autoencoder", trained.model_dump()) if trained else None
        if public:
            self.encoder, self.decoder = public.encode, public.decode or public.encode
        else:
            assert self.autoencoder
            self.encoder = self.decoder = self.autoencoder.folder
        self.latents = self._latents()

        self.teachers: dict[str, Artefact | None] = {
            name: self.part("teacher", name, teacher.trained.model_dump()) if teacher.trained else None
            for name, teacher in config.teachers.items()
        }
        self.detectors = {name: self._detector(name, spec) for name, spec in config.detector.items()}

    def store(self, kind: str, recipe: Mapping[str, Any], shards: int) -> Artefact:
        """A store of some kind."""
        key = fingerprint({"store": kind, **recipe})
        return Artefact(kind, key, dict(recipe), f"{self.root}/stores/{kind}-{key}", shards)

    def part(self, kind: str, name: str, settings: Mapping[str, Any]) -> Artefact:
        """A network or components, trained or fitted on the images."""
        recipe = {"recipe": RECIPE, "part": kind, "images": self.images.key, **settings}
        key = fingerprint(recipe)
        return Artefact(kind, key, recipe, f"{self.root}/parts/{kind}-{key}", name=name)

    def features(self, of: str, source: str, kind: str, detector: str, shards: int) -> Artefact:
        """A detector's (its kind and key) features of some images: `of` names their folder, `source` is hashed."""
        recipe = {"recipe": RECIPE, "of": source, "detector": detector}
        return Artefact("features", fingerprint(recipe), recipe, f"{self.root}/features/{of}/{kind}-{detector}", shards)

    def _images(self) -> Artefact:
        spec = self.config.images
        recipe = {"recipe": RECIPE, **spec.model_dump(exclude={"shards", "on_bad_image"})}
        if spec.on_bad_image == "skip":  # a store that may leave images out is not the same as one that may not
            recipe["on_bad_image"] = "skip"
        return self.store("images", recipe, spec.shards)

    def _latents(self) -> Artefact:
        spec = self.config.autoencoder
        encoder = self.autoencoder.key if self.autoencoder else self.encoder
        recipe = {"recipe": RECIPE, "images": self.images.key, "autoencoder": encoder, "dtype": spec.dtype}
        recipe |= self.config.condition.entry
        return self.store("latents", recipe, spec.shards)

    def _detector(self, name: str, spec: DetectorSpec) -> Detector:
        part = self.part("detector", name, spec.trained.model_dump()) if spec.trained else None
        kind, weights = (spec.pretrained.name, spec.pretrained.weights) if spec.pretrained else ("cnn", None)
        key = fingerprint({"recipe": RECIPE, "detector": part.key if part else [kind, weights]})
        of, source = self.images.folder.rsplit("/", 1)[1], self.images.key
        if spec.reference is not None:
            source = self.identities[spec.reference]
            of = f"reference-{source[:12]}"
        reference = self.features(of, source, kind, key, shards=1)
        floor = f"{self.root}/scores/floor-{fingerprint([reference.key, 'halves'])}.json"
        return Detector(name, kind, weights, key, part, reference, spec.reference, floor)

    def teacher_key(self, name: str) -> str:
        """What identifies a teacher in a recipe: a trained one's key, or the pretrained one's name and weights file."""
        part, spec = self.teachers[name], self.config.teachers[name].pretrained
        if part:
            return part.key
        assert spec
        return spec.name if spec.weights is None else f"{spec.name} from {spec.weights}"

    def detector_named(self, name: str) -> Detector:
        """A detector by its name.

        Raises:
            ValueError: this configuration has no detector of that name.
        """
        if name not in self.detectors:
            raise ValueError(f"detector {name!r}: not in this configuration, which has {', '.join(self.detectors)}")
        return self.detectors[name]

    def feature_bytes(self, detector: Detector) -> int | None:
        """Bytes on disk of a detector's features of one image: float32 numbers, and a label.

        None for a detector of another package, whose width is only known once it is loaded.
        """
        spec, public = self.config.detector[detector.name].trained, DETECTORS.get(detector.kind)
        if spec is not None:
            return 4 * (4 * spec.width + self.config.images.classes) + 8
        return None if public is None else 4 * public.numbers + 8

    @functools.cached_property  # a large folder takes minutes to walk
    def image_count(self) -> int:
        """Number of images in the store or, before it exists, in its source, counted as the first job will do it.

        Raises:
            ValueError: the source is missing, has no images, fewer than are held out, or other classes.
        """
        manifest, spec = Path(self.images.manifest), self.config.images
        if manifest.exists():
            return artefact.read_json(manifest, "store")["count"]
        where, (count, classes) = spec.path or spec.source, listing.survey(spec.source, spec.path, bool(spec.classes))
        listing.checked_holdout(where, spec.holdout, count)
        if classes is not None:
            listing.check_classes(where, classes, spec.classes)
        return count


def _identities(config: Config, root: str) -> dict[str, str]:
    """Identities of the external files; for one that has been removed since, its earlier identity."""
    starts = {row.warm_start.file for row in config.runs.values() if row.warm_start is not None}
    files = [*(spec.checkpoint for spec in config.evaluate.values()), *sorted(starts)]
    if folders := [Path(file) for file in files if Path(file).is_dir()]:
        raise ValueError(f"{folders[0]}: expected a checkpoint, found {foreign.folder(folders[0])}")
    files += [spec.reference for spec in config.detector.values() if spec.reference is not None]
    return {file: remembered_identity(file, f"{root}/identities.json") for file in dict.fromkeys(files)}
