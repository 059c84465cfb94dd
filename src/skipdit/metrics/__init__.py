"""How close images are to each other (fidelity), and sets of images to each other (Fréchet distance)."""

from skipdit.metrics.fidelity import psnr, ssim
from skipdit.metrics.frechet import frechet_distance, gaussian_frechet_distance, moments

__all__ = ["frechet_distance", "gaussian_frechet_distance", "moments", "psnr", "ssim"]
