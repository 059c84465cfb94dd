"""Diffusion: the Gaussian process that models are trained on, and the loops that sample it."""

from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.samplers import ddim, ddpm

__all__ = ["Diffusion", "ddim", "ddpm"]
