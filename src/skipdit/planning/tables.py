"""Errors of images, and tables of them."""

import math
from collections.abc import Iterator

import numpy as np

from skipdit.planning.fitting import TINY


def distance(images: np.ndarray, reference: np.ndarray) -> float:
    """The root of the mean squared difference of images: the geometric mean over samples, as a mean of PSNRs is."""
    squares = np.square(images - reference).reshape(len(images), -1).mean(1, dtype=np.float64)
    return float(np.exp(np.log(np.maximum(squares, TINY)).mean() / 2))


def table(errors: dict[str, float], target: str) -> Iterator[str]:
    """Lines that show errors, the smallest first."""
    what = "the converged images" if target == "converged" else "the uncached images"
    yield f"\n{'distance to ' + what:40s}  error   PSNR"
    for name, error in sorted(errors.items(), key=lambda item: item[1]):
        yield f"{name:40s}  {error:.4f}  {psnr_of(error):5.1f}"


def cost_table(seconds: dict[str, float], costs: dict[str, dict[str, float]]) -> Iterator[str]:
    """Lines that show what a step of each kind costs: seconds, and the shares of a full step."""
    yield "\nstep       seconds   time  FLOPs"
    for kind, each in seconds.items():
        yield f"{kind:8s}  {each:8.4f}  {costs['time'][kind]:.3f}  {costs['flops'][kind]:.3f}"


def psnr_of(error: float) -> float:
    """PSNR in dB of an error as `Bench.error` gives it."""
    return math.inf if error < 2e-10 else -20 * math.log10(error)
