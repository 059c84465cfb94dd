"""Short for `skipdit weights convert`: a checkpoint to a folder for `from_pretrained`."""

import argparse
import sys

from skipdit.commands import weights


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    return weights.read_arguments(["convert", *(sys.argv[1:] if argv is None else argv)])
