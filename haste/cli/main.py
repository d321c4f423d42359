"""The command `haste`: one subcommand a rule of the workflow, and a few for people.

Exit codes: 0 done, 2 refused (bad input; one message, no traceback, nothing lost), 1 a fault of ours (traceback).

The files of this room parse and hand over: what a command does is in the room that it belongs to, and is imported when
the command runs, so that `haste plan` and `haste --help` answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys

from haste.cli import data, judging, measuring, people, training
from haste.cli.shared import Commands


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn refusals into messages. Returns the exit code."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    _mark(arguments)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("HASTE_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 128 + signal.SIGPIPE
        print(f"haste {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    return 0


def _reader_left() -> bool:
    """Whether nobody reads the output any more, as in `haste status | head`."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
    return True


def _mark(arguments: argparse.Namespace) -> None:
    """Note which job of a cluster works for which stage of a workflow.

    Who only waits for another job, and the report, which Snakemake makes itself, may be in the job that Snakemake runs
    in: its hours are no stage's.
    """
    file, command = getattr(arguments, "config", None), arguments.command
    beside = command == "report" or getattr(arguments, "slurm", None) is not None
    if "SLURM_JOB_ID" not in os.environ or not isinstance(file, str) or beside:
        return
    from haste.cluster import accounting

    stage = {"evaluate": "score", "targets": "pca" if getattr(arguments, "fit", False) else "targets"}
    accounting.mark(file, stage.get(command, command))


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(
        prog="haste",
        description="Diffusion transformers trained with representation alignment that stops at the right moment.",
        epilog="Set HASTE_TRACEBACK=1 to see where a refusal comes from.",
    )
    to = Commands(found.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    for group in (people, data, training, judging, measuring):
        group.add(to)
    return found
