"""What the groups of commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from haste.cli.examples import EXAMPLES

if TYPE_CHECKING:
    from haste.plan.plan import Plan

DEFAULT_CONFIG = "config/digits.yaml"
AN_ID = "hub:OWNER/NAME/PATH names a file of the hub"


class _Help(argparse.HelpFormatter):
    """argparse's own, but an example keeps its lines, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


class Commands:
    """Adds subcommands, each with the function that it runs."""

    def __init__(self, commands: Any):
        self.commands = commands

    def command(self, name: str, run: Callable[[argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        """A subcommand of this name, described by `words`."""
        sub = self.commands.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            epilog=f"example:\n  haste {name} {EXAMPLES[name]}",
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        return sub

    def rule(self, name: str, run: Callable[[argparse.Namespace], None], words: str) -> argparse.ArgumentParser:
        """A subcommand that works on one configuration."""
        sub = self.command(name, run, words)
        sub.add_argument("-c", "--config", default=DEFAULT_CONFIG, help=f"configuration file ({DEFAULT_CONFIG})")
        return sub


def shards(sub: argparse.ArgumentParser) -> Any:
    """Ask which part of a store to make; returns the group, for further parts."""
    part = sub.add_mutually_exclusive_group(required=True)
    part.add_argument("--shard", type=int, help="make this shard, counted from 0")
    part.add_argument("--join", action="store_true", help="check all shards and write the manifest")
    return part


def plan_of(arguments: argparse.Namespace, ahead: bool = False) -> Plan:
    """What the configuration asks for, also while external files are not there, if `ahead`."""
    from haste import config
    from haste.plan.plan import Plan

    return Plan(config.load(arguments.config), ahead=ahead)


def plan_to_compute(arguments: argparse.Namespace, gpu: bool = True) -> Plan:
    """What the configuration asks for; torch computes with as many threads as it says, on a GPU of its own unless what
    is computed needs none."""
    plan = plan_of(arguments)
    if gpu:
        take_gpus(plan)
    import torch

    torch.set_num_threads(plan.config.runtime.threads)
    return plan


def take_gpus(plan: Plan, count: int = 1) -> None:
    """Take GPUs of this machine for this process until it ends, before torch looks for them."""
    from haste.cluster import gpus

    if plan.config.runtime.device != "cpu":
        gpus.take(count, plan.config.runtime.jobs_per_gpu)
