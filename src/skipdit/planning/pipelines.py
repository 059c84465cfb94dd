"""Plans of forecasts for any diffusers pipeline, fitted while the pipeline itself runs.

Nothing of the model, the guidance or the latents' layout needs to be known: `scheduler.step` gets the guided output and
the latents of every step, and is linear in the output. So a fit is a call of the pipeline in which the model is left
out at forecast steps, and in which every step's output is replaced by the combination of outputs that brings the
latents nearest to the target's.
"""

import argparse
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.caching.policy import FORECAST, FULL, CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.layers.flops import run_flops
from skipdit.layers.inspect import replaced
from skipdit.pipelines.cache import disable_cache, enable_cache
from skipdit.planning.calibration import MEMORY, Fitted
from skipdit.planning.fitting import TINY, LeastSquares, differences
from skipdit.sampling.prompts import read_prompts
from skipdit.utils.device import double, process_state
from skipdit.utils.dtypes import resolve_dtype

FACTORS = (1, 2, 4)  # steps of the runs from which the converged one follows, over the bench's
NEAR = 1e-3  # relative: timesteps of a longer run are the same as those of the bench's if they differ by less


@dataclass
class StepRecord:
    """What a scheduler's steps got and gave in a run: latents after every step, float64, and their timesteps."""

    latents: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)


class _Kinds(CachePolicy):
    """Full steps and forecasts as given; what forecasts return does not matter, as the fit replaces it."""

    branch = 0

    def __init__(self, kinds: str):
        self.kinds = kinds

    def full_mask(self, timesteps: Any) -> list[bool]:
        return [kind == FULL for kind in self.kinds]


class PipelineBench:
    """Calls of one pipeline, and the target that they are measured by; stands in for `planning.calibration.Bench`.

    Args:
        pipe: the pipeline.
        arguments: of its calls, all samples in one batch.
        steps: of a call.
        seed: of the noise.
        target: "sampler", "converged", or None for the latter where it can be: if longer runs pass through the
            timesteps of this one, and nothing is drawn at random on the way.

    Raises ValueError for a pipeline whose scheduler makes more or fewer steps than it is asked for.
    """

    branch, cached_cost, runs = 0, 0.0, 20

    def __init__(
        self, pipe: DiffusionPipeline, arguments: dict[str, Any], steps: int, seed: int, target: str | None = None
    ):
        self.pipe, self.arguments, self.steps, self.seed, self.target = pipe, arguments, steps, seed, target
        self.factors = (1,) if target == "sampler" else FACTORS
        method = type(pipe.scheduler).__name__
        self.sampler = SimpleNamespace(method=method, flops={"full": 1.0, "cached": 0.0}, solvers=())
        self.images: dict[str, np.ndarray] = {}  # of every run whose error is known, by its name
        self._known: dict[str, float] = {}

    @torch.no_grad()
    def calibrate(self) -> None:
        """Make the uncached runs, and the target."""
        disable_cache(self.pipe)
        self._progress = tqdm(desc="uncached runs", unit="step", total=sum(self.factors) * self.steps)
        self._random = False
        runs = [self._record(self.steps)]
        self.timesteps = tuple(runs[0].timesteps)
        if len(self.timesteps) != self.steps:
            raise ValueError(
                f"{self.sampler.method} makes {len(self.timesteps)} steps of {self.steps}; such runs cannot be planned"
            )
        if not self._random:
            runs += [self._record(factor * self.steps) for factor in self.factors[1:]]
        self._progress.close()
        places = [self._places(run) for run in runs]
        possible = len(runs) > 1 and None not in places
        if self.target == "converged" and not possible:
            raise ValueError(
                f"there is no converged run of {self.sampler.method} with {self.steps} steps: it is stochastic, or "
                "longer runs visit other timesteps. --target sampler plans towards the uncached run"
            )
        self.target, self.goals = "converged" if possible else "sampler", runs[0].latents
        if possible:
            coarse, fine = ([run.latents[k] for k in place] for run, place in zip(runs[1:], places[1:], strict=True))
            # The error of a solver of first order halves with the steps; taken off, that of others is small.
            self.goals = [2 * b - a for a, b in zip(coarse, fine, strict=True)]
        self.uncached = self._call(CacheSpec(), self.steps)
        self.reference = self._call(CacheSpec(), self.steps, goal=self.goals[-1])
        self._known.clear()

    def _places(self, run: StepRecord) -> list[int] | None:
        """Where in a run the latents are that the bench's steps end with; None if it passes others."""
        places = []
        for t in self.timesteps[1:]:
            near = [k for k, each in enumerate(run.timesteps) if abs(each - t) <= NEAR * max(abs(t), NEAR)]
            if not near:
                return None
            places.append(near[0] - 1)
        return [*places, len(run.timesteps) - 1]

    def _record(self, steps: int) -> StepRecord:
        run = StepRecord()

        def step(own: Callable, output: Tensor, t: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not run.latents:
                tries = [_trial(self.pipe.scheduler, output, t, latents, args, kwargs) for _ in range(2)]
                self._random = self._random or not torch.equal(*tries)
            result = own(output, t, latents, *args, **kwargs)
            run.latents.append(double(_sample(result)))
            run.timesteps.append(float(t))
            self._progress.update()
            return result

        self._call(CacheSpec(), steps, step)
        return run

    @torch.no_grad()
    def fit(self, kinds: str) -> Fitted:
        """Fit a schedule of full steps and forecasts."""
        coefficients: list[tuple[float, ...]] = []
        stored: list[Tensor] = []  # guided outputs of full steps, newest first
        memory, correct = MEMORY[self.target][1], self.target == "converged"

        def step(own: Callable, output: Tensor, t: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            k = len(coefficients)
            if kinds[k] == FULL:
                stored.insert(0, double(output))
                del stored[memory + 1 :]
            moves = differences(stored, memory) if kinds[k] == FORECAST or correct else []
            solution = torch.zeros(0)
            if moves:
                tried = [
                    double(_trial(self.pipe.scheduler, each.to(output.dtype), t, latents, args, kwargs))
                    for each in (stored[0], stored[0] + moves[0].std().clamp_min(TINY))
                ]
                gain = ((tried[1] - tried[0]).mean() / moves[0].std().clamp_min(TINY)).item()
                problem = LeastSquares()
                problem.add(_flat(tried[0] - self.goals[k]), [_flat(gain * move) for move in moves])
                solution = problem.solve()
            coefficients.append(tuple(solution.tolist()))
            used = stored[0] + sum(u * move for u, move in zip(coefficients[-1], moves, strict=True))
            return own(used.to(output.dtype), t, latents, *args, **kwargs)

        self._call(_Kinds(kinds), self.steps, step)
        plan = CachePlan(self.timesteps, (None,) * self.steps, 0, kinds, tuple(coefficients))
        return Fitted(plan, self.error(plan))

    def error(self, policy: CachePolicy, steps: int | None = None, method: str | None = None) -> float:
        """The root of the mean squared error of the images, of their range, to the target's: the geometric mean over
        samples, as a mean of PSNRs is.
        """
        key = f"{policy} {steps}"
        if key not in self._known:
            self.images[key] = images = self._call(policy, steps or self.steps)
            squares = np.square(images - self.reference).reshape(len(images), -1).mean(1)
            self._known[key] = float(np.exp(np.log(np.maximum(squares, TINY)).mean() / 2))
        return self._known[key]

    def flops(self, policy: CachePolicy) -> float:
        return run_flops(SkipCache(policy, self.timesteps), self.sampler.flops)

    def speedup(self, policy: CachePolicy) -> float:
        return self.steps / self.flops(policy)

    def _call(
        self, policy: CachePolicy, steps: int, step: Callable | None = None, goal: Tensor | None = None
    ) -> np.ndarray:
        """Call the pipeline. Returns its images (N, ..., 3) in [0, 1].

        Args:
            step: called in place of the scheduler's, which is its first argument.
            goal: latents to end with instead.
        """
        scheduler, done = self.pipe.scheduler, []

        def ending(own: Callable, *args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            done.append(result)
            if len(done) < steps:
                return result
            ended = goal.to(_sample(result))
            return (ended,) if isinstance(result, tuple) else type(result)(prev_sample=ended)

        if policy.caches:
            enable_cache(self.pipe, policy)
        try:
            own = scheduler.step
            step = step or (ending if goal is not None else lambda own, *args, **kwargs: own(*args, **kwargs))
            with replaced(scheduler, "step", _Step(own, step)):
                images = self.pipe(
                    **self.arguments,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(self.seed),
                    output_type="np",
                    return_dict=False,
                )[0]
        finally:
            disable_cache(self.pipe)
        return np.asarray(images, dtype=np.float64)


class _Step:
    """A scheduler's `step` that something else is called for. Its signature stays: pipelines look at it."""

    def __init__(self, own: Callable, step: Callable):
        self.__wrapped__, self._step = own, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(self.__wrapped__).parameters)[len(args) : 3]
        given = [kwargs.pop(name) for name in names]
        return self._step(self.__wrapped__, *args, *given, **kwargs)


def _trial(scheduler: SchedulerMixin, output: Tensor, t: Any, latents: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """What a step would make, without making it."""
    kwargs = dict(kwargs)
    if isinstance(kwargs.get("generator"), torch.Generator):
        kwargs["generator"] = kwargs["generator"].clone_state()
    return _sample(type(scheduler).step(copy.deepcopy(scheduler), output, t, latents, *args, **kwargs))


def _sample(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


def _flat(x: Tensor) -> Tensor:
    """All samples' errors count together, in a batch of one: pipelines may pack several into one row."""
    return x.reshape(1, -1)


def open_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """Load the pipeline that a command line names, on its device."""
    device = process_state().device
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=resolve_dtype(args.dtype, device))
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The arguments of a pipeline's call that a command line gives, and the seed. Raises ValueError without any."""
    arguments = {}
    for text in args.overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} has no '='; write arguments of the pipeline as key=value: guidance_scale=3.5")
        arguments[name] = yaml.safe_load(value)
    if args.prompts:
        arguments["prompt"] = read_prompts([], args.prompts)
    seed = arguments.pop("seed")
    if not arguments:
        raise ValueError("there is nothing to show: give --prompts FILE, or what the pipeline takes as key=value")
    return arguments, seed


def save_pictures(bench: PipelineBench, plan: CachePlan, out: str) -> Path:
    """Save a picture beside a plan: of each sample, that of the target, of the plan, and of as many full steps alone.
    Of clips, the frame in the middle. Returns its path.
    """
    fewer = plan.kinds.count(FULL)
    bench.error(CacheSpec(), fewer)
    rows = [bench.uncached, bench.images[f"{plan} None"], bench.images[f"{CacheSpec()} {fewer}"]]
    stills = [row[:, row.shape[1] // 2] if row.ndim == 5 else row for row in rows]
    table = np.concatenate([np.concatenate(list(row), axis=1) for row in stills], axis=0)
    path = Path(out).with_suffix(".png")
    Image.fromarray((table.clip(0, 1) * 255).round().astype(np.uint8)).save(path)
    return path
