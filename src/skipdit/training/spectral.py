"""Spectral constraints on the long skips: bounds on the largest singular values of their linear maps.

The paper's title (Skip-DiT, arXiv 2411.17616) names them, no released code has them; these are two usual kinds, for the
D x 2D weight W of the linear of every `LongSkip`. Its layer norm is left alone.

- `penalty`: weight / 2 * sum over skips of sigma(W)^2 joins the loss (Yoshida and Miyato, arXiv 1705.10941).
- `cap`: sigma(W) <= cap, by a projection after every optimizer step, W <- W * min(1, cap / sigma(W)) (Gouk et al.,
  arXiv 1804.04368).

A projection, and not torch's `parametrizations.spectral_norm`, because that sets sigma to 1 instead of bounding it,
renames the weights and adds buffers to the checkpoints: here a checkpoint is what it is without constraints, and no
sampler needs to know. The averaged weights keep the cap too: a norm is convex, and they are a mean of weights under it.

sigma is found from the weights alone, nothing is kept from step to step. A resumed run is therefore the same bit for
bit, and all processes agree. What power iteration does one product with a vector at a time, squaring W W' again and
again does in few matrix products, and it bounds sigma from above (Gram iteration, arXiv 2305.16173).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from skipdit.layers.skip import LongSkip
from skipdit.utils.errors import UserError

KINDS = ("none", "penalty", "cap")
SQUARINGS = 8  # as many as 256 power iterations; the upper bound is then at most 0.7 % too large up to D = 1152
_TINY = 1e-30  # of a matrix of zeros the norm is this


class Largest(NamedTuple):
    """The largest singular values of n matrices (D, E), D <= E, and their vectors: W v = sigma u."""

    sigma: Tensor  # (n,), never above the true one but for rounding
    bound: Tensor  # (n,), never below it but for rounding, and at most D ** (1 / 2 ** (SQUARINGS + 2)) times it
    u: Tensor  # (n, D), unit vectors, or zero for a matrix of zeros
    v: Tensor  # (n, E), the same


@torch.no_grad()
def largest_singular(weights: Tensor) -> Largest:
    """Largest singular values of weights (n, D, E), in float32. Nothing is read back from the device.

    With G = W W' / f0 and G <- G^2 / f, f always the Frobenius norm of what it divides, G is after t rounds the power
    (W W')^(2^t) over the product of all f^(2^(t - round)). Its largest eigenvalue, sigma^(2^(t + 1)) over that product,
    is at most its Frobenius norm; any of its columns has been through 2^t power iterations.
    """
    weights = weights.float()
    gram, log_bound = weights @ weights.mT, 0.0
    for turn in range(SQUARINGS + 1):
        if turn:
            gram = gram @ gram
        norm = torch.linalg.matrix_norm(gram).clamp(min=_TINY)  # (n,)
        log_bound = log_bound + norm.log() / 2**turn
        gram = gram / norm[:, None, None]
    column = gram.diagonal(dim1=-2, dim2=-1).argmax(-1)  # of the longest, up to the diagonal's being what is compared
    u = gram[torch.arange(len(gram), device=gram.device), column]
    v = _unit((weights.mT @ u[:, :, None])[..., 0])
    image = (weights @ v[:, :, None])[..., 0]
    return Largest(image.norm(dim=-1), torch.exp(log_bound / 2), _unit(image), v)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=_TINY)


def skip_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear map of every long skip of a model, outermost last; empty without skips."""
    skips = [module for module in model.modules() if isinstance(module, LongSkip)]
    return [skip.delta if skip.residual else skip.linear for skip in skips]


class SpectralLimit:
    """Keeps the long skips of a model under training in bounds.

    Right under gradient accumulation and data parallelism, since it acts once per step on what they leave, and where
    weights are sharded (FSDP), whose skips it gathers for a moment.

    Args:
        model: its weights may be moved, wrapped or sharded afterwards.
        kind: "penalty" or "cap".
        weight: of the penalty.
        cap: largest singular value allowed.

    Raises ValueError for another kind, a weight or cap that is not positive, and a model whose skips are not trained.
    """

    def __init__(self, model: nn.Module, kind: str, weight: float, cap: float):
        if kind not in KINDS[1:]:
            raise UserError(f"train.spectral is {kind!r}; it is {', '.join(KINDS)}")
        name, number = ("spectral_weight", weight) if kind == "penalty" else ("spectral_cap", cap)
        if not number > 0:
            raise UserError(f"train.{name} is {number}; it must be positive (train.spectral=none sets no constraint)")
        self._linears = skip_linears(model)
        if not self._linears:
            raise UserError(f"train.spectral={kind} is for long skips, and the model has none: set model.skip=true")
        if not all(linear.weight.requires_grad for linear in self._linears):
            raise UserError(f"train.spectral={kind} is for long skips that are trained; here they are frozen")
        self.kind, self.weight, self.cap = kind, weight, cap

    def largest(self) -> Largest:
        """Largest singular values of all skips. Where weights are sharded, every process has to call it."""
        weights = [linear.weight.detach() for linear in self._linears]
        return largest_singular(torch.stack([w.full_tensor() if isinstance(w, DTensor) else w for w in weights]))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradients, weight * sigma * u v', to those of the step, which must be whole: summed over
        its micro-batches and processes, not yet clipped.
        """
        if self.kind != "penalty":
            return
        sigma, _, u, v = self.largest()
        for linear, left, right in zip(self._linears, self.weight * sigma[:, None] * u, v, strict=True):
            gradient = linear.weight.grad
            gradient += _like(torch.outer(left, right), gradient)

    @torch.no_grad()
    def project(self) -> None:
        """Scale the weights above the cap down to it; for before the first step, and after every one."""
        if self.kind != "cap":
            return
        for linear, scale in zip(self._linears, (self.cap / self.largest().bound).clamp(max=1.0), strict=True):
            weight = linear.weight.to_local() if isinstance(linear.weight, DTensor) else linear.weight
            weight *= scale


def _like(whole: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has, laid out as another is."""
    if not isinstance(other, DTensor):
        return whole
    mesh = other.device_mesh
    spread = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(mesh, other.placements)
