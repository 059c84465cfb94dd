"""The one training loop. A task brings a model, a loss and a dataset; `fit` does the rest.

Randomness is stateless: the data, noise and timesteps of optimizer step s follow from (seed, s) alone and are drawn for
the global batch, of which each process takes its rows. So a run resumes exactly, and the number of processes and
gradient accumulation change nothing but the order of sums, which is rounding.
"""

import copy
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from skipdit.checkpoints.averages import LENGTHS
from skipdit.config import to_dict
from skipdit.data.stream import Stream, make_loader, rows_of
from skipdit.training import checkpoints as checkpoint
from skipdit.training.align import Alignment
from skipdit.training.ema import EMA, PowerAverage
from skipdit.training.gradients import backward
from skipdit.training.optimizer import make_optimizers
from skipdit.training.parallel import _gather, _shard, peak_memory
from skipdit.training.run_folder import _alone, claim_folder
from skipdit.training.runlog import BrokenFiles, Log
from skipdit.training.settings import TrainConfig
from skipdit.training.spectral import SpectralLimit
from skipdit.training.steps import Loss, learning_rate, set_trainable
from skipdit.utils.device import make_accelerator, own_settings, set_tf32
from skipdit.utils.errors import UserError
from skipdit.utils.signals import Stopped, StopSignals, stop_signals

Look = Callable[[nn.Module, int], dict[str, float] | None]  # at the averaged model, after a step


def fit(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    config: TrainConfig,
    out: str | Path,
    run_config: Any,
    sample: Look | None = None,
    dry_run: bool = False,
    judge: tuple[int, Look] | None = None,
) -> nn.Module:
    """Train a model. Running it again with the same arguments continues where the last checkpoint ends.

    Ctrl-C or SIGTERM ends it after the step that runs, in all processes after the same one, with a checkpoint of that
    step; once more ends it at once.

    Args:
        model: on the CPU, initialised or loaded; updated in place.
        loss: called once per micro-batch; see `Loss`. The batch is what `data.stream.collate` made, on the device.
        dataset: finite, indexable; with `config.align` one with `features`, such as `data.features.WithFeatures`.
        out: run folder: config.yaml, checkpoints/, stats.jsonl, tensorboard/, broken_files.txt.
        run_config: the task's whole config, saved with the run; another one in the same folder is refused.
        sample: called with the averaged model and the step every `config.sample_every` steps, in the main process and
            in the precision of the training. It keeps no reference to the model. FloatingPointError is printed, and the
            training goes on: the average alone is not finite.
        dry_run: take two steps on samples of the largest shape, print their peak memory, write nothing.
        judge: every how many steps to call what is called as `sample`, whose numbers are logged to judge.jsonl.

    Returns:
        The averaged model.

    Raises:
        Diverged: `max_bad_steps` non-finite losses in a row; names the step and the batch.
        OSError: the disk is full or cannot be written; the last good checkpoint stays.
        Stopped: by a signal, after it has saved.
        ValueError: settings that do not fit each other, or the run already in `out`; another process trains there.
    """
    if config.precision not in ("fp32", "bf16") or config.parallel not in ("ddp", "fsdp"):
        raise UserError(f"precision {config.precision!r} or parallel {config.parallel!r}: see --help for the choices")
    if config.freeze:
        if not any(name.startswith("skips.") for name, _ in model.named_parameters()):
            raise UserError("freeze trains the long skips alone, and the model has none: set model.skip=true")
        set_trainable(model, {"skips.*": True, "*": False})
    alignment = Alignment(model, getattr(dataset, "features", None), config) if config.align else None
    limit = None
    if config.spectral != "none":
        limit = SpectralLimit(model, config.spectral, config.spectral_weight, config.spectral_cap)
        limit.project()
    out = Path(out)
    accelerator = make_accelerator(config.precision)
    set_tf32(config.tf32)
    with nullcontext() if dry_run else _alone(out, accelerator), stop_signals(finish=not dry_run) as signals:
        looks = [(config.sample_every, sample), *([judge] if judge else [])]
        given = (config, out, run_config, looks, dry_run, accelerator, limit, alignment, signals)
        return _fit(model, loss, dataset, *given)


def _fit(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    config: TrainConfig,
    out: Path,
    run_config: Any,
    looks: list[tuple[int, Look | None]],
    dry_run: bool,
    accelerator: Accelerator,
    limit: SpectralLimit | None,
    alignment: Alignment | None,
    signals: StopSignals,
) -> nn.Module:
    """What `fit` does, alone in its folder."""
    device, world = accelerator.device, accelerator.num_processes
    if not dry_run:
        claim_folder(out, run_config, accelerator)
    micro = config.micro_batch_size or config.batch_size // world
    rows = rows_of(config.batch_size, micro, accelerator.process_index, world)

    trained, ema, averages, optimizers, blueprint = _prepare(model, config, accelerator)
    stepped, watching = optimizers, nullcontext()
    if alignment:
        alignment.projection.to(device)
        stepped, watching = [*optimizers, alignment.optimizer], alignment.watching(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in stepped]
    start = 0 if dry_run else _resume(out, model, ema, averages, optimizers, accelerator, alignment)
    stream = Stream(dataset, config.seed, config.batch_size)
    first, shape = stream.largest() if dry_run else (start, None)  # where that fits, all others do
    stop = first + 1 if dry_run else config.steps
    batches = make_loader(stream, rows, config.batch_size, first, stop, config.workers)
    loader = chain(batches, batches) if dry_run else iter(batches)  # the first step makes the optimizer's moments
    accelerator.print(describe(model, config, len(rows), micro, world, len(dataset)))
    if config.warmup + config.decay_steps > config.steps and not dry_run:
        accelerator.print(
            f"warning: train.warmup={config.warmup} and train.decay_steps={config.decay_steps} are longer than "
            f"train.steps={config.steps}: the learning rate never reaches train.lr"
        )
    log = None
    if accelerator.is_main_process and not dry_run:
        log = Log(out, start, accelerator, config.tracker, to_dict(run_config))
    broken = BrokenFiles(out / "broken_files.txt")
    if accelerator.is_main_process and not dry_run:
        broken.add(getattr(dataset, "left_out", []))

    with (
        tqdm(initial=start, total=config.steps, desc="training", unit="step", dynamic_ncols=True) as progress,
        watching,
    ):
        totals, bad, skipped, began = torch.zeros(3 if alignment else 2, device=device), 0, 0, time.perf_counter()
        for step in range(start, 2 if dry_run else config.steps):
            for optimizer, peak in zip(stepped, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, peak)
            gradients = backward(trained, loss, loader, rows, step, config, accelerator, limit, alignment, signals)
            finite = math.isfinite(gradients.norm)  # gradients are summed over processes, so all of them agree
            if finite:
                for optimizer in stepped:
                    optimizer.step()
                if limit:
                    limit.project()
                for average in (ema, *averages):
                    average.update(model, step + 1)
                totals += gradients.sums
                bad = 0
            else:
                bad, skipped = bad + 1, skipped + 1
                accelerator.print(f"step {step}: loss or gradient is not finite, step skipped ({bad} in a row)")
                if bad >= config.max_bad_steps:
                    raise Diverged(
                        f"{bad} steps in a row had a non-finite loss or gradient; last at step {step}, dataset samples "
                        f"{gradients.indices}. The newest checkpoint in {out / 'checkpoints'} is good; "
                        "lower train.lr, or look at those samples."
                    )
            for optimizer in stepped:
                optimizer.zero_grad(set_to_none=True)
            progress.update()
            if dry_run:
                continue

            done = step + 1
            last = done == config.steps
            broken.add(gradients.broken)
            if last or (config.log_every and done % config.log_every == 0):
                loss_sum, count, *aligned = accelerator.reduce(totals).tolist()
                stats = {
                    "step": done,
                    "loss": loss_sum / count if count else None,  # None: no step since the last line was finite
                    "grad_norm": gradients.norm if finite else None,
                    "lr": learning_rate(config, step),
                    "samples_per_second": count / (time.perf_counter() - began),
                    "skipped_steps": skipped,
                }
                if alignment:
                    stats["align_loss"] = aligned[0] / count if count else None
                if limit:
                    stats["skip_sigma"] = limit.largest().sigma.max().item()
                totals, began = torch.zeros_like(totals), time.perf_counter()
                shown = {key: stats[key] for key in ("loss", "samples_per_second") if stats[key] is not None}
                progress.set_postfix({key: f"{value:.4g}" for key, value in shown.items()})
                if log:
                    log.write(stats)
            if last or gradients.stop or (config.save_every and done % config.save_every == 0):
                folder, args, writer = out / "checkpoints", to_dict(run_config), accelerator.is_main_process
                given = (args, config.keep, writer, averages, alignment)
                checkpoint.save(folder, done, model, ema.model, optimizers, *given)
            if averages and (last or done % config.average_every == 0):
                checkpoint.save_averages(out / "averages", done, averages, accelerator.is_main_process)
            if gradients.stop and not last:
                progress.close()
                if log:
                    log.close()
                _end(accelerator, signals, f"stopped after step {done}, saved in {folder}")
            due = [look for every, look in looks if look and every and (done % every == 0 or last)]
            if due:
                paused = time.perf_counter()
                averaged = ema.model if blueprint is None else _gather(ema.model, blueprint, device)
                if accelerator.is_main_process:
                    with accelerator.autocast():
                        results = [_look(look, averaged, done) for look in due]
                    log.samples(out / "samples" / f"{done:07d}.png", done)
                    for values in filter(None, results):
                        log.judged({"step": done} | values)
                del averaged  # an unsharded copy would stay for the rest of the run
                accelerator.wait_for_everyone()
                began += time.perf_counter() - paused  # not part of the training's speed
    accelerator.wait_for_everyone()
    if dry_run:
        samples = f"{config.batch_size} samples" + (" of {}x{}".format(*shape) if shape else "")
        accelerator.print(f"two steps of {samples}: peak memory {peak_memory() / 2**30:.2f} GiB per process")
        return ema.model
    if log:
        log.close()
        broken.summarise()
    accelerator.end_training()
    return ema.model


def _look(look: Look, model: nn.Module, step: int) -> dict[str, float] | None:
    try:
        return look(model, step)
    except FloatingPointError as error:  # of the averaged weights only; the training goes on
        print(f"step {step}: no samples to look at: {error}")
        return None


class Diverged(FloatingPointError, RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def _end(accelerator: Accelerator, signals: StopSignals, told: str) -> None:
    """Raise Stopped in all processes, once the last of them is ready: the first that ends makes a launcher end all."""
    if accelerator.is_main_process:
        print(f"{told}: the same command goes on from there", file=sys.stderr, flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    raise Stopped(signals.signum or signal.SIGTERM, told="")


def _prepare(model: nn.Module, config: TrainConfig, accelerator: Accelerator):
    """Move, average, compile and wrap a model.

    Returns the wrapped model, its EMA, the averages of `config.average_every`, the optimizers and, where weights are
    sharded, a model on the meta device from which an unsharded copy can be made.
    """
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(accelerator.device).train()
    ema, blueprint = EMA(model, config.ema_decay), None
    averages = [PowerAverage(model, length) for length in LENGTHS] if config.average_every else []
    if config.compile:
        if config.gradient_checkpointing:  # older torch cannot split a graph with checkpoints, as DDP wants it to
            torch._dynamo.config.optimize_ddp = False
        model.compile()
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        blueprint = copy.deepcopy(ema.model).to("meta")
        trained = _shard(model, config.precision)
        for average in (ema, *averages):
            _shard(average.model, "fp32")
    else:
        with own_settings():
            trained = accelerator.prepare_model(model)
    fused = accelerator.device.type == "cuda"
    optimizers = make_optimizers(
        model, config.optimizer, config.lr, config.muon_lr, config.betas, config.weight_decay, fused
    )
    return trained, ema, averages, optimizers, blueprint


def _resume(
    out: Path,
    model: nn.Module,
    ema: EMA,
    averages: list[PowerAverage],
    optimizers: list[Optimizer],
    accelerator: Accelerator,
    alignment: Alignment | None,
) -> int:
    """Put the newest checkpoint back. Returns the step to go on from, 0 without one.

    The main process chooses it for all: processes that went on from different steps would mix their gradients.
    """
    folder = out / "checkpoints"
    found = None
    if accelerator.is_main_process:
        for rest in folder.glob("*.partial"):  # of a process that was killed while it saved
            rest.unlink()
        found = checkpoint.latest(folder)
    (name,) = broadcast_object_list([found[0].name if found else None])
    if name is None:
        return 0
    state = found[1] if found else checkpoint.load_chosen(folder / name)
    accelerator.print(f"resuming from {folder / name}")
    return checkpoint.restore(state, model, ema.model, optimizers, averages, alignment)


def describe(model: nn.Module, config: TrainConfig, accumulation: int, micro: int, world: int, samples: int) -> str:
    """One line: parameters, batch, memory of the states (activations come on top; `--dry-run` measures all)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    copies = 2 + (len(LENGTHS) if config.average_every else 0)  # the weights and their averages
    states = 4 * (copies * (trained + frozen) + 3 * trained)  # and gradient and two moments of the trained
    states /= world if config.parallel == "fsdp" else 1
    epochs = config.batch_size * config.steps / samples
    return (
        f"parameters: {trained:,} trained, {frozen:,} frozen | batch {config.batch_size} = {micro} x {accumulation} "
        f"accumulated x {world} processes | {samples:,} samples, {epochs:.1f} epochs | "
        f"weights, gradients, optimizer and average: {states / 2**30:.2f} GiB per process"
    )
