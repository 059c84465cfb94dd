"""The one training loop. A task brings a model, a loss and a dataset; `fit` does the rest.

Randomness is stateless: the data, noise and timesteps of optimizer step s follow from (seed, s) alone and are drawn for
the global batch, of which each process takes its rows. So a run resumes exactly, and the number of processes and
gradient accumulation change nothing but the order of sums, which is rounding.
"""

import copy
import fnmatch
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer
from torch.utils.data import Dataset

from skipdit import checkpoint
from skipdit.config import flatten, require_seed, setting, to_dict, to_yaml
from skipdit.data.stream import Stream, make_loader, rows_of, seed_of
from skipdit.device import make_accelerator, own_settings, set_tf32
from skipdit.ema import EMA
from skipdit.lock import hold
from skipdit.optimizer import make_optimizers
from skipdit.runlog import BrokenFiles, Log
from skipdit.spectral import SpectralLimit
from skipdit.stopping import Stopped, StopSignals, stop_signals
from skipdit.writing import naming, replace_text


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


def fit(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    config: TrainConfig,
    out: str | Path,
    run_config: Any,
    sample: Callable[[nn.Module, int], None] | None = None,
    dry_run: bool = False,
) -> nn.Module:
    """Train a model. Running it again with the same arguments continues where the last checkpoint ends.

    Ctrl-C or SIGTERM ends it after the step that runs, in all processes after the same one, with a checkpoint of that
    step; once more ends it at once.

    Args:
        model: on the CPU, initialised or loaded; updated in place.
        loss: called once per micro-batch; see `Loss`. The batch is what `data.stream.collate` made, on the device.
        dataset: finite, indexable.
        out: run folder: config.yaml, checkpoints/, stats.jsonl, tensorboard/, broken_files.txt.
        run_config: the task's whole config, saved with the run; another one in the same folder is refused.
        sample: called with the averaged model and the step every `config.sample_every` steps, in the main process and
            in the precision of the training. It keeps no reference to the model.
        dry_run: take two steps on samples of the largest shape, print their peak memory, write nothing.

    Returns:
        The averaged model.

    Raises:
        Diverged: `max_bad_steps` non-finite losses in a row; names the step and the batch.
        OSError: the disk is full or cannot be written; the last good checkpoint stays.
        Stopped: by a signal, after it has saved.
        ValueError: settings that do not fit each other, or the run already in `out`; another process trains there.
    """
    if config.precision not in ("fp32", "bf16") or config.parallel not in ("ddp", "fsdp"):
        raise ValueError(f"precision {config.precision!r} or parallel {config.parallel!r}: see --help for the choices")
    if config.freeze:
        set_trainable(model, {"skips.*": True, "*": False})
    limit = None
    if config.spectral != "none":
        limit = SpectralLimit(model, config.spectral, config.spectral_weight, config.spectral_cap)
        limit.project()
    out = Path(out)
    accelerator = make_accelerator(config.precision)
    set_tf32(config.tf32)
    with nullcontext() if dry_run else _alone(out, accelerator), stop_signals(finish=not dry_run) as signals:
        return _fit(model, loss, dataset, config, out, run_config, sample, dry_run, accelerator, limit, signals)


def _fit(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    config: TrainConfig,
    out: Path,
    run_config: Any,
    sample: Callable[[nn.Module, int], None] | None,
    dry_run: bool,
    accelerator: Accelerator,
    limit: SpectralLimit | None,
    signals: StopSignals,
) -> nn.Module:
    """What `fit` does, alone in its folder."""
    device, world = accelerator.device, accelerator.num_processes
    if not dry_run:
        claim_folder(out, run_config, accelerator)
    micro = config.micro_batch_size or config.batch_size // world
    rows = rows_of(config.batch_size, micro, accelerator.process_index, world)

    trained, ema, optimizers, blueprint = _prepare(model, config, accelerator)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = 0 if dry_run else _resume(out, model, ema, optimizers, accelerator)
    stream = Stream(dataset, config.seed, config.batch_size)
    first, shape = stream.largest() if dry_run else (start, None)  # where that fits, all others do
    stop = first + 1 if dry_run else config.steps
    batches = make_loader(stream, rows, config.batch_size, first, stop, config.workers)
    loader = chain(batches, batches) if dry_run else iter(batches)  # the first step makes the optimizer's moments
    accelerator.print(describe(model, config, len(rows), micro, world, len(dataset)))
    log = Log(out, start) if accelerator.is_main_process and not dry_run else None
    broken = BrokenFiles(out / "broken_files.txt")
    if accelerator.is_main_process and not dry_run:
        broken.add(getattr(dataset, "left_out", []))

    with tqdm(initial=start, total=config.steps, desc="training", unit="step", dynamic_ncols=True) as progress:
        totals, bad, skipped, began = torch.zeros(2, device=device), 0, 0, time.perf_counter()
        for step in range(start, 2 if dry_run else config.steps):
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, peak)
            gradients = _backward(trained, loss, loader, rows, step, config, accelerator, limit, signals)
            finite = math.isfinite(gradients.norm)  # gradients are summed over processes, so all of them agree
            if finite:
                for optimizer in optimizers:
                    optimizer.step()
                if limit:
                    limit.project()
                ema.update(model, step + 1)
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
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            progress.update()
            if dry_run:
                continue

            done = step + 1
            last = done == config.steps
            broken.add(gradients.broken)
            if last or (config.log_every and done % config.log_every == 0):
                loss_sum, count = accelerator.reduce(totals).tolist()
                stats = {
                    "step": done,
                    "loss": loss_sum / count if count else None,  # None: no step since the last line was finite
                    "grad_norm": gradients.norm if finite else None,
                    "lr": learning_rate(config, step),
                    "samples_per_second": count / (time.perf_counter() - began),
                    "skipped_steps": skipped,
                }
                if limit:
                    stats["skip_sigma"] = limit.largest().sigma.max().item()
                totals, began = torch.zeros_like(totals), time.perf_counter()
                shown = {key: stats[key] for key in ("loss", "samples_per_second") if stats[key] is not None}
                progress.set_postfix({key: f"{value:.4g}" for key, value in shown.items()})
                if log:
                    log.write(stats)
            if last or gradients.stop or (config.save_every and done % config.save_every == 0):
                folder, args, writer = out / "checkpoints", to_dict(run_config), accelerator.is_main_process
                checkpoint.save(folder, done, model, ema.model, optimizers, args, config.keep, writer)
            if gradients.stop and not last:
                progress.close()
                if log:
                    log.close()
                _end(accelerator, signals, f"stopped after step {done}, saved in {folder}")
            if sample is not None and config.sample_every and (done % config.sample_every == 0 or last):
                averaged = ema.model if blueprint is None else _gather(ema.model, blueprint, device)
                if accelerator.is_main_process:
                    with accelerator.autocast():
                        sample(averaged, done)
                del averaged  # an unsharded copy would stay for the rest of the run
                accelerator.wait_for_everyone()
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


class Diverged(FloatingPointError, RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


@contextmanager
def _alone(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make a run folder and hold it. What the main process cannot do there, all processes refuse."""
    with ExitStack() as held:
        refusal = None
        if accelerator.is_main_process:
            try:
                with naming(out):
                    out.mkdir(parents=True, exist_ok=True)
                held.enter_context(hold(out))
            except (OSError, ValueError) as error:
                refusal = error
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def _end(accelerator: Accelerator, signals: StopSignals, told: str) -> None:
    """Raise Stopped in all processes, once the last of them is ready: the first that ends makes a launcher end all."""
    if accelerator.is_main_process:
        print(f"{told}: the same command goes on from there", file=sys.stderr, flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    raise Stopped(signals.signum or signal.SIGTERM, told="")


def _prepare(model: nn.Module, config: TrainConfig, accelerator: Accelerator):
    """Move, average, compile and wrap a model.

    Returns the wrapped model, its EMA, the optimizers and, where weights are sharded, a model on the meta device from
    which an unsharded copy can be made.
    """
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.to(accelerator.device).train()
    ema, blueprint = EMA(model, config.ema_decay), None
    if config.compile:
        if config.gradient_checkpointing:  # older torch cannot split a graph with checkpoints, as DDP wants it to
            torch._dynamo.config.optimize_ddp = False
        model.compile()
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        blueprint = copy.deepcopy(ema.model).to("meta")
        trained = _shard(model, config.precision)
        _shard(ema.model, "fp32")
    else:
        with own_settings():
            trained = accelerator.prepare_model(model)
    fused = accelerator.device.type == "cuda"
    optimizers = make_optimizers(
        model, config.optimizer, config.lr, config.muon_lr, config.betas, config.weight_decay, fused
    )
    return trained, ema, optimizers, blueprint


def _resume(out: Path, model: nn.Module, ema: EMA, optimizers: list[Optimizer], accelerator: Accelerator) -> int:
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
    return checkpoint.restore(state, model, ema.model, optimizers)


class Gradients(NamedTuple):
    """What one step's backward passes leave besides the gradients themselves."""

    norm: float  # over all processes, before clipping
    stop: bool  # whether some process was asked to stop
    sums: Tensor  # (2,): sum of the losses and number of samples, of this process
    indices: list[int]  # dataset indices, of this process
    broken: list[str]


def _backward(
    model: nn.Module,
    loss: Loss,
    loader: Iterator,
    rows: list[range],
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
    limit: SpectralLimit | None,
    signals: StopSignals,
) -> Gradients:
    """Accumulate the gradients of one step and clip them. Waits for the device once, at the end."""
    device, sums = accelerator.device, torch.zeros(2, device=accelerator.device)
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
            # DDP and FSDP average over processes; times their number, it is the mean over the global batch
            (losses.sum() * accelerator.num_processes / config.batch_size).backward()
        sums += torch.stack([losses.detach().sum(), batch["weight"].sum()])
    if limit:
        limit.add_gradients()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    asked = accelerator.reduce(torch.full_like(norm, signals.signum is not None))
    norm, asked = torch.stack([norm, asked]).tolist()
    return Gradients(norm, bool(asked), sums, indices, broken)


def claim_folder(out: Path, run_config: Any, accelerator: Accelerator) -> None:
    """Write config.yaml into a new run folder, or check that the one there is the same run."""
    path, text = out / "config.yaml", to_yaml(run_config)
    if path.exists():
        defaults = flatten(OmegaConf.structured(type(run_config)))  # of settings that are newer than the run
        before, now = defaults | flatten(OmegaConf.load(path)), flatten(OmegaConf.create(text))
        free = _FREE - ({"train.steps"} if now.get("train.decay_steps") else set())  # which counts back from the end
        differ = [k for k in before | now if before.get(k) != now.get(k) and k not in free]
        if differ:
            raise ValueError(
                f"{out} holds a run with other settings; give this one another folder (out=...):\n"
                + "\n".join(f"  {key}: {before.get(key)} there, {now.get(key)} now" for key in differ)
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    accelerator.wait_for_everyone()


def _shard(model: nn.Module, precision: str) -> nn.Module:
    """Shard a model over all processes, block by block (FSDP2)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if precision == "bf16" else None
    # Autocast is on around the loss: inputs and the residual stream stay float32, as without sharding.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def _gather(sharded: nn.Module, blueprint: nn.Module, device: torch.device) -> nn.Module | None:
    """An unsharded copy of a sharded model. Every process calls it; the main one gets the copy, the others None."""
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    model = copy.deepcopy(blueprint).to_empty(device=device)
    model.load_state_dict(state)
    return model


def _synchronise(accelerator: Accelerator, model: nn.Module, last: bool):
    """Gradients are exchanged between processes only in the last micro-batch of a step."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def peak_memory() -> int:
    """Largest memory so far in bytes: the GPU's, or without one this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(model: nn.Module, config: TrainConfig, accumulation: int, micro: int, world: int, samples: int) -> str:
    """One line: parameters, batch, memory of the states (activations come on top; `--dry-run` measures all)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    states = 4 * (2 * (trained + frozen) + 3 * trained)  # weights, average; gradient and two moments of the trained
    states /= world if config.parallel == "fsdp" else 1
    epochs = config.batch_size * config.steps / samples
    return (
        f"parameters: {trained:,} trained, {frozen:,} frozen | batch {config.batch_size} = {micro} x {accumulation} "
        f"accumulated x {world} processes | {samples:,} samples, {epochs:.1f} epochs | "
        f"weights, gradients, optimizer and average: {states / 2**30:.2f} GiB per process"
    )
