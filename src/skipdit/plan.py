"""Plan which steps of a sampling run are full: the best use of a budget, measured on a few runs of the model itself.

    python -m skipdit.plan --config configs/class-to-image/demo.yaml --budget 12 --out plan.json
    python -m skipdit.plan --config configs/text-to-video/demo.yaml --speedup 1.5 --out plan.json steps=50
    python -m skipdit.plan --config configs/class-to-image/demo.yaml --max-error 0.02 --out plan.json
    python class-to-image/sample.py --config configs/class-to-image/demo.yaml --cache plan.json

Take samples for it that are judged nowhere else: --seed is not that of the config, and prompts should be others, too.
The plan is for this model, sampler, number of steps and guidance, and is refused on other timesteps.

How, for a run of T steps whose full steps ... i < j < ... leave the features ... f_i, f_j ...:
1. In an uncached run, every step k is also predicted with each earlier feature f_j in place of its own: the error d_j.
   The few layers behind the feature are close to affine, so that f_j + w (f_j - f_i) gives d_j + w (d_j - d_i), whose
   square is least at a known w: the error e(i, j, k) of all pairs follows from the inner products of the d.
2. A few runs with one cached step each give how much an error at step k moves the final sample: the sensitivity s(k).
3. Dynamic programming over pairs of full steps finds the plan with the least error, the sum over full steps j of the
   squared sum of s(k) e(i, j, k) over the cached steps k that follow: errors of one feature are alike, and add up.
4. It, and the controls of the same cost, are run. What is best in truth is improved step by step, and written.
"""

import argparse
import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from skipdit.bench import run_flops
from skipdit.cache import CachePlan, CacheSpec, CacheStep, Policy, SkipCache
from skipdit.compare import Sampler
from skipdit.config import friendly_errors, load_config, to_dict
from skipdit.sample import versions
from skipdit.skip import SkipTransformer, predicted_noise
from skipdit.task import find_task
from skipdit.weights import fingerprint

MOST = 2.0  # times the linear forecast that a fitted weight may be


@dataclass
class Errors:
    """What uncached runs tell of every step that could be cached.

    Attributes:
        steps: T.
        reach: the largest distance of two full steps, and of a cached one from the last full one.
        products: (i, j, k), i and j < k -> mean over the latents of the product of the errors of the noise at step k
            with the features of steps i and j.
        sensitivity: per step, mean squared error of the final latents over that of the noise at this step.
    """

    steps: int
    reach: int
    products: dict[tuple[int, int, int], float] = field(default_factory=dict)
    sensitivity: list[float] = field(default_factory=list)

    def best(self, i: int | None, j: int, k: int) -> tuple[float, float]:
        """The weight w for which f_j + w (f_j - f_i) predicts step k best, and its squared error. i None: reuse f_j."""
        reused = self.products[j, j, k]
        if i is None:
            return 0.0, reused
        slope = reused - self.products[i, j, k]  # d_j (d_j - d_i)
        curvature = slope - self.products[i, j, k] + self.products[i, i, k]  # (d_j - d_i)^2
        weight = min(max(-slope / curvature, 0.0), MOST * (k - j) / (j - i)) if curvature > 0 else 0.0
        return weight, max(reused + 2 * weight * slope + weight**2 * curvature, 0.0)

    def cost(self, i: int | None, j: int, end: int) -> float:
        """Squared error of the final latents that the cached steps after the full steps i and j cause, before `end`.

        The errors of one feature are alike from step to step and add up; those of different features do not.
        """
        return sum(math.sqrt(self.sensitivity[k] * self.best(i, j, k)[1]) for k in range(j + 1, end)) ** 2

    def weights(self, full: Sequence[int], order: int | None = None) -> list[float | None]:
        """Those of a `CachePlan` with these full steps. `order` 0 reuses, 1 forecasts linearly, None fits."""
        weights: list[float | None] = []
        for k in range(self.steps):
            before = [j for j in full if j < k][-2:]
            if k in full:
                weights.append(None)
            elif len(before) < 2 or order == 0:
                weights.append(0.0)
            else:
                i, j = before
                fitted = order is None and (i, i, k) in self.products
                weights.append(self.best(i, j, k)[0] if fitted else (k - j) / (j - i))
        return weights


def optimal(errors: Errors, budget: int) -> list[int]:
    """The `budget` full steps with the least sum of costs, exactly: dynamic programming over (last but one, last).

    Raises ValueError if so few cannot span the run within the errors' reach.
    """
    steps, reach = errors.steps, errors.reach
    # (last but one, last) -> least cost so far and the full steps that have it; the first step is always full
    states: dict[tuple[int | None, int], tuple[float, list[int]]] = {(None, 0): (0.0, [0])}
    for left in range(budget - 1, -1, -1):
        following: dict[tuple[int | None, int], tuple[float, list[int]]] = {}
        best = (math.inf, [])
        for (i, j), (cost, full) in states.items():
            for k in range(j + 1, min(j + reach, steps) + 1):  # the next full step, or the end of the run
                reached = cost + errors.cost(i, j, k), full
                if k == steps:
                    best = min(best, reached) if left == 0 else best
                elif left > 0 and reached < following.get((j, k), (math.inf,)):
                    following[j, k] = reached[0], [*full, k]
        states = following
    if not best[1]:
        raise ValueError(f"{budget} full steps cannot span {steps} steps within a reach of {reach}; raise --reach")
    return best[1]


def greedy(errors: Errors, budget: int) -> list[int]:
    """Full steps that are left when the one that costs least is cached, again and again: a control."""
    full = list(range(errors.steps))
    while len(full) > budget:
        rest = [[j for j in full if j != k] for k in full[1:]]
        full = min(rest, key=lambda chosen: total(errors, chosen))
    return full


def total(errors: Errors, full: Sequence[int]) -> float:
    """The expected cost of a plan; infinite if it goes beyond the reach."""
    try:
        pairs = zip([None, *full], full, [*full[1:], errors.steps], strict=False)
        return sum(errors.cost(i, j, end) for i, j, end in pairs)
    except KeyError:
        return math.inf


def uniform(steps: int, budget: int) -> list[int]:
    """Full steps at equal distances, from the first on."""
    return sorted({round(n * steps / budget) for n in range(budget)})


class Watch:
    """Takes the place of a model's `forward` in uncached runs, to predict every step with earlier features, too.

    Args:
        model: the sampler's.
        branch: b.
        errors: `finish` puts into it what was found.
    """

    def __init__(self, model: SkipTransformer, branch: int, errors: Errors, progress: tqdm):
        self.model, self.branch, self.errors, self.progress = model, branch, errors, progress
        self.calls = 0
        self._features: deque[Tensor] = deque(maxlen=2 * errors.reach)  # of the steps before this one, newest last
        self._sums: dict[int, Tensor] = {}  # step -> inner products of its errors
        self._forward = model.forward
        self._names = list(inspect.signature(self._forward).parameters)  # the first: the latents
        model.forward = self._call  # and not a hook: those of a pipeline come later, and bring its own cache

    def remove(self) -> None:
        del self.model.forward  # the class's own comes back

    def _call(self, *args, **kwargs) -> Any:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        latents, step = arguments[self._names[0]], CacheStep(self.branch, None)
        output = self._forward(**arguments | {"cache": step})
        truth = predicted_noise(output, latents)

        def error(feature: Tensor) -> Tensor:
            out = self._forward(**arguments | {"cache": CacheStep(self.branch, feature)})
            return predicted_noise(out, latents).sub(truth).flatten()

        k = self.calls % self.errors.steps
        self.calls += 1
        if k == 0:
            self._features.clear()
        if self._features:
            errors = torch.stack([error(feature) for feature in self._features]).double()
            self._sums[k] = self._sums.get(k, 0) + errors @ errors.T / errors.shape[1]
        self._features.append(step.output)
        self.progress.update()
        return output

    def finish(self) -> None:
        """Put the means over runs into the errors."""
        runs = self.calls // self.errors.steps
        for k, gram in self._sums.items():
            for a, row in enumerate((gram / runs).tolist(), start=k - len(gram)):
                for b, value in enumerate(row, start=k - len(gram)):
                    self.errors.products[a, b, k] = value


@dataclass
class Bench:
    """Runs of one sampler, against the uncached one.

    Args:
        sampler: of the calibration samples.
        steps: of a run.
        branch: b.
    """

    sampler: Sampler
    steps: int
    branch: int

    def __post_init__(self):
        self.model = self.sampler.model
        self.timesteps = tuple(float(t) for t in self.sampler.timesteps(self.steps))
        self.reference: list[Tensor] = []
        self._known: dict[str, float] = {}

    def calibrate(self, reach: int, probes: int) -> Errors:
        """All that the planning needs: one uncached run that is watched, and `probes` with a cached step each."""
        errors = Errors(self.steps, reach)
        with tqdm(desc="uncached runs, every step predicted from others", unit="step") as progress:
            watch = Watch(self.model, self.branch, errors, progress)
            try:
                self.reference = list(self.sampler.latents(self.steps, CacheSpec()))
            finally:
                watch.remove()
        if watch.calls != self.steps * len(self.reference):
            raise ValueError(f"{watch.calls} calls of the model in {len(self.reference)} runs of {self.steps} steps")
        watch.finish()
        places = torch.linspace(1, self.steps - 1, min(probes, self.steps - 1)).round().long().unique().tolist()
        measured = []
        for k in tqdm(places, desc="sensitivities", unit="run"):
            weights = [None if step != k else 0.0 for step in range(self.steps)]
            squares = self.squared_error(self.plan(weights)).mean().item()
            measured.append(math.log(max(squares, 1e-30) / max(errors.products[k - 1, k - 1, k], 1e-30)))
        errors.sensitivity = [math.exp(value) for value in interpolate(places, measured, self.steps)]
        return errors

    def plan(self, weights: Sequence[float | None]) -> CachePlan:
        return CachePlan(self.timesteps, tuple(weights), self.branch)

    def squared_error(self, policy: Policy, steps: int | None = None) -> Tensor:
        """Mean squared error (N,) of the final latents of every sample, against the uncached run."""
        made = self.sampler.latents(steps or self.steps, policy)
        return torch.cat([(a - b).square().flatten(1).mean(1) for a, b in zip(made, self.reference, strict=True)])

    def error(self, policy: Policy, steps: int | None = None) -> float:
        """Root of the mean squared error of the final latents over that of the latents themselves: the geometric mean
        over samples, as a mean of dB is."""
        key = f"{policy} {steps}"
        if key not in self._known:
            signal = torch.cat([a.square().flatten(1).mean(1) for a in self.reference])
            ratio = self.squared_error(policy, steps) / signal
            self._known[key] = ratio.clamp_min(1e-20).log().mean().div(2).exp().item()
        return self._known[key]

    def flops(self, policy: Policy) -> float:
        return run_flops(SkipCache(policy, self.timesteps), self.sampler.flops)

    def speedup(self, policy: Policy) -> float:
        return self.steps * self.sampler.flops["full"] / self.flops(policy)


def interpolate(places: Sequence[int], values: Sequence[float], count: int) -> list[float]:
    """Piecewise linear through (place, value), constant beyond the ends, at 0 .. count - 1."""
    found = []
    for x in range(count):
        after = next((n for n, place in enumerate(places) if place >= x), len(places) - 1)
        left, right = max(after - 1, 0), after
        span = places[right] - places[left]
        part = min(max((x - places[left]) / span, 0.0), 1.0) if span else 0.0
        found.append(values[left] + part * (values[right] - values[left]))
    return found


def candidates(errors: Errors, budget: int) -> dict[str, list[float | None]]:
    """Weights of plans with so many full steps, by name."""
    even = uniform(errors.steps, budget)
    plans = {
        "planned": errors.weights(optimal(errors, budget)),
        "planned, linear forecast": errors.weights(optimal(errors, budget), order=1),
        "uniform": errors.weights(even),
        "uniform, linear forecast": errors.weights(even, order=1),
        "uniform, reuse": errors.weights(even, order=0),
    }
    return plans | {"greedy": errors.weights(greedy(errors, budget))}


def improve(bench: Bench, errors: Errors, full: list[int], runs: int) -> list[int]:
    """Move full steps by one or two as long as the measured error falls, in at most so many runs."""
    best, least = full, bench.error(bench.plan(errors.weights(full)))
    with tqdm(total=runs, desc="improving", unit="run") as progress:
        seen, moved = {tuple(best)}, True
        while moved and progress.n < runs:
            moved = False
            for chosen in moves(best, errors.steps):
                if tuple(chosen) in seen or total(errors, chosen) == math.inf:
                    continue
                if progress.n == runs:
                    break
                seen.add(tuple(chosen))
                progress.update()
                if (error := bench.error(bench.plan(errors.weights(chosen)))) < least:
                    best, least, moved = chosen, error, True
                    progress.set_postfix(error=f"{least:.4f}")
                    break
    return best


def moves(full: list[int], steps: int) -> Iterator[list[int]]:
    """All plans in which one full step, not the first, is one or two steps earlier or later."""
    for distance in (1, -1, 2, -2):
        for n in range(1, len(full)):
            chosen = sorted({*full[:n], *full[n + 1 :], full[n] + distance})
            if len(chosen) == len(full) and 0 < full[n] + distance < steps:
                yield chosen


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
    budget = math.floor((bench.steps * full / args.speedup - bench.steps * cached) / (full - cached))
    if args.speedup < 1 or budget < 1:
        most = bench.steps * full / (full + (bench.steps - 1) * cached)
        raise ValueError(f"--speedup is {args.speedup}; with this model, 1 to {most:.2f} is possible")
    return min(budget, bench.steps)


def within(bench: Bench, errors: Errors, most: float) -> int:
    """The fewest full steps whose plan has at most this error, found by halving; each try is a run."""
    low, high = math.ceil(bench.steps / (errors.reach + 1)), bench.steps  # all steps full is no error
    while low < high:
        middle = (low + high) // 2
        error = bench.error(bench.plan(errors.weights(optimal(errors, middle))))
        low, high = (low, middle) if error <= most else (middle + 1, high)
    return low


def make_plan(bench: Bench, errors: Errors, budget: int, runs: int) -> tuple[CachePlan, dict[str, float]]:
    """The best plan with so many full steps that could be found, and the measured errors of it and all others.

    Args:
        runs: of the sampler, to improve it by.
    """
    weights = {name: tuple(w) for name, w in candidates(errors, budget).items()}
    measured = {name: bench.error(bench.plan(w)) for name, w in tqdm(weights.items(), desc="candidates", unit="run")}
    start = min(measured, key=measured.get)
    full = [k for k, weight in enumerate(weights[start]) if weight is None]
    weights["improved"] = tuple(errors.weights(improve(bench, errors, full, runs)))
    measured["improved"] = bench.error(bench.plan(weights["improved"]))
    best = min(measured, key=measured.get)  # never worse than a control, where it was measured
    cost = bench.flops(bench.plan(weights[best]))
    steps = max(1, round(cost / bench.sampler.flops["full"]))
    measured[f"{steps} steps, uncached"] = bench.error(CacheSpec(), steps)
    return bench.plan(weights[best]), measured


def main() -> None:
    head, _, _ = __doc__.partition("\n\nHow, for")
    parser = argparse.ArgumentParser(description=head, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a sampler's config")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--budget", type=int, metavar="N", help="full steps to spend")
    wanted.add_argument("--speedup", type=float, metavar="X", help="in FLOPs, against all steps full")
    wanted.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="of the final latents, relative root mean square; finds the fewest full steps",
    )
    parser.add_argument("--steps", type=int, metavar="T", help="of a run [the config's]")
    parser.add_argument("--branch", type=int, default=1, metavar="B", help="outer layers of cached steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=10_000, help="of the calibration samples [%(default)s]")
    parser.add_argument(
        "--reach", type=int, metavar="G", help="most steps between full ones [three times the mean, 12 at least]"
    )
    parser.add_argument("--probes", type=int, default=10, help="runs to measure sensitivities by [%(default)s]")
    parser.add_argument("--improve", type=int, default=40, metavar="R", help="runs to improve a plan by [%(default)s]")
    parser.add_argument("--task", help="class-to-image ... [the name of the config's folder]")
    parser.add_argument("--out", default="plan.json", metavar="FILE", help="[%(default)s]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    args = parser.parse_intermixed_args()
    with friendly_errors():
        plan, measured = run(args)
        plan.save(args.out)
    full = plan.weights.count(None)
    print(f"\n{'':32s}  error     dB")
    for name, error in sorted(measured.items(), key=lambda item: item[1]):
        print(f"{name:32s}  {error:.4f}  {decibel(error):5.1f}")
    if (best := min(measured, key=measured.get)).endswith("uncached"):
        print(f"\nNo plan of this cost comes as near as simply {best}.")
    print(f"\n{args.out}: {full} of {len(plan.weights)} steps full, {plan.about['speedup']:.2f}x fewer FLOPs")


def decibel(error: float) -> float:
    """Signal to error of a relative error."""
    return -20 * math.log10(max(error, 1e-10))


def run(args: argparse.Namespace) -> tuple[CachePlan, dict[str, float]]:
    """Calibrate and plan as a command line says."""
    task = find_task(args.config, args.task)
    config = load_config(task.schema, args.config, args.overrides)
    config.seed, config.cache, config.compile = args.seed, "none", False
    config.steps = args.steps or config.steps
    sampler = task.open_sampler(config, args.branch)
    bench = Bench(sampler, config.steps, args.branch)
    budget = budget_of(bench, args)
    spread = config.steps / (budget or config.steps / 4)
    reach = min(args.reach or max(12, math.ceil(3 * spread)), config.steps - 1)
    errors = bench.calibrate(reach, args.probes)
    budget = within(bench, errors, args.max_error) if budget is None else budget
    plan, measured = make_plan(bench, errors, budget, args.improve)
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
    return replace(plan, about=about), measured


if __name__ == "__main__":
    main()
