"""What the model calls of a run cost: their time and, where that is asked for, their FLOPs."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from skipdit.caching.policy import CACHED, FORECAST, FULL, NAMES
from skipdit.caching.steps import CacheStep, Tree, tensors_of


class Call:
    """A call of a model, which begins now.

    Args:
        inputs: what it gets; it runs on their device.

    Attributes:
        stream: name of its stream.
        kind: "full", "cached" or "forecast", of its step.
        flops: None if they are not counted.
    """

    __slots__ = ("_began", "_device", "_ended", "flops", "kind", "stream")

    def __init__(self, inputs: Tree):
        self._device = next((x.device for x in tensors_of(inputs)), torch.device("cpu"))
        self.stream, self.kind, self.flops = "", NAMES[FULL], None
        self._began, self._ended = _now(self._device), None

    def end(self, step: CacheStep | None) -> None:
        """End it. `step` is the cache that it had."""
        self._ended = _now(self._device)
        if step is None:
            return
        if step.forecast is not None:
            self.kind = NAMES[FORECAST]
        elif step.feature is not None and step.kept_feature is None:
            self.kind = NAMES[CACHED]

    def seconds(self) -> float | None:
        """How long it took on its device; None if that is unknown. Waits for a GPU."""
        if self._began is None or self._ended is None:
            return None
        if isinstance(self._began, float):
            return self._ended - self._began
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1000


class Costs:
    """What the calls of the newest run cost.

    Attributes:
        calls: in order.
        counter: counts the FLOPs of calls; None while they are not counted.
    """

    def __init__(self):
        self.calls: list[Call] = []
        self.counter: FlopCounterMode | None = None
        self._open: tuple[Call, CacheStep | None] | None = None

    def begin(self, call: Call, step: CacheStep | None) -> None:
        """A call of the run begins, with this cache."""
        self._open = call, step
        if self.counter is not None:
            call.flops = -self.counter.get_total_flops()

    def end(self) -> None:
        """A call ends, of the run or of none."""
        if self._open is None:
            return
        (call, step), self._open = self._open, None
        call.end(step)
        if call.flops is not None and self.counter is not None:
            call.flops += self.counter.get_total_flops()
        self.calls.append(call)

    def forget(self) -> None:
        """A call that has begun will not end: its run broke off."""
        self._open = None

    def seconds(self) -> float | None:
        """Time within the calls; None if it is unknown."""
        return _total([call.seconds() for call in self.calls])

    def seconds_saved(self) -> float | None:
        """Time that cached and forecast calls saved, an estimate: each could have been the median full call of its
        stream.
        """
        return self._saved(Call.seconds)

    def flops_saved(self) -> float | None:
        """Share of the FLOPs that cached and forecast calls saved; None if they were not counted."""
        spent, saved = _total([call.flops for call in self.calls]), self._saved(lambda call: call.flops)
        return None if saved is None or not spent else saved / (spent + saved)

    def _saved(self, cost: Callable[[Call], float | None]) -> float | None:
        full: dict[str, list[float]] = {}
        saved = 0.0
        for call in self.calls:
            if (spent := cost(call)) is None:
                return None
            if call.kind == NAMES[FULL]:
                full.setdefault(call.stream, []).append(spent)
            else:
                saved -= spent
        usual = {stream: statistics.median_low(costs) for stream, costs in full.items()}  # a first call may be slow
        return saved + sum(usual[call.stream] for call in self.calls if call.kind != NAMES[FULL])


def _total(costs: list[float | None]) -> float | None:
    return None if not costs or None in costs else sum(costs)


def _now(device: torch.device) -> torch.cuda.Event | float | None:
    """The present on a device, without waiting for it: an event of a GPU, seconds of a CPU, None on others."""
    if device.type == "cpu":
        return time.perf_counter()
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # there is no time within a CUDA graph
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
