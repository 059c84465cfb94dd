"""The tasks. The library imports a task's modules only through this table, when a command's config asks for them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.cli import Parser, friendly_errors
from skipdit.config import load_config, named_task
from skipdit.utils.errors import UserError
from skipdit.utils.shipped import find_config

if TYPE_CHECKING:  # torch takes seconds, and settings can be read without it
    from skipdit.sampling.sampler import Sampler


@dataclass(frozen=True)
class Task:
    """A task of the project.

    Attributes:
        name: of its folder, and of that of its configs.
        module: of its sampler, below `skipdit`; its `Config` has the sampler's settings.
        sampler: the sampler's class there.
        window: the cache of comparisons: their timesteps, and the branch by default.
    """

    name: str
    module: str
    sampler: str
    window: CacheSpec

    def part(self, name: str) -> ModuleType:
        """Return a module of the task's package, such as `settings`, which needs no torch."""
        return import_module(f"skipdit.{self.module.partition('.')[0]}.{name}")

    @property
    def schema(self) -> type:
        """Settings of the sampler."""
        return self.part("settings").SampleConfig

    def sample(self, config: Any) -> dict:
        """Make the samples of a config. Returns their report."""
        return import_module(f"skipdit.{self.module}").sample(config)

    def train(self, config: Any, dry_run: bool = False) -> Any:
        """Run a training. Returns the averaged model."""
        return self.part("train").train(config, dry_run)

    def open_sampler(self, config: Any, branch: int | None) -> Sampler:
        """Load all that a config asks for.

        Args:
            branch: the cache's, None without a cache.
        """
        return getattr(import_module(f"skipdit.{self.module}"), self.sampler)(config, branch)

    @property
    def plain(self) -> list[str]:
        """The overrides that leave out the skips; none where the weights alone say whether there are some."""
        names = {field.name for field in fields(self.schema)}
        return ["model.skip=false"] if "model" in names else ["skip=false"] * ("skip" in names)


TASKS = {
    task.name: task
    for task in (
        Task("class-to-image", "class_to_image.sample", "ImageSampler", parse_policy("N2-1000-20")),
        Task("class-to-video", "class_to_video.sample", "ClipSampler", parse_policy("N2-900-49")),
        Task("text-to-video", "text_to_video.sample_t2v", "ClipSampler", parse_policy("N2-700-50")),
        Task("text-to-image", "text_to_image.sample_t2i", "ImageSampler", parse_policy("N2-700-50")),
    )
}


def find_task(config: str | None, name: str | None = None) -> Task:
    """Return the task called `name`, or that which a config names as `task`, or that which its folder is named after.

    Raises ValueError if there is none of this name, ConfigError for a config that is no file.
    """
    name = name or named_task(config) or find_config(config).resolve().parent.name
    if name not in TASKS:
        raise UserError(
            f"{name!r} is no task: keep a config in a folder named after its own, for example class-to-image, write "
            "task: class-to-image into it, or say --task class-to-image"
        )
    return TASKS[name]


def take_task(prog: str, description: str, argv: list[str] | None) -> tuple[Task, list[str]]:
    """Return the task that a command line asks for, and the arguments that are left for it.

    Ends the program for mistakes, and for --help if no task is said.
    """
    parser = Parser(
        prog,
        description=description,
        epilog="With --config or --task, --help lists the settings of that task.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the run's settings")
    parser.add_argument(
        "--task", choices=TASKS, help="unset: what the config names as `task`, or the name of its folder"
    )
    parser.answers = False
    given, rest = parser.parse_known_args(argv)
    if given.config is None and given.task is None:
        parser.answers = True
        parser.add_argument("-h", "--help", action="help", help="show this message")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
        parser.parse_known_args(rest)
        parser.error("say what to run, for example --config configs/class-to-image/demo.yaml; or --task NAME")
    with friendly_errors():
        task = find_task(given.config, given.task)
    return task, [*(["--config", given.config] if given.config else []), *rest]


def read_settings(args: argparse.Namespace) -> tuple[Task, Any]:
    """Return the task and the sampler's settings that a command line asks for.

    Args:
        args: `config`, a file; `task`, a name or None; `overrides`, a list of `key=value`.

    Raises ValueError for no task, and as `load_config`.
    """
    task = find_task(args.config, args.task)
    return task, load_config(task.schema, args.config, args.overrides)
