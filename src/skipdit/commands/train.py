"""Train a model: from scratch, or in two stages onto one without long skips.

    skipdit train --config configs/class-to-image/fashion_stage1.yaml out=results/mine
    torchrun --nproc-per-node 8 -m skipdit train --config configs/class-to-video/ucf101_scratch.yaml
    skipdit train new --data pictures/       # configs for files of your own: skipdit train new --help

The same command again continues an interrupted run.
"""

import argparse

from skipdit.cli import friendly_errors
from skipdit.commands import train_new
from skipdit.tasks import take_task
from skipdit.training.arguments import read_arguments as read_training


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return task, settings and `dry_run`, of `argv` or the program's own; ends the program for --help and mistakes."""
    if argv and argv[0] == "new":
        return train_new.read_arguments(argv[1:])
    task, rest = take_task("skipdit train", __doc__, argv)
    config, dry_run = read_training(task.part("settings").TrainingConfig, __doc__, rest)
    return argparse.Namespace(task=task, config=config, dry_run=dry_run)


@friendly_errors()
def main(args: argparse.Namespace) -> None:
    if isinstance(args, train_new.Arguments):
        from skipdit.training.new import main as write_configs  # brings torch

        return write_configs(args)
    args.task.train(args.config, args.dry_run)
    if not args.dry_run:
        from skipdit.training.prepare import tell_next_step  # brings torch

        tell_next_step(args.config)
