"""What is installed, what this machine has, and what is missing for which task, each with the fix.

    skipdit doctor

Looks for downloaded checkpoints in this folder. Ends with status 1 if a package is missing that every task needs.
"""

import argparse

from skipdit.cli import Parser


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit doctor", description=__doc__)
    return parser.parse_args(argv)
