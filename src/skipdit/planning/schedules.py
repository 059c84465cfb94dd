"""Schedules: which steps of a run are full, cached or forecasts, as a string of their letters."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from skipdit.caching.policy import CACHED, FORECAST, FULL, NAMES

REACH = 4  # the longest gap between full steps that is looked at, over the mean one


def forecast_losses(products: np.ndarray, gains: np.ndarray, reach: int, fitted: bool) -> np.ndarray:
    """What forecasts cost between full steps at most `reach` steps apart, along a run whose outputs are known.

    A forecast extrapolates linearly from the two full steps before it, or reuses the first one. Its error is that of
    the latents right after it: later steps see where the run is, and make up for what they can.

    Args:
        products: (steps, steps), inner products of the outputs of any two steps.
        gains: (steps,), how far a step's output moves the latents after it.
        fitted: forecasts go as far ahead as is best, and not as the distance of the steps says.

    Returns:
        Entry (j, a, g - 1) of (steps, reach + 1, reach): the squared errors, in all, of the forecasts between full
        steps j and j + g, where the full step before j was j - a; a = 0: there was none.
    """
    steps = len(products)
    j, a, s = np.ogrid[:steps, : reach + 1, 1 : reach + 1]
    i, t = np.maximum(j - a, 0), np.minimum(j + s, steps - 1)
    squares = np.diag(products)
    moved = squares[j] + squares[i] - 2 * products[j, i]
    along = products[t, j] - products[t, i] - squares[j] + products[j, i]
    ahead = along / np.where(moved > 0, moved, np.inf) if fitted else s / np.maximum(a, 1)
    errors = squares[t] + squares[j] - 2 * products[t, j] - 2 * ahead * along + ahead**2 * moved
    errors = np.where(j + s < steps, errors.clip(0) * gains[t] ** 2, 0)
    losses = np.cumsum(errors, 2) - errors  # of the steps before t
    return np.where(a <= j, losses, np.inf)


def best_full_steps(products: np.ndarray, gains: np.ndarray, count: int, fitted: bool) -> list[int]:
    """The `count` full steps, the first one among them, between which forecasts lose least in all. Found by dynamic
    programming over the last two of them. Arguments as of `forecast_losses`.
    """
    steps = len(products)
    reach = min(steps, REACH * -(-steps // count))
    losses = forecast_losses(products, gains, reach, fitted)
    best = np.full((steps, reach + 1), np.inf)  # of full steps so far, the last one j, the one before j - a
    best[0, 0] = 0
    k, g = np.ogrid[:steps, 1 : reach + 1]
    ways = []
    for _ in range(count - 1):
        options = best[:, :, None] + losses
        ways.append(options.argmin(1))
        best = np.full_like(best, np.inf)
        best[:, 1:] = np.where(g <= k, options.min(1)[np.maximum(k - g, 0), g - 1], np.inf)
    left = np.arange(steps, 0, -1)  # steps from j to the end
    ends = losses[np.arange(steps), :, np.minimum(left, reach) - 1]
    ends[left > reach] = np.inf
    j, a = np.unravel_index(np.argmin(best + ends), best.shape)
    chosen = [int(j)]
    for way in reversed(ways):
        j, a = j - a, way[j - a, a - 1]
        chosen.append(int(j))
    return chosen[::-1]


def even_full_steps(steps: int, count: int) -> list[int]:
    """`count` full steps at even distances, the first one among them."""
    return _apart([steps * (n / count) for n in range(count)], steps)


def _apart(places: Sequence[float], steps: int) -> list[int]:
    """The steps nearest to some places: all different, and each with room for those to come."""
    chosen: list[int] = []
    for n, place in enumerate(places):
        first = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(round(place), first), steps - (len(places) - n)))
    return chosen


def schedule(steps: int, full: Sequence[int], cached: int) -> str:
    """The kinds of all steps: the full ones, so many cached ones, and the others forecasts.

    The cached steps are spread over the gaps between full ones, and in a gap over its length, later rather than sooner:
    F O S, F O S O, F O O S O.
    """
    kinds, free, used = [FORECAST] * steps, steps - len(full), 0
    for count, (before, after) in enumerate(pairwise([*full, steps]), 1):
        kinds[before] = FULL
        gap, passed = after - before - 1, after - count
        some = min(gap, (2 * cached * passed + free) // (2 * free) - used) if free else 0  # of all so far, rounded
        used += some
        for n in range(1, some + 1):
            kinds[before + ((gap + 1) * n + (some + 1) // 2) // (some + 1)] = CACHED
    return "".join(kinds)


def restarted(kinds: str, restarts: Sequence[int]) -> str:
    """A schedule whose steps `restarts` are full."""
    return "".join(FULL if k in restarts else kind for k, kind in enumerate(kinds))


def common_start(kinds: str, others: str) -> int:
    """The number of equal steps that two schedules begin with."""
    pairs = zip(kinds, others, strict=False)
    return next((k for k, (one, other) in enumerate(pairs) if one != other), min(len(kinds), len(others)))


def stretched(kinds: str, steps: int) -> str:
    """A schedule for another number of steps: as large a share of full ones, and as close together in every part of the
    run. Every other step is of the kind of the nearest one that is not full.
    """
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    others = [i for i, kind in enumerate(kinds) if kind != FULL]
    count = min(steps, max(1, round(len(full) * steps / len(kinds))))
    scale = steps / len(kinds)
    places = scale * np.interp(np.arange(count) * len(full) / count, range(len(full) + 1), [*full, len(kinds)])
    taken = set(_apart(places, steps))
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
