"""What benchmarks/compare.py compares: every way to sample, and the settings of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from baselines import FORA, PAB, Baseline, DBCache, DeltaDiT, TaylorSeer, TeaCache, TGate, parts_of

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec, DriftSpec
from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.layers.flops import run_flops
from skipdit.layers.skip import SkipTransformer

UNCACHED, FEWER, REUSE, EXTRAPOLATE = "uncached", "fewer steps", "Skip-Cache", "Skip-Cache, extrapolated"
PLANNED, DRIFT = "Skip-Cache planned", "Skip-Cache by drift"
METHODS = {  # as --methods names them
    "fewer-steps": FEWER,
    "skip-cache": REUSE,
    "skip-cache-forecast": EXTRAPOLATE,  # its name from before there were forecast steps
    "skip-cache-planned": PLANNED,
    "skip-cache-drift": DRIFT,
    "fora": "FORA",
    "delta-dit": "Delta-DiT",
    "pab": "PAB",
    "t-gate": "T-GATE",
    "fbcache": "FBCache",
    "dbcache": "DBCache",
    "teacache": "TeaCache",
    "teacache-fitted": "TeaCache fitted",
    "taylorseer": "TaylorSeer",
}


@dataclass
class Row:
    """One way to sample.

    Attributes:
        backbone: skip or plain.
        method: as METHODS has it.
        name: method and settings.
        spec, baseline: at most one of them caches.
    """

    backbone: str
    method: str
    name: str
    steps: int
    spec: CachePolicy = field(default_factory=CacheSpec)
    baseline: Baseline | None = None

    @property
    def key(self) -> str:
        return re.sub(r"[^\w.]+", "-", f"{self.backbone} {self.name}").lower()

    @property
    def varies(self) -> bool:
        """Whether what a batch costs depends on its samples."""
        return self.spec.adaptive or (self.baseline is not None and not self.baseline.static)

    @property
    def window(self) -> str:
        """Timesteps between which an interval caches."""
        return self.spec.window


def baselines_for(model: SkipTransformer, steps: int, polynomial: Sequence[float] = ()) -> dict[str, list[Baseline]]:
    """Two or three settings of every baseline that the model can have, fast ones last.

    Args:
        polynomial: TeaCache's for this model; without it, there is no fitted TeaCache.
    """
    kinds, depth = {part.kind for part in parts_of(model)}, model.depth
    outer, warmup = max(1, depth // 7), min(8, steps // 5)  # cache-dit: 8 of 57 blocks, 8 steps
    found: dict[str, list[Baseline]] = {
        "FORA": [FORA(2), FORA(3), FORA(4)],
        "TaylorSeer": [TaylorSeer(2, 1), TaylorSeer(3, 1), TaylorSeer(4, 2)],
        "PAB": [PAB(2, 3, 5), PAB(4, 6, 9)],
        "T-GATE": [TGate(round(0.6 * steps), 3), TGate(round(0.4 * steps))],
        "Delta-DiT": [DeltaDiT(2, 0.5), DeltaDiT(2, 0.75), DeltaDiT(3, 0.75)],
        "FBCache": [DBCache(0.05), DBCache(0.1), DBCache(0.2)],
        "DBCache": [DBCache(threshold, outer, outer, warmup) for threshold in (0.08, 0.12, 0.24)],
        "TeaCache": [TeaCache(0.05), TeaCache(0.1), TeaCache(0.2)],
    }
    if polynomial:
        found["TeaCache fitted"] = [TeaCache(threshold, tuple(polynomial)) for threshold in (0.05, 0.1, 0.2)]
    if "cross" not in kinds:
        del found["T-GATE"]
    return found


def rows_for(
    backbone: str,
    model: SkipTransformer,
    steps: int,
    timesteps: list[float],
    window: CacheSpec,
    flops: dict[str, float],
    polynomial: Sequence[float],
    quick: bool,
    also: Sequence[CachePolicy] = (),
) -> list[Row]:
    """Everything that runs on a backbone, the uncached run first.

    Args:
        window: of the task; Skip-Cache also runs in a window of all steps, where that makes other plans.
        also: other policies.
        flops: of a full and a cached step; numbers of uncached steps are chosen by them, to cost what Skip-Cache does.
    """
    intervals = (2, 3) if quick else (2, 3, 4, 5, 6)
    own, costs, seen = [], [], set()
    for interval in intervals:
        for start, stop in ((window.start, window.stop), (1000, 0)):
            spec = CacheSpec(interval, start, stop, window.branch)
            cache = SkipCache(spec, timesteps)
            if tuple(cache.plan) in seen:
                continue
            seen.add(tuple(cache.plan))
            costs.append(run_flops(cache, flops) / flops["full"])
            own.append(Row(backbone, REUSE, f"{REUSE} {spec}", steps, spec))
            extrapolate = spec.with_order(1)
            own.append(Row(backbone, EXTRAPOLATE, f"{REUSE} {extrapolate}", steps, extrapolate))
    for policy in also:
        if policy in [row.spec for row in own]:
            continue
        if not policy.adaptive and policy.branch == window.branch:
            costs.append(run_flops(SkipCache(policy, timesteps), flops) / flops["full"])
        kind = {CachePlan: PLANNED, DriftSpec: DRIFT}.get(type(policy), EXTRAPOLATE if policy.order else REUSE)
        own.append(Row(backbone, kind, f"{REUSE} {policy}", steps, policy))
    fewer = sorted({max(1, round(cost)) for cost in costs} - {steps}, reverse=True)
    rows = [Row(backbone, UNCACHED, UNCACHED, steps)]
    rows += [Row(backbone, FEWER, f"{count} steps", count) for count in fewer]
    rows += own if model.n_skips else []
    for method, baselines in baselines_for(model, steps, polynomial).items():
        rows += [
            Row(backbone, method, str(baseline), steps, baseline=baseline)
            for baseline in (baselines[1:2] if quick else baselines)
        ]
    return rows
