"""Optimizers of a training: AdamW, or Muon for the matrices of the blocks and skips beside AdamW for all else.

Muon (https://kellerjordan.github.io/posts/muon) replaces the gradient of a matrix by the nearest orthogonal one. Its
updates are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so the same learning rates suit both.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from skipdit.layers.inspect import replaced
from skipdit.utils.errors import UserError

OPTIMIZERS = ("adamw", "muon")


def make_optimizers(
    model: nn.Module,
    kind: str,
    lr: float,
    muon_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    fused: bool = False,
) -> list[Optimizer]:
    """Return the optimizers of a model's trainable parameters: AdamW, and for "muon" a second one.

    Args:
        model: its class names its blocks in `_no_split_modules`; `skips` are its long skips.
        kind: one of `OPTIMIZERS`.
        muon_lr: learning rate of Muon; by default `lr`.
        fused: whether AdamW runs as one kernel.

    Raises:
        ValueError: `kind` is unknown, or this torch has no Muon.
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"train.optimizer is {kind!r}; known: {', '.join(OPTIMIZERS)}")
    matrices = hidden_matrices(model) if kind == "muon" else []
    if matrices and not hasattr(torch.optim, "Muon"):
        raise UserError(f"train.optimizer=muon needs torch 2.9 or newer; this is {torch.__version__}")
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers: list[Optimizer] = []
    if others:
        optimizers.append(AdamW(others, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=fused))
    if matrices:
        rate = lr if muon_lr is None else muon_lr
        slow = matrices[0].device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        muon = Float32Muon if slow else torch.optim.Muon
        optimizers.append(muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Float32Muon(getattr(torch.optim, "Muon", Optimizer)):
    """torch's Muon, with its iteration in float32 in place of bfloat16, in which a CPU without AVX-512 multiplies
    matrices 20 to 40 times more slowly.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        with replaced(torch.optim._muon, "_zeropower_via_newtonschulz", _orthogonal):
            return super().step(closure)


def _orthogonal(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """An update with singular values near 1, by Newton-Schulz iteration: x <- a x + b (x x^T) x + c (x x^T)^2 x."""
    a, b, c = coefficients
    is_tall = update.shape[0] > update.shape[1]
    x = update.mT if is_tall else update
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of the linear layers inside a model's blocks and long skips. Embeddings and the final layer,
    whose rows mean single things, are not among them.
    """
    names = set(model._no_split_modules)
    blocks = [m for m in model.modules() if names & {c.__name__ for c in type(m).__mro__}]  # sharding makes subclasses
    inside = chain.from_iterable(module.modules() for module in (*blocks, getattr(model, "skips", nn.Module())))
    linears = {id(module): module for module in inside if isinstance(module, nn.Linear)}
    return [linear.weight for linear in linears.values() if linear.weight.requires_grad]
