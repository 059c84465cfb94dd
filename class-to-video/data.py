"""Clips, or latents made of them once, with images of other clips for joint training."""

from diffusers import AutoencoderKL

from skipdit.data.clips import ClipData, ClipDataset, ClipFolder
from skipdit.data.latents import ClipLatents, expected_latents


def make_dataset(config: ClipData, vae: AutoencoderKL) -> ClipDataset:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    expected = expected_latents(config.latents, config.image_size, vae)
    if config.kind in ("videos", "frames"):
        return ClipFolder(config)
    if config.kind == "latents":
        if config.classes or config.clip_list or config.captions:
            raise ValueError(
                "latents hold the clips of their encoding: leave out data.classes and data.clip_list, and data.captions"
            )
        drawn = (config.num_frames, config.frame_interval, config.images)
        return ClipLatents(config.path, *drawn, expected, config.images_from)
    raise ValueError(f"data.kind is {config.kind!r}; it is videos, frames or latents")
