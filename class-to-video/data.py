"""Clips, or latents made of them once, with images of other clips for joint training."""

from diffusers import AutoencoderKL

from skipdit.data.clips import ClipData, ClipDataset
from skipdit.data.latents import open_clips


def make_dataset(config: ClipData, vae: AutoencoderKL) -> ClipDataset:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    return open_clips(config, vae)
