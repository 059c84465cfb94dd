"""A scheduler's methods, followed: what tells a cache where a pipeline's run is."""

import inspect
import weakref
from typing import Any, Protocol

from diffusers import SchedulerMixin

WRAPPED = ("set_timesteps", "scale_model_input", "step")


class Follower(Protocol):
    """What is told of a scheduler's calls."""

    def begin(self) -> None:
        """The scheduler has got timesteps."""

    def host_timestep(self, t: Any) -> Any:
        """Return the timestep of a call, on the CPU if it is known there."""

    def end_step(self) -> None:
        """A step has been made."""


class FollowedMethod:
    """A method of a scheduler that a cache follows. Its signature stays: pipelines look at it."""

    def __init__(self, scheduler: SchedulerMixin, name: str, cache: Follower):
        self._scheduler, self._name, self._cache = weakref.ref(scheduler), name, cache
        self.__wrapped__ = getattr(scheduler, name)
        self.__name__ = name
        names = list(inspect.signature(self.__wrapped__).parameters)
        # CogVideoX's DPM takes an earlier prediction before it; scale_model_input may have (sample, *args)
        self._place = names.index("timestep") if "timestep" in names else 1 if name == "scale_model_input" else None

    def __call__(self, *args, **kwargs):
        if self._name == "set_timesteps":
            result = self.__wrapped__(*args, **kwargs)
            self._cache.begin()
            return result
        if "timestep" in kwargs:
            kwargs["timestep"] = self._cache.host_timestep(kwargs["timestep"])
        elif (place := self._place) is not None and len(args) > place:
            args = (*args[:place], self._cache.host_timestep(args[place]), *args[place + 1 :])
        result = self.__wrapped__(*args, **kwargs)
        if self._name == "step":
            self._cache.end_step()
        return result

    def __reduce__(self) -> tuple:
        return getattr, (self._scheduler(), self._name)  # of the copied scheduler, whose attributes are not there yet


def follow(scheduler: SchedulerMixin, cache: Follower) -> None:
    """Tell a cache of this scheduler's calls."""
    scheduler._skip_cache = cache
    for name in WRAPPED:
        if hasattr(scheduler, name):
            setattr(scheduler, name, FollowedMethod(scheduler, name, cache))


def unfollow(scheduler: SchedulerMixin) -> None:
    """Undo `follow`."""
    for name in (*WRAPPED, "_skip_cache"):
        scheduler.__dict__.pop(name, None)  # the class's own come back
