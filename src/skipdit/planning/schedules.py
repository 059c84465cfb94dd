"""Schedules: which steps of a run are full, cached or forecasts, as a string of their letters."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from skipdit.caching.policy import CACHED, FORECAST, FULL, NAMES


def full_steps(steps: int, count: int, warp: float = 1.0, head: int = 1, tail: int = 0) -> list[int]:
    """`count` full steps, the first one among them.

    Args:
        warp: 1 puts them at even distances; more than that, closer together at the beginning of the run; less, at its
            end.
        head: how many of them follow each other at the beginning.
        tail: how many follow each other at the end, if there are some left.
    """
    head = min(head, count)
    if tail := min(tail, count - head):
        return [*full_steps(steps - tail, count - tail, warp, head), *range(steps - tail, steps)]
    start, rest = head - 1, count - head + 1
    places = [start + (steps - start) * (n / rest) ** warp for n in range(rest)]
    return _apart(places[1:], steps, list(range(head)))


def _apart(places: Sequence[float], steps: int, chosen: list[int]) -> list[int]:
    """The chosen steps and those nearest to some places: all different, and each with room for those to come."""
    for n, place in enumerate(places):
        first = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(round(place), first), steps - (len(places) - n)))
    return chosen


def schedule(steps: int, full: int, cached: int, warp: float = 1.0, head: int = 1, tail: int = 0) -> str:
    """The kinds of all steps: so many full and cached ones, the others are forecasts.

    The cached steps are spread over the gaps between full ones, and in a gap over its length, later rather than sooner:
    F O S, F O S O, F O O S O. Arguments as of `full_steps`.
    """
    chosen = full_steps(steps, full, warp, head, tail)
    kinds, free, used = [FORECAST] * steps, steps - full, 0
    for before, after in pairwise([*chosen, steps]):
        kinds[before] = FULL
        gap = after - before - 1
        passed = sum(1 for k in range(after) if k not in chosen)
        some = min(gap, (2 * cached * passed + free) // (2 * free) - used) if free else 0  # of all so far, rounded
        used += some
        for n in range(1, some + 1):
            kinds[before + ((gap + 1) * n + (some + 1) // 2) // (some + 1)] = CACHED
    return "".join(kinds)


def stretched(kinds: str, steps: int) -> str:
    """A schedule for another number of steps: as large a share of full ones, and as close together in every part of the
    run. Every other step is of the kind of the nearest one that is not full.
    """
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    others = [i for i, kind in enumerate(kinds) if kind != FULL]
    count = min(steps, max(1, round(len(full) * steps / len(kinds))))
    scale = steps / len(kinds)
    places = scale * np.interp(np.arange(count) * len(full) / count, range(len(full) + 1), [*full, len(kinds)])
    taken = set(_apart(places, steps, []))
    return "".join(
        FULL if i in taken else kinds[min(others, key=lambda other: abs(other * scale - i))] for i in range(steps)
    )


def cost_of(kinds: str, costs: dict[str, float]) -> float:
    """The cost of a schedule, in full steps.

    Args:
        costs: of a "full", a "cached" and a "forecast" step, in full steps; of kinds that it does not have, none.
    """
    return sum(kinds.count(kind) * costs[NAMES[kind]] for kind in set(kinds))


def affordable(steps: int, budget: float, costs: dict[str, float], share: float) -> tuple[int, int]:
    """How many full and cached steps a budget buys, if the others are forecasts.

    Args:
        budget: in full steps.
        costs: as of `cost_of`.
        share: of the steps that are not full, the wanted part that is cached.

    Returns (0, 0) if the budget does not even buy one full step with it.
    """
    for full in range(min(steps, int(budget + 1e-9)), 0, -1):
        cached = round(share * (steps - full))
        kinds = full * FULL + cached * CACHED + (steps - full - cached) * FORECAST
        if cost_of(kinds, costs) <= budget + 1e-9:
            return full, cached
    return 0, 0
