"""Walk the dataset of a training config: what is there, what is too short, what lacks a caption, what is broken.

    skipdit data check configs/class-to-video/ucf101_scratch.yaml data.path=data/UCF101/videos
    skipdit data check configs/class-to-video/sky_scratch.yaml --good good.txt

Reads every file as training does. Ends with status 1 if anything is broken or lacks its caption. The list of good clips
or captioned pictures can be given back to training as data.clip_list or data.picture_list.
"""

import argparse
from pathlib import Path

from skipdit.cli import Parser
from skipdit.data.settings import READERS
from skipdit.utils.text import with_home


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser(prog="skipdit data", description=__doc__)
    parser.add_argument("action", choices=["check"])
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a training run; its section `data` counts")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="settings of that section to replace")
    parser.add_argument("--good", type=Path, metavar="FILE", help="write the names of the good ones, one per line")
    parser.add_argument("--quick", action="store_true", help="of every clip read the first and the last frame only")
    parser.add_argument("--decode", action="store_true", help="decode every video to its end, and count its frames")
    parser.add_argument("--workers", type=int, default=READERS, help="reading processes [%(default)s]")
    return with_home(parser.parse_intermixed_args(argv))
