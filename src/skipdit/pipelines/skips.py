"""Long skips for plain models of diffusers.

    model = PixArtTransformer2DModel.from_pretrained(folder)
    add_long_skips(model)                                    # computes what it did, to the bit
    set_trainable(model, {"skips.*": True, "*": False})      # stage 1: the skips alone
    ...
    model.save_pretrained("with-skips")
    model = with_long_skips(PixArtTransformer2DModel).from_pretrained("with-skips")

A block that a skip leaves keeps what it returns, and the block that the skip enters joins that into its hidden states;
both get a subclass of their class for that, of the same name, which diffusers' own registry knows as well.
"""

import functools
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from skipdit.layers.skip import make_skips
from skipdit.pipelines.blocks import BlockSignature, layers_of, register_like
from skipdit.utils.classes import subclass
from skipdit.utils.errors import UserError

CONFIG, VARIANT = "long_skips", "skips"  # of a saved model: the entry of its config, and part of its file's name


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
    dim = dim or _width(model)
    model.skips = make_skips(dim, n_skips, fuse="residual").to(like.device, like.dtype)
    shallow = Shallow()
    for i in range(n_skips):
        _join(blocks[i], leaves=Leaving(i, shallow))
        _join(blocks[-1 - i], enters=Entering(model.skips[n_skips - 1 - i], i, shallow))
    if getattr(diffusers, name, None) is type(model):
        model.__class__ = with_long_skips(type(model))
    model.register_to_config(**{CONFIG: {"n_skips": n_skips, "dim": dim}})
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

    joined = subclass(kind, copied_as=functools.partial(_joined, kind), forward=forward)
    register_like(joined, kind)
    return joined


@functools.cache
def with_long_skips(kind: type[ModelMixin]) -> type[ModelMixin]:
    """Return the class of a diffusers class's models with long skips: what they save, its `from_pretrained` loads.

    The weights are in a file of another name than a plain model's, so the plain class refuses it: it would leave the
    skips out.
    """

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self, *args: Any, variant: str | None = None, **kwargs: Any) -> None:
        super(made, self).save_pretrained(*args, variant=variant or VARIANT, **kwargs)

    def from_pretrained(cls, *args: Any, variant: str | None = None, **kwargs: Any) -> ModelMixin:
        return super(made, cls).from_pretrained(*args, variant=variant or VARIANT, **kwargs)

    def from_config(cls, config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = {name: value for name, value in config.items() if name != CONFIG}
        result = super(made, cls).from_config(own, *args, **kwargs)
        add_long_skips(result[0] if isinstance(result, tuple) else result, **config[CONFIG])
        return result

    loading = {"from_pretrained": classmethod(from_pretrained), "from_config": classmethod(from_config)}
    named = {"__module__": __name__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made = type(kind.__name__, (kind,), named | loading | {"save_pretrained": save_pretrained})
    return made


def __getattr__(name: str) -> Any:
    """Find the classes of models with long skips by their names, as pickle and saved pipelines do."""
    kind = getattr(diffusers, name, None) if name.endswith("Model") else None
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_long_skips(kind)


def _width(model: nn.Module) -> int:
    config = model.config
    if "num_attention_heads" in config and "attention_head_dim" in config:
        return config.num_attention_heads * config.attention_head_dim
    if "dim" in config:
        return config.dim
    raise UserError(f"the config of {type(model).__name__} does not say how wide its hidden states are: give dim")
