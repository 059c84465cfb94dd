"""Plan a run: which steps are full, which cached, which forecasts, and what they combine: `skipdit plan`.

1. The sampler runs uncached on calibration samples, and, for the target "converged", with two and four times as many
   steps, from which the converged latents at every timestep follow by extrapolation.
2. A schedule says the kind of every step. It is fitted in a single run: at each step, least squares finds the
   coefficients that bring the latents nearest to the target's; see `planning.fitting`.
3. The search fits schedules of one cost, from forecasts alone to cached steps alone, and exchanges neighbouring steps
   of the best of them. What measures best is the plan: each candidate is its own measurement.
4. Controls of the same cost are measured beside it.
"""

import argparse
from pathlib import Path

from skipdit.caching.plans import CachePlan
from skipdit.caching.policy import CACHED, NAMES
from skipdit.cli import friendly_errors
from skipdit.config import changed, to_dict
from skipdit.planning.calibration import Bench
from skipdit.planning.schedules import stretched
from skipdit.planning.search import budget_of, find_plan
from skipdit.planning.tables import table
from skipdit.tasks import read_settings
from skipdit.utils.errors import UserError
from skipdit.utils.files import whole_file
from skipdit.utils.provenance import fingerprint


@friendly_errors("starts anew")
def main(args: argparse.Namespace) -> None:
    if not args.out.endswith(".json") or Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: a plan is a file that ends in .json")
    if args.max_error is not None and not args.max_error > 0:
        raise UserError(f"--max-error is {args.max_error:g}; it must be above 0")
    plan = from_pipeline(args) if args.pipeline else from_config(args)
    errors = plan.about["errors"]
    print("\n".join(table(errors, plan.about["target"])))
    # an uncached run of all steps costs more, and fitted schedules are plans themselves
    same = {name: error for name, error in errors.items() if not name.endswith(("uncached", "fitted"))}
    if errors[best := min(same, key=same.get)] < 0.999 * errors["plan"]:  # a fit's own error differs by rounding
        print(f"\nOn these samples, {best} comes nearer than the plan.")
    if args.max_error is not None and errors["plan"] > args.max_error:
        print(f"\nNot even all steps reach an error of {args.max_error:g}.")
    counts = ", ".join(f"{plan.kinds.count(letter)} {name}" for letter, name in NAMES.items())
    faster = f"{plan.about['speedup']:.2f}x fewer FLOPs"
    if args.cost == "time":
        faster += f", {plan.about['speedup_in_time']:.2f}x faster by the measured steps"
    print(f"\n{args.out}: {counts} of {len(plan.kinds)} steps, {faster}")
    print(f'use it with enable_cache(pipe, "{args.out}")' if args.pipeline else f"use it with --cache {args.out}")


def from_config(args: argparse.Namespace) -> CachePlan:
    """Plan for the sampler of a config, and save the plan."""
    task, config = read_settings(args)
    if args.steps is not None:
        config = changed(config, {"steps": args.steps})
    budget = budget_of(config.steps, args.budget, args.speedup)
    sampler = task.open_sampler(config, args.branch)
    target = args.target or ("converged" if sampler.refined(config.steps, 4) else "sampler")
    bench = Bench(sampler, config.steps, args.branch, target)
    bench.exchanges = args.exchanges
    made_for = {"model": fingerprint(bench.model), "guidance_scale": config.guidance_scale}
    calibration = {"config": args.config, "samples": sampler.total, **to_dict(config)}
    kinds = kinds_like(args.like, config.steps, args.branch)
    return saved(find_plan(bench, budget, args.max_error, made_for, calibration, kinds, args.cost), args.out)


def from_pipeline(args: argparse.Namespace) -> CachePlan:
    """Plan for a diffusers pipeline, save the plan, and images beside it."""
    from skipdit.planning.pipeline_command import held_out, open_bench

    bench = open_bench(args)
    bench.exchanges = args.exchanges
    budget = budget_of(bench.steps, args.budget, args.speedup)
    about = {"pipeline": args.pipeline} | bench.about()
    kinds = kinds_like(args.like, bench.steps, 0)
    plan = saved(find_plan(bench, budget, args.max_error, bench.made_for(), about, kinds, args.cost), args.out)
    held_out(bench, plan, args.out)
    return plan


def kinds_like(file: str | None, steps: int, branch: int) -> str | None:
    """The schedule of a plan, for so many steps. Raises ValueError if its cached steps are of another branch."""
    if file is None:
        return None
    plan = CachePlan.load(file)
    if CACHED in plan.kinds and branch != plan.branch:
        wanted = f"--branch {plan.branch}" if branch else "a plan of full and forecast steps"
        raise UserError(f"--like {file}: its cached steps run the branch {plan.branch}; this wants {wanted}")
    return stretched(plan.kinds, steps)


def saved(plan: CachePlan, out: str) -> CachePlan:
    with whole_file(out) as partial:
        plan.save(partial)
    return plan
