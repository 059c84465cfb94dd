"""What the trainer costs beside the training: its samples per second against a plain PyTorch loop over the same model.

    python benchmarks/trainer_overhead.py --model DiT-S/2-skip --batch 8

The plain loop does what a training cannot do without: it reads batches through PyTorch's own loader, draws noise,
computes the loss and its gradients, and updates the weights and their average. The trainer also makes every step
repeatable, checks that it is finite, counts, logs and saves. Both read the same encoded samples from memory, in turn.
"""

import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from skipdit.class_to_image.model import DiT
from skipdit.cli import Parser, friendly_errors
from skipdit.training.ema import EMA
from skipdit.training.latents import clean_latents
from skipdit.training.loop import fit
from skipdit.training.objective import make_objective
from skipdit.training.optimizer import make_optimizers
from skipdit.training.settings import TrainConfig
from skipdit.training.steps import Draw
from skipdit.utils.device import process_state

WARM = 5  # steps of each run that are not timed


class Samples(Dataset):
    """Encoded samples in memory."""

    def __init__(self, count: int, shape: tuple[int, ...]):
        generator = torch.Generator().manual_seed(0)
        self._mean = torch.randn(count, 2, *shape, generator=generator).half()
        self._std = torch.rand(count, 2, *shape, generator=generator).half()

    def __len__(self) -> int:
        return len(self._mean)

    def __getitem__(self, index: int) -> dict:
        return {"mean": self._mean[index], "std": self._std[index], "label": index % 10}


def losses(model: nn.Module, batch: dict, draw: Draw, objective) -> torch.Tensor:
    x0 = clean_latents(batch, draw.rand() < 0.5, "sample", None, draw.randn)
    x, t, loss = objective(x0, draw)
    return loss(model(x, t, batch["label"]))


def by_trainer(model: nn.Module, data: Dataset, config: TrainConfig, folder: Path) -> float:
    """Samples per second of `fit` after its first steps."""
    objective = make_objective(config)
    fit(model, lambda *args: losses(*args, objective), data, config, folder, config)
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
    return median(line["samples_per_second"] for line in lines[1:])


def by_plain_loop(model: nn.Module, data: Dataset, config: TrainConfig) -> float:
    """Samples per second of the plain loop after its first steps."""
    device, objective, ema = next(model.parameters()).device, make_objective(config), EMA(model, config.ema_decay)
    fused = device.type == "cuda"
    (optimizer,) = make_optimizers(model, "adamw", config.lr, None, config.betas, config.weight_decay, fused)
    loader = iter(DataLoader(data, config.batch_size, shuffle=True, drop_last=True))
    seconds = []
    for step in range(config.steps):
        began = perf_counter()
        batch = {key: value.to(device) for key, value in next(loader).items()}
        draw = Draw(0, step, range(config.batch_size), config.batch_size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = losses(model, batch, draw, objective).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, step + 1)
        loss.item()  # waits for the device, as progress bars do
        seconds.append(perf_counter() - began)
    return config.batch_size / median(seconds[WARM:])


@friendly_errors("starts anew")
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="DiT-S/2-skip", help="a published name [%(default)s]")
    parser.add_argument("--latents", type=int, default=32, help="side of the latents [%(default)s]")
    parser.add_argument("--batch", type=int, default=8, help="samples per step [%(default)s]")
    parser.add_argument("--steps", type=int, default=25, help="of each run [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each [%(default)s]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="[%(default)s]")
    args = parser.parse_args()
    device = process_state().device
    model = DiT.from_name(args.model, input_size=args.latents).to(device).train()
    data = Samples(args.batch * args.steps, model.sample_shape)
    common = {"log_every": WARM, "save_every": 0, "sample_every": 0, "workers": 0, "precision": args.precision}
    config = TrainConfig(steps=args.steps, batch_size=args.batch, **common)
    rates: dict[str, list[float]] = {"trainer": [], "plain loop": []}
    for number in range(args.rounds):  # in turn: a machine that slows down slows both
        with TemporaryDirectory() as folder:
            rates["trainer"].append(by_trainer(model, data, config, Path(folder)))
        rates["plain loop"].append(by_plain_loop(model, data, config))
        print(f"round {number + 1} of {args.rounds}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in rates.items()))
    trainer, plain = (median(values) for values in rates.values())
    print(f"\n{args.model}, batch {args.batch}, {args.precision} on {device}")
    print(f"plain loop {plain:.2f} samples/s, trainer {trainer:.2f}: it takes {plain / trainer - 1:.1%} more time")


if __name__ == "__main__":
    main()
