"""Captioned clips, or latents made of them once, with captioned images for joint training."""

from diffusers import AutoencoderKL

from skipdit.data.clips import ClipData, ClipDataset
from skipdit.data.latents import open_clips


def make_dataset(config: ClipData, vae: AutoencoderKL) -> ClipDataset:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    dataset = open_clips(config, vae)
    if dataset.captions is None:
        fix = "encode them again with --captions" if config.kind == "latents" else "set data.captions"
        raise ValueError(f"{config.path}: the clips have no captions; {fix}")
    return dataset
