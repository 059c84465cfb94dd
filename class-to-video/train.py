"""Train Skip-DiT (Latte) on clips, with single images beside them: from scratch, or in two stages onto a plain Latte.

    accelerate launch class-to-video/train.py --config configs/class-to-video/ucf101_scratch.yaml
    python class-to-video/train.py --config configs/class-to-video/emoji.yaml out=results/mine

The same command again continues an interrupted run.
"""

from skipdit.class_to_video.settings import TrainingConfig as Config
from skipdit.cli import say_start
from skipdit.training.arguments import read_arguments

if __name__ == "__main__":
    read_arguments(Config, __doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from pathlib import Path

import torch
from diffusers import AutoencoderKL

from skipdit.class_to_video.model import Latte
from skipdit.class_to_video.sample import build_model
from skipdit.data.latents import open_clips
from skipdit.encoders.autoencoder import latent_size, pixels
from skipdit.sampling.class_conditional import generate
from skipdit.training.latents import joint_latents
from skipdit.training.loop import fit
from skipdit.training.objective import make_objective
from skipdit.training.prepare import open_training, run_trainer
from skipdit.training.steps import Draw, Loss
from skipdit.utils.errors import UserError
from skipdit.utils.seeding import generators
from skipdit.utils.video import write_look


def make_loss(config: Config, vae: AutoencoderKL) -> Loss:
    """The loss of joint training, of the F frames of a clip and the I images behind them."""
    objective, classes, images = make_objective(config.train), config.model.num_classes, config.data.images

    def loss(model: torch.nn.Module, batch: dict, draw: Draw) -> torch.Tensor:
        x0 = joint_latents(batch, config.data, vae, draw)  # (N, F + I, C, h, w)
        y = y_image = None
        if classes is not None:
            labels = torch.cat([batch["label"][:, None], *([batch["image_label"]] if images else [])], dim=1)
            labels = torch.where(draw.rand(1 + images) < config.label_dropout, classes, labels)
            y, y_image = labels[:, 0], labels[:, 1:]
        x, t, losses = objective(x0, draw)
        return losses(model(x, t, y, y_image, use_image_num=images))

    return loss


def train(config: Config, dry_run: bool = False) -> Latte:
    """Run a config. Returns the averaged model."""

    def build(vae: AutoencoderKL) -> Latte:
        side = latent_size(config.data.image_size, vae)
        return build_model(config.model, side, config.data.num_frames, vae.config.latent_channels)

    config, model, vae = open_training(
        config,
        config.data.files(),
        build,
        "skipdit download class-to-video",
    )
    dataset, classes = open_clips(config.data, vae), config.model.num_classes
    if classes is not None and not 0 < dataset.num_classes <= classes:
        raise UserError(
            f"{config.data.path} has {dataset.num_classes} classes and the model {classes}: set model.num_classes to "
            "that, and data.labelled=true for folders that are classes"
        )

    def sample(model: Latte, step: int) -> None:
        count = min(8, classes or 4)
        labels = None if classes is None else torch.arange(count, device=model.device)
        noise = generators(config.train.seed, range(count), model.device)
        settings = {"sampler": config.train.preview, "guidance_scale": config.grid_guidance}
        latents = generate(model, labels, noise, steps=50, progress=True, **settings)
        clips = pixels(vae.to(model.device), latents)
        write_look(Path(config.out) / "samples", f"{step:07d}", clips)

    return fit(model, make_loss(config, vae), dataset, config.train, config.out, config, sample, dry_run)


if __name__ == "__main__":
    run_trainer(Config, __doc__, train)
