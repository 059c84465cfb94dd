"""One sampling run's cache: the plan of its policy on the run's timesteps, and the stored features.

Nothing is kept on the model, so two runs never meet. Since the timesteps are known beforehand, nothing is read back
from the device, except by a `DriftSpec`.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from skipdit.caching.policies import parse_policy
from skipdit.caching.policy import CACHED, FORECAST, FULL, NAMES, CachePolicy, known_outputs
from skipdit.caching.steps import CacheStep, Tree, map_tensors, tensors_of

Stored = list[tuple[int, Tree]]  # (step, feature or output), oldest first


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
        ran: the plan, with the steps that ran in full because their stream had nothing fresh to use, or by drift.
        peak_bytes: the most memory that stored features and outputs took.
    """

    def __init__(self, spec: str | CachePolicy, timesteps: Sequence[float] | Tensor):
        self.spec = parse_policy(spec)
        self.timesteps = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
        kinds = self.spec.step_kinds(self.timesteps)
        self.plan = [kind == FULL for kind in kinds]
        self.ran = list(self.plan)
        self.peak_bytes = 0
        self._kinds = kinds
        used = [self.spec.output_coefficients(i, known_outputs(kinds, i)) for i in range(len(kinds))]
        readers = [i for i, kind in enumerate(kinds) if kind != FULL or used[i]]
        self._last_reader = max(readers, default=-1)
        self._features_kept = 1 + self.spec.feature_order if CACHED in kinds else 0
        self._outputs_kept = max(map(len, used), default=0) + 1 if FORECAST in kinds or any(used) else 0
        self._features: dict[str, Stored] = {}  # by stream
        self._outputs: dict[str, Stored] = {}
        self._memory: dict[str, Tensor] = {}  # stream -> `CacheStep.memory` of its last full step
        self._open: dict[str, tuple[int, CacheStep]] = {}  # steps handed out, what they left not collected yet
        if self.spec.caches and all(self.plan):
            warnings.warn(f"cache {self.spec} never engages on these {len(self.plan)} timesteps", stacklevel=2)

    @property
    def full_steps(self) -> int:
        return sum(self.ran)

    @property
    def cached_steps(self) -> int:
        return self.counts()["cached"]

    @property
    def forecast_steps(self) -> int:
        return self.counts()["forecast"]

    def kind(self, i: int) -> str:
        """How step i ran, or will: "full", "cached" or "forecast"."""
        return NAMES[FULL if self.ran[i] else self._kinds[i]]

    def counts(self) -> dict[str, int]:
        """How many steps are of each kind."""
        kinds = [self.kind(i) for i in range(len(self.ran))]
        return {kind: kinds.count(kind) for kind in NAMES.values()}

    def at(self, i: int, stream: str = "default") -> CacheStep | None:
        """The cache for the model call of step i; None in a run without cached steps.

        Streams keep the calls of one step apart, such as guidance that runs its unconditional half as a second call. A
        stream that sat out a step whose feature or output it would use now runs a full step instead.
        """
        if self._last_reader < 0:
            return None
        self._collect()
        if i == len(self.plan) - 1 and all(self.ran[:i]) and not all(self.plan[:i]):
            warnings.warn(f"cache {self.spec} cached none of the {i} steps before the last", stacklevel=2)
        spec, kind = self.spec, self._fresh_kind(i, stream)
        feature = None
        if kind == CACHED:
            steps, features = zip(*self._features[stream], strict=True)
            coefficients = spec.coefficients(i, steps)
            feature = map_tensors(lambda *stored: combined(stored, coefficients), *features)
        step = spec.step(feature, self._memory.get(stream), lambda: self.ran.__setitem__(i, True))
        if not spec.adaptive:
            self.ran[i] = self.ran[i] or kind == FULL
        if self._outputs_kept:
            self._use_outputs(i, kind, stream, step)
        if i >= self._last_reader:  # no later step reads the cache: free it now, not when the run's objects die
            for stored in (self._features, self._outputs, self._memory):
                stored.pop(stream, None)
        elif spec.adaptive or kind == FULL or (kind == CACHED and self._outputs_kept):
            self._open[stream] = (i, step)
        return step

    def clear(self) -> None:
        """Forget what is stored; the counts stay. For the end of a run."""
        for stored in (self._features, self._outputs, self._memory, self._open):
            stored.clear()

    def _fresh_kind(self, i: int, stream: str) -> str:
        """The step's kind by the plan, or full if its stream has not got what that takes."""
        kind = self._kinds[i]
        if kind == CACHED:
            stored = self._features.get(stream)
            return kind if stored and stored[-1][0] >= self.spec.oldest(i, self.plan) else FULL
        if kind == FORECAST:
            stored = self._outputs.get(stream)
            return kind if stored and stored[-1][0] == known_outputs(self._kinds, i)[-1] else FULL
        return FULL

    def _use_outputs(self, i: int, kind: str, stream: str, step: CacheStep) -> None:
        """Give the step its forecast, or the correction of its output; both are computed in float32."""
        stored = self._outputs.get(stream, [])
        own = () if kind == FORECAST else (i,)
        coefficients = self.spec.output_coefficients(i, (*(j for j, _ in stored), *own))
        if own and not coefficients:
            return
        outputs = [map_tensors(Tensor.float, output) for _, output in stored]
        if not own:
            forecast = map_tensors(lambda *known: combined(known, coefficients), *outputs)
            step.forecast = map_tensors(lambda x, like: x.to(like.dtype), forecast, stored[-1][1])
        else:
            first = coefficients[0]  # f0 + u (f0 - f1) + ..., but for f0, which is not known yet
            rest = map_tensors(lambda *known: _add_differences(known[-1] * -first, known, coefficients[1:]), *outputs)
            step.correction = torch.full((), 1 + first, device=tensors_of(rest)[0].device), rest

    def _collect(self) -> None:
        """Copy what calls left in their mailboxes, before the next call of the model.

        A copy, since a compiled model may hand out memory that its next call writes into again (CUDA graphs,
        `mode="reduce-overhead"`); one costs as much as an addition to the residual stream.
        """
        if not self._open:
            return
        for stream, (i, step) in self._open.items():
            for stored, kept, most in (
                (self._features, step.kept_feature, self._features_kept),
                (self._outputs, step.kept_output, self._outputs_kept),
            ):
                if kept is not None and most:
                    own = stored.setdefault(stream, [])
                    own.append((i, map_tensors(lambda x: x.detach().clone(), kept)))
                    del own[:-most]
            if step.memory is not None:
                self._memory[stream] = step.memory.detach()
            step.kept_feature = step.kept_output = None
        self._open.clear()
        kept = [x for stored in (self._features, self._outputs) for own in stored.values() for _, x in own]
        tensors = tensors_of([kept, *self._memory.values()])
        self.peak_bytes = max(self.peak_bytes, sum(x.nbytes for x in tensors))


def combined(stored: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """f0 + u (f0 - f1) + v (f1 - f2) + ... of what is stored, newest last: of two, one fused kernel."""
    if not coefficients:
        return stored[-1]
    two = torch.lerp(stored[-2], stored[-1], 1 + coefficients[0])
    return _add_differences(two, stored[:-1], coefficients[1:])


def _add_differences(x: Tensor, stored: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Add v (f1 - f2) + ... to x, in place: differences of what is stored, newest last."""
    for coefficient, new, old in zip(coefficients, stored[::-1], stored[-2::-1], strict=False):
        x = x.add_(new, alpha=coefficient).sub_(old, alpha=coefficient)
    return x
