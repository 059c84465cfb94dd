"""Skip-Cache: which sampling steps run every layer, and what the others see in their place.

`CacheSpec` is what the user writes; its `plan` is the policy. `SkipCache` is one sampling run: the plan on that run's
timesteps, and the stored feature. Nothing is kept on the model, so two runs never meet; since the timesteps are known
beforehand, nothing is ever read back from the device.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_GRAMMAR = re.compile(r"N(\d+)-(\d+)-(\d+)(?:-b(\d+))?(?:-o(\d+))?")
_EXAMPLE = (
    "'N<interval>-<start>-<stop>[-b<branch>][-o<order>]', for example 'N2-700-50' or 'N3-1000-20-b4-o1', or 'none'"
)


@dataclass(frozen=True)
class CacheSpec:
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
        if self.branch < 1:
            raise ValueError(f"cache branch is {self.branch}; it must be at least 1")
        if self.order not in (0, 1):
            raise ValueError(f"cache order is {self.order}; 0 reuses the stored feature, 1 forecasts it linearly")

    @classmethod
    def parse(cls, spec: "str | CacheSpec | None") -> "CacheSpec":
        """Read the grammar of the command line. Raises ValueError, with the grammar, for anything else."""
        if isinstance(spec, CacheSpec):
            return spec
        if spec is None or spec.lower() == "none":
            return cls()
        match = _GRAMMAR.fullmatch(spec.strip())
        if not match:
            raise ValueError(f"cache spec {spec!r} does not parse; write {_EXAMPLE}")
        interval, start, stop, branch, order = match.groups()
        return cls(int(interval), int(start), int(stop), int(branch or 1), int(order or 0))

    def __str__(self) -> str:
        if self == CacheSpec():
            return "none"
        text = f"N{self.interval}-{self.start}-{self.stop}"
        return text + (f"-b{self.branch}" if self.branch != 1 else "") + (f"-o{self.order}" if self.order else "")

    def with_order(self, order: int) -> "CacheSpec":
        return replace(self, order=order)

    def plan(self, timesteps: Sequence[float]) -> list[bool]:
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


class CacheStep:
    """What one model call sees of the cache, and what it leaves: a mailbox with no behaviour, so that it compiles.

    Attributes:
        branch: b, how many outer layers a cached pass runs.
        feature: the input of layer L-b to use instead of the middle layers; None makes the pass a full one.
        output: set by a full pass to its own input of layer L-b.
    """

    __slots__ = ("branch", "feature", "output")

    def __init__(self, branch: int, feature: Tensor | None):
        self.branch = branch
        self.feature = feature
        self.output: Tensor | None = None


class SkipCache:
    """One sampling run's cache.

        cache = SkipCache("N2-700-50", timesteps)
        for i, t in enumerate(timesteps):
            out = model(x, t, y, cache=cache.at(i))

    Args:
        spec: a `CacheSpec` or its text.
        timesteps: the run's timesteps in sampling order, numbers or a 1-D tensor (read once, here).

    Attributes:
        plan: list[bool], True where the step is full.
        ran: the plan, with the steps that had to run in full because their stream had nothing fresh to reuse.
        peak_bytes: the most memory the stored features took.
    """

    def __init__(self, spec: str | CacheSpec, timesteps: Sequence[float] | Tensor):
        self.spec = CacheSpec.parse(spec)
        self.timesteps = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
        self.plan = self.spec.plan(self.timesteps)
        self.ran = list(self.plan)
        self.peak_bytes = 0
        self._last_cached = max((i for i, full in enumerate(self.plan) if not full), default=-1)
        self._stored: dict[str, list[tuple[int, Tensor]]] = {}  # stream -> [(step, feature)], oldest first
        self._open: dict[str, tuple[int, CacheStep]] = {}  # full steps handed out, their output not collected yet
        if self.spec.interval > 1 and all(self.plan):
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
        self._collect(stream)
        stored = self._stored.get(stream)
        last_full = max(j for j in range(i + 1) if self.plan[j])
        if not self.plan[i] and stored and stored[-1][0] >= last_full:
            step = CacheStep(self.spec.branch, self._feature(i, stored))
        else:
            self.ran[i] = True
            step = CacheStep(self.spec.branch, None)
            if i < self._last_cached:
                self._open[stream] = (i, step)
        if i >= self._last_cached:  # no later step reads the cache: free it now, not when the run's objects die
            self._stored.pop(stream, None)
        return step

    def clear(self) -> None:
        """Forget the stored features; the counts stay. For the end of a run."""
        self._stored.clear()
        self._open.clear()

    def _collect(self, stream: str) -> None:
        """Take over what the last full call of this stream left in its mailbox."""
        i, step = self._open.pop(stream, (0, None))
        if step is None or step.output is None:
            return
        stored = self._stored.setdefault(stream, [])
        stored.append((i, step.output.detach()))
        del stored[: -1 - self.spec.order]
        self.peak_bytes = max(self.peak_bytes, sum(f.nbytes for s in self._stored.values() for _, f in s))

    def _feature(self, i: int, stored: list[tuple[int, Tensor]]) -> Tensor:
        """The stored feature, or for order 1 its linear forecast over the step index (one fused kernel)."""
        if len(stored) < 2:
            return stored[-1][1]
        (i0, f0), (i1, f1) = stored
        return torch.lerp(f0, f1, (i - i0) / (i1 - i0))
