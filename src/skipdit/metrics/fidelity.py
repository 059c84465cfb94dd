"""Image against image: PSNR and SSIM. Images are uint8 (N, C, H, W), as they are saved; frames of a video are N images.

`skipdit.utils.pixels.to_uint8` makes them of floats in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from skipdit.utils.device import double
from skipdit.utils.errors import UserError

PEAK = 255  # data range of 8-bit images
WINDOW, SIGMA = 11, 1.5  # side and standard deviation of SSIM's Gaussian window, pixels
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2  # keep SSIM's quotients finite on flat regions
IDENTICAL = 100.0  # dB that count for identical images, in means
FIDELITY_COLUMNS = ("PSNR dB", "±", "SSIM")  # titles of `fidelity_cells`


def measure_fidelity(samples: Tensor, reference: Tensor) -> dict[str, float | bool | None]:
    """Compare a set of images or clips with another one, each sample with its namesake.

    Args:
        samples: uint8 (N, ..., C, H, W).
        reference: the same of the reference, sample by sample.

    Returns:
        `psnr`: mean of `sample_psnr` over samples, dB; `psnr_error`: its standard error, None for one sample; `ssim`:
        mean over all images; `identical`: whether the sets are equal. Raises ValueError as `psnr` and `ssim` do.
    """
    decibels = sample_psnr(samples, reference)
    return {
        "psnr": decibels.mean().item(),
        "psnr_error": decibels.std().item() / math.sqrt(len(decibels)) if len(decibels) > 1 else None,
        "ssim": ssim(samples.flatten(0, -4), reference.flatten(0, -4)).mean().item(),
        "identical": torch.equal(samples, reference),
    }


def fidelity_cells(row: dict) -> list[str]:
    """PSNR, its error and SSIM of a row that holds what `measure_fidelity` returns, as tables show them, or dashes."""
    if "psnr" not in row:
        return ["–", "–", "–"]
    error = f"{row['psnr_error']:.2f}" if row["psnr_error"] else ""
    return [*(["same", ""] if row["identical"] else [f"{row['psnr']:.2f}", error]), f"{row['ssim']:.3f}"]


def sample_psnr(samples: Tensor, reference: Tensor) -> Tensor:
    """Mean PSNR of every sample over its frames, uint8 (N, ..., C, H, W) -> (N,), in dB; see `mean_psnr`."""
    frames = psnr(samples.flatten(0, -4), reference.flatten(0, -4)).unflatten(0, (len(samples), -1))
    return torch.stack([mean_psnr(sample) for sample in frames])


def mean_psnr(values: Tensor) -> Tensor:
    """Mean over images (N,), in dB, of which some may be identical: these count `IDENTICAL`."""
    return values.clamp(max=IDENTICAL).mean()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of image pairs in dB, over all channels together; identical images give inf.

    Args:
        a: uint8 (N, C, H, W).
        b: as a.

    Returns:
        (N,), float32. Raises ValueError for other dtypes or differing shapes.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # here: it takes a second to import

    _check(a, b)
    return peak_signal_noise_ratio(a.float(), b.float(), data_range=float(PEAK), reduction="none", dim=(1, 2, 3))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of image pairs, at most 1: mean over channels and all places where the window fits.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, equation 13, with its
    Gaussian window of 11 pixels; biased covariances.

    Args:
        a: uint8 (N, C, H, W), at least 11 pixels high and wide.
        b: as a.

    Returns:
        (N,), float64. Raises ValueError for other dtypes, differing shapes or smaller images.
    """
    _check(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise UserError(f"SSIM's window is {WINDOW} pixels; images of {a.shape[-2]}x{a.shape[-1]} are too small")
    # One pair at a time: five float64 maps per channel of a large batch would not fit in memory.
    return torch.stack([_ssim_of_pair(double(x), double(y)) for x, y in zip(a, b, strict=True)])


def _ssim_of_pair(a: Tensor, b: Tensor) -> Tensor:
    """a, b (C, H, W), float64 -> scalar.

    torchmetrics has the same map, by a window of two dimensions: in float64 it takes 5 to 25 times as long. In float32
    it is off by up to 1e-3 where images are white, and its mean counts a border of mirrored pixels since version 1.5.
    """
    offsets = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    weights = torch.softmax(-(offsets**2) / (2 * SIGMA**2), dim=0)
    maps = torch.cat([a, b, a * a, b * b, a * b])  # (5C, H, W)
    row, count = weights.expand(len(maps), 1, 1, WINDOW), len(maps)
    local = F.conv2d(F.conv2d(maps, row.mT, groups=count), row, groups=count)
    mean_a, mean_b, square_a, square_b, product = local.chunk(5)  # 5 x (C, H - 10, W - 10)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).mean()


def _check(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(
            f"images are {a.dtype} and {b.dtype}, they must be uint8; `skipdit.utils.pixels.to_uint8` converts [-1, 1]"
        )
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images are {tuple(a.shape)} and {tuple(b.shape)}; both must be the same (N, C, H, W)")
