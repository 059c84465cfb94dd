"""Flow matching: the straight path from data to noise, x_t = (1 - t) x0 + t noise, whose velocity a model predicts.

Papers: rectified flow (arXiv 2209.03003), SiT (2401.08740), Stable Diffusion 3 (2403.03206, the shift of times). A
model reads 1000 t as its timestep; of its output (N, ..., 2C, H, W) only the first C channels are used.
"""

from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from skipdit.utils.errors import UserError

SCALE = 1000  # timesteps per unit of time
_START = 1 - 1e-6  # solvers take the logarithm of 1 - t


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise for a shift above 1, which more pixels want (2403.03206, eq. 23); 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def path(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Points at times t (N,) of the path from x0 to noise, both (N, ...)."""
    return torch.lerp(x0, noise, t.view(-1, *[1] * (x0.ndim - 1)))


def velocity_loss(out: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error (N,) of the velocity in a model's output, float32; at every time it is noise - x0."""
    velocity = out.float().narrow(-3, 0, x0.shape[-3])
    return (velocity - (noise.float() - x0.float())).square().flatten(1).mean(1)


class StraightPath:
    """Makes a scheduler of diffusers visit equal parts of the path, shifted, down to t = 0, and tell exact timesteps:
    diffusers' own cut them to whole numbers, or spend the last step on next to nothing.
    """

    init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        n, calls = num_inference_steps, self.order
        times = shifted(torch.arange(n, -1, -1, dtype=torch.float64) / n, self.shift).clamp(max=_START).float()
        first, inner, last = times[:1], times[1:-1].repeat_interleave(calls), times[-1:]
        self.sigmas = torch.cat([first, inner, last])
        self.timesteps = (self.sigmas[:-1] * SCALE).to(device)

    @property
    def shift(self) -> float:
        return self.config.flow_shift

    def scale_model_input(self, sample: Tensor, *args: Any) -> Tensor:
        return sample


class _DPM(StraightPath, DPMSolverMultistepScheduler):
    pass


class _UniPC(StraightPath, UniPCMultistepScheduler):
    pass


class _Heun(StraightPath, FlowMatchHeunDiscreteScheduler):
    @property
    def shift(self) -> float:
        return self.config.shift


_MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_SOLVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "euler": (_DPM, {"solver_order": 1}),  # on this path, DPM-Solver++ of first order is Euler's method
    "heun": (_Heun, {}),
    "dpm": (_DPM, {"solver_order": 2}),
    "dpm3": (_DPM, {"solver_order": 3}),
    "unipc": (_UniPC, {"solver_order": 2}),
    "unipc3": (_UniPC, {"solver_order": 3}),
}
FLOW_SOLVERS = tuple(_SOLVERS)


def make_flow_scheduler(name: str, shift: float) -> SchedulerMixin:
    """Make a scheduler for a model trained by flow matching. (diffusers' DEIS stops before the end of this path.)

    Args:
        name: one of `FLOW_SOLVERS`; "heun" calls the model twice in every step but the last.
        shift: of the times that the model was trained on, see `shifted`.

    Raises ValueError for other names.
    """
    if name not in _SOLVERS:
        known = ", ".join(FLOW_SOLVERS)
        raise UserError(f"the model was trained by flow matching, which {name!r} does not sample; choose {known}")
    kind, settings = _SOLVERS[name]
    if kind is _Heun:
        return kind(SCALE, shift=shift)
    return kind(SCALE, flow_shift=shift, **settings, **_MULTISTEP)
