"""The tasks, found by the name of their folder. The library imports none by itself: a command asks for its config's."""

import importlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from skipdit.caching.policies import CacheSpec
from skipdit.sampling.sampler import Sampler


class Task(NamedTuple):
    """What a command needs of a task.

    Attributes:
        schema: of its sampler's settings.
        open_sampler: `open_sampler(config, branch)` loads all that a config asks for; the branch is that of a cache,
            None without one.
        window: the timesteps between which it caches by default.
    """

    schema: type
    open_sampler: Callable[[Any, int | None], Sampler]
    window: CacheSpec

    @property
    def plain(self) -> list[str]:
        """The overrides that leave out the skips; none where the weights alone say whether there are some."""
        names = {field.name for field in fields(self.schema)}
        return ["model.skip=false"] if "model" in names else ["skip=false"] * ("skip" in names)


def find_task(config: str, name: str | None = None) -> Task:
    """The task of a config: that which the config's folder is named after, or the one called `name`.

    Raises ValueError if there is none of this name.
    """
    folder = name or Path(config).resolve().parent.name
    module_name = f"skipdit.{folder.replace('-', '_')}.compare"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(str(error.name)):
            raise
        raise ValueError(
            f"{folder!r} is no task: keep a config in a folder named after its own, for example class-to-image, or say "
            "--task class-to-image"
        ) from error
    return Task(module.Config, module.open_sampler, module.WINDOW)
