"""Diffusion: the Gaussian process that models are trained on, and the loops that sample it."""

from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.samplers import ddim, ddpm, make_solver, multistep

__all__ = ["Diffusion", "ddim", "ddpm", "make_solver", "multistep"]
