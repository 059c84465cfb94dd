"""Long skip connections, and how a cached pass uses them. The one place that knows either.

Every backbone is `depth` layers, 0 .. L-1, with n skips that join layer i to layer L-1-i for i < n (Skip-DiT, arXiv
2411.17616, section 3). A *full* pass runs all of them and hands out the input of layer L-b. A *cached* pass runs
layers 0 .. b-1, puts that feature (of an earlier full pass, or extrapolated) where the middle would have ended, and
runs layers L-b .. L-1: the shallow features, and so the skips, are fresh. A plain backbone has no skips to bring what
is fresh; there the feature is what the middle layers added to the stream, so that the fresh part goes on through it. A
*forecast* step runs nothing at all: `caches_output` returns what the cache has in place of the model's output.

                full pass                          cached pass, b = 1

    0 ─ 1 ─ 2 ── … ── L-3 ─ L-2 ─ L-1           0 ─────────────► ( feature ) ─ L-1
    └───│───│─────────│─────│─────┘             └───────────────────────────────┘
        └───│─────────│─────┘
            └─────────┘
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.checkpoints.hub import OnHub
from skipdit.utils.errors import UserError


class LongSkip(nn.Module):
    """Joins a shallow feature into the input of a deep layer, 2D -> D.

    Args:
        dim: D.
        residual: False: `Linear(LayerNorm([x, shallow]))` takes the place of x, as in the paper. True: it is added to x
            and starts at zero, so that a pretrained plain model stays what it is when it gets its skips. The linear has
            another name then: weights of one kind do not load into the other.
    """

    def __init__(self, dim: int, residual: bool = False):
        super().__init__()
        self.norm = FP32LayerNorm(2 * dim, eps=1e-6)
        self.residual = residual
        if residual:
            self.delta = nn.Linear(2 * dim, dim)
            nn.init.zeros_(self.delta.weight)
            nn.init.zeros_(self.delta.bias)
        else:
            self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, shallow: Tensor) -> Tensor:
        """x, shallow (..., D) -> (..., D)"""
        normed = self.norm(torch.cat([x, shallow], dim=-1))
        out = x + self.delta(normed) if self.residual else self.linear(normed)
        return out.to(x.dtype)  # under autocast too: the residual stream stays float32


def make_skips(dim: int, n_skips: int, fuse: str = "replace") -> nn.ModuleList:
    """n long skips of width `dim`. Raises ValueError unless `fuse` is "replace" or "residual"; see `LongSkip`."""
    if fuse not in ("replace", "residual"):
        raise UserError(f"fuse is {fuse!r}; it is 'replace', as the released models have it, or 'residual'")
    return nn.ModuleList(LongSkip(dim, residual=fuse == "residual") for _ in range(n_skips))


def check_branch(branch: int, depth: int, n_skips: int) -> None:
    """Raise ValueError if a cache's branch goes beyond a model's long skips, or beyond the half of a plain model."""
    if branch < 0:
        raise UserError(f"cache branch is {branch}; it must be 0, which runs no layer, or more")
    if n_skips and branch > n_skips:
        raise UserError(f"cache branch {branch} is larger than the model's number of skips, {n_skips}")
    if 2 * branch > depth:
        raise UserError(f"cache branch {branch} is larger than half of the model's {depth} layers")


def skip_stack(
    x: Tensor,
    *,
    block: Callable[[int, Tensor], Tensor],
    fuse: Callable[[int, Tensor, Tensor], Tensor],
    depth: int,
    n_skips: int,
    cache: CacheStep | None = None,
) -> Tensor:
    """Run a U-shaped stack of layers on x, all of it or, on a cached step, its outer `cache.branch` layers.

    Args:
        x: input of layer 0, any shape that `block` keeps.
        block: `block(i, x)` runs layer i.
        fuse: `fuse(j, x, shallow)` applies skip j, which feeds layer `depth - n_skips + j`.
        depth: number of layers L; a layer may be a pair of blocks.
        n_skips: number of skips n <= L / 2.
        cache: this step of a `SkipCache`; None runs every layer and keeps nothing.

    Returns:
        The output of the last layer, of the shape of x.
    """
    first = depth - n_skips  # the first layer that a skip feeds
    branch = cache.branch if cache is not None else 0
    keep = cache is not None and branch > 0
    check_branch(branch, depth, n_skips)
    shallow: list[Tensor] = []

    def layer(i: int, x: Tensor) -> Tensor:
        if i >= first:
            x = fuse(i - first, x, shallow.pop())
        x = block(i, x)
        if i < n_skips:
            shallow.append(x)
        return x

    for i in range(branch):
        x = layer(i, x)
    if not keep or cache.is_full(x):
        start = x
        for i in range(branch, depth - branch):
            x = layer(i, x)
        if keep:  # of a plain backbone, what the middle adds
            cache.kept_feature = x if n_skips else x - start
    else:
        x = cache.feature if n_skips else x + cache.feature
    for i in range(depth - branch, depth):
        x = layer(i, x)
    return x


def caches_output(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backbone's `forward`: on a forecast step it returns the cache's forecast and runs nothing; on others,
    its output is kept there, and corrected where the step says so.
    """
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def cached(self, *args, **kwargs) -> Any:
        given = dict(zip(names[1:], args, strict=False)) | kwargs
        cache: CacheStep | None = given.get("cache")
        if cache is None:
            return forward(self, *args, **kwargs)
        return cache.finish(forward(self, *args, **kwargs)) if cache.forecast is None else cache.forecast

    return cached


class SkipTransformer(OnHub, ModelMixin, ConfigMixin):
    """What all backbones are: a stack of layers with long skips, in diffusers' model class.

    Attributes:
        skips: module list of `LongSkip`, made by the subclass.
        run_layers: `skip_stack`, or what `layers_run_by` puts in its place.
        text_arguments: for models of texts, the arguments of `forward` that `encode_text` takes; what that returns may
            take the place of the first of them.
    """

    _supports_gradient_checkpointing = True
    # What diffusers' layerwise casting leaves in the dtype that the model computes in.
    _skip_layerwise_casting_patterns = ("pos_embed", "x_embedder", "t_embedder", "adaln_single", "norm")
    gradient_checkpointing = False
    skips: nn.ModuleList
    run_layers: Callable[..., Tensor] = staticmethod(skip_stack)
    text_arguments: tuple[str, ...] = ()

    @property
    def flow_shift(self) -> float | None:
        """Shift of the times of a model trained by flow matching, see `diffusion.flow`; None for noise or v. It is
        an entry of the config, and so of checkpoints.
        """
        return self.config.flow_shift

    @flow_shift.setter
    def flow_shift(self, shift: float | None) -> None:
        dict.__setitem__(self.config, "flow_shift", shift)  # diffusers' configs are frozen, once the model is made
        vars(self.config)["flow_shift"] = shift

    @property
    def n_skips(self) -> int:
        return len(self.skips)

    @property
    def depth(self) -> int:
        """Layers of the skip stack, L."""
        raise NotImplementedError

    def _stack(
        self,
        x: Tensor,
        block: Callable[[int, Tensor], Tensor],
        cache: CacheStep | None,
        extras: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run all layers on x; see `skip_stack`. `extras`, one per skip, outermost first, are added to what it
        brings, as a ControlNet does.
        """

        def fuse(j: int, x: Tensor, shallow: Tensor) -> Tensor:
            shallow = shallow if extras is None else shallow + extras[self.n_skips - 1 - j]
            return self._run(self.skips[j], x, shallow)

        return self.run_layers(x, block=block, fuse=fuse, depth=self.depth, n_skips=self.n_skips, cache=cache)

    def _run(self, module: nn.Module, *args) -> Tensor:
        """Call a module; in training with gradient checkpointing its activations are computed anew."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)


def predicted_noise(output: Any, latents: Tensor) -> Tensor:
    """The prediction (noise, v or velocity) in what a backbone returns, of the latents' shape; the variance follows."""
    out = output if isinstance(output, Tensor) else output[0]
    axis = next((i for i, (a, b) in enumerate(zip(out.shape, latents.shape, strict=True)) if a != b), 1)
    return out.narrow(axis, 0, latents.shape[axis])
