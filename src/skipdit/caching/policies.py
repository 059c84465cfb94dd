"""Caching policies: which sampling steps run every layer.

The policy is a `CacheSpec`, an interval between two timesteps that the user writes; a `CachePlan`, a file that
`python -m skipdit plan` made; or a `DriftSpec`, which decides at run time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch takes seconds, and a spec can be read without it
    from torch import Tensor

    from skipdit.caching.steps import CacheStep

_GRAMMAR = re.compile(r"N(\d+)-(\d+)-(\d+)(?:-b(\d+))?(?:-o(\d+))?")
_DRIFT_GRAMMAR = re.compile(r"D(\d+\.?\d*|\.\d+)(?:-m(\d+))?(?:-b(\d+))?(?:-o(\d+))?")
_EXAMPLE = (
    "'N<interval>-<start>-<stop>[-b<branch>][-o<order>]', for example 'N2-700-50' or 'N3-1000-20-b4-o1', a plan's "
    "'FILE.json', 'D<threshold>[-m<most>][-b<branch>][-o<order>]', for example 'D0.2-o1', or 'none'"
)


class CachePolicy(ABC):
    """Which steps of a sampling run are full, and what the cached ones see in place of the middle layers.

    A policy of your own needs `full_mask`, and works wherever a cache is asked for:

        class FirstAndLast(CachePolicy):
            def full_mask(self, timesteps):
                return [i in (0, len(timesteps) - 1) for i in range(len(timesteps))]

        cache = SkipCache(FirstAndLast(), timesteps)
        enable_cache(pipe, FirstAndLast())

    Attributes:
        branch: b, the number of outer layers on each side that a cached step runs; 0 forecasts the output of the last.
        order: how many differences of stored features a cached step may add to the last one; 0 reuses that.
        adaptive: whether steps decide at run time. Such a policy cannot be compiled, and its cost is not known before.
    """

    branch: int = 1
    order: int = 0
    adaptive: bool = False

    @abstractmethod
    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        """Return True for each step that is full, the first one at least.

        Args:
            timesteps: of the run, in sampling order.

        Raises ValueError for timesteps that it is not for.
        """

    @property
    def caches(self) -> bool:
        """Whether any step may be cached."""
        return True

    @property
    def label(self) -> str:
        """A short name for tables."""
        return str(self)

    @property
    def window(self) -> str:
        """The timesteps between which steps are cached, where the policy has some."""
        return ""

    @property
    def calibration_seed(self) -> int | None:
        """The seed of the samples that the policy was fitted on; None if it was not."""
        return None

    def coefficients(self, i: int, full: tuple[int, ...]) -> Sequence[float]:
        """Return the coefficients u, v, ... of cached step i, at most `order`: it uses f0 + u (f0 - f1) + v (f1 - f2)
        + ... of the last features, f0 the newest. By default those of a linear forecast.

        Args:
            full: the steps whose features are stored, newest last, at most `order` + 1.
        """
        return linear_coefficients(i, full) if self.order else ()

    def oldest(self, i: int, full_mask: Sequence[bool]) -> int:
        """Return the oldest step whose feature step i may use; by default the last full one."""
        return max(j for j in range(i + 1) if full_mask[j])

    def step(self, feature: Tensor | None, memory: Tensor | None, on_full: Callable[[], None]) -> CacheStep:
        """Return the cache of one model call.

        Args:
            feature: what a cached step uses; None if nothing is stored, or the step is to be full.
            memory: `CacheStep.memory` of the stream's last full step.
            on_full: an adaptive step calls it if it decides to be full.
        """
        from skipdit.caching.steps import CacheStep

        return CacheStep(self.branch, feature)

    def check(self, model: str, sampler: str, guidance_scale: float) -> None:  # noqa: B027 (most are for anything)
        """Warn if the policy was made for something else.

        Args:
            model: fingerprint of the weights.
        """


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
            raise ValueError(f"cache interval is {self.interval}; it must be at least 1 (1 caches nothing)")
        _check(self.branch, self.order)

    def __str__(self) -> str:
        if self == CacheSpec():
            return "none"
        return f"N{self.interval}-{self.start}-{self.stop}" + _suffix(self.branch, self.order)

    @classmethod
    def parse(cls, spec: str | CachePolicy | None) -> CachePolicy:
        """As `parse_policy`: its name in version 0.1."""
        return parse_policy(spec)

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
class CachePlan(CachePolicy):
    """A policy for the timesteps of one kind of run, made by calibration: see `skipdit.planning.command`.

    Of the last full steps' features f, newest first, a cached step with the weights u, v, ... uses
    f0 + u (f0 - f1) + v (f1 - f2) + ...: no weights reuse f0; one that is the number of steps since then over the
    distance of the last two full steps is a linear forecast; others are fitted.

    Attributes:
        timesteps: of the run, in sampling order.
        weights: some per step, None where it is full.
        branch: b, as in `CacheSpec`.
        about: what it was made from, and what was measured: `model` has the fingerprint of the weights.
        source: the file.
    """

    timesteps: tuple[float, ...]
    weights: tuple[tuple[float, ...] | None, ...]
    branch: int = 1
    about: dict[str, Any] = field(default_factory=dict, compare=False)
    source: str = field(default="a plan", compare=False)

    def __post_init__(self):
        if len(self.timesteps) != len(self.weights) or not self.weights:
            raise ValueError(f"{self.source} has {len(self.weights)} weights for {len(self.timesteps)} timesteps")
        if self.weights[0] is not None or not all(math.isfinite(w) for ws in self.weights for w in ws or ()):
            raise ValueError(f"{self.source}: the first step must be full (null), and all weights finite numbers")
        full = list(accumulate(ws is None for ws in self.weights))
        if bad := [i for i, ws in enumerate(self.weights) if len(ws or ()) >= full[i]]:
            raise ValueError(f"{self.source}: step {bad[0]} has as many weights as there are full steps before it")
        if self.branch < 0:
            raise ValueError(f"{self.source}: branch is {self.branch}; it must be 0, which runs no layer, or more")

    @classmethod
    def load(cls, file: str | Path) -> CachePlan:
        """Read a plan. Raises FileNotFoundError, or ValueError for a file that is none; both name it."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no plan {file}; `python -m skipdit plan --help` tells how to make one")
        try:
            about = json.loads(Path(file).read_text(encoding="utf-8"))
            timesteps, weights, branch = (about.pop(key) for key in ("timesteps", "weights", "branch"))
            numbers = tuple(None if ws is None else _numbers(ws) for ws in _listed(weights))
            about.get("calibration", {}).get("seed")
            parts = _numbers(timesteps), numbers, _whole(branch), about, str(file)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{file} is not a plan of `python -m skipdit plan`: {error!r}") from error
        return cls(*parts)

    def save(self, file: str | Path) -> None:
        """Write it as JSON, a line per entry."""
        own = {"branch": self.branch, "timesteps": self.timesteps, "weights": self.weights}
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (self.about | own).items())
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def check(self, model: str, sampler: str, guidance_scale: float) -> None:
        """Warn if it was made for something else.

        Args:
            model: fingerprint of the weights.
        """
        now = {"model": model, "sampler": sampler, "guidance_scale": guidance_scale}
        differ = [
            f"{key} {self.about[key]}, not {now[key]}" for key in now if self.about.get(key, now[key]) != now[key]
        ]
        if differ:
            warnings.warn(
                f"{self.source} was made for {'; '.join(differ)} (a model in float16 counts as another one); "
                "python -m skipdit plan makes a plan for this run",
                stacklevel=3,
            )

    @property
    def label(self) -> str:
        return Path(self.source).stem

    @property
    def calibration_seed(self) -> int | None:
        return self.about.get("calibration", {}).get("seed")

    def __str__(self) -> str:
        own = json.dumps([self.timesteps, self.weights, self.branch])
        full = self.weights.count(None)
        return f"plan of {full}/{len(self.weights)} full steps {hashlib.sha256(own.encode()).hexdigest()[:12]}"

    @property
    def order(self) -> int:
        return max(len(ws or ()) for ws in self.weights)

    @property
    def caches(self) -> bool:
        """Whether any step is cached."""
        return self.weights.count(None) < len(self.weights)

    def full_mask(self, timesteps: Sequence[float]) -> list[bool]:
        """True where a step is full. Raises ValueError for other timesteps than the plan's own."""
        if list(timesteps) != list(self.timesteps):
            told = (f"{len(ts)} steps from {ts[0]:g} to {ts[-1]:g}" for ts in (self.timesteps, list(timesteps)))
            raise ValueError(
                "{} is for {}; this run has {}: make one for it with python -m skipdit plan".format(self.source, *told)
            )
        return [weight is None for weight in self.weights]

    def coefficients(self, i: int, full: tuple[int, ...]) -> Sequence[float]:
        """Those of step i; if a stream sat out one of the plan's full steps, those of a linear forecast."""
        own = tuple(j for j in range(i) if self.weights[j] is None)
        used = 1 + len(self.weights[i])
        return self.weights[i] if own[-used:] == full[-used:] else linear_coefficients(i, full)


def _listed(value: Any) -> list:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.60} is no list")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    """Of JSON. A text of digits would pass as several numbers."""
    if bad := [value for value in _listed(values) if type(value) not in (int, float)]:
        raise TypeError(f"{bad[0]!r:.60} is no number")
    return tuple(map(float, values))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.60} is no whole number")
    return value


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
            raise ValueError(f"cache threshold is {self.threshold}; it must be a finite number, 0 or more")
        if self.branch < 1:
            raise ValueError(f"cache branch is {self.branch}; a policy that looks at the first layers needs at least 1")
        if self.most < 0:
            raise ValueError(f"cache most is {self.most}; it must be 0, which caches nothing, or more")
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

    Raises ValueError, with the grammar, for anything else, and as `CachePlan.load`.
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
        raise ValueError(f"cache spec {spec!r} does not parse; write {_EXAMPLE}")
    interval, start, stop, branch, order = match.groups()
    return CacheSpec(int(interval), int(start), int(stop), int(branch or 1), int(order or 0))


def linear_coefficients(i: int, full: Sequence[int]) -> tuple[float, ...]:
    """How far step i lies ahead of the last two of these full steps, in units of their distance; none of one step."""
    return ((i - full[-1]) / (full[-1] - full[-2]),) if len(full) > 1 else ()


def _check(branch: int, order: int) -> None:
    if branch < 0:
        raise ValueError(f"cache branch is {branch}; it must be 0, which runs no layer, or more")
    if order not in (0, 1):
        raise ValueError(f"cache order is {order}; 0 reuses the stored feature, 1 forecasts it linearly")


def _suffix(branch: int, order: int) -> str:
    return (f"-b{branch}" if branch != 1 else "") + (f"-o{order}" if order else "")
