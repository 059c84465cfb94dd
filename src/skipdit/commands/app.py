"""A page in the browser: an image or clip by several caches side by side, from the same noise.

    python -m skipdit app
    python -m skipdit app --config configs/class-to-image/imagenet256_sample.yaml
    python -m skipdit app --config configs/class-to-image/demo.yaml guidance_scale=3

Without --config it offers the embedded models of all four tasks. Needs gradio: pip install gradio
"""

import argparse

from skipdit.cli import friendly_errors
from skipdit.config import load_config
from skipdit.tasks import TASKS, find_task


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = argparse.ArgumentParser(
        "python -m skipdit app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a sampler's config to offer; may come again [demo.yaml of all]",
    )
    parser.add_argument("--task", help="class-to-image ... [the name of the config's folder]")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: of all networks [%(default)s]"
    )
    parser.add_argument("--port", type=int, metavar="N", help="[the first free one from 7860 on]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the first config to replace")
    args = parser.parse_intermixed_args(argv)
    args.config = args.config or [f"configs/{task}/demo.yaml" for task in TASKS]
    with friendly_errors():
        for number, file in enumerate(args.config):
            load_config(find_task(file, args.task).schema, file, [] if number else args.overrides)
    return args
