"""What one model call sees of the cache, and what it leaves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Tree = Any  # a tensor, or what a model returns: tuples, lists and output classes that have tensors in them


def map_tensors(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Apply a function to the floating-point tensors of trees that are built alike; the rest is that of the last."""

    def leaf(*leaves: Any) -> Any:
        last = leaves[-1]
        return function(*leaves) if isinstance(last, Tensor) and last.is_floating_point() else last

    if isinstance(trees[-1], Tensor):
        return leaf(*trees)
    if type(trees[-1]) is tuple:  # the usual ones; torch's own way takes ten times as long
        return tuple(map_tensors(function, *parts) for parts in zip(*trees, strict=True))
    return tree_map(leaf, *trees)


def tensors_of(tree: Tree) -> list[Tensor]:
    """The tensors of a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list):
        return [x for part in tree for x in tensors_of(part)]
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class CacheStep:
    """The cache of one model call: a mailbox, so that it compiles.

    Attributes:
        branch: b, how many outer layers a cached pass runs.
        feature: the input of layer L-b to use instead of the middle layers; None makes the pass a full one.
        forecast: what the whole model returns without running anything; None on other steps.
        correction: (gain, rest), float32, which make the call return gain * output + rest; None returns the output.
        kept_feature: set by a full pass to its own input of layer L-b.
        kept_output: set by a pass that runs to what it returns, uncorrected.
        memory: what a full pass leaves for later steps of its stream besides; see `CachePolicy.step`.
    """

    __slots__ = ("branch", "correction", "feature", "forecast", "kept_feature", "kept_output", "memory")

    def __init__(self, branch: int, feature: Tree | None):
        self.branch = branch
        self.feature = feature
        self.forecast: Tree | None = None
        self.correction: tuple[Tensor, Tree] | None = None
        self.kept_feature: Tree | None = None
        self.kept_output: Tree | None = None
        self.memory: Tensor | None = None

    @property
    def may_be_full(self) -> bool:
        """Whether the middle layers may run, as far as is known before the call."""
        return self.feature is None and self.forecast is None

    def is_full(self, shallow: Tensor) -> bool:
        """Whether the middle layers run. `shallow` is the output of the first `branch` layers."""
        return self.feature is None

    def finish(self, output: Tree) -> Tree:
        """Keep the model's output, and return what the call returns."""
        self.kept_output = output
        if self.correction is None:
            return output
        gain, rest = self.correction
        return map_tensors(lambda rest, out: torch.addcmul(rest, out.float(), gain).to(out.dtype), rest, output)


class DriftStep(CacheStep):
    """A call that decides by itself, from how far its shallow feature has moved; it waits for the device.

    Attributes:
        before: the shallow feature of the last full step; `memory` is that of this one.
        threshold: see `DriftSpec`.
        on_full: called if it is a full one.
    """

    __slots__ = ("before", "on_full", "threshold")

    def __init__(
        self,
        branch: int,
        feature: Tensor | None,
        before: Tensor | None,
        threshold: float,
        on_full: Callable[[], None],
    ):
        super().__init__(branch, feature)
        self.before, self.threshold, self.on_full = before, threshold, on_full

    @property
    def may_be_full(self) -> bool:
        return True

    def is_full(self, shallow: Tensor) -> bool:
        full = self.feature is None
        if not full:
            dtype = torch.promote_types(shallow.dtype, torch.float32)  # float16 overflows in a norm
            moved, norm = (torch.linalg.vector_norm(x, dtype=dtype) for x in (shallow - self.before, self.before))
            full = (moved / norm).item() > self.threshold
        if full:
            self.memory = shallow
            self.on_full()
        return full
