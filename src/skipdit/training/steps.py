"""Steps of a training: their random numbers, which weights they move, and the learning rate."""

import fnmatch
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from skipdit.training.settings import TrainConfig
from skipdit.utils.seeding import seed_of


class Draw:
    """Random numbers of one optimizer step, on `device`, for this process's rows of the global batch."""

    def __init__(self, seed: int, step: int, rows: range, global_batch: int, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(seed_of(seed, step))
        self._rows, self._global, self.device = slice(rows.start, rows.stop), global_batch, device

    def randn(self, *shape: int) -> Tensor:
        """Normal (rows, *shape)."""
        return torch.randn(self._global, *shape, generator=self._generator, device=self.device)[self._rows]

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1), (rows, *shape)."""
        return torch.rand(self._global, *shape, generator=self._generator, device=self.device)[self._rows]

    def randint(self, high: int) -> Tensor:
        """Integers 0 .. high - 1, (rows,)."""
        return torch.randint(high, (self._global,), generator=self._generator, device=self.device)[self._rows]


Loss = Callable[[nn.Module, dict, Draw], Tensor]  # (model, batch, draw) -> per-sample losses (N,)


def set_trainable(model: nn.Module, rules: dict[str, bool]) -> None:
    """Freeze parameters by name pattern; the first rule that matches a name decides.

    Raises ValueError if a parameter is matched by no rule, or a rule by no parameter.
    """
    unused = set(rules)
    for name, parameter in model.named_parameters():
        pattern = next((p for p in rules if fnmatch.fnmatch(name, p)), None)
        if pattern is None:
            raise ValueError(f"no freezing rule covers parameter {name}; rules: {', '.join(rules)}")
        unused.discard(pattern)
        parameter.requires_grad_(rules[pattern])
    if unused:
        raise ValueError(f"freezing rules match no parameter: {', '.join(sorted(unused))}")


def learning_rate(config: TrainConfig, step: int, peak: float | None = None) -> float:
    """Learning rate of optimizer step `step`, from 0: warm-up, constant (`peak`, by default `config.lr`), decay."""
    scale = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay_steps:
        left = min(1.0, (config.steps - step) / config.decay_steps)
        scale = min(scale, left if config.decay == "linear" else math.sin(math.pi / 2 * left) ** 2)
    return (config.lr if peak is None else peak) * scale
