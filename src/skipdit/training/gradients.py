"""The gradients of one optimizer step, over micro-batches and processes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from skipdit.training.align import Alignment
from skipdit.training.parallel import _synchronise
from skipdit.training.settings import TrainConfig
from skipdit.training.spectral import SpectralLimit
from skipdit.training.steps import Draw, Loss
from skipdit.utils.signals import StopSignals


class Gradients(NamedTuple):
    """What one step's backward passes leave besides the gradients themselves."""

    norm: float  # over all processes, before clipping
    stop: bool  # whether some process was asked to stop
    sums: Tensor  # (2,): sum of the losses and number of samples, of this process; (3,): and of the aligned losses
    indices: list[int]  # dataset indices, of this process
    broken: list[str]


def backward(
    model: nn.Module,
    loss: Loss,
    loader: Iterator,
    rows: list[range],
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
    limit: SpectralLimit | None,
    alignment: Alignment | None,
    signals: StopSignals,
) -> Gradients:
    """Accumulate the gradients of one step and clip them. Waits for the device once, at the end."""
    device, sums = accelerator.device, 0
    indices, broken = [], []
    for number, row_range in enumerate(rows):
        batch = next(loader)
        indices += batch["index"].tolist()
        broken += batch["broken"]
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        draw = Draw(config.seed, step, row_range, config.batch_size, device)
        with _synchronise(accelerator, model, number == len(rows) - 1):
            with accelerator.autocast():
                losses = loss(model, batch, draw).float() * batch["weight"]
                total, parts = losses.sum(), [losses.detach().sum(), batch["weight"].sum()]
                if alignment:
                    aligned = (alignment.losses(batch["features"]) * batch["weight"]).sum()
                    total, parts = total + config.align * aligned, [*parts, aligned.detach()]
            # DDP and FSDP average over processes; times their number, it is the mean over the global batch
            (total * accelerator.num_processes / config.batch_size).backward()
        sums = sums + torch.stack(parts)
    if limit:
        limit.add_gradients()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if alignment:
        norm = torch.hypot(norm, alignment.finish(accelerator, config.grad_clip or math.inf))
    asked = accelerator.reduce(torch.full_like(norm, signals.signum is not None))
    norm, asked = torch.stack([norm, asked]).tolist()
    return Gradients(norm, bool(asked), sums, indices, broken)
