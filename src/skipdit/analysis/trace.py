"""What a model computes while its task's sampler samples: the calls that it gets, and their features layer by layer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipdit.caching.policies import CacheSpec
from skipdit.caching.steps import CacheStep
from skipdit.layers.inspect import layers_run_by
from skipdit.layers.skip import SkipTransformer, predicted_noise, skip_stack
from skipdit.sampling.sampler import Sampler
from skipdit.utils.errors import UserError


@dataclass
class Call:
    """A call of the model that a sampler made, without its cache: it can be made again.

    Attributes:
        timestep: of all rows.
        latents: name of the argument that holds the latents.
        arguments: of the model's `forward`, by name.
    """

    timestep: float
    latents: str
    arguments: dict[str, Any]

    @property
    def x(self) -> Tensor:
        """The latents, (N, ...); with guidance their rows come twice, with and without the condition."""
        return self.arguments[self.latents]


def record(
    sampler: Sampler,
    steps: int,
    spec: CacheSpec = CacheSpec(),  # noqa: B008 (frozen)
    see: Callable[[Call, CacheStep | None, Tensor], None] = lambda call, cache, noise: None,
) -> list[list[Call]]:
    """Let a task's sampler make its samples, and write down the calls that the model gets.

    Args:
        steps: of a run.
        spec: to cache by.
        see: called after each call with what it saw of the cache, and the noise that it predicted.

    Returns:
        Per batch of samples its calls, in sampling order.

    Raises ValueError for fewer than two steps.
    """
    if steps < 2:
        raise UserError(f"steps is {steps}; an analysis needs two or more")
    model, runs = sampler.model, []
    names = list(inspect.signature(model.forward).parameters)  # every backbone's first two: latents, timesteps

    def after(module: SkipTransformer, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        cache = arguments.pop("cache", None)
        arguments.pop("conditioning", None)  # on a cached step it lacks the middle; forward computes it
        arguments[names[0]] = arguments[names[0]].clone()
        call = Call(float(arguments[names[1]].flatten()[0]), names[0], arguments)
        if not runs or call.timestep > runs[-1][-1].timestep:
            runs.append([])
        runs[-1].append(call)
        see(call, cache, predicted_noise(output, call.x))

    hook = model.register_forward_hook(after, with_kwargs=True)  # after other hooks have put in cache and text
    try:
        sampler.make(steps, spec)
    finally:
        hook.remove()
    return runs


@dataclass
class Trace:
    """One pass through all layers.

    Attributes:
        first: input of layer 0.
        outputs: of every layer.
        noise: that the model predicted.
        block: `block(i, x)` runs layer i once more, without its skip.
    """

    model: SkipTransformer
    first: Tensor = field(init=False)
    outputs: list[Tensor] = field(default_factory=list)
    noise: Tensor = field(init=False)
    block: Callable[[int, Tensor], Tensor] = field(init=False)

    @property
    def depth(self) -> int:
        return len(self.outputs)

    def feature(self, branch: int) -> Tensor:
        """The input of layer L-b before its skip is joined in: what Skip-Cache keeps. Raises ValueError if b >= L."""
        if branch >= self.depth:
            raise UserError(f"branch {branch} is too large for a model of {self.depth} layers")
        return self.outputs[-branch - 1]

    def skip_of(self, i: int) -> int | None:
        """Which skip feeds layer i; None for none."""
        j = i - (self.depth - self.model.n_skips)
        return j if j >= 0 else None

    def inputs(self, i: int) -> tuple[Tensor, ...]:
        """What layer i reads: the output of the layer before it and, with a skip, that of the shallow one."""
        x = self.outputs[i - 1] if i else self.first
        return (x,) if self.skip_of(i) is None else (x, self.outputs[self.depth - 1 - i])

    def layer(self, i: int, x: Tensor, shallow: Tensor | None = None) -> Tensor:
        """Layer i, the joining of its skip included."""
        return self.block(i, x if shallow is None else self.model.skips[self.skip_of(i)](x, shallow))


def trace(model: SkipTransformer, call: Call) -> Trace:
    """Make a call again, all layers of it, and keep their outputs; no hook of the model runs."""
    seen = Trace(model)

    def stack(x: Tensor, *, block: Callable, **others: Any) -> Tensor:
        def watched(i: int, x: Tensor) -> Tensor:
            seen.outputs.append(block(i, x))
            return seen.outputs[-1]

        seen.first, seen.block = x, block
        return skip_stack(x, block=watched, **others)

    with layers_run_by(model, stack):
        seen.noise = predict(model, call)
    return seen


def predict(model: SkipTransformer, call: Call, x: Tensor | None = None) -> Tensor:
    """The noise that the model predicts in a call, on other latents x if they are given."""
    arguments = call.arguments if x is None else call.arguments | {call.latents: x}
    return predicted_noise(model.forward(**arguments), call.x)


def spread_out(runs: list[list[Call]], count: int) -> list[Call]:
    """The calls at `count` steps of every run, evenly spaced over it: the middles of as many equal parts."""
    count = min(count, len(runs[0]))
    steps = torch.linspace(0, len(runs[0]), 2 * count + 1)[1::2].long().tolist()
    return [run[step] for step in steps for run in runs]
