"""Caching methods that people use instead of Skip-Cache, for the four backbones, plain or with skips.

    with FORA(interval=2).on(model, timesteps) as run:
        ...                      # sample as ever, any number of batches; every model call is one step
    run.full, run.partial        # calls of the model that ran all of it, and that left something out

A model is what it was after the context, and every run of `len(timesteps)` calls begins with nothing stored. What a
method saves of a step depends on the method; count FLOPs to see it. At interval 1 or threshold 0 all of them leave the
model's output as it is, to the bit.

Two mechanisms. Modules: attention, cross-attention and MLP compute, reuse or forecast their output (FORA, PAB, T-GATE,
TaylorSeer). Ranges: layers a .. e-1 give way to adding what they added in the last full step (Delta-DiT, FBCache,
DBCache, TeaCache); with long skips, the fuse modules of these layers are left out with them, and layers outside of the
range get the shallow features of the last full step where the shallow layer is in it. A layer is a pair of blocks in
the two Lattes.

What libraries have of these, tried with diffusers 0.42.1 and cache-dit 1.5.3:

- diffusers' `TaylorSeerCacheConfig` hooks any module, and is what `TaylorSeer` uses here.
- Its `apply_pyramid_attention_broadcast` passes over all attention that is not of diffusers' own classes, ours too,
  without a word. `PAB` is tested against its hook.
- Its `apply_first_block_cache` is right for plain DiT and HunyuanDiT, once their block classes are registered; on the
  Lattes a cached step would add the embedding of frames twice, which lies between two blocks, and with skips it would
  run the fuse modules on layers that were left out. `DBCache` is tested against it where it is right.
- cache-dit calls all blocks with the arguments of the first. On plain DiT it gives what `DBCache` gives, to the bit, as
  long as no modulations are computed ahead, which the samplers do; HunyuanDiT and the Lattes, whose blocks have keys
  and values or axes of their own, come out wrong without a word, even at full steps.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from skipdit.class_to_video import Latte
from skipdit.layers.inspect import layers_run_by, replaced
from skipdit.layers.skip import SkipTransformer, skip_stack
from skipdit.utils.errors import UserError

PARTS = {"attn": "spatial", "attn1": "spatial", "attn2": "cross", "mlp": "mlp", "ff": "mlp"}  # attributes of blocks


class Part(NamedTuple):
    """A module of a block, as the method by which its block calls it."""

    kind: str  # spatial (attention within a picture or frame), temporal, cross, mlp
    owner: nn.Module
    method: str


def parts_of(model: SkipTransformer) -> list[Part]:
    """The attention, cross-attention and MLP modules of all blocks."""
    parts = []
    for name, block in model.named_modules():
        if not (match := re.fullmatch(r"(\w*blocks)\.(\d+)", name)):
            continue
        temporal = match[1].startswith("temporal") or (isinstance(model, Latte) and int(match[2]) % 2 == 1)
        for attribute, kind in PARTS.items():
            if (module := getattr(block, attribute, None)) is None:
                continue
            # LatteT2V's cross-attention takes keys and values that were computed before, by a method of its own
            method = "attend" if kind == "cross" and hasattr(module, "attend") else "forward"
            parts.append(Part("temporal" if temporal and kind == "spatial" else kind, module, method))
    return parts


class Run:
    """What a peer does while its context lasts.

    Attributes:
        timesteps: of a run, in sampling order.
        step: index of the model call that runs now, or ran last.
        full, partial: calls so far that computed everything, and those that left something out.
        kept: tensors from earlier steps of this run.
        state: numbers from earlier steps of this run.
        setup: what the peer prepared for all runs.
        peak_bytes: the most memory that what was kept took.
    """

    def __init__(self, timesteps: Sequence[float]):
        self.timesteps = list(timesteps)
        self.step, self.full, self.partial, self.peak_bytes = -1, 0, 0, 0
        self.kept: dict[Any, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.setup: dict[str, Any] = {}
        self._left_out, self._rows = False, 0

    def left_out(self) -> None:
        """This call does not compute everything."""
        self._left_out = True

    def _begin(self, rows: int) -> None:
        self.step = (self.step + 1) % len(self.timesteps)
        if self.step == 0:
            self._forget()
            self._rows = rows
        if rows != self._rows:
            raise UserError(
                f"the model is called with {rows} rows at step {self.step}, and was with {self._rows} before: peers "
                "need guidance at all steps or none (guidance_low=0, guidance_high=1000)"
            )

    def _end(self, bytes_elsewhere: int) -> None:
        self.full, self.partial = self.full + (not self._left_out), self.partial + self._left_out
        self._left_out = False
        self.peak_bytes = max(self.peak_bytes, sum(tensor.nbytes for tensor in self.kept.values()) + bytes_elsewhere)
        if self.step == len(self.timesteps) - 1:
            self._forget()

    def _forget(self) -> None:
        self.kept.clear()
        self.state.clear()

    def _abandon(self) -> None:
        """A call broke off: the next one begins a new run."""
        self.step, self._left_out = -1, False
        self._forget()


@dataclass(frozen=True)
class Peer(ABC):
    """A caching method with its settings.

    Attributes:
        static: whether what a step leaves out is known before the run; the others measure, and decide per batch.
    """

    static: ClassVar[bool] = True

    @contextmanager
    def on(self, model: SkipTransformer, timesteps: Sequence[float]) -> Iterator[Run]:
        """Sample with this method while the context lasts.

        Args:
            model: in eval mode, not compiled; called once per step.
            timesteps: of every run, in sampling order.

        Raises ValueError if the model is compiled or does not fit the settings; in its calls, if Skip-Cache is on, too.
        """
        if model._compiled_call_impl is not None:
            raise UserError("peers replace parts of the model, and this one is compiled: set compile=none")
        run, original = Run(timesteps), model.forward

        @wraps(original)
        def forward(*args, **kwargs):
            if kwargs.get("cache") is not None:
                raise UserError(f"{self} is on, and so is Skip-Cache: set cache=none")
            try:
                run._begin(len(args[0] if args else kwargs.get("x", kwargs.get("hidden_states"))))
                out = self._call(run, original, args, kwargs)
                run._end(self._bytes_elsewhere(run))
            except BaseException:
                run._abandon()
                raise
            return out

        with ExitStack() as stack:
            for replacement in (*self._replacements(model, run), replaced(model, "forward", forward)):
                stack.enter_context(replacement)
            stack.callback(run._forget)
            yield run

    @abstractmethod
    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        """Contexts in which parts of the model do something else."""

    def _call(self, run: Run, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """The model call of a step."""
        return forward(*args, **kwargs)

    def _bytes_elsewhere(self, run: Run) -> int:
        """Memory of what is kept, but not in `run.kept`."""
        return 0


class _Reuse(Peer):
    """Modules that compute at some steps, and give the same output again at the others."""

    @abstractmethod
    def _computes(self, kind: str, run: Run) -> bool | None:
        """Whether modules of this kind compute now; None if this method leaves the kind alone."""

    def _keep(self, kind: str, run: Run, output: Tensor) -> Tensor:
        """What is kept of an output (N, ..., D)."""
        return output

    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        def call(key: int, part: Part, original: Callable, *args, **kwargs) -> Tensor:
            computes = self._computes(part.kind, run)
            if computes is None:
                return original(*args, **kwargs)
            if not computes and key in run.kept:
                run.left_out()
                return run.kept[key]
            output = original(*args, **kwargs)
            run.kept[key] = self._keep(part.kind, run, output)
            return output

        return [
            replaced(part.owner, part.method, partial(call, key, part, getattr(part.owner, part.method)))
            for key, part in enumerate(parts_of(model))
        ]


@dataclass(frozen=True)
class FORA(_Reuse):
    """Fast-forward caching (arXiv 2407.01425): attention and MLP outputs of every N-th step serve N steps.

    Cross-attention likewise.
    """

    interval: int

    def __str__(self) -> str:
        return f"FORA N{self.interval}"

    def _computes(self, kind: str, run: Run) -> bool:
        return run.step % self.interval == 0


@dataclass(frozen=True)
class PAB(_Reuse):
    """Pyramid attention broadcast (arXiv 2408.12588): each kind of attention has its own interval.

    Attributes:
        spatial, temporal, cross: intervals.
        low, high: timesteps between which outputs are reused; diffusers' default.
    """

    spatial: int
    temporal: int
    cross: int
    low: int = 100
    high: int = 800

    def __str__(self) -> str:
        return f"PAB {self.spatial}-{self.temporal}-{self.cross}"

    def _computes(self, kind: str, run: Run) -> bool | None:
        if kind == "mlp":
            return None
        inside = self.low < run.timesteps[run.step] < self.high
        return not inside or run.step % getattr(self, kind) == 0


@dataclass(frozen=True)
class TGate(_Reuse):
    """T-GATE (arXiv 2404.02747): cross-attention is computed for the first steps only.

    From step `gate` on, its outputs of the step before serve to the end, averaged over the two halves of guidance, and
    there is no guidance any more: the two halves would hardly differ. So one half runs, and stands for both; the
    conditional one, which matters where the text also reaches the model by another way (Hunyuan-DiT).

    Attributes:
        gate: number of steps with cross-attention, m; that of the run or more changes nothing.
        interval: before the gate, self-attention is computed at multiples of it only; 1: always.
        warmup: steps before self-attention is reused.
    """

    gate: int
    interval: int = 1
    warmup: int = 2

    def __str__(self) -> str:
        return f"T-GATE m{self.gate}-k{self.interval}"

    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        if not any(part.kind == "cross" for part in parts_of(model)):
            raise UserError(f"{type(model).__name__} has no cross-attention for T-GATE to cache")
        return super()._replacements(model, run)

    def _computes(self, kind: str, run: Run) -> bool | None:
        if kind == "mlp" or (kind != "cross" and run.step >= self.gate):
            return None
        if kind == "cross":
            return run.step < self.gate
        return run.step <= self.warmup or run.step == self.gate - 1 or run.step % self.interval == 0

    def _keep(self, kind: str, run: Run, output: Tensor) -> Tensor:
        return output.unflatten(0, (2, -1)).mean(0) if kind == "cross" and run.state["guided"] else output

    def _call(self, run: Run, forward: Callable, args: tuple, kwargs: dict) -> Any:
        latents = args[0] if args else kwargs["hidden_states"]
        rows = len(latents)
        if run.step == 0:  # with guidance, the batch is the same latents twice
            run.state["guided"] = rows % 2 == 0 and (latents.is_meta or torch.equal(*latents.chunk(2)))
        if run.step < self.gate or not run.state["guided"]:
            return forward(*args, **kwargs)

        def second_half(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return value[rows // 2 :] if batched else value

        halved = {k: v if k == "image_rotary_emb" else tree_map(second_half, v) for k, v in kwargs.items()}
        out = forward(*tree_map(second_half, args), **halved)
        run.left_out()
        return tree_map(lambda half: torch.cat([half, half]), out)


@dataclass(frozen=True)
class TaylorSeer(Peer):
    """TaylorSeer (arXiv 2503.06923): modules forecast their outputs by a Taylor polynomial.

    Derivatives are finite differences of the outputs of full steps, which are multiples of `interval`. By diffusers'
    hook, which keeps the coefficients in the dtype of the model here.
    """

    interval: int
    order: int = 1

    def __str__(self) -> str:
        return f"TaylorSeer N{self.interval}-o{self.order}"

    def _replacements(self, model: SkipTransformer, run: Run) -> list[AbstractContextManager]:
        parts = parts_of(model)
        run.setup = {"functions": [getattr(part.owner, part.method) for part in parts], "dtype": model.dtype}
        return [
            replaced(
                part.owner, part.method, lambda *args, key=key, **kwargs: run.state["hooked"][key](*args, **kwargs)
            )
            for key, part in enumerate(parts)
        ]

    def _call(self, run: Run, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if run.step == 0:
            run.state["hooked"] = self._hooked(run)
        with run.state["hooked"].cache_context("run"):
            out = forward(*args, **kwargs)
        if run.step % self.interval:
            run.left_out()
        return out

    def _hooked(self, run: Run) -> nn.ModuleList:
        """The parts of the model as modules, under diffusers' hook."""
        from diffusers import CacheMixin, TaylorSeerCacheConfig  # not in old versions

        class Parts(CacheMixin, nn.ModuleList):
            pass

        class Call(nn.Module):
            def __init__(self, function: Callable):
                super().__init__()
                vars(self)["function"] = function
                self.bytes = 0

            def forward(self, *args, **kwargs) -> Tensor:
                output = self.function(*args, **kwargs)
                self.bytes = output.nbytes
                return output

        parts = Parts(Call(function) for function in run.setup["functions"])
        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=-1,  # no warm-up: computed are steps 0, N, 2N ...
            max_order=self.order,
            taylor_factors_dtype=run.setup["dtype"],
            cache_identifiers=[r"\d+"],
        )
        parts.enable_cache(config)
        return parts

    def _bytes_elsewhere(self, run: Run) -> int:
        terms = min(self.order, run.step // self.interval) + 1
        return terms * sum(call.bytes for call in run.state["hooked"])


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


class _Ranges(Peer):
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
