"""Timing functions against each other."""

import time
from collections.abc import Callable

import torch


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
