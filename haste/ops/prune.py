"""Files that no configuration needs, the cost of making them again, and their removal. No torch.

A configuration needs what its plan names, plus the rolling states on the way to a state that it still lacks. All other
files of the workflow in the results folder may be removed. Files with foreign names are left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from haste import config
from haste.config import Config
from haste.files import artefact, journal, locks, provenance, terminal, units
from haste.files.provenance import STATE_NAME
from haste.files.units import readable
from haste.ops.status import ROOMS, number, size_of
from haste.plan.names import Artefact, Piece, State
from haste.plan.plan import Plan
from haste.train import stops
from haste.train.stops import Stopped

_MADE = re.compile(r"[a-z]+-[0-9a-f]{12}$")  # KIND-HASH, names of stores and parts
_DRAWN = re.compile(r".+\.[0-9a-f]{8}$")  # TRAJECTORY.STEP.HASH, names of sets of samples
_TRAJECTORY = re.compile(r".+-s\d+-[0-9a-f]{12}$")
_SCORE = re.compile(r".+[.-][0-9a-f]{8,12}\.json$")


@dataclasses.dataclass(frozen=True)
class Item:
    """A file or a whole folder that may be removed; seconds: the time of making it, None if it was not recorded."""

    path: Path
    what: str
    size: int
    seconds: float | None


# -- what is needed ----------------------------------------------------------------------------------------------------


def named(plan: Plan) -> set[Path]:
    """Every file and folder that a plan names, except states. New kinds are found without a change here."""
    found: set[Path] = set()
    stack: list[Any] = [*map(vars, plan.image_sets), plan.config.model_dump(), plan.shown]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            found |= {Path(value)} if value.startswith(f"{plan.root}/") else set()
        elif isinstance(value, Artefact):
            found.add(Path(value.folder))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            stack += [getattr(value, field.name) for field in dataclasses.fields(value)]
        elif isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            stack += list(value)
    return found


def states_needed(plan: Plan) -> set[Path]:
    """States that a plan requests, starts from or names as files, and rolling ones on the way to missing states."""
    needed, root = set[Path](), Path(plan.root).resolve()
    for file in plan.identities:  # a checkpoint to evaluate or to start from may be a state of this folder
        path = Path(file).resolve()
        needed |= {Path(plan.root, path.relative_to(root))} if path.is_relative_to(root) else set()
    for run, seed in plan.pieces:  # where a trigger stopped a term, the state is kept like those at other stops
        steps = {step for one in _stops(plan, run, seed) for step in (one.step, one.ends)}
        needed |= {Path(plan.path(plan.state(run, step, seed))) for step in steps}
    for state in plan.planned():
        needed.add(Path(plan.path(state)))
        if state.step in plan.on_disk(state.trajectory):
            continue
        segment = plan.segment(state)
        if segment.parent:
            needed.add(Path(plan.path(segment.parent)))
        way = range(segment.start + 1, state.step + 1)
        folder = Path(plan.root, "states", state.trajectory)
        rolling = [path for path in folder.glob("rolling/step-*") if (m := STATE_NAME.match(path.name))]
        needed |= {path for path in rolling if (m := STATE_NAME.match(path.name)) and int(m[1]) in way}
    return needed


def _stops(plan: Plan, run: str, seed: int) -> Iterable[Stopped]:
    return stops.along(plan, run, seed).values()


@dataclasses.dataclass(frozen=True)
class Needs:
    """What several configurations need: files and folders, states, and trajectories, whose logs their curves show."""

    paths: frozenset[Path]
    states: frozenset[Path]
    trajectories: frozenset[str]

    @classmethod
    def of(cls, plans: Iterable[Plan]) -> Needs:
        """The needs of several configurations' plans over one results folder."""
        paths, states, trajectories = set[Path](), set[Path](), set[str]()
        for plan in plans:
            paths |= named(plan)
            states |= states_needed(plan)
            # A piece that begins after a run's last milestone needs nothing.
            trajectories |= {
                p.trajectory for owner, ps in plan.pieces.items() for p in ps if _is_used(plan, owner[0], p)
            }
        return cls(frozenset(paths), frozenset(states), frozenset(trajectories))

    @functools.cached_property
    def _above(self) -> frozenset[Path]:
        return frozenset(parent for path in self.paths for parent in path.parents)

    def has(self, path: Path) -> bool:
        """Whether a folder or file is needed: itself, a folder that contains it, or something in it."""
        return path in self.paths or path in self._above or not self.paths.isdisjoint(path.parents)


def _is_used(plan: Plan, run: str, piece: Piece) -> bool:
    return piece.low < plan.config.runs[run].milestones[-1]


def recorded(root: Path) -> dict[str, Plan]:
    """The plans of the configurations that were run in a results folder, by name, even if the folder was moved.

    Raises:
        ValueError: one cannot be read, so that its needs are unknown.
    """
    found = {}
    for path in sorted(root.glob("*/config.json")):
        if path.parent.name in ROOMS:
            continue
        try:
            plan = Plan(config.resolve({**config.read(path), "results": str(root)}))
        except ValueError as error:
            raise ValueError(
                f"{path}: cannot be read, so its needs are unknown. Fix it, or remove {path.parent} "
                f"if its results are no longer wanted. ({error})"
            ) from error
        found[plan.config.name] = plan
    return found


def other_plans(given: Sequence[Config]) -> list[Plan]:
    """Plans of the configurations that were run in the given ones' results folder, except the given ones."""
    root = Path(given[0].results)
    names = {one.name for one in given}
    others = [plan for name, plan in recorded(root).items() if name not in names]
    return others + [one for plan in [*others, *map(Plan, given)] for one in _at_other_contents(plan)]


def _at_other_contents(plan: Plan) -> list[Plan]:
    """The plan with what the images' source held at other times: what was made from that is kept."""
    source = plan.data.source
    return [] if source is None else [Plan(plan.config, one) for one in source.contents if one != source.content]


# -- what may be removed -----------------------------------------------------------------------------------------------


def unneeded(root: Path, needs: Needs, only: Needs | None = None) -> list[Item]:
    """The workflow's files in a results folder that are not needed.

    Args:
        root: the results folder.
        needs: what stays.
        only: restricts the result to what is in here; None does not.
    """
    found = [
        path
        for pattern in ("stores/*", "parts/*", "samples/*", "features/*/*", "measures/*/*")
        for path in root.glob(pattern)
    ]
    ours = [path for path in found if path.is_dir() and _is_ours(path, root)]
    jsons = [path for pattern in ("scores/*.json", "measures/*/*.json") for path in root.glob(pattern)]
    ours += [path for path in jsons if _SCORE.match(path.name) and not path.parent.is_symlink()]
    gone = [path for path in sorted(ours) if not needs.has(path) and (only is None or only.has(path))]
    items = [Item(path, path.relative_to(root).parts[0], size_of_any(path), _seconds(root, path)) for path in gone]
    for folder in sorted(path for path in root.glob("states/*") if path.is_dir()):
        if not folder.is_symlink() and (only is None or folder.name in only.trajectories):
            items += _states(folder, needs, only)
    return items


def _is_ours(path: Path, root: Path) -> bool:
    """Whether a folder has a name of the workflow. Foreign files stay, and so do links, which lead elsewhere."""
    room = path.relative_to(root).parts[0]
    pattern = {"samples": _DRAWN, "features": re.compile(r"[^.].*-")}.get(room, _MADE)
    return bool(pattern.match(path.name)) and not path.is_symlink()


def size_of_any(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return size_of(path) if path.is_dir() else path.stat().st_size


def _states(folder: Path, needs: Needs, only: Needs | None) -> list[Item]:
    """A trajectory: as a whole if no run passes through it, otherwise its unneeded states.

    In a trunk that others share, only the states in `only`: those on the way may still serve the others.
    """
    if folder.name not in needs.trajectories and not any(folder in state.parents for state in needs.states):
        if not _TRAJECTORY.match(folder.name):
            return []
        seconds = sum(number(record, "seconds") or 0.0 for record in journal.read(folder / "log.jsonl"))
        return [Item(folder, "states", size_of(folder), seconds)]
    files = [path for path in sorted(folder.glob("step-*")) + sorted(folder.glob("rolling/step-*"))]
    gone = [path for path in files if STATE_NAME.match(path.name) and path not in needs.states]
    gone = [path for path in gone if only is None or path in only.states]
    return [Item(path, "states", path.stat().st_size, _training_seconds(folder, path, needs)) for path in gone]


def _training_seconds(folder: Path, path: Path, needs: Needs) -> float:
    """The time of training from the nearest state that stays up to this one."""
    match = STATE_NAME.match(path.name)
    assert match
    step = int(match[1])
    kept = [int(m[1]) for state in needs.states if state.parent == folder and (m := STATE_NAME.match(state.name))]
    low = max((s for s in kept if s < step and (folder / State(folder.name, s).file).exists()), default=0)
    return sum(number(record, "seconds") or 0.0 for record in journal.read(folder / "log.jsonl", low, step))


def _seconds(root: Path, path: Path) -> float | None:
    """The time of the jobs whose benchmark files carry an artefact's name or key."""
    key = path.parent.name if path.parent.parent.name == "features" else path.stem if path.is_file() else path.name
    keys = {key, key.rpartition("-")[2]} if _MADE.search(key) else {key}
    found = []
    for bench in root.glob("*/benchmarks/*.tsv"):
        if any(one in bench.stem for one in keys):
            with contextlib.suppress(OSError, ValueError, IndexError):
                found.append(float(bench.read_text().splitlines()[-1].split("\t")[0]))
    return sum(found) if found else _said(path)


def _said(path: Path) -> float | None:
    """The time recorded in an artefact, summed over its shards; None if one of them has no record."""
    files = [path] if path.is_file() else [*path.glob("part.json"), *path.glob("shard-*.npz")]
    found: list[float | None] = []
    for file in files:
        with contextlib.suppress(ValueError, OSError):
            header = provenance.provenance_of(file)
            found.append(header.get("provenance", header).get("seconds"))
    known = [seconds for seconds in found if isinstance(seconds, int | float)]
    return sum(known) if known and len(known) == len(files) else None


# -- removal -----------------------------------------------------------------------------------------------------------


def in_use(items: Sequence[Item]) -> dict[Path, Path]:
    """Item -> a file in it that another process of this machine holds open."""
    where = {item.path.resolve(): item.path for item in items}
    found: dict[Path, Path] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        if link.parts[2] == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            target = Path(os.readlink(link))
            found |= {where[path]: target for path in (target, *target.parents) if path in where}
    return found


def remove(root: Path, items: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """Remove items, holding the results folder's lock, and that of a trajectory.

    A folder is first renamed to a temporary name, which no reader opens and the next start of the workflow sweeps away:
    wherever removal is interrupted, nothing half-deleted is ever taken for whole.

    Returns:
        The removed items, and a line for each item that stayed because another process holds it.

    Raises:
        ValueError: a workflow is running in the results folder.
    """
    gone, stayed = [], []
    with _alone(root):
        held = in_use(items)
        for item in items:
            if item.path in held:
                stayed.append(f"{item.path}: left as it is: a process has {held[item.path].name} open")
                continue
            try:
                with _trajectory_lock(root, item.path):
                    _check_nobody_makes(item.path)
                    _remove(item.path)
            except ValueError as error:
                stayed.append(f"{item.path}: left as it is: {error}")
                continue
            gone.append(item)
        artefact.sweep(root / "states")  # leftovers of an earlier removal; no trainer writes there
        for folder in (*root.glob("features/*"), *root.glob("measures/*")):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    return gone, stayed


def _alone(root: Path) -> Any:
    """The lock that every workflow in the folder shares, held alone."""
    if (file := locks.attempt(root / ".lock")) is None:
        found = [one.who for path in sorted(root.glob("*/.lock")) if (one := locks.holder(path))]
        who = " and by ".join(found) or "another process"
        raise locks.InUse(f"The results folder {root} is in use by {who}. Wait for it, or stop it first.")
    return file


def _check_nobody_makes(path: Path) -> None:
    """Refuse what a job that outlived its workflow still makes, perhaps on another machine."""
    for lock in [path.parent / ".locks" / path.name, *path.rglob(".locks/*")]:
        if lock.is_file():
            locks.acquire(lock, str(path)).close()


@contextlib.contextmanager
def _trajectory_lock(root: Path, path: Path) -> Iterator[None]:
    inner = path.relative_to(root).parts
    if inner[0] != "states":
        yield
        return
    with locks.holding(Path(root, *inner[:2], "lock"), f"trajectory {inner[1]}"):
        yield


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = artefact.aside_of(path)
    os.replace(path, aside)
    for name in ("manifest.json", "part.json", "trajectory.json"):  # first the file that marks the rest as complete
        (aside / name).unlink(missing_ok=True)
    shutil.rmtree(aside)


# -- commands ----------------------------------------------------------------------------------------------------------


def prune(given: Sequence[Config], yes: bool) -> None:
    """Show what neither the given configurations nor others in their results folder need, and with `yes` remove it.

    Raises:
        ValueError: configurations of several results folders; a recorded one that cannot be read; with `yes`, a
            running workflow.
    """
    roots = {one.results.rstrip("/") for one in given}
    if len(roots) > 1:
        raise ValueError(f"results: found {' and '.join(sorted(roots))}, expected one results folder at a time")
    root = Path(roots.pop())
    others = other_plans(given)
    plans = [*(Plan(one) for one in given), *others]
    items = unneeded(root, Needs.of(plans))
    _refuse_strangers(root, Needs.of(plans), yes)
    _carry_out(root, items, yes, [plan.config.name for plan in plans])


def forget(given: Config, run: str, yes: bool) -> None:
    """Show what only one run of a configuration needs, and with `yes` remove it.

    Raises:
        ValueError: no such run, in the file or in the configuration that was last run here; otherwise as `prune`.
    """
    root = Path(given.results)
    before = recorded(root).get(given.name)
    known = [given, *([before.config] if before else [])]
    owner = next((one for one in known if run in {*one.runs, *one.evaluate}), None)
    if owner is None:
        names = sorted({name for one in known for name in (*one.runs, *one.evaluate)})
        raise ValueError(f"run {run!r}: not in this configuration, which has {', '.join(names)}")
    rest = _rows_of(given, lambda name: name != run)
    plans = [*([Plan(rest)] if rest.runs or rest.evaluate else []), *other_plans([given])]
    items = unneeded(root, Needs.of(plans), Needs.of([Plan(_rows_of(owner, lambda name: name == run))]))
    _carry_out(root, items, yes, [plan.config.name for plan in plans])
    if owner is given and items:
        Console().print(
            Text(f"{run} is still a row of {given.name}: the next run of the workflow would make it again.")
        )


def _rows_of(one: Config, wanted: Callable[[str], bool]) -> Config:
    """A configuration reduced to some of its rows."""
    rows = {kind: {n: row for n, row in getattr(one, kind).items() if wanted(n)} for kind in ("runs", "evaluate")}
    return one.model_copy(update=rows)


def _refuse_strangers(root: Path, needs: Needs, yes: bool) -> None:
    """Refuse to remove while a trajectory of an unknown configuration is trained: it reads stores unknown here too."""
    for lock in root.glob("states/*/lock"):
        if lock.parent.name in needs.trajectories:
            continue
        holder = locks.holder(lock)
        if holder is not None and holder.at_work:
            raise ValueError(
                f"{lock.parent}: of no configuration given or recorded here, but being trained: {holder.who}. "
                "Name its configuration too, or wait for it."
            )
        if yes:  # the trainer may be on another machine; only the lock itself shows it
            with locks.holding(lock, f"trajectory {lock.parent.name}, of no configuration given or recorded here,"):
                pass


def _again(items: Sequence[Item]) -> str:
    known = [item.seconds for item in items if item.seconds is not None]
    unknown = len(items) - len(known)
    rest = f"an unknown time for {unknown} of {len(items)} items" if unknown else ""
    return " and ".join(word for word in (units.duration(sum(known)) if known else "", rest) if word)


def _carry_out(root: Path, items: Sequence[Item], yes: bool, kept: Sequence[str]) -> None:
    console, rows = terminal.console(), []
    for item in items:
        took = "not known" if item.seconds is None else units.duration(item.seconds)
        rows.append((str(item.path.relative_to(root)), readable(item.size), took))
    if not items:
        console.print(Text(f"In {root} there is nothing that is not needed by {', '.join(kept) or 'anybody'}."))
        return
    title = f"In {root}, not needed by {', '.join(kept) or 'anybody'}"
    heads = [("what", False), ("bytes", True), ("making it took", True)]
    console.print(*terminal.fitted(heads, rows, console.width, title=title), sep="\n")
    total = sum(item.size for item in items)
    if not yes:
        console.print(f"{len(items)} items, {readable(total)}: a dry run, nothing was removed. --yes removes them.")
        console.print(f"To make them again would take {_again(items)}.")
        return
    gone, stayed = remove(root, items)
    for line in stayed:
        console.print(line, markup=False, highlight=False)
    console.print(f"{len(gone)} items, {readable(sum(item.size for item in gone))} removed.")
