"""Error messages about a configuration: faults of the schema, and settings that do not fit together. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from haste import extensions
from haste.align import triggers
from haste.align.terms import kind_of, of_features
from haste.config.derived import (
    OF_INTERPOLANT,
    blocks_of,
    condition_of,
    heads_of,
    measured_terms,
    process_of,
    taps_of,
    terms_of,
    triggers_of,
)
from haste.config.keys import nearest
from haste.config.parts import EVALUATION, Model, OtherModel, known_of
from haste.config.published import (
    MAPPINGS,
    MODELS,
    alignment_named,
    filter_faults,
    layer_faults,
    model_named,
    teacher_shape,
    teacher_side,
    teacher_tokens,
)
from haste.config.schema import (
    PRESETS,
    SAMPLERS,
    TERMS,
    Alignment,
    AttentionTerm,
    Config,
    Evaluate,
    Run,
    Stops,
    Training,
    Trigger,
)
from haste.config.words import explain
from haste.networks.registry import DETECTORS, TEACHERS
from haste.networks.spec import Tap, blocks

# Words in the names of timm's vision transformers; only loading one shows whether it exists and is a plain one.
_TIMM = re.compile(r"deit|.*vit_")

MOST_READINGS = 50_000  # of a trigger; some hundred bytes each


def faults_of(config: Config) -> list[str]:
    """Faults that the schema cannot find, one line each: settings that do not fit together, and undefined names."""
    if faults := _faults_of_architectures(config):
        return faults  # further checks depend on the network
    faults = (
        _faults_of_names(config) + _faults_of_data(config) + _faults_of_models(config) + _faults_of_teachers(config)
    )
    faults += _faults_of_sampling(config)
    faults += [fault for name in config.alignments for fault in _faults_of_alignment(config, name)]
    faults += [fault for name in config.runs for fault in _faults_of_run(config, name)]
    faults += _faults_of_rows(config)
    faults += [fault for name in config.evaluate for fault in _faults_of_evaluate(config, name)]
    faults += [fault for name in config.measures for fault in _faults_of_measure(config, name)]
    rows = [(kind, name) for kind in ("runs", "evaluate") for name in getattr(config, kind)]
    faults += [fault for kind, name in rows for fault in unknown_measures(config, kind, name)]
    faults = faults or [fault for name in config.runs for fault in _faults_of_angles(config, name)]
    faults = faults or [fault for kind, name in rows for fault in _faults_of_measuring(config, kind, name)]
    return list(dict.fromkeys(faults))  # runs that share a faulty alignment report it once


def _faults_of_names(config: Config) -> list[str]:
    """Names that no table can show, and paths that no disk can have."""
    sections = ("runs", "forks", "models", "teachers", "alignments", "sampling", "measures", "detector")
    faults = [
        f"{section}: {name!r} is no name, expected printable characters and at least one"
        for section in sections
        for name in getattr(config, section)
        if not name.strip() or not name.isprintable()
    ]
    if not config.results.strip("/") or "\0" in config.results:
        faults.append(f"results: {config.results!r}, expected a folder, and not the root of the disk")
    for key, images in {"images": config.images, "evaluation": config.evaluation}.items():
        if images is not None and "\0" in (images.path or ""):
            faults.append(f"{key}.path: {images.path!r}, expected a folder")
    return faults


def _faults_of_data(config: Config) -> list[str]:
    faults, resolution = [], config.images.resolution
    if resolution % config.autoencoder.factor:
        faults.append(
            f"images.resolution: {resolution} is not divisible by the autoencoder's factor {config.autoencoder.factor}"
        )
    if trained := [] if config.images.holdout else _trained_here(config):
        faults.append(f"images.holdout: 0, but {', '.join(trained)} are trained here and judged on images held out")
    if (others := config.evaluation) is not None:
        alike = {"resolution": resolution, "classes": config.images.classes, "holdout": 0}
        if config.condition.name == "captions" and not others.captioned:
            faults.append(
                "evaluation: models are conditioned on captions, but these images have none; expected captions"
            )
        own = others.model_dump(include=set(alike))
        faults += [f"evaluation.{k}: {own[k]}, expected {alike[k]}" for k in alike if own[k] != alike[k]]
    names = list(config.detector)
    for place, name in enumerate(names):
        detector = config.detector[name]
        faults += [f"detector.{name}: the same as {n}" for n in names[:place] if config.detector[n] == detector]
        found = detector.pretrained.name if detector.pretrained else None
        if found is not None and found in extensions.names("detectors"):
            continue  # its requirements are only known when it is loaded
        if found is not None and found not in DETECTORS:
            at = f"detector.{name}.pretrained.name"
            faults.append(f"{at}: nothing is called {found!r}{nearest(found, DETECTORS)}")
        elif found is not None and resolution < DETECTORS[found].smallest:
            least = f"images of {DETECTORS[found].smallest} px or more"
            faults.append(f"images.resolution: {resolution}, but detector {name} ({found}) reads {least}")
        elif found is None and (resolution < 8 or resolution % 4):  # two halvings, and something must remain
            faults.append(f"images.resolution: {resolution}, but detector {name} reads images of 8, 12, 16, ... px")
    if config.condition.name != "labels":
        faults += [
            f"sampling.{name}.labels: {way.labels}, but samples are conditioned on {config.condition.name}, expected "
            "random"
            for name, way in config.sampling.items()
            if way.labels != "random"
        ]
    elif not config.images.classes:
        faults += [
            f"sampling.{name}.guidance: {way.guidance}, but images.classes is 0: without labels there is nothing to "
            "guide to, expected 1"
            for name, way in config.sampling.items()
            if way.guidance > 1
        ]
    faults += _faults_of_captions(config)
    classes = config.images.classes
    beyond = {name: [label for label in way.chosen if label >= classes] for name, way in config.sampling.items()}
    if config.condition.name == "labels":
        expected = f"0 to {classes - 1}" if classes else "random"
        faults += [
            f"sampling.{name}.labels: {found}, but images.classes is {classes}; expected {expected}"
            for name, found in beyond.items()
            if found
        ]
    return faults


def _faults_of_captions(config: Config) -> list[str]:
    """Prompts for samples that are told something else, and captions that are not there."""
    if config.condition.name != "captions":
        return [
            f"sampling.{name}.{key}: {value}, but samples are conditioned on {config.condition.name}"
            for name, way in config.sampling.items()
            for key, value, default in (("prompts", way.prompts, []), ("split", way.split, "held_out"))
            if value != default
        ]
    if not config.images.captioned:
        expected = "images.captions, or a source that has some (coco, moved-digits)"
        return [f"condition: captions, but the images have none; expected {expected}"]
    return _faults_of_text_encoder(config) + [
        f"sampling.{name}.split: held_out, but images.holdout is 0; expected train, or prompts"
        for name, way in config.sampling.items()
        if way.split == "held_out" and not way.prompts and not config.images.holdout
    ]


def _faults_of_text_encoder(config: Config) -> list[str]:
    trained, at = config.condition.trained, "condition.encoder.trained"
    if trained is None:
        return []
    divided = {"patch": ("images.resolution", config.images.resolution)}
    divided["heads"] = ("condition.width", config.condition.decided["width"])
    return [
        f"{at}.{key}: {getattr(trained, key)} does not divide {what} {whole}"
        for key, (what, whole) in divided.items()
        if whole % getattr(trained, key)
    ]


def _trained_here(config: Config) -> list[str]:
    """The networks that the pipeline trains on the images, by their keys in the configuration."""
    found: dict[str, Any] = {"autoencoder": config.autoencoder, "condition.encoder": config.condition}
    found |= {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    found |= {f"detector.{name}": detector for name, detector in config.detector.items()}
    return [name for name, part in found.items() if part.trained is not None]


def _faults_of_architectures(config: Config) -> list[str]:
    """Networks that cannot be built for these latents, contradict their declarations, do not support the condition, or
    do not support `runtime`."""
    faults, trained = [], {run.model for run in config.runs.values()}
    told = config.condition.name
    rows: list[Run | Evaluate] = [*config.runs.values(), *config.evaluate.values()]
    for name in dict.fromkeys(row.model for row in rows):
        if name in {*config.models, *MODELS} and (known := condition_of(model_named(config, name))) != told:
            faults.append(f"condition: {told}, but {name} is a network that takes {known}")
    used = {name: MODELS[name] for name in MODELS if any(row.model == name for row in rows)}
    for name, model in {**used, **config.models}.items():
        try:
            if isinstance(model, OtherModel) and condition_of(model) == told:
                taps_of(config, name)
                kind = known_of(model.architecture)
                if config.runtime.checkpoint_blocks and name in trained and not kind.can_checkpoint:
                    found = f"true, but models.{name} ({model.architecture}) cannot compute its blocks again"
                    faults.append(f"runtime.checkpoint_blocks: {found}; expected false")
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
    """A preset's name must have the preset's solver."""
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
        shape, side = teacher_shape(teacher), teacher_side(config, name)
        faults += layer_faults(config, name, shape[0]) if shape else []
        faults += filter_faults(config, name, side) if side else []
        found = teacher.pretrained.name if teacher.pretrained else None
        if found is not None and found not in {*TEACHERS, *extensions.names("teachers")} and not _TIMM.match(found):
            faults.append(
                f"teachers.{name}.pretrained.name: nothing is called {found!r}, and timm's vision transformers "
                f"are called vit_... or deit...{nearest(found, TEACHERS)}"
            )
    return faults


def _faults_of_alignment(config: Config, name: str) -> list[str]:
    """Faults of an alignment that do not depend on the model, found even if it is not used."""
    faults = []
    for which, term in config.alignments[name].terms.items():
        at = f"alignments.{name}.{config.alignments[name].path(which)}"
        if term.teacher not in config.teachers:
            faults.append(f"{at}.teacher: nothing is called {term.teacher!r}{nearest(term.teacher, config.teachers)}")
    faults += _faults_of_target(config, name)
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
    # Without a shape it is a timm name that is not in TEACHERS: known when it is loaded.
    if shape is not None and term.heads is not None and term.heads > shape[1]:
        faults.append(f"{at}.heads: {term.heads}, but teacher {term.teacher} has {shape[1]}")
    return faults


def _faults_of_target(config: Config, name: str) -> list[str]:
    """What needs more than one token of a teacher, and what several teachers of features do not have."""
    several, faults = of_features(config.alignments[name].terms), []
    for which, term in several.items():
        at = f"alignments.{name}.{config.alignments[name].path(which)}"
        tokens = teacher_tokens(config, term.teacher) if term.teacher in config.teachers else None
        if tokens and tokens[1] == 1:
            alone = f"but teacher {term.teacher} has one token an image"
            faults += [f"{at}.head: conv, {alone}: there is no grid to convolve"] if term.head == "conv" else []
            faults += [f"{at}.normalise: spatial, {alone}: its deviation is not defined"] if term.normalise else []
        if len(several) > 1 and term.negatives == "batch":
            faults.append(f"{at}.negatives: batch is for one teacher of features, found {len(several)}; expected image")
    names = [term.teacher for term in several.values()]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        faults.append(
            f"alignments.{name}.features: teacher {twice[0]} is there more than once; expected another each time, "
            "perhaps another entry of teachers for the same network"
        )
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
        f"{where}.{key}: nothing is called {getattr(run, key)!r}{nearest(getattr(run, key), names)}"
        for key, names in known.items()
        if getattr(run, key) not in names
    ]
    faults += unknown_sampling(config, run.sampling, where)
    try:
        batch, runtime = config.training_of(name).batch, config.runtime
        if batch % (runtime.processes * runtime.accumulate):
            faults.append(
                f"{where}: training.batch {batch} is not divisible by runtime.processes {runtime.processes} "
                f"times runtime.accumulate {runtime.accumulate}"
            )
    except ValidationError as error:
        faults += [f"{where}.{explain({**fault, 'loc': ('training', *fault['loc'])})}" for fault in error.errors()]
    if faults:
        return faults
    faults = _faults_of_model(config, run, where) + _faults_of_process(config, name)
    if run.warm_start and run.warm_start.classes == "new" and not isinstance(model_named(config, run.model), Model):
        faults.append(
            f"{where}.warm_start.classes: new, but where {run.model} keeps its classes is not known; only SiT's"
        )
    faults += _faults_of_flips(config, name) + _faults_of_stop(config, run, where)
    faults += _faults_of_readings(run, where)
    return faults + _faults_of_ramp(run, where) + _faults_of_fit(config, run.model, run.alignment)


def unknown_sampling(config: Config, names: list[str], where: str) -> list[str]:
    """Names that are no key of `sampling` and no preset, one line each."""
    return [
        f"{where}.sampling: nothing is called {name!r}{nearest(name, {*config.sampling, *PRESETS})}"
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
    faults, known = unknown_sampling(config, row.sampling, where), {*config.models, *MODELS}
    if row.model not in known:
        return [*faults, f"{where}.model: nothing is called {row.model!r}{nearest(row.model, known)}"]
    process = process_of(model_named(config, row.model))
    if process != "interpolant" and row.path != Evaluate.model_fields["path"].default:
        faults.append(f"{where}.path: {row.path} is a path of interpolant, but {row.model} is for {process}")
    return faults + _faults_of_model(config, row, where)


def _faults_of_process(config: Config, name: str) -> list[str]:
    """Keys of `training` that belong to a process other than the network's, or that the network does not have."""
    model, training = config.runs[name].model, config.training_of(name)
    network = model_named(config, model)
    process, given = process_of(network), training.process
    found = {"process": given.name} if given is not None and given.name != process else {}
    if process != "interpolant":
        for key in OF_INTERPOLANT:
            if key in config.runs[name].training or getattr(training, key) != Training.model_fields[key].default:
                found[key] = "interpolant"
    faults = [f"runs.{name}: training.{key} is of {own}, but {model} is for {process}" for key, own in found.items()]
    other = isinstance(network, OtherModel) and not known_of(network.architecture).can_precise_time
    if other and "time_dtype" in training.decided:
        faults.append(f"runs.{name}: training.time_dtype: fp32, but {model} has no such setting; expected null")
    return faults


def check_samplers(config: Config) -> None:
    """Refuse samplers that do not suit the process of the network they would sample. This imports samplers of other
    packages, which `resolve` does not do.

    Raises:
        ValueError: one line for every row and sampler.
    """
    faults = []
    for section in ("runs", "evaluate"):
        for name, row in getattr(config, section).items():
            process = process_of(model_named(config, row.model))
            for way in row.sampling:
                sampler = config.sampling[way].sampler
                for_ = SAMPLERS.get(sampler) or extensions.one("samplers", sampler, SAMPLERS).process
                if for_ != process:
                    where = f"{section}.{name}.sampling: {way} uses {sampler}"
                    faults.append(f"{where}, which is a sampler for {for_}, but {row.model} is for {process}")
    if faults:
        raise ValueError("\n".join(faults))


def _faults_of_model(config: Config, run: Run | Evaluate, where: str) -> list[str]:
    model = model_named(config, run.model)
    if isinstance(model, Model) and config.latent_size % model.patch_size:
        cut = f"cannot be cut into patches of {model.patch_size}"
        return [f"{where}.model: latents of {config.latent_size} cells a side {cut}"]
    return []


def _faults_of_flips(config: Config, name: str) -> list[str]:
    """Cached targets are of pictures as they are; a mirrored picture's cannot be made from them."""
    row = config.runs[name]
    if not config.training_of(name).flip:
        return []
    terms = [(k, one.teacher) for k, one in alignment_named(config, row.alignment).terms.items() if row.stop.of(k) != 0]
    kept = {who for kind, who in terms if who in config.teachers and config.teachers[who].caches(kind)}
    return [
        f"runs.{name}: training.flip: true, but teachers.{who}.cache: {config.teachers[who].cache} keeps targets of "
        f"pictures as they are, not mirrored; expected teachers.{who}.cache: off, or training.flip: false"
        for who in sorted(kept)
    ]


def _faults_of_stop(config: Config, run: Run, where: str) -> list[str]:
    alignment = alignment_named(config, run.alignment)
    terms = list(dict.fromkeys(map(kind_of, alignment.terms)))
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
    """Limits the readings, because every state keeps all of them in a header of limited size."""
    last, faults = run.milestones[-1], []
    asked = [(f"stop.{kind}", getattr(run.stop, kind)) for kind in TERMS]
    for at, stop in [*asked, *((f"watch.{place}", watch) for place, watch in enumerate(run.watch))]:
        if isinstance(stop, Trigger) and (count := (last - stop.after) // stop.every) > MOST_READINGS:
            found = f"{stop.every} makes {count:,} readings up to step {last}"
            faults.append(f"{where}.{at}.every: {found}, expected at most {MOST_READINGS:,}")
    return faults


def _faults_of_angles(config: Config, name: str) -> list[str]:
    """Gradients that cannot be taken: while all terms are active, or after separately stopped terms have stopped."""
    terms, stop, faults = terms_of(config, name), config.runs[name].stop, []
    active = {kind: term for kind, term in terms.items() if stop.of(kind) != 0}
    asked = [(f"stop.{kind_of(kind)}", kind, watch) for kind, watch in triggers_of(config, name).items()]
    for place, watch in enumerate(config.runs[name].watch):
        asked += [(f"watch.{place}", kind, watch) for kind in active]
    blocks = blocks_of(config, config.runs[name].model) if asked else 0
    for at, kind, watch in asked:
        lasting = {k: term for k, term in active.items() if k == kind or stop.of(k) in (None, watch)}
        trigger = triggers.made(watch.trigger, watch.model_extra or {})
        found = triggers.faults(trigger, kind, active, blocks) or triggers.faults(trigger, kind, lasting, blocks)
        faults += [f"runs.{name}.{at}.{fault}" for fault in found]
    return faults


def _faults_of_measure(config: Config, name: str) -> list[str]:
    """An alignment that is undefined, or that a measure does not use."""
    spec, at = config.measures[name], f"measures.{name}.alignment"
    if spec.alignment is None:
        return []
    if spec.alignment not in config.alignments:
        return [f"{at}: nothing is called {spec.alignment!r}{nearest(spec.alignment, config.alignments)}"]
    if not spec.made.needs & {"alignment", "named alignment"}:
        return [f"{at}: {spec.alignment!r} given, but {spec.measure} compares with no alignment"]
    return []


def unknown_measures(config: Config, kind: str, name: str) -> list[str]:
    """What a section of `kind` measures that is no key of `measures`, one line each."""
    return [
        f"{kind}.{name}.measures: nothing is called {one!r}{nearest(one, config.measures)}"
        for one in getattr(config, kind)[name].measures
        if one not in config.measures
    ]


def _faults_of_measuring(config: Config, kind: str, name: str) -> list[str]:
    """What a row's measures cannot measure of its states."""
    row, faults = getattr(config, kind)[name], []
    own = kind == "runs" and alignment_named(config, row.alignment) != Alignment()
    for one in row.measures:
        spec, where = config.measures[one], f"{kind}.{name}.measures: {one}"
        if needs := spec.made.needs & {"alignment", "named alignment"}:
            takes_own = own and ("alignment" in needs or spec.alignment is None)
            borrowed = None if takes_own else alignment_named(config, spec.alignment or "vanilla")
            if borrowed == Alignment():
                faults.append(
                    f"{where} ({spec.measure}) compares with an alignment, but {name} has none; expected "
                    f"measures.{one}.alignment, one of {', '.join(config.alignments) or 'alignments, which has none'}"
                )
                continue
            if "alignment" in needs and kind == "runs" and borrowed and borrowed.attention is None:
                faults.append(
                    f"{where} compares with {spec.alignment}, whose features need a projector, which {name} never has; "
                    "expected an alignment with attention"
                )
                continue
            if borrowed and (unfit := _faults_of_fit(config, row.model, spec.alignment or "")):
                faults += [f"{where}: {fault}" for fault in unfit]
                continue
        terms = measured_terms(config, name, one)
        found = spec.made.faults(terms, blocks_of(config, row.model)) + spec.made.unfit(config, row.model)
        teachers = [term["teacher"] for term in of_features(terms).values()] if EVALUATION in spec.made.least else []
        found += [
            f"split: evaluation, but features are compared with principal components of teachers.{teacher}, "
            "which are stored of training's images alone; expected split held_out or train"
            for teacher in teachers
            if config.teachers[teacher].pca
        ]
        faults += [f"measures.{one}.{fault} (on {name})" for fault in found]
    return faults


def _words_of_stop(stop: Any) -> str:
    return f"trigger {stop.trigger}" if isinstance(stop, Trigger) else "" if stop is None else str(stop)


def _faults_of_ramp(run: Run, where: str) -> list[str]:
    faults = []
    for kind in TERMS:
        steps, stop = getattr(run.ramp, kind), getattr(run.stop, kind)
        if steps is not None and isinstance(stop, Trigger):
            faults.append(
                f"{where}.ramp.{kind}: {steps} steps down to the stop, but {kind} stops by {stop.trigger}, at a step "
                "that is not known before; expected a stop at a step, or a release beside the trigger"
            )
        elif steps is not None and (stop is None or steps > stop):
            found = "never stops" if stop is None else f"stops at step {stop}"
            faults.append(f"{where}.ramp.{kind}: {steps} steps down to the stop, but {kind} {found}")
    return faults


def _faults_of_fit(config: Config, name: str, aligned: str) -> list[str]:
    """Faults of an alignment for a model, which must have the layers and heads."""
    alignment, taps = alignment_named(config, aligned), taps_of(config, name)
    at, depths = f"alignments.{aligned}", blocks(taps, "tokens")
    faults = []
    for which, term in of_features(alignment.terms).items():
        if not depths:
            faults.append(f"{at}.{alignment.path(which)}: {name} has no hidden tokens to align with features")
        elif term.depth is None and name not in MAPPINGS:
            missing = "has no published mapping, so its depth must be named"
            faults.append(f"{at}.{alignment.path(which)}.depth: {name} {missing} ({_span(depths)})")
        elif term.depth is not None and term.depth not in depths:
            faults.append(f"{at}.{alignment.path(which)}.depth: {term.depth}, but {name} has blocks {_span(depths)}")
    if alignment.attention is not None:
        faults += _faults_of_attention(config, alignment.attention, taps, name, f"{at}.attention")
    return faults


def _faults_of_attention(config: Config, term: AttentionTerm, taps: Mapping[str, Tap], name: str, at: str) -> list[str]:
    layers = blocks(taps, "attention")
    if not layers:
        return [f"{at}: {name} has no attention to align with a teacher's; align its features alone"]
    faults = _beyond(f"{at}.student_layers", term.student_layers, name, layers)
    if term.heads is not None and not faults and term.heads > (heads := heads_of(taps, term.student_layers or layers)):
        faults.append(f"{at}.heads: {term.heads}, but model {name} has {heads}")
    if term.student_layers is None and term.teacher_layers is None:
        if name not in MAPPINGS:
            return [*faults, f"{at}: {name} has no published mapping, so it needs student_layers and teacher_layers"]
        shape = teacher_shape(config.teachers[term.teacher]) if term.teacher in config.teachers else None
        if shape is not None:  # the mapping was published for 12 layers
            faults += _beyond(f"{at}.teacher_layers", MAPPINGS[name][2], term.teacher, range(shape[0]))
    return faults
