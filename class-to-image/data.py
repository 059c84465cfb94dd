"""Images, or latents made of them once, and how a batch of either becomes clean latents."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from skipdit.config import setting
from skipdit.data.images import FashionMNIST, ImageFolder, to_float
from skipdit.data.latents import LatentInfo, Latents
from skipdit.train import Draw
from skipdit.vae import encode
from skipdit.weights import fingerprint


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
    if config.latents not in ("mean", "sample"):
        raise ValueError(f"data.latents is {config.latents!r}; it is 'mean' or 'sample'")
    if config.kind == "image_folder":
        return ImageFolder(config.path, config.image_size)
    if config.kind == "fashion_mnist":
        return FashionMNIST(config.path, config.image_size)
    if config.kind == "latents":
        info = LatentInfo(fingerprint(vae), vae.config.scaling_factor, config.latents, "float16", config.image_size)
        return Latents(config.path, info)
    raise ValueError(f"data.kind is {config.kind!r}; it is image_folder, fashion_mnist or latents")


def clean_latents(batch: dict, config: DataConfig, vae: AutoencoderKL, draw: Draw) -> Tensor:
    """A batch of either kind -> latents (N, C, h, w), float32, flipped at random where the config says so."""
    flipped = draw.rand() < 0.5
    if "mean" in batch:
        rows, copy = torch.arange(len(flipped), device=draw.device), (flipped & config.flip).long()
        mean = batch["mean"][rows, copy].float()
        std = batch["std"][rows, copy].float() if config.latents == "sample" else None
    else:
        images = to_float(batch["image"])
        if config.flip:
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        mean, std = encode(vae.to(images.device), images)
    return mean + std * draw.randn(*mean.shape[1:]) if config.latents == "sample" else mean
