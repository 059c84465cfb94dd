"""A cache for any other model of diffusers, unmodified: forecasts of its output, and cached steps over its blocks.

A forecast step needs nothing of the model: its `forward` returns the forecast. A cached step needs to know what is a
block. diffusers registers the classes of blocks that its own caches work on, with the streams that they take and
return; a model whose blocks are all among them is one stack, of two lists maybe (FLUX: joint blocks, then single ones).
Refiners are no part of the stack: they prepare the image or the text for it (Z-Image). Such models have no long skips,
so what is stored is what the middle blocks added to each stream.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.utils.errors import UserError

ONLY = "only forecasts work, as in N3-1000-0-b0-o1"  # how errors end

Streams = tuple[Tensor, Tensor | None]  # hidden states, and those of the text where a block changes them, too


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return a model's blocks in the order in which it holds them, of all lists of blocks that diffusers knows; none if
    there are others beside them.
    """
    registered = _registry()
    lists = [
        child
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and "refiner" not in name
    ]
    known = [all(type(block) in registered for block in each) for each in lists]
    alike = [block for each, good in zip(lists, known, strict=True) if good for block in each]
    others = (block for each, good in zip(lists, known, strict=True) if not good for block in each)
    return [] if any(_is_block(block) for block in others) else alike


def _registry() -> dict[type, Any]:
    """The classes of blocks that diffusers knows, and what it says of them. Those before 0.35 know none."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:
        return {}
    TransformerBlockRegistry._register()
    return TransformerBlockRegistry._registry


def _is_block(module: nn.Module) -> bool:
    """Whether a module of a list may change the hidden states: projections of embeddings and the like do not."""
    return "hidden_states" in inspect.signature(module.forward).parameters


class CachedBlocks:
    """The `forward` of a model, and of its blocks, with a cache.

    Args:
        model: of diffusers.
        branch: how many blocks at either end a cached step runs; 0: there are forecasts alone, and no block is touched.

    Raises TypeError for a model whose blocks are unknown, ValueError if there are too few of them.
    """

    def __init__(self, model: nn.Module, branch: int):
        self.model, self.branch, self.cache = model, branch, None
        self.blocks = blocks_of(model) if branch else []
        name, self.forward = type(model).__name__, type(model).forward.__get__(model)
        if branch and not self.blocks:
            raise TypeError(f"the blocks of {name} are not known: {ONLY}")
        if branch and 2 * branch > len(self.blocks):
            raise UserError(f"cache branch {branch} is larger than half of the model's {len(self.blocks)} blocks")
        self._next, self._cached = 0, False  # the block whose turn it is, and whether the middle is left out
        self._start: Streams = (None, None)

    def __call__(self, *args: Any, cache: CacheStep | None = None, **kwargs: Any) -> Any:
        """What the model's own `forward` returns, with `cache`."""
        if cache is None:
            return self.forward(*args, **kwargs)
        if cache.forecast is not None:
            return cache.forecast
        if self.blocks and any("control" in name and value is not None for name, value in kwargs.items()):
            raise UserError(
                "cached steps leave out the blocks that a ControlNet adds to: use forecasts, as in N3-1000-0-b0-o1"
            )
        self.cache, self._next = cache, 0
        try:
            output = self.forward(*args, **kwargs)
        finally:
            self.cache = None
        if self._next != len(self.blocks):
            raise UserError(f"{type(self.model).__name__} ran {self._next} of its {len(self.blocks)} blocks: {ONLY}")
        return cache.finish(output)

    def block(self, i: int) -> Callable[..., Any]:
        """The `forward` of block i."""
        block = self.blocks[i]
        kind = _registry()[type(block)]
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        hidden, text = kind.hidden_states_argument_name, None
        if hidden not in names:  # ZImageTransformerBlock calls them x
            hidden = names[0]
        if kind.return_encoder_hidden_states_index is not None:
            text = kind.encoder_hidden_states_argument_name
        forward, first, last = block.forward, self.branch, len(self.blocks) - self.branch - 1

        def cached(*args: Any, **kwargs: Any) -> Any:
            cache = self.cache
            if cache is None:
                return forward(*args, **kwargs)
            if i != self._next:
                raise UserError(f"block {i} of {type(self.model).__name__} runs out of turn: {ONLY}")
            self._next = i + 1
            given = dict(zip(names, args, strict=False)) | kwargs
            streams = given[hidden], given.get(text)
            if i == first:
                self._cached, self._start = not cache.is_full(streams[0]), streams
                if self._cached:
                    return _returned(kind, _added(streams, cache.feature))
            if self._cached and first < i <= last:
                return _returned(kind, streams)
            output = forward(*args, **kwargs)
            if i == last:
                cache.kept_feature = _changes(_split(kind, output), self._start)
            return output

        return cached


def _split(kind: Any, output: Any) -> Streams:
    if kind.return_encoder_hidden_states_index is None:
        return (output if isinstance(output, Tensor) else output[kind.return_hidden_states_index]), None
    return output[kind.return_hidden_states_index], output[kind.return_encoder_hidden_states_index]


def _returned(kind: Any, streams: Streams) -> Any:
    if kind.return_encoder_hidden_states_index is None:
        return streams[0]
    return streams if kind.return_hidden_states_index == 0 else streams[::-1]


def _added(streams: Streams, changes: Streams) -> Streams:
    return tuple(x if change is None else x + change for x, change in zip(streams, changes, strict=True))


def _changes(end: Streams, start: Streams) -> Streams:
    if any(b is not None and (a is None or a.shape != b.shape) for a, b in zip(start, end, strict=True)):
        raise UserError(f"the streams change their shape between blocks: {ONLY}")
    return tuple(None if b is None else b - a for a, b in zip(start, end, strict=True))
