"""The search for a plan: schedules of one cost are fitted, and each fit is its own measurement."""

import math
from dataclasses import replace
from itertools import cycle
from typing import Any

from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policy import CACHED, FORECAST, FULL
from skipdit.planning.calibration import COSTS, BaseBench, Fitted
from skipdit.planning.controls import controls
from skipdit.planning.schedules import affordable, best_full_steps, cost_of, even_full_steps, restarted, schedule
from skipdit.planning.tables import cost_table
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import versions

FORECASTS, CACHED_ALONE, MIXED = "forecasts alone, fitted", "cached steps alone, fitted", "both, fitted"
STARTED = "before exchanges of steps, fitted"
SHARES = {FORECASTS: (0.0,), CACHED_ALONE: (1.0,), MIXED: (1 / 3, 2 / 3)}  # of other steps, those that are cached
IMPROVED = 2  # schedules of each of these groups, by exchanges of steps: the better one may not end better
HOPELESS = 1.5  # times the least error: exchanges gain less than that


class Search:
    """Fits schedules of one cost.

    Args:
        budget: in full steps.
        progress: of fits.

    Attributes:
        tried: kinds of steps -> the fitted plan, without its `Fitted.fit`, which is large.
        improved_from: kinds of steps that `improved` began with -> where it ended.
    """

    def __init__(self, bench: BaseBench, budget: float, progress: tqdm):
        self.bench, self.budget, self.progress = bench, budget, progress
        self.tried: dict[str, Fitted] = {}
        self.improved_from: dict[str, Fitted] = {}

    def error(self, kinds: str) -> float:
        """The error of a schedule, fitted."""
        if kinds not in self.tried:
            self._fit(kinds, keep=False)
        return self.tried[kinds].error

    def _fit(self, kinds: str, base: Fitted | None = None, keep: bool = True) -> Fitted:
        fitted = self.bench.fit(kinds, base, keep)
        self.tried[kinds] = replace(fitted, fit=None)
        self.progress.update()
        return fitted

    def starts(self, share: float) -> list[str]:
        """Schedules with full steps at even distances, and with those that dynamic programming finds; none if the
        budget does not buy them.

        Args:
            share: of the steps that are not full, the part that is cached.
        """
        bench, found = self.bench, []
        full, cached = affordable(bench.steps, self.budget, bench.step_costs, share)
        ways = (
            lambda count: even_full_steps(bench.steps, count),
            lambda count: best_full_steps(bench.products, bench.gains, count, fitted=False),
            lambda count: best_full_steps(bench.products, bench.gains, count, fitted=True),
        )
        for way in ways:
            for count in range(full, 0, -1):  # where steps have to be full, fewer others are
                kinds = restarted(schedule(bench.steps, way(count), cached), bench.restarts)
                if cost_of(kinds, bench.step_costs) <= self.budget + 1e-9:
                    found.append(kinds)
                    break
        return found

    def improved(self, kinds: str) -> Fitted:
        """The best plan that is found from a schedule by exchanging steps with their neighbours, one pair at a time."""
        if kinds not in self.improved_from:
            self.improved_from[kinds] = self._improved(kinds)
        return self.improved_from[kinds]

    def _improved(self, kinds: str) -> Fitted:
        left, best = iter(range(self.bench.exchanges)), None
        # the first step stays full; the last ones are tried first
        places = [i for i in range(len(kinds) - 2, 0, -1) if not {i, i + 1} & set(self.bench.restarts)]
        rest = 0
        for i in cycle(places):
            if rest == len(places):
                break
            rest += 1
            other = kinds[:i] + kinds[i + 1] + kinds[i] + kinds[i + 2 :]
            if other in self.tried and self.error(other) >= self.error(kinds):
                continue
            if next(left, None) is None:
                break
            best = best or self._fit(kinds)  # again, for the steps that exchanges begin with
            fitted = self._fit(other, best)
            if fitted.error < best.error:
                best, kinds, rest = fitted, other, 0
            del fitted  # its steps take memory
        return self.tried[kinds]


def make_plan(bench: BaseBench, budget: float) -> tuple[Fitted, dict[str, float]]:
    """The best plan of a cost, and the errors of it and of the controls.

    Args:
        budget: in full steps.

    Raises ValueError if the budget buys no plan.
    """
    best, others = _search(bench, budget)
    return best, _errors(bench, best, others)


def _search(bench: BaseBench, budget: float) -> tuple[Fitted, dict[str, float]]:
    """The best plan of a cost, and the errors of what else was searched."""
    with tqdm(desc="schedules fitted", unit="run") as progress:
        search = Search(bench, budget, progress)
        starts = {
            name: [kinds for share in shares for kinds in search.starts(share)]
            for name, shares in _groups(bench).items()
        }
        if not any(starts.values()):
            raise UserError(
                f"{budget:.2f} full steps buy no plan: {bench.steps} steps cost at least {_least(bench):.2f}"
            )
        chosen = {
            name: sorted(dict.fromkeys(some), key=search.error)[:IMPROVED] for name, some in starts.items() if some
        }
        least = min(search.error(some[0]) for some in chosen.values())
        found = {
            name: min(
                (search.improved(kinds) for kinds in some if search.error(kinds) <= HOPELESS * least),
                key=lambda fitted: fitted.error,
                default=search.tried[some[0]],
            )
            for name, some in chosen.items()
        }
    errors = {name: fitted.error for name, fitted in found.items()} if len(found) > 1 else {}
    best = min(found.values(), key=lambda fitted: fitted.error)
    return best, {STARTED: least} | errors


def _groups(bench: BaseBench) -> dict[str, tuple[float, ...]]:
    """The names and `SHARES` of schedules that a search tries: cached steps must cost less than full ones."""
    return SHARES if bench.step_costs.get("cached", 1) < 1 else {FORECASTS: SHARES[FORECASTS]}


def _runs(bench: BaseBench) -> float:
    """About how many runs of a plan's cost a search makes with the controls, which are some ten. An exchange costs half
    a run, and one group of schedules is too far behind to be improved.
    """
    groups = _groups(bench)
    return 10 + 3 * sum(map(len, groups.values())) + IMPROVED * min(len(groups), 2) * bench.exchanges / 2


def _least(bench: BaseBench) -> float:
    """The cost of one full step and forecasts, or cached steps if they cost less, and of what has to be full."""
    others = CACHED + FORECAST if len(_groups(bench)) > 1 else FORECAST
    runs = (restarted(FULL + kind * (bench.steps - 1), bench.restarts) for kind in others)
    return min(cost_of(kinds, bench.step_costs) for kinds in runs)


def follow(bench: BaseBench, kinds: str) -> tuple[Fitted, dict[str, float]]:
    """The plan of a given schedule, and the errors of it and of the controls."""
    fitted = bench.fit(kinds)
    return fitted, _errors(bench, fitted, {})


def _errors(bench: BaseBench, best: Fitted, others: dict[str, float]) -> dict[str, float]:
    beside = tqdm(controls(bench, bench.cost(best.plan)), desc="controls", unit="run")
    return {"plan": bench.error(best.plan)} | others | {each.name: bench.error(*each[1:]) for each in beside}


def within(bench: BaseBench, most: float) -> tuple[Fitted, dict[str, float]]:
    """As `make_plan`, with the fewest full steps' worth whose plan has at most this error. Found by halving, as if a
    larger budget never gave a larger error; each try is a whole search. The plan of as many as there are, if none has.
    """
    low, high, found = min(math.ceil(_least(bench)), bench.steps), bench.steps, None
    while low < high or found is None:
        middle = (low + high) // 2
        best, others = _search(bench, middle)
        if bench.error(best.plan) <= most or middle == bench.steps:
            high, found = middle, (best, others)
        else:
            low = middle + 1
    best, others = found
    return best, _errors(bench, best, others)


def find_plan(
    bench: BaseBench,
    budget: float | None,
    max_error: float,
    made_for: dict[str, Any],
    calibration: dict[str, Any],
    kinds: str | None = None,
    cost: str = "flops",
) -> CachePlan:
    """Calibrate, and return the best plan of a cost; without a budget, the cheapest with at most this error; or the one
    of a given schedule, without a search. Prints first what that will cost.

    Args:
        kinds: the schedule.
        made_for, calibration: entries of the plan's file.
        cost: what counts as cost: "flops", or "time", which is measured first.

    Raises ValueError for a bench that cannot be planned for, or a budget that buys no plan.
    """
    if cost not in COSTS:
        raise UserError(f"cost is {cost!r}; known: {', '.join(COSTS)}")
    runs, unknown = _runs(bench), "" if budget or kinds else ", or several times that"
    if kinds:  # that run, and those of the controls
        runs, budget = 11, cost_of(kinds, bench.costs["flops"])
    whole = sum(bench.factors) + runs * (budget or bench.steps / 2) / bench.steps
    print(f"this costs about what {whole:.0f} uncached runs of the samples do{unknown}")
    bench.calibrate()
    if cost == "time":
        bench.measure()
        print("\n".join(cost_table(bench.seconds, bench.costs)))
    if kinds:
        fitted, errors = follow(bench, kinds)
    else:
        fitted, errors = make_plan(bench, budget) if budget else within(bench, max_error)
    speedups: dict[str, Any] = {"speedup": bench.speedup(fitted.plan, "flops")}
    if cost == "time":
        speedups |= {"speedup_in_time": bench.speedup(fitted.plan, "time"), "costs": bench.costs}
        speedups |= {"seconds_per_step": bench.seconds}
    about = {
        "format": "skipdit plan 2",
        **made_for,
        "sampler": bench.sampler.method,
        "target": bench.target,
        **speedups,
        "errors": errors,
        "calibration": calibration,
        **versions(),
    }
    return replace(fitted.plan, about=about)


def budget_of(steps: int, budget: float | None, speedup: float | None) -> float | None:
    """The cost of a plan, in full steps; None if neither a budget nor a speedup is given. Raises ValueError for one
    that a run of so many steps cannot have.
    """
    if budget is not None:
        if not 1 <= budget <= steps:
            raise UserError(f"--budget is {budget} full steps; a run of {steps} has 1 to {steps}")
        return budget
    if speedup is None:
        return None
    if not 1 <= speedup <= steps:
        raise UserError(f"--speedup is {speedup:g}; with {steps} steps, 1 to {steps} is possible")
    return steps / speedup
