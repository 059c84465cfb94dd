"""The tasks. The library imports a task's modules only through this table, when a command's config asks for them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.config import load_config

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

    @property
    def schema(self) -> type:
        """Settings of the sampler."""
        return import_module(f"skipdit.{self.module.partition('.')[0]}.settings").SampleConfig

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


def find_task(config: str, name: str | None = None) -> Task:
    """Return the task of a config: that which the config's folder is named after, or the one called `name`.

    Raises ValueError if there is none of this name.
    """
    folder = name or Path(config).resolve().parent.name
    if folder not in TASKS:
        raise ValueError(
            f"{folder!r} is no task: keep a config in a folder named after its own, for example class-to-image, or say "
            "--task class-to-image"
        )
    return TASKS[folder]


def read_settings(args: argparse.Namespace) -> tuple[Task, Any]:
    """Return the task and the sampler's settings that a command line asks for.

    Args:
        args: `config`, a file; `task`, a name or None; `overrides`, a list of `key=value`.

    Raises ValueError for no task, and as `load_config`.
    """
    task = find_task(args.config, args.task)
    return task, load_config(task.schema, args.config, args.overrides)
