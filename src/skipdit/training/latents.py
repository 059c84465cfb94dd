"""Batches of images or encoded samples to clean latents."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from skipdit.data.settings import ClipData
from skipdit.encoders.autoencoder import encode
from skipdit.training.steps import Draw
from skipdit.utils.pixels import to_float


def clean_latents(batch: dict, flipped: Tensor, kind: str, vae: AutoencoderKL, draw: Callable[..., Tensor]) -> Tensor:
    """A batch of pictures or of latents -> clean latents (..., C, h, w), float32. In place, it mirrors their features.

    Args:
        batch: "image" uint8 (..., 3, H, W), or "mean" and "std" (..., 2, C, h, w); "features" (..., rows, columns, D).
        flipped: bool (...), which of them to flip horizontally.
        kind: "mean", or "sample" from the autoencoder's posterior.
        vae: encodes images, on their device.
        draw: `draw(*shape)` gives normal noise of shape (N, *shape).
    """
    flipped = flipped[..., None, None, None]
    if "features" in batch:
        batch["features"] = torch.where(flipped, batch["features"].flip(-2), batch["features"])
    if "mean" in batch:
        keys = ("mean", "std") if kind == "sample" else ("mean",)
        mean, *std = (torch.where(flipped, *batch[key].float().unbind(-4)[::-1]) for key in keys)
    else:
        images = to_float(batch["image"])
        mean, *std = encode(vae.to(images.device), torch.where(flipped, images.flip(-1), images))
    return mean + std[0] * draw(*mean.shape[1:]) if kind == "sample" else mean


def joint_latents(batch: dict, config: ClipData, vae: AutoencoderKL, draw: "Draw") -> Tensor:
    """Clean latents (N, F + I, C, h, w) of clips and the images beside them: a clip is flipped as a whole, an image by
    itself. `draw` gives the step's random numbers; see `clean_latents` for the rest.
    """
    mirrored = (draw.rand(1 + config.images) < 0.5) & config.flip
    flipped = torch.cat([mirrored[:, :1].expand(-1, config.num_frames), mirrored[:, 1:]], dim=1)
    return clean_latents(batch, flipped, config.latents, vae, draw.randn)
