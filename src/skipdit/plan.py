"""Plan which steps of a sampling run are full, and what the others see: measured on a few runs of the model itself.

    python -m skipdit.plan --config configs/class-to-image/demo.yaml --budget 13 --out plan.json
    python -m skipdit.plan --config configs/text-to-video/demo.yaml --speedup 1.5 --out plan.json steps=50
    python -m skipdit.plan --config configs/class-to-image/demo.yaml --max-error 0.01 --out plan.json

Take samples for it that are judged nowhere else: the seed is not that of the config, and prompts should be others, too.
The plan is for this model, sampler, number of steps and guidance, and is refused on other timesteps.

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
import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from skipdit.bench import replaced, run_flops, uncached_steps
from skipdit.cache import CachePlan, CacheSpec, CacheStep, Policy, SkipCache, linear_weights
from skipdit.compare import Sampler
from skipdit.config import friendly_errors, load_config, to_dict
from skipdit.device import double
from skipdit.sample import versions
from skipdit.skip import SkipTransformer, predicted_noise
from skipdit.task import find_task
from skipdit.weights import fingerprint
from skipdit.writing import whole_file

RIDGE = 1e-3  # of least squares, relative to the mean of the diagonal
DAMPING = (0.02, 0.1)  # the same, of the joint fit; what measures better is taken
NUDGE = 0.15  # by which a weight is moved, to see what it does
TINY = 1e-20
SEED = 10_000  # of calibration samples; no config has it
PIXELS = 2**16  # of every sample, drawn at random, that the joint fit looks at

T = TypeVar("T", float, Tensor)
Weights = tuple[tuple[float, ...] | None, ...]  # as a `CachePlan` has them


@dataclass
class Errors:
    """What uncached runs tell of every step that could be cached.

    Attributes:
        steps: T.
        reach: the largest distance of two full steps, and of the last one from the end of the run.
        grams: of every step but the first, inner products (F, F) of the errors that it has with the features of the F
            steps before it, times how much they move the images: a sample's squared error counts in units of its own
            under the even linear forecast, and their mean is taken.
        sensitivity: of every step, mean squared error of the images over that of the noise, the geometric mean over
            samples.
        memory: stored features that a cached step may use; schedules are chosen as if there were two at most.
    """

    steps: int
    reach: int
    grams: dict[int, np.ndarray] = field(default_factory=dict)
    sensitivity: list[float] = field(default_factory=list)
    memory: int = 2

    def __post_init__(self):
        self.cost = cache(self.cost)  # the same few are asked for again and again

    def best(self, full: Sequence[int], k: int) -> tuple[tuple[float, ...], float]:
        """The weights with which the features of these full steps, newest last, predict step k best, and what squared
        error is left."""
        gram, changes = self._seen(full, k)
        curvature = changes @ gram @ changes.T
        curvature += RIDGE * np.trace(curvature) / max(len(changes), 1) * np.eye(len(changes))
        weights = -np.linalg.pinv(curvature) @ (changes @ gram[0])
        return tuple(weights.tolist()), self.left(full, k, weights)

    def left(self, full: Sequence[int], k: int, weights: Sequence[float]) -> float:
        """The squared error at step k that is left with these weights."""
        gram, changes = self._seen(full, k)
        error = np.eye(len(gram))[0] + np.asarray(weights) @ changes[: len(weights)]
        return max(float(error @ gram @ error), 0.0)

    def _seen(self, full: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products of the errors that step k has with features, newest first, and the features' differences."""
        known = [j - k for j in reversed(full) if k - j <= len(self.grams[k])]
        each = np.eye(len(known))
        return self.grams[k][np.ix_(known, known)], each[:-1] - each[1:]

    def cost(self, full: tuple[int, ...], end: int) -> float:
        """Squared error of the images, in units as of `grams`, by the cached steps after these full ones, up to `end`.

        The errors of one feature are alike from step to step and add up; those of different features do not.
        """
        return sum(math.sqrt(self.best(full[-self.memory :], k)[1]) for k in range(full[-1] + 1, end)) ** 2

    def total(self, full: Sequence[int]) -> float:
        """The expected cost of a plan; infinite if it goes beyond the reach."""
        ends = [*full[1:], self.steps]
        if max(end - j for j, end in zip(full, ends, strict=True)) > self.reach:
            return math.inf
        return sum(self.cost(tuple(full[max(n - 1, 0) : n + 1]), end) for n, end in enumerate(ends))

    def weights(self, full: Sequence[int]) -> Weights:
        """The best ones for each step by itself."""
        return tuple(
            None if k in full else self.best([j for j in full if j < k][-self.memory :], k)[0]
            for k in range(self.steps)
        )

    def curve(self, weights: Weights) -> list[float]:
        """What each step of a plan adds by itself to the error of the images; 1 is that of the even forecast."""
        full = [k for k, several in enumerate(weights) if several is None]
        return [
            0.0 if several is None else math.sqrt(self.left([j for j in full if j < k], k, several))
            for k, several in enumerate(weights)
        ]


def forecast(steps: int, full: Sequence[int], order: int) -> Weights:
    """Weights of a plan with these full steps that reuses (order 0) or forecasts linearly (order 1)."""
    return tuple(
        None if k in full else linear_weights(k, [j for j in full if j < k][-1 - order :]) for k in range(steps)
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


class Watch:
    """Stands in for a model's `forward` in uncached runs, to predict every step with earlier features, too.

    (A hook would not do: those of a pipeline come later, and bring its own cache.)

    Args:
        model: the sampler's.
        branch: b.
        steps: of a run.
        window: how many earlier features.
        progress: of steps.

    A call raises ValueError if guidance begins or ends within a run.
    """

    def __init__(self, model: SkipTransformer, branch: int, steps: int, window: int, progress: tqdm):
        self.branch, self.steps, self.progress = branch, steps, progress
        self.calls = 0
        self.grams: dict[int, list[Tensor]] = {k: [] for k in range(1, steps)}  # (N, F, F), a tensor per batch
        self._features: deque[Tensor] = deque(maxlen=window)  # of the steps before this one, newest last
        self._forward = model.forward
        self._names = list(inspect.signature(self._forward).parameters)  # the first: the latents

    def __call__(self, *args, **kwargs) -> Any:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        latents, step = arguments[self._names[0]], CacheStep(self.branch, None)
        output = self._forward(**arguments | {"cache": step})
        truth = predicted_noise(output, latents)

        def error(feature: Tensor) -> Tensor:
            out = self._forward(**arguments | {"cache": CacheStep(self.branch, feature)})
            return predicted_noise(out, latents).sub(truth).flatten(1)

        k = self.calls % self.steps
        self.calls += 1
        if k == 0:
            self._features.clear()
        elif len(self._features[-1]) != len(step.output):
            raise ValueError(
                "guidance that begins or ends within a run cannot be planned: let it be on or off throughout"
            )
        else:
            errors = double(torch.stack([error(feature) for feature in self._features], 1))  # (rows, F, ...)
            self.grams[k].append(errors @ errors.mT / errors.shape[-1])
        self._features.append(step.output)
        self.progress.update()
        return output

    def fold(self, samples: int) -> None:
        """After a batch: rows of the model become samples, which guidance has twice."""
        for grams in self.grams.values():
            grams[-1] = grams[-1].unflatten(0, (-1, samples)).mean(0).cpu()


class Replay:
    """Stands in for a model's `forward` in runs that begin alike, to compute what they share only once.

    The first run is recorded: what the model gave, and the features that full steps left. After `rewind(k)`, the next
    one takes the first k steps of every batch from there. The record is on the CPU: per batch and full step it is as
    large as what a cache stores.
    """

    def __init__(self, model: SkipTransformer, steps: int):
        self.model, self.steps = model, steps
        self.calls, self.alike = 0, 0
        self._record: list[tuple[Any, Tensor | None]] = []
        self._forward = model.forward

    def rewind(self, alike: int) -> None:
        self.calls, self.alike = 0, alike

    def __call__(self, *args, cache: CacheStep | None = None, **kwargs) -> Any:
        n, self.calls = self.calls, self.calls + 1
        if n < len(self._record) and n % self.steps < self.alike:
            output, feature = tree_map_only(Tensor, lambda x: x.to(self.model.device), self._record[n])
            if feature is not None:
                cache.output = feature
            return output
        output = self._forward(*args, cache=cache, **kwargs)
        if n == len(self._record):
            left = None if cache is None else cache.output
            self._record.append(tree_map_only(Tensor, Tensor.cpu, (output, left)))
        return output


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
        if len(self.timesteps) != self.steps:
            calls = f"{len(self.timesteps)} times in {self.steps} steps"
            raise ValueError(f"{self.sampler.method} calls the model {calls}; such runs cannot be planned")
        self.reference: list[Tensor] = []
        self._known: dict[str, float] = {}

    def calibrate(self, reach: int, probes: int, budget: int, memory: int = 2) -> Errors:
        """All that scheduling needs: one uncached run that is watched, and `probes` of a cached one.

        The cached one has `budget` full steps, uniform and forecast linearly. How far an error at a step moves the
        images is seen in it, since with uncached steps to come the same error moves them several times as far. Every
        sample's error counts relative to what it has there: the few samples that any cache changes much would decide
        alone otherwise.
        """
        grams = self._watched(2 * reach)
        full = uniform(self.steps, budget)
        even = forecast(self.steps, full, 1)
        free = [k for k, weights in enumerate(even) if weights]
        places = [free[n] for n in torch.linspace(0, len(free) - 1, min(probes, len(free))).round().long().unique()]
        runs = iter(tqdm(self.nudged(even, [(k, 0) for k in places]), "sensitivities", 1 + len(places), unit="run"))
        now = next(runs)
        even_error, measured = mean_squares(now), []
        for k, changes in zip(places, runs, strict=True):
            squares = mean_squares([a - b for a, b in zip(changes, now, strict=True)])
            i, j = [step - k for step in full if step < k][-2:]
            noise = NUDGE**2 * (grams[k][:, j, j] - 2 * grams[k][:, i, j] + grams[k][:, i, i])  # by which it changed
            measured.append((squares / noise.clamp_min(TINY)).clamp_min(TINY).log())
        if not places:  # no forecast with so few full steps, or so many: then there is little to choose
            places, measured = [0], [torch.zeros_like(even_error)]
        moves = [each.exp() for each in interpolate(places, measured, self.steps)]  # per step, (N,)
        relative = {k: moves[k] / even_error.clamp_min(TINY) for k in grams}
        return Errors(
            self.steps,
            reach,
            {k: (gram * relative[k][:, None, None]).mean(0).numpy() for k, gram in grams.items()},
            [moved.log().mean().exp().item() for moved in moves],
            memory,
        )

    def _watched(self, window: int) -> dict[int, Tensor]:
        """Make the uncached images. Returns, of every step but the first, products as `Errors.grams` of each sample."""
        with tqdm(desc="uncached runs, every step predicted from others", unit="step") as progress:
            watch = Watch(self.model, self.branch, self.steps, window, progress)
            with replaced(self.model, "forward", watch):
                for images in self.sampler.images(self.steps, CacheSpec()):
                    self.reference.append(images)
                    watch.fold(len(images))
        if watch.calls != self.steps * len(self.reference):
            raise ValueError(f"{watch.calls} calls of the model in {len(self.reference)} runs of {self.steps} steps")
        return {k: torch.cat(parts) for k, parts in watch.grams.items()}

    def plan(self, weights: Weights) -> CachePlan:
        return CachePlan(self.timesteps, tuple(weights), self.branch)

    def changes(self, policy: Policy, steps: int | None = None) -> list[Tensor]:
        """Images (N, ..., 3, H, W), of a range of 1, minus those of the uncached run, of every batch."""
        made = self.sampler.images(steps or self.steps, policy)
        return [(a - b).div(2) for a, b in zip(made, self.reference, strict=True)]

    def nudged(self, weights: Weights, places: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
        """The changes by a plan, then those by plans that have one of its weights, (step, number), moved by NUDGE.

        These compute only the steps from that one on.
        """
        replay = Replay(self.model, self.steps)
        with replaced(self.model, "forward", replay):
            yield self.changes(self.plan(weights))
            for place in places:
                replay.rewind(place[0])
                yield self.changes(self.plan(moved(weights, [place], [NUDGE])))

    def error(self, policy: Policy, steps: int | None = None) -> float:
        """Root of the mean squared error of the images, of their range: the geometric mean over samples, as a mean of
        PSNRs is."""
        key = f"{policy} {steps}"
        if key not in self._known:
            squares = mean_squares(self.changes(policy, steps))
            self._known[key] = squares.clamp_min(TINY).log().mean().div(2).exp().item()
        return self._known[key]

    @property
    def cached_cost(self) -> float:
        """Of a cached step, over that of a full one."""
        return self.sampler.flops["cached"] / self.sampler.flops["full"]

    def flops(self, policy: Policy) -> float:
        return run_flops(SkipCache(policy, self.timesteps), self.sampler.flops)

    def speedup(self, policy: Policy) -> float:
        return self.steps * self.sampler.flops["full"] / self.flops(policy)


def mean_squares(batches: Sequence[Tensor]) -> Tensor:
    """Of every sample of batches (n, ...): (N,)."""
    return torch.cat([batch.square().flatten(1).mean(1) for batch in batches])


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


def fit(bench: Bench, weights: Weights, rounds: int) -> Weights:
    """All weights together, so that the errors of the steps cancel in the images: Gauss-Newton.

    Each round runs the plan once per weight, with that one moved. Every sample counts by its error relative to what it
    is now, which lowers the mean of logarithms. What does not measure better is not taken.
    """
    places = [(k, m) for k, several in enumerate(weights) for m in range(len(several or ()))]
    some = torch.randperm(bench.reference[0][0].numel(), generator=torch.Generator().manual_seed(0))[:PIXELS]

    with tqdm(total=rounds * (1 + len(places)), desc="fitting all weights together", unit="run") as progress:
        for _ in range(rounds if places else 0):
            runs = []
            for changes in bench.nudged(weights, places):
                runs.append(torch.cat([change.flatten(1)[:, some] for change in changes]))
                progress.update()
            now, *others = runs
            scale = now.norm(dim=1, keepdim=True).clamp_min(TINY).reciprocal()
            slopes = [(other - now) / NUDGE * scale for other in others]
            curvature, slope = 0, 0
            for target, columns in zip(now * scale, zip(*slopes, strict=True), strict=True):  # of each sample
                rows = torch.stack(columns).double()
                curvature, slope = curvature + rows @ rows.T, slope + rows @ target.double()
            tries = [weights]
            for damping in DAMPING:
                ridge = damping * curvature.diagonal().mean() * torch.eye(len(places), dtype=curvature.dtype)
                tries.append(moved(weights, places, (-torch.linalg.solve(curvature + ridge, slope)).tolist()))
            best = min(tries, key=lambda tried: bench.error(bench.plan(tried)))
            if best is weights:
                break
            weights = best
    return weights


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
        help="root mean square of the pixels' range, on the calibration samples: others may have some dB more; 0.01 is "
        "a PSNR of 40 dB. Finds the fewest full steps",
    )
    parser.add_argument("--steps", type=positive, metavar="T", help="of a run [the config's]")
    parser.add_argument(
        "--branch", type=positive, default=1, metavar="B", help="outer layers of cached steps [%(default)s]"
    )
    parser.add_argument(
        "--reach", type=positive, metavar="G", help="most steps from full to full [three times the mean, 24 at least]"
    )
    parser.add_argument("--probes", type=positive, default=10, help="runs to measure sensitivities by [%(default)s]")
    parser.add_argument(
        "--memory",
        type=positive,
        default=3,
        metavar="M",
        help="stored features that a cached step may use [%(default)s]",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="R", help="of the joint fit of all weights [%(default)s]"
    )
    parser.add_argument("--task", help="class-to-image ... [the name of the config's folder]")
    parser.add_argument("--out", default="plan.json", metavar="FILE", help="[%(default)s]")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"settings that override the config's, whose seed {SEED} does unless you say another",
    )
    args = parser.parse_intermixed_args()
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


def positive(text: str) -> int:
    """A number of a command line, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def psnr_of(error: float) -> float:
    return -20 * math.log10(max(error, 1e-10))


def run(args: argparse.Namespace) -> tuple[CachePlan, dict[str, float]]:
    """Calibrate and plan as a command line says."""
    task = find_task(args.config, args.task)
    config = load_config(task.schema, args.config, [f"seed={SEED}", *args.overrides])
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


if __name__ == "__main__":
    main()
