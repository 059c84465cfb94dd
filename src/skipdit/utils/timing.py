"""Timing what runs on a device, and functions against each other."""

import time
from collections.abc import Callable

import torch


def moment(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def interleaved_seconds(
    functions: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times in turn: a machine that speeds up or slows down favours none."""

    def seconds(function: Callable[[], object]) -> float:
        began = moment(device)
        function()
        return moment(device) - began

    for function in functions.values():  # warm up
        seconds(function)
        seconds(function)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times
