"""The one schema of a configuration, and what the field calls its models and teachers. No torch.

A configuration is a mapping (YAML or JSON). `resolve` checks it whole before anything runs: an unknown key, a layer
that a model does not have, or a name that nothing defines is a `ValueError` that says where, what was found and what
was expected. `config/README.md` explains every key.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    SerializeAsAny,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from haste import extensions
from haste.align import triggers
from haste.align.schedule import SHAPES
from haste.network import Facts, Tap, blocks, sit_facts, sit_taps
from haste.public import DETECTORS, TEACHERS


class Strict(BaseModel):
    """A part of the configuration: unknown keys, wrong types, infinity and NaN are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as text; users mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _whole(value: Any) -> Any:
    # 2.0e12 reads better than thirteen digits, and is a whole number all the same.
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


def _off(value: Any) -> Any:
    # YAML 1.1 reads `off` as false; users mean the word.
    return "off" if value is False else value


Float = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what every generator takes, and a 64-bit integer holds


def _or_added(group: str) -> WrapValidator:
    """Takes, beside the names of the schema, those that other packages add to a group of `haste.extensions`."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, str) and value in extensions.names(group) else handler(value)

    return WrapValidator(check)


class _Mark:
    """Says of a key how it enters a recipe; see `decides`."""


LATER = _Mark()  # younger than results that people have: at its default it stays out, and their names stay
LABEL = _Mark()  # decides nothing by itself


def decides(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section enters a recipe, by the marks of its keys.

    Args:
        kind: the section's schema.
        values: the section as plain data; keys that the schema does not know are kept.
    """
    kept = dict(values)
    for name, field in kind.model_fields.items():
        default = field.default.model_dump() if isinstance(field.default, Strict) else field.default
        if name in kept and (LABEL in field.metadata or (LATER in field.metadata and kept[name] == default)):
            del kept[name]
    return kept


class Images(Strict):
    """Where the images come from and how they are prepared."""

    source: Literal["digits", "folder", "archive"] = "folder"
    path: str | None = None
    resolution: Positive
    holdout: Annotated[int, Field(ge=0)]  # the networks that are trained here are judged on these images
    classes: Annotated[int, Field(ge=0)]
    on_bad_image: Literal["fail", "skip"] = "fail"
    shards: Positive = 1

    @model_validator(mode="after")
    def _has_path(self) -> Images:
        if (self.source == "digits") != (self.path is None):
            raise ValueError("sources 'folder' and 'archive' need a path, and only they take one")
        if self.source == "digits" and self.on_bad_image == "skip":
            raise ValueError("on_bad_image skip is for sources 'folder' and 'archive', found 'digits'")
        return self


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

    encode: str
    decode: str | None = None
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
        return _exactly_one(self, "trained", "pretrained")

    @property
    def channels(self) -> int:
        """Latent channels C; the store holds mean and std, 2 C."""
        return _chosen(self).channels

    @property
    def factor(self) -> int:
        """Pixels a latent cell spans, along each side."""
        return _chosen(self).factor


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
    """A frozen vision encoder by its name in `TEACHERS` or in timm, and its weights if they lie on disk."""

    name: str
    weights: str | None = None


class Teacher(Strict):
    """Either `trained` here or `pretrained`; what of its targets is kept on disk, and how many components of them."""

    trained: TrainedTeacher | None = None
    pretrained: PretrainedTeacher | None = None
    cache: Annotated[Literal["off", "features", "features+attention"], BeforeValidator(_off)] = "off"
    pca: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Teacher:
        if self.pca is not None and self.cache == "off":
            raise ValueError(f"pca {self.pca} is of cached features, and cache is 'off'; expected 'features'")
        return _exactly_one(self, "trained", "pretrained")

    def caches(self, kind: str) -> bool:
        """Whether the targets of a kind of alignment loss, `features` or `attention`, are kept on disk."""
        return kind in self.cache.split("+")


class Cache(Strict):
    """How the targets of cached teachers are kept on disk."""

    max_bytes: Annotated[int, Field(ge=1), BeforeValidator(_whole)] = 200_000_000_000
    shards: Positive = 1


class TrainedDetector(Strict):
    """A small convolutional classifier that the pipeline trains; its features judge the samples."""

    steps: Positive
    batch: Positive = 128
    lr: Rate = 1e-3
    width: Annotated[Positive, Field(multiple_of=4)] = 32  # groups of its normalisation
    seed: Seed = 0


class PretrainedDetector(Strict):
    """A public network by its name in `DETECTORS`, and its weights if they lie on disk."""

    name: str
    weights: str | None = None


class Detector(Strict):
    """A network whose features the scores compare: either `trained` here or `pretrained`."""

    trained: TrainedDetector | None = None
    pretrained: PretrainedDetector | None = None
    reference: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Detector:
        if self.reference is not None and (self.pretrained is None or self.pretrained.name != "inception"):
            raise ValueError("reference: such files hold statistics of inception, which this detector is not")
        return _exactly_one(self, "trained", "pretrained")


# Architectures of the denoising network: name -> where its class is, which is imported where it is asked for.
DENOISERS = {"sit": "haste.models.sit:SiT"}


def architecture_named(name: str) -> Any:
    """The class of an architecture, a `haste.models.Denoiser`: one of ours, or of another package.

    Raises:
        ValueError: nothing is called so; or what is cannot be imported, or has no settings.
    """
    if name in DENOISERS:
        return extensions.at(DENOISERS[name])
    added = extensions.names("models")
    if name not in added:
        raise ValueError(f"nothing is called {name!r}{_nearest(name, {*DENOISERS, *added})}")
    found = extensions.one("models", name, DENOISERS)
    if not isinstance(found, type) or not isinstance(getattr(found, "Settings", None), type):
        raise ValueError(f"{name} is {found!r}, expected a haste.models.Denoiser with Settings")
    if clash := sorted({"architecture", "input_size", "channels"} & set(found.Settings.model_fields)):  # type: ignore[attr-defined]
        raise ValueError(f"{name}: its Settings have {', '.join(clash)}, which stands for something else")
    return found


class Model(Strict):
    """The size of a SiT."""

    architecture: Annotated[Literal["sit"], Field(exclude=True)] = "sit"
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

    @property
    def decided(self) -> dict[str, Any]:
        """What of it enters a recipe."""
        return self.model_dump()

    @property
    def settings(self) -> dict[str, Any]:
        """What its class is made with, beside what the latents and labels say."""
        return self.model_dump()


class OtherModel(BaseModel):
    """A network that is no SiT: its keys, and what they may be, are those of its architecture's `Settings`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    architecture: str

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the keys, and write out those that are left to their defaults."""
        schema = architecture_named(given["architecture"]).Settings
        rest = {name: value for name, value in given.items() if name != "architecture"}
        if unknown := [name for name in rest if name not in schema.model_fields]:
            raise ValueError(f"unknown key {unknown[0]!r}{_nearest(unknown[0], schema.model_fields)}")
        return {"architecture": given["architecture"], **schema.model_validate(rest).model_dump(mode="json")}

    @property
    def settings(self) -> dict[str, Any]:
        """What its class is made with, beside what the latents and labels say."""
        return dict(self.model_extra or {})

    @property
    def decided(self) -> dict[str, Any]:
        """What of it enters a recipe."""
        schema = architecture_named(self.architecture).Settings
        return {"architecture": self.architecture, **decides(schema, self.settings)}


def _model(given: Any) -> Model | OtherModel:
    if isinstance(given, Model | OtherModel):
        return given
    name = given.get("architecture", "sit") if isinstance(given, dict) else "sit"
    if name != "sit" and isinstance(name, str):
        return OtherModel.model_validate(given)
    return Model.model_validate(given)


class FeatureTerm(Strict):
    """REPA: hidden tokens after block `depth` (counted from 1) follow the teacher's last patch tokens."""

    teacher: str
    depth: Positive | None = None
    weight: Rate = 0.5
    similarity: Literal["cosine", "nt-xent"] = "cosine"
    temperature: Annotated[Rate | None, LATER] = None
    negatives: Annotated[Literal["image", "batch"] | None, LATER] = None
    negative_count: Annotated[Positive | None, LATER] = None
    hidden: Positive = 2048
    t_min: Annotated[Share, LATER] = 0.0
    warmup: Annotated[int, Field(ge=0), LATER] = 0

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Fill in what NT-Xent needs."""
        if not isinstance(given, dict) or given.get("similarity") != "nt-xent":
            return given
        full = {"temperature": 0.1, "negatives": "image", **given}
        return {"negative_count": 1024, **full} if full["negatives"] == "batch" else full

    @model_validator(mode="after")
    def _belongs(self) -> FeatureTerm:
        contrast = {"temperature": self.temperature, "negatives": self.negatives}
        if self.similarity == "cosine" and (given := {k: v for k, v in contrast.items() if v is not None}):
            raise ValueError(f"similarity cosine takes no {' and no '.join(given)}, only nt-xent does; found {given}")
        if self.similarity == "nt-xent" and None in contrast.values():
            raise ValueError(f"similarity nt-xent needs a temperature and negatives, found {contrast}")
        if (self.negatives == "batch") != (self.negative_count is not None):
            raise ValueError(
                f"negative_count goes with negatives: batch and only with it, found {self.negative_count} "
                f"and negatives {self.negatives}"
            )
        return self


class AttentionTerm(Strict):
    """ATTA: attention maps of student layers follow those of teacher layers (both counted from 0), head by head."""

    teacher: str
    student_layers: list[Annotated[int, Field(ge=0)]] | None = None
    teacher_layers: list[Annotated[int, Field(ge=0)]] | None = None
    heads: Positive | None = None
    weight: Rate = 0.5
    t_min: Annotated[Share, LATER] = 0.0
    warmup: Annotated[int, Field(ge=0), LATER] = 0


class Alignment(Strict):
    """Which alignment terms a run adds to its denoising loss; neither is vanilla training."""

    features: FeatureTerm | None = None
    attention: AttentionTerm | None = None


TERMS: dict[str, type[Strict]] = {"features": FeatureTerm, "attention": AttentionTerm}


class Trigger(Strict):
    """Stops a term by what is seen while training. Beside these keys it has the parameters of its trigger."""

    model_config = ConfigDict(extra="allow")

    trigger: str
    after: Annotated[int, Field(ge=0)] = 0
    every: Positive = 1000

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the parameters, and write out those that are left to their defaults."""
        if not isinstance(given, dict) or not isinstance(given.get("trigger"), str):
            return given
        kind = triggers.named(given["trigger"])
        if clash := sorted({*cls.model_fields} & {*kind.model_fields}):
            raise ValueError(f"{given['trigger']}: its fields have {', '.join(clash)}, which stands for something else")
        own = {key: value for key, value in given.items() if key not in cls.model_fields}
        unknown = [key for key in own if key not in kind.model_fields]
        if both := [key for key in unknown if key in TERMS]:
            raise ValueError(
                f"found trigger beside {' and '.join(both)}, expected one trigger for all terms, or a stop for each"
            )
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0]!r}{_nearest(unknown[0], {*cls.model_fields, *kind.model_fields})}"
            )
        common = {key: value for key, value in given.items() if key not in own}
        return {**common, **triggers.made(given["trigger"], own).model_dump(mode="json")}

    @property
    def first(self) -> int:
        """The first step at which it can stop its term."""
        return triggers.first_reading(triggers.made(self.trigger, self.model_extra or {}), self.after, self.every)

    @property
    def decided(self) -> dict[str, Any]:
        """What of it enters a recipe."""
        return decides(triggers.named(self.trigger), decides(Trigger, self.model_dump()))


# What a stop can be, by the word that pydantic puts into the path of a fault within it.
_STOPS = {"<step>": int, "<trigger>": Trigger}
Stop = Annotated[
    Annotated[int, Field(ge=0), Tag("<step>")] | Annotated[Trigger, Tag("<trigger>")],
    Discriminator(lambda value: "<trigger>" if isinstance(value, dict | Trigger) else "<step>"),
]


class Stops(Strict):
    """When each term stops: at a step, by a trigger, or never (None). In a configuration one may stand for both."""

    features: Stop | None = None
    attention: Stop | None = None


class Ramps(Strict):
    """Steps before its stop over which the weight of each term falls to 0; None is at once."""

    features: Annotated[int, Field(ge=2)] | None = None
    attention: Annotated[int, Field(ge=2)] | None = None
    shape: Literal[*SHAPES] = "cosine"  # type: ignore[valid-type]


def _both(value: Any) -> Any:
    return {"features": value, "attention": value} if _for_both(value) else value


def _for_both(value: Any) -> bool:
    """Whether a `stop` or `ramp` is one number, or one trigger, for all terms."""
    return "trigger" in value if isinstance(value, dict) else not isinstance(value, Stops | Ramps)


def _distinct(names: list[Any]) -> list[Any]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{names} has {', '.join(map(repr, twice))} more than once, expected each once")
    return names


class Timesteps(Strict):
    """How training draws its times t."""

    distribution: Literal["uniform", "lognormal"] = "uniform"
    mu: Float = 0.0
    s: Rate = 1.0

    @model_validator(mode="after")
    def _belongs(self) -> Timesteps:
        if self.distribution == "uniform" and (self.mu, self.s) != (0.0, 1.0):
            raise ValueError(f"uniform takes no mu and s, only lognormal does; found mu {self.mu} and s {self.s}")
        return self


class Training(Strict):
    """What decides the result of training: every key here is part of a trajectory's name."""

    path: Literal["linear", "cosine"] = "linear"
    timesteps: Annotated[Timesteps, LATER] = Timesteps()
    batch: Positive = 256
    lr: Rate = 1e-4
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Rate = 1e-8
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    clip: Rate | None = 1.0
    ema: Annotated[Float, Field(ge=0, lt=1)] = 0.9999
    class_dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.1
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    nonfinite: Literal["stop", "skip"] = "stop"


class Runtime(Strict):
    """How the work is done. Nothing here is part of a name, because nothing here decides a result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Positive = 1
    accumulate: Positive = 1
    compile: bool = False
    checkpoint_blocks: bool = False
    threads: Positive = 1
    save_every: Positive = 1000
    keep_every: Positive | None = None
    log_every: Positive = 100
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    sample_shards: Positive = 1
    sample_batch: Positive = 256


# What the papers' tables are sampled with (REPA; HASTE). Keys beside `preset` win.
PRESETS: dict[str, dict[str, Any]] = {
    "sde-250": {"sampler": "euler-maruyama", "steps": 250},
    "ode-50": {"sampler": "euler", "steps": 50},
    "heun-125": {"sampler": "heun", "steps": 125},
}
# dopri5 as SiT runs it.
_TOLERANCES = {"rtol": 1e-3, "atol": 1e-6}


class Sampling(Strict):
    """One way to draw samples from a state."""

    preset: Annotated[Literal["sde-250", "ode-50", "heun-125"] | None, LABEL] = None
    sampler: Annotated[Literal["euler", "heun", "euler-maruyama", "dopri5"], _or_added("samplers")] = "euler-maruyama"
    steps: Positive | None = 250
    rtol: Annotated[Rate | None, LATER] = None
    atol: Annotated[Rate | None, LATER] = None
    guidance: Annotated[Float, Field(ge=0)] = 1.0
    interval: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.0, 1.0]
    guided_channels: Annotated[Literal["all", 3], LATER] = "all"
    count: Annotated[int, Field(ge=4)] = 50_000  # precision and recall look at 3 neighbours of each
    labels: Literal["random", "balanced"] = "random"
    pixels: Literal["truncate", "round"] = "truncate"
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Lay the preset under the keys; dopri5 has tolerances in the place of steps."""
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        known = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        adaptive = {"steps": None, **_TOLERANCES} if given.get("sampler") == "dopri5" else {}
        return {**known, **adaptive, **given}

    @model_validator(mode="after")
    def _ordered(self) -> Sampling:
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"guidance interval {self.interval} is empty: low is above high")
        return self

    @model_validator(mode="after")
    def _enough_steps(self) -> Sampling:
        if self.sampler == "euler-maruyama" and self.steps is not None and self.steps < 2:
            raise ValueError(f"steps {self.steps} is too few for euler-maruyama, expected at least 2")
        return self

    @model_validator(mode="after")
    def _steps_or_tolerances(self) -> Sampling:
        tolerances = {"rtol": self.rtol, "atol": self.atol}
        if self.sampler == "dopri5" and (self.steps is not None or None in tolerances.values()):
            raise ValueError(
                f"dopri5 chooses its own steps within rtol and atol, found steps {self.steps} and {tolerances}"
            )
        if self.sampler != "dopri5" and (self.steps is None or any(tolerances.values())):
            raise ValueError(f"{self.sampler} needs steps and takes no tolerances, found {self.steps} and {tolerances}")
        return self


class Run(Strict):
    """A row of the table: which model, which alignment, when to stop it, how to sample."""

    model: str
    alignment: str = "vanilla"
    stop: Annotated[Stops, BeforeValidator(_both)] = Stops()
    ramp: Annotated[Ramps, BeforeValidator(_both)] = Ramps()
    seed: Seed = 0
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] | None = None
    milestones: Annotated[list[Positive], Field(min_length=1)]
    sampling: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    training: dict[str, Any] = {}
    warm_start: str | None = None

    @model_validator(mode="after")
    def _one_seed_or_several(self) -> Run:
        if self.seeds is not None and self.seed != self.seeds[0]:
            raise ValueError(f"found seed {self.seed} and seeds {self.seeds}, expected one of the two keys")
        return self

    @property
    def all_seeds(self) -> list[int]:
        """The seeds that the row is trained with, each a trajectory of its own."""
        return self.seeds or [self.seed]

    @model_validator(mode="after")
    def _increasing(self) -> Run:
        if any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones {self.milestones} are out of order: write them in increasing order")
        return self


class Evaluate(Strict):
    """A row without training: a checkpoint that was trained elsewhere, and how to sample it."""

    checkpoint: str
    model: str
    sampling: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    step: Annotated[int, Field(ge=0)]
    path: Literal["linear", "cosine"] = "linear"
    weights: Literal["ema", "model"] = "ema"
    layout: Literal["ours", "REPA", "SiT"] | None = None
    method: str = "elsewhere"
    seed: Seed = 0


class Config(Strict):
    """A whole configuration, as `resolve` returns it: defaults merged, names looked up, everything checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str = ""
    description: str = ""
    results: str = "results"
    images: Images
    autoencoder: Autoencoder
    teachers: dict[str, Teacher] = {}
    cache: Cache = Cache()
    detector: Annotated[dict[str, Detector], Field(min_length=1)]
    models: dict[str, SerializeAsAny[Annotated[Model | OtherModel, PlainValidator(_model)]]] = {}
    alignments: dict[str, Alignment] = {}
    training: Training = Training()
    runtime: Runtime = Runtime()
    sampling: dict[str, Sampling] = {}
    defaults: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    evaluate: dict[str, Evaluate] = {}

    @property
    def latent_size(self) -> int:
        """Side of the latent grid in cells."""
        return self.images.resolution // self.autoencoder.factor

    def training_of(self, run: str) -> Training:
        """The training settings of a run: the common ones with the row's own on top."""
        return Training(**{**self.training.model_dump(), **self.runs[run].training})


# Published sizes (DiT Table 1; SiT uses the same). L, D, H; the number behind the slash is the patch size.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MODELS = {
    f"SiT-{name}/{patch}": Model(depth=depth, width=width, heads=heads, patch_size=patch)
    for name, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}

# HASTE Table 5: feature depth (from 1), student layers (from 0), teacher layers (from 0, a 12-layer ViT-B).
_DEEP = (8, [4, 5, 6, 7], [8, 9, 10, 11])
MAPPINGS = {"SiT-B/2": (5, [2, 3, 4], [7, 9, 11]), "SiT-L/2": _DEEP, "SiT-XL/2": _DEEP}
REPA_DEPTH = {"SiT-B/2": 4, "SiT-L/2": 8, "SiT-XL/2": 8}
ALIGNED_HEADS = 12

# What timm's vision transformers have in their names; only loading one shows whether it is there and plain.
_TIMM = re.compile(r"deit|.*vit_")


def _chosen(part: Strict) -> Any:
    return getattr(part, "trained", None) or getattr(part, "pretrained", None)


def _exactly_one(part: Any, *names: str) -> Any:
    given = [name for name in names if getattr(part, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {' and '.join(names)}, found {' and '.join(given) or 'neither'}")
    return part


MOST_READINGS = 50_000  # of a trigger; some hundred bytes each
MOST_ENTRIES = 1_000_000  # in a configuration, aliases written out


class _Once(yaml.SafeLoader):
    """A loader that refuses a key that stands twice in one mapping; YAML would silently take the last.

    Aliases of aliases, a line each, can stand for more entries than there is memory, and one may refer to itself: these
    are refused before anything is built from them.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: yaml.Node, known: dict[int, int]) -> int:
        """The entries of a node, its aliases written out."""
        if id(node) in known:
            if not known[id(node)]:
                raise ValueError(f"line {node.start_mark.line + 1}: what begins here refers to itself")
            return known[id(node)]
        known[id(node)], parts = 0, node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(self._count(one, known) for one in inner)
        if known[id(node)] > MOST_ENTRIES:
            found = f"{known[id(node)]:,} entries with its aliases written out"
            raise ValueError(f"line {node.start_mark.line + 1}: found {found}, expected at most {MOST_ENTRIES:,}")
        return known[id(node)]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Looked at as written: later, `<<` mixes in keys that may well be overridden.
        node = super().compose_mapping_node(anchor)
        assert node is not None
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = self._name(key), key.start_mark.line + 1
                if name in lines:
                    raise ValueError(f"line {line}: key {name!r} is already on line {lines[name]}; expected it once")
                lines[name] = line
        return node

    def _name(self, key: yaml.ScalarNode) -> str:
        """A key as `resolve` sees it, which takes 1 for "1"."""
        found = key.value if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key)
        return found if isinstance(found, str) else json.dumps(found, default=str)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError:  # not JSON, or a key twice: JSON is YAML, whose loader knows the line
        return yaml.load(text, _Once)


def read(path: str | Path) -> dict[str, Any]:
    """What a configuration file (YAML or JSON) says, before `resolve` looks at it.

    Raises:
        ValueError: the file is missing, not YAML, not a mapping, or has a key twice; the message names the file, and
            the key with its line.
    """
    try:
        raw = _parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be read, expected a few levels") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping of keys, found {type(raw).__name__}")
    return raw


def load(path: str | Path) -> Config:
    """Read and resolve a configuration file (YAML, or the resolved JSON that a run wrote).

    Raises:
        ValueError: `read` or `resolve` refuses it; the message names the file.
    """
    raw = read(path)
    try:
        return resolve(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def submitted(raw: Mapping[str, Any]) -> Config:
    """What a workflow's job was submitted with, though the file may have been edited since.

    Args:
        raw: what the file says now, of which the name and the results folder are taken.

    Raises:
        ValueError: the resolved configuration that the workflow's start wrote there cannot be read.
    """
    return load(Path(str(raw.get("results", "results")), str(raw.get("name")), "config.json"))


def resolve(raw: Mapping[str, Any]) -> Config:
    """Check a configuration and lay its `defaults` under every row of `runs`.

    Layers that an alignment leaves out stay open: `terms_of` takes them from the published mapping of the row's model.
    The result resolves to itself, so it can be written down and read again.

    Raises:
        ValueError: with one line per fault: its full path, what was found, what was expected.
    """
    try:
        text = json.dumps(raw, default=str, ensure_ascii=False)
        text.encode()  # half a surrogate pair is text that no file can hold
        raw = json.loads(text)  # Snakemake hands over subclasses of dict; take plain data
    except UnicodeEncodeError as error:
        raise ValueError(f"the configuration: {error}") from error
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the configuration: {error}") from error  # a date as a key, or lists in lists in lists
    defaults = raw.get("defaults") or {}
    whole = set[tuple[str, str]]()
    if isinstance(raw.get("runs"), dict) and isinstance(defaults, dict):
        _check_defaults(defaults)
        alignments = raw.get("alignments")
        rows = {
            name: _seeded(_over(defaults, row or {}))
            for name, row in raw["runs"].items()
            if isinstance(row or {}, dict)
        }
        whole = {(name, key) for name, row in rows.items() for key in ("stop", "ramp") if _for_both(row.get(key, {}))}
        rows = {name: _spread(row, alignments if isinstance(alignments, dict) else {}) for name, row in rows.items()}
        raw = {**raw, "defaults": {}, "runs": {**raw["runs"], **rows}}
    raw = _with_presets(raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(fault, whole) for fault in error.errors()]
        raise ValueError("\n".join(dict.fromkeys(lines))) from None  # what stands for both terms is told once
    if faults := _faults_of_architectures(config):
        raise ValueError("\n".join(faults))  # what the network has decides whether the rest fits it
    faults = (
        _faults_of_names(config) + _faults_of_data(config) + _faults_of_models(config) + _faults_of_teachers(config)
    )
    faults += _faults_of_sampling(config)
    faults += [fault for name in config.alignments for fault in _faults_of_alignment(config, name)]
    faults += [fault for name in config.runs for fault in _faults_of_run(config, name)]
    faults += _faults_of_rows(config)
    faults += [fault for name in config.evaluate for fault in _faults_of_evaluate(config, name)]
    faults = faults or [fault for name in config.runs for fault in _faults_of_angles(config, name)]
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))  # runs that share a faulty alignment tell it once
    return config


def _with_presets(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Define the presets that rows name and nothing defines; an entry of a preset's name is laid over it."""
    sampling = raw.get("sampling", {})
    rows = [row for kind in ("runs", "evaluate") if isinstance(raw.get(kind), dict) for row in raw[kind].values()]
    if not isinstance(sampling, dict):
        return raw
    lists = [row.get("sampling") for row in rows if isinstance(row, dict)]
    used = {name for asked in lists if isinstance(asked, list) for name in asked if isinstance(name, str)}
    found = {name: {"preset": name} for name in PRESETS if name in used}
    found |= {
        name: {"preset": name, **(entry or {})} if name in PRESETS and isinstance(entry or {}, dict) else entry
        for name, entry in sampling.items()
    }
    return {**raw, "sampling": found} if found else raw


def _over(defaults: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row on top of the defaults; sections that both have, such as `training` and `stop`, are joined key by key."""
    both = {key for key in defaults if isinstance(defaults[key], dict) and isinstance(row.get(key), dict)}
    both -= {key for key in both if _for_both(defaults[key]) or _for_both(row[key])}
    other = {"seed": "seeds", "seeds": "seed"}  # a row's own one or several push the defaults' several or one aside
    hidden = {other[key] for key in other if key in row and other[key] not in row}
    kept = {key: value for key, value in defaults.items() if key not in hidden}
    return {**kept, **row, **{key: {**defaults[key], **row[key]} for key in both}}


def _spread(row: dict[str, Any], alignments: Mapping[str, Any]) -> dict[str, Any]:
    """Write a `stop` or `ramp` that stands for all terms as those of the terms that the row's alignment has."""
    name = row.get("alignment", "vanilla")
    terms = alignments.get(name) if isinstance(name, str) else None
    if not isinstance(terms, dict):
        return row
    for key in ("stop", "ramp"):
        if isinstance(row.get(key), int | dict) and _for_both(row[key]):
            each = {kind: row[key] for kind in TERMS if terms.get(kind) is not None}
            row = {**row, key: each or row[key]}
    return row


def _seeded(row: dict[str, Any]) -> dict[str, Any]:
    """Where only `seeds` is given, `seed` is its first."""
    seeds = row.get("seeds")
    return {**row, "seed": seeds[0]} if isinstance(seeds, list) and seeds and "seed" not in row else row


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    for key in defaults:
        if key not in Run.model_fields:
            raise ValueError(f"defaults.{key}: unknown key{_nearest(key, Run.model_fields)}")


def _nearest(found: Any, known: Any) -> str:
    spelt = {name.lower(): name for name in sorted(known)}
    close = difflib.get_close_matches(str(found).lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean {spelt[close[0]]!r}?" if close else f"; known: {', '.join(sorted(known)) or 'none'}"


def _explain(fault: Any, whole: Collection[tuple[str, str]] = ()) -> str:
    """A fault in a line, by the path that the configuration has.

    whole: run and key of each `stop` and `ramp` that was written once for all terms.
    """
    path = list(fault["loc"])
    if path[:1] == ["runs"] and tuple(path[1:3]) in whole and path[3:4] and path[3] in TERMS:
        del path[3]
    where = ".".join(str(part) for part in path if part not in _STOPS) or "the configuration"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(fault['loc'][-1], _keys_at(fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: missing, and it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    found = "" if fault["type"] == "value_error" else f", found {fault['input']!r}"
    return f"{where}: {message}{found}"


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    """The keys that the schema knows at a path: what the nearest right spelling is looked for among."""
    kind: Any = Config
    for part in path:
        models = _models_in(kind)
        if part in _STOPS:
            kind = _STOPS[part]
        elif isinstance(kind, type) and issubclass(kind, Strict) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif models and part in models[0].model_fields:
            kind = models[0].model_fields[part].annotation
    models = _models_in(kind)
    return list(models[0].model_fields) if models else []


def _models_in(kind: Any) -> list[type[Strict]]:
    if isinstance(kind, type) and issubclass(kind, Strict):
        return [kind]
    if get_origin(kind) in (Union, types.UnionType, Annotated):
        return [model for part in get_args(kind) for model in _models_in(part)]
    return []


def model_named(config: Config, name: str) -> Model | OtherModel:
    """The size behind a model's name: the configuration's own first, then the published ones."""
    return config.models.get(name) or MODELS[name]


def model_in(recipe: Mapping[str, Any]) -> Model | OtherModel:
    """The model that a trajectory's recipe names."""
    return _model({name: value for name, value in recipe["model"].items() if name not in ("input_size", "channels")})


def facts_in(recipe: Mapping[str, Any]) -> Facts:
    """Taps, parameters and operations of the model that a trajectory's recipe names."""
    model, size = model_in(recipe), recipe["model"]
    if isinstance(model, Model):
        return sit_facts(size, recipe["classes"])
    return _facts(
        model.architecture, json.dumps(model.settings), size["input_size"], size["channels"], recipe["classes"]
    )


@functools.cache  # it is built, if without memory
def _facts(architecture: str, settings: str, size: int, channels: int, classes: int) -> Facts:
    shape = {"input_size": size, "in_channels": channels, "classes": classes}
    return architecture_named(architecture).facts(json.loads(settings), **shape)


def taps_of(config: Config, name: str) -> Mapping[str, Tap]:
    """What a model lets the alignment losses see, by name.

    Raises:
        ValueError: the network cannot be built for these latents.
    """
    model = model_named(config, name)
    if isinstance(model, Model):
        return sit_taps(model.depth, model.width, model.heads, config.latent_size // model.patch_size)
    latents = (config.latent_size, config.autoencoder.channels, config.images.classes)
    return _facts(model.architecture, json.dumps(model.settings), *latents).taps


def alignment_named(config: Config, name: str) -> Alignment:
    """The terms behind an alignment's name; `vanilla` needs no entry."""
    return config.alignments.get(name) or Alignment()


def teacher_shape(teacher: Teacher) -> tuple[int, int] | None:
    """(blocks, heads) of a teacher, or None for a timm name that is not in `TEACHERS`."""
    if teacher.trained:
        return teacher.trained.depth, teacher.trained.heads
    assert teacher.pretrained
    found = TEACHERS.get(teacher.pretrained.name)
    return None if found is None else (found.depth, found.heads)


def teacher_tokens(config: Config, name: str) -> tuple[int, int] | None:
    """(width, tokens an image) of a teacher, or None for a timm name that is not in `TEACHERS`."""
    teacher, resolution = config.teachers[name], config.images.resolution
    if teacher.trained:
        return teacher.trained.width, (resolution // teacher.trained.patch) ** 2
    assert teacher.pretrained
    found = TEACHERS.get(teacher.pretrained.name)
    return None if found is None else (found.width, found.tokens(resolution))


def _faults_of_names(config: Config) -> list[str]:
    """Names that no table can show, and paths that no disk can have."""
    sections = ("runs", "models", "teachers", "alignments", "sampling", "detector")
    faults = [
        f"{section}: {name!r} is no name, expected printable characters and at least one"
        for section in sections
        for name in getattr(config, section)
        if not name.strip() or not name.isprintable()
    ]
    if not config.results.strip("/") or "\0" in config.results:
        faults.append(f"results: {config.results!r}, expected a folder, and not the root of the disk")
    if "\0" in (config.images.path or ""):
        faults.append(f"images.path: {config.images.path!r}, expected a folder")
    return faults


def _faults_of_data(config: Config) -> list[str]:
    faults, resolution = [], config.images.resolution
    if resolution % config.autoencoder.factor:
        faults.append(
            f"images.resolution: {resolution} is not divisible by the autoencoder's factor {config.autoencoder.factor}"
        )
    if trained := [] if config.images.holdout else _trained_here(config):
        faults.append(f"images.holdout: 0, but {', '.join(trained)} are trained here and judged on images held out")
    names = list(config.detector)
    for place, name in enumerate(names):
        detector = config.detector[name]
        faults += [f"detector.{name}: the same as {n}" for n in names[:place] if config.detector[n] == detector]
        found = detector.pretrained.name if detector.pretrained else None
        if found is not None and found in extensions.names("detectors"):
            continue  # what it needs is known when it is loaded
        if found is not None and found not in DETECTORS:
            at = f"detector.{name}.pretrained.name"
            faults.append(f"{at}: nothing is called {found!r}{_nearest(found, DETECTORS)}")
        elif found is not None and resolution < DETECTORS[found].smallest:
            least = f"images of {DETECTORS[found].smallest} px or more"
            faults.append(f"images.resolution: {resolution}, but detector {name} ({found}) reads {least}")
        elif found is None and (resolution < 8 or resolution % 4):  # two halvings, and something left to look at
            faults.append(f"images.resolution: {resolution}, but detector {name} reads images of 8, 12, 16, ... px")
    if not config.images.classes:
        faults += [
            f"sampling.{name}.guidance: {way.guidance}, but images.classes is 0: without labels there is nothing to "
            "guide to, expected 1"
            for name, way in config.sampling.items()
            if way.guidance > 1
        ]
    return faults


def _trained_here(config: Config) -> list[str]:
    """The networks that the pipeline trains on the images, as the configuration names them."""
    found: dict[str, Autoencoder | Teacher | Detector] = {"autoencoder": config.autoencoder}
    found |= {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    found |= {f"detector.{name}": detector for name, detector in config.detector.items()}
    return [name for name, part in found.items() if part.trained is not None]


def _faults_of_architectures(config: Config) -> list[str]:
    """Networks that cannot be built for these latents, or are not what they say they are."""
    faults = []
    for name, model in config.models.items():
        try:
            if isinstance(model, OtherModel):
                taps_of(config, name)
        except ValueError as error:
            faults.append(f"models.{name}: {error}")
    return faults


def _faults_of_models(config: Config) -> list[str]:
    return [
        f"models.{name}: {_size(model)}, but the published {name} has {_size(MODELS[name])}; expected another name"
        for name, model in config.models.items()
        if name in MODELS and model != MODELS[name]
    ]


def _size(model: Model | OtherModel) -> str:
    return ", ".join(f"{key} {value}" for key, value in model.model_dump().items())


def _faults_of_sampling(config: Config) -> list[str]:
    """A preset's name stands for its solver everywhere."""
    return [
        f"sampling.{name}.{key}: {getattr(way, key)}, but the preset {name} has {value}; expected another name"
        for name, way in config.sampling.items()
        for key, value in PRESETS.get(name, {}).items()
        if getattr(way, key) != value
    ]


def _faults_of_teachers(config: Config) -> list[str]:
    faults, resolution = [], config.images.resolution
    for name, teacher in config.teachers.items():
        if teacher.trained and resolution % teacher.trained.patch:
            faults.append(
                f"teachers.{name}.trained.patch: {teacher.trained.patch} does not divide images.resolution {resolution}"
            )
        tokens = teacher_tokens(config, name)
        if tokens and teacher.pca is not None and teacher.pca > tokens[0]:
            faults.append(f"teachers.{name}.pca: {teacher.pca}, but its features have a width of {tokens[0]}")
        found = teacher.pretrained.name if teacher.pretrained else None
        if found is not None and found not in {*TEACHERS, *extensions.names("teachers")} and not _TIMM.match(found):
            faults.append(
                f"teachers.{name}.pretrained.name: nothing is called {found!r}, and timm's vision transformers "
                f"are called vit_... or deit...{_nearest(found, TEACHERS)}"
            )
    return faults


def _faults_of_alignment(config: Config, name: str) -> list[str]:
    """What is wrong with an alignment whatever model it is used with, and also if it is not used."""
    faults = []
    for kind in Stops.model_fields:
        term, at = getattr(config.alignments[name], kind), f"alignments.{name}.{kind}"
        if term is not None and term.teacher not in config.teachers:
            faults.append(f"{at}.teacher: nothing is called {term.teacher!r}{_nearest(term.teacher, config.teachers)}")
    term, at = config.alignments[name].attention, f"alignments.{name}.attention"
    if term is None:
        return faults
    given = {"student_layers": term.student_layers, "teacher_layers": term.teacher_layers}
    if (term.student_layers is None) != (term.teacher_layers is None):
        faults.append(f"{at}: needs both student_layers and teacher_layers or neither, found {given}")
    elif term.student_layers is not None and len(term.student_layers) != len(term.teacher_layers or []):
        faults.append(
            f"{at}: student_layers {term.student_layers} and teacher_layers {term.teacher_layers} "
            "must pair up one by one"
        )
    elif term.student_layers == []:
        faults.append(f"{at}.student_layers: found none, expected at least one")
    shape = teacher_shape(config.teachers[term.teacher]) if term.teacher in config.teachers else None
    if shape is not None:  # without one it is a timm name that is not in TEACHERS: known when it is loaded
        faults += _beyond(f"{at}.teacher_layers", term.teacher_layers, term.teacher, range(shape[0]))
        if term.heads is not None and term.heads > shape[1]:
            faults.append(f"{at}.heads: {term.heads}, but teacher {term.teacher} has {shape[1]}")
    return faults


def _beyond(at: str, layers: list[int] | None, owner: str, known: Collection[int]) -> list[str]:
    wrong = [layer for layer in layers or [] if layer not in known]
    return [f"{at}: {wrong}, but {owner} has layers {_span(known)}"] if wrong else []


def _span(numbers: Collection[int]) -> str:
    """0, 1, 2, 3 as "0 to 3"; with gaps, each."""
    low, high = min(numbers), max(numbers)
    return f"{low} to {high}" if len(numbers) == high - low + 1 else ", ".join(map(str, sorted(numbers)))


def _faults_of_run(config: Config, name: str) -> list[str]:
    run, where = config.runs[name], f"runs.{name}"
    known = {
        "model": {*config.models, *MODELS},
        "alignment": {"vanilla", *config.alignments},
    }
    faults = [
        f"{where}.{key}: nothing is called {getattr(run, key)!r}{_nearest(getattr(run, key), names)}"
        for key, names in known.items()
        if getattr(run, key) not in names
    ]
    faults += _unknown_sampling(config, run.sampling, where)
    try:
        batch, runtime = config.training_of(name).batch, config.runtime
        if batch % (runtime.processes * runtime.accumulate):
            faults.append(
                f"{where}: training.batch {batch} is not divisible by runtime.processes {runtime.processes} "
                f"times runtime.accumulate {runtime.accumulate}"
            )
    except ValidationError as error:
        faults += [f"{where}.{_explain({**fault, 'loc': ('training', *fault['loc'])})}" for fault in error.errors()]
    if faults:
        return faults
    faults = _faults_of_model(config, run, where) + _faults_of_stop(config, run, where)
    faults += _faults_of_readings(run, where)
    return faults + _faults_of_ramp(run, where) + _faults_of_fit(config, run)


def _unknown_sampling(config: Config, names: list[str], where: str) -> list[str]:
    return [
        f"{where}.sampling: nothing is called {name!r}{_nearest(name, {*config.sampling, *PRESETS})}"
        for name in names
        if name not in config.sampling
    ]


def _faults_of_rows(config: Config) -> list[str]:
    if not config.runs and not config.evaluate:
        return ["runs: found no row in runs or evaluate, expected at least one"]
    twice = sorted({*config.runs} & {*config.evaluate})
    return [f"evaluate.{name}: runs has a row of this name too, expected another name" for name in twice]


def _faults_of_evaluate(config: Config, name: str) -> list[str]:
    row, where = config.evaluate[name], f"evaluate.{name}"
    faults, known = _unknown_sampling(config, row.sampling, where), {*config.models, *MODELS}
    if row.model not in known:
        return [*faults, f"{where}.model: nothing is called {row.model!r}{_nearest(row.model, known)}"]
    return faults + _faults_of_model(config, row, where)


def _faults_of_model(config: Config, run: Run | Evaluate, where: str) -> list[str]:
    model = model_named(config, run.model)
    if isinstance(model, Model) and config.latent_size % model.patch_size:
        cut = f"cannot be cut into patches of {model.patch_size}"
        return [f"{where}.model: latents of {config.latent_size} cells a side {cut}"]
    return []


def _faults_of_stop(config: Config, run: Run, where: str) -> list[str]:
    alignment = alignment_named(config, run.alignment)
    terms = [kind for kind in Stops.model_fields if getattr(alignment, kind) is not None]
    stops = {kind: said for kind in Stops.model_fields if (said := _words_of_stop(getattr(run.stop, kind)))}
    if stops and not terms:
        found = next(iter(stops.values()))
        return [f"{where}.stop: {found} given, but {run.alignment!r} aligns nothing that could be stopped"]
    return [
        f"{where}.stop.{kind}: {found} given, but {run.alignment!r} has no {kind} to stop, only {', '.join(terms)}"
        for kind, found in stops.items()
        if kind not in terms
    ]


def _faults_of_readings(run: Run, where: str) -> list[str]:
    """Every state keeps all readings so far, in a header that has an end."""
    last, faults = run.milestones[-1], []
    for kind, stop in ((kind, getattr(run.stop, kind)) for kind in TERMS):
        if isinstance(stop, Trigger) and (count := (last - stop.after) // stop.every) > MOST_READINGS:
            found = f"{stop.every} makes {count:,} readings up to step {last}"
            faults.append(f"{where}.stop.{kind}.every: {found}, expected at most {MOST_READINGS:,}")
    return faults


def _faults_of_angles(config: Config, name: str) -> list[str]:
    """Gradients that nobody could take: while all terms are active, or once those have stopped that stop apart."""
    terms, stop, faults = terms_of(config, name), config.runs[name].stop, []
    active = {kind: term for kind, term in terms.items() if getattr(stop, kind) != 0}
    for kind, watch in triggers_of(config, name).items():
        lasting = {other: term for other, term in active.items() if getattr(stop, other) in (None, watch)}
        trigger, blocks = triggers.made(watch.trigger, watch.model_extra or {}), _blocks_of(config, name)
        found = triggers.faults(trigger, kind, active, blocks) or triggers.faults(trigger, kind, lasting, blocks)
        faults += [f"runs.{name}.stop.{kind}.{fault}" for fault in found]
    return faults


def _blocks_of(config: Config, run: str) -> int:
    """Blocks of a run's model that can be told apart."""
    model = model_named(config, config.runs[run].model)
    if isinstance(model, Model):
        return model.depth
    latents = (config.latent_size, config.autoencoder.channels, config.images.classes)
    return _facts(model.architecture, json.dumps(model.settings), *latents).blocks


def _words_of_stop(stop: Any) -> str:
    return f"trigger {stop.trigger}" if isinstance(stop, Trigger) else "" if stop is None else str(stop)


def _faults_of_ramp(run: Run, where: str) -> list[str]:
    faults = []
    for kind in TERMS:
        steps, stop = getattr(run.ramp, kind), getattr(run.stop, kind)
        if steps is not None and isinstance(stop, Trigger):
            faults.append(
                f"{where}.ramp.{kind}: {steps} steps down to the stop, but {kind} stops by {stop.trigger}, at a step "
                "that nobody knows before; expected a stop at a step, or no ramp"
            )
        elif steps is not None and (stop is None or steps > stop):
            found = "never stops" if stop is None else f"stops at step {stop}"
            faults.append(f"{where}.ramp.{kind}: {steps} steps down to the stop, but {kind} {found}")
    return faults


def _faults_of_fit(config: Config, run: Run) -> list[str]:
    """What is wrong with a run's alignment for its model, which must have the layers and heads."""
    alignment, taps = alignment_named(config, run.alignment), taps_of(config, run.model)
    at, name, depths = f"alignments.{run.alignment}", run.model, blocks(taps, "tokens")
    faults = []
    if (term := alignment.features) is not None:
        if not depths:
            faults.append(f"{at}.features: {name} hands out no hidden tokens that features could follow")
        elif term.depth is None and name not in MAPPINGS:
            missing = "has no published mapping, so its depth must be named"
            faults.append(f"{at}.features.depth: {name} {missing} ({_span(depths)})")
        elif term.depth is not None and term.depth not in depths:
            faults.append(f"{at}.features.depth: {term.depth}, but {name} has blocks {_span(depths)}")
    if alignment.attention is not None:
        faults += _faults_of_attention(config, alignment.attention, taps, name, f"{at}.attention")
    return faults


def _faults_of_attention(config: Config, term: AttentionTerm, taps: Mapping[str, Tap], name: str, at: str) -> list[str]:
    layers = blocks(taps, "attention")
    if not layers:
        return [f"{at}: {name} hands out no attention that could follow a teacher's; align its features alone"]
    faults = _beyond(f"{at}.student_layers", term.student_layers, name, layers)
    if term.heads is not None and not faults and term.heads > (heads := _heads_of(taps, term.student_layers or layers)):
        faults.append(f"{at}.heads: {term.heads}, but model {name} has {heads}")
    if term.student_layers is None and term.teacher_layers is None:
        if name not in MAPPINGS:
            return [*faults, f"{at}: {name} has no published mapping, so it needs student_layers and teacher_layers"]
        shape = teacher_shape(config.teachers[term.teacher]) if term.teacher in config.teachers else None
        if shape is not None:  # the mapping was published for 12 layers
            faults += _beyond(f"{at}.teacher_layers", MAPPINGS[name][2], term.teacher, range(shape[0]))
    return faults


def _heads_of(taps: Mapping[str, Tap], layers: Collection[int]) -> int:
    """Heads that all of these layers have."""
    return min(taps[f"attention.{layer}"].heads or 0 for layer in layers)


def falls_from(config: Config, run: str) -> dict[str, int | None]:
    """Term -> the first step at which it may not be what it would be if it never stopped; None if it never stops."""
    found: dict[str, int | None] = {}
    for kind in terms_of(config, run):
        stop, ramp = getattr(config.runs[run].stop, kind), getattr(config.runs[run].ramp, kind)
        found[kind] = stop.after if isinstance(stop, Trigger) else None if stop is None else stop - (ramp or 0)
    return found


def triggers_of(config: Config, run: str) -> dict[str, Trigger]:
    """The terms of a run that a trigger stops, with that."""
    stops = {kind: getattr(config.runs[run].stop, kind) for kind in terms_of(config, run)}
    return {kind: stop for kind, stop in stops.items() if isinstance(stop, Trigger)}


def terms_of(config: Config, run: str) -> dict[str, dict[str, Any]]:
    """The alignment terms of a run with every layer named: {"features": {...}, "attention": {...}}, if used."""
    row = config.runs[run]
    alignment = alignment_named(config, row.alignment)
    terms = {}
    if alignment.features:
        # REPA alone and HASTE were published with different depths for SiT-B.
        published = REPA_DEPTH if alignment.attention is None else {k: m[0] for k, m in MAPPINGS.items()}
        term = alignment.features.model_dump()
        terms["features"] = {**term, "depth": term["depth"] or published[row.model]}
    if alignment.attention:
        term = alignment.attention.model_dump()
        if term["student_layers"] is None:
            _, term["student_layers"], term["teacher_layers"] = MAPPINGS[row.model]
        if term["heads"] is None:
            shape = teacher_shape(config.teachers[term["teacher"]])
            heads = _heads_of(taps_of(config, row.model), term["student_layers"])
            term["heads"] = min(ALIGNED_HEADS, heads, shape[1] if shape else ALIGNED_HEADS)
        terms["attention"] = term
    return terms
