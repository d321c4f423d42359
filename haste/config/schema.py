"""The sections on alignment, training, sampling and runs, and the whole: `Config`. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    Tag,
    create_model,
    model_validator,
)

from haste.align import triggers
from haste.align.schedule import SHAPES
from haste.align.terms import kind_of, named
from haste.config.keys import (
    LABEL,
    LATER,
    Float,
    Place,
    Positive,
    Rate,
    Seed,
    Share,
    Strict,
    Weights,
    decides,
    nearest,
    or_added,
)
from haste.config.parts import (
    Autoencoder,
    Cache,
    Condition,
    Detector,
    Images,
    Model,
    OtherModel,
    Process,
    Teacher,
    measure_named,
    model_of,
)


class _Term(Strict):
    """What every alignment term has: its teacher, its weight, and the times t whose samples count for it."""

    teacher: str
    weight: Rate = 0.5
    t_min: Annotated[Share, LATER] = 0.0
    t_max: Annotated[Share, LATER] = 1.0
    warmup: Annotated[int, Field(ge=0), LATER] = 0

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.t_max < self.t_min:
            raise ValueError(
                f"t_max {self.t_max} is below t_min {self.t_min}: no time would count, expected at least it"
            )
        return self


# Keys of a feature term that go with a value of another key, and only with it.
_BELONGS = (
    ("hidden", "head", "mlp"),
    ("kernel", "head", "conv"),
    ("normalise_factor", "normalise", "spatial"),
    ("negative_count", "negatives", "batch"),
)


class FeatureTerm(_Term):
    """REPA: hidden tokens after block `depth` (counted from 1) follow a teacher's patch tokens, the last by default."""

    depth: Positive | None = None
    layer: Annotated[Annotated[int, Field(ge=0)] | None, LATER] = None
    normalise: Annotated[Literal["spatial"] | None, LATER] = None
    normalise_factor: Annotated[Share | None, LATER] = None
    similarity: Literal["cosine", "nt-xent"] = "cosine"
    temperature: Annotated[Rate | None, LATER] = None
    negatives: Annotated[Literal["image", "batch"] | None, LATER] = None
    negative_count: Annotated[Positive | None, LATER] = None
    head: Annotated[Literal["mlp", "conv", "linear"], LATER] = "mlp"
    hidden: Positive | None = 2048
    kernel: Annotated[Positive | None, LATER] = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Set the defaults of NT-Xent, of heads other than the MLP, and of a normalisation."""
        if not isinstance(given, dict):
            return given
        full = {"normalise_factor": 1.0, **given} if given.get("normalise") == "spatial" else dict(given)
        if full.get("head") in ("conv", "linear"):
            full = {"hidden": None, **({"kernel": 3} if full["head"] == "conv" else {}), **full}
        if full.get("similarity") == "nt-xent":
            full = {"temperature": 0.1, "negatives": "image", **full}
            full = {"negative_count": 1024, **full} if full["negatives"] == "batch" else full
        return full

    @model_validator(mode="after")
    def _belongs(self) -> FeatureTerm:
        contrast = {"temperature": self.temperature, "negatives": self.negatives}
        if self.similarity == "cosine" and (given := {k: v for k, v in contrast.items() if v is not None}):
            raise ValueError(f"similarity cosine takes no {' and no '.join(given)}, only nt-xent does; found {given}")
        if self.similarity == "nt-xent" and None in contrast.values():
            raise ValueError(f"similarity nt-xent needs a temperature and negatives, found {contrast}")
        for key, owner, value in _BELONGS:
            found, chosen = getattr(self, key), getattr(self, owner)
            if (chosen == value) != (found is not None):
                raise ValueError(
                    f"{key} goes with {owner}: {value} and only with it, found {found} and {owner} {chosen}"
                )
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even and has no centre, expected 1, 3, 5, ...")
        return self


class AttentionTerm(_Term):
    """ATTA: attention maps of student layers follow those of teacher layers (both counted from 0), head by head."""

    student_layers: list[Annotated[int, Field(ge=0)]] | None = None
    teacher_layers: list[Annotated[int, Field(ge=0)]] | None = None
    heads: Positive | None = None


# One feature term, or several with a teacher each, by the words that pydantic puts into the path of a fault within it.
FEATURE_TAGS = ("<term>", "<terms>")
Features = Annotated[
    Annotated[FeatureTerm, Tag("<term>")] | Annotated[list[FeatureTerm], Tag("<terms>")],
    Discriminator(lambda value: "<terms>" if isinstance(value, list) else "<term>"),
]


def _one_or_several(given: Any) -> Any:
    if isinstance(given, list) and len(given) < 2:
        if not given:
            raise ValueError("found no term, expected one, or several with a teacher each")
        return given[0]
    return given


class Alignment(Strict):
    """Which alignment terms a run adds to its denoising loss; neither is vanilla training."""

    features: Annotated[Features | None, BeforeValidator(_one_or_several)] = None
    attention: AttentionTerm | None = None

    @property
    def terms(self) -> dict[str, Any]:
        """Its terms by name: `features`, `features-2`, ... and `attention`, if used."""
        several = self.features if isinstance(self.features, list) else [self.features] if self.features else []
        return named("features", several) | ({"attention": self.attention} if self.attention else {})

    def path(self, term: str) -> str:
        """Where a term is in the configuration, below its alignment: `features.1` is the second of a list."""
        several = isinstance(self.features, list) and kind_of(term) == "features"
        return f"features.{list(self.terms).index(term)}" if several else term


TERMS: dict[str, type[Strict]] = {"features": FeatureTerm, "attention": AttentionTerm}


class Trigger(Strict):
    """Stops a term by readings during training. Besides these keys it has the parameters of its trigger."""

    model_config = ConfigDict(extra="allow")

    trigger: str
    after: Annotated[int, Field(ge=0)] = 0
    every: Positive = 1000
    # Named with the shape of the ramp, as the term's own entry: see `haste.plan.runs`.
    release: Annotated[Annotated[Float, Field(gt=0, le=1)] | None, LABEL] = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the parameters, and write out omitted ones with their defaults."""
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
                f"unknown key {unknown[0]!r}{nearest(unknown[0], {*cls.model_fields, *kind.model_fields})}"
            )
        common = {key: value for key, value in given.items() if key not in own}
        return {**common, **triggers.made(given["trigger"], own).model_dump(mode="json")}

    @property
    def first(self) -> int:
        """The first step at which it can stop its term."""
        return triggers.first_reading(triggers.made(self.trigger, self.model_extra or {}), self.after, self.every)

    @property
    def decided(self) -> dict[str, Any]:
        """Its entries in a recipe."""
        return decides(triggers.named(self.trigger), decides(Trigger, self.model_dump()))


# The kinds of a stop, by the words that pydantic puts into the path of a fault within it.
STOP_TAGS = {"<step>": int, "<trigger>": Trigger}
Stop = Annotated[
    Annotated[int, Field(ge=0), Tag("<step>")] | Annotated[Trigger, Tag("<trigger>")],
    Discriminator(lambda value: "<trigger>" if isinstance(value, dict | Trigger) else "<step>"),
]


def _watches(given: Any) -> Any:
    return [given] if isinstance(given, dict | Trigger) else given


def _never_stops(watches: list[Trigger]) -> list[Trigger]:
    if released := [watch.trigger for watch in watches if watch.release is not None]:
        raise ValueError(
            f"{released[0]} has a release, but a trigger under watch stops nothing; expected it under stop"
        )
    if twice := [watch.trigger for place, watch in enumerate(watches) if watch in watches[:place]]:
        raise ValueError(f"{twice[0]} is there more than once with the same settings, expected each once")
    return watches


class Stops(Strict):
    """When terms of each kind stop: at a step, by a trigger, or never (None). In a configuration one value may be for
    both."""

    features: Stop | None = None
    attention: Stop | None = None

    def of(self, term: str) -> Any:
        """That of a term by its name."""
        return getattr(self, kind_of(term))


class Ramps(Strict):
    """Steps before its stop over which the weight of terms of each kind falls to 0; None drops it at once."""

    features: Annotated[int, Field(ge=2)] | None = None
    attention: Annotated[int, Field(ge=2)] | None = None
    shape: Literal[*SHAPES] = "cosine"  # type: ignore[valid-type]

    def of(self, term: str) -> int | None:
        """That of a term by its name."""
        return getattr(self, kind_of(term))


def _both(value: Any) -> Any:
    return {"features": value, "attention": value} if for_both(value) else value


def for_both(value: Any) -> bool:
    """Whether a `stop` or `ramp` is one number, or one trigger, for all terms."""
    return "trigger" in value if isinstance(value, dict) else not isinstance(value, Stops | Ramps)


def _distinct(names: list[Any]) -> list[Any]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{names} has {', '.join(map(repr, twice))} more than once, expected each once")
    return names


class Timesteps(Strict):
    """The distribution of training times t."""

    distribution: Literal["uniform", "lognormal"] = "uniform"
    mu: Float = 0.0
    s: Rate = 1.0

    @model_validator(mode="after")
    def _belongs(self) -> Timesteps:
        if self.distribution == "uniform" and (self.mu, self.s) != (0.0, 1.0):
            raise ValueError(f"uniform takes no mu and s, only lognormal does; found mu {self.mu} and s {self.s}")
        return self


class Training(Strict):
    """Settings that decide the result of training: every key is part of a trajectory's name."""

    path: Literal["linear", "cosine"] = "linear"
    timesteps: Annotated[Timesteps, LATER] = Timesteps()
    process: Annotated[Process | None, LATER] = None
    batch: Positive = 256
    lr: Rate = 1e-4
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Rate = 1e-8
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    clip: Rate | None = 1.0
    ema: Annotated[Float, Field(ge=0, lt=1)] = 0.9999
    class_dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.1
    flip: Annotated[bool, LATER] = False
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    time_dtype: Annotated[Literal["fp32"] | None, LATER] = None
    nonfinite: Literal["stop", "skip"] = "stop"

    @property
    def decided(self) -> dict[str, Any]:
        """Its entries in a recipe, except those of `process`; in full precision `time_dtype` decides nothing."""
        unused = {"time_dtype": None} if self.precision in ("fp32", "fp64") else {}
        return decides(Training, self.model_dump(exclude={"process"}) | unused)


_MINUTES = re.compile(r"(\d+(?:\.\d+)?) ?min")


def minutes_of(every: int | str) -> float | None:
    """Minutes between saves; None if they are counted in steps."""
    return None if isinstance(every, int) else float(every.removesuffix("min"))


def _save_every(value: Any) -> int | str:
    if type(value) is int and value >= 1:
        return value
    found = _MINUTES.fullmatch(value) if isinstance(value, str) else None
    if found is None or float(found[1]) == 0:
        raise ValueError(f"expected a number of steps, or of minutes such as '10 min', found {value!r}")
    return f"{found[1]} min"


class Runtime(Strict):
    """How the work is executed. No key is part of a name, because none decides a result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Positive = 1
    accumulate: Positive = 1
    compile: bool = False
    checkpoint_blocks: bool = False
    deterministic: bool = True
    compress_gradients: Literal["bf16"] | None = None
    threads: Positive = 1
    loader_threads: Positive | None = None
    save_every: Annotated[Positive | str, BeforeValidator(_save_every)] = 1000
    keep_every: Positive | None = None
    log_every: Positive = 100
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    sample_shards: Positive = 1
    sample_batch: Positive = 256
    jobs_per_gpu: Positive = 1
    gpu_memory_gb: Rate | None = None


# The sampling settings of the papers' tables (REPA; HASTE). Keys beside `preset` override them.
PRESETS: dict[str, dict[str, Any]] = {
    "sde-250": {"sampler": "euler-maruyama", "steps": 250},
    "ode-50": {"sampler": "euler", "steps": 50},
    "heun-125": {"sampler": "heun", "steps": 125},
    "ddpm-250": {"sampler": "ddpm", "steps": 250},
    # DiT's own samples of its Table 2, "cfg=1.50".
    "ddpm-250-guided": {"sampler": "ddpm", "steps": 250, "guidance": 1.5, "guided_channels": 3, "pixels": "round"},
}
OF_EACH = 4  # samples of each chosen class, unless `count` says otherwise
# dopri5 with SiT's settings.
_TOLERANCES = {"rtol": 1e-3, "atol": 1e-6}


# Samplers of this package, and the process of each.
SAMPLERS = {name: "interpolant" for name in ("euler", "heun", "euler-maruyama", "dopri5")} | {
    name: "ddpm" for name in ("ddpm", "ddim")
}


def _labels(value: Any) -> Any:
    if isinstance(value, list) and value and all(type(one) is int and one >= 0 for one in value):
        return _distinct(value)
    if value not in ("random", "balanced"):
        raise ValueError(f"expected random, balanced, or a list of classes counted from 0, found {value!r}")
    return value


MOST_PROMPT = 1024  # bytes of a prompt in UTF-8


def _prompt(text: str) -> str:
    if (size := len(text.encode())) > MOST_PROMPT:
        raise ValueError(f"found {size:,} bytes ({text[:40]!r}...), expected at most {MOST_PROMPT:,}")
    return text


class Sampling(Strict):
    """One way to draw samples from a state."""

    preset: Annotated[Literal["sde-250", "ode-50", "heun-125", "ddpm-250", "ddpm-250-guided"] | None, LABEL] = None
    sampler: Annotated[Literal[*SAMPLERS], or_added("samplers")] = "euler-maruyama"  # type: ignore[valid-type]
    steps: Positive | None = 250
    rtol: Annotated[Rate | None, LATER] = None
    atol: Annotated[Rate | None, LATER] = None
    eta: Annotated[Share, LATER] = 0.0
    guidance: Annotated[Float, Field(ge=0)] = 1.0
    interval: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.0, 1.0]
    guided_channels: Annotated[Literal["all", 3], LATER] = "all"
    count: Annotated[int, Field(ge=4)] = 50_000  # precision and recall use the 3 nearest neighbours of each
    labels: Annotated[Literal["random", "balanced"] | list[int], BeforeValidator(_labels)] = "random"
    split: Annotated[Literal["held_out", "train"], LATER] = "held_out"
    prompts: Annotated[list[Annotated[str, AfterValidator(_prompt)]], LATER] = []
    pixels: Literal["truncate", "round"] = "truncate"
    weights: Annotated[Literal["ema", "model"], LATER] = "ema"
    precision: Annotated[Literal["fp32", "tf32", "bf16"], LATER] = "fp32"
    decoder_precision: Annotated[Literal["fp32", "bf16", "fp16"], LATER] = "fp32"
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Use the preset for omitted keys; dopri5 has tolerances instead of steps, and chosen classes fill a grid."""
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        known = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        adaptive = {"steps": None, **_TOLERANCES} if given.get("sampler") == "dopri5" else {}
        chosen = next((given[key] for key in ("prompts", "labels") if isinstance(given.get(key), list)), None)
        shown = {"count": OF_EACH * len(chosen)} if chosen else {}
        return {**known, **adaptive, **shown, **given}

    @model_validator(mode="after")
    def _ordered(self) -> Sampling:
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"guidance interval {self.interval} is empty: low is above high")
        return self

    @model_validator(mode="after")
    def _one_of_each(self) -> Sampling:
        for key, asked in (("labels", self.chosen), ("prompts", self.prompts)):
            if self.count < len(asked):
                raise ValueError(
                    f"count {self.count} is less than the {len(asked)} {key}, expected a sample of each or more"
                )
        return self

    @property
    def unscored(self) -> bool:
        """Whether samples are of what was chosen: there is a picture and no score, for lack of a reference."""
        return bool(self.chosen or self.prompts)

    @property
    def chosen(self) -> list[int]:
        """The classes that are named, of which there is a picture and no score; none if they are drawn from all."""
        return self.labels if isinstance(self.labels, list) else []

    @model_validator(mode="after")
    def _enough_steps(self) -> Sampling:
        if self.sampler in ("euler-maruyama", "ddpm", "ddim") and self.steps is not None and self.steps < 2:
            raise ValueError(f"steps {self.steps} is too few for {self.sampler}, expected at least 2")
        if SAMPLERS.get(self.sampler) == "ddpm" and self.steps is not None and self.steps > 1000:
            raise ValueError(f"steps {self.steps} is more than the 1,000 steps that {self.sampler} chooses from")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta {self.eta} is a key of ddim, which {self.sampler} does not have")
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


class Measure(Strict):
    """A diagnostic of a state. Besides these keys it has those of its measure."""

    model_config = ConfigDict(extra="allow")

    measure: str
    alignment: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Check the measure's own keys, and write out omitted ones with their defaults."""
        if not isinstance(given, dict) or not isinstance(given.get("measure"), str):
            return given
        kind = measure_named(given["measure"])
        if clash := sorted({*cls.model_fields} & {*kind.model_fields}):
            raise ValueError(f"{given['measure']}: its fields have {', '.join(clash)}, which stands for something else")
        own = {key: value for key, value in given.items() if key not in cls.model_fields}
        if unknown := [key for key in own if key not in kind.model_fields]:
            known = {*cls.model_fields, *kind.model_fields}
            raise ValueError(f"unknown key {unknown[0]!r}{nearest(unknown[0], known)}")
        common = {key: value for key, value in given.items() if key not in own}
        return {**common, **kind(**own).model_dump(mode="json")}

    @property
    def made(self) -> Any:
        """The `haste.measure.measure.Measure` with these settings."""
        return measure_named(self.measure)(**(self.model_extra or {}))

    @property
    def decided(self) -> dict[str, Any]:
        """The entries of the measure's own keys in a recipe."""
        return decides(measure_named(self.measure), self.model_extra or {})


class WarmStart(Strict):
    """The weights that a run begins from; `classes: new` puts a new table of classes in the place of the file's."""

    file: Weights
    classes: Literal["kept", "new"] = "kept"


def _start(given: Any) -> Any:
    return {"file": given} if isinstance(given, str) else given


def _short(start: WarmStart | None) -> Any:
    """A file alone as its path, as it was written before there were other keys."""
    return start.file if start and start.classes == "kept" else start and start.model_dump()


class Run(Strict):
    """A row of the table: model, alignment, when to stop it, how to sample."""

    model: str
    alignment: str = "vanilla"
    stop: Annotated[Stops, BeforeValidator(_both)] = Stops()
    ramp: Annotated[Ramps, BeforeValidator(_both)] = Ramps()
    watch: Annotated[list[Trigger], BeforeValidator(_watches), AfterValidator(_never_stops), LATER] = []
    seed: Seed = 0
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] | None = None
    milestones: Annotated[list[Positive], Field(min_length=1)]
    sampling: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    measures: Annotated[list[str], AfterValidator(_distinct), LATER] = []
    training: dict[str, Any] = {}
    warm_start: Annotated[WarmStart | None, BeforeValidator(_start), PlainSerializer(_short)] = None

    @model_validator(mode="after")
    def _one_seed_or_several(self) -> Run:
        if self.seeds is not None and self.seed != self.seeds[0]:
            raise ValueError(f"found seed {self.seed} and seeds {self.seeds}, expected one of the two keys")
        return self

    @property
    def all_seeds(self) -> list[int]:
        """The row's seeds, each with its own trajectory."""
        return self.seeds or [self.seed]

    @model_validator(mode="after")
    def _increasing(self) -> Run:
        if any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones {self.milestones} are out of order: write them in increasing order")
        return self


class Evaluate(Strict):
    """A row without training: a checkpoint that was trained elsewhere, and how to sample it."""

    checkpoint: Weights
    model: str
    sampling: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    step: Annotated[int, Field(ge=0)]
    measures: Annotated[list[str], AfterValidator(_distinct), LATER] = []
    path: Literal["linear", "cosine"] = "linear"
    weights: Literal["ema", "model"] = "ema"
    layout: Literal["ours", "REPA", "SiT", "DiT"] | None = None
    method: str = "elsewhere"
    seed: Seed = 0


# `for` is a word of Python, so that no class body can have it.
_For: Any = create_model("_For", __base__=Strict, **{"for": (Positive, ...)})  # type: ignore[call-overload]


class Fork(_For):
    """At each step of `at` a run goes on in two ways for a number of steps, with its alignment and without."""

    run: str
    at: Annotated[list[Positive], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] | None = None
    sampling: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] | None = None
    measures: Annotated[list[str], AfterValidator(_distinct)] = ["denoising"]

    @property
    def length(self) -> int:
        """Steps of each branch."""
        return getattr(self, "for")

    @model_validator(mode="after")
    def _increasing(self) -> Fork:
        if any(b <= a for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError(f"at {self.at} is out of order: write its steps in increasing order, each once")
        return self


class Config(Strict):
    """A whole configuration, as `resolve` returns it: defaults merged, names resolved, everything checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str = ""
    description: str = ""
    results: Place = "results"
    images: Images
    evaluation: Annotated[Images | None, LATER] = None  # other images for measures
    autoencoder: Autoencoder
    teachers: dict[str, Teacher] = {}
    cache: Cache = Cache()
    condition: Annotated[Condition, Field(validate_default=True)] = "labels"  # type: ignore[assignment]
    detector: Annotated[dict[str, Detector], Field(min_length=1)]
    models: dict[str, SerializeAsAny[Annotated[Model | OtherModel, PlainValidator(model_of)]]] = {}
    alignments: dict[str, Alignment] = {}
    training: Training = Training()
    runtime: Runtime = Runtime()
    sampling: dict[str, Sampling] = {}
    measures: Annotated[dict[str, Measure], LATER] = {}
    defaults: dict[str, Any] = {}
    runs: dict[str, Run] = {}  # in what `resolve` returns also the branches of forks
    forks: Annotated[dict[str, Fork], LATER] = {}
    evaluate: dict[str, Evaluate] = {}

    @property
    def latent_size(self) -> int:
        """Side of the latent grid in cells."""
        return self.images.resolution // self.autoencoder.factor

    def training_of(self, run: str) -> Training:
        """The training settings of a run: the common ones, overridden by the row's own."""
        return Training(**{**self.training.model_dump(), **self.runs[run].training})
