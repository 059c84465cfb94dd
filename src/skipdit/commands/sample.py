"""Sample from a model, with or without a cache: images or clips of classes, or from prompts.

    skipdit sample --config configs/class-to-image/demo.yaml --cache N2-1000-20-o1
    skipdit sample --config configs/text-to-video/demo.yaml --prompt "a police car"
    torchrun --nproc-per-node 8 -m skipdit sample --config configs/class-to-image/imagenet256_sample_50k.yaml

Writes the samples, an overview of the first ones, and report.json. The same command again continues an interrupted run;
any number of processes makes the same samples, to rounding.
"""

import argparse

from skipdit.cli import friendly_errors
from skipdit.tasks import take_task


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return task and settings, of `argv` or the program's own; ends the program for --help and mistakes."""
    task, rest = take_task("skipdit sample", __doc__, argv)
    return argparse.Namespace(task=task, config=task.part("settings").read_arguments(__doc__, rest))


@friendly_errors()
def main(args: argparse.Namespace) -> None:
    args.task.sample(args.config)
