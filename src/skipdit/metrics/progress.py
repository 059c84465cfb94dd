"""The Fréchet distance of a model while it is trained."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from skipdit.metrics.features import checked, features_of, shipped_statistics
from skipdit.metrics.frechet import gaussian_frechet_distance, moments
from skipdit.metrics.networks import load_image_network
from skipdit.metrics.samples import open_samples
from skipdit.training.settings import JudgeConfig
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError

BATCH = 32  # images per call of the network


class FrechetJudge:
    """Measures samples against real images, as `skipdit evaluate fid` does.

    Args:
        size: height and width of the samples; real images of another size are cropped and resized to it.
        folder: where features of the real images are kept.

    Raises FileNotFoundError or ValueError if the real images or the network are not there or do not fit each other.
    """

    def __init__(self, config: JudgeConfig, size: tuple[int, int], folder: Path):
        if config.reference is None:
            raise UserError(f"judge.every={config.every} needs judge.reference: a folder of real images, or an .npz")
        device, real = process_state().device, open_samples(config.reference)
        self.network = load_image_network(config.network, None, device)
        self.real = shipped_statistics(real, config.network, "judge.network")
        if self.real is not None:
            self([torch.zeros(2, 3, *size, dtype=torch.uint8)])  # what does not fit is told before the training
        else:
            self.real = moments(features_of(real, self.network, folder, BATCH, size))

    def __call__(self, batches: Iterable[Tensor]) -> float:
        """Return the Fréchet distance of images, in batches uint8 (N, 3, H, W)."""
        rows = []
        for images in batches:  # sampled on the way, in whatever precision
            with torch.autocast(process_state().device.type, enabled=False):
                rows += [checked(self.network, part[:, None]).cpu() for part in images.split(BATCH)]
        return gaussian_frechet_distance(*moments(torch.cat(rows)), *self.real)
