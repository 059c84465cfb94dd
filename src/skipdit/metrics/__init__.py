"""How close images are to each other, sets of them to sets of real ones, and both to their prompts.

`python -m skipdit evaluate` computes all of it from a sampler's output folder.
"""

from skipdit.metrics.fidelity import IDENTICAL, mean_psnr, psnr, ssim
from skipdit.metrics.frechet import frechet_distance, gaussian_frechet_distance, moments

__all__ = ["IDENTICAL", "frechet_distance", "gaussian_frechet_distance", "mean_psnr", "moments", "psnr", "ssim"]
