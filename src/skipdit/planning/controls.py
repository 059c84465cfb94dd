"""Controls: what else the cost of a plan could be spent on."""

from typing import NamedTuple

from skipdit.caching.policies import CacheSpec
from skipdit.caching.policy import CachePolicy
from skipdit.layers.flops import uncached_steps
from skipdit.planning.calibration import Bench

INTERVALS = range(2, 16)


class Control(NamedTuple):
    """A way to sample.

    Attributes:
        method: the sampler's, if it is another.
    """

    name: str
    policy: CachePolicy
    steps: int
    method: str | None = None


def controls(bench: Bench, flops: float) -> list[Control]:
    """Return runs that cost about as much as these FLOPs, and the uncached one.

    They are: fewer steps of the same sampler; as many of the multistep solvers, without a cache; and Skip-Cache at a
    regular interval whose cost comes nearest, with features, or outputs if no step is cached, that are reused or
    extrapolated.
    """
    sampler, steps = bench.sampler, uncached_steps(flops, bench.sampler.flops)
    found = [Control(f"{steps} steps, {sampler.method}", CacheSpec(), steps)]
    others = [method for method in sampler.solvers if method != sampler.method]
    found += [Control(f"{steps} steps, {method}", CacheSpec(), steps, method) for method in others]
    regular = [CacheSpec(interval, branch=bench.branch) for interval in INTERVALS]
    nearest = min(regular, key=lambda spec: abs(bench.flops(spec) - flops))
    cost = f"N={nearest.interval}, {bench.speedup(nearest):.2f}x"
    found.append(Control(f"reuse {cost}", nearest, bench.steps))
    found.append(Control(f"extrapolate {cost}", nearest.with_order(1), bench.steps))
    return [*found, Control(f"{bench.steps} steps, {sampler.method}, uncached", CacheSpec(), bench.steps)]
