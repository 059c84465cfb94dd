"""Train Skip-DiT for class-conditional images: from scratch, or in two stages onto a plain DiT.

    accelerate launch class-to-image/train.py --config configs/class-to-image/imagenet256_scratch.yaml
    python class-to-image/train.py --config configs/class-to-image/fashion_stage1.yaml out=results/mine

The same command again continues an interrupted run.
"""

from skipdit.class_to_image.settings import TrainingConfig as Config
from skipdit.cli import say_start
from skipdit.training.arguments import read_arguments

if __name__ == "__main__":
    read_arguments(Config, __doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torchvision.utils import make_grid
from tqdm import tqdm

from skipdit.class_to_image.model import DiT
from skipdit.class_to_image.sample import build_model
from skipdit.data.features import WithFeatures
from skipdit.data.latents import open_images
from skipdit.encoders.autoencoder import decode, latent_size, pixels
from skipdit.metrics.progress import FrechetJudge
from skipdit.sampling.class_conditional import generate, sampling_timesteps
from skipdit.training.latents import clean_latents
from skipdit.training.loop import fit
from skipdit.training.objective import make_objective
from skipdit.training.prepare import open_training, run_trainer
from skipdit.training.steps import Draw
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import write_png
from skipdit.utils.pixels import to_uint8
from skipdit.utils.seeding import generators


def make_judge(config: Config, vae: AutoencoderKL) -> tuple[int, Callable[[DiT, int], dict[str, float]]]:
    """Make what measures the Fréchet distance of samples every so many steps: see `fit`."""
    count, classes = config.judge.samples, config.model.num_classes
    shift = config.train.flow_shift if config.train.objective == "flow" else None
    sampling_timesteps(config.train.preview, config.judge.sampling_steps, shift)  # refused now, or in hours
    if count < classes:
        raise UserError(f"judge.samples={count} leaves out classes: set it to model.num_classes={classes} or more")
    frechet = None
    with process_state().main_process_first():
        if process_state().is_main_process:  # which alone judges
            frechet = FrechetJudge(config.judge, (config.data.image_size,) * 2, Path(config.out) / "judge")

    def images(model: DiT) -> Iterator[torch.Tensor]:
        settings = {"sampler": config.train.preview, "guidance_scale": 1.0, "steps": config.judge.sampling_steps}
        for indices in tqdm(torch.arange(count).split(64), desc="images to judge", unit="batch"):
            noise = generators(config.train.seed, indices.tolist(), model.device)
            yield pixels(vae.to(model.device), generate(model, (indices % classes).to(model.device), noise, **settings))

    def measure(model: DiT, step: int) -> dict[str, float]:
        distance = frechet(images(model))
        print(f"step {step}: the Fréchet distance of {count} images is {distance:.4g}")
        return {"frechet_distance": distance}

    return config.judge.every, measure


def train(config: Config, dry_run: bool = False) -> DiT:
    """Run a config. Returns the averaged model."""
    config, model, vae = open_training(
        config,
        config.data.files(),
        lambda vae: build_model(config.model, latent_size(config.data.image_size, vae), vae.config.latent_channels),
        "skipdit download class-to-image",
    )
    with process_state().local_main_process_first():  # a data set that downloads itself does so once
        dataset = open_images(config.data, vae)
    if config.train.align:
        dataset = WithFeatures(dataset)
    if dataset.num_classes > config.model.num_classes:
        raise UserError(f"{config.data.path} has {dataset.num_classes} classes; set model.num_classes to that")
    objective = make_objective(config.train)

    def loss(model: torch.nn.Module, batch: dict, draw: Draw) -> torch.Tensor:
        flipped = (draw.rand() < 0.5) & config.data.flip
        x0 = clean_latents(batch, flipped, config.data.latents, vae, draw.randn)
        labels = torch.where(draw.rand() < config.label_dropout, config.model.num_classes, batch["label"])
        x, t, losses = objective(x0, draw)
        return losses(model(x, t, labels))

    def sample(model: DiT, step: int) -> None:
        labels = torch.arange(min(64, 8 * config.model.num_classes), device=model.device) % config.model.num_classes
        noise = generators(config.train.seed, range(len(labels)), model.device)
        settings = {"sampler": config.train.preview, "guidance_scale": config.grid_guidance}
        latents = generate(model, labels, noise, steps=50, progress=True, **settings)
        columns = config.model.num_classes if config.model.num_classes <= 10 else 8
        grid = make_grid(to_uint8(decode(vae.to(model.device), latents)), nrow=columns)
        folder = Path(config.out) / "samples"
        folder.mkdir(exist_ok=True)
        write_png(grid.cpu(), str(folder / f"{step:07d}.png"))

    judge = make_judge(config, vae) if config.judge.every and not dry_run else None
    return fit(model, loss, dataset, config.train, config.out, config, sample, dry_run, judge)


if __name__ == "__main__":
    run_trainer(Config, __doc__, train)
