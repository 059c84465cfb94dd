"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn

from skipdit.checkpoints.averages import exponent


class EMA:
    """A shadow copy of a model whose weights follow it: `ema = decay * ema + (1 - decay) * model`.

    Early on the decay is lowered to (1 + step) / (10 + step), so that the shadow forgets the random start.

    Attributes:
        model: the shadow, in eval mode, without gradients, in float32.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    def decay(self, step: int) -> float:
        """Share of the shadow that stays at optimizer step `step`, from 1."""
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the model after optimizer step `step`, from 1. Frozen parameters do not move and are not touched."""
        shadow = dict(self.model.named_parameters())
        pairs = [(shadow[name], p.detach()) for name, p in model.named_parameters() if p.requires_grad]
        torch._foreach_lerp_([s for s, _ in pairs], [p for _, p in pairs], 1 - self.decay(step))


class PowerAverage(EMA):
    """A shadow in which step t counts as t^g: its length is a share of the training so far; see `averages.exponent`."""

    def __init__(self, model: nn.Module, length: float):
        super().__init__(model, decay=0.0)
        self.length, self._exponent = length, exponent(length)

    def decay(self, step: int) -> float:
        return (1 - 1 / step) ** (self._exponent + 1)
