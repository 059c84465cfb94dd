"""Settings of a training, its learning rate, and the random numbers of its steps."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipdit.config import require_seed, setting
from skipdit.utils.seeding import seed_of


@dataclass
class TrainConfig:
    """Settings of `fit`."""

    steps: int = setting(400_000, "optimizer steps")
    batch_size: int = setting(256, "samples per optimizer step, over all processes")
    micro_batch_size: int | None = setting(None, "samples per forward pass and process; fewer accumulate gradients")
    optimizer: str = setting("adamw", "adamw, or muon: Muon for the matrices of blocks and skips, AdamW for the rest")
    lr: float = setting(1e-4, "learning rate")
    muon_lr: float | None = setting(None, "Muon's learning rate; as lr by default")
    warmup: int = setting(0, "steps of linear warm-up")
    decay_steps: int = setting(0, "steps of linear decay to zero at the end")
    weight_decay: float = setting(0.0, "weight decay")
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW betas")
    grad_clip: float = setting(0.0, "largest gradient norm; 0 leaves gradients alone")
    ema_decay: float = setting(0.9999, "decay of the averaged weights")
    freeze: bool = setting(False, "stage 1: train the long skips only")
    spectral: str = setting("none", "bound the skips' largest singular values: none, penalty or cap")
    spectral_weight: float = setting(0.01, "of the penalty, half the sum of their squares")
    spectral_cap: float = setting(1.0, "the largest one that a cap leaves")
    precision: str = setting("bf16", "fp32 or bf16: automatic mixed precision; weights stay float32")
    tf32: bool = setting(True, "let float32 products run in TF32 on the GPU, as the released code does")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, "compile the model with torch.compile")
    parallel: str = setting("ddp", "ddp, or fsdp to shard weights, gradients and optimizer over the processes")
    seed: int = setting(0, "seed of everything")
    workers: int = setting(4, "data loading processes per training process")
    log_every: int = setting(50, "steps between lines of stats.jsonl and tensorboard; 0: the last only")
    save_every: int = setting(5_000, "steps between checkpoints; 0: the last only")
    keep: int = setting(3, "checkpoints to keep; 0 for all")
    sample_every: int = setting(10_000, "steps between sample grids; 0 for none")
    max_bad_steps: int = setting(10, "abort after this many steps in a row with a non-finite loss")

    def __post_init__(self):
        require_seed(self.seed)


# Settings that may differ when a run is resumed: places, and what does not change what is computed.
_FREE = {"out", "init", "vae", "text_encoder", "tokenizer", "texts", "model.folder", "grid_guidance"}
_FREE |= {"data.path", "data.image_path", "data.captions"}
_FREE |= {f"{text}.{name}" for text in ("clip", "t5") for name in ("encoder", "tokenizer", "files")}
_FREE |= {
    f"train.{name}"
    for name in (
        *("steps", "micro_batch_size", "parallel", "compile", "gradient_checkpointing", "workers"),
        *("log_every", "save_every", "keep", "sample_every", "max_bad_steps"),
    )
}


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
        scale = min(scale, (config.steps - step) / config.decay_steps)
    return (config.lr if peak is None else peak) * scale
