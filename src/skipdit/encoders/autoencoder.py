"""The autoencoder between pixels and latents, from a folder or the Hub.

Any diffusers `AutoencoderKL`; for decoding clips also one whose decoder sees several frames at once.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor

from skipdit.checkpoints.download import hub_is_away
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import require_finite
from skipdit.utils.errors import UserError
from skipdit.utils.pixels import to_uint8


def load_vae(source: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """An autoencoder in eval mode, without gradients, on the CPU.

    Raises FileNotFoundError, naming the source, if it is neither a folder nor to be had from the Hub; ValueError if it
    normalises every latent channel by itself, or has weights that are missing or not finite.
    """
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: not the folder of a diffusers autoencoder")
    away = hub_is_away(source)
    try:
        kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderKLTemporalDecoder)}
        kind = kinds.get(AutoencoderKL.load_config(source, local_files_only=away).get("_class_name"), AutoencoderKL)
        how = {"torch_dtype": dtype, "low_cpu_mem_usage": False, "local_files_only": away}
        vae, report = kind.from_pretrained(source, **how, output_loading_info=True)
    except (OSError, ValueError) as error:  # ValueError: a config.json that no autoencoder can be built from
        reason = "which does not answer" if away else str(error).splitlines()[0]
        what = "that folder cannot be loaded" if path.exists() else "neither a folder here nor fetched from the Hub"
        raise FileNotFoundError(
            f"no autoencoder {source}: {what} ({reason}); "
            "`skipdit download class-to-image` or class-to-video fetches the one of the released models"
        ) from error
    if any(vae.config.get(name) is not None for name in ("latents_mean", "latents_std")):
        raise UserError(
            f"the autoencoder {source} normalises latents per channel (latents_mean, latents_std), which is not "
            "supported: take one with a scaling_factor and, perhaps, a shift_factor"
        )
    if missing := report["missing_keys"]:
        raise WeightsError(f"the autoencoder {source} lacks weights, which would be random: {', '.join(missing[:5])}")
    require_finite(f"the autoencoder {source}", vae.state_dict())
    return vae.eval().requires_grad_(False)


def shift_factor(vae: AutoencoderKL) -> float:
    """What is taken off latents before they are scaled; 0 for most autoencoders."""
    return vae.config.get("shift_factor") or 0.0


def pixels(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents (N, ..., C, h, w) -> (N, ..., 3, H, W) uint8, on the CPU: what is saved."""
    return to_uint8(decode(vae, latents)).cpu()


def downsampling(vae: AutoencoderKL) -> int:
    """Pixels per latent pixel, along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_size(image_size: int, vae: AutoencoderKL, name: str = "image_size", patch_size: int = 1) -> int:
    """A side of the latents of an image. Raises ValueError if the autoencoder or patches do not divide it."""
    factor = downsampling(vae)
    if image_size % (factor * patch_size):
        patches = f" times {patch_size}, the side of a patch" if patch_size > 1 else ""
        raise UserError(f"{name} {image_size} is not a multiple of the autoencoder's factor {factor}{patches}")
    return image_size // factor


CHUNK = 32  # pictures per call of the autoencoder: the frames of a batch of clips do not fit all at once
CHUNK_PIXELS = CHUNK * 256**2  # of larger pictures, fewer fit
TEMPORAL_CHUNK = 14  # frames that a temporal decoder was trained to see at once


def _chunk(height: int, width: int) -> int:
    return max(1, min(CHUNK, CHUNK_PIXELS // (height * width)))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (..., 3, H, W) in [-1, 1] -> mean and standard deviation of the shifted and scaled latents (..., C, h, w).

    In the autoencoder's own dtype, whatever autocast is on around it: latents on disk and in training are the same.
    """
    with torch.autocast(images.device.type, enabled=False):
        chunks = images.to(vae.dtype).flatten(0, -4).split(_chunk(*images.shape[-2:]))
        posteriors = [vae.encode(chunk).latent_dist for chunk in chunks]
    scale, leading = vae.config.scaling_factor, images.shape[:-3]
    mean, std = (torch.cat([getattr(p, name).float() for p in posteriors]) for name in ("mean", "std"))
    return ((mean - shift_factor(vae)) * scale).unflatten(0, leading), (std * scale).unflatten(0, leading)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (..., C, h, w) -> images (..., 3, H, W), about [-1, 1], float32. Of clips (N, F, C, h, w) a
    temporal decoder sees several frames at once.

    In the autoencoder's own dtype, as `encode`.

    Raises FloatingPointError if latents or images are not finite (an fp16 autoencoder may overflow: use bf16).
    """
    if not torch.isfinite(latents).all():
        raise FloatingPointError("latents are not finite before decoding")
    scaled = (latents / vae.config.scaling_factor + shift_factor(vae)).to(vae.dtype)
    with torch.autocast(latents.device.type, enabled=False):
        if isinstance(vae, AutoencoderKLTemporalDecoder):
            chunks = [chunk for clip in scaled for chunk in clip.split(TEMPORAL_CHUNK)]
            parts = [vae.decode(chunk, num_frames=len(chunk)).sample for chunk in chunks]
        else:
            height, width = (side * downsampling(vae) for side in latents.shape[-2:])
            parts = [vae.decode(chunk).sample for chunk in scaled.flatten(0, -4).split(_chunk(height, width))]
    images = torch.cat(parts).float().unflatten(0, latents.shape[:-3])
    if not torch.isfinite(images).all():
        raise FloatingPointError(f"images are not finite after decoding in {vae.dtype}: decode in bf16 or float32")
    return images
