"""Plan a run: which steps are full, which cached, which forecasts, and what they combine: `python -m skipdit plan`.

1. The sampler runs uncached on calibration samples, and, for the target "converged", with two and four times as many
   steps, from which the converged latents at every timestep follow by extrapolation.
2. A schedule says the kind of every step. It is fitted in a single run: at each step, least squares finds the
   coefficients that bring the latents nearest to the target's; see `planning.fitting`.
3. The search fits schedules of one cost: from forecasts alone to cached steps alone, more of them early or late. What
   measures best is the plan. There is no model of the error: each candidate is its own measurement.
4. Controls of the same cost are measured beside it.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from skipdit.caching.policy import NAMES
from skipdit.cli import friendly_errors
from skipdit.config import changed, to_dict
from skipdit.planning.calibration import Bench, Fitted
from skipdit.planning.controls import controls
from skipdit.planning.schedules import affordable, schedule
from skipdit.tasks import read_settings
from skipdit.utils.errors import UserError
from skipdit.utils.files import whole_file
from skipdit.utils.provenance import fingerprint, versions

SHARES = (0.0, 1 / 3, 2 / 3, 1.0)  # of the steps that are not full: cached ones, the others are forecasts
WARPS = (0.5, 0.7, 0.85, 1.0, 1.25, 1.5)  # this and the next two: see `schedules.full_steps`
TAILS = (0, 1, 3)
HEADS = (1, 2, 3)
RUNS = 45  # about how many runs of the plan's cost it takes to find one, controls included
FORECASTS, CACHED_ALONE = "forecasts alone, fitted", "cached steps alone, fitted"


class Search:
    """Fits schedules of one cost.

    Args:
        budget: in full steps.
        progress: of fits.

    Attributes:
        tried: kinds of steps -> the fitted plan.
    """

    def __init__(self, bench: Bench, budget: float, progress: tqdm):
        self.bench, self.budget, self.progress = bench, budget, progress
        self.tried: dict[str, Fitted] = {}

    def kinds(self, share: float, warp: float = 1.0, tail: int = 0, head: int = 2) -> str | None:
        """The schedule; None if the budget does not buy it."""
        full, cached = affordable(self.bench.steps, self.budget, self.bench.cached_cost, share)
        return schedule(self.bench.steps, full, cached, warp, head, tail) if full else None

    def error(self, *choices: float) -> float:
        """The error of a schedule; infinite if the budget does not buy it. Arguments as of `kinds`."""
        kinds = self.kinds(*choices)
        if kinds is None:
            return math.inf
        if kinds not in self.tried:
            self.tried[kinds] = self.bench.fit(kinds)
            self.progress.update()
        return self.tried[kinds].error

    def descend(self, shares: tuple[float, ...]) -> Fitted:
        """The best plan among these shares: one choice at a time, the others held."""
        chosen: list[float] = []
        for choices in (shares, WARPS, TAILS, HEADS):
            chosen.append(min(choices, key=lambda each: self.error(*chosen, each)))
        return self.tried[self.kinds(*chosen)]


def make_plan(bench: Bench, budget: float) -> tuple[Fitted, dict[str, float]]:
    """The best plan of a cost, and the errors of it and of the controls.

    Args:
        budget: in full steps.

    Raises ValueError if the budget buys no plan.
    """
    shares = SHARES if bench.branch and bench.cached_cost < 1 else (0.0,)
    with tqdm(desc="schedules fitted", unit="run") as progress:
        search = Search(bench, budget, progress)
        if search.kinds(0.0) is None:
            raise UserError(f"{budget:.2f} full steps buy no plan: the first step is full")
        alone = {FORECASTS: search.descend((0.0,))}
        if len(shares) > 1 and search.kinds(1.0):
            alone[CACHED_ALONE] = search.descend((1.0,))
        search.descend(shares)
    best = min(search.tried.values(), key=lambda fitted: fitted.error)
    errors = {"plan": best.error} | {name: fitted.error for name, fitted in alone.items()}
    beside = tqdm(controls(bench, bench.flops(best.plan)), desc="controls", unit="run")
    return best, errors | {each.name: bench.error(each.policy, each.steps, each.method) for each in beside}


def within(bench: Bench, most: float) -> tuple[Fitted, dict[str, float]]:
    """As `make_plan`, with the fewest full steps' worth whose plan has at most this error. Found by halving, as if a
    larger budget never gave a larger error; each try is a whole plan.
    """
    low, high, found = 1, bench.steps, None
    while low < high or found is None:
        middle = (low + high) // 2
        plan, errors = make_plan(bench, middle)
        if plan.error <= most or middle == bench.steps:
            high, found = middle, (plan, errors)
        else:
            low = middle + 1
    return found


def budget_of(steps: int, args: argparse.Namespace) -> float | None:
    """Full steps' worth of FLOPs that a command line asks for; None if that depends on an error."""
    if args.budget is not None:
        if not 1 <= args.budget <= steps:
            raise UserError(f"--budget is {args.budget} full steps; a run of {steps} has 1 to {steps}")
        return args.budget
    if args.speedup is None:
        return None
    if not 1 <= args.speedup <= steps:
        raise UserError(f"--speedup is {args.speedup:g}; with {steps} steps, 1 to {steps} is possible")
    return steps / args.speedup


def main(args: argparse.Namespace) -> None:
    with friendly_errors("starts anew"):
        if not args.out.endswith(".json") or Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: a plan is a file that ends in .json")
        fitted, errors = run(args)
        plan = fitted.plan
        with whole_file(args.out) as partial:
            plan.save(partial)
    print("\n".join(table(errors, plan.about["target"])))
    same = {name: error for name, error in errors.items() if not name.endswith("uncached")}  # that costs more
    if errors[best := min(same, key=same.get)] < errors["plan"]:
        print(f"\nOn these samples, {best} comes nearer than any plan of this cost.")
    counts = ", ".join(f"{plan.kinds.count(letter)} {name}" for letter, name in NAMES.items())
    print(f"\n{args.out}: {counts} of {len(plan.kinds)} steps, {plan.about['speedup']:.2f}x fewer FLOPs")
    print(f"use it with --cache {args.out}")


def table(errors: dict[str, float], target: str) -> Iterator[str]:
    """Lines that show errors, the smallest first."""
    what = "the converged images" if target == "converged" else "the uncached images"
    yield f"\n{'distance to ' + what:40s}  error   PSNR"
    for name, error in sorted(errors.items(), key=lambda item: item[1]):
        yield f"{name:40s}  {error:.4f}  {psnr_of(error):5.1f}"


def psnr_of(error: float) -> float:
    """Of an error as `Bench.error` gives it, in dB."""
    return math.inf if error < 2e-10 else -20 * math.log10(error)


def run(args: argparse.Namespace) -> tuple[Fitted, dict[str, float]]:
    """Plan as the command line asks for."""
    task, config = read_settings(args)
    if args.steps is not None:
        config = changed(config, {"steps": args.steps})
    budget = budget_of(config.steps, args)
    if args.max_error is not None and not args.max_error > 0:
        raise UserError(f"--max-error is {args.max_error:g}; it must be above 0")
    sampler = task.open_sampler(config, args.branch)
    target = args.target or ("converged" if sampler.refined(config.steps, 4) else "sampler")
    bench = Bench(sampler, config.steps, args.branch, target)
    cost = sum(bench.factors) + RUNS * (budget or config.steps / 2) / config.steps
    print(
        f"this costs about what {cost:.0f} uncached runs of the samples do"
        + ("" if budget else ", or several times that")
    )
    bench.calibrate()
    fitted, errors = within(bench, args.max_error) if budget is None else make_plan(bench, budget)
    about = {
        "format": "skipdit plan 2",
        "model": fingerprint(bench.model),
        "sampler": sampler.method,
        "guidance_scale": config.guidance_scale,
        "target": target,
        "speedup": bench.speedup(fitted.plan),
        "errors": errors,
        "calibration": {"config": args.config, "samples": sampler.total, **to_dict(config)},
        **versions(),
    }
    return replace(fitted, plan=replace(fitted.plan, about=about)), errors
