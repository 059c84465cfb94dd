"""A cache for any other model of diffusers, unmodified: forecasts of its output, and cached steps over its blocks.

A forecast step needs nothing of the model: its `forward` returns the forecast. A cached step needs to know what is a
block. diffusers registers the classes of blocks that its own caches work on, with the streams that they take and
return; a model whose blocks are all among them is one stack, of two lists maybe (FLUX: joint blocks, then single ones).
Lists of equal length and class take turns (Latte: spatial and temporal blocks), and a layer is one block of each.
Refiners are no part of the stack: they prepare the image or the text for it (Z-Image). What is stored of a model that
has no long skips is what the middle layers added to each stream; of one that has got some, see `pipelines.skips`, what
enters the first layer after them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.layers.skip import check_branch
from skipdit.utils.errors import UserError

ONLY = "only forecasts work, as in N3-1000-0-b0-o1"  # how errors end

Streams = tuple[Tensor, Tensor | None]  # hidden states, and those of the text where a block changes them, too


def layers_of(model: nn.Module) -> list[list[nn.Module]]:
    """Return a model's layers in the order in which they run, of all lists of blocks that diffusers knows; none if
    there are others beside them.
    """
    registered = _registry()
    lists = [
        child
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and "refiner" not in name
    ]
    known = [all(type(block) in registered for block in each) for each in lists]
    others = (block for each, good in zip(lists, known, strict=True) if not good for block in each)
    if any(_is_block(block) for block in others):
        return []
    stacks = [list(each) for each, good in zip(lists, known, strict=True) if good]
    if len({(len(stack), id(registered[type(stack[0])])) for stack in stacks}) == 1:
        return [list(layer) for layer in zip(*stacks, strict=True)]
    return [[block] for stack in stacks for block in stack]


def _registry() -> dict[type, Any]:
    """The classes of blocks that diffusers knows, and what it says of them. Those before 0.35 know none."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:
        return {}
    TransformerBlockRegistry._register()
    return TransformerBlockRegistry._registry


def register_like(kind: type[nn.Module], known: type[nn.Module]) -> None:
    """Let diffusers know a class of blocks that take and return what those of another do."""
    _registry()[kind] = _registry()[known]


def _is_block(module: nn.Module) -> bool:
    """Whether a module of a list may change the hidden states: projections of embeddings and the like do not."""
    return "hidden_states" in inspect.signature(module.forward).parameters


class BlockSignature:
    """How blocks of a class take the streams, and return them, as diffusers registers it.

    Attributes:
        hidden, text: names of the arguments; None for the text of blocks that do not return it.
    """

    def __init__(self, block: nn.Module):
        self._kind = _registry()[type(block)]
        self._names = list(inspect.signature(type(block).forward).parameters)[1:]
        hidden, text = self._kind.hidden_states_argument_name, self._kind.encoder_hidden_states_argument_name
        self.hidden = hidden if hidden in self._names else self._names[0]  # ZImageTransformerBlock calls them x
        self.text = text if self._kind.return_encoder_hidden_states_index is not None else None

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def taken(self, named: dict[str, Any]) -> Streams:
        return named[self.hidden], named.get(self.text)

    def giving(self, named: dict[str, Any], streams: Streams) -> dict[str, Any]:
        """The arguments with other streams."""
        return named | {name: x for name, x in zip((self.hidden, self.text), streams, strict=True) if name in named}

    def returned(self, streams: Streams) -> Any:
        """What a block returns that leaves the streams as they are."""
        if self.text is None:
            return streams[0]
        return streams if self._kind.return_hidden_states_index == 0 else streams[::-1]

    def hidden_of(self, output: Any) -> Tensor:
        """The hidden states in what a block returns."""
        return output if isinstance(output, Tensor) else output[self._kind.return_hidden_states_index or 0]


class CachedBlocks:
    """The `forward` of a model, and of its blocks, with a cache.

    Args:
        model: of diffusers.
        branch: how many layers at either end a cached step runs; 0: there are forecasts alone, and no block is touched.

    Raises TypeError for a model whose blocks are unknown, ValueError if there are too few of them.
    """

    def __init__(self, model: nn.Module, branch: int):
        self.model, self.cache = model, None
        name, self.forward = type(model).__name__, type(model).forward.__get__(model)
        layers = layers_of(model) if branch else []
        if branch and not layers:
            raise TypeError(f"the blocks of {name} are not known: {ONLY}")
        self._n_skips = len(getattr(model, "skips", ()))
        check_branch(branch, len(layers), self._n_skips)
        self.blocks = [block for layer in layers for block in layer]
        outer = sum(map(len, layers[:branch]))
        self._middle, self._tail = outer, len(self.blocks) - outer  # where they begin
        self._next, self._cached = 0, False  # the block whose turn it is, and whether the middle is left out
        self._start: Streams = (None, None)

    def __call__(self, *args: Any, cache: CacheStep | None = None, **kwargs: Any) -> Any:
        """What the model's own `forward` returns, with `cache`."""
        if cache is None:
            return self.forward(*args, **kwargs)
        if cache.forecast is not None:
            return cache.forecast
        if self.blocks and any("control" in name and value is not None for name, value in kwargs.items()):
            raise UserError(f"cached steps leave out the blocks that a ControlNet adds to: {ONLY}")
        self.cache, self._next, self._cached = cache, 0, False
        try:
            output = self.forward(*args, **kwargs)
        finally:
            self.cache, self._start = None, (None, None)
        if self._next != len(self.blocks):
            raise UserError(f"{type(self.model).__name__} ran {self._next} of its {len(self.blocks)} blocks: {ONLY}")
        return cache.finish(output)

    def block(self, i: int) -> Callable[..., Any]:
        """The `forward` of block i."""
        block = self.blocks[i]
        signature, forward = BlockSignature(block), type(block).forward.__get__(block)  # accelerate's wraps this one

        def cached(*args: Any, **kwargs: Any) -> Any:
            if self.cache is None:
                return forward(*args, **kwargs)
            if i != self._next:
                raise UserError(f"block {i} of {type(self.model).__name__} runs out of turn: {ONLY}")
            self._next = i + 1
            if i == self._middle < self._tail:
                self._begin_middle(signature.taken(signature.named(args, kwargs)))
            if self._cached and self._middle <= i < self._tail:
                return signature.returned(signature.taken(signature.named(args, kwargs)))
            if i == self._tail > self._middle:
                named = signature.named(args, kwargs)
                kwargs = signature.giving(named, self._end_middle(signature.taken(named)))
                args = ()
            return forward(*args, **kwargs)

        return cached

    def _begin_middle(self, streams: Streams) -> None:
        self._cached, self._start = not self.cache.is_full(streams[0]), streams

    def _end_middle(self, streams: Streams) -> Streams:
        """The streams behind the middle layers, which a full step keeps, or the change of."""
        if self._cached:
            return self.cache.feature if self._n_skips else _added(streams, self.cache.feature)
        self.cache.kept_feature = streams if self._n_skips else _changes(streams, self._start)
        return streams


def _added(streams: Streams, changes: Streams) -> Streams:
    return tuple(x if change is None else x + change for x, change in zip(streams, changes, strict=True))


def _changes(end: Streams, start: Streams) -> Streams:
    if any(b is not None and (a is None or a.shape != b.shape) for a, b in zip(start, end, strict=True)):
        raise UserError(f"the streams change their shape between blocks: {ONLY}")
    return tuple(None if b is None else b - a for a, b in zip(start, end, strict=True))
