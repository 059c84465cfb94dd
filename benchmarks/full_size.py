"""FLOPs of full-size models under every caching method, counted on the meta device; with a GPU also seconds."""

from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from rows import FEWER, UNCACHED, Row, rows_for
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from skipdit.caching.policies import CacheSpec
from skipdit.caching.runtime import SkipCache
from skipdit.layers.flops import run_flops, step_flops
from skipdit.layers.skip import SkipTransformer
from skipdit.utils.timing import interleaved_seconds


def full_size(kind: type[SkipTransformer], steps: int, timesteps: list[float], window: CacheSpec, keep: set) -> list:
    """FLOPs of the model calls of a run of the full-size model, for every row that is known before it runs.

    Counted on the meta device, guidance in one batch of two; with a GPU also seconds of these calls, in bfloat16.
    """
    table = []
    for backbone in ("skip", "plain"):
        with torch.device("meta"):
            model = kind(skip=backbone == "skip").eval()
        with torch.no_grad():
            inputs = _halves_alike(model.random_inputs(2))
        flops = step_flops(model, 2, window.branch)

        def calls(row: Row, model: SkipTransformer = model, inputs: dict = inputs) -> None:
            cache = SkipCache(row.spec, timesteps)
            with torch.no_grad(), row.baseline.on(model, timesteps) if row.baseline else nullcontext():
                for i in range(row.steps):
                    model(**inputs, cache=cache.at(i))

        def count(row: Row, calls: Callable = calls, flops: dict = flops) -> float:
            if row.baseline is None:
                return run_flops(SkipCache(row.spec, timesteps[: row.steps]), flops)
            with FlopCounterMode(display=False) as counter:
                calls(row)
            return float(counter.get_total_flops())

        rows = rows_for(backbone, model, steps, timesteps, window, flops, (), quick=False)
        rows = [
            row for row in rows if (row.baseline is None or row.baseline.static) and row.method in keep | {UNCACHED}
        ]
        if backbone == "plain":
            rows = [row for row in rows if row.method != FEWER]
        counted = {}
        for row in tqdm(rows, desc=f"full size, {backbone}", unit="row"):
            counted[row.key] = count(row)
        seconds = _seconds(kind, backbone, rows, calls) if torch.cuda.is_available() else {}
        for row in rows:
            result = {"backbone": backbone, "method": row.method, "name": row.name, "flops": counted[row.key]}
            result["flops_speedup"] = counted[rows[0].key] / counted[row.key]
            if seconds:
                result |= {"seconds": seconds[row.key], "speedup": seconds[rows[0].key] / seconds[row.key]}
            table.append(result)
    return table


def _halves_alike(inputs: dict[str, Any]) -> dict[str, Any]:
    """Guidance gives the model the same latents twice."""
    latents = next(iter(inputs))
    return inputs | {latents: torch.cat([inputs[latents][:1]] * 2)}


def _seconds(kind: type[SkipTransformer], backbone: str, rows: list[Row], calls: Callable) -> dict[str, float]:
    """Seconds of the model calls of one run, on the GPU, medians of three."""
    device = torch.device("cuda")
    with device:
        model = kind(skip=backbone == "skip").eval()
    for parameter in model.parameters():  # zeros, as which some begin, can be fast
        torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.Module.to(model, torch.bfloat16)
    with torch.no_grad():
        inputs = _halves_alike(model.random_inputs(2))
    functions = {row.key: lambda row=row: calls(row, model, inputs) for row in rows}
    return {key: median(times) for key, times in interleaved_seconds(functions, 3, device).items()}


def full_size_markdown(table: list[dict]) -> str:
    timed = "seconds" in table[0]
    lines = ["| backbone | | TFLOP | speedup in FLOPs |" + (" s | speedup |" if timed else "")]
    lines.append("|---|---|---|---|" + ("---|---|" if timed else ""))
    for row in table:
        line = f"| {row['backbone']} | {row['name']} | {row['flops'] / 1e12:.1f} | {row['flops_speedup']:.2f} |"
        lines.append(line + (f" {row['seconds']:.3f} | {row['speedup']:.2f} |" if timed else ""))
    return "\n".join(lines)
