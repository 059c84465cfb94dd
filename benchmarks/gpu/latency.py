"""Full and cached steps of the four models, and the full step of others' code with the same weights."""

import time
from functools import partial
from typing import Any

import torch

from gpu.baselines import baseline_of
from gpu.bench import DTYPES, Bench, difference, form_of
from gpu.models import Case, Step
from gpu.plan import Row, Wrong

SECTION = "latency"
TOLERANCE = 0.05  # relative difference of compiled from eager outputs in half precision; 28 to 56 layers add up


def latency_row(case: Case, batch: int, dtype: str, mode: str, **expected: float) -> Row:
    """The row of full and cached steps. `expected`: seconds, as `Row` has them."""
    settings = {"case": case, "batch": batch, "dtype": dtype, "mode": mode}
    form = form_of(**settings)
    compile = partial(compile_steps, **settings) if form else None
    measure = partial(measure_steps, **settings)
    return Row(SECTION, f"{case.name} | {batch} | {dtype} | {mode}", measure, form=form, compile=compile, **expected)


def baseline_row(case: Case, batch: int, dtype: str, mode: str, **expected: float) -> Row:
    """The row of the full step in others' code. As `latency_row`."""
    settings = {"case": case, "batch": batch, "dtype": dtype, "mode": mode}
    name = f"baseline {case.name} | {batch} | {dtype} | {mode}"
    form = form_of(**settings) and name
    return Row(SECTION, name, partial(measure_baseline, **settings), form=form, **expected)


def compile_steps(bench: Bench, case: Case, batch: int, dtype: str, mode: str) -> None:
    """Call every kind of step once."""
    step = Step(case, bench.open(case, dtype, mode, batch), batch, mode == "graphs")
    for function in step.functions().values():
        function()
    bench.synchronize()


def measure_steps(bench: Bench, case: Case, batch: int, dtype: str, mode: str) -> dict[str, Any]:
    """Seconds of full and cached steps, their FLOPs, peak memory, and how far compiled outputs are off."""
    eager = None
    if mode != "eager":  # before compiling, which changes the model
        step = Step(case, bench.open(case, dtype), batch)
        eager = {name: function().clone() for name, function in step.functions().items()}
    model = bench.open(case, dtype, mode, batch)
    step = Step(case, model, batch, mode == "graphs")
    before = bench.compiled()
    bench.reset_peak()
    began, outputs = time.perf_counter(), {}
    for name, function in step.functions().items():
        outputs[name] = function().clone()
    bench.synchronize()
    first = time.perf_counter() - began
    if mode != "graphs":  # a graph holds the memory that it took when it was recorded
        bench.reset_peak()
    timings = {name: bench.time(function) for name, function in step.functions().items()}
    flops = {str(branch): bench.flops(case, branch) for branch in case.branches}
    result = {
        "model": case.name,
        "batch": batch,
        "dtype": dtype,
        "mode": mode,
        "seconds": {name: timing.median for name, timing in timings.items()},
        "spread": {name: timing.spread for name, timing in timings.items()},
        "calls": timings["full"].calls,
        "flops": {"full": batch * flops[str(case.branches[0])]["full"]}
        | {branch: batch * each["cached"] for branch, each in flops.items()},
        "branches": list(case.branches),
        "peak_bytes": bench.peak(),
        "first_calls_seconds": first,
        "compiled": {key: count - before[key] for key, count in bench.compiled().items()},
    }
    if not all(out.isfinite().all() for out in outputs.values()):
        raise Wrong("outputs are not finite", result)
    if result["compiled"]["skipped"]:
        raise Wrong("torch did not make CUDA graphs of all that was compiled", result)
    if eager is not None:
        result["off_eager"] = {name: difference(outputs[name], out) for name, out in eager.items()}
        if not max(result["off_eager"].values()) < TOLERANCE:
            raise Wrong(f"compiled outputs differ from eager ones by {max(result['off_eager'].values()):.1e}", result)
    return result


@torch.no_grad()
def measure_baseline(bench: Bench, case: Case, batch: int, dtype: str, mode: str) -> dict[str, Any]:
    """Seconds of the full step in our code and in others', with the same weights and inputs."""
    bench.close()
    ours, theirs = baseline_of(case, bench.device, DTYPES[dtype], 2 * batch)
    outputs = {"ours": ours.call().clone(), "theirs": theirs.call().clone()}
    off = difference(outputs["ours"], outputs["theirs"])
    if mode != "eager":
        ours.model.compile(**bench.compiling(mode))
        theirs.model.compile(**bench.compiling(mode, fullgraph=False))
    timings, peaks = {}, {}
    for name, contender in (("ours", ours), ("theirs", theirs)):
        bench.reset_peak()
        timings[name] = bench.time(contender.call)
        peaks[name] = bench.peak()
    result = {
        "model": case.name,
        "batch": batch,
        "dtype": dtype,
        "mode": mode,
        "baseline": theirs.name,
        "skips": ours.model.n_skips > 0,
        "seconds": {name: timing.median for name, timing in timings.items()},
        "spread": {name: timing.spread for name, timing in timings.items()},
        "peak_bytes": peaks,
        "difference": off,
    }
    ours.model._compiled_call_impl = theirs.model._compiled_call_impl = None
    if not off < TOLERANCE:
        raise Wrong(f"outputs differ from {theirs.name} by {off:.1e}", result)
    return result
