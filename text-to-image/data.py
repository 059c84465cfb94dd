"""Captioned pictures, or latents made of them once; of any shape, in buckets of aspect ratios."""

from diffusers import AutoencoderKL

from skipdit.data.latents import PictureLatents, open_pictures
from skipdit.data.pictures import PictureData, PictureFolder


def make_dataset(config: PictureData, vae: AutoencoderKL) -> PictureFolder | PictureLatents:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    return open_pictures(config, vae)
