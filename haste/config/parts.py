"""The sections on images and networks: autoencoder, teachers, detectors, and the models that are trained. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from haste import extensions
from haste.align.terms import kind_of
from haste.config.keys import (
    LABEL,
    LATER,
    Float,
    Place,
    Positive,
    Rate,
    Seed,
    Strict,
    completed,
    decides,
    nearest,
    number,
)
from haste.networks.registry import INCEPTIONS


def _whole(value: Any) -> Any:
    # 2.0e12 is more readable than thirteen digits, and still a whole number.
    found = number(value)
    return int(found) if isinstance(found, float) and found.is_integer() else value


def _off(value: Any) -> Any:
    # YAML 1.1 reads `off` as false; users mean the word.
    return "off" if value is False else value


def _exactly_one(part: Any) -> Any:
    given = [name for name in ("trained", "pretrained") if getattr(part, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of trained and pretrained, found {' and '.join(given) or 'neither'}")
    return part


class Images(Strict):
    """Where the images come from and how they are prepared."""

    source: Literal["digits", "moved-digits", "folder", "archive", "parquet", "coco"] = "folder"
    path: Place | None = None
    labels: Annotated[Place | None, LATER] = None
    captions: Annotated[Place | None, LATER] = None
    reader: Annotated[Literal["upright", "adm"], LATER] = "upright"
    crop: Annotated[Literal["adm", "centre-lanczos"], LATER] = "adm"
    subset: Annotated[Positive | None, LATER] = None
    expected: Annotated[Positive | None, LABEL] = None
    resolution: Positive
    holdout: Annotated[int, Field(ge=0)]  # the networks that are trained here are evaluated on these images
    classes: Annotated[int, Field(ge=0)]
    on_bad_image: Literal["fail", "skip"] = "fail"
    shards: Positive = 1
    stored_as: Annotated[Literal["raw", "webp"], LABEL] = "raw"

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        """The crop that numbers on MS-COCO are published for."""
        coco = isinstance(given, dict) and given.get("source") == "coco"
        return {"crop": "centre-lanczos", **given} if coco else given

    @model_validator(mode="after")
    def _has_path(self) -> Images:
        made = self.source in ("digits", "moved-digits")
        if made != (self.path is None):
            raise ValueError("sources 'folder', 'archive', 'parquet' and 'coco' need a path, and only they take one")
        plain = {"labels": None, "on_bad_image": "fail", "crop": "adm", "reader": "upright"}
        if made and (given := [key for key, value in plain.items() if getattr(self, key) != value]):
            key = "on_bad_image skip" if given[0] == "on_bad_image" else given[0]
            raise ValueError(f"{key} is for sources 'folder', 'archive' and 'parquet', found {self.source!r}")
        if self.source == "coco" and (self.classes or self.labels):
            raise ValueError("source 'coco' has captions and no labels, expected classes 0")
        if self.captions and self.source not in ("folder", "archive"):
            raise ValueError(f"captions are for sources 'folder' and 'archive', found {self.source!r}")
        return self

    @property
    def captioned(self) -> bool:
        """Whether images have captions."""
        return self.captions is not None or self.source in ("coco", "moved-digits")


class TrainedAutoencoder(Strict):
    """A small AutoencoderKL that the pipeline trains on the images themselves."""

    steps: Positive
    batch: Positive = 64
    lr: Rate = 2e-3
    width: Annotated[Positive, Field(multiple_of=8)] = 32  # groups of its normalisation
    channels: Positive = 4
    factor: Literal[1, 2, 4, 8] = 2
    kl_weight: Annotated[Float, Field(ge=0)] = 1e-4
    seed: Seed = 0


class PretrainedAutoencoder(Strict):
    """A diffusers AutoencoderKL: a hub id or a folder."""

    encode: Place
    decode: Place | None = None
    channels: Positive = 4
    factor: Positive = 8


class Autoencoder(Strict):
    """Either `trained` here or `pretrained`."""

    trained: TrainedAutoencoder | None = None
    pretrained: PretrainedAutoencoder | None = None
    dtype: Literal["float16", "float32"] = "float16"
    shards: Positive = 1

    @model_validator(mode="after")
    def _one(self) -> Autoencoder:
        return _exactly_one(self)

    @property
    def _chosen(self) -> Any:
        return self.trained or self.pretrained

    @property
    def channels(self) -> int:
        """Latent channels C; the store holds mean and std, 2 C."""
        return self._chosen.channels

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return self._chosen.factor


class TrainedTeacher(Strict):
    """A small timm VisionTransformer that the pipeline trains to classify the images."""

    steps: Positive
    batch: Positive = 128
    lr: Rate = 1e-3
    depth: Positive = 6
    width: Positive = 64
    heads: Positive = 4
    patch: Positive = 4
    seed: Seed = 0

    @model_validator(mode="after")
    def _divides(self) -> TrainedTeacher:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class PretrainedTeacher(Strict):
    """A frozen vision encoder by its name in `TEACHERS` or in timm, and its weights file, if given."""

    name: Place
    weights: Place | None = None


class Filter(Strict):
    """What a teacher's images pass before they enter it; `low_pass` is a share of the Nyquist frequency."""

    low_pass: Annotated[Float, Field(gt=0, le=1)]


class Teacher(Strict):
    """Either `trained` here or `pretrained`; a filter of its images; which targets are cached on disk, and their
    number of components."""

    trained: TrainedTeacher | None = None
    pretrained: PretrainedTeacher | None = None
    filter: Filter | None = None
    cache: Annotated[Literal["off", "features", "features+attention"], BeforeValidator(_off)] = "off"
    pca: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if self.pca is not None and self.cache == "off":
            raise ValueError(f"pca {self.pca} is of cached features, and cache is 'off'; expected 'features'")
        return _exactly_one(self)

    def caches(self, term: str) -> bool:
        """Whether the targets of an alignment term are cached on disk."""
        return kind_of(term) in self.cache.split("+")


class Cache(Strict):
    """How the targets of cached teachers are stored on disk."""

    max_bytes: Annotated[int, Field(ge=1), BeforeValidator(_whole)] = 200_000_000_000
    shards: Positive = 1


class TrainedDetector(Strict):
    """A small convolutional classifier that the pipeline trains; the scores compare its features."""

    steps: Positive
    batch: Positive = 128
    lr: Rate = 1e-3
    width: Annotated[Positive, Field(multiple_of=4)] = 32  # groups of its normalisation
    seed: Seed = 0


class PretrainedDetector(Strict):
    """A public network by its name in `DETECTORS`, and its weights file, if given."""

    name: str
    weights: Place | None = None


class Detector(Strict):
    """A network whose features the scores compare: either `trained` here or `pretrained`."""

    trained: TrainedDetector | None = None
    pretrained: PretrainedDetector | None = None
    reference: Place | None = None
    split: Annotated[Literal["train", "held_out"], LATER] = "train"

    @model_validator(mode="after")
    def _one(self) -> Detector:
        if self.reference is not None and (self.pretrained is None or self.pretrained.name not in INCEPTIONS):
            raise ValueError(
                "reference: such files hold statistics of inception or pytorch-fid, which this detector is not"
            )
        if self.reference is not None and self.split != "train":
            raise ValueError("split: is of the images, but reference is a file; expected one of the two")
        return _exactly_one(self)


class TrainedText(Strict):
    """A small transformer that the pipeline trains to tell which caption belongs to which picture."""

    steps: Positive
    batch: Annotated[int, Field(ge=2)] = 128  # of one picture there is nothing to tell
    lr: Rate = 1e-3
    depth: Positive = 2
    heads: Positive = 4
    patch: Positive = 4
    vocabulary: Annotated[int, Field(ge=258)] = 1024  # all bytes and two marks
    seed: Seed = 0


class TextEncoder(Strict):
    """A text encoder that is trained here; a pretrained one is only named."""

    trained: TrainedText


# A text encoder by its name, or what trains one, by the words that pydantic puts into the path of a fault within it.
ENCODER_TAGS = ("<named>", "<trained>")
Encoder = Annotated[
    Annotated[Place, Tag("<named>")] | Annotated[TextEncoder, Tag("<trained>")],
    Discriminator(lambda value: "<trained>" if isinstance(value, dict | TextEncoder) else "<named>"),
]


# Architectures of the denoising network: name -> import path of its class, which is imported on request.
DENOISERS = {"sit": "haste.models.sit:SiT", "dit": "haste.models.dit:DiT", "mmdit": "haste.models.mmdit:MMDiT"}
# What is known of those without torch, where a class says it.
KNOWN = {"mmdit": "haste.config.joint:Joint"}
# Those whose size is a `Model`, with the process of each: known without an import.
TRANSFORMERS = {"sit": "interpolant", "dit": "ddpm"}
# Training objectives, likewise.
PROCESSES = {"interpolant": "haste.diffusion.interpolant:Interpolant", "ddpm": "haste.diffusion.ddpm:DDPM"}
# Conditions, the network's inputs besides x and t, likewise.
CONDITIONS = {"labels": "haste.data.condition:Labels", "captions": "haste.data.captions:Captions"}


def _class_named(group: str, name: str, own: Mapping[str, str], expected: str, *taken: str) -> Any:
    """A class with Settings, from this package or another.

    Args:
        group: of `haste.extensions`.
        name: the requested name.
        own: name -> import path, in this package.
        expected: the required base class.
        taken: keys that no Settings may have.

    Raises:
        ValueError: the name is undefined; or the class cannot be imported, has no settings, or has some that are taken.
    """
    if name in own:
        return extensions.at(own[name])
    added = extensions.names(group)
    if name not in added:
        raise ValueError(f"nothing is called {name!r}{nearest(name, {*own, *added})}")
    found = extensions.one(group, name, own)
    if not isinstance(found, type) or not isinstance(getattr(found, "Settings", None), type):
        raise ValueError(f"{name} is {found!r}, expected a {expected} with Settings")
    if clash := sorted({*taken} & set(found.Settings.model_fields)):  # type: ignore[attr-defined]
        raise ValueError(f"{name}: its Settings have {', '.join(clash)}, which stands for something else")
    return found


def architecture_named(name: str) -> Any:
    """The class of an architecture, a `haste.models.denoiser.Denoiser`. Raises ValueError as `_class_named`."""
    taken = ("architecture", "input_size", "channels")
    return _class_named("models", name, DENOISERS, "haste.models.denoiser.Denoiser", *taken)


def known_of(name: str) -> Any:
    """What is known of an architecture without building it, for plans: its class, or that part of it that needs no
    torch. Raises ValueError as `_class_named`."""
    return extensions.at(KNOWN[name]) if name in KNOWN else architecture_named(name)


def process_named(name: str) -> Any:
    """The class of a `haste.diffusion.process.Process`. Raises ValueError as `_class_named`."""
    return _class_named("processes", name, PROCESSES, "haste.diffusion.process.Process", "name")


def condition_named(name: str) -> Any:
    """The class of a `haste.data.condition.Condition`. Raises ValueError as `_class_named`."""
    return _class_named("conditions", name, CONDITIONS, "haste.data.condition.Condition", "name", "classes")


class _Named(BaseModel):
    """A name together with its own keys; without keys, the name alone is accepted."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @classmethod
    def _schema(cls, name: str) -> type[BaseModel]:
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the keys, and write out omitted ones with their defaults."""
        given = {"name": given} if isinstance(given, str) else given
        if not isinstance(given, dict) or not isinstance(name := given.get("name"), str):
            return given
        rest = {key: value for key, value in given.items() if key != "name"}
        return {"name": name, **completed(cls._schema(name), rest)}

    @property
    def decided(self) -> dict[str, Any]:
        """Its entries in a recipe."""
        return {"name": self.name, **decides(self._schema(self.name), dict(self.model_extra or {}))}


class Process(_Named):
    """A training objective other than the interpolant."""

    @classmethod
    def _schema(cls, name: str) -> type[BaseModel]:
        if name == "interpolant":
            raise ValueError("the keys of interpolant are training.path and training.timesteps, expected no process")
        return Strict if name == "ddpm" else process_named(name).Settings  # avoids importing torch


class Condition(_Named):
    """The condition of samples."""

    @classmethod
    def _schema(cls, name: str) -> type[BaseModel]:
        return Strict if name == "labels" else condition_named(name).Settings  # avoids importing numpy

    @property
    def entry(self) -> dict[str, Any]:
        """Its entries in a recipe: none for labels, since a recipe has the number of classes."""
        return {} if self.name == "labels" else {"condition": self.decided}

    @property
    def encoder(self) -> str | TextEncoder | None:
        """The text encoder: a folder, a hub id or `words`, or what trains one here; None where there is none."""
        given = (self.model_extra or {}).get("encoder") if self.name == "captions" else None
        return TextEncoder(**given) if isinstance(given, dict) else given

    @property
    def trained(self) -> TrainedText | None:
        """What trains the text encoder here; None for another one."""
        return self.encoder.trained if isinstance(self.encoder, TextEncoder) else None

    @property
    def stored(self) -> dict[str, Any]:
        """Its entries in the recipe of latents: none where only labels are kept beside them."""
        return {} if self.name == "captions" else self.entry


# Measures of a state: name -> import path of the class, which is imported on request.
EVALUATION = "evaluation"  # the split of the images that only measures see
MEASURES = {
    "gradient-cosine": "haste.measure.gradient_cosine:GradientCosine",
    "cknna": "haste.measure.cknna:CKNNA",
    "probe": "haste.measure.probe:Probe",
    "denoising": "haste.measure.denoising:Denoising",
    "pca": "haste.measure.pca:PCA",
    "attention-maps": "haste.measure.attention_maps:AttentionMaps",
    "progress": "haste.measure.progress:Progress",
    "cost": "haste.measure.cost:Cost",
}


def measure_named(name: str) -> Any:
    """The class of a measure, a `haste.measure.measure.Measure`, from this package or another.

    Raises:
        ValueError: the name is undefined; or the class cannot be imported, or is not a measure.
    """
    if name in MEASURES:
        return extensions.at(MEASURES[name])
    added = extensions.names("measures")
    if name not in added:
        raise ValueError(f"nothing is called {name!r}{nearest(name, {*MEASURES, *added})}")
    found = extensions.one("measures", name, MEASURES)
    if not isinstance(found, type) or not issubclass(found, Strict) or not hasattr(found, "run"):
        raise ValueError(f"{name} is {found!r}, expected a class derived from haste.measure.measure.Measure")
    return found


class Model(Strict):
    """The size of a SiT or a DiT."""

    architecture: Literal["sit", "dit"] = "sit"
    depth: Positive
    width: Positive
    heads: Positive
    patch_size: Positive
    mlp_ratio: Rate = 4.0

    @model_validator(mode="after")
    def _divides(self) -> Model:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4, which the position embedding needs")
        return self

    @model_serializer(mode="wrap")
    def _without_the_default(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A SiT's architecture is written nowhere: its names are older than the key."""
        return {key: value for key, value in whole(self).items() if (key, value) != ("architecture", "sit")}

    @property
    def decided(self) -> dict[str, Any]:
        """Its entries in a recipe."""
        return self.model_dump()

    @property
    def settings(self) -> dict[str, Any]:
        """Its constructor arguments, besides those from the latents and the condition."""
        return self.model_dump(exclude={"architecture"})


class OtherModel(BaseModel):
    """A network other than SiT and DiT; its keys are those of its architecture's `Settings`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    architecture: str

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the keys, and write out omitted ones with their defaults."""
        schema = known_of(given["architecture"]).Settings
        rest = {name: value for name, value in given.items() if name != "architecture"}
        return {"architecture": given["architecture"], **completed(schema, rest)}

    @property
    def settings(self) -> dict[str, Any]:
        """Its constructor arguments, besides those from the latents and the condition."""
        return dict(self.model_extra or {})

    @property
    def decided(self) -> dict[str, Any]:
        """Its entries in a recipe."""
        schema = known_of(self.architecture).Settings
        return {"architecture": self.architecture, **decides(schema, self.settings)}


def model_of(given: Any) -> Model | OtherModel:
    """An entry of `models`: a SiT, unless it names another architecture."""
    if isinstance(given, Model | OtherModel):
        return given
    name = given.get("architecture", "sit") if isinstance(given, dict) else "sit"
    if isinstance(name, str) and name not in TRANSFORMERS:
        return OtherModel.model_validate(given)
    return Model.model_validate(given)
