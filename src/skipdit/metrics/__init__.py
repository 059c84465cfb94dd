"""How close images are to each other, sets of them to sets of real ones, and both to their prompts.

`python -m skipdit.evaluate` computes all of it from a sampler's output folder.
"""

from skipdit.metrics.fidelity import psnr, ssim
from skipdit.metrics.frechet import frechet_distance, gaussian_frechet_distance, moments

__all__ = ["frechet_distance", "gaussian_frechet_distance", "moments", "psnr", "ssim"]
