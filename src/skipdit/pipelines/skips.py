"""Long skips for plain models of diffusers.

    model = PixArtTransformer2DModel.from_pretrained(folder)
    add_long_skips(model)                                    # computes what it did, to the bit
    set_trainable(model, {"skips.*": True, "*": False})      # stage 1: the skips alone
    ...
    torch.save(model.skips.state_dict(), "skips.pt")         # into `add_long_skips(model).skips` of a later day

A block that a skip leaves keeps what it returns, and the block that the skip enters joins that into its hidden states;
both get a subclass of their class for that, of the same name, which diffusers' own registry knows as well.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from skipdit.layers.skip import make_skips
from skipdit.pipelines.blocks import BlockSignature, layers_of, register_like
from skipdit.utils.errors import UserError


def add_long_skips(model: nn.Module, n_skips: int | None = None, dim: int | None = None) -> nn.Module:
    """Join block i of a diffusers transformer to block L-1-i by a long skip, in place, for i below `n_skips`.

    The skips start at zero, so the model computes what it did: train them first, then everything. They are
    `model.skips`, as in the models of this package, and the trainer's functions and `enable_cache` go by that: cached
    steps then store what enters the last blocks, and the skips bring what is fresh. Where lists of blocks take turns
    (Latte), those of the first list are joined.

    Args:
        model: with blocks that diffusers registers for its own caches; see docs/pipelines.md.
        n_skips: at most and by default half of the layers.
        dim: width of the hidden states; by default what the model's config says.

    Returns:
        The model.

    Raises TypeError for a model whose blocks are unknown, ValueError for one that has skips or a cache already, or too
    many skips.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"skips join the blocks of a model, not of a {type(model).__name__}: give pipe.transformer")
    if "_skip_cache" in vars(model):
        raise UserError("the model has a cache, which would leave the skips out: call disable_cache(pipe) first")
    name, blocks = type(model).__name__, [layer[0] for layer in layers_of(model)]
    if not blocks:
        raise TypeError(f"the blocks of {name} are not known to diffusers' registry, so skips cannot join them")
    if hasattr(model, "skips"):
        raise UserError(f"{name} has long skips already")
    n_skips = len(blocks) // 2 if n_skips is None else n_skips
    if not 1 <= n_skips <= len(blocks) // 2:
        raise UserError(f"n_skips is {n_skips}; {name} has {len(blocks)} layers, so it takes 1 to {len(blocks) // 2}")
    like = next(blocks[0].parameters())
    model.skips = make_skips(dim or _width(model), n_skips, fuse="residual").to(like.device, like.dtype)
    shallow = Shallow()
    for i in range(n_skips):
        _join(blocks[i], leaves=Leaving(i, shallow))
        _join(blocks[-1 - i], enters=Entering(model.skips[n_skips - 1 - i], i, shallow))
    return model


class Shallow(dict[int, Tensor]):
    """What skips have taken in the newest forward pass, by their number, outermost first. A copy of a model begins
    without.

    Attributes:
        marks: some values of what they joined that into.
    """

    def __init__(self):
        super().__init__()
        self.marks: dict[int, Tensor] = {}

    def check(self, number: int, hidden: Tensor) -> None:
        """Raise RuntimeError if a checkpointed block runs once more for another forward pass than the newest."""
        mark = hidden.detach().flatten()[:: max(hidden.numel() // 64, 1)]
        if number not in self.marks:
            self.marks[number] = mark.clone()
        elif not torch.allclose(mark, self.marks[number], rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                "with gradient checkpointing, long skips know the newest forward pass only: call backward() before "
                "the next forward pass, or turn gradient checkpointing off"
            )

    def __reduce__(self) -> tuple:
        return Shallow, ()


class Leaving:
    """Where a skip leaves a block."""

    def __init__(self, number: int, shallow: Shallow):
        self.number, self.shallow = number, shallow

    def keep(self, hidden: Tensor) -> None:
        if not torch.compiler.is_compiling():
            if self.number in self.shallow and torch._C._current_graph_task_id() != -1:
                return  # of a checkpointed block, in the backward pass: it was kept in the forward pass
            self.shallow.marks.pop(self.number, None)
        self.shallow[self.number] = hidden


class Entering:
    """Where it enters another. (No module: the skip is one of the model, and not of the block.)"""

    def __init__(self, skip: nn.Module, number: int, shallow: Shallow):
        self.skip, self.number, self.shallow = skip, number, shallow

    def joined(self, hidden: Tensor) -> Tensor:
        # With gradients, a checkpointed block runs once more in the backward pass.
        taken = self.shallow[self.number] if torch.is_grad_enabled() else self.shallow.pop(self.number)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.shallow.check(self.number, hidden)
        if taken.shape != hidden.shape:
            raise UserError(
                f"long skip {self.number} brings hidden states of shape {tuple(taken.shape)} to a block that takes "
                f"{tuple(hidden.shape)}: skips cannot join the blocks of this model"
            )
        return self.skip(hidden, taken)


def _join(block: nn.Module, leaves: Leaving | None = None, enters: Entering | None = None) -> None:
    block.__class__ = _joined(type(block))
    block._leaves, block._enters, block._signature = leaves, enters, BlockSignature(block)


@functools.cache
def _joined(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of blocks, of the same name, whose blocks a skip leaves or enters."""

    own = kind.forward

    @functools.wraps(own)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature: BlockSignature = self._signature
        if self._enters is not None:
            named = signature.named(args, kwargs)
            hidden, text = signature.taken(named)
            args, kwargs = (), signature.giving(named, (self._enters.joined(hidden), text))
        output = own(self, *args, **kwargs)
        if self._leaves is not None:
            self._leaves.keep(signature.hidden_of(output))
        return output

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    joined = type(kind.__name__, (kind,), named | {"forward": forward})
    register_like(joined, kind)
    return joined


def _width(model: nn.Module) -> int:
    config = model.config
    if "num_attention_heads" in config and "attention_head_dim" in config:
        return config.num_attention_heads * config.attention_head_dim
    if "dim" in config:
        return config.dim
    raise UserError(f"the config of {type(model).__name__} does not say how wide its hidden states are: give dim")
