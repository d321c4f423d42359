"""Commands for people: what will run, what runs, what lies on disk, and weights in and out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from haste.cli.shared import AN_ID, DEFAULT_CONFIG, Commands, plan_of
from haste.networks.layouts import LAYOUTS
from haste.plan.machines import SHARE


def add(to: Commands) -> None:
    """Add these commands."""
    fresh = to.command("new", _new, "write a configuration for your own pictures that fits this machine")
    fresh.add_argument("folder", type=Path, help="pictures: a folder, a .zip or .tar, or .parquet files")
    fresh.add_argument("-o", "--out", type=Path, metavar="FILE", help="the file to write (config/FOLDER.yaml)")
    fresh.add_argument("--small", action="store_true", help="small networks trained here, on GPUs too: no internet")
    before = to.rule("plan", _plan, "say what will run, how long, and how much disk and memory, before anything runs")
    before.add_argument("--as", dest="machine", metavar="NxGPU", help="times and memory on these GPUs, such as 8xH100")
    before.add_argument("--share", type=float, default=SHARE, help=f"of their peak that is reached ({SHARE})")
    to.rule("memory", _memory, "measure how much GPU memory training takes, without a GPU")
    live = to.rule("status", _status, "say what every run is doing now")
    live.add_argument(
        "-w", "--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="refresh until Ctrl-C (every 5 s)"
    )
    to.rule("track", _track, "write curves, scores and stops of all rows to runtime.trackers, as far as they lack them")
    forget = to.rule("forget", _forget, "remove what only one run needs")
    forget.add_argument("name", metavar="RUN")
    clear = to.command("prune", _prune, "remove what no configuration needs")
    clear.add_argument("-c", "--config", nargs="+", default=[DEFAULT_CONFIG], help="configuration files to keep")
    for sub in (forget, clear):
        sub.add_argument("--yes", action="store_true", help="do it; without this, only say what would go")
    what = "state, store, samples, grid, score, part, report, configuration, or weights from elsewhere"
    to.command("show", _show, f"say how a file was made: {what}").add_argument("file", type=Path, help=AN_ID)
    to.rule("table", _table, "print the result table of a finished report")
    when = to.rule(
        "suggest-stop", _suggest, "say when forks, gradient angles and losses would stop a run, and how sure"
    )
    when.add_argument("name", metavar="RUN")
    _add_exchange(to)


def _add_exchange(to: Commands) -> None:
    words = "make a checkpoint of REPA, HASTE, SiT, DiT, diffusers or this package a file of weights of ours"
    took = to.command("import", _import, words)
    took.add_argument(
        "file", type=Path, help=f"a .pt of REPA, HASTE, SiT or DiT, a .ckpt, a state, or diffusers' folder; {AN_ID}"
    )
    took.add_argument("out", type=Path, help="the .safetensors file to write")
    gave = to.command("export", _export, "write the weights of a state for other programs")
    gave.add_argument("file", type=Path, help=f"a state, or any file that can be imported; {AN_ID}")
    gave.add_argument("out", type=Path, help="the file to write, for diffusers a folder")
    form = "bare weights, REPA's .pt, or the folder of a DiT or MM-DiT that diffusers loads"
    gave.add_argument("--format", choices=("safetensors", "repa", "diffusers"), required=True, help=form)
    gave.add_argument("--vae", type=Path, help="for diffusers: the folder of an AutoencoderKL to put into it")
    gave.add_argument("--weights", choices=("ema", "model"), default="ema", help="which, for safetensors (ema)")
    for sub in (took, gave):
        sub.add_argument(
            "--layout", choices=LAYOUTS, help="the project whose layout it has; required for SiT's and DiT's"
        )
        size = sub.add_mutually_exclusive_group()
        size.add_argument("--model", help="the model that the weights must be of, such as SiT-XL/2")
        size.add_argument("--heads", type=int, help="attention heads, for sizes that were not published")
        sub.add_argument("--input-size", type=int, help="side of the latent grid, where the file does not show it")


def _new(arguments: argparse.Namespace) -> None:
    from haste.ops import new

    print("\n".join(new.write(arguments.folder, arguments.out, arguments.small)))


def _plan(arguments: argparse.Namespace) -> None:
    from haste.ops import plan
    from haste.plan import machines

    machine = machines.machine(arguments.machine, arguments.share) if arguments.machine else None
    plan.print_plan(plan_of(arguments, ahead=True), machine, arguments.config)


def _memory(arguments: argparse.Namespace) -> None:
    from haste.ops import memory

    memory.show(plan_of(arguments, ahead=True))


def _status(arguments: argparse.Namespace) -> None:
    from haste.ops import status

    status.show(lambda: plan_of(arguments), arguments.watch)


def _track(arguments: argparse.Namespace) -> None:
    from haste.train import trackers

    trackers.update(plan_of(arguments))


def _forget(arguments: argparse.Namespace) -> None:
    from haste import config
    from haste.ops import prune

    prune.forget(config.load(arguments.config), arguments.name, arguments.yes)


def _prune(arguments: argparse.Namespace) -> None:
    from haste import config
    from haste.ops import prune

    prune.prune([config.load(path) for path in arguments.config], arguments.yes)


def _show(arguments: argparse.Namespace) -> None:
    from haste.ops import show

    show.print_provenance(arguments.file)


def _table(arguments: argparse.Namespace) -> None:
    from haste.report import gather, page

    plan = plan_of(arguments)
    print(page.text(gather.report(plan)))
    print(f"Report: {plan.report}")


def _suggest(arguments: argparse.Namespace) -> None:
    from haste.report import suggest

    print(suggest.text(plan_of(arguments), arguments.name), end="")


def _import(arguments: argparse.Namespace) -> None:
    from haste.models import exchange

    found = exchange.import_weights(arguments.file, arguments.out, **_told(arguments))
    size = {name: value for name, value in found.shape.items() if name != "architecture"}
    shape = ", ".join(f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in size.items())
    print(f"{arguments.out}: {' and '.join(found.weights)} of {arguments.file} ({found.layout}'s layout; {shape})")


def _export(arguments: argparse.Namespace) -> None:
    from haste.models import exchange

    form = {"form": arguments.format, "which": arguments.weights, "vae": arguments.vae}
    exchange.export_weights(arguments.file, arguments.out, **form, **_told(arguments))
    print(f"{arguments.out}: written")


def _told(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said of a file of weights."""
    from haste.config import MODELS

    if arguments.model is not None and arguments.model not in MODELS:
        raise ValueError(f"--model {arguments.model!r}: expected one of {', '.join(MODELS)}")
    options = {"layout": arguments.layout, "heads": arguments.heads, "input_size": arguments.input_size}
    return {**options, "model": MODELS.get(arguments.model)}
