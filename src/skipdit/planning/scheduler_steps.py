"""Steps of a diffusers scheduler, watched and tried out."""

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor


class WatchedStep:
    """A scheduler's `step` that something else is called for. Its signature stays: pipelines look at it."""

    def __init__(self, own: Callable, step: Callable):
        self.__wrapped__, self._step = own, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(self.__wrapped__).parameters)[len(args) : 3]
        given = [kwargs.pop(name) for name in names]
        return self._step(self.__wrapped__, *args, *given, **kwargs)


def trial(scheduler: SchedulerMixin, output: Tensor, t: Any, latents: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The latents that a step would end with: the scheduler and all generators stay as they are."""
    kwargs = dict(kwargs)
    if isinstance(kwargs.get("generator"), torch.Generator):
        kwargs["generator"] = kwargs["generator"].clone_state()
    with own_random_state():
        return latents_of(type(scheduler).step(copy.deepcopy(scheduler), output, t, latents, *args, **kwargs))


def own_random_state() -> AbstractContextManager[None]:
    """Leave the global generators as they were: those of the CPU and of the current GPU."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def latents_of(result: Any) -> Tensor:
    """The latents in what `scheduler.step` returned, a tuple or an output class."""
    return result[0] if isinstance(result, tuple) else result.prev_sample
