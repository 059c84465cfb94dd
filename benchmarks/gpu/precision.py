"""float16, bfloat16 and TF32 against float32: one call of each full-size model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu.bench import DTYPES, Bench, difference, tf32
from gpu.models import Case
from gpu.plan import Row

SECTION = "precision"


def row(case: Case, seconds: float) -> Row:
    return Row(SECTION, case.name, partial(measure_precision, case=case), seconds)


@torch.no_grad()
def measure_precision(bench: Bench, case: Case) -> dict[str, Any]:
    """Relative errors of the output, ||x - ref|| / ||ref||, whether it is finite, and the size of the residual stream.

    The same weights and inputs, rounded, for one sample with guidance. The reference is float32 with TF32 off.
    """
    bench.close()
    model = bench.open(case, "fp32")
    torch.manual_seed(1)
    inputs = model.random_inputs(2) if case.has_classes else model.random_inputs(2, encoded=False)
    result: dict[str, Any] = {"model": case.name, "weights": "random", "errors": {}, "finite": {}, "stream": {}}
    reference: Tensor | None = None
    for name in ("fp32", "tf32", "bf16", "fp16"):
        dtype = DTYPES.get(name, torch.float32)
        other = model if dtype == torch.float32 else nn.Module.to(copy.deepcopy(model), dtype=dtype)
        with tf32(name == "tf32"), watched(other) as sizes:
            out = other(**rounded(inputs, dtype))
        out = (out if isinstance(out, Tensor) else out[0]).float()
        result["finite"][name] = bool(out.isfinite().all())
        result["stream"][name] = {key: torch.stack(values).max().item() for key, values in sizes.items()}
        if reference is None:
            reference = out
            result["output_rms"] = out.square().mean().sqrt().item()
        else:
            result["errors"][name] = difference(out, reference)
        del other, out
        bench.collect()
    return result


def rounded(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a model with its latents and texts in a dtype. Rotary tables, a tuple, stay in float32."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the largest magnitude and the root mean square of what every block puts out, on the device."""
    sizes: dict[str, list[Tensor]] = {"largest": [], "rms": []}

    def look(module: nn.Module, inputs: tuple, out: Tensor) -> None:
        sizes["largest"].append(out.abs().max().float())
        sizes["rms"].append(out.float().square().mean().sqrt())

    kinds = model._no_split_modules  # the classes of the blocks
    hooks = [m.register_forward_hook(look) for m in model.modules() if type(m).__name__ in kinds]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
