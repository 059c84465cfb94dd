"""A page in the browser: an image or clip by several caches side by side, from the same noise.

    skipdit app
    skipdit app --config configs/class-to-image/imagenet256_sample.yaml --config configs/class-to-image/demo.yaml
    skipdit app --config configs/class-to-image/demo.yaml guidance_scale=3

Without --config it offers the embedded models of all four tasks. Needs gradio: pip install "gradio>=6"
"""

import argparse
from contextlib import nullcontext
from importlib.util import find_spec

from skipdit.cli import Parser, friendly_errors
from skipdit.config import load_config
from skipdit.tasks import TASKS, find_task
from skipdit.utils.errors import UserError
from skipdit.utils.shipped import PROJECT, locate, untold


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit app", description=__doc__)
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a sampler's config to offer; may come again [the embedded models]",
    )
    parser.add_argument("--task", help="class-to-image ... [the name of the config's folder]")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; with 0.0.0.0 others can use the page, and read files of this machine [%(default)s]",
    )
    parser.add_argument("--port", type=int, metavar="N", help="[the first free one from 7860 on]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the first config to replace")
    args = parser.parse_intermixed_args(argv)
    quiet, args.config = nullcontext() if args.config else untold(), args.config or embedded()
    with friendly_errors(), quiet:
        if find_spec("gradio") is None:
            where = 'in the clone, pip install -e ".[app]"' if PROJECT else 'pip install "gradio>=6"'
            raise UserError(f"the page needs gradio, which is not installed: {where}")
        for number, file in enumerate(args.config):
            load_config(find_task(file, args.task).schema, file, [] if number else args.overrides)
    return args


def embedded() -> list[str]:
    """Return the configs of the models that come with the project, by their paths in it."""
    return [
        f"configs/{task}/{file.name}" for task in TASKS for file in sorted(locate(f"configs/{task}").glob("demo*.yaml"))
    ]
