"""Baselines whose modules compute, reuse or extrapolate their outputs."""

import re
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from baselines.base import Baseline, Run
from skipdit.class_to_video import Latte
from skipdit.layers.inspect import replaced
from skipdit.layers.skip import SkipTransformer
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


class _Reuse(Baseline):
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
class TaylorSeer(Baseline):
    """TaylorSeer (arXiv 2503.06923): modules extrapolate their outputs by a Taylor polynomial.

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
