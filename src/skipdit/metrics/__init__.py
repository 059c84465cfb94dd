"""How close images are to each other, sets of them to sets of real ones, and both to their prompts.

`skipdit evaluate` computes all of it from a sampler's output folder.
"""

from skipdit.metrics.fidelity import (
    FIDELITY_COLUMNS,
    IDENTICAL,
    fidelity_cells,
    mean_psnr,
    measure_fidelity,
    psnr,
    sample_psnr,
    ssim,
)
from skipdit.metrics.frechet import frechet_distance, gaussian_frechet_distance, moments

__all__ = [
    "FIDELITY_COLUMNS",
    "IDENTICAL",
    "fidelity_cells",
    "frechet_distance",
    "gaussian_frechet_distance",
    "mean_psnr",
    "measure_fidelity",
    "moments",
    "psnr",
    "sample_psnr",
    "ssim",
]
