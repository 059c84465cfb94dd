"""The command line of the trainers."""

from typing import TypeVar

from skipdit.cli import friendly_errors, make_parser
from skipdit.config import load_config
from skipdit.sampling.arguments import add_original_switches

T = TypeVar("T")
ORIGINAL = {  # switches of the original trainers -> settings
    "ckpt": "init",
    "data-path": "data.path",
    "image-size": "data.image_size",
    "model": "model.name",
    "num-classes": "model.num_classes",
    "results-dir": "out",
    "vae": "vae=stabilityai/sd-vae-ft-{0}",
    "global-batch-size": "train.batch_size",
    "global-seed": "train.seed",
    "lr": "train.lr",
    "max-training-steps": "train.steps",
    "num-workers": "train.workers",
    "log-every": "train.log_every",
    "ckpt-every": "train.save_every",
}


def read_arguments(schema: type[T], description: str, argv: list[str] | None = None) -> tuple[T, bool]:
    """Return the settings that a trainer's command line asks for, and whether it is a dry run.

    Ends the program for --help and mistakes.

    Args:
        schema: the task's settings.
        description: for `--help`.
        argv: arguments of `skipdit train`; None: those of the task's own script.
    """
    parser = make_parser(schema, description, prog=argv and "skipdit train")
    add_original_switches(parser, ORIGINAL, {}, flags={})
    parser.add_argument("--dry-run", action="store_true", help="take two steps, print their peak memory, write nothing")
    args = parser.parse_intermixed_args(argv)
    with friendly_errors():
        return load_config(schema, args.config, args.first + args.overrides), args.dry_run
