"""Training steps of DiT-XL/2 by the trainer's own loop, from random latents: images per second, memory, largest batch.

`skipdit.training.loop.fit` runs as in a training; the loss counts its calls, and ends the run after enough of them.
Between two calls lie one forward and backward pass, the optimizer, the average of the weights, and the loading of a
batch.
"""

import itertools
import os
import statistics
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from gpu.bench import Bench
from gpu.models import Case, build
from gpu.plan import Row
from skipdit.diffusion.gaussian import Diffusion
from skipdit.utils.device import set_tf32

SECTION = "training"
WARM_UP = 4  # steps
STEPS = 25  # timed, at most
LAST = 3.0  # seconds that they take together
SPARE = 0.97  # of the memory that is free at first, for the largest batch: allocators leave gaps


@dataclass(frozen=True)
class Stage:
    """A way to train.

    Attributes:
        name: for people.
        freeze: train the skips only (stage 1); else everything.
        compile, checkpointing: of the trainer.
    """

    name: str
    freeze: bool = False
    compile: bool = False
    checkpointing: bool = False

    @property
    def full_name(self) -> str:
        more = [" compiled"] * self.compile + [" checkpointed"] * self.checkpointing
        return self.name + "".join(more)


class Enough(Exception):
    """Ends a run that was timed for long enough."""


@dataclass
class Pace:
    """Wall-clock times at the beginning of each step; ends the run after enough of them.

    Attributes:
        steps: to take at most; None: warm up, then as many as `LAST` seconds or `STEPS` allow.
    """

    steps: int | None = None
    times: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """Called at the beginning of a step; the one before has ended, since the trainer reads its gradient's norm."""
        self.times.append(time.perf_counter())
        done = len(self.times) - 1
        timed = done - WARM_UP
        if self.steps is None:
            enough = timed >= STEPS or (timed >= 4 and self.times[-1] - self.times[WARM_UP] > LAST)
        else:
            enough = done >= self.steps
        if enough:
            raise Enough

    def seconds(self) -> float:
        """Median of a step, without those of the warm-up."""
        timed = self.times[min(WARM_UP, len(self.times) - 2) :]
        return statistics.median(b - a for a, b in itertools.pairwise(timed))


class RandomLatents(Dataset):
    """Latents and labels as `data.latents` gives them, of noise."""

    def __init__(self, shape: tuple[int, ...], classes: int, count: int = 1024):
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(count, *shape, generator=generator)
        self.labels = torch.randint(classes, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.latents[index], "label": self.labels[index]}


def row(case: Case, stage: Stage, **expected: float) -> Row:
    """The row of one way to train. `expected`: seconds, as `plan.Row` has them."""
    settings = {"case": case, "stage": stage}
    compile = partial(compile_training, **settings) if stage.compile else None
    form = f"training {stage.full_name}" if stage.compile else ""
    measure = partial(measure_training, **settings)
    return Row(SECTION, stage.full_name, measure, form=form, compile=compile, **expected)


def largest_row(case: Case, stage: Stage, seconds: float) -> Row:
    """The row of the largest batch that fits."""
    return Row(SECTION, f"largest batch, {stage.full_name}", partial(find_largest, case=case, stage=stage), seconds)


def compile_training(bench: Bench, case: Case, stage: Stage) -> None:
    """Take one step."""
    train(bench, case, stage, bench.training_batch, Pace(1))


def measure_training(bench: Bench, case: Case, stage: Stage) -> dict[str, Any]:
    """Images per second of a training, its FLOPs and peak memory; the batch is halved until it fits."""
    while True:
        batch = bench.training_batch
        try:
            pace, peak = train(bench, case, stage, batch, Pace(WARM_UP + 2 if bench.tiny else None))
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            bench.training_batch //= 2
    seconds = pace.seconds()
    return {
        "model": case.name,
        "stage": stage.name,
        "compile": stage.compile,
        "checkpointing": stage.checkpointing,
        "batch": batch,
        "seconds": seconds,
        "steps": len(pace.times) - 1 - WARM_UP,
        "first_step_seconds": pace.times[1] - pace.times[0],
        "images_per_second": batch / seconds,
        "flops": batch * training_flops(case, stage.freeze),
        "peak_bytes": peak,
    }


def find_largest(bench: Bench, case: Case, stage: Stage) -> dict[str, Any]:
    """The largest batch of a step, to a multiple of 4: memory is linear in it, and the prediction is tried out."""
    if not bench.cuda:
        train(bench, case, stage, 2, Pace(2))
        return {"stage": stage.full_name, "batch": None, "tried": {}}
    small, large = 8, 24
    bench.close()
    free = torch.cuda.mem_get_info()[0]
    peaks = {batch: train(bench, case, stage, batch, Pace(2))[1] for batch in (small, large)}
    each = (peaks[large] - peaks[small]) / (large - small)
    guess = int((SPARE * free - peaks[small]) / each + small) // 4 * 4
    tried: dict[int, bool] = {}
    while guess >= 4 and len(tried) < 4:
        try:
            train(bench, case, stage, guess, Pace(2))
            tried[guess] = True
            break
        except torch.OutOfMemoryError:
            tried[guess] = False
            guess = int(guess * 0.95) // 4 * 4
    fits = [batch for batch, fitted in tried.items() if fitted]
    return {
        "stage": stage.full_name,
        "batch": max(fits, default=None),
        "tried": tried,
        "bytes_per_image": each,
        "bytes_of_states": peaks[small] - small * each,
        "free_bytes": free,
    }


def train(bench: Bench, case: Case, stage: Stage, batch: int, pace: Pace) -> tuple[Pace, int | None]:
    """Run the trainer until it was timed for long enough. Returns the times and the peak memory in bytes."""
    bench.close()
    bench.reset_peak()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _fit(bench, case, stage, batch, pace, folder)
    except Enough as error:
        error.__traceback__ = None  # its frames hold the model and the optimizer
    finally:
        set_tf32(False)  # which trainers allow; what is compiled ahead for other rows goes by it
    peak = bench.peak()
    bench.close()
    return pace, peak


def _fit(bench: Bench, case: Case, stage: Stage, batch: int, pace: Pace, folder: str) -> None:
    from skipdit.training.loop import fit
    from skipdit.training.settings import TrainConfig
    from skipdit.training.steps import Draw

    @dataclass
    class Run:
        """What a task's config has of a run."""

        out: str
        train: TrainConfig

    model = build(case, bench.device, torch.float32).train().requires_grad_(True)
    if stage.compile and not bench.cuda:
        model.compile = partial(model.compile, **bench.compiling("compiled", fullgraph=False))
    diffusion, classes = Diffusion(), model.null_class

    def loss(model: nn.Module, batch: dict, draw: Draw) -> Tensor:
        """As that of class-to-image/train.py, for latents that need no autoencoder."""
        pace.tick()
        x0, labels = batch["image"], torch.where(draw.rand() < 0.1, classes, batch["label"])
        t, noise = draw.randint(len(diffusion)), draw.randn(*batch["image"].shape[1:])
        x = diffusion.q_sample(x0, t, noise)
        return diffusion.losses(model(x, t, labels), x0, x, t, noise)["loss"]

    config = TrainConfig(
        steps=10_000,
        batch_size=batch,
        freeze=stage.freeze,
        compile=stage.compile,
        gradient_checkpointing=stage.checkpointing,
        workers=0,
        log_every=0,
        save_every=0,
        sample_every=0,
    )
    data = RandomLatents(model.sample_shape, classes)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # its bar of progress
        fit(model, loss, data, config, folder, Run(folder, config))


def training_flops(case: Case, freeze: bool) -> float:
    """FLOPs of a forward and a backward pass for one image, counted operation by operation on the meta device.

    A frozen layer has no gradient of its weights; the layers before the first skip have none at all then. What gradient
    checkpointing computes twice is counted once.
    """
    with torch.device("meta"):
        model = case.make().train()
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("skips."))
    with FlopCounterMode(display=False) as counter:
        model(**model.random_inputs(1)).sum().backward()
    return float(counter.get_total_flops())
