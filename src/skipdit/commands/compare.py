"""The same samples with several caches: a table of speed and fidelity, and pictures to look at.

    skipdit compare --config configs/class-to-image/demo.yaml
    skipdit compare --config configs/text-to-video/demo.yaml --also configs/text-to-video/demo_plan.json

Rows: the uncached run, and per interval: cached steps that reuse the stored feature (order 0), cached steps that
extrapolate it (order 1), and simply fewer steps at the same cost. Every row starts from the same noise. A stochastic
sampler draws more of it in every step: there fewer steps make another image, and their PSNR means nothing.

Takes a sampler's config; writes compare.png (per row, samples and, amplified, what differs from the uncached ones) and
compare.json into its `out`, and of clips compare.gif: a line per row, all in motion.
"""

import argparse

from skipdit.cli import Parser, at_least, friendly_errors
from skipdit.tasks import read_settings
from skipdit.utils.shipped import found


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit compare", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of a sampler's settings")
    parser.add_argument("--task", help="class-to-image ... [the name of the config's folder]")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 4], help="cache intervals [2 3 4]")
    parser.add_argument("--branch", type=at_least(0), default=1, help="cache branch [%(default)s]")
    parser.add_argument(
        "--also", action="append", default=[], metavar="SPEC", help="another cache, or plan FILE.json; may come again"
    )
    parser.add_argument(
        "--repeats", type=at_least(1), default=1, help="times to run each row; medians are shown [%(default)s]"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    args = parser.parse_intermixed_args(argv)
    args.also = [found(spec) for spec in args.also]
    with friendly_errors():
        read_settings(args)
    return args
