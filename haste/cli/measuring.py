"""The commands that measure states, and that replay the triggers of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from haste.cli.shared import AN_ID, Commands, plan_of, take_gpus
from haste.networks.layouts import LAYOUTS


def add(to: Commands) -> None:
    """Add these commands."""
    sub = to.rule("measure", _measure, "measure something of a state, or of a checkpoint from elsewhere")
    sub.add_argument("name", help="a measure of the configuration, or, with default settings, any known one")
    sub.add_argument(
        "file", help=f"a state, by its file or as TRAJECTORY/STEP, or a checkpoint from elsewhere; {AN_ID}"
    )
    sub.add_argument("--model", help="the model in a checkpoint from elsewhere (that of its row or its weights)")
    sub.add_argument("--layout", choices=LAYOUTS, help="the project whose layout it has; required for SiT's and DiT's")
    sub.add_argument("--alignment", help="of the configuration, to compare with where the row has none")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    sub.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write its pictures, if it leaves any, as PNG files"
    )
    again = to.rule(
        "replay", _replay, "say when triggers with other settings would have stopped a run, without training"
    )
    again.add_argument("name", nargs="?", metavar="RUN", help="a run of the configuration")
    again.add_argument("--seed", type=int, help="one of its seeds (the first)")
    again.add_argument("--readings", type=Path, metavar="FILE", help="a CSV table of cosines, in place of a run")
    again.add_argument("--model", help="whose cosines, of a table of several models")
    values = "TRIGGER.KEY=VALUE,..."
    again.add_argument("--set", nargs="+", default=[], metavar=values, help="settings to replay; all combinations")
    again.add_argument("--out", type=Path, metavar="FILE", help="draw the readings and the stops: an .svg or a .png")


def _replay(arguments: argparse.Namespace) -> None:
    from haste.ops import replay, sources
    from haste.report.replay import draw, terminal

    if (arguments.name is None) == (arguments.readings is None):
        raise ValueError("expected a run of the configuration, or --readings FILE")
    name = arguments.name or arguments.model or str(arguments.readings)
    if arguments.readings is None:
        plan = plan_of(arguments)
        found = sources.of_run(plan, name, sources.seed_of(plan, name, arguments.seed))
    else:
        found = sources.published(arguments.readings, arguments.model)
    said = replay.outcomes(found, replay.grid(arguments.set))
    print(terminal(name, said), end="")
    if arguments.out is not None:
        draw(name, said, arguments.out)
        print(f"{arguments.out}: drawn")


def _measure(arguments: argparse.Namespace) -> None:
    from haste.measure import jobs
    from haste.measure.pictures import Picture, write
    from haste.report.measures import terminal

    options = {"model": arguments.model, "layout": arguments.layout, "alignment": arguments.alignment}
    plan, asked, keep = jobs.asked(plan_of(arguments).config, arguments.name, arguments.file, **options)
    if not Path(asked.file).exists():
        take_gpus(plan)
    found = jobs.measure(plan, asked, keep, arguments.json)
    if found is None:
        return
    print(terminal(asked.label, asked.run, found), end="")
    shown = [Picture.read(asked.file, entry) for entry in found.get("pictures", [])]
    if arguments.pictures is not None:
        for file in write(shown, arguments.pictures, asked.label):
            print(f"{file}: written")
    elif shown:
        print(f"{len(shown)} pictures: --pictures FOLDER writes them")
