"""Diffusion: the Gaussian process that models are trained on, and the loops that sample it."""

from typing import TYPE_CHECKING

from skipdit.utils.lazy import lazy_names

if TYPE_CHECKING:
    from skipdit.diffusion.gaussian import Diffusion
    from skipdit.diffusion.samplers import ddim, ddpm, make_solver, multistep

__all__ = ["Diffusion", "ddim", "ddpm", "make_solver", "multistep"]
__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "diffusion.samplers") | {"Diffusion": "diffusion.gaussian"})
