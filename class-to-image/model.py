"""Skip-DiT for class-conditional images: DiT (arXiv 2212.09748) with long skip connections (arXiv 2411.17616).

Shapes: N samples, C latent channels, H x W latents, p patch size, T = (H/p)(W/p) tokens, D width.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.layers import Mlp
from torch import Tensor, nn

from skipdit.cache import CacheStep
from skipdit.nn import Attention, LabelEmbedder, PatchEmbed, TimestepEmbedder, gated, modulate, sincos_2d
from skipdit.skip import LongSkip, skip_stack

SIZES = {  # the published sizes
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


class DiTBlock(nn.Module):
    """Transformer block whose norms and residuals are modulated by the conditioning (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """x (N, T, D), and c (N, D) or the modulation (N, 6D) computed from it before -> (N, T, D)"""
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # 6 x (N, D)
        x = gated(x, gate1, self.attn(modulate(normalize(x), shift1, scale1)))
        return gated(x, gate2, self.mlp(modulate(normalize(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """x (N, T, D), and c (N, D) or the modulation (N, 2D) computed from it before -> (N, T, out_features)"""
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(normalize(x), shift, scale))


def normalize(x: Tensor) -> Tensor:
    """Layer norm without weights; the modulation that follows it has them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Conditioning(NamedTuple):
    """What a pass needs of timestep and class: the modulations of the blocks that it runs, and of the final layer.

    They do not depend on x, so a sampler computes those of many steps at once (`DiT.condition`).
    """

    blocks: Tensor  # (blocks that run, N, 6D), in order
    final: Tensor  # (N, 2D)


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer on latents, with or without long skips.

    Args:
        input_size: height and width of the latents.
        patch_size: side of a patch, in latent pixels.
        in_channels: latent channels C; the output has 2C, noise and variance (learned sigma, arXiv 2102.09672).
        hidden_size: width D.
        depth: number of blocks L.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: class ids are 0 .. num_classes - 1; `num_classes` itself is the null class.
        skip: whether block i is joined to block L-1-i, for every i < L // 2.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 (diffusers' convention; also the unit that FSDP shards)

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        skip: bool = True,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide the latent size {input_size}")
        self.n_skips = depth // 2 if skip else 0
        self.null_class = num_classes
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, input_size // patch_size))
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.skips = nn.ModuleList(LongSkip(hidden_size) for _ in range(self.n_skips))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * 2 * in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's initialisation: every block starts as the identity, the model predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.out_channels, -1))
        nn.init.zeros_(patch.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for zero in [
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cache: CacheStep | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Predict noise and variance.

        Args:
            x: noisy latents (N, C, H, W).
            t: timesteps (N,).
            y: class ids (N,).
            cache: `SkipCache.at(i)` of this sampling step; None runs every block.
            conditioning: of t and y, if computed before; they are not looked at then.

        Returns:
            (N, 2C, H, W): the noise, then the interpolation coefficient of the log variance.
        """
        depth = len(self.blocks)
        c = self.t_embedder(t) + self.y_embedder(y) if conditioning is None else None  # (N, D)

        def block(i: int, x: Tensor) -> Tensor:
            if conditioning is None:
                return self._run(self.blocks[i], x, c)
            ahead = conditioning.blocks[i if 2 * i < depth else i - depth]  # cached: the first and last b
            return self.blocks[i](x, None, ahead)

        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        x = skip_stack(
            x,
            block=block,
            fuse=lambda j, x, shallow: self._run(self.skips[j], x, shallow),
            depth=depth,
            n_skips=self.n_skips,
            cache=cache,
        )
        return self._unpatchify(self.final_layer(x, c, conditioning.final if conditioning else None))

    @torch.no_grad()
    def condition(self, timesteps: Tensor, y: Tensor, branch: int | None = None) -> list[Conditioning]:
        """The conditioning of S sampling steps, in one matrix product per block.

        Args:
            timesteps: (S,).
            y: class ids (N,), the same at every step.
            branch: for cached steps, their branch: only the outer blocks are computed.
        """
        c = self.t_embedder(timesteps)[:, None] + self.y_embedder(y)  # (S, N, D)
        blocks = self.blocks if branch is None else [*self.blocks[:branch], *self.blocks[-branch:]]
        modulations = torch.stack([block.adaLN_modulation(c) for block in blocks], dim=1)  # (S, blocks, N, 6D)
        final = self.final_layer.adaLN_modulation(c)
        return [Conditioning(*step) for step in zip(modulations, final, strict=True)]

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cache: CacheStep | None = None,
        cfg_channels: int | None = 3,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Classifier-free guidance in one call: the batch is [conditional, unconditional], its halves share one x.

        Args:
            x: latents (2N, C, H, W); only the first half is read.
            t, y: (2N,); the second half of y is the null class.
            cfg_scale: 1 is no guidance.
            cache, conditioning: as in `forward`.
            cfg_channels: guide this many leading channels of the noise. The original guides 3 of 4; None guides all.

        Returns:
            (2N, 2C, H, W), guided noise in both halves.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y, cache=cache, conditioning=conditioning)
        channels = self.config.in_channels if cfg_channels is None else cfg_channels
        noise, rest = out[:, :channels], out[:, channels:]
        cond, uncond = noise.chunk(2)
        guided = torch.lerp(uncond, cond, cfg_scale)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def _run(self, module: nn.Module, *args: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p * p * 2C) -> (N, 2C, H, W)"""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (N, h, w, p, p, 2C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @classmethod
    def from_name(cls, name: str, **overrides) -> "DiT":
        """Build a published variant: `DiT-XL/2` (plain), `DiT-XL/2-skip`, or `DiT-skip`, short for the latter.

        Raises ValueError for an unknown name. Overrides are constructor arguments.
        """
        match = re.fullmatch(r"DiT-(S|B|L|XL)/(2|4|8)(-skip)?", "DiT-XL/2-skip" if name == "DiT-skip" else name)
        if not match:
            raise ValueError(
                f"unknown model {name!r}; known: DiT-skip, and DiT-{{S,B,L,XL}}/{{2,4,8}} with or without '-skip'"
            )
        size, patch, skip = match.groups()
        return cls(**{**SIZES[size], "patch_size": int(patch), "skip": bool(skip), **overrides})

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
        """Constructor arguments that fit a state dict, read off its shapes.

        Args:
            state: names as `skipdit.weights.load_state` gives them.
            num_heads: heads leave no trace in the shapes; None takes those of the published size of this width.

        Raises ValueError if the state dict is not a DiT's, or if no published size has its width.
        """
        try:
            hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
            tokens = state["pos_embed"].shape[1]
            classes = len(state["y_embedder.embedding_table.weight"]) - 1  # the last row is the null class
            mlp_width = len(state["blocks.0.mlp.fc1.weight"])
        except KeyError as error:
            raise ValueError(f"not the weights of a class-to-image DiT: they lack {error}") from error
        published = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
        if not (num_heads or hidden_size in published):
            raise ValueError(f"no published DiT is {hidden_size} wide: state its number of attention heads (num_heads)")
        return {
            "input_size": math.isqrt(tokens) * patch_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "num_heads": num_heads or published[hidden_size],
            "mlp_ratio": mlp_width / hidden_size,
            "num_classes": classes,
            "skip": any(name.startswith("skips.") for name in state),
        }
