"""The data of a plan: stores of images and latents, networks trained here, detectors, external files."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haste.config import DETECTORS, EVALUATION, Config, Images, decides
from haste.config import Detector as DetectorSpec
from haste.files import artefact, listing, walk
from haste.files.artefact import fingerprint
from haste.files.listing import Listing
from haste.files.sources import UNUSED, Pictures, SourceRecord
from haste.networks.headers import MissingError
from haste.networks.text import TOKENIZER, WORDS
from haste.plan.names import RECIPE, SHOWN_CLASSES, Artefact, Detector
from haste.plan.outside import Outside

WEIGHTS = ("*.safetensors", "*.bin", "config.json", *TOKENIZER)  # files of a folder that decide what it computes


class Data:
    """The inputs of training, sampling and scoring.

    Attributes:
        outside: files from outside that enter names by their content; identities, missing: of these.
        images, latents: the two stores.
        flipped: the store of latents of the mirrored images; None if no run is trained on these.
        text_encoder: the one that is trained here, or None.
        text: the store of captions' states; None for another condition, or if they are made as they are needed.
        told: what else decides what samples are told, as entries of a recipe.
        autoencoder: the one trained here, or None.
        encoder, decoder: what encodes images and decodes samples: that part's folder, or a folder or hub id.
        encoder_key, decoder_key: what identifies them in recipes.
        teachers: name -> the network trained here, None for a public one.
        detectors: by name; the first one is the main one: its Frechet distance orders curves and grids.
        checked_images: the list of unusable images, if these are left out; else None.
        source: the record of what the images' source held; None for images of a library.
        evaluation: the same of the images that only measures see, with their latents and texts; None without them.
    """

    def __init__(self, config: Config, content: str | None = None, ahead: bool = False):
        """
        Args:
            config: the configuration.
            content: of the images' source, as `SourceRecord.contents` has it; None is the one in use.
            ahead: plan although external files are not there yet. Names that follow from their content are then others
                than they will be.

        Raises:
            MissingError: an external file is not there, unless `ahead`.
        """
        self._content, self._section = content, "images"
        self.config, self.root = config, config.results.rstrip("/")
        self.outside, self._names = Outside(config, self.root), dict[str, str]()
        self.identities, self.missing = self.outside.identities, self.outside.missing
        if self.missing and not ahead:
            raise MissingError("\n".join(self.missing.values()))
        self._take_images()

        trained, public = config.autoencoder.trained, config.autoencoder.pretrained
        self.autoencoder = self.part("autoencoder", "autoencoder", trained.model_dump()) if trained else None
        if public:
            self.encoder, self.decoder = public.encode, public.decode or public.encode
            self.encoder_key, self.decoder_key = self._named(self.encoder), self._named(self.decoder)
        else:
            assert self.autoencoder
            self.encoder = self.decoder = self.autoencoder.folder
            self.encoder_key = self.decoder_key = self.autoencoder.key
        self.latents = self._latents()
        self.flipped = self._flipped()
        self.text_encoder = self._text_encoder()
        self.text, self.told = self._text()

        self.teachers: dict[str, Artefact | None] = {
            name: self.part("teacher", name, teacher.trained.model_dump()) if teacher.trained else None
            for name, teacher in config.teachers.items()
        }
        self.detectors = {name: self._detector(name, spec) for name, spec in config.detector.items()}
        self.evaluation = self._evaluation()

    def _evaluation(self) -> Data | None:
        if self.config.evaluation is None:
            return None
        found = copy.copy(self)
        found.config = self.config.model_copy(update={"images": self.config.evaluation, "evaluation": None})
        found._content, found.evaluation, found._section = None, None, EVALUATION
        found._take_images()
        found.latents, found.flipped = found._latents(), None
        found.text, found.told = found._text()
        return found

    def _take_images(self) -> None:
        self.source, self.images = self._images()
        skips = self.config.images.on_bad_image == "skip"
        self.checked_images = f"{self.images.folder}/checked.json" if skips else None

    def of(self, split: str) -> Data:
        """The data of a split of images: `evaluation`, or one of those that training is about."""
        found = self.evaluation if split == EVALUATION else self
        assert found is not None
        return found

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

    def _images(self) -> tuple[SourceRecord | None, Artefact]:
        spec = self.config.images
        recipe = {"recipe": RECIPE, **decides(Images, spec.model_dump(exclude={"shards", "on_bad_image"}))}
        if spec.on_bad_image == "skip":  # a store that may leave images out is not the same as one that may not
            recipe["on_bad_image"] = "skip"
        plain = self.store("images", recipe, spec.shards)
        if spec.path is None:
            return None, plain
        source = SourceRecord(self.root, Path(plain.folder).name)
        content = source.content if self._content is None else self._content
        return source, self.store("images", {**recipe, "content": content}, spec.shards) if content else plain

    def _named(self, weights: str) -> str:
        """Weights as recipes name them: by path or hub id, and by content too once that has changed."""
        if weights in self._names:
            return self._names[weights]
        place, memory = Path(weights), f"{self.root}/identities.json"
        files = [file for kind in WEIGHTS for file in place.rglob(kind)] if place.is_dir() else [place]
        # Also those that are gone, or that this machine does not see: they keep the identity that they had.
        every = {str(file.absolute()) for file in files if file.is_file()} | artefact.remembered_below(place, memory)
        changed = [artefact.changed_identity(file, memory) for file in sorted(every)]
        self._names[weights] = f"{weights} {fingerprint(changed)}" if any(changed) else weights
        return self._names[weights]

    def _latents(self) -> Artefact:
        spec = self.config.autoencoder
        recipe = {"recipe": RECIPE, "images": self.images.key, "autoencoder": self.encoder_key, "dtype": spec.dtype}
        recipe |= self.config.condition.stored
        return self.store("latents", recipe, spec.shards)

    def _flipped(self) -> Artefact | None:
        """A store of its own, so that whether rows flip changes the name of no other store and of no other row."""
        if not any(self.config.training_of(run).flip for run in self.config.runs):
            return None
        return self.store("latents", {**self.latents.recipe, "flipped": True}, self.latents.shards)

    def _text_encoder(self) -> Artefact | None:
        trained, settings = self.config.condition.trained, self.config.condition.decided
        if trained is None:
            return None
        size = {key: settings[key] for key in ("tokens", "width")}
        return self.part("text_encoder", "text encoder", {**trained.model_dump(), **size})

    def _text(self) -> tuple[Artefact | None, dict[str, Any]]:
        if self.config.condition.name != "captions":
            return None, {}
        settings = self.config.condition.decided
        trained = self.text_encoder
        settings |= {"encoder": trained.key if trained else self._named(settings["encoder"])}
        recipe = {"recipe": RECIPE, "images": self.images.key, **settings}
        made = self.store("text", recipe, self.config.cache.shards)
        cached = settings["encoder"] != WORDS and (self.config.condition.model_extra or {})["cache"]
        return made if cached else None, {"text": made.key}

    @property
    def text_bytes(self) -> int:
        """Bytes of the store of captions' states: float16, of every caption, as far as is known, and the empty one."""
        settings, captions = self.config.condition.decided, self._survey[2] if self.counted else self.count or 0
        return (captions + 1) * settings["tokens"] * settings["width"] * 2

    def _detector(self, name: str, spec: DetectorSpec) -> Detector:
        part = self.part("detector", name, spec.trained.model_dump()) if spec.trained else None
        kind, weights = (spec.pretrained.name, spec.pretrained.weights) if spec.pretrained else ("cnn", None)
        public = [kind, weights and self._named(weights)]
        key = fingerprint({"recipe": RECIPE, "detector": part.key if part else public})
        of, source = self.images.folder.rsplit("/", 1)[1], self.images.key
        if spec.split != "train":
            of, source = f"{of}-{spec.split}", f"{source} {spec.split}"
        if spec.reference is not None:
            source = self.identities[spec.reference]
            of = f"reference-{source[:12]}"
        reference = self.features(of, source, kind, key, shards=1)
        floor = f"{self.root}/scores/floor-{fingerprint([reference.key, 'halves'])}.json"
        return Detector(
            name, kind, weights, key, part, reference, spec.reference, floor, self._reconstructed(reference)
        )

    def _reconstructed(self, reference: Artefact) -> str | None:
        """The file about decoded latents. Without runs, as of checkpoints from elsewhere alone, nothing is encoded."""
        if not self.config.runs:
            return None
        recipe = {
            "recipe": RECIPE,
            "latents": self.latents.key,
            "decoder": self.decoder_key,
            "reference": reference.key,
        }
        if more := self.shown_classes[SHOWN_CLASSES:]:
            recipe["classes"] = more
        return f"{self.root}/scores/reconstructed-{fingerprint(recipe)}.json"

    @property
    def shown_classes(self) -> list[int]:
        """The classes that grids of samples show: the first ones, and those that samples are chosen to be of."""
        first = range(min(SHOWN_CLASSES, self.config.images.classes))
        chosen = {label for way in self.config.sampling.values() for label in way.chosen}
        return [*first, *sorted(chosen - {*first})]

    def teacher_key(self, name: str) -> str:
        """What identifies a teacher in a recipe: a trained one's key, or the pretrained one's name and weights file;
        and the filter of its images, if it has one."""
        key, seen = self._network_key(name), self.config.teachers[name].filter
        return key if seen is None else f"{key} with low_pass {seen.low_pass}"

    def _network_key(self, name: str) -> str:
        part, spec = self.teachers[name], self.config.teachers[name].pretrained
        if part:
            return part.key
        assert spec
        return spec.name if spec.weights is None else f"{spec.name} from {self._named(spec.weights)}"

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

    @property
    def notes(self) -> list[str]:
        """Which files from outside are gone or are not what they were."""
        changed = (
            "was changed since results were first made with it. New results get new names; existing ones keep "
            "theirs, and continue if the former content is put back"
        )
        others = [f"{weights}: {changed}" for weights, name in self._names.items() if name != weights]
        return self.outside.notes + others

    @property
    def image_count(self) -> int:
        """Number of images in the store or, before it exists, in its source, counted as the first job will do it.

        Raises:
            ValueError: the source is missing, has no images, fewer than are held out, or other classes.
        """
        return self._survey[0]

    @functools.cached_property
    def counted(self) -> bool:
        """Whether there is a store, or a source that can be used."""
        try:
            return bool(self._survey)
        except ValueError:
            return False

    @property
    def count(self) -> int | None:
        """`image_count` or, before there is a source, what `images.expected` makes it; None without that."""
        spec = self.config.images
        expected = spec.expected and spec.holdout + (spec.subset or spec.expected - spec.holdout)
        return self.image_count if self.counted else expected

    @property
    def unused(self) -> list[dict[str, Any]]:
        """What lies among the images and is not used, as `haste.files.walk.grouped`; raises as `image_count`."""
        return self._survey[1]

    @functools.cached_property
    def _survey(self) -> tuple[int, list[dict[str, Any]], int]:
        if Path(self.images.manifest).exists():
            made = artefact.read_json(self.images.manifest, "store")
            return made["count"], made.get("unused", []), made.get("captions", {}).get("count", 0)
        spec, found = self.config.images, self._listing
        trained_on = len(found.files) - listing.checked_holdout(
            self.where, spec.holdout, len(found.files), found.held_out
        )
        count = spec.holdout + listing.checked_subset(spec.subset, trained_on)
        if found.classes is not None:
            listing.check_classes(self.where, found.classes, spec.classes)
        if spec.on_bad_image == "fail":
            listing.check_captioned(self.where, found)
        each = found.said_of_each if spec.captioned else 0
        return count, walk.grouped(found.unused), round(each * count)

    @functools.cached_property  # a large folder takes minutes to walk
    def _listing(self) -> Listing:
        spec = self.config.images
        try:
            found = listing.survey(spec.source, spec.path, spec.classes, spec.labels, spec.captions)
        except ValueError as error:
            if spec.path is None or _is_there(spec.path):
                raise
            raise MissingError(f"{self._section}.path: {error}. Put the images there, or correct the path") from error
        if spec.expected not in (None, len(found.files)):
            raise ValueError(
                f"{self._section}.expected: {spec.expected:,} pictures, but {self.where} has {len(found.files):,}. "
                "Complete them, or correct the number"
            )
        return found

    @property
    def stored_as(self) -> list[str]:
        """The ways in which the shards of the finished image store hold their pixels; none if it is not finished."""
        shards = self._read("shards", self.images) or []
        return sorted({shard.get("coded", {}).get("image", "raw") for shard in shards})

    @property
    def class_names(self) -> list[str] | None:
        """The images' classes in order; None if only files that are not read yet name them. Raises as `image_count`."""
        if Path(self.images.manifest).exists():
            return artefact.read_json(self.images.manifest, "store")["classes"]
        return self._listing.classes

    @property
    def where(self) -> str:
        """The images' source, as messages name it."""
        return self.config.images.path or self.config.images.source

    @functools.cached_property
    def held(self) -> Pictures:
        """What the source holds now; raises as `image_count`."""
        return listing.held(self._listing)

    def check_source(self) -> None:
        """Refuse images that are still to be made from a source that is gone, or has changed since the first were.

        Raises:
            ValueError: says what was added, removed and changed; or as `image_count`.
        """
        if self.source is None or Path(self.images.manifest).exists():
            return
        if self.source.read() or not _is_there(self.where):
            self.source.check(self.where, self.held)

    def record_source(self, identity: str, decoder: str) -> None:
        """Record what a finished image store of this identity was made from, or compare it with the record.

        Raises:
            ValueError: the store was made before, and its pixels were others.
        """
        if self.source is None:
            return
        if self.source.read() is None:
            if (before := self._read("images", self.latents)) not in (None, identity):  # older than such records
                raise ValueError(
                    f"{self.where}: the images are {identity[:12]}, but {self.latents.folder} was made from "
                    f"{str(before)[:12]}. Put back what was there, or run `haste images --update`, which makes them "
                    "under a new name"
                )
            self.source.use(self.where, self.held)
        self.source.check_store(identity, decoder)

    def update_source(self) -> str:
        """Take up what the source, which is one of files, holds now, and say what that means. Existing stores keep
        their names. Raises as `image_count`."""
        assert self.source
        changes, record = self.source_changes, self.source.read()
        finished = "store" in record["contents"][record["current"]] if record else self._made_before is not None
        anew = finished and not Path(self.images.manifest).exists()  # its pixels may be others, and nobody can tell
        if not changes and not anew:
            return f"{self.where}: nothing has changed since images were made from it, {len(self.held):,} pictures"
        self.source.use(self.where, self.held, before=self._made_before, anew=not changes)
        what = changes.removesuffix(UNUSED) or f"{self.where}: the images are made again"
        return (
            f"{what}; used from now on. Images and all that is made from them have new names, in every configuration "
            "with these images; existing results keep theirs. The next run of the workflow makes them"
        )

    @functools.cached_property
    def source_changes(self) -> str:
        """How the source differs from what the images were made from, in a sentence; "" if not, or if it is gone."""
        if self.source is None or not _is_there(self.where):
            return ""
        try:
            if self.source.read():
                return self.source.changes(self.where, self.held)
            before, now = self._made_before, len(self._listing.files)
        except ValueError as refusal:
            return f"{refusal}; existing images were made from what was there before"
        if before in (None, now):
            return ""
        return f"{self.where}: {now:,} pictures, and {before:,} when the images were made{UNUSED}"

    @property
    def _made_before(self) -> int | None:
        """How many pictures a store was made from, if one was made and nothing was recorded."""
        if self.source and self.source.read():
            return None
        skipped = self._read("skipped", self.images) or []
        count = self._read("count", self.images) or self._read("count", self.latents)
        return None if count is None else count + len(skipped)

    def _read(self, entry: str, store: Artefact) -> Any:
        """An entry of a store's manifest; None without it."""
        return artefact.read_json(store.manifest, "store").get(entry) if Path(store.manifest).exists() else None


def _is_there(where: str) -> bool:
    place = Path(where)
    return any(place.parent.glob(place.name)) if "*" in place.name else place.exists()
