"""The transformer that DiT and Latte are: blocks conditioned by adaptive layer norm (adaLN-Zero, arXiv 2212.09748).

Shapes: N samples, T tokens of a picture, F frames, D width. Tokens x are (N, T, D) for pictures and (N, F, T, D) for
videos; a conditioning c has the axes of x and broadcasts against it, (N, 1, D) or (N, 1 or F, 1, D).
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.layers.attention import GELU, Attention, make_norm, modulate
from skipdit.layers.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, rotary_table, sincos_2d, unpatchify
from skipdit.layers.skip import SkipTransformer, make_skips
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import count_members

SIZES = {  # the published sizes
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


class DiTBlock(nn.Module):
    """Transformer block whose norms and residuals are modulated by the conditioning.

    Args:
        qk_norm: see `skipdit.layers.settings.ModelSettings`.
        rms_norm: see `skipdit.layers.settings.ModelSettings`.
        swiglu: see `skipdit.layers.settings.ModelSettings`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
    ):
        super().__init__()
        self.norm1, self.norm2 = make_norm(dim, rms_norm), make_norm(dim, rms_norm)
        self.attn = Attention(dim, num_heads, qk_norm)
        hidden = dim * mlp_ratio
        self.mlp = SwiGLU(dim, round(hidden * 2 / 3)) if swiglu else Mlp(dim, int(hidden), act_layer=GELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        modulation: Tensor | None = None,
        axis: int = -2,
        rotary: Tensor | None = None,
    ) -> Tensor:
        """Tokens x -> the same shape.

        Args:
            c: conditioning (..., D), or None with `modulation` (..., 6D) computed from it before.
            axis: the axis of x along which tokens attend to each other: -2, those of a picture; -3, those of the same
                place in all frames. Only the attention sees the regrouped tokens, everything else is per token.
            rotary: positions along that axis, as of `embeddings.rotary_table`.
        """
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # 6 x (..., D)
        h = modulate(self.norm1(x), shift1, scale1)
        x = torch.addcmul(x, gate1, self.attn(h.transpose(axis, -2), rotary).transpose(axis, -2))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(self, dim: int, out_features: int, rms_norm: bool = False):
        super().__init__()
        self.norm = make_norm(dim, rms_norm)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """Tokens x, and c (..., D) or the modulation (..., 2D) computed from it before -> (..., T, out_features)"""
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class Conditioning(NamedTuple):
    """What a pass needs of timestep and class: the modulations of the blocks that it runs, and of the final layer.

    They do not depend on x, so a sampler computes those of many steps at once (`AdaLNTransformer.condition`).
    """

    blocks: Tensor  # (blocks that run, N, ..., 6D), in order
    final: Tensor  # (N, ..., 2D)


class AdaLNTransformer(SkipTransformer):
    """What DiT and Latte have in common. A subclass brings `forward`, in which it arranges tokens and blocks.

    Attributes:
        blocks_per_layer: blocks that make one layer of the skip stack; a cached pass of branch b runs twice b layers.
        inner_axes: axes of the tokens between samples and width.
        sample_shape: latents of one sample, (C, H, W) or (F, C, H, W).
        null_class: class id of no class, None for an unconditional model.
    """

    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 (diffusers' convention; also the unit that FSDP shards)
    blocks_per_layer: int = 1
    inner_axes: int = 1
    null_class: int | None
    sample_shape: tuple[int, ...]

    def _build(self, num_classes: int | None, n_skips: int) -> None:
        """Make all modules of `self.config`. `num_classes` None leaves out the class embedding."""
        input_size, patch_size, in_channels = self.config.input_size, self.config.patch_size, self.config.in_channels
        hidden_size, num_heads, mlp_ratio = self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio
        if input_size % patch_size:
            raise UserError(f"patch_size {patch_size} does not divide the latent size {input_size}")
        self.null_class = num_classes
        self.sample_shape = (in_channels, input_size, input_size)

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        side = torch.arange(input_size // patch_size, dtype=torch.float64)
        self.register_buffer("pos_embed", sincos_2d(side, side, hidden_size).float()[None])
        options = self.config.qk_norm, self.config.rms_norm, self.config.swiglu
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, *options) for _ in range(self.config.depth)
        )
        self.skips = make_skips(hidden_size, n_skips, self.config.fuse)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * 2 * in_channels, self.config.rms_norm)
        table = rotary_table(len(side), len(side), hidden_size // num_heads) if self.config.rotary else None
        self.register_buffer("rotary_embed", table)
        self.register_buffer("temp_rotary_embed", None)  # a video model has one
        self.initialize_weights()

    @property
    def depth(self) -> int:
        return len(self.blocks) // self.blocks_per_layer

    def initialize_weights(self) -> None:
        """DiT's initialisation: every block starts as the identity, the model predicts zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(".delta"):  # those of residual skips start at zero
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.out_channels, -1))
        nn.init.zeros_(patch.bias)
        if self.null_class is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for zero in [
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def random_inputs(self, batch: int) -> dict[str, Tensor | None]:
        """Arguments of `forward` for counting and timing."""
        x = torch.randn(batch, *self.sample_shape, device=self.device, dtype=self.dtype)
        y = None if self.null_class is None else torch.zeros(batch, dtype=torch.long, device=self.device)
        return {"x": x, "t": torch.full((batch,), 500, device=self.device), "y": y}

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Timesteps t (...) and class ids y (...), broadcast -> conditioning (..., 1 per inner axis, D).

        Raises ValueError if the classes are missing, or if there are some and the model knows none.
        """
        if (y is None) != (self.null_class is None):
            raise ValueError("the model is unconditional: y must be None" if y is not None else "y is missing")
        c = self.t_embedder(t.flatten()).unflatten(0, t.shape)
        c = c if y is None else c + self.y_embedder(y)
        return c[(..., *[None] * self.inner_axes, slice(None))]

    @torch.no_grad()
    def condition(self, timesteps: Tensor, y: Tensor | None, branch: int | None = None) -> list[Conditioning]:
        """The conditioning of S sampling steps, in one matrix product per block.

        Args:
            timesteps: (S,).
            y: class ids (N,), the same at every step; None for an unconditional model, whose N is 1 here.
            branch: for cached steps, their branch: only the outer blocks are computed.
        """
        c = self.embed(timesteps[:, None], y)  # (S, N, ..., D)
        final = self.final_layer.adaLN_modulation(c)
        outer = len(self.blocks) if branch is None else branch * self.blocks_per_layer
        blocks = [block for i, block in enumerate(self.blocks) if i < outer or i >= len(self.blocks) - outer]
        modulations = torch.stack([block.adaLN_modulation(c) for block in blocks], dim=1)  # (S, blocks, N, ..., 6D)
        return [Conditioning(*step) for step in zip(modulations, final, strict=True)]

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cache: CacheStep | None = None,
        cfg_channels: int | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Classifier-free guidance in one call: the batch is [conditional, unconditional], its halves share one x.

        Args:
            x: latents (2N, ..., C, H, W); only the first half is read.
            t, y: (2N,); the second half of y is the null class.
            cfg_scale: 1 is no guidance.
            cache, conditioning: as in `forward`.
            cfg_channels: guide this many leading channels of the noise; None guides all.

        Returns:
            (2N, ..., 2C, H, W), guided noise in both halves.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y, cache=cache, conditioning=conditioning)
        channels = self.config.in_channels if cfg_channels is None else cfg_channels
        noise, rest = out.tensor_split([channels], dim=-3)
        cond, uncond = noise.chunk(2)
        guided = torch.lerp(uncond, cond, cfg_scale)
        return torch.cat([torch.cat([guided, guided]), rest], dim=-3)

    def _block(self, i: int, x: Tensor, c: Tensor | None, ahead: Conditioning | None, axis: int = -2) -> Tensor:
        """Run block i on tokens x, conditioned by c or by modulations computed ahead."""
        positions = self.rotary_embed if axis == -2 else self.temp_rotary_embed
        if ahead is None:
            return self._run(self.blocks[i], x, c, None, axis, positions)
        depth = len(self.blocks)
        modulation = ahead.blocks[i if 2 * i < depth else i - depth]  # cached: the outer ones
        return self.blocks[i](x, None, modulation, axis, positions)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(..., T, p * p * 2C) -> (..., 2C, H, W)"""
        return unpatchify(x, self.config.patch_size, self.config.input_size // self.config.patch_size)

    @classmethod
    def from_name(cls, name: str, **overrides) -> "AdaLNTransformer":
        """Build a published variant, such as `DiT-XL/2` (plain), `DiT-XL/2-skip`, or `DiT-skip`, short for the latter.

        Raises ValueError for an unknown name. Overrides are constructor arguments.
        """
        family = cls.__name__
        wanted = f"{family}-XL/2-skip" if name == f"{family}-skip" else name
        match = re.fullmatch(rf"{family}-(S|B|L|XL)/(2|4|8)(-skip)?", wanted)
        if not match:
            known = f"{family}-skip, and {family}-{{S,B,L,XL}}/{{2,4,8}} with or without '-skip'"
            raise UserError(f"unknown model {name!r}; known: {known}")
        size, patch, skip = match.groups()
        return cls(**{**SIZES[size], "patch_size": int(patch), "skip": bool(skip), **overrides})

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
        """Constructor arguments that fit a state dict, read off its shapes.

        Args:
            state: names as `skipdit.checkpoints.files.load_state` gives them.
            num_heads: heads leave no trace in the shapes; None takes those of the published size of this width.

        Raises ValueError if the state dict is another model's, or if no published size has its width.
        """
        try:
            hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
            tokens = state["pos_embed"].shape[1]
            swiglu = "blocks.0.mlp.fc1_x.weight" in state
            mlp_width = len(state[f"blocks.0.mlp.{'fc1_x' if swiglu else 'fc1'}.weight"]) * (1.5 if swiglu else 1)
        except KeyError as error:
            raise UserError(f"not the weights of a {cls.__name__}: they lack {error}") from error
        published = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
        if not (num_heads or hidden_size in published):
            raise UserError(
                f"no published {cls.__name__} is {hidden_size} wide: state its number of attention heads (num_heads)"
            )
        return {
            "input_size": math.isqrt(tokens) * patch_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": count_members(state, "blocks"),
            "num_heads": num_heads or published[hidden_size],
            "mlp_ratio": mlp_width / hidden_size,
            "skip": count_members(state, "skips") > 0,
            "fuse": "residual" if "skips.0.delta.weight" in state else "replace",
            "qk_norm": "blocks.0.attn.q_norm.weight" in state,
            "rms_norm": "blocks.0.norm1.weight" in state,
            "swiglu": swiglu,
            "rotary": "rotary_embed" in state,
        }
