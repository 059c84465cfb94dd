"""Images, or latents made of them once."""

from dataclasses import dataclass

from diffusers import AutoencoderKL
from torch.utils.data import Dataset

from skipdit.config import setting
from skipdit.data.images import FashionMNIST, ImageFolder
from skipdit.data.latents import Latents, expected_latents


@dataclass
class DataConfig:
    """Where training images come from."""

    kind: str = setting("image_folder", "image_folder, fashion_mnist, or latents (made by `python -m skipdit.encode`)")
    path: str = setting("data/imagenet/train", "folder of the images or latents")
    image_size: int = setting(256, "pixels along a side")
    latents: str = setting("sample", "mean or sample: what of the autoencoder's posterior is trained on")
    flip: bool = setting(True, "flip half of the images horizontally")


def make_dataset(config: DataConfig, vae: AutoencoderKL) -> Dataset:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    expected = expected_latents(config.latents, config.image_size, vae)
    if config.kind == "image_folder":
        return ImageFolder(config.path, config.image_size)
    if config.kind == "fashion_mnist":
        return FashionMNIST(config.path, config.image_size)
    if config.kind == "latents":
        return Latents(config.path, expected)
    raise ValueError(f"data.kind is {config.kind!r}; it is image_folder, fashion_mnist or latents")
