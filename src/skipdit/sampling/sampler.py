"""The interface of samplers."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from skipdit.caching.policies import Policy
from skipdit.layers.skip import SkipTransformer


class Sampler(Protocol):
    """One config's model, ready to sample."""

    config: Any
    model: SkipTransformer
    vae: nn.Module
    flops: dict[str, float]  # of one full and one cached step, per sample
    method: str  # of sampling, as people call it

    def timesteps(self, steps: int) -> list[float]:
        """Of a run of so many steps, in sampling order."""

    def images(self, steps: int, spec: Policy) -> Iterator[Tensor]:
        """Of every batch of the config's samples, (N, ..., 3, H, W) float32 in [-1, 1], on the CPU."""

    def make(self, steps: int, spec: Policy) -> Tensor:
        """All samples of the config, (N, ..., 3, H, W) uint8."""
