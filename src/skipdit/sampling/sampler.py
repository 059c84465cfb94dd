"""The interface of samplers, of which there are two: class-conditional and text-conditional."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from skipdit.caching.policies import parse_policy
from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.diffusion.flow import FLOW_SOLVERS
from skipdit.diffusion.schedulers import SOLVERS
from skipdit.encoders.autoencoder import decode
from skipdit.layers.skip import SkipTransformer
from skipdit.utils.pixels import to_uint8


class Sampler(ABC):
    """All samples of a config, with the models that make them on the device.

    Attributes:
        config: settings of the run.
        model: the transformer itself, in eval mode.
        vae: the autoencoder.
        flops: FLOPs of one "full" and one "cached" step, per sample, guidance included.
        total: number of samples.
        names: of the samples' files, without suffix; None numbers them.
        unit: what a sample is: "image" or "clip".
        suffix: of a sample's file.
        overview: the file that shows the first samples.
    """

    config: Any
    model: SkipTransformer
    vae: AutoencoderKL
    flops: dict[str, float]
    total: int
    names: Sequence[str] | None = None
    unit: str = "image"
    suffix: str = "png"
    overview: str = "sheet.png"

    @classmethod
    def from_config(cls, config: Any) -> "Sampler":
        """Open the sampler of a config, for the branch of its cache."""
        policy = parse_policy(config.cache)
        return cls(config, policy.branch if policy.caches else None)

    @property
    def solvers(self) -> Sequence[str]:
        """Names of solvers that `using` knows, for the model's process."""
        return SOLVERS if self.model.flow_shift is None else FLOW_SOLVERS

    @property
    @abstractmethod
    def method(self) -> str:
        """Name of the sampling method, as the config has it."""

    @abstractmethod
    def using(self, method: str) -> AbstractContextManager[None]:
        """Sample by another method within the context."""

    @abstractmethod
    def timesteps(self, steps: int) -> list[float]:
        """Timesteps of a run of `steps` steps, in sampling order."""

    @abstractmethod
    def guide(self, rows: Tensor) -> Tensor:
        """Turn the noise that the model predicts, of all rows of a call, into that which the step takes (N, ...)."""

    @abstractmethod
    def follow(self, outputs: Tensor, steps: int) -> list[Tensor]:
        """Run the sampler without a model, from zero latents of a single value.

        Args:
            outputs: guided outputs (steps, N) that it gets.

        Returns:
            The latents (N,) after every step, as the model reads them in the next one. All draw the same noise.
        """

    def response(self, steps: int) -> Tensor:
        """How far latents move by the outputs: entry (k, j), float64 of (steps, steps), is the change of the latents
        after step k, as the model reads them in the next one, if the guided output of step j grows by 1. It is the same
        for all latents.
        """
        count = len(self.timesteps(steps))
        moved = torch.eye(count, count + 1)  # row i at its step, the last one never
        reached = torch.stack(self.follow(moved, steps)).double()
        return reached[:, :count] - reached[:, count:]

    @abstractmethod
    def refined(self, steps: int, factor: int) -> int | list[int] | None:
        """The `steps` of a run that visits the timesteps of this one, and `factor` - 1 between each two of them; None
        if there is none, or if the sampler is stochastic.
        """

    @abstractmethod
    def latents(
        self, indices: list[int], steps: int, policy: CachePolicy, on_step: Callable[[int, str], None] | None = None
    ) -> tuple[Tensor, SkipCache]:
        """Sample a batch.

        Args:
            indices: samples that can be made together, see `batches`.
            on_step: called after every step, with its number and kind: full, cached or forecast.

        Returns:
            Latents (N, ..., C, h, w), float32, and the cache that the run had.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the samples depend on besides the config's settings, the weights and the policy."""

    @abstractmethod
    def write(self, path: Path, pixels: Tensor) -> None:
        """Write a sample, uint8 of the shape that the autoencoder gives."""

    def to_model(self, latents: Tensor) -> Tensor:
        """Turn latents of a batch into the layout that the model reads, or back."""
        return latents

    def record(self) -> dict[str, Any]:
        """Entries that the config gets in report.json."""
        return {}

    def batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Divide samples into batches that can be made together."""
        for start in range(0, len(indices), self.config.batch_size):
            yield list(indices[start : start + self.config.batch_size])

    def images(self, steps: int, policy: CachePolicy) -> Iterator[Tensor]:
        """Make every batch of samples, (N, ..., 3, H, W) float32 in [-1, 1], on the CPU."""
        for indices in self.batches(range(self.total)):
            latents, _ = self.latents(indices, steps, policy)
            yield decode(self.vae, latents).clamp(-1, 1).cpu()

    def make(self, steps: int, policy: CachePolicy) -> Tensor:
        """Make all samples, (N, ..., 3, H, W) uint8."""
        return torch.cat([to_uint8(images) for images in self.images(steps, policy)])
