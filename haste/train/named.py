"""The state or checkpoint that a command's FILE names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from haste.config import MODELS
from haste.files.provenance import read_header
from haste.models.exchange import open_weights
from haste.networks.hub_files import local
from haste.plan.names import State
from haste.plan.outside import Outside
from haste.plan.plan import Plan


def file_named(outside: Outside, given: Path | str) -> str:
    """The file on this machine that a command is given by its path or an id of the hub's. An id that the configuration
    names is of the commit that its row is of, whatever the main branch is by now; TRAJECTORY/STEP stays as it is.

    Raises:
        ValueError: it cannot be fetched, or is damaged.
    """
    return str(local(outside.files.get(str(given), given)))


def state_named(plan: Plan, file: str) -> State | None:
    """The state of the plan with this name or file; None for a file that is none of its states.

    Raises:
        ValueError: neither a file, nor a state of the plan.
    """
    path = Path(file)
    if not path.exists() and file.rpartition("/")[0] not in plan.trajectories:
        states = [str(row.evaluation.state) for row in plan.rows if row.run == file]
        named = f" ({file} is a run, whose results are of {', '.join(states)})" if states else ""
        expected = "a state of the configuration, by its file or as TRAJECTORY/STEP, or a checkpoint from elsewhere"
        raise ValueError(f"{file}: no such file; expected {expected}{named}")
    if not path.exists():
        return plan.parse(file)
    try:
        header = read_header(path)
        state = plan.parse(f"{header.get('trajectory')}/{header['step']}")
    except (ValueError, IsADirectoryError):  # not one of our states
        return None
    return state if Path(plan.path(state)).exists() and path.samefile(plan.path(state)) else None


def run_through(plan: Plan, state: State) -> str:
    """A run that passes through a state."""
    return next(
        run
        for (run, _), pieces in plan.pieces.items()
        if any(piece.trajectory == state.trajectory and piece.holds(state.step) for piece in pieces)
    )


def put_row(raw: dict[str, Any], plan: Plan, file: str, model: str | None, layout: str | None) -> str:
    """Put a row that evaluates a checkpoint into a configuration, unless it has one. Returns its name.

    Args:
        raw: the configuration, to be resolved.
        plan: of the same before.
        file: the checkpoint, as `file_named` says.
        model: its model; None is that of its weights.
        layout: whose file it is; None detects it.
    """
    for known, spec in plan.config.evaluate.items():
        own = Path(plan.data.outside.files[spec.checkpoint])
        if own.exists() and own.samefile(file):
            return known
    name = Path(file).name
    while name in raw["runs"] or name in raw["evaluate"]:
        name += "'"
    sampling = next(iter(plan.config.sampling), "ode-50")  # nothing is sampled, but a row needs one
    row = {"checkpoint": file, "model": model or _model_of(plan, file, layout), "sampling": [sampling], "step": 0}
    raw["evaluate"][name] = row if layout is None else {**row, "layout": layout}
    return name


def _model_of(plan: Plan, file: str, layout: Any) -> str:
    """The model of a checkpoint, from its weights."""
    shape = open_weights(file, layout=layout).shape
    known = {**MODELS, **plan.config.models}
    for name, model in known.items():
        alike = model.architecture == shape.get("architecture", "sit")
        if alike and model.settings.items() <= shape.items():
            return name
    raise ValueError(f"{file}: of no model of this configuration or of the papers; expected one, or --model")
