"""One sampling run's cache: the plan of its policy on the run's timesteps, and the stored features.

Nothing is kept on the model, so two runs never meet. Since the timesteps are known beforehand, nothing is read back
from the device, except by a `DriftSpec`.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from skipdit.caching.policies import CachePolicy, parse_policy
from skipdit.caching.steps import CacheStep


class SkipCache:
    """One sampling run's cache.

        cache = SkipCache("N2-700-50", timesteps)
        for i, t in enumerate(timesteps):
            out = model(x, t, y, cache=cache.at(i))

    Args:
        spec: a policy, or the text or file of one.
        timesteps: the run's timesteps in sampling order, numbers or a 1-D tensor (read once, here).

    Attributes:
        plan: list[bool], True where the step is full.
        ran: the plan, with the steps that ran in full because their stream had nothing fresh to reuse, or by drift.
        peak_bytes: the most memory the stored features took.
    """

    def __init__(self, spec: str | CachePolicy, timesteps: Sequence[float] | Tensor):
        self.spec = parse_policy(spec)
        self.timesteps = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
        self.plan = self.spec.full_mask(self.timesteps)
        self.ran = list(self.plan)
        self.peak_bytes = 0
        self._last_cached = max((i for i, full in enumerate(self.plan) if not full), default=-1)
        self._stored: dict[str, list[tuple[int, Tensor]]] = {}  # stream -> [(step, feature)], oldest first
        self._memory: dict[str, Tensor] = {}  # stream -> `CacheStep.memory` of its last full step
        self._open: dict[str, tuple[int, CacheStep]] = {}  # steps handed out, their output not collected yet
        if self.spec.caches and all(self.plan):
            warnings.warn(f"cache {self.spec} never engages on these {len(self.plan)} timesteps", stacklevel=2)

    @property
    def full_steps(self) -> int:
        return sum(self.ran)

    @property
    def cached_steps(self) -> int:
        return len(self.plan) - self.full_steps

    def at(self, i: int, stream: str = "default") -> CacheStep | None:
        """The cache for the model call of step i; None in a run without cached steps.

        Streams keep the calls of one step apart, such as guidance that runs its unconditional half as a second call. A
        stream that sat out the plan's last full step, and so has nothing fresh to reuse, runs a full step instead.
        """
        if self._last_cached < 0:
            return None
        self._collect()
        if i == len(self.plan) - 1 and all(self.ran[:i]) and not all(self.plan[:i]):
            warnings.warn(f"cache {self.spec} cached none of the {i} steps before the last", stacklevel=2)
        stored, spec = self._stored.get(stream), self.spec
        fresh = not self.plan[i] and stored and stored[-1][0] >= spec.oldest(i, self.plan)
        feature = self._feature(i, stored) if fresh else None
        step = spec.step(feature, self._memory.get(stream), lambda: self.ran.__setitem__(i, True))
        if not spec.adaptive:
            self.ran[i] = self.ran[i] or not fresh
        if i >= self._last_cached:  # no later step reads the cache: free it now, not when the run's objects die
            self._stored.pop(stream, None)
            self._memory.pop(stream, None)
        elif spec.adaptive or not fresh:
            self._open[stream] = (i, step)
        return step

    def clear(self) -> None:
        """Forget the stored features; the counts stay. For the end of a run."""
        self._stored.clear()
        self._memory.clear()
        self._open.clear()

    def _collect(self) -> None:
        """Copy what full calls left in their mailboxes, before the next call of the model.

        A copy, since a compiled model may hand out memory that its next call writes into again (CUDA graphs,
        `mode="reduce-overhead"`); one costs as much as an addition to the residual stream.
        """
        for stream, (i, step) in self._open.items():
            if step.output is None:
                continue
            stored = self._stored.setdefault(stream, [])
            stored.append((i, step.output.detach().clone()))
            del stored[: -1 - self.spec.order]
            if step.memory is not None:
                self._memory[stream] = step.memory.detach()
            step.output = None
        self._open.clear()
        kept = [f for s in self._stored.values() for _, f in s] + list(self._memory.values())
        self.peak_bytes = max(self.peak_bytes, sum(f.nbytes for f in kept))

    def _feature(self, i: int, stored: list[tuple[int, Tensor]]) -> Tensor:
        """The last stored feature, or its forecast from the last ones: of two, one fused kernel."""
        steps, features = zip(*stored, strict=True)
        weights = self.spec.coefficients(i, steps)
        if not weights:
            return features[-1]
        feature = torch.lerp(features[-2], features[-1], 1 + weights[0])
        for weight, new, old in zip(weights[1:], features[-2::-1], features[-3::-1], strict=False):
            feature = feature.add_(new, alpha=weight).sub_(old, alpha=weight)
        return feature
