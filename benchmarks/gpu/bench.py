"""One model in memory, its compiled forms, and a stopwatch."""

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from gpu.models import Case, build
from skipdit.layers.flops import step_flops
from skipdit.utils.device import set_tf32

MODES = ("eager", "compiled", "graphs")  # graphs: CUDA graphs, torch.compile's "reduce-overhead"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP = 4  # calls: a CUDA graph is compiled in the first, recorded in the second


def form_of(case: Case, batch: int, dtype: str, mode: str) -> str:
    """A name for a compiled model and the batch that it was compiled for; empty for an eager one, which takes any."""
    return "" if mode == "eager" else f"{case.name} | {batch} | {dtype} | {mode}"


class Timing(NamedTuple):
    """Seconds of repeated calls: their median, and the distance of the quartiles over it."""

    median: float
    spread: float
    calls: int


class Bench:
    """What rows measure with. Only one model is in memory at a time.

    Args:
        device: of all models.
        tiny: small models, to see that everything runs.

    Attributes:
        form: of the model in memory, as `form_of` names it.
        training_batch: images of a training step, for as long as no row finds that they do not fit.
    """

    def __init__(self, device: torch.device, tiny: bool = False):
        self.device, self.tiny = device, tiny
        self.cuda = device.type == "cuda"
        self._model: nn.Module | None = None
        self._key: tuple = ()
        self.form = ""
        self._flops: dict[tuple, dict[str, float]] = {}
        self.training_batch = 4 if tiny else 64
        set_tf32(False)  # here, so that child processes compile under the same settings, and for the same cache

    def open(self, case: Case, dtype: str, mode: str = "eager", batch: int = 0, skip: bool = True) -> nn.Module:
        """A model in eval mode, in one of `MODES`. What was asked for last stays as it is, compiled code included.

        Args:
            batch: that a compiled model will get; each has a compiled form of its own, as in a sampling run.
            skip: with long skips.
        """
        key, form = (case.name, dtype, skip), form_of(case, batch, dtype, mode)
        if key != self._key:
            self.close()
            self._model, self._key = build(case, self.device, DTYPES[dtype], skip), key
        if form != self.form:
            self.forget_compiled()
            if form:
                self._model.compile(**self.compiling(mode))
            self.form = form
        return self._model

    def compiling(self, mode: str, fullgraph: bool = True) -> dict[str, Any]:
        """Arguments of `torch.compile`. On a CPU, graphs are traced and not compiled further, which takes minutes."""
        if not self.cuda:
            return {"fullgraph": fullgraph, "backend": "eager"}
        return {"fullgraph": fullgraph} | ({"mode": "reduce-overhead"} if mode == "graphs" else {})

    def forget_compiled(self) -> None:
        """Drop compiled code, and the memory of its CUDA graphs."""
        if self._model is not None:
            self._model._compiled_call_impl = None
        self.form = ""
        torch._dynamo.reset()
        self.collect()

    def close(self) -> None:
        """Drop the model."""
        if self._model is not None:
            self._model._compiled_call_impl = None
        self._model, self._key, self.form = None, (), ""
        torch._dynamo.reset()
        self.collect()

    def collect(self) -> None:
        """Give freed memory back to the device."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def flops(self, case: Case, branch: int, skip: bool = True) -> dict[str, float]:
        """FLOPs of one full and one cached step for one sample, guidance included."""
        key = (case.name, branch, skip)
        if key not in self._flops:
            with torch.device("meta"):
                model = case.make(skip)
            self._flops[key] = step_flops(model, 2, branch)
        return self._flops[key]

    def compiled(self) -> dict[str, int]:
        """How many graphs were compiled so far, and how many of them could not become CUDA graphs."""
        counters = torch._dynamo.utils.counters
        return {"graphs": counters["stats"]["unique_graphs"], "skipped": counters["inductor"]["cudagraph_skips"]}

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes of tensors at their most since `reset_peak`; None on a CPU, which does not count them."""
        return torch.cuda.max_memory_allocated() if self.cuda else None

    def seconds(self, function: Callable[[], object]) -> float:
        """Wall-clock seconds of one call, to its end on the device."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def time(self, function: Callable[[], object], warm_up: int = WARM_UP, last: float = 0.8) -> Timing:
        """Median time of a call, of calls without a break: as in a sampling run, the host may run ahead.

        Args:
            warm_up: calls before.
            last: seconds that the calls take together; at least 5 and at most 60 are made.
        """
        for _ in range(warm_up):
            function()
        once = self.seconds(function)
        calls = 3 if self.tiny else min(60, max(5, int(last / max(once, 1e-6))))
        times = self._events(function, calls) if self.cuda else [self.seconds(function) for _ in range(calls)]
        lower, median, upper = statistics.quantiles(times, n=4)
        return Timing(median, (upper - lower) / median, calls)

    def _events(self, function: Callable[[], object], calls: int) -> list[float]:
        """Seconds between CUDA events before and after each call."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        self.synchronize()
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether matrix products in float32 may run in TF32; afterwards they may not."""
    set_tf32(on)
    try:
        yield
    finally:
        set_tf32(False)


def difference(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||, in float64; not a number if `out` is not finite."""
    out, reference = out.double(), reference.double()
    return (torch.linalg.vector_norm(out - reference) / torch.linalg.vector_norm(reference)).item()
