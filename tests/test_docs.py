"""What the documents say is so: every key, link, command, file, rule and name in them is checked against the code."""

import argparse
import copy
import importlib
import re
import shutil
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic_core import PydanticUndefined

import haste
from haste import config
from haste.align import triggers
from haste.cli import main as cli
from haste.config.parts import TrainedText
from haste.data.captions import Captions
from haste.models.mmdit import MMDiT
from haste.networks import registry
from haste.plan.plan import Plan

ROOT = Path(haste.__file__).parent.parent
FOLDERS = ("config", "docs", "haste", "profiles", "workflow", "tests", "benchmarks")
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/**/*.md"))}
    | {ROOT / "results" / "README.md"}
)
KEYS = (ROOT / "config" / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
EXTENDING = (ROOT / "docs" / "extending.md").read_text()

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def fences(text: str, language: str = "") -> list[str]:
    """The contents of the fenced code blocks of a language, or of all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for kind, body in found if language in ("", kind)]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Everything in code font: spans, and the lines of fenced and indented blocks, without comments."""
    blocks = fences(text) + re.findall(r"^ {4,}\S.*$", prose(text), re.MULTILINE)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [*re.findall(r"`([^`\n]+)`", prose(text)), *lines]


# ---- links


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_document
def test_links_within_the_project_lead_somewhere(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    assert not broken


# ---- commands, targets, rules, files, names


def subcommands() -> set[str]:
    actions = cli.parser()._actions
    return {name for a in actions if isinstance(a, argparse._SubParsersAction) for name in a.choices}


@each_document
def test_commands_in_code_font_exist(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spans = code(path.read_text())
    commands = {match[1] for span in spans if (match := re.match(r"(?:\$ )?haste ([a-z][\w-]*)", span))}
    makes = {match[1] for span in spans if (match := re.match(r"(?:\$ )?make ([a-z][\w-]*)$", span))}
    assert commands <= subcommands()
    assert makes <= targets


def test_every_rule_stands_in_the_table_of_rules_with_a_command_that_it_calls():
    files = [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    rules = {}
    for text in (file.read_text() for file in files):
        for name, body in re.findall(r"^ *rule (\w+):(.*?)(?=^ *rule |\Z)", text, re.MULTILINE | re.DOTALL):
            called = re.search(r'shell:\s+"haste ([\w-]+)', body)
            if called:
                rules[name] = called[1]
    listed = {}
    for line in re.findall(r"^\| (`\w+`.*?) \| `haste ([\w-]+)` \|", ARCHITECTURE, re.MULTILINE):
        listed |= {name: line[1] for name in re.findall(r"`(\w+)`", line[0])}
    assert listed == rules


PLACEHOLDERS = re.compile(r"[A-Z]{3,}|\*|\(|\s")


@each_document
def test_files_in_code_font_exist(path):
    known = "|".join((*FOLDERS, "results"))
    spans = [s for s in code(path.read_text()) if re.match(rf"(?:{known})/[\w./-]+$", s)]
    # What the workflow makes is checked by the test of the whole path.
    made = ("results/",)
    missing = [s for s in spans if not s.startswith(made) and not PLACEHOLDERS.search(s) and not (ROOT / s).exists()]
    assert not missing


@each_document
def test_dotted_names_in_code_font_exist(path):
    unknown = []
    for span in code(path.read_text()):
        if re.fullmatch(r"haste(?:\.\w+)+", span) and not resolves(span):
            unknown.append(span)
    assert not unknown


def resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_room_has_its_floor_in_the_document():
    table = ARCHITECTURE.split("## Floors")[1].split("\n## ")[0]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    inside = {path.name.removesuffix(".py") for path in (ROOT / "haste").iterdir() if not path.name.startswith("__")}
    assert set(re.findall(r"`(\w+)`", rows)) == inside


@each_document
def test_documents_speak_of_the_project_alone(path):
    forbidden = r"/work/|/tmp/brief|\bsessions?\b|\bagents?\b"
    found = [line for line in path.read_text().splitlines() if re.search(forbidden, line, re.IGNORECASE)]
    assert not found


# ---- the keys of a configuration


def nested(kind) -> list[tuple[str, type]]:
    """The sections that a field can hold, with what its path gains."""
    if isinstance(kind, type) and issubclass(kind, config.Strict):
        return [("", kind)]
    if get_origin(kind) is dict:
        return [(f".NAME{more}", model) for more, model in nested(get_args(kind)[1])]
    if get_origin(kind) in (Union, types.UnionType, Annotated):
        return [found for part in get_args(kind) for found in nested(part)]
    return []


def sections(model: type = config.Config, path: str = "") -> dict[str, type]:
    """Path -> schema of every section of a configuration; "" is the top level."""
    found = {path: model}
    for name, field in model.model_fields.items():
        name = "TERM" if model is config.Stops else name  # what stops one stops the other
        if name == "evaluation":  # the keys of `images`
            continue
        for more, inner in nested(field.annotation):
            found |= sections(inner, f"{path}.{name}{more}".lstrip("."))
    return found


def rows_of(section: str) -> dict[str, list[str]]:
    """Key -> the cells after it, of the first table below a section's heading in config/README.md."""
    heading = f"### `{section}`" if section else "## Top level"
    assert f"\n{heading}\n" in KEYS, f"config/README.md has no heading {heading!r}"
    body = re.split(r"^##", KEYS.split(f"\n{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    # A word first, so that a second table below, of models or names, is not taken for keys.
    table = body.split("| Key |")[1].split("\n\n")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in lines}


# What stands beside the keys that all triggers have.
SECTIONS = sections() | {f"trigger: {name}": kind for name, kind in triggers.TRIGGERS.items()}
SECTIONS |= {f"measure: {name}": config.measure_named(name) for name in config.MEASURES}
SECTIONS |= {"condition: captions": Captions.Settings, "architecture: mmdit": MMDiT.Settings}
SECTIONS |= {"condition.encoder.trained": TrainedText}
each_section = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section or "top")
FIELDS = [(path, name) for path, model in SECTIONS.items() for name in model.model_fields]
each_key = pytest.mark.parametrize(("section", "key"), FIELDS, ids=lambda part: part or "top")


@each_section
def test_the_document_has_every_key_of_the_schema_and_no_other(section):
    rows = rows_of(section)
    assert list(rows) == list(SECTIONS[section].model_fields)
    for key, cells in rows.items():
        assert len(cells) == 4 and cells[0] and cells[3].endswith("."), key


def bounds(kind, metadata=()) -> list:
    """The bounds within an annotation: of a value, or of a list's members. A list's own length is not asked for."""
    found = [bound for item in metadata for bound in getattr(item, "metadata", [item])]
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return found + bounds(inner, more)
    if get_origin(kind) in (Union, types.UnionType, list):
        found += [bound for part in get_args(kind) for bound in bounds(part)]
    return found


def limits(field) -> set[str]:
    """The bounds of a field, as the document writes them."""
    found = bounds(field.annotation, field.metadata)
    has = {name: getattr(b, name) for b in found for name in ("ge", "gt", "le", "lt") if hasattr(b, name)}
    if {"ge", "le"} <= set(has):
        return {f"{has['ge']:g} to {has['le']:g}"}
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return {f"{signs[name]} {'2^63' if value == 2**63 else format(value, 'g')}" for name, value in has.items()}


@each_key
def test_type_range_and_default_are_those_of_the_schema(section, key):
    field = SECTIONS[section].model_fields[key]
    kind, default = rows_of(section)[key][:2]
    written = set(re.findall(r"[≥>≤<] [\d.^]+|\b\d+ to \d+\b", kind))
    spread = {"stop": {"≥ 0"}, "ramp": {"≥ 2"}} if section == "runs.NAME" else {}  # one number for a section
    assert written == spread.get(key, limits(field))
    choices = [value for part in alternatives(field.annotation) for value in get_args(part)]
    if choices:
        assert set(re.findall(r"`([^`]+)`", kind)) == {str(choice) for choice in choices}
    if field.default is PydanticUndefined:
        assert default == "required"
    elif isinstance(field.default, config.Stops | config.Ramps):
        assert default == "`null`"
    elif isinstance(field.default, config.Strict):
        assert default == "see below"
    else:
        value = yaml.safe_load(default.strip("`"))
        assert default.startswith("`") and config.number(value) == field.default


def alternatives(kind) -> list:
    """The Literals within an annotation."""
    if get_origin(kind) is Literal:
        return [kind]
    if get_origin(kind) in (Union, types.UnionType, Annotated):
        return [found for part in get_args(kind) for found in alternatives(part)]
    return []


# ---- what a change recomputes

BASE = {
    "name": "base",
    "images": {"source": "folder", "path": "a", "resolution": 32, "classes": 10, "holdout": 300},
    "evaluation": {"path": "b"},
    "autoencoder": {"trained": {"steps": 2}},
    "teachers": {"small": {"trained": {"steps": 2}}, "big": {"trained": {"steps": 3}}},
    "detector": {"cnn": {"trained": {"steps": 2}}},
    "models": {"dot": {"depth": 4, "width": 64, "heads": 4, "patch_size": 2}},
    "alignments": {
        "both": {
            "features": {"teacher": "small", "depth": 2},
            "attention": {"teacher": "small", "student_layers": [1], "teacher_layers": [2], "heads": 2},
        },
        "other": {
            "features": {"teacher": "small", "depth": 3},
            "attention": {"teacher": "small", "student_layers": [1], "teacher_layers": [2], "heads": 2},
        },
    },
    "sampling": {"one": {}, "two": {"steps": 9}},
    "measures": {
        "cosine": {"measure": "gradient-cosine"},
        "another": {"measure": "gradient-cosine", "images": 9, "alignment": "both"},
    },
    "runs": {
        "run": {
            "model": "dot",
            "alignment": "both",
            "stop": {"features": 6, "attention": 6},
            "milestones": [8, 16],
            "sampling": ["one"],
            "measures": ["cosine"],
        }
    },
}
CAPTIONED = {
    **{key: BASE[key] for key in ("name", "autoencoder", "teachers", "detector", "sampling")},
    "images": {**BASE["images"], "captions": "said.csv"},
    "condition": {"name": "captions", "encoder": "words"},
    "models": {"dot": {"architecture": "says", "width": 8}},
    "runs": {"run": {"model": "dot", "milestones": [8, 16], "sampling": ["one"]}},
}
PUBLIC = {
    **BASE,
    "autoencoder": {"pretrained": {"encode": "a"}},
    "teachers": {"small": {"pretrained": {"name": "DINO-B"}}, "big": {"pretrained": {"name": "CLIP-B/16"}}},
    "detector": {"cnn": {"pretrained": {"name": "DINOv2-B"}}},
}
NAMES = {
    "teachers": "small",
    "detector": "cnn",
    "models": "dot",
    "alignments": "both",
    "sampling": "one",
    "measures": "cosine",
    "runs": "run",
    "evaluate": "file",
    "forks": "fork",
}
OTHER = {
    "name": "another",
    "title": "x",
    "description": "x",
    "results": "elsewhere",
    "images.path": "b",
    "images.labels": "labels.csv",
    "images.captions": "said.csv",
    "images.crop": "centre-lanczos",
    "images.reader": "adm",
    "images.stored_as": "webp",
    "condition: captions.encoder": "elsewhere/clip",
    "condition.encoder.trained.heads": 8,
    "condition.encoder.trained.patch": 8,
    "condition: captions.attention_mask": True,
    "condition: captions.cache": False,
    "sampling.NAME.split": "train",
    "sampling.NAME.prompts": ["a red bus"],
    "images.resolution": 64,
    "images.on_bad_image": "skip",
    "autoencoder.trained.factor": 4,
    "autoencoder.trained.width": 40,
    "autoencoder.pretrained.encode": "b",
    "autoencoder.pretrained.factor": 4,
    "autoencoder.pretrained.decode": "b",
    "teachers.NAME.pretrained.name": "DINOv2-B",
    "teachers.NAME.pretrained.weights": "b",
    "teachers.NAME.trained.heads": 8,
    "teachers.NAME.trained.width": 128,
    "teachers.NAME.trained.patch": 8,
    "teachers.NAME.cache": "features",
    "detector.NAME.trained.width": 64,
    "detector.NAME.pretrained.name": "inception",
    "detector.NAME.reference": str(ROOT / "LICENSE"),
    "detector.NAME.pretrained.weights": "b",
    "models.NAME.heads": 8,
    "models.NAME.width": 128,
    "models.NAME.patch_size": 4,
    "architecture: mmdit.heads": 4,
    "architecture: mmdit.width": 32,
    "architecture: mmdit.patch_size": 4,
    "architecture: mmdit.qk_norm": "rms",
    "alignments.NAME.features.teacher": "big",
    "alignments.NAME.features.similarity": "nt-xent",
    "alignments.NAME.features.negatives": "batch",
    "alignments.NAME.features.negative_count": 9,
    "alignments.NAME.features.head": "conv",
    "alignments.NAME.features.normalise": "spatial",
    "alignments.NAME.features.normalise_factor": 0.5,
    "teachers.NAME.filter.low_pass": 0.25,
    "alignments.NAME.attention.teacher": "big",
    "alignments.NAME.attention.student_layers": [2],
    "alignments.NAME.attention.teacher_layers": [1],
    "training.betas": [0.8, 0.9],
    "training.path": "cosine",
    "training.timesteps.distribution": "lognormal",
    "training.precision": "bf16",
    "training.nonfinite": "skip",
    "training.flip": True,
    "training.time_dtype": "fp32",
    "runtime.device": "cpu",
    "runtime.compile": True,
    "runtime.deterministic": False,
    "runtime.compress_gradients": "bf16",
    "runtime.checkpoint_blocks": True,
    "runtime.trackers": [],
    "runtime.keep_every": 5,
    "sampling.NAME.preset": "ode-50",
    "sampling.NAME.sampler": "heun",
    "sampling.NAME.guided_channels": 3,
    "sampling.NAME.interval": [0.1, 0.9],
    "sampling.NAME.labels": "balanced",
    "sampling.NAME.pixels": "round",
    "sampling.NAME.weights": "model",
    "sampling.NAME.precision": "tf32",
    "sampling.NAME.decoder_precision": "fp16",
    "detector.NAME.split": "held_out",
    "autoencoder.dtype": "float32",
    "runs.NAME.model": "SiT-S/2",
    "runs.NAME.alignment": "other",
    "runs.NAME.milestones": [4, 16],
    "runs.NAME.sampling": ["one", "two"],
    "runs.NAME.training": {"lr": 0.5},
    "runs.NAME.measures": ["another"],
    "evaluate.NAME.measures": ["another"],
    "measures.NAME.alignment": "other",
    "forks.NAME.at": [2, 5],
    "forks.NAME.seeds": [0],
    "forks.NAME.sampling": ["two"],
    "forks.NAME.measures": ["cosine"],
    "measure: denoising.weights": "model",
    "measure: denoising.t": [0.3],
    "measure: progress.t": [0.3],
    **{f"measure: {name}.weights": "ema" for name in ("progress", "cost")},
    "measure: gradient-cosine.weights": "ema",
    "measure: gradient-cosine.t": [0.3],
    "measure: gradient-cosine.blocks": [1],
    "measure: cknna.teacher": "big",
    "measure: cknna.formula": "centred",
    "measure: probe.split": "evaluation",
    "measure: attention-maps.teacher": "big",
    "measure: attention-maps.pairs": [[1, 0]],
    **{f"measure: {name}.split": "train" for name in ("cknna", "denoising", "pca", "attention-maps", "progress")},
    **{f"measure: {name}.weights": "model" for name in ("cknna", "probe", "pca", "attention-maps")},
    **{f"measure: {name}.layers": [1] for name in ("cknna", "probe", "pca")},
    **{f"measure: {name}.beside": ["big"] for name in ("cknna", "probe", "pca")},
    **{f"measure: {name}.t": [0.3] for name in ("cknna", "probe", "pca", "attention-maps")},
    "runs.NAME.warm_start.file": str(ROOT / "LICENSE"),
    "runs.NAME.warm_start.classes": "new",
    "evaluate.NAME.checkpoint": str(ROOT / "README.md"),
    "evaluate.NAME.model": "SiT-S/2",
    "evaluate.NAME.sampling": ["one", "two"],
    "evaluate.NAME.path": "cosine",
    "evaluate.NAME.weights": "model",
    "evaluate.NAME.layout": "REPA",
    "evaluate.NAME.method": "x",
    "runs.NAME.seeds": [1, 2],
    "runs.NAME.watch": [{"trigger": "plateau"}],
    "runs.NAME.stop.features": 7,
    "runs.NAME.stop.attention": 7,
    "runs.NAME.ramp.features": 3,
    "runs.NAME.ramp.attention": 3,
    "runs.NAME.ramp.shape": "linear",
    "trigger: plateau.slow": 0.9999,
    "trigger: gradient-angle.times": [0.3],
    "trigger: gradient-angle.of": "own",
}
# A key with one value, and one that changes only together with another.
ONE_VALUE = {
    **{"images.source": "images", "teachers.NAME.pca": "states", "models.NAME.architecture": "states"},
    **{"runs.NAME.stop.TERM.trigger": "states", "measures.NAME.measure": "measures"},
    **{"condition": "latents", "training.process": "states", "forks.NAME.run": "nothing"},
}
# Keys that only go with another.
NT_XENT = {"similarity": "nt-xent", "negatives": "batch"}
BESIDE = {
    "detector.NAME.reference": {"trained": None, "pretrained": {"name": "inception"}},
    "sampling.NAME.rtol": {"sampler": "dopri5"},
    "sampling.NAME.atol": {"sampler": "dopri5"},
    "sampling.NAME.eta": {"sampler": "ddim"},
    "training.time_dtype": {"precision": "bf16"},
    "training.timesteps.mu": {"distribution": "lognormal"},
    "training.timesteps.s": {"distribution": "lognormal"},
    "runs.NAME.ramp.shape": {"features": 3},
    "runs.NAME.warm_start.file": {"file": str(ROOT / "README.md")},
    "runs.NAME.warm_start.classes": {"file": str(ROOT / "README.md")},
    "measures.NAME.alignment": {"alignment": "both"},
    **{f"forks.NAME.{key}": {"run": "run", "at": [3], "for": 2} for key in config.Fork.model_fields},
    "alignments.NAME.features.temperature": NT_XENT,
    "alignments.NAME.features.negatives": {"similarity": "nt-xent"},
    "alignments.NAME.features.negative_count": NT_XENT,
    "alignments.NAME.features.kernel": {"head": "conv"},
    "alignments.NAME.features.normalise_factor": {"normalise": "spatial"},
    "teachers.NAME.filter.low_pass": {"low_pass": 0.5},
}
# What a measure cannot do without in this configuration.
MEASURED: dict = {
    "cknna": {"images": 200, "teacher": "small"},
    "attention-maps": {"teacher": "small", "pairs": [[0, 0]]},
}
ORDER = ("images", "latents", "states", "samples", "scores", "measures")


def names(raw: dict, trained: bool) -> dict[str, str]:
    """What a configuration calls its images, latents, and one state (which nobody names if it is not trained here) with
    its samples, their score, and what is measured of it."""
    plan = Plan(config.resolve(raw))
    rows = [r for r in plan.rows if r.evaluation.sampling_name == "one"]
    row = next(r for r in rows if (r.step == 16 if trained else r.run == "file"))
    found = (plan.images.folder, plan.latents.folder, plan.path(row.evaluation.state) if trained else "")
    measured = [one.measurement.file for one in plan.measured if one.measurement.state == row.evaluation.state]
    found = (*found, row.evaluation.folder, row.evaluation.score, "".join(measured))
    return {kind: path.removeprefix(plan.root) for kind, path in zip(ORDER, found, strict=True)}


def changed(section: str, key: str) -> tuple[dict, dict]:
    """A configuration, and the same with one key changed."""
    captions = section.startswith(("condition", "architecture: ")) or f"{section}.{key}" in (
        "sampling.NAME.split",
        "sampling.NAME.prompts",
    )
    before = copy.deepcopy(CAPTIONED if captions else PUBLIC if "pretrained" in section else BASE)
    if section.startswith("evaluate"):
        row = {"checkpoint": str(ROOT / "LICENSE"), "model": "dot", "sampling": ["one"], "step": 3}
        before["evaluate"] = {"file": row}
    full = f"{section}.{key}".lstrip(".")
    if full == "measures.NAME.alignment":  # for rows that have none
        before["runs"]["run"] |= {"alignment": "vanilla", "stop": None}
    section_of(before, section).update(BESIDE.get(full, {}))
    after = copy.deepcopy(before)
    place = section_of(after, section)
    value = place.get(key, SECTIONS[section].model_fields[key].default) or 0
    place[key] = OTHER[full] if full in OTHER else value + 1 if isinstance(value, int) else value / 2 or 0.25
    return before, after


def section_of(raw: dict, section: str) -> dict:
    """A section of a configuration, made where it is not there."""
    if section.startswith(("trigger: ", "runs.NAME.stop.TERM")):
        stops = raw["runs"]["run"]["stop"]
        if not isinstance(stops["features"], dict):
            stops["features"] = {"trigger": section.removeprefix("trigger: ").replace("runs.NAME.stop.TERM", "plateau")}
        return stops["features"]
    if section.startswith("condition: "):
        return raw["condition"]
    if section == "condition.encoder.trained" and raw["condition"]["encoder"] == "words":
        raw["condition"]["encoder"] = {"trained": {"steps": 2}}
    if section.startswith("architecture: "):
        raw["models"]["dot"] = {"architecture": "mmdit", "depth": 2, "width": 16, "heads": 2}
        return raw["models"]["dot"]
    if section.startswith("measure: "):
        kind = section.removeprefix("measure: ")
        if raw["measures"]["cosine"]["measure"] != kind:
            raw["measures"]["cosine"] = {"measure": kind, **MEASURED.get(kind, {})}
        return raw["measures"]["cosine"]
    path = section.split(".") if section else []
    for owner, part in zip(["", *path], path, strict=False):
        raw = raw.setdefault(NAMES[owner] if part == "NAME" else part, {})
    return raw


@each_key
def test_a_change_of_a_key_recomputes_what_the_document_says(section, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files from elsewhere are remembered in the results folder
    monkeypatch.setitem(config.DENOISERS, "says", "captioned:Says")
    cell = rows_of(section)[key][2]
    number_or_section = SECTIONS[section] is config.Stops or key == "encoder"  # or a name, or a section
    if (nested(SECTIONS[section].model_fields[key].annotation) and not number_or_section) or key == "defaults":
        assert cell == "", "a section recomputes nothing by itself, its keys do"
        return
    full = f"{section}.{key}".lstrip(".")
    if full in ONE_VALUE:
        assert cell == ONE_VALUE[full]
        return
    before, after = (names(raw, trained=not section.startswith("evaluate")) for raw in changed(section, key))
    first = next((what for what in ORDER if before[what] != after[what]), "nothing")
    assert cell == first


# ---- examples


def test_the_example_has_the_trunk_the_branches_and_the_cost_that_the_documents_say():
    (text,) = fences(KEYS, "yaml")
    plan = Plan(config.resolve(yaml.safe_load(text)))
    segments = [plan.segment(state) for state in plan.planned()]
    assert len({s.state.trajectory for s in segments}) == 3
    # (makes, of the trunk, from, losses), as the table of docs/architecture.md has them
    table = re.findall(r"^\| (\d+) \| (trunk|branch[^|]*) \| (\d+) \| ([\w, ]+) \|$", ARCHITECTURE, re.MULTILINE)
    said = sorted(
        (int(to), where == "trunk", int(start), len(losses.split(", "))) for to, where, start, losses in table
    )
    trunk = plan.state("never", 400000).trajectory
    found = [(s.state.step, s.state.trajectory == trunk, s.start, 1 + len(s.terms)) for s in segments]
    assert said == sorted(found)
    assert sum(s.state.step - s.start for s in segments) == 660_000
    for trajectory in plan.trajectories:
        assert trajectory.rpartition("-")[0] + "-HASH" in ARCHITECTURE


def test_the_table_of_ones_own_in_the_readme_trains_and_samples_as_the_papers_do(tmp_path):
    shutil.copy(ROOT / "config" / "imagenet256.yaml", tmp_path)
    (text,) = fences((ROOT / "README.md").read_text(), "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    plan = Plan(config.resolve(config.read(tmp_path / "mine.yaml")), ahead=True)
    assert {row.run for row in plan.rows} == {"vanilla", "REPA", "HASTE-100K"}
    assert {row.evaluation.sampling_name for row in plan.rows} == {"sde-250"}
    for run in plan.config.runs:
        recipe = plan.trajectories[plan.state(run, 50000).trajectory].recipe
        training = recipe["training"]
        assert (training["lr"], training["batch"], training["ema"], training["precision"]) == (
            1e-4,
            256,
            0.9999,
            "bf16",
        )
    aligned = plan.segment(plan.state("HASTE-100K", 50000)).terms
    assert aligned["attention"]["student_layers"] == config.MAPPINGS["SiT-B/2"][1]


def test_the_published_mappings_in_the_document_are_those_of_the_code():
    rows = re.findall(
        r"^\| `([SD]iT-\w+/2|MM-DiT)` \| (\d+) \| (\d+) \| ([\d, ]+) \| ([\d, ]+) \|$", KEYS, re.MULTILINE
    )
    layers = {name: (int(depth), *(yaml.safe_load(f"[{x}]") for x in pair)) for name, depth, _, *pair in rows}
    assert layers == config.MAPPINGS
    assert {name: int(alone) for name, _, alone, *_ in rows} == config.REPA_DEPTH


def test_the_table_of_teachers_has_all_of_the_code_with_their_input_norm_and_normalisation():
    table = KEYS.split("| Known names |")[1].split("\n\n")[0]
    said = {}
    for row in table.splitlines()[2:]:
        names, pixels, features, norm, *_ = row.strip("| ").split(" | ")
        for name in re.findall(r"`([^`]+)`", names):
            said[name] = (pixels, features.split()[0] == "after", norm.partition(":")[0])
    norms = {registry.IMAGENET: "ImageNet", registry.CLIP: "CLIP", registry.HALF: "0.5"}
    assert said == {k: (f"{x.size} px", x.final_norm, norms[x.norm]) for k, x in config.TEACHERS.items()}


def test_the_tables_that_extensions_go_into_are_where_the_document_says_and_agree_with_the_schema():
    rows = re.findall(r"^\| \[[\w ]+\]\(#[\w-]+\) \| `([^`]+)` \| `(\w+)` \| (.*?) ?\|$", EXTENDING, re.MULTILINE)
    assert len(rows) == 11
    tables = {name: resolved(f"{file.removesuffix('.py').replace('/', '.')}.{name}") for file, name, _ in rows}
    schema = {name: cell.strip("`") for _, name, cell in rows}
    for name in ("SAMPLERS", "SOURCES"):
        model, key = schema[name].split(".")
        assert set(get_args(getattr(config, model).model_fields[key].annotation)) == set(tables[name])
    assert [name for name, cell in schema.items() if cell] == ["SAMPLERS", "SOURCES"]


def resolved(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_functions_that_extending_names_beside_a_file_are_in_that_file():
    pairs = re.findall(r"`(\w+)` in `((?:haste|workflow)/[\w./]+)`", EXTENDING + ARCHITECTURE)
    pairs += [
        (name.split(".")[-1], "haste/plan/plan.py") for name in re.findall(r"`(Plan\.\w+)`", EXTENDING + ARCHITECTURE)
    ]
    assert len(pairs) >= 6
    missing = [(name, file) for name, file in pairs if not re.search(rf"\b{name}\b", (ROOT / file).read_text())]
    assert not missing


def test_the_profile_has_the_keys_that_the_document_explains_and_no_other():
    text = ARCHITECTURE.split("## Why Snakemake is set up like this")[1].split("\n## ")[0]
    spans = re.findall(r"^- `([\w-]+: [^`]+)`", text, re.MULTILINE)
    profile = yaml.safe_load((ROOT / "profiles" / "default" / "config.yaml").read_text())
    said = {key: value for span in spans for key, value in yaml.safe_load(span).items()}
    cosmetic = {"show-failed-logs", "printshellcmds"}
    assert said == {key: value for key, value in profile.items() if key not in cosmetic}


def test_the_citation_is_whole_and_of_the_same_licence_as_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= set(citation)
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert [r["identifiers"][0]["value"] for r in citation["references"]] == ["arXiv:2505.16792", "arXiv:2410.06940"]
