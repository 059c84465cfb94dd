"""Controls: what else the cost of a plan could be spent on."""

from skipdit.caching.policies import CacheSpec
from skipdit.planning.calibration import BaseBench
from skipdit.sampling.rows import Row

INTERVALS = range(2, 16)


def controls(bench: BaseBench, cost: float) -> list[Row]:
    """Return runs that cost about as much as so many full steps, and the uncached one.

    They are: fewer steps of the same sampler; as many of the multistep solvers, without a cache; and Skip-Cache at the
    regular interval whose cost comes nearest, with features that are reused or extrapolated, unless cached steps cost
    too much, and with forecasts of the output ("b0").
    """
    sampler, steps = bench.sampler, max(1, round(cost))
    rows = [Row(f"{steps} steps, {sampler.method}", CacheSpec(), steps)]
    others = [method for method in sampler.solvers if method != sampler.method]
    rows += [Row(f"{steps} steps, {method}", CacheSpec(), steps, method) for method in others]
    for branch in sorted({bench.branch, 0}, reverse=True):
        regular = [CacheSpec(interval, branch=branch) for interval in INTERVALS]
        if branch and bench.cost(regular[-1]) > cost:
            continue
        nearest = min(regular, key=lambda spec: abs(bench.cost(spec) - cost))
        outputs = " b0" if bench.branch and not branch else ""
        told = f"N={nearest.interval}{outputs}, {bench.speedup(nearest):.2f}x"
        rows.append(Row(f"reuse {told}", nearest, bench.steps))
        rows.append(Row(f"extrapolate {told}", nearest.with_order(1), bench.steps))
    return [*rows, Row(f"{bench.steps} steps, {sampler.method}, uncached", CacheSpec(), bench.steps)]
