"""Fits of plans of forecasts for any diffusers pipeline, made while the pipeline itself runs.

Nothing of the model, the guidance or the latents' layout needs to be known: `scheduler.step` gets the guided output and
the latents of every step, and is linear in the output. So a fit is a call of the pipeline in which the model is left
out at forecast steps, and in which every step's output is replaced by the combination of outputs that brings the
latents nearest to the target's.
"""

import inspect
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.caching.policy import FORECAST, FULL, CachePolicy
from skipdit.layers.inspect import replaced
from skipdit.pipelines.cache import disable_cache, enable_cache
from skipdit.pipelines.denoiser import denoisers
from skipdit.planning.calibration import MEMORY, BaseBench, Fitted, Schedule, products
from skipdit.planning.fitting import TINY, LeastSquares, differences
from skipdit.planning.scheduler_steps import WatchedStep, latents_of, own_random_state, trial
from skipdit.planning.schedules import common_start, restarted
from skipdit.planning.tables import distance
from skipdit.utils.device import double
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import sketch
from skipdit.utils.timing import moment

FACTORS = (1, 2, 4)  # steps of the runs from which the converged one follows, over the bench's
UNPLANNED = ("generator", "return_dict", "sigmas", "timesteps")  # of a call: noise and steps are the bench's own
NEAR = 1e-3  # relative: timesteps of a longer run are the same as those of the bench's if they differ by less


@dataclass
class StepRecord:
    """What a scheduler's steps got and gave in a run.

    Attributes:
        latents: after every step, float64.
        outputs: guided ones of every step, float64, of a run of the bench's steps.
        gains: how far the output of a step, if it grows by 1, moves the latents after it; of the same runs.
        timesteps: before every step.
        random: whether a step drew noise.
        models: the places, among the pipeline's models, of those that ran in every step.
    """

    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    random: bool = False
    models: list[set[int]] = field(default_factory=lambda: [set()])


@dataclass
class FittedStep:
    """A step of a fit.

    Attributes:
        coefficients: of differences of outputs.
        used: the guided output that the step goes on with.
        stored: guided outputs of full steps, newest first, after it.
    """

    coefficients: tuple[float, ...]
    used: Tensor
    stored: list[Tensor]


class _OtherTimesteps(Exception):
    """A longer run does not pass the timesteps of the bench's."""


class PipelineBench(BaseBench):
    """Calls of one pipeline, and the target that they are measured by.

    Args:
        pipe: the pipeline.
        arguments: of its calls, all samples in one batch.
        steps: of a call.
        seed: of the noise.
        target: "sampler", "converged", or None for the latter where it can be: if longer runs pass through the
            timesteps of this one, and nothing is drawn at random on the way.

    Attributes:
        call_seconds: that the newest call took.
        restarts: steps that begin with another model than the step before ended with.

    Raises ValueError for `UNPLANNED` arguments, and a scheduler that makes more or fewer steps than it is asked for.
    """

    branch = 0

    def __init__(
        self, pipe: DiffusionPipeline, arguments: dict[str, Any], steps: int, seed: int, target: str | None = None
    ):
        if given := [name for name in UNPLANNED if name in arguments]:
            raise UserError(f"a plan cannot be made with {given[0]}: leave it out; seed and num_inference_steps decide")
        names = list(inspect.signature(pipe.scheduler.step).parameters)[:3]
        if names != ["model_output", "timestep", "sample"]:
            raise UserError(
                f"{type(pipe.scheduler).__name__} cannot be planned for: its steps take {', '.join(names)} and more. "
                "Name another one with --scheduler"
            )
        self.pipe, self.arguments, self.steps, self.seed, self.target = pipe, arguments, steps, seed, target
        self.factors = (1,) if target == "sampler" else FACTORS
        method = type(pipe.scheduler).__name__
        self.sampler = SimpleNamespace(method=method, solvers=())
        self.costs = {"flops": {"full": 1.0, "forecast": 0.0}}
        self.call_seconds = 0.0
        self._known: dict[tuple[CachePolicy, int], float] = {}

    def made_for(self) -> dict[str, Any]:
        """What a plan's file says of the models."""
        return {"pipeline_models": sketch(denoisers(self.pipe))}

    def about(self) -> dict[str, Any]:
        """What a plan's file says of its calibration."""
        return {"seed": self.seed} | {name: each for name, each in self.arguments.items() if _is_plain(each)}

    @torch.no_grad()
    def calibrate(self) -> None:
        """Make the uncached runs, and the target."""
        disable_cache(self.pipe)
        with tqdm(desc="uncached runs", unit="step", total=sum(self.factors) * self.steps) as self._progress:
            own = self._record(self.steps)
            self.timesteps = tuple(own.timesteps)
            if len(self.timesteps) != self.steps:
                raise UserError(
                    f"{self.sampler.method} makes {len(self.timesteps)} steps of {self.steps}; such runs cannot be "
                    "planned"
                )
            self.products, self.gains = products(own.outputs), np.array(own.gains)
            self.restarts = [k for k in range(1, self.steps) if own.models[k] != own.models[k - 1]]
            finer = [] if own.random else [self._refined(factor) for factor in self.factors[1:]]
        possible = bool(finer) and None not in finer
        if self.target == "converged" and not possible:
            raise UserError(
                f"there is no converged run of {self.sampler.method} with {self.steps} steps: it is stochastic, or "
                "longer runs visit other timesteps. --target sampler plans towards the uncached run"
            )
        self.target, self.goals = "converged" if possible else "sampler", own.latents
        if possible:  # the errors of three runs are a geometric series, whose ratio is 2 for solvers of first order
            coarse, fine = finer
            ratio = max(_norm(own.latents[-1] - coarse[-1]) / max(_norm(coarse[-1] - fine[-1]), TINY), 2.0)
            self.goals = [b + (b - a) / (ratio - 1) for a, b in zip(coarse, fine, strict=True)]
        self.reference = self.images(CacheSpec(), self.steps, goal=self.goals[-1])
        self._known.clear()

    def _refined(self, factor: int) -> list[Tensor] | None:
        """The latents of a longer run where the bench's steps end; None if it passes other timesteps."""
        for steps in (factor * self.steps, factor * (self.steps - 1) + 1):  # the last is 0, or is above it
            with suppress(_OtherTimesteps):
                run = self._record(steps)
                return [run.latents[k] for k in self._places(run.timesteps)]
        return None

    def _places(self, timesteps: list[float]) -> list[int]:
        """Where in a run the latents are that the bench's steps end with. Raises _OtherTimesteps without them."""
        places = []
        for t in self.timesteps[1:]:
            near = [k for k, each in enumerate(timesteps) if abs(each - t) <= NEAR * max(abs(t), NEAR)]
            if not near:
                raise _OtherTimesteps
            places.append(near[0] - 1)
        return [*places, len(timesteps) - 1]

    def _record(self, steps: int) -> StepRecord:
        """Make an uncached run. Raises _OtherTimesteps at the first step of a longer one that passes others."""
        run = StepRecord()

        def step(own: Callable, output: Tensor, t: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            if steps != self.steps and not run.latents:
                self._places([float(each) for each in self.pipe.scheduler.timesteps])
            if steps == self.steps:
                run.outputs.append(double(output))
                run.gains.append(self._trials(output, t, latents, args, kwargs)[1])
            before = self._random_states()
            result = own(output, t, latents, *args, **kwargs)
            run.random = run.random or not all(map(torch.equal, before, self._random_states()))
            run.latents.append(double(latents_of(result)))
            run.timesteps.append(float(t))
            run.models.append(set())
            self._progress.update()
            return result

        with ExitStack() as hooks:
            for place, model in enumerate(denoisers(self.pipe)):
                hook = model.register_forward_pre_hook(lambda *_, place=place: run.models[-1].add(place))
                hooks.callback(hook.remove)
            self.images(CacheSpec(), steps, step)
        return run

    def _trials(self, output: Tensor, t: Any, latents: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, float]:
        """The latents (float64) that a step would end with, and how far they move if its output grows by 1."""
        nudge = double(output).std().clamp_min(TINY)  # which half precision could not hold
        tried = output, output + nudge
        ends = [double(trial(self.pipe.scheduler, each, t, latents, args, kwargs)) for each in tried]
        return ends[0], ((ends[1] - ends[0]).mean() / nudge).item()

    def step_ends(self, kinds: str) -> list[float]:
        ends: list[float] = []

        def step(own: Callable, output: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = own(output, *args, **kwargs)
            ends.append(moment(output.device))
            return result

        self.images(Schedule(kinds, 0), len(kinds), step)
        return ends

    def _random_states(self) -> list[Tensor]:
        """Of all generators that a scheduler may draw from: the call's, or the global ones."""
        on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
        return [self._generator.get_state(), torch.get_rng_state(), *on_gpu]

    @torch.no_grad()
    def fit(self, kinds: str, base: Fitted | None = None, keep: bool = False) -> Fitted:
        """Fit a schedule of full steps and forecasts. Arguments as of `Bench.fit`."""
        kinds = restarted(kinds, self.restarts)
        stored: list[Tensor] = []  # guided outputs of full steps, newest first
        memory, correct = MEMORY[self.target][1], self.target == "converged"
        steps: list[FittedStep] = []
        known: list[FittedStep] = base.fit[: common_start(kinds, base.plan.kinds)] if base and base.fit else []
        runs = "".join(
            kind if k >= len(known) or k in (0, *self.restarts) else FORECAST for k, kind in enumerate(kinds)
        )

        def step(own: Callable, output: Tensor, t: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            k = len(steps)
            if k < len(known):
                steps.append(known[k])
                stored[:] = known[k].stored
                return own(known[k].used, t, latents, *args, **kwargs)
            if k in self.restarts:
                stored.clear()
            if kinds[k] == FULL:
                stored.insert(0, double(output))
                del stored[memory + 1 :]
            moves = differences(stored, memory) if kinds[k] == FORECAST or correct else []
            solution = torch.zeros(0)
            if moves:
                end, gain = self._trials(stored[0].to(output.dtype), t, latents, args, kwargs)
                problem = LeastSquares()
                problem.add(_flat(end - self.goals[k]), [_flat(gain * move) for move in moves])
                solution = problem.solve()
            coefficients = tuple(solution.tolist())
            used = stored[0] + sum(u * move for u, move in zip(coefficients, moves, strict=True))
            steps.append(FittedStep(coefficients, used.to(output.dtype), list(stored)))
            return own(steps[k].used, t, latents, *args, **kwargs)

        images = self.images(Schedule(runs, 0) if FORECAST in runs else CacheSpec(), self.steps, step)
        plan = CachePlan(self.timesteps, (None,) * self.steps, 0, kinds, tuple(each.coefficients for each in steps))
        return Fitted(plan, distance(images, self.reference), steps if keep else None)

    def error(self, policy: CachePolicy, steps: int | None = None, method: str | None = None) -> float:
        """The error of a policy; see `distance`. Of `steps` steps, if not the bench's."""
        key = (policy, steps or self.steps)
        if key not in self._known:
            self._known[key] = distance(self.images(*key), self.reference)
        return self._known[key]

    def images(
        self, policy: CachePolicy, steps: int, step: Callable | None = None, goal: Tensor | None = None
    ) -> np.ndarray:
        """Call the pipeline. Returns images (N, H, W, 3), or clips (N, F, H, W, 3), in [0, 1].

        Args:
            step: called in place of the scheduler's, which is its first argument.
            goal: latents to end with instead.
        """
        scheduler, done = self.pipe.scheduler, []
        output_type = "latent" if self.arguments.get("output_type") == "latent" else "np"

        def ending(own: Callable, *args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            done.append(result)
            if len(done) < steps:
                return result
            ended = goal.to(latents_of(result))
            return (ended,) if isinstance(result, tuple) else type(result)(prev_sample=ended)

        if policy != CacheSpec():  # a plan of full steps alone may correct their outputs
            enable_cache(self.pipe, policy)
        step = step or (ending if goal is not None else None)
        self._generator, begun = torch.Generator().manual_seed(self.seed), time.perf_counter()
        watched = replaced(scheduler, "step", WatchedStep(scheduler.step, step)) if step else nullcontext()
        try:
            with own_random_state(), watched:
                torch.manual_seed(self.seed)  # not every pipeline gives its generator to the scheduler
                images = self.pipe(
                    **self.arguments | {"output_type": output_type},
                    num_inference_steps=steps,
                    generator=self._generator,
                    return_dict=False,
                )[0]
        finally:
            disable_cache(self.pipe)
        self.call_seconds = time.perf_counter() - begun
        images = images.float().cpu() if isinstance(images, Tensor) else images  # NumPy knows no bfloat16
        return np.asarray(images, dtype=np.float32)


def _is_plain(value: Any) -> bool:
    """Whether a file of JSON can hold it: a list may be of tensors, or of images."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item()


def _flat(x: Tensor) -> Tensor:
    """All samples' errors count together, in a batch of one: pipelines may pack several into one row."""
    return x.reshape(1, -1)
