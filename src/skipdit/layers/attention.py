"""Attention, norms and activations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from skipdit.utils.errors import UserError


class GELU(nn.Module):
    """GELU in its tanh form. Where no gradient flows it overwrites its input: on a CPU, writing the widest tensor of a
    block anew takes some 4 % of a step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")


class Attention(nn.Module):
    """Multi-head self-attention on PyTorch's fused kernel; parameter names as in timm (`qkv`, `proj`).

    Args:
        qk_norm: normalise queries and keys of each head by their root mean square (arXiv 2302.05442).
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise UserError(f"hidden_size {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """x (..., T, D) -> (..., T, D); tokens attend within their row of T. `rotary` as `rotary_table` gives it."""
        groups = x.shape[:-2]
        qkv = self.qkv(x.flatten(0, -3)).unflatten(-1, (3, self.num_heads, -1))  # (G, T, 3, H, D/H), G groups in all
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rot_embed_cat(q, rotary), apply_rot_embed_cat(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v)  # (G, H, T, D/H): the fused kernels want four axes
        return self.proj(x.transpose(1, 2).flatten(2)).unflatten(0, groups)


def normalize(x: Tensor) -> Tensor:
    """Layer norm without weights; the modulation that follows it has them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def make_norm(dim: int, rms: bool) -> Callable[[Tensor], Tensor]:
    """The norm before a modulation: `normalize`, or RMSNorm with weights (arXiv 1910.07467)."""
    return nn.RMSNorm(dim, eps=1e-6) if rms else normalize


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, as one fused multiply-add over the tokens."""
    return torch.addcmul(shift, x, 1 + scale)
