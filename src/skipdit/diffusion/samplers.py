"""Sampling loops: plain functions of a model and noise (DDPM, DDIM, and the multistep solvers of diffusers)."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from skipdit.diffusion.flow import FLOW_SOLVERS, SCALE, StraightPath, make_flow_scheduler
from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.schedulers import SOLVERS, make_gaussian_scheduler
from skipdit.utils.errors import UserError

Model = Callable[[Tensor, Tensor, int], Tensor]  # (x, timesteps (N,), step index from 0) -> (N, ..., 2C, H, W)
Callback = Callable[[int, Tensor, Tensor], None]  # (step index, x after the step, predicted x0)
PROCESS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # `Diffusion`
Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(shape: Sequence[int], generators: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise. With one generator per sample, row i depends on generator i alone."""
    if generators is None or isinstance(generators, torch.Generator):
        return torch.randn(shape, generator=generators, device=device, dtype=dtype)
    return torch.stack([torch.randn(shape[1:], generator=g, device=device, dtype=dtype) for g in generators])


def _walk(diffusion: Diffusion, x: Tensor, progress: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Step index i, table index k and timesteps (N,), noise to image."""
    for i in tqdm(range(len(diffusion)), disable=not progress, desc="sampling", unit="step", leave=False):
        k = len(diffusion) - 1 - i
        yield i, k, torch.full((len(x),), diffusion.timesteps[k], device=x.device)


@torch.no_grad()
def ddpm(
    model: Model, x: Tensor, diffusion: Diffusion, generators: Generators = None,
    callback: Callback | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Ancestral sampling with the learned variance (DDPM algorithm 2).

    Args:
        model: `model(x, timesteps, i)`; i is the step index that `SkipCache.at` wants.
        x: noise (N, ..., C, H, W).
        generators: one, or one per sample, on x's device.
        callback: called after every step.
    """
    for i, k, t in _walk(diffusion, x, progress):
        p = diffusion.posterior(model(x, t, i).to(x.dtype), x, k)
        x = p.mean
        if k > 0:
            x = x + (p.log_variance / 2).exp() * randn(x.shape, generators, x.device, x.dtype)
        if callback is not None:
            callback(i, x, p.pred_x0)
    return x


@torch.no_grad()
def ddim(
    model: Model, x: Tensor, diffusion: Diffusion, generators: Generators = None, eta: float = 0.0,
    callback: Callback | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Deterministic sampling for eta 0, ancestral-like for 1 (DDIM eq. 12, 16). Arguments as in `ddpm`."""
    for i, k, t in _walk(diffusion, x, progress):
        out = model(x, t, i).to(x.dtype)
        x0 = diffusion.pred_x0(out, x, k)
        noise = (diffusion.coefficient("x0_from_x", k, x) * x - x0) / diffusion.coefficient("x0_from_noise", k, x)
        signal, previous = diffusion.coefficient("signal", k, x), diffusion.coefficient("previous", k, x)
        sigma = eta * math.sqrt((1 - previous) / (1 - signal) * (1 - signal / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(1 - previous - sigma**2) * noise
        if sigma > 0:
            x = x + sigma * randn(x.shape, generators, x.device, x.dtype)
        if callback is not None:
            callback(i, x, x0)
    return x


def make_solver(name: str, steps: int, flow_shift: float | None = None) -> SchedulerMixin:
    """Make a solver for the noise schedule of `Diffusion`, or for the path of flow matching, with its timesteps set.

    Args:
        name: "deis" (arXiv 2204.13902), "dpm" (DPM-Solver++, 2211.01095) or "unipc" (2302.04867), of order 2; with a 3
            behind it, of order 3. For flow matching one of `FLOW_SOLVERS`.
        steps: at even distances from timestep 999 on.
        flow_shift: of a model trained by flow matching, see `make_flow_scheduler`; None for `Diffusion`.

    Raises ValueError for other names, or other steps than a whole number from 1 to 999.
    """
    if flow_shift is None and name not in SOLVERS:
        reason = ", for models trained by flow matching, and this one was not" if name in FLOW_SOLVERS else ""
        raise UserError(f"solver is {name!r}{reason}; known: {', '.join(SOLVERS)}")
    if not isinstance(steps, int) or not 1 <= steps < 1000:
        raise UserError(f"steps are {steps!r}; the sampler {name} takes a number from 1 to 999")
    flows = flow_shift is not None
    solver = make_flow_scheduler(name, flow_shift) if flows else make_gaussian_scheduler(name, PROCESS)
    solver.set_timesteps(steps)
    return solver


@torch.no_grad()
def multistep(
    model: Model, x: Tensor, solver: SchedulerMixin, callback: Callback | None = None, progress: bool = False
) -> Tensor:
    """Sample with a solver of `make_solver`, which may read outputs of earlier steps. Arguments as in `ddpm`."""
    channels = x.shape[-3]
    for i, timestep in enumerate(
        tqdm(solver.timesteps, disable=not progress, desc="sampling", unit="step", leave=False)
    ):
        t = torch.full((len(x),), timestep.item(), device=x.device)
        out = model(x, t, i).to(x.dtype).narrow(-3, 0, channels)
        x0 = _pred_x0(solver, out, x, timestep.item())
        x = solver.step(out, timestep, x).prev_sample
        if callback is not None:
            callback(i, x, x0)
    return x


def _pred_x0(solver: SchedulerMixin, out: Tensor, x: Tensor, timestep: float) -> Tensor:
    """x0 that the noise, or the velocity, in a model's output implies."""
    if isinstance(solver, StraightPath):
        return x - timestep / SCALE * out
    signal = solver.alphas_cumprod[timestep].item()
    return (x - math.sqrt(1 - signal) * out) / math.sqrt(signal)
