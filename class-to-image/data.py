"""Images, or latents made of them once."""

from diffusers import AutoencoderKL
from torch.utils.data import Dataset

from skipdit.data.images import IMAGES, ImageData
from skipdit.data.latents import Latents, expected_latents


def make_dataset(config: ImageData, vae: AutoencoderKL) -> Dataset:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    expected = expected_latents(config.latents, config.image_size, vae)
    if config.kind in IMAGES:
        return IMAGES[config.kind](config.path, config.image_size)
    if config.kind == "latents":
        return Latents(config.path, expected)
    raise ValueError(f"data.kind is {config.kind!r}; it is {', '.join(IMAGES)} or latents")
