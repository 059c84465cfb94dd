"""Plan a run's full steps, and what its cached steps see: `python -m skipdit plan`.

How, for a run of T steps whose full steps ... h < i < j ... leave the features ... f_h, f_i, f_j:
1. In an uncached run, every step is also predicted with each earlier feature in place of its own: the error d_j of f_j.
   The few layers behind the feature are close to affine, so that f_j + u (f_j - f_i) + v (f_i - f_h) gives
   d_j + u (d_j - d_i) + v (d_i - d_h): the best u and v, and what error is left, follow from inner products of the d.
2. Runs of a cached sampler with the weight of one step moved tell how far an error there moves each sample: the
   sensitivity.
3. Dynamic programming over the last full steps finds the schedule with the least error. Errors of one feature are alike
   and add up over the cached steps that use it; those of different features do not.
4. It is run beside schedules of other kinds and the same cost. Of the best, the weights of all cached steps are fitted
   together, so that their errors cancel: Gauss-Newton on the final images, each sample's error relative to its own.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.cli import friendly_errors
from skipdit.config import to_dict
from skipdit.layers.flops import uncached_steps
from skipdit.planning.calibration import Bench
from skipdit.planning.errors import Errors, Weights
from skipdit.planning.fitting import DAMPING, fit
from skipdit.planning.schedules import forecast, greedy, optimal, uniform, widened
from skipdit.tasks import read_settings
from skipdit.utils.files import whole_file
from skipdit.utils.provenance import fingerprint, versions

SEED = 10_000  # of calibration samples; no config has it


def budget_of(bench: Bench, args: argparse.Namespace) -> int | None:
    """Full steps that a command line asks for; None if that depends on an error.

    Raises ValueError for what no plan can give.
    """
    if args.budget is not None:
        if not 1 <= args.budget <= bench.steps:
            raise ValueError(f"--budget is {args.budget} full steps; a run of {bench.steps} has 1 to {bench.steps}")
        return args.budget
    if args.speedup is None:
        return None
    full, cached = bench.sampler.flops["full"], bench.sampler.flops["cached"]
    most = bench.steps * full / (full + (bench.steps - 1) * cached)
    if not 1 <= args.speedup <= most or full == cached:
        raise ValueError(f"--speedup is {args.speedup:g}; with this model and branch, 1 to {most:.2f} is possible")
    return math.floor((bench.steps * full / args.speedup - bench.steps * cached) / (full - cached) + 1e-9)


def candidates(errors: Errors, budget: int) -> dict[str, Weights]:
    """Plans with so many full steps, by name."""
    even = uniform(errors.steps, budget)
    schedules = {"planned": optimal(errors, budget), "uniform": even}
    if errors.total(chosen := greedy(errors, budget)) < math.inf:  # it may have left its reach
        schedules["greedy"] = chosen
    plans = {name: errors.weights(full) for name, full in schedules.items()}
    if errors.memory > 1:
        plans["uniform, linear forecast"] = forecast(errors.steps, even, 1)
    return plans | {"uniform, reuse": forecast(errors.steps, even, 0)}


def make_plan(bench: Bench, errors: Errors, budget: int, rounds: int) -> tuple[CachePlan, dict[str, float]]:
    """The best plan with so many full steps that could be found, and the measured errors of it and all others.

    Args:
        rounds: of the joint fit.
    """
    plans = candidates(errors, budget)
    measured = {name: bench.error(bench.plan(w)) for name, w in tqdm(plans.items(), desc="candidates", unit="run")}
    start = min(measured, key=measured.get)
    fitted = f"{start}, fitted"
    plans[fitted] = fit(bench, widened(plans[start], errors.memory), rounds)
    measured[fitted] = bench.error(bench.plan(plans[fitted]))
    best = min(measured, key=measured.get)  # never worse than a control, where it was measured
    plan = replace(bench.plan(plans[best]), about={"chosen": best, "step_errors": errors.curve(plans[best])})
    steps = uncached_steps(bench.flops(plan), bench.sampler.flops)
    measured[f"{steps} steps, uncached"] = bench.error(CacheSpec(), steps)
    return plan, measured


def within(bench: Bench, errors: Errors, most: float, rounds: int) -> tuple[CachePlan, dict[str, float]]:
    """As `make_plan`, with the fewest full steps whose plan has at most this error. Found by halving, as if more full
    steps never gave a larger error; each try is a whole plan."""
    low, high = math.ceil(bench.steps / errors.reach), bench.steps  # all steps full is no error
    found = None
    while low < high or found is None:
        middle = (low + high) // 2
        plan, measured = make_plan(bench, errors, middle, rounds)
        if bench.error(plan) <= most or middle == bench.steps:
            high, found = middle, (plan, measured)
        else:
            low = middle + 1
    return found


def main(args: argparse.Namespace) -> None:
    with friendly_errors("starts anew"):
        if not args.out.endswith(".json") or Path(args.out).is_dir():
            raise ValueError(f"--out {args.out}: a plan is a file that ends in .json")
        plan, measured = run(args)
        with whole_file(args.out) as partial:
            plan.save(partial)
    full = plan.weights.count(None)
    print(f"\n{'':32s}  error   PSNR")
    for name, error in sorted(measured.items(), key=lambda item: item[1]):
        print(f"{name:32s}  {error:.4f}  {psnr_of(error):5.1f}")
    if (best := min(measured, key=measured.get)).endswith("uncached"):
        print(f"\nNo plan of this cost comes as near as simply {best}.")
    print(f"\n{args.out}, {plan.about['chosen']}: {full} of {len(plan.weights)} steps full,", end=" ")
    print(f"{plan.about['speedup']:.2f}x fewer FLOPs")


def calibration_cost(bench: Bench, full: int, reach: int, args: argparse.Namespace) -> float:
    """Roughly, in uncached runs, for a plan with so many full steps."""
    steps = bench.steps
    predictions = sum(min(k, 2 * reach) for k in range(steps)) / steps  # of a watched step
    moved = args.probes + (steps - full) * (args.memory - 1) * args.rounds  # half of which are run
    tried = 1 + 5 + args.rounds * (1 + len(DAMPING))  # the even forecast, candidates, the fit's before and after
    share = (full + (steps - full) * bench.cached_cost) / steps
    return 1 + predictions * bench.cached_cost + share * (tried + moved / 2 + 1)  # and fewer steps


def psnr_of(error: float) -> float:
    return -20 * math.log10(max(error, 1e-10))


def run(args: argparse.Namespace) -> tuple[CachePlan, dict[str, float]]:
    """Calibrate and plan as a command line says."""
    task, config = read_settings(args)
    config.cache, config.compile = "none", "none"
    config.steps = args.steps or config.steps
    sampler = task.open_sampler(config, args.branch)
    bench = Bench(sampler, config.steps, args.branch)
    budget = budget_of(bench, args)
    spread = config.steps / (budget or config.steps / 4)
    reach = min(args.reach or max(24, math.ceil(3 * spread)), config.steps)
    full = budget or math.ceil(config.steps / min(4, reach))
    if full * reach < config.steps:
        raise ValueError(f"--reach {reach} is too short for {full} full steps of {config.steps}")
    cost = calibration_cost(bench, full, reach, args)
    print(f"calibration costs what {cost:.0f} uncached runs do" + ("" if budget else ", or several times that"))
    errors = bench.calibrate(reach, args.probes, full, args.memory)
    if budget is None:
        plan, measured = within(bench, errors, args.max_error, args.rounds)
    else:
        plan, measured = make_plan(bench, errors, budget, args.rounds)
    about = {
        "format": "skipdit plan 1",
        "model": fingerprint(bench.model),
        "sampler": sampler.method,
        "guidance_scale": config.guidance_scale,
        "speedup": bench.speedup(plan),
        "errors": measured,
        "sensitivity": errors.sensitivity,
        "reach": reach,
        "calibration": {"config": args.config, "samples": sum(map(len, bench.reference)), **to_dict(config)},
        **versions(),
    }
    return replace(plan, about=about | plan.about), measured
