"""Commands that train, and that see to training jobs of a cluster."""

from __future__ import annotations

import argparse
import sys

from haste.cli.shared import Commands, plan_of, take_gpus


def add(to: Commands) -> None:
    """Add these commands."""
    train = to.rule("train", _train, "train up to a state, continuing from the newest one on the way")
    train.add_argument("state", help="TRAJECTORY/STEP")
    slurm = "as a job of the SLURM cluster with these resources (docs/slurm.md): submit it, or attach to the one there"
    train.add_argument("--slurm", nargs="*", metavar="KEY=VALUE", help=slurm)
    train.add_argument("--terminal", type=int, metavar="FD", help="file descriptor for messages to a person")
    to.rule("fetch", _fetch, "load weights that the configuration names by hub id into this machine's caches")
    cancel = to.rule("cancel", _cancel, "end the cluster's training jobs of a run; what is saved stays")
    cancel.add_argument("name", help="a run of the configuration, or TRAJECTORY/STEP")


def _train(arguments: argparse.Namespace) -> None:
    plan = plan_of(arguments)
    if arguments.slurm is not None:
        from haste.cluster import job, waiter

        try:
            waiter.make(plan, plan.parse(arguments.state), job.resources(arguments.slurm), arguments.terminal)
        except waiter.Detached as left:
            print(f"haste train: {left}", file=sys.stderr)
            sys.exit(130)
        return
    take_gpus(plan, plan.config.runtime.processes)
    from haste.train.launch import launch
    from haste.train.loop import Interrupted

    try:
        launch(plan, plan.parse(arguments.state))
    except Interrupted as stop:
        print(f"haste train: {stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(143)  # as a process that TERM ended


def _fetch(arguments: argparse.Namespace) -> None:
    from haste.cluster.fetch import fetch

    line = ""
    for line in fetch(plan_of(arguments, ahead=True)):
        print(line, flush=True)
    if not line:
        print("nothing to fetch: the configuration names no weights by hub id")


def _cancel(arguments: argparse.Namespace) -> None:
    from haste.cluster import queue

    for line in queue.cancel(plan_of(arguments), arguments.name):
        print(line)
