"""Counting and timing model calls."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skipdit.cache import CacheStep, SkipCache
from skipdit.skip import SkipTransformer


def step_flops(model: SkipTransformer, batch: int, branch: int = 1, **sizes: int) -> dict[str, float]:
    """FLOPs of one full and one cached forward pass, two per multiply-add, attention included.

    Counted on the meta device: nothing is computed. `sizes` are those that the model's `random_inputs` takes.
    """
    with torch.device("meta"):
        model = type(model).from_config(model.config).to("meta").eval()
    inputs = model.random_inputs(batch, **sizes)

    def count(cache: CacheStep | None) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs, cache=cache)
        return float(counter.get_total_flops())

    full = CacheStep(branch, None)
    flops = {"full": count(full if model.n_skips else None)}
    flops["cached"] = count(CacheStep(branch, full.output)) if model.n_skips else flops["full"]
    return flops


def run_flops(cache: SkipCache, per_step: dict[str, float]) -> float:
    """FLOPs of a whole run, from those of one full and one cached step."""
    return cache.full_steps * per_step["full"] + cache.cached_steps * per_step["cached"]


def uncached_steps(flops: float, per_step: dict[str, float]) -> int:
    """How many full steps come nearest to these FLOPs: what else they could be spent on."""
    return max(1, round(flops / per_step["full"]))


@contextmanager
def replaced(owner: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """A method of an object is another function for a while."""
    before = vars(owner).get(name)
    vars(owner)[name] = function
    try:
        yield
    finally:
        del vars(owner)[name]
        if before is not None:
            vars(owner)[name] = before


def interleaved_seconds(
    functions: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times in turn: a machine that speeds up or slows down favours none."""

    def seconds(function: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for function in functions.values():  # warm up
        seconds(function)
        seconds(function)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times
