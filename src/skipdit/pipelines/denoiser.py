"""The model of a pipeline that a cache works on: a transformer or a UNet, ours or any other."""

import inspect
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_map_only

from skipdit.caching.policy import CachePolicy
from skipdit.layers.skip import SkipTransformer, check_branch
from skipdit.pipelines import hunyuan2d
from skipdit.pipelines.blocks import CachedBlocks
from skipdit.utils.errors import UserError

COMPONENTS = ("transformer", "transformer_2", "unet")  # of a pipeline; Wan 2.2 has two transformers
RECOMPILES = 64  # torch's limit is 8; full and cached steps, guided or not, of clips and single images take more
# The arguments by which the calls of guidance differ. Masks and pooled texts go along with them.
TEXTS = re.compile(r"encoder_hidden_states(?!.*mask)|cap_feats|text_bth|class_labels|input_ids|prior_token")


def denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return the models that a pipeline calls at its steps. Raises TypeError if it has none."""
    found = [part for name in COMPONENTS if isinstance(part := getattr(pipe, name, None), nn.Module)]
    if not found or not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise TypeError(f"{type(pipe).__name__} has no scheduler with a transformer or a UNet, which a cache works on")
    return found


class Denoiser:
    """A model that hands each of its calls to a cache first.

    Args:
        module: the model, or what torch.compile made of it.
        spec: the cache's policy.
        before: called with the denoiser and the arguments of a call by their names; returns those of the model.
        after: called when a call has returned.

    Attributes:
        model: the model itself.
        texts: names of the arguments that tell the calls of a step apart.
        own_timesteps: whether the model takes the scheduler's timesteps as they are.

    Raises TypeError for a model that the policy cannot work on, ValueError for a policy that does not fit it or a model
    compiled in place.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: CachePolicy,
        before: Callable[["Denoiser", dict[str, Any]], dict[str, Any]],
        after: Callable[[], None],
    ):
        self.model = model = getattr(module, "_orig_mod", module)
        self._module, self._before, self._after = weakref.ref(module), before, after
        self.own_timesteps = isinstance(model, SkipTransformer | HunyuanDiT2DModel)
        forward = _checked_forward(module, spec)
        self._arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        own = getattr(model, "text_arguments", ())
        self.texts = own or tuple(name for name in self._arguments if TEXTS.search(name))
        self._replaced: list[nn.Module] = []
        self._hooks: list = []
        try:
            if forward is not None:
                self._replace(model, forward)
            if isinstance(forward, CachedBlocks):
                for i, block in enumerate(forward.blocks):
                    self._replace(block, forward.block(i))
        except UserError:  # a block is wrapped, and the model is not
            self.remove()
            raise
        self._hooks = [
            module.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True),
            module.register_forward_hook(_Hook(self._end)),
        ]
        if isinstance(module, OptimizedModule):
            self._hooks.append(module.register_forward_hook(_copied))
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is this module that is hooked."""
        return self._module() is module

    def remove(self) -> None:
        """Put everything back."""
        for hook in self._hooks:
            hook.remove()
        for module in self._replaced:
            _restore_forward(module)

    def call(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the arguments that the model gets in place of these."""
        return (), self._before(self, dict(zip(self._arguments, args, strict=False)) | kwargs)

    def latents(self, named: dict[str, Any]) -> Any:
        """Those among the arguments of a call: the first one, of any model."""
        return named.get(self._arguments[0])

    def encodes(self, texts: tuple) -> bool:
        """Whether the model takes these texts encoded. A module that is offloaded has its weights elsewhere until its
        forward begins: it encodes the text there.
        """
        if not hasattr(self.model, "encode_text") or not isinstance(texts[0], Tensor):
            return False
        return texts[0].device == next(self.model.parameters()).device

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if torch.compiler.is_compiling():
            raise RuntimeError("assign the compiled transformer to pipe.transformer before calling the pipeline")
        torch.compiler.cudagraph_mark_step_begin()
        return self.call(args, kwargs)

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._after()

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        _replace_forward(module, forward)
        self._replaced.append(module)


def _checked_forward(module: nn.Module, spec: CachePolicy) -> Callable[..., Any] | None:
    """The `forward` that a model needs to compute with a cache, None if its own does. Raises as `Denoiser`."""
    model, forward = getattr(module, "_orig_mod", module), None
    branch = spec.branch if spec.caches else 0
    if isinstance(model, SkipTransformer):
        check_branch(branch, model.depth, model.n_skips)
    elif isinstance(model, HunyuanDiT2DModel):
        check_branch(branch, len(model.blocks), hunyuan2d.n_skips(model))
        forward = types.MethodType(hunyuan2d.cached_forward, model)
    else:
        forward = CachedBlocks(model, branch)
    if spec.adaptive and model is not module:
        raise UserError(f"cache {spec} decides within the transformer, which cannot be compiled then")
    if model._compiled_call_impl is not None:
        raise UserError(
            "the transformer is compiled in place, and the cache has to stay outside of its graphs: load the pipeline "
            "again, and in place of `pipe.transformer.compile(...)` write "
            "`pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)`"
        )
    return forward


class _Forward:
    """Stands in for a module's `forward`; that of a copied module computes without a cache."""

    def __init__(self, module: nn.Module):
        self.module, self.cached = module, None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return types.MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.cached is not None:
            return self.cached(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return _Forward, (self.module,)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module compute by another `forward`. Raises ValueError if its own is wrapped in an unknown way."""
    if "_cached_forward" not in module.__dict__:
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"  # accelerate's offloading calls that
        if slot == "forward" and slot in module.__dict__:
            raise UserError(
                f"{type(module).__name__}.forward is wrapped, by group offloading perhaps: call enable_cache "
                "before that"
            )
        module.__dict__[slot] = module.__dict__["_cached_forward"] = _Forward(module)
    module._cached_forward.cached = forward


def _restore_forward(module: nn.Module) -> None:
    """Undo `_replace_forward`. What has been wrapped since stays, and computes without a cache."""
    own = module.__dict__["_cached_forward"]
    own.cached = None
    for slot in ("_old_forward", "forward"):
        if module.__dict__.get(slot) is own:
            del module.__dict__["_cached_forward"], module.__dict__[slot]  # the class's own comes back
            if slot == "_old_forward":
                module._old_forward = own.__wrapped__
            return


class _Hook:
    """A hook of a model; that of a copied one does nothing."""

    def __init__(self, function: Callable[..., Any] | None):
        self.function = function

    def __reduce__(self) -> tuple:
        return _Hook, (None,)

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)


def _copied(module: nn.Module, args: tuple, output: Any) -> Any:
    """What a compiled transformer returns, in memory of its own: that of a CUDA graph is written again by the next
    call, while guidance in two calls and multistep schedulers still need it.
    """
    return tree_map_only(Tensor, Tensor.clone, output)
