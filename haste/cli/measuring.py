"""The command that measures states."""

from __future__ import annotations

import argparse
from pathlib import Path

from haste.cli.shared import Commands, plan_of
from haste.networks.layouts import LAYOUTS


def add(to: Commands) -> None:
    """Add this command."""
    sub = to.rule("measure", _measure, "measure something of a state, or of a checkpoint from elsewhere")
    sub.add_argument("name", help="a measure of the configuration, or, with default settings, any known one")
    sub.add_argument("file", help="a state, by its file or as TRAJECTORY/STEP, or a checkpoint from elsewhere")
    sub.add_argument("--model", help="what a checkpoint from elsewhere holds (what its row or its weights say)")
    sub.add_argument("--layout", choices=LAYOUTS, help="whose checkpoint it is; SiT's and DiT's must be told")
    sub.add_argument("--alignment", help="of the configuration, to compare with where the row has none")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write what was found")


def _measure(arguments: argparse.Namespace) -> None:
    from haste.measure import jobs
    from haste.report.measures import terminal

    options = {"model": arguments.model, "layout": arguments.layout, "alignment": arguments.alignment}
    plan, asked, keep = jobs.asked(plan_of(arguments).config, arguments.name, arguments.file, **options)
    found = jobs.measure(plan, asked, keep, arguments.json)
    if found is not None:
        print(terminal(asked.label, asked.run, found), end="")
