"""Planning: schedules, and the search among them on benches whose errors are known."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policy import NAMES
from skipdit.planning.calibration import BaseBench, Fitted
from skipdit.planning.controls import controls
from skipdit.planning.schedules import affordable, best_full_steps, cost_of, even_full_steps, schedule, stretched
from skipdit.planning.search import CACHED_ALONE, FORECASTS, Search, make_plan, within

# Schedules


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_schedules_have_the_steps_that_they_are_asked_for(steps):
    for full in range(1, steps + 1):
        chosen = even_full_steps(steps, full)
        assert len(chosen) == full and chosen[0] == 0 and chosen[-1] < steps
        gaps = [after - before for before, after in pairwise([*chosen, steps])]
        assert min(gaps) > 0 and max(gaps) - min(gaps) <= 1
        for cached in range(steps - full + 1):
            kinds = schedule(steps, chosen, cached)
            assert [k for k, kind in enumerate(kinds) if kind == "F"] == chosen
            assert (len(kinds), kinds.count("S")) == (steps, cached)


def test_cached_steps_lie_in_the_middle_of_gaps_or_later():
    assert schedule(9, [0, 3, 6], 3) == "FOSFOSFOS"
    assert schedule(9, [0, 3, 6], 0) == "FOOFOOFOO"
    assert schedule(10, [0, 5], 2) == "FOOSOFOOSO"
    assert schedule(8, [0, 4], 4) == "FSOSFSOS"
    assert schedule(8, [0, 1, 7], 3) == "FFOSSOSF"


def forecasts_lose(outputs: np.ndarray, gains: np.ndarray, full: Sequence[int], fitted: bool) -> float:
    """The squared error of the latents right after every forecast, in all."""
    lost = 0.0
    for k in range(len(outputs)):
        before = [j for j in full if j <= k][-2:]
        here = outputs[before[-1]]
        ahead, move = 0.0, here - outputs[before[0]]
        if len(before) == 2 and before[1] < k:
            asked = (k - before[1]) / (before[1] - before[0])
            ahead = (outputs[k] - here) @ move / (move @ move) if fitted else asked
        lost += gains[k] ** 2 * np.square(outputs[k] - here - ahead * move).sum()
    return lost


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_full_steps_are_those_between_which_forecasts_lose_least(steps, fitted):
    random = np.random.default_rng(steps)
    outputs, gains = random.normal(size=(steps, 4)).cumsum(0), random.uniform(0.5, 2, steps)
    for count in range(1, steps + 1):
        chosen = best_full_steps(outputs @ outputs.T, gains, count, fitted)
        every = [[0, *rest] for rest in combinations(range(1, steps), count - 1)]
        assert chosen == min(every, key=lambda full: forecasts_lose(outputs, gains, full, fitted))


def test_steps_of_equal_outputs_need_no_second_full_step():
    """Nor do inner products that were rounded, by which such outputs seem to be apart, or even less than that."""
    random = np.random.default_rng(0)
    outputs = np.repeat(random.normal(size=(3, 5)), 3, 0)
    products = outputs @ outputs.T + 1e-15 * random.normal(size=(9, 9))
    assert best_full_steps((products + products.T) / 2, np.ones(9), 3, fitted=True) == [0, 3, 6]


def test_full_steps_of_long_runs_are_found_in_time():
    outputs = np.random.default_rng(0).normal(size=(1000, 8)).cumsum(0)
    chosen = best_full_steps(outputs @ outputs.T, np.ones(1000), 400, True)
    assert len(set(chosen)) == 400 and chosen == sorted(chosen) and chosen[0] == 0


@pytest.mark.parametrize("kinds", ["F", "FF", "FSOFSOOF", "FOOOOOOFOOOOFOOFOOOFOOFOOFOOF", "FFFFSSSS", "FOOOOOOO"])
def test_stretched_schedules_keep_their_shares_and_places(kinds):
    assert stretched(kinds, len(kinds)) == kinds
    for steps in range(1, 3 * len(kinds)):
        new = stretched(kinds, steps)
        assert len(new) == steps and new[0] == "F" and set(new) <= set(kinds)
        assert abs(new.count("F") - kinds.count("F") * steps / len(kinds)) <= 1


def test_stretched_schedules_by_hand():
    assert stretched("FOSFOS", 12) == "FOOFSSFOOFSS"
    assert stretched("FFFOOOOOOOOO", 8) == "FFOOOOOO"
    assert stretched("FOOOOOOOOOFF", 24) == "FOOOOOOOOOFOOOOOOOOOFFFF"


def costs(cached: float, forecast: float = 0.0) -> dict[str, float]:
    return {"full": 1.0, "cached": cached, "forecast": forecast}


def test_affordable_is_the_most_that_a_budget_buys():
    assert affordable(50, 14, costs(0.1), 0.0) == (14, 0)
    assert affordable(50, 14, costs(0.1), 1.0) == (10, 40)
    assert affordable(50, 14, costs(0.1, 0.05), 0.0) == (12, 0)
    assert affordable(50, 0.5, costs(0.1), 0.0) == affordable(50, 1, costs(0.1), 1.0) == (0, 0)
    assert affordable(50, 3, costs(0.1, 0.05), 0.0) == (0, 0)
    for share in (0.0, 0.3, 1.0):
        full, cached = affordable(20, 7.3, costs(0.08, 0.02), share)
        rest = 20 - full - cached
        assert full + 0.08 * cached + 0.02 * rest <= 7.3 < full + 1 + 0.08 * round(share * (19 - full))


def test_the_cost_of_a_schedule():
    assert cost_of("FSOOSF", costs(0.2, 0.05)) == pytest.approx(2 + 2 * 0.2 + 2 * 0.05)
    assert cost_of("FOO", {"full": 1.0, "forecast": 0.0}) == 1


# The search


class Known(BaseBench):
    """A bench whose steps take what is given, and whose error is 0.1 per cached step and 2 per forecast."""

    def __init__(self, taken: dict[str, float]):
        self.steps, self.branch, self._taken = 12, 1, taken
        self.costs = {"flops": costs(0.1)}
        self.timesteps = tuple(range(12, 0, -1))
        self.sampler = SimpleNamespace(method="ddim", solvers=())
        self.products, self.gains, self.exchanges = np.eye(12), np.ones(12), 4
        self.measure()

    def calibrate(self) -> None:
        pass

    def step_ends(self, kinds: str) -> list[float]:
        return list(accumulate(self._taken[NAMES[kind]] for kind in kinds))

    def fit(self, kinds: str, base: Fitted | None = None, keep: bool = False) -> Fitted:
        plan = CachePlan(self.timesteps, tuple(() if kind == "S" else None for kind in kinds), 1, kinds)
        return Fitted(plan, self.error(plan))

    def error(self, policy, *run) -> float:
        kinds = policy.step_kinds(self.timesteps)
        return kinds.count("S") * 0.1 + kinds.count("O") * 2.0


@pytest.mark.parametrize(("cached", "chosen"), [(0.1, True), (0.9, True), (1.0, False), (1.2, False)])
def test_cached_steps_are_planned_if_they_cost_less_than_full_ones(cached, chosen):
    plan, errors = make_plan(Known(costs(cached)), 11)
    assert ("S" in plan.plan.kinds) == (CACHED_ALONE in errors) == (FORECASTS in errors) == chosen
    assert cost_of(plan.plan.kinds, costs(cached)) <= 11


class Placed(Known):
    """A bench whose error grows with the distance of the full steps from where they should be."""

    wanted = (0, 4, 9, 11)

    def __init__(self, exchanges: int):
        super().__init__(costs(1.0))
        self.exchanges, self.fits, self.bases = exchanges, 0, []

    def fit(self, kinds: str, base: Fitted | None = None, keep: bool = False) -> Fitted:
        self.fits += 1
        if base:
            assert keep
            self.bases.append((base.plan.kinds, kinds))
        return super().fit(kinds, base, keep)

    def error(self, policy, *run) -> float:
        full = [k for k, kind in enumerate(policy.step_kinds(self.timesteps)) if kind == "F"]
        return 1.0 + sum(abs(k - place) for k, place in zip(full, self.wanted, strict=False))


def test_exchanges_of_neighbours_end_where_none_of_them_helps():
    bench = Placed(exchanges=100)
    plan, errors = make_plan(bench, 4)
    assert plan.plan.kinds == "FOOOFOOOOFOF" and plan.error == errors["plan"] == 1.0
    assert bench.fits < 60
    assert len(bench.bases) > 5  # fits begin with the steps of the best schedule so far, which is an exchange away
    for base, kinds in bench.bases:
        first, second = (k for k in range(12) if base[k] != kinds[k])
        assert second == first + 1


def test_steps_that_have_to_be_full_are_paid_for():
    bench = Placed(exchanges=100)
    bench.restarts = (6,)
    plan, _ = make_plan(bench, 4)
    assert (plan.plan.kinds.count("F"), plan.plan.kinds[6]) == (4, "F")
    plan, _ = make_plan(bench, 2)
    assert plan.plan.kinds == "FOOOOOFOOOOO"
    with pytest.raises(ValueError, match=r"1\.50 full steps buy no plan: 12 steps cost at least 2\.00"):
        make_plan(bench, 1.5)


@pytest.mark.parametrize("budget", [1, 12])
def test_schedules_without_exchanges_are_fitted_once(budget):
    bench = Placed(exchanges=100)
    plan, _ = make_plan(bench, budget)
    assert bench.fits == 1 and plan.plan.kinds.count("F") == budget


@pytest.mark.parametrize("exchanges", [0, 3])
def test_exchanges_of_neighbours_are_limited(exchanges):
    started = Placed(exchanges)
    search = Search(started, 4, tqdm(disable=True))
    starts = search.starts(0.0)
    assert starts[0] == "FOOFOOFOOFOO" and len(starts) == 3  # the even one
    least = min(map(search.error, starts))
    fits = started.fits
    found = search.improved(min(starts, key=search.error))
    assert started.fits == fits + exchanges + (exchanges > 0) and found.error <= least - (exchanges > 0)


def test_schedules_that_are_far_behind_are_not_improved(monkeypatch):
    improved = []
    monkeypatch.setattr(Search, "improved", lambda self, kinds: improved.append(kinds) or self.tried[kinds])
    make_plan(Known(costs(0.1)), 6)  # a forecast costs twenty times the error of a cached step
    assert improved and all("O" not in kinds for kinds in improved)


def test_forecasts_have_their_cost():
    plan, _ = make_plan(Known(costs(1.0, 0.2)), 6)
    assert plan.plan.kinds.count("F") == 4  # 4 + 8 * 0.2 = 5.6
    with pytest.raises(ValueError, match=r"3\.00 full steps buy no plan: 12 steps cost at least 3\.20"):
        make_plan(Known(costs(1.0, 0.2)), 3)


def test_plans_of_an_error_begin_at_the_least_cost():
    """That of forecasts, which is above one full step here."""
    plan, _ = within(Known(costs(0.5, 0.2)), 100)
    assert 3.2 <= cost_of(plan.plan.kinds, costs(0.5, 0.2)) <= 4
    plan, _ = within(Known(costs(0.5, 2.0)), 0.61)  # forecasts cost more than full steps
    assert "O" not in plan.plan.kinds and plan.error <= 0.61 and cost_of(plan.plan.kinds, costs(0.5, 2.0)) <= 9
    plan, _ = make_plan(Known(costs(0.1, 0.3)), 3)  # which 11 forecasts would cost more than
    assert "O" not in plan.plan.kinds


def test_an_error_is_the_measured_one():
    """Not that of the fit."""

    class Hopeful(Known):
        def fit(self, *args, **kwargs) -> Fitted:
            return replace(super().fit(*args, **kwargs), error=0.0)

    _, errors = within(Hopeful(costs(0.5, 2.0)), 0.61)
    assert errors["plan"] <= 0.61


@pytest.mark.parametrize(("budget", "branches"), [(11, [1, 1, 0, 0]), (2, [0, 0])])
def test_controls_cost_what_the_plan_costs(budget, branches):
    """By outputs alone where cached steps at the largest interval cost more."""
    rows = [row for row in controls(Known(costs(0.5, 0.1)), budget) if row.spec.caches]
    assert [row.spec.branch for row in rows] == branches
    assert [" b0, " in row.name for row in rows] == [not branch for branch in branches]
