"""From a file or a mapping to a `Config`: YAML, defaults and presets merged into rows, all checks. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from haste.config.faults import faults_of
from haste.config.forks import branched, faults_of_forks
from haste.config.keys import expanded, nearest
from haste.config.schema import PRESETS, TERMS, Config, Run, for_both
from haste.config.words import explain, told

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OCTAL = re.compile(r"[-+]?0[0-9_]")
MEASURED = "denoising"  # the measure that forks take unless they name others
MOST_ENTRIES = 1_000_000  # in a configuration, with aliases expanded
EXTENDS = "extends"
OWN = ("name", "title", "description", "runs", "evaluate", "forks")  # what makes a table: not taken from another file


class _Once(yaml.SafeLoader):
    """A loader that refuses a duplicate key in one mapping; YAML would silently take the last.

    It also refuses what YAML 1.1 takes for something else than was written: a run called `no` is False, `12:30` is 750
    and `010` is 8.

    A few lines of nested aliases can expand to more entries than fit into memory, and an alias may refer to itself:
    both are refused before anything is built from them.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: yaml.Node, known: dict[int, int]) -> int:
        """The number of entries of a node, with aliases expanded."""
        if id(node) in known:
            if not known[id(node)]:
                raise ValueError(f"line {node.start_mark.line + 1}: the value that begins here refers to itself")
            return known[id(node)]
        number = isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS
        if number and (":" in node.value or _OCTAL.match(node.value)):
            raise self._misread(node)
        known[id(node)], parts = 0, node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(self._count(one, known) for one in inner)
        if known[id(node)] > MOST_ENTRIES:
            found = f"{known[id(node)]:,} entries with its aliases written out"
            raise ValueError(f"line {node.start_mark.line + 1}: found {found}, expected at most {MOST_ENTRIES:,}")
        return known[id(node)]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose keys are each there once, and are what they look like."""
        # Checked as written: later, `<<` merges in keys that may be overridden.
        node = super().compose_mapping_node(anchor)
        assert node is not None
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = self._name(key), key.start_mark.line + 1
                if name != key.value:
                    raise self._misread(key)
                if name in lines:
                    raise ValueError(f"line {line}: key {name!r} is already on line {lines[name]}; expected it once")
                lines[name] = line
        return node

    def _misread(self, node: yaml.Node) -> ValueError:
        where, found = f"line {node.start_mark.line + 1}: {node.value}", repr(self.construct_object(node))
        return ValueError(f"{where} is {found} in YAML, hardly what is meant; write it in quotes, or otherwise")

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
    except ValueError:  # not JSON, or a duplicate key: JSON is also YAML, whose loader knows the line
        return yaml.load(text, _Once)


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a configuration file (YAML or JSON), with those of the file that it extends below them.

    `resolve` checks them. The tables of the other file are not taken: its `name`, `title`, `description`, `runs`,
    `evaluate` and `forks`.

    Raises:
        ValueError: the file, or one that it extends, is missing, not YAML, not a mapping, or has a duplicate key; the
            message names the file, and the key with its line. Or a file extends itself.
    """
    return _extended(Path(path), [])


def _extended(path: Path, through: list[Path]) -> dict[str, Any]:
    raw = _contents(path)
    base = raw.pop(EXTENDS, None)
    if base is None:
        return raw
    if not (isinstance(base, str) and base):
        raise ValueError(
            f"{path}: extends: expected the path of a configuration, from this file's folder; found {base!r}"
        )
    through = [*through, path.resolve()]
    try:
        below = path.parent / expanded(base)
        if below.resolve() in through:
            raise ValueError(f"{base} leads back to itself, expected a file that stands alone in the end")
        found = _extended(below, through)
    except ValueError as error:
        raise ValueError(f"{path}: extends: {error}") from error
    return _merged({key: value for key, value in found.items() if key not in OWN}, raw)


def _merged(below: Any, above: Any) -> Any:
    """Two values of a key: mappings are merged key by key, of all else the upper one holds."""
    if not (isinstance(below, dict) and isinstance(above, Mapping)):
        return above
    first = {key: _merged(below.get(key), value) for key, value in above.items()}
    return first | {key: value for key, value in below.items() if key not in first}


def of_workflow(raw: Mapping[str, Any], files: Iterable[str | Path]) -> dict[str, Any]:
    """What a workflow was given, with what its files extend.

    Args:
        raw: Snakemake's own reading: its files, the later ones over the others, and `--config` over all.
        files: those files.

    Raises:
        ValueError: as `read`.
    """
    found: dict[str, Any] = {}
    for path in files:
        found = _merged(found, read(path))
    return _merged(found, {key: value for key, value in raw.items() if key != EXTENDS})


def _contents(path: Path) -> dict[str, Any]:
    try:
        raw = _parsed(path.read_text(encoding="utf-8"))
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
    """The configuration that a workflow's job was submitted with, even if the file was edited since.

    Args:
        raw: the current contents of the file, of which the name and the results folder are used.

    Raises:
        ValueError: the resolved configuration that the workflow's start wrote there cannot be read.
    """
    return load(Path(expanded(str(raw.get("results", "results"))), str(raw.get("name")), "config.json"))


def resolve(raw: Mapping[str, Any]) -> Config:
    """Check a configuration, merge its `defaults` into every row of `runs`, and add the branches of its forks there.

    Layers that an alignment omits stay open: `terms_of` takes them from the published mapping of the row's model.
    The result resolves to itself, so it can be written to a file and read again.

    Raises:
        ValueError: one line per fault: its full path, what was found, what was expected.
    """
    written = _plain(raw)
    raw, whole = _with_defaults(written)
    faults = _faults_of_defaults(written.get("defaults"))
    try:
        config = Config.model_validate(_with_evaluation(_with_measures(_with_presets(raw))))
    except ValidationError as error:
        raise ValueError(told([*faults, *(explain(one, whole) for one in error.errors())], written)) from None
    if faults := faults or faults_of(config) or faults_of_forks(config):
        raise ValueError(told(faults, written))
    if not config.forks:
        return config
    config = branched(config)
    if faults := faults_of(config):
        raise ValueError(told(faults, written))
    return config


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data, as in a file: Snakemake passes subclasses of dict."""
    try:
        text = json.dumps(raw, default=str, ensure_ascii=False)
        text.encode()  # half a surrogate pair is text that no file can hold
        return json.loads(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"the configuration: {error}") from error
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the configuration: {error}") from error  # a date as a key, or too deeply nested lists


def _with_defaults(raw: dict[str, Any]) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """Merge the defaults into the rows, and expand values given for several keys.

    Returns:
        The configuration, and run and key of each `stop` and `ramp` that was given once for all terms.
    """
    defaults = raw.get("defaults") or {}
    if not (isinstance(raw.get("runs"), dict) and isinstance(defaults, dict)):
        return raw, set()
    _check_defaults(defaults)
    rows = {
        name: _seeded(_over(defaults, row or {})) for name, row in raw["runs"].items() if isinstance(row or {}, dict)
    }
    whole = {(name, key) for name, row in rows.items() for key in ("stop", "ramp") if for_both(row.get(key, {}))}
    alignments = raw.get("alignments")
    rows = {name: _spread(row, alignments if isinstance(alignments, dict) else {}) for name, row in rows.items()}
    return {**raw, "defaults": {}, "runs": {**raw["runs"], **rows}}, whole


def _with_presets(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the presets that rows name and the configuration does not define; an entry of that name overrides keys."""
    sampling = raw.get("sampling", {})
    rows = [
        row for kind in ("runs", "forks", "evaluate") if isinstance(raw.get(kind), dict) for row in raw[kind].values()
    ]
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


def _with_measures(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the measure of forks, if the configuration does not define it."""
    forks, measures = raw.get("forks"), raw.get("measures", {})
    if not (isinstance(forks, dict) and isinstance(measures, dict)):
        return raw
    used = [fork.get("measures", [MEASURED]) for fork in forks.values() if isinstance(fork, dict)]
    wanted = any(MEASURED in names for names in used if isinstance(names, list))
    return {**raw, "measures": {MEASURED: {"measure": MEASURED}, **measures}} if wanted else raw


def _with_evaluation(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete the images that only measures see: they have the size and the classes of the others, and no holdout."""
    images, others = raw.get("images"), raw.get("evaluation")
    if not (isinstance(images, dict) and isinstance(others, dict)):
        return raw
    like = {key: images[key] for key in ("resolution", "classes") if key in images}
    return {**raw, "evaluation": {**like, "holdout": 0, **others}}


def _over(defaults: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row on top of the defaults; sections in both, such as `training` and `stop`, are merged key by key."""
    both = {key for key in defaults if isinstance(defaults[key], dict) and isinstance(row.get(key), dict)}
    both -= {key for key in both if for_both(defaults[key]) or for_both(row[key])}
    other = {"seed": "seeds", "seeds": "seed"}  # a row's own seed or seeds override the defaults' seeds or seed
    hidden = {other[key] for key in other if key in row and other[key] not in row}
    kept = {key: value for key, value in defaults.items() if key not in hidden}
    return {**kept, **row, **{key: {**defaults[key], **row[key]} for key in both}}


def _spread(row: dict[str, Any], alignments: Mapping[str, Any]) -> dict[str, Any]:
    """Expand a `stop` or `ramp` given for all terms to the terms of the row's alignment."""
    name = row.get("alignment", "vanilla")
    terms = alignments.get(name) if isinstance(name, str) else None
    if not isinstance(terms, dict):
        return row
    for key in ("stop", "ramp"):
        if isinstance(row.get(key), int | dict) and for_both(row[key]):
            each = {kind: row[key] for kind in TERMS if terms.get(kind) is not None}
            row = {**row, key: each or row[key]}
    return row


def _seeded(row: dict[str, Any]) -> dict[str, Any]:
    """If only `seeds` is given, `seed` is its first."""
    seeds = row.get("seeds")
    return {**row, "seed": seeds[0]} if isinstance(seeds, list) and seeds and "seed" not in row else row


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    for key in defaults:
        if key not in Run.model_fields:
            raise ValueError(f"defaults.{key}: unknown key{nearest(key, Run.model_fields)}")


def _faults_of_defaults(defaults: Any) -> list[str]:
    """What no row could take from the defaults, also where all rows override it; rows may complete their sections."""
    if not isinstance(defaults, dict):
        return []
    try:
        Run.model_validate(_seeded(defaults))
    except ValidationError as error:
        whole = {("defaults", key) for key in ("stop", "ramp") if for_both(defaults.get(key, {}))}
        found = [one for one in error.errors() if one["type"] not in ("missing", "value_error")]
        lines = [explain({**one, "loc": ("runs", "defaults", *one["loc"])}, whole) for one in found]
        return [line.removeprefix("runs.") for line in lines]
    return []
