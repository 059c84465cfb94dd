"""What a training asks of a model: to undo Gaussian diffusion, or the velocity of flow matching."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from skipdit.diffusion.flow import SCALE, path, shifted, velocity_loss
from skipdit.diffusion.gaussian import Diffusion
from skipdit.training.settings import TrainConfig
from skipdit.training.steps import Draw


class Noised(NamedTuple):
    """Latents with noise, and what to make of a model's output for them.

    Attributes:
        x: (N, ..., C, h, w).
        t: timesteps (N,), as the model reads them.
        losses: output (N, ..., 2C, h, w) -> (N,), float32.
    """

    x: Tensor
    t: Tensor
    losses: Callable[[Tensor], Tensor]


Objective = Callable[[Tensor, Draw], Noised]  # clean latents (N, ..., C, h, w), the step's random numbers


def make_objective(config: TrainConfig, diffusion: Diffusion | None = None) -> Objective:
    """Return the objective that settings ask for.

    Args:
        diffusion: the task's process, where it is not the default one.
    """
    diffusion = diffusion or Diffusion()

    def denoise(x0: Tensor, draw: Draw) -> Noised:
        t, noise = draw.randint(len(diffusion)), draw.randn(*x0.shape[1:])
        x = diffusion.q_sample(x0, t, noise)
        return Noised(x, t, lambda out: diffusion.losses(out, x0, x, t, noise, config.min_snr)["loss"])

    def flow(x0: Tensor, draw: Draw) -> Noised:
        t = draw.rand() if config.flow_times == "uniform" else draw.randn().sigmoid()
        t, noise = shifted(t, config.flow_shift), draw.randn(*x0.shape[1:])
        return Noised(path(x0, noise, t), SCALE * t, lambda out: velocity_loss(out, x0, noise))

    return flow if config.objective == "flow" else denoise
