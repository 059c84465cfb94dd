"""Caching policies: which sampling steps run every layer.

The policy is a `CacheSpec`, an interval between two timesteps that the user writes; a `DriftSpec`, which decides at run
time; or a `CachePlan`, a file that `skipdit plan` made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from skipdit.caching.plans import CachePlan
from skipdit.caching.policy import CachePolicy
from skipdit.utils.errors import UserError

if TYPE_CHECKING:  # torch takes seconds, and a spec can be read without it
    from torch import Tensor

    from skipdit.caching.steps import CacheStep

_GRAMMAR = re.compile(r"N(\d+)-(\d+)-(\d+)(?:-b(\d+))?(?:-o(\d+))?")
_DRIFT_GRAMMAR = re.compile(r"D(\d+\.?\d*|\.\d+)(?:-m(\d+))?(?:-b(\d+))?(?:-o(\d+))?")
_EXAMPLE = (
    "'N<interval>-<start>-<stop>[-b<branch>][-o<order>]', for example 'N2-700-50' or 'N3-1000-20-b4-o1', a plan's "
    "'FILE.json', 'D<threshold>[-m<most>][-b<branch>][-o<order>]', for example 'D0.2-o1', or 'none'"
)


@dataclass(frozen=True)
class CacheSpec(CachePolicy):
    """A caching policy: every `interval`-th step between timesteps `start` and `stop` is full, the others are cached.

    Attributes:
        interval: 1 caches nothing, 2 every other step, ...
        start: steps at timesteps >= start are full.
        stop: every step after the first one at a timestep <= stop is full.
        branch: b, the number of outer layers on each side that a cached step runs.
        order: 0 reuses the stored feature, 1 extrapolates it linearly from the last two full steps.
    """

    interval: int = 1
    start: int = 1000
    stop: int = 0
    branch: int = 1
    order: int = 0

    def __post_init__(self):
        if self.interval < 1:
            raise UserError(f"cache interval is {self.interval}; it must be at least 1 (1 caches nothing)")
        _check(self.branch, self.order)

    def __str__(self) -> str:
        if self == CacheSpec():
            return "none"
        return f"N{self.interval}-{self.start}-{self.stop}" + _suffix(self.branch, self.order)

    @property
    def window(self) -> str:
        return f"{self.start}-{self.stop}"

    def with_order(self, order: int) -> CacheSpec:
        return replace(self, order=order)

    @property
    def caches(self) -> bool:
        """Whether any step may be cached."""
        return self.interval > 1

    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        """True where a step is full. A counter walks down the timesteps: a step is full when the counter is a multiple
        of `interval`, when nothing is stored, or when t >= start. A step with t <= stop resets both.
        """
        plan, counter, stored = [], 0, False
        for t in timesteps:
            full = counter % self.interval == 0 or not stored or t >= self.start
            plan.append(full)
            counter, stored = counter + 1, True
            if t <= self.stop:
                counter, stored = 0, False
        return plan


@dataclass(frozen=True)
class DriftSpec(CachePolicy):
    """A policy that looks: a step is full once the output of the first `branch` layers, which every step runs, has
    moved too far from where it was at the last full step.

    To decide, the host waits for one number from the device at every step, so the model cannot be compiled as a whole.
    The number is of all samples of a call together: a sample depends on those that it is made with.

    Attributes:
        threshold: the distance, relative to the norm then, beyond which a step is full.
        most: cached steps in a row at most.
        branch, order: as in `CacheSpec`.
    """

    threshold: float
    most: int = 8
    branch: int = 1
    order: int = 0

    def __post_init__(self):
        if not 0 <= self.threshold < math.inf:
            raise UserError(f"cache threshold is {self.threshold}; it must be a finite number, 0 or more")
        if self.branch < 1:
            raise UserError(f"cache branch is {self.branch}; a policy that looks at the first layers needs at least 1")
        if self.most < 0:
            raise UserError(f"cache most is {self.most}; it must be 0, which caches nothing, or more")
        _check(self.branch, self.order)

    adaptive = True

    def __str__(self) -> str:
        most = f"-m{self.most}" if self.most != DriftSpec.most else ""
        return f"D{np.format_float_positional(self.threshold, trim='-')}{most}" + _suffix(self.branch, self.order)

    @property
    def caches(self) -> bool:
        """Whether any step may be cached."""
        return self.most > 0

    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        """True where a step is sure to be full: the first."""
        return [i == 0 or not self.most for i in range(len(timesteps))]

    def oldest(self, i: int, full_mask: Sequence[bool]) -> int:
        return i - self.most

    def step(self, feature: Tensor | None, memory: Tensor | None, on_full: Callable[[], None]) -> CacheStep:
        from skipdit.caching.steps import DriftStep

        return DriftStep(self.branch, feature, memory, self.threshold, on_full)


def parse_policy(spec: str | CachePolicy | None) -> CachePolicy:
    """Read a policy as the command line writes it, or the plan that it names; a policy stays what it is.

    Raises ValueError, with the grammar, for anything else, and as `CachePlan.load` in `skipdit.caching.plans`.
    """
    if isinstance(spec, CachePolicy):
        return spec
    if spec is None or spec.lower() == "none":
        return CacheSpec()
    if spec.endswith(".json"):
        return CachePlan.load(spec)
    if match := _DRIFT_GRAMMAR.fullmatch(spec.strip()):
        threshold, most, branch, order = match.groups()
        return DriftSpec(float(threshold), int(most or DriftSpec.most), int(branch or 1), int(order or 0))
    match = _GRAMMAR.fullmatch(spec.strip())
    if not match:
        raise UserError(f"cache spec {spec!r} does not parse; write {_EXAMPLE}")
    interval, start, stop, branch, order = match.groups()
    return CacheSpec(int(interval), int(start), int(stop), int(branch or 1), int(order or 0))


def _check(branch: int, order: int) -> None:
    if branch < 0:
        raise UserError(f"cache branch is {branch}; it must be 0, which runs no layer, or more")
    if order not in (0, 1):
        raise UserError(f"cache order is {order}; 0 reuses the stored feature, 1 extrapolates it linearly")


def _suffix(branch: int, order: int) -> str:
    return (f"-b{branch}" if branch != 1 else "") + (f"-o{order}" if order else "")
