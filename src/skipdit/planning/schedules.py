"""Which steps are full: schedules for a budget of full steps."""

import math
from collections.abc import Sequence
from itertools import accumulate

from skipdit.caching.policies import linear_coefficients
from skipdit.planning.errors import Errors, T, Weights


def forecast(steps: int, full: Sequence[int], order: int) -> Weights:
    """Weights of a plan with these full steps that reuses (order 0) or forecasts linearly (order 1)."""
    return tuple(
        None if k in full else linear_coefficients(k, [j for j in full if j < k][-1 - order :]) for k in range(steps)
    )


def optimal(errors: Errors, budget: int) -> list[int]:
    """The `budget` full steps with the least sum of costs, exactly: dynamic programming over (last but one, last).

    Raises ValueError if so few cannot span the run within the errors' reach.
    """
    steps, reach = errors.steps, errors.reach
    # (last but one, last) -> least cost so far and the full steps that have it; the first step is always full
    states: dict[tuple[int, ...], tuple[float, list[int]]] = {(0,): (0.0, [0])}
    for _ in range(budget - 1):
        following: dict[tuple[int, ...], tuple[float, list[int]]] = {}
        for last, (before, full) in states.items():
            for k in range(last[-1] + 1, min(last[-1] + reach, steps - 1) + 1):  # the next full step
                reached = before + errors.cost(last, k)
                if reached < following.get((last[-1], k), (math.inf,))[0]:
                    following[last[-1], k] = reached, [*full, k]
        states = following
    ends = [
        (cost + errors.cost(last, steps), full) for last, (cost, full) in states.items() if steps - last[-1] <= reach
    ]
    if not ends:
        raise ValueError(f"{budget} full steps cannot span {steps} steps within a reach of {reach}; raise --reach")
    return min(ends)[1]


def greedy(errors: Errors, budget: int) -> list[int]:
    """Full steps that are left when the one that costs least is cached, again and again."""
    full = list(range(errors.steps))
    while len(full) > budget:
        full = min(([j for j in full if j != k] for k in full[1:]), key=errors.total)
    return full


def uniform(steps: int, budget: int) -> list[int]:
    """Full steps at equal distances, from the first on; the longer gaps first, since late steps show more."""
    short, longer = divmod(steps, budget)
    return [n * short + min(n, longer) for n in range(budget)]


def interpolate(places: Sequence[int], values: Sequence[T], count: int) -> list[T]:
    """Piecewise linear through (place, value), constant beyond the ends, at 0 .. count - 1."""
    found = []
    for x in range(count):
        after = next((n for n, place in enumerate(places) if place >= x), len(places) - 1)
        left, right = max(after - 1, 0), after
        span = places[right] - places[left]
        part = min(max((x - places[left]) / span, 0.0), 1.0) if span else 0.0
        found.append(values[left] + part * (values[right] - values[left]))
    return found


def moved(weights: Weights, places: Sequence[tuple[int, int]], by: Sequence[float]) -> Weights:
    """The weights, those at places (step, number) changed by so much."""
    found = [None if several is None else list(several) for several in weights]
    for (k, m), change in zip(places, by, strict=True):
        found[k][m] += change
    return tuple(None if several is None else tuple(several) for several in found)


def widened(weights: Weights, memory: int) -> Weights:
    """The same, with zeros for features that so far are not used."""
    known = accumulate(several is None for several in weights)  # full steps so far
    return tuple(
        None if several is None else (*several, *(0.0,) * (min(memory, have) - 1 - len(several)))
        for several, have in zip(weights, known, strict=True)
    )
