"""Embeddings of patches, positions, timesteps and labels."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from timm.layers import build_rotary_pos_embed
from torch import Tensor, nn

from skipdit.utils.errors import UserError


class _PatchLinear(nn.Conv2d):
    """A convolution whose kernels tile the picture, as one matrix product: on a CPU in a quarter of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, HW / p^2, D)"""
        p = self.kernel_size[0]
        x = rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p)
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Images (N, C, H, W) -> tokens (N, HW/p^2, D). Parameters are a convolution's, as in the released weights.

    Raises ValueError for another image size than the one it was made for; `size` None takes any.
    """

    def __init__(self, size: int | None, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.size = size
        self.proj = _PatchLinear(in_channels, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            raise UserError(f"latents are {tuple(x.shape[-2:])}, the model was made for {(self.size, self.size)}")
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    """Timesteps t (N,) -> (N, D): sinusoids, then a two-layer MLP."""

    def __init__(self, dim: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        cosines_first = {"flip_sin_to_cos": True, "downscale_freq_shift": 0}
        return self.mlp(get_timestep_embedding(t, self.frequency_dim, **cosines_first).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class ids y (N,) -> (N, D). Id `num_classes` is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def rotary_table(rows: int, columns: int, head_dim: int) -> Tensor:
    """Axial rotary positions of a grid (arXiv 2104.09864) -> (rows * columns, 2 head_dim): sines, then cosines, as
    timm's attention takes them. A time axis is a grid of one column.

    Raises UserError if head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise UserError(f"rotary positions want heads whose width is a multiple of 4, not {head_dim}")
    return torch.cat(build_rotary_pos_embed([rows, columns], dim=head_dim, in_pixels=False), dim=-1)


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Sine-cosine table of positions (M,) -> (M, dim), sines first, in the precision of the positions."""
    exponents = torch.arange(dim // 2, dtype=positions.dtype, device=positions.device) / (dim / 2)
    angles = positions[:, None] * 10_000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Table of a grid of positions (h,) by (w,) -> (h * w, dim); columns fill the first half of `dim`."""
    table = [sincos_1d(columns, dim // 2).expand(len(rows), -1, -1)]
    table += [sincos_1d(rows, dim // 2)[:, None].expand(-1, len(columns), -1)]
    return torch.cat(table, dim=2).flatten(0, 1)


def unpatchify(x: Tensor, patch_size: int, rows: int) -> Tensor:
    """Tokens (..., T, p * p * C), `rows` lines of patches -> pictures (..., C, H, W)."""
    return rearrange(x, "... (h w) (p q c) -> ... c (h p) (w q)", h=rows, p=patch_size, q=patch_size)


def rotary_2d(rows: Tensor, columns: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Rotary tables of a grid of positions (h,) by (w,): cosines and sines, each (h * w, dim), every angle twice.

    Columns turn the first half of `dim` (RoFormer, arXiv 2104.09864, along two axes).
    """
    exponents = torch.arange(0, dim // 2, 2, dtype=rows.dtype, device=rows.device) / (dim // 2)
    across, down = (axis[:, None] * 10_000.0**-exponents for axis in (columns, rows))  # (w, dim / 4), (h, dim / 4)
    angles = torch.cat([across.expand(len(rows), -1, -1), down[:, None].expand(-1, len(columns), -1)], dim=2)
    angles = angles.flatten(0, 1).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
