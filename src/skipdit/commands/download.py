"""Fetch released checkpoints, and what their pipelines need, from the Hugging Face Hub.

    skipdit download class-to-image                      # everything for the task, into checkpoints/
    skipdit download class-to-video --only ffs sky       # some of it
    skipdit download text-to-video --dry-run             # only list it
    skipdit download text-to-image                       # into ckpts/, as the released code has it

The same command again continues where an interrupted one stopped, and skips what is there.
"""

import argparse
from pathlib import Path

from skipdit.checkpoints.catalogue import TASKS
from skipdit.cli import Parser
from skipdit.utils.text import with_home


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser(
        "skipdit download",
        description=__doc__,
        epilog="\n".join(
            f"{task}:\n" + "\n".join(f"{' *'[item.optional]} {name:<18}{item}" for name, item in items.items())
            for task, items in TASKS.items()
        )
        + "\n\n* only where --only names it",
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--dir", type=Path, help="folder for the files [checkpoints; of text-to-image: ckpts]")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="fetch only these, see below")
    parser.add_argument("--dry-run", action="store_true", help="list what would be fetched, without a connection")
    return with_home(parser.parse_args(argv))
