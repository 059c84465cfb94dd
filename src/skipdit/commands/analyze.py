"""The paper's analyses of a model's features, on the states that its task's sampler passes through.

    skipdit analyze perturb    --config configs/class-to-image/demo.yaml num_samples=4
    skipdit analyze similarity --config configs/class-to-image/demo.yaml --spec N4-1000-20-o1
    skipdit analyze dynamics   --config configs/text-to-video/demo.yaml --plain results/t2v-emoji-plain
    skipdit analyze jacobian   --config configs/text-to-video/demo.yaml --plain results/t2v-emoji-plain

  perturb     how far feature and prediction move when the weights are moved at random, filter by filter
  similarity  what cached steps see and predict, against a full pass on the same input
  dynamics    how much every layer's feature changes from one sampling step to the next
  jacobian    largest singular values of Jacobians, layer by layer and from latents to predicted noise

Takes a sampler's config. Writes <analysis>.png and <analysis>.json, with all numbers and settings. Computes in float32
unless the config names another dtype.
"""

import argparse
from pathlib import Path

from skipdit.cli import Parser, friendly_errors
from skipdit.tasks import read_settings
from skipdit.utils.shipped import found

ANALYSES = ("perturb", "similarity", "dynamics", "jacobian")
SPECS = ["N2-1000-20", "N2-1000-20-o1", "N4-1000-20", "N4-1000-20-o1"]


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    head = Parser("skipdit analyze", description=__doc__)
    head.add_argument("analysis", choices=ANALYSES)
    rest = head.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="see skipdit analyze NAME --help")
    rest.required = False
    head.answers = not argv
    first = head.parse_args(argv)
    parser = Parser(f"{head.prog} {first.analysis}", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the task's sampler")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument("--plain", metavar="WEIGHTS", help="of a backbone without skips, to put beside it")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="DIR", help="folder [%(default)s]")
    parser.add_argument("--task", metavar="NAME", help="task of the config; unset: the name of its folder")
    if first.analysis == "perturb":
        parser.add_argument("--radius", type=float, default=0.1, help="farthest move, of a filter's norm [%(default)s]")
        parser.add_argument("--points", type=int, default=11, help="grid points along a side [%(default)s]")
        parser.add_argument("--branch", type=int, default=1, help="b: look at the input of layer L-b [%(default)s]")
        parser.add_argument("--seed", type=int, default=0, help="of the two directions [%(default)s]")
    if first.analysis in ("perturb", "jacobian"):
        parser.add_argument("--timesteps", type=int, default=4, help="sampling steps to look at [%(default)s]")
    if first.analysis == "similarity":
        parser.add_argument("--spec", action="append", help=f"a cache, more than once for several [{' '.join(SPECS)}]")
    if first.analysis == "jacobian":
        parser.add_argument("--iterations", type=int, default=30, help="power iterations at most [%(default)s]")
        parser.add_argument("--tolerance", type=float, default=5e-3, help="relative change to stop at [%(default)s]")
    args = parser.parse_intermixed_args(first.rest)
    if first.analysis == "similarity":
        args.spec = [found(spec) for spec in args.spec or SPECS]
    with friendly_errors():
        read_settings(args)
    args.analysis = first.analysis
    return args
