"""Measuring: runs of the sampler that are watched, nudged and replayed."""

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CachePolicy, CacheSpec
from skipdit.caching.runtime import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.layers.flops import run_flops
from skipdit.layers.inspect import replaced
from skipdit.layers.skip import SkipTransformer, predicted_noise
from skipdit.planning.errors import Errors, Weights
from skipdit.planning.schedules import forecast, interpolate, moved, uniform
from skipdit.sampling.sampler import Sampler
from skipdit.utils.device import double

NUDGE = 0.15  # by which a weight is moved, to see what it does
TINY = 1e-20


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
        elif len(self._features[-1]) != len(step.kept_feature):
            raise ValueError(
                "guidance that begins or ends within a run cannot be planned: let it be on or off throughout"
            )
        else:
            errors = double(torch.stack([error(feature) for feature in self._features], 1))  # (rows, F, ...)
            self.grams[k].append(errors @ errors.mT / errors.shape[-1])
        self._features.append(step.kept_feature)
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
                cache.kept_feature = feature
            return output
        output = self._forward(*args, cache=cache, **kwargs)
        if n == len(self._record):
            left = None if cache is None else cache.kept_feature
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

    def changes(self, policy: CachePolicy, steps: int | None = None) -> list[Tensor]:
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

    def error(self, policy: CachePolicy, steps: int | None = None) -> float:
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

    def flops(self, policy: CachePolicy) -> float:
        return run_flops(SkipCache(policy, self.timesteps), self.sampler.flops)

    def speedup(self, policy: CachePolicy) -> float:
        return self.steps * self.sampler.flops["full"] / self.flops(policy)


def mean_squares(batches: Sequence[Tensor]) -> Tensor:
    """Of every sample of batches (n, ...): (N,)."""
    return torch.cat([batch.square().flatten(1).mean(1) for batch in batches])
