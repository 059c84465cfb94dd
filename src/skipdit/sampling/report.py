"""Timing of sampling runs, and their report."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from skipdit.caching.policy import NAMES
from skipdit.caching.runtime import SkipCache
from skipdit.utils.provenance import versions


class StepTimer:
    """Seconds of every sampling step, split by kind, without a device sync until they are read.

    Pass `tick` as a sampler's callback, after `start`.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._marks.append(("start", self._now()))

    def tick(self, kind: str) -> None:
        self._marks.append((kind, self._now()))

    def seconds(self) -> dict[str, list[float]]:
        """Durations by kind. The first step of a run is left out: it warms up kernels and compiles."""
        if self._cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {kind: [] for kind in NAMES.values()}
        for (before, begin), (kind, end) in zip(self._marks, self._marks[1:], strict=False):
            if kind != "start" and before != "start":
                times[kind].append(begin.elapsed_time(end) / 1e3 if self._cuda else end - begin)
        return times


def steps_in_words(steps: dict[str, float]) -> str:
    """Numbers of steps by kind, as "14 full and 36 cached steps"; kinds that there are none of are left out."""
    told = f"{steps['full']:g} full" + (f" and {steps['cached']:g} cached steps" if steps["cached"] else " steps")
    return told + (f" and {steps['forecast']:g} forecasts" if steps["forecast"] else "")


def step_counts(cache: SkipCache) -> dict[str, int]:
    """Return the numbers of steps of a run, as entries of a table's row: full_steps, cached_steps, forecast_steps."""
    return {f"{kind}_steps": count for kind, count in cache.counts().items()}


def steps_column(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Return the title and the cells of a table's column of `step_counts`: "full + cached steps", "14 + 36".

    Forecast steps are in it if a row has some. A row without counts gets a dash.
    """
    kinds = ["full", "cached"] + ["forecast"] * any(row.get("forecast_steps") for row in rows)
    counts = [[str(row.get(f"{kind}_steps", 0)) for kind in kinds] if "full_steps" in row else ["–"] for row in rows]
    return f"{' + '.join(kinds)} steps", [" + ".join(cell) for cell in counts]


def report(
    cache: SkipCache,
    steps: dict[str, float | None],
    seconds: dict[str, list[float]],
    flops: dict[str, float],
    **more: Any,
) -> dict[str, Any]:
    """The common part of a sampler's report.json. Times are medians in seconds, FLOPs count two per multiply-add.

    Args:
        cache: of the runs.
        steps: the mean number of each kind; None where it is unknown.
    """
    median = {kind: float(torch.tensor(values).median()) if values else None for kind, values in seconds.items()}
    speedup = None
    if steps["full"] is not None:
        steps = {kind: int(number) if number == int(number) else number for kind, number in steps.items()}
        speedup = len(cache.plan) * flops["full"] / sum(steps[kind] * flops[kind] for kind in ("full", "cached"))
    return {
        "cache": str(cache.spec),
        "steps": steps,
        "seconds_per_step": median,
        "flops_per_step": flops,
        "flops_speedup": speedup,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        **versions(),
        **more,
    }
