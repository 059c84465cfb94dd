"""The command line of the trainers."""

from typing import TypeVar

from skipdit.cli import friendly_errors, make_parser
from skipdit.config import load_config

T = TypeVar("T")


def read_arguments(schema: type[T], description: str, argv: list[str] | None = None) -> tuple[T, bool]:
    """Return the settings that a trainer's command line asks for, and whether it is a dry run.

    Ends the program for --help and mistakes.

    Args:
        schema: the task's settings.
        description: for `--help`.
        argv: arguments of `skipdit train`; None: those of the task's own script.
    """
    parser = make_parser(schema, description, prog=argv and "skipdit train")
    parser.add_argument("--dry-run", action="store_true", help="take two steps, print their peak memory, write nothing")
    args = parser.parse_intermixed_args(argv)
    with friendly_errors():
        return load_config(schema, args.config, args.overrides), args.dry_run
