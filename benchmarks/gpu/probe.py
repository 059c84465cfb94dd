"""The card's own limits, as measured: what a large matrix product and a large copy reach."""

from typing import Any

import torch

from gpu.bench import DTYPES, Bench, tf32
from gpu.plan import Row

SIDE = 8192  # of the matrices
COPY = 2**31  # bytes that are copied
SECTION = "probe"


def rows() -> list[Row]:
    return [Row(SECTION, "rates", measure_rates, 5)]


def measure_rates(bench: Bench) -> dict[str, Any]:
    """FLOP/s of products of square matrices of random numbers, and bytes per second of a copy, read and written."""
    bench.close()
    side, size = (256, 2**22) if bench.tiny else (SIDE, COPY)
    result: dict[str, Any] = {"side": side, "copy_bytes": size, "flops_per_second": {}}
    for name in ("bf16", "fp16", "tf32", "fp32"):
        a, b = (torch.randn(side, side, device=bench.device, dtype=DTYPES.get(name, torch.float32)) for _ in range(2))
        out = torch.empty_like(a)
        with tf32(name == "tf32"):
            timing = bench.time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), last=0.3)
        result["flops_per_second"][name] = 2 * side**3 / timing.median
        result.setdefault("spread", {})[name] = timing.spread
        del a, b, out
    source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    result["copy_bytes_per_second"] = 2 * size / bench.time(lambda: target.copy_(source), last=0.3).median
    return result
