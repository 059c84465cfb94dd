"""Gaussian diffusion with a learned variance: respacing, losses, DDPM and DDIM.

Papers: DDPM (arXiv 2006.11239), improved DDPM (2102.09672, "iDDPM" below), DDIM (2010.02502), v (2202.00512). Shapes: x
(N, ..., C, H, W), pictures or clips; model output (N, ..., 2C, H, W): what it predicts, noise or v, then the
interpolation coefficient of the log variance.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skipdit.utils.errors import UserError


def respace(steps: int | str | Sequence[int], train_steps: int = 1000) -> list[int]:
    """Which of the training timesteps a shorter run visits, ascending.

    Args:
        steps: 250 spreads 250 steps over the whole range, ends included (iDDPM, section 4); "ddim50" strides
            evenly from 0, as DDIM does (section 5.1); a list is the timesteps themselves, in any order.
    """
    if isinstance(steps, Sequence) and not isinstance(steps, str):
        if len(set(steps)) < len(steps) or not all(0 <= t < train_steps for t in steps):
            raise UserError(f"timesteps {list(steps)!r:.60} are not all different and between 0 and {train_steps - 1}")
        return sorted(steps)
    text = str(steps)
    if text.startswith("ddim"):
        wanted = int(text.removeprefix("ddim"))
        for stride in range(1, train_steps):
            if len(range(0, train_steps, stride)) == wanted:
                return list(range(0, train_steps, stride))
        raise UserError(
            f"no integer stride over {train_steps} timesteps gives {wanted} steps; write {wanted} without 'ddim'"
        )
    wanted = int(text)
    if not 1 <= wanted <= train_steps:
        raise UserError(f"sampling steps are {wanted}; they must be between 1 and {train_steps}")
    stride = (train_steps - 1) / max(wanted - 1, 1)
    position, visited = 0.0, []
    for _ in range(wanted):  # added up, not multiplied: the released code's rounding falls that way
        visited.append(round(position))
        position += stride
    return visited


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, predicted x0), elementwise Gaussian."""

    mean: Tensor
    log_variance: Tensor
    pred_x0: Tensor


class Diffusion:
    """The noise schedule: betas that rise over `train_steps`, visited at `timesteps`, and what the model predicts.

    Args:
        steps: visited steps, see `respace`; None visits all.
        train_steps: the betas are scaled so that any number of them ends in the same noise as 1000.
        beta_start: the first beta.
        beta_end: the last beta; linear between them, or, with `scaled`, linear in the square root (latent diffusion).
        prediction: "noise", or "v": sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x0.

    Indices k below run over the visited timesteps, ascending; k = 0 is the last step of sampling. They are a Python int
    (sampling: coefficients are numbers, nothing touches the device) or a tensor (N,) (training).
    """

    def __init__(
        self,
        steps: int | str | Sequence[int] | None = None,
        train_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        scaled: bool = False,
        prediction: str = "noise",
    ):
        if prediction not in ("noise", "v"):
            raise UserError(f"prediction is {prediction!r}; it is 'noise' or 'v'")
        self.train_steps, self.prediction = train_steps, prediction
        self.timesteps = list(range(train_steps)) if steps is None else respace(steps, train_steps)
        power = 2 if scaled else 1
        ends = (beta ** (1 / power) for beta in (beta_start, beta_end))
        betas = torch.linspace(*ends, train_steps, dtype=torch.float64) ** power * (1000 / train_steps)
        signal = (1 - betas).cumprod(0)[self.timesteps]  # alpha-bar at the visited timesteps
        previous = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        beta = 1 - signal / previous
        variance = beta * (1 - previous) / (1 - signal)  # DDPM eq. 7
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(beta) > 1 else beta  # the variance at k = 0 is zero
        self._tables = {
            "sqrt_signal": signal.sqrt(),
            "sqrt_noise": (1 - signal).sqrt(),
            "x0_from_x": signal.rsqrt(),
            "x0_from_noise": (1 / signal - 1).sqrt(),
            "mean_from_x0": beta * previous.sqrt() / (1 - signal),  # DDPM eq. 7
            "mean_from_x": (1 - previous) * (1 - beta).sqrt() / (1 - signal),
            "min_log": clipped.log(),  # the two ends that the learned variance interpolates (iDDPM eq. 15)
            "max_log": beta.log(),
            "variance": variance,
            "signal": signal,
            "previous": previous,
        }
        self._numbers = {name: table.tolist() for name, table in self._tables.items()}
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sampling_timesteps(self) -> list[int]:
        """The timesteps in sampling order, noise to image: what a `SkipCache` wants to know."""
        return self.timesteps[::-1]

    def coefficient(self, name: str, k: int | Tensor, like: Tensor) -> float | Tensor:
        """Entry k of a table: a number for an int, float32 (N, 1, ...) shaped to broadcast over `like` for a tensor."""
        if isinstance(k, int):
            return self._numbers[name][k]
        if like.device not in self._on_device:
            self._on_device[like.device] = {n: table.float().to(like.device) for n, table in self._tables.items()}
        return self._on_device[like.device][name][k].view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, k: int | Tensor, noise: Tensor) -> Tensor:
        """x_t given x0 (DDPM eq. 4)."""
        return self.coefficient("sqrt_signal", k, x0) * x0 + self.coefficient("sqrt_noise", k, x0) * noise

    def target(self, x0: Tensor, k: int | Tensor, noise: Tensor) -> Tensor:
        """What the model is to predict: the noise, or v (2202.00512, section 4 and appendix D)."""
        if self.prediction == "noise":
            return noise
        return self.coefficient("sqrt_signal", k, x0) * noise - self.coefficient("sqrt_noise", k, x0) * x0

    def pred_x0(self, out: Tensor, x: Tensor, k: int | Tensor) -> Tensor:
        """x0 that the prediction (the first C channels of out) implies."""
        predicted = out.narrow(-3, 0, x.shape[-3])
        if self.prediction == "v":
            return self.coefficient("sqrt_signal", k, x) * x - self.coefficient("sqrt_noise", k, x) * predicted
        return self.coefficient("x0_from_x", k, x) * x - self.coefficient("x0_from_noise", k, x) * predicted

    def posterior(self, out: Tensor, x: Tensor, k: int | Tensor) -> Posterior:
        """p(x_{t-1} | x_t) from the model's output (DDPM eq. 7, iDDPM eq. 15)."""
        x0 = self.pred_x0(out, x, k)
        mean = self.coefficient("mean_from_x0", k, x) * x0 + self.coefficient("mean_from_x", k, x) * x
        fraction = (out.narrow(-3, x.shape[-3], x.shape[-3]) + 1) / 2
        low, high = self.coefficient("min_log", k, x), self.coefficient("max_log", k, x)
        return Posterior(mean, fraction * high + (1 - fraction) * low, x0)

    def losses(
        self, out: Tensor, x0: Tensor, x: Tensor, k: Tensor, noise: Tensor, min_snr: float = 0.0
    ) -> dict[str, Tensor]:
        """Per-sample training losses (N,), in float32.

        `mse` trains the prediction; `vb`, the variational bound in bits per dimension (iDDPM eq. 4-6), trains the
        variance only: the prediction is detached in it. `loss` is their sum. With `min_snr`, `mse` is the error of x0,
        weighted by the signal-to-noise ratio or by `min_snr`, whichever is less (arXiv 2303.09556).
        """
        out, x0, x, noise = out.float(), x0.float(), x.float(), noise.float()
        predicted, fraction = out.chunk(2, dim=-3)
        mse = _mean((predicted - self.target(x0, k, noise)).square())
        if min_snr:
            signal = self.coefficient("signal", k, mse)
            ratio = signal / (1 - signal)
            mse = mse * ratio.clamp(max=min_snr) / (ratio if self.prediction == "noise" else ratio + 1)

        p = self.posterior(torch.cat([predicted.detach(), fraction], dim=-3), x, k)
        true_mean = self.coefficient("mean_from_x0", k, x) * x0 + self.coefficient("mean_from_x", k, x) * x
        kl = normal_kl(true_mean, self.coefficient("min_log", k, x), p.mean, p.log_variance)
        nll = -discretized_log_likelihood(x0, p.mean, p.log_variance / 2)
        vb = torch.where(k == 0, _mean(nll), _mean(kl)) / math.log(2)
        return {"loss": mse + vb, "mse": mse, "vb": vb}


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the first dimension."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (
        log_variance2 - log_variance1 - 1 + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2).square() * (-log_variance2).exp()
    )  # fmt: skip


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of 8-bit pixels x in [-1, 1] under a Gaussian integrated over each pixel's bin, in nats."""

    def cdf(z: Tensor) -> Tensor:  # tanh approximation of the normal distribution function, as the released code trains
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse_scale = x - mean, (-log_scale).exp()
    upper, lower = cdf(inverse_scale * (centred + 1 / 255)), cdf(inverse_scale * (centred - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()
