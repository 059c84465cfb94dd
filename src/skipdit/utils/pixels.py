"""Pixels as integers and as numbers in [-1, 1]."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (..., 3, H, W) in [-1, 1] to uint8, rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
