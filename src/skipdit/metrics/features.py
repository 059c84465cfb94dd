"""Features of samples, by the network of a metric."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skipdit.metrics.kept import kept_rows
from skipdit.metrics.networks import Network
from skipdit.metrics.samples import Samples, fitted
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError


def features_of(
    samples: Samples,
    network: Network,
    folder: Path,
    batch_size: int,
    size: tuple[int, int],
    frames: int = 1,
    most: int | None = None,
) -> Tensor:
    """Return features (N, D) float32 on the CPU, computed once.

    Args:
        folder: where they are kept.
        batch_size: samples per call of the network.
        size: height and width that samples of another size are cropped and resized to.
        frames: of a clip, the first ones.
        most: samples, at most.

    Raises ValueError for clips that are too short, or a network that does not give a row of finite numbers per sample.
    """

    def compute(indices: list[int]) -> Tensor:
        pixels = [samples[i] for i in indices]
        for i, sample in zip(indices, pixels, strict=True):
            if len(sample) < frames:
                raise UserError(f"{samples.source / samples.names[i]} has {len(sample)} frames, fewer than {frames}")
        return checked(network, torch.stack([fitted(sample[:frames], size) for sample in pixels]))

    key = {"network": network.name, "sha256": network.sha256, "frames": frames, "size": list(size)}
    key |= {"source": str(samples.source.resolve())}
    count = min(len(samples), most or len(samples))
    return kept_rows(folder, key, count, samples.stamp, compute, batch_size, samples.source.name)


def shipped_statistics(samples: Samples, network: str | None, option: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and covariance of features that a file brings along, which ADM's suite prefers, too; None if they are
    to be made of its images.

    Args:
        network: the option's value, for one that is not the network of FID.

    Raises ValueError if the file holds nothing but statistics of another network.
    """
    if samples.statistics is not None and not network:
        return samples.statistics
    if not len(samples):
        raise UserError(f"{samples.source} holds only statistics by the network of FID: leave out {option}")
    return None


def checked(network: Network, pixels: Tensor) -> Tensor:
    """Return features (N, D) of pixels uint8 (N, F, 3, H, W). Raises ValueError if they are not, or not finite."""
    features = network.features(pixels.to(process_state().device))
    if features.ndim != 2 or len(features) != len(pixels) or not features.isfinite().all():
        raise UserError(f"{network.file} gave {tuple(features.shape)} for {len(pixels)} samples, or not finite numbers")
    return features
