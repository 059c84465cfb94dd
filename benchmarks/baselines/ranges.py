"""Baselines in which a range of layers gives way to what it added in an earlier step."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from baselines.base import Baseline, Run
from baselines.modules import parts_of
from skipdit.layers.inspect import layers_run_by, replaced
from skipdit.layers.skip import SkipTransformer, skip_stack
from skipdit.utils.errors import UserError


class _Pass:
    """One pass through the layers, in which a range of them may give way to what it added in an earlier pass.

    Args:
        block, fuse: run a layer, and join a skip, as `skip_stack` calls them.
        ranges: those whose sums a full pass leaves behind.

    Attributes:
        skipping: the range that gives way, one of `ranges`; may be set until its first layer.
    """

    def __init__(self, model: SkipTransformer, run: Run, block: Callable, fuse: Callable, ranges: Sequence[range]):
        self._model, self._run, self._block, self._join, self._ranges = model, run, block, fuse, ranges
        self._begun: dict[range, Tensor] = {}
        self.skipping = range(0)

    def __call__(self, x: Tensor) -> Tensor:
        n_skips = self._model.n_skips
        out = skip_stack(x, block=self._layer, fuse=self._fuse, depth=self._model.depth, n_skips=n_skips)
        if self.skipping:
            self._run.left_out()
        return out

    def _begin(self, i: int, x: Tensor) -> None:
        for part in self._ranges:
            if i == part.start:
                self._begun.setdefault(part, x)  # a deep layer begins with its skip

    def _layer(self, i: int, x: Tensor) -> Tensor:
        if i in self.skipping:
            return x + self._run.kept[self.skipping] if i == self.skipping.start else x
        self._begin(i, x)
        x = self._block(i, x)
        for part in () if self.skipping else self._ranges:
            if i == part.stop - 1:
                self._run.kept[part] = x - self._begun.pop(part)
            if i in part and i < self._model.n_skips and self._model.depth - 1 - i not in part:
                self._run.kept["shallow", i] = x  # its deep layer runs also when it does not
        return x

    def _fuse(self, j: int, x: Tensor, shallow: Tensor) -> Tensor:
        """Skip j brings the output of layer n-1-j to layer L-n+j."""
        source, target = self._model.n_skips - 1 - j, self._model.depth - self._model.n_skips + j
        if target in self.skipping:
            return x
        self._begin(target, x)
        if source in self.skipping:
            shallow = self._run.kept["shallow", source]
        return self._join(j, x, shallow)


class _Ranges(Baseline):
    """Ranges of layers that give way at some steps."""

    @abstractmethod
    def _stack(
        self, model: SkipTransformer, run: Run, x: Tensor, *, block: Callable, fuse: Callable, **others: Any
    ) -> Tensor:
        """Runs the layers in place of `skip_stack`."""

    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        return [layers_run_by(model, partial(self._stack, model, run))]


@dataclass(frozen=True)
class DeltaDiT(_Ranges):
    """Delta-DiT (arXiv 2406.01125): early steps leave out the last layers, late ones the first.

    Attributes:
        interval: N; its multiples are full steps.
        share: of the layers that are left out, N_c / L.
        boundary: of the steps that are early, b / T.
    """

    interval: int
    share: float = 0.5
    boundary: float = 0.5

    def __str__(self) -> str:
        return f"Delta-DiT N{self.interval}-{self.share:g}"

    def _stack(self, model, run, x, *, block, fuse, **others) -> Tensor:
        count = max(1, round(self.share * model.depth))
        last, first = range(model.depth - count, model.depth), range(count)
        walk = _Pass(model, run, block, fuse, [last, first])
        if run.step % self.interval:
            walk.skipping = last if run.step < self.boundary * len(run.timesteps) else first
        return walk(x)


@dataclass(frozen=True)
class DBCache(_Ranges):
    """Dual block cache (cache-dit): all but the outer layers are left out while the first ones do much the same.

    That is, while their sum differs from that of the last full step by less than `threshold`: mean absolute difference
    over mean absolute value. With front=1 and back=0 it is first block cache (FBCache, ParaAttention).

    Attributes:
        front, back: layers that always run, F and B.
        warmup: steps that are full.
    """

    static: ClassVar[bool] = False
    threshold: float
    front: int = 1
    back: int = 0
    warmup: int = 0

    def __str__(self) -> str:
        name = "FBCache" if (self.front, self.back, self.warmup) == (1, 0, 0) else f"DBCache F{self.front}B{self.back}"
        return f"{name} {self.threshold:g}"

    def _stack(self, model, run, x, *, block, fuse, **others) -> Tensor:
        middle = range(self.front, model.depth - self.back)
        if not middle or self.front < 1:
            raise UserError(f"front {self.front} and back {self.back} leave nothing of {model.depth} layers to cache")

        def look(i: int, h: Tensor) -> Tensor:
            h = block(i, h)
            if i == self.front - 1:
                added, before = h - x, run.kept.get("added")
                similar = before is not None and relative_change(added, before) < self.threshold
                if similar and run.step >= self.warmup:
                    walk.skipping = middle
                else:
                    run.kept["added"] = added
            return h

        walk = _Pass(model, run, look, fuse, [middle])
        return walk(x)


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute difference over mean absolute value; reads the device back."""
    return ((now - before).abs().mean() / before.abs().mean()).item()


class _SameAgain(Exception):
    """Breaks off a pass in its first layer: its result will be taken from the last full one."""


@dataclass(frozen=True)
class TeaCache(_Ranges):
    """TeaCache (arXiv 2411.19108): all layers are left out until the model's input has changed enough.

    The input is that of the first attention, which the timestep has modulated. Its relative changes from step to step,
    each through a polynomial, add up since the last full step; at `threshold` the next full step is due. The first and
    the last step are full.

    Attributes:
        polynomial: coefficients, highest power first, that make the expected change of the output of that of the input;
            published ones belong to other models. The identity, unless `fit` makes others.
    """

    static: ClassVar[bool] = False
    threshold: float
    polynomial: tuple[float, ...] = (1.0, 0.0)

    def __str__(self) -> str:
        return f"TeaCache{'' if self.polynomial == (1.0, 0.0) else ' fitted'} {self.threshold:g}"

    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        first = next(part for part in parts_of(model) if part.kind == "spatial")
        original = first.owner.forward

        def attention(h: Tensor, *args) -> Tensor:
            if not self._is_due(run, h):
                raise _SameAgain
            return original(h, *args)

        return [*super()._replacements(model, run), replaced(first.owner, "forward", attention)]

    def _is_due(self, run: Run, h: Tensor) -> bool:
        """Whether this step is full; h is the modulated input."""
        before, run.kept["input"] = run.kept.get("input"), h
        ends = run.step in (0, len(run.timesteps) - 1)
        if before is not None:
            run.state["change"] = relative_change(h, before)
            run.state["sum"] += float(np.polyval(self.polynomial, run.state["change"]))
        if ends or run.state["sum"] >= self.threshold:
            run.state["sum"] = 0.0
            return True
        return False

    def _stack(self, model, run, x, *, block, fuse, **others) -> Tensor:
        try:
            return _Pass(model, run, block, fuse, [range(model.depth)])(x)
        except _SameAgain:
            run.left_out()
            return x + run.kept[range(model.depth)]

    @classmethod
    def fit(
        cls, model: SkipTransformer, timesteps: Sequence[float], sample: Callable[[], Any], degree: int = 4
    ) -> tuple[float, ...]:
        """The polynomial of a model: least squares, of the change of its output on that of its modulated input.

        Args:
            sample: makes uncached samples, of other seeds or prompts than those to compare on.
        """
        pairs: list[tuple[float, float]] = []

        @dataclass(frozen=True)
        class Recorder(cls):
            def _call(self, run: Run, forward: Callable, args: tuple, kwargs: dict) -> Any:
                out = forward(*args, **kwargs)
                tensor, before = out if isinstance(out, Tensor) else out[0], run.kept.get("output")
                if before is not None:
                    pairs.append((run.state["change"], relative_change(tensor, before)))
                run.kept["output"] = tensor
                return out

        with Recorder(threshold=float("-inf")).on(model, timesteps):
            sample()
        return tuple(np.polyfit(*np.array(pairs).T, degree).tolist())
