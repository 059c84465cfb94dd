"""Calibration: the runs of a sampler that plans are fitted on."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.caching.policy import CACHED, FORECAST, FULL, NAMES, CachePolicy
from skipdit.encoders.autoencoder import decode
from skipdit.layers.inspect import replaced
from skipdit.layers.skip import SkipTransformer, predicted_noise
from skipdit.planning.fitting import TINY, Fit, Recording
from skipdit.planning.schedules import cost_of, restarted
from skipdit.sampling.sampler import Sampler
from skipdit.utils.device import double
from skipdit.utils.errors import UserError
from skipdit.utils.timing import moment

TARGETS = ("converged", "sampler")
# The most coefficients of a step, of features and of outputs. Cached steps that may correct their output, too, are
# better off with fewer features.
MEMORY = {"sampler": (2, 3), "converged": (1, 3)}
COSTS = ("flops", "time")
# A run whose steps are timed, but for the first one: of every kind some, wherever a second transformer takes over.
TIMED = FULL + 4 * (FULL + CACHED + FORECAST)
ROUNDS = 5  # of such runs


def products(outputs: list[Tensor]) -> np.ndarray:
    """The inner products (steps, steps) of the outputs of any two steps."""
    rows = torch.stack([output.flatten() for output in outputs])
    return (rows @ rows.T).cpu().numpy()


class Recorder:
    """Stands in for a model's `forward` in an uncached run, and records it.

    (A hook would not do: those of a pipeline come later, and bring its own cache.)

    Args:
        guide: see `Sampler.guide`.
        wanted: the steps to record.
        count: N, samples of the run.

    Raises UserError at a step that is guided where an earlier one was not, or the other way round.
    """

    def __init__(self, model: SkipTransformer, guide: Callable[[Tensor], Tensor], wanted: set[int], count: int):
        self.recording, self.calls = Recording(), 0
        self._forward, self._guide, self._wanted, self._count = model.forward, guide, wanted, count
        self._names = list(inspect.signature(model.forward).parameters)  # the first: the latents
        self.recording.name = self._names[0]

    def __call__(self, *args, **kwargs) -> Any:
        arguments, own = dict(zip(self._names, args, strict=False)) | kwargs, self.recording
        output = self._forward(**arguments | {"cache": None})
        if self.calls in self._wanted:
            latents = arguments.pop(own.name)
            noise = output if isinstance(output, Tensor) else output[0]
            rows = len(latents) // self._count
            if own.latents and own.rows != rows:
                raise UserError(
                    "guidance that begins or ends within a run cannot be planned: let it be on or off throughout"
                )
            own.rows, predicted = rows, predicted_noise(noise, latents)
            guided = double(self._guide(predicted) if rows > 1 else predicted)
            own.latents.append(double(latents[: len(guided)]))
            own.outputs.append(guided)
            own.arguments.append(arguments)
        self.calls += 1
        return output


@dataclass
class Fitted:
    """A plan, and its error on the calibration samples.

    Attributes:
        fit: what other fits may take their first steps from, if it was kept. It has the stored features and outputs of
            all steps, on the device.
    """

    plan: CachePlan
    error: float
    fit: Any = None


class Schedule(CachePolicy):
    """Steps of given kinds, at whatever timesteps. Those that are not full extrapolate."""

    order = 1

    def __init__(self, kinds: str, branch: int):
        self.kinds, self.branch = kinds, branch

    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        return [kind == FULL for kind in self.kinds]

    def step_kinds(self, timesteps: Sequence[float]) -> str:
        return self.kinds


class BaseBench(ABC):
    """Runs that plans are fitted on: what policies cost in them. Subclasses make the runs, and measure errors.

    Attributes:
        sampler: has `solvers`, and the `method` of the runs.
        steps: of a run.
        branch: b, of cached steps; 0: there are none.
        exchanges: how many exchanges of neighbouring steps a search may try from one schedule.
        restarts: steps that have to be full, besides the first one.
        products: (steps, steps), inner products of the guided outputs of any two steps of the uncached run, once
            calibrated.
        gains: (steps,), how far a step's output moves the latents after it.
        by: what counts as cost, "flops" or, once `measure` was called, "time".
        costs: by each of them, what a step of each kind costs, in full steps.
        seconds: that a step of each kind takes, if they were measured.
    """

    sampler: Any
    steps: int
    branch: int
    timesteps: tuple[float, ...]
    exchanges: int = 30
    restarts: Sequence[int] = ()
    products: np.ndarray
    gains: np.ndarray
    by: str = "flops"
    costs: dict[str, dict[str, float]]
    seconds: dict[str, float]

    @property
    def step_costs(self) -> dict[str, float]:
        """What a step of each kind costs by what counts, in full steps."""
        return self.costs[self.by]

    def cost(self, policy: CachePolicy, by: str | None = None) -> float:
        """Return what a run costs, in full steps, by `by` or what counts."""
        return cost_of(restarted(policy.step_kinds(self.timesteps), self.restarts), self.costs[by or self.by])

    def speedup(self, policy: CachePolicy, by: str | None = None) -> float:
        """Return the cost of the uncached run over that of another."""
        return self.steps / self.cost(policy, by)

    def measure(self) -> None:
        """Time the steps of every kind, on this device and with this batch, which is what they cost from now on.

        A step is timed from the end of the one before to its own, the sampler's part of it included, and the device is
        waited for in between. Medians of several runs, after one to warm up.
        """
        kinds = TIMED if self.branch else TIMED.replace(CACHED, "")
        times: dict[str, list[float]] = {NAMES[kind]: [] for kind in kinds}
        self.step_ends(kinds)
        for _ in range(ROUNDS):
            for kind, (before, after) in zip(kinds[1:], pairwise(self.step_ends(kinds)), strict=True):
                times[NAMES[kind]].append(after - before)
        self.seconds = {kind: median(each) for kind, each in times.items()}
        self.costs = self.costs | {"time": {kind: each / self.seconds["full"] for kind, each in self.seconds.items()}}
        self.by = "time"

    @abstractmethod
    def step_ends(self, kinds: str) -> list[float]:
        """Make a run of a schedule. Returns the `moment` at which every step has ended."""


class Bench(BaseBench):
    """Runs of one sampler, and the target that they are measured by.

    Args:
        sampler: of the calibration samples.
        steps: of a run.
        branch: b, of cached steps.
        target: "sampler": the uncached run itself; "converged": what it tends to with ever more steps.

    Raises ValueError for a sampler that cannot be planned; `calibrate` for one that has no converged run.
    """

    def __init__(self, sampler: Sampler, steps: int, branch: int, target: str = "sampler"):
        self.sampler, self.steps, self.branch, self.target = sampler, steps, branch, target
        self.model = sampler.model
        cached = {"cached": sampler.flops["cached"] / sampler.flops["full"]} if branch else {}
        self.costs = {"flops": {"full": 1.0} | cached | {"forecast": 0.0}}
        self.timesteps = tuple(float(t) for t in sampler.timesteps(steps))
        if len(self.timesteps) != steps:
            calls = f"{len(self.timesteps)} times in {steps} steps"
            raise UserError(f"{sampler.method} calls the model {calls}; such runs cannot be planned")
        self.batches = list(sampler.batches(range(sampler.total)))
        self.response = sampler.response(steps)
        self.factors = (1, 2, 4) if target == "converged" else (1,)  # steps of calibration's runs, over the bench's
        self._known: dict[str, dict[str, float]] = {}

    def calibrate(self) -> None:
        """Make the uncached runs, and the target."""
        refined = [self.sampler.refined(self.steps, each) if each > 1 else self.steps for each in self.factors]
        if None in refined:
            raise UserError(
                f"there is no converged run of {self.sampler.method} with {self.steps} steps: it is stochastic, or no "
                "longer run visits the same timesteps. --target sampler plans towards the uncached run"
            )
        first_order = self.sampler.method == ("ddim" if self.model.flow_shift is None else "euler")
        self.own: list[Recording] = []
        self.goals: list[list[Tensor]] = []
        # per target, the images of every batch
        self.references: dict[str, list[Tensor]] = {name: [] for name in TARGETS if name in ("sampler", self.target)}
        of_all = sum(self.factors) * self.steps * len(self.batches)
        with tqdm(total=of_all, desc=f"uncached runs, for the target {self.target}", unit="step") as progress:
            for indices in self.batches:
                runs = [self._record(indices, steps, progress) for steps in refined]
                goal = runs[-1].latents
                if len(runs) > 1 and first_order:  # its error halves with the steps
                    goal = [2 * fine - coarse for fine, coarse in zip(goal, runs[-2].latents, strict=True)]
                self.own.append(runs[0])
                self.goals.append(goal[1:])
                self.references["sampler"].append(self._images(runs[0].latents[-1]))
                if self.target == "converged":
                    self.references["converged"].append(self._images(goal[-1]))
        self.products = sum(products(run.outputs) for run in self.own)
        self.gains = self.response.diagonal().numpy()
        self._known.clear()

    def _record(self, indices: list[int], steps: Any, progress: tqdm) -> Recording:
        fine = self.sampler.timesteps(steps)
        wanted = {fine.index(t) for t in map(type(fine[0]), self.timesteps)}
        recorder = Recorder(self.model, self.sampler.guide, wanted, len(indices))
        with replaced(self.model, "forward", recorder):
            latents, _ = self.sampler.latents(indices, steps, CacheSpec(), lambda *_: progress.update())
        if recorder.calls != len(fine):
            raise UserError(f"{recorder.calls} calls of the model in a run of {len(fine)} steps cannot be planned")
        recorder.recording.latents.append(double(self.sampler.to_model(latents)))
        return recorder.recording

    def step_ends(self, kinds: str) -> list[float]:
        ends: list[float] = []
        schedule = Schedule(kinds, self.branch)
        self.sampler.latents(self.batches[0], len(kinds), schedule, lambda *_: ends.append(moment(self.model.device)))
        return ends

    def _images(self, latents: Tensor) -> Tensor:
        """Of latents as the model has them, (N, ..., 3, H, W) in [-1, 1]."""
        return decode(self.sampler.vae, self.sampler.to_model(latents).float()).clamp(-1, 1).cpu()

    def fit(self, kinds: str, base: Fitted | None = None, keep: bool = False) -> Fitted:
        """Fit a schedule.

        Args:
            base: another fit that was kept. The steps that both schedules begin with are not run again.
            keep: this fit, to be another one's `base`.
        """
        memory, correct = MEMORY[self.target], self.target == "converged"
        fit = Fit(self.sampler, self.own, self.goals, kinds, self.branch, self.response, memory, correct)
        states = fit.run(base and base.fit, keep)
        features = tuple(None if ws is None else tuple(ws.tolist()) for ws in fit.features)
        outputs = tuple(tuple(ws.tolist()) for ws in fit.outputs)
        plan = CachePlan(self.timesteps, features, self.branch, kinds, outputs)
        images = [self._images(fit.final(batch, state)) for batch, state in enumerate(states)]
        return Fitted(plan, self._error(images, self.target), fit if keep else None)

    def error(self, policy: CachePolicy, steps: int | None = None, method: str | None = None) -> float:
        """The error of a policy, by the bench's target; see `errors`."""
        return self.errors(policy, steps, method)[self.target]

    def errors(self, policy: CachePolicy, steps: int | None = None, method: str | None = None) -> dict[str, float]:
        """Per target, the root of the mean squared error of the images, of their range: the geometric mean over
        samples, as a mean of PSNRs is. A bench whose target is the uncached run knows no converged one.

        Args:
            steps: of the run, if not the bench's.
            method: of the sampler, if not its own.
        """
        key = f"{policy} {steps} {method}"
        if key not in self._known:
            with self.sampler.using(method) if method else nullcontext():
                self._known[key] = self.errors_of(self.sampler.images(steps or self.steps, policy))
        return self._known[key]

    def errors_of(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """The errors, as of `errors`, of the images of every batch (N, ..., 3, H, W) in [-1, 1], on the CPU."""
        images = list(batches)
        return {target: self._error(images, target) for target in self.references}

    def _error(self, images: list[Tensor], target: str) -> float:
        changes = [(a - b).div(2) for a, b in zip(images, self.references[target], strict=True)]
        squares = torch.cat([change.square().flatten(1).mean(1) for change in changes])
        return squares.clamp_min(TINY).log().mean().div(2).exp().item()
