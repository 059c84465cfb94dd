"""Train Skip-DiT (Latte T2V) on captioned clips, with single images beside them: two stages onto a plain Latte, or from
scratch.

    accelerate launch text-to-video/train.py --config configs/text-to-video/t2v_train_stage1.yaml
    python text-to-video/train.py --config configs/text-to-video/emoji_stage2.yaml out=results/mine

The same command again continues an interrupted run.
"""

from skipdit.cli import say_start
from skipdit.text_to_video.settings import ModelConfig
from skipdit.text_to_video.settings import TrainingConfig as Config
from skipdit.training.arguments import read_arguments

if __name__ == "__main__":
    read_arguments(Config, __doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from pathlib import Path

import torch
from diffusers import AutoencoderKL, LattePipeline
from torch import Tensor
from tqdm import tqdm

from skipdit.config import changed
from skipdit.data.latents import open_clips
from skipdit.data.texts import Texts
from skipdit.encoders.autoencoder import latent_size, pixels
from skipdit.encoders.text import missing_text_files
from skipdit.text_to_video.model import LatteT2V
from skipdit.text_to_video.sample_t2v import Prompt, generate, make_scheduler
from skipdit.training.latents import joint_latents
from skipdit.training.loop import fit
from skipdit.training.objective import make_objective
from skipdit.training.prepare import open_texts, open_training, run_trainer
from skipdit.training.steps import Draw, Loss
from skipdit.utils.errors import UserError
from skipdit.utils.seeding import generators
from skipdit.utils.video import write_look

SHOWN = 8  # clips of a sample grid


def build_model(config: ModelConfig, latents: int, num_frames: int, in_channels: int = 4) -> LatteT2V:
    """The model of a config for latents of a side and channels. Raises ValueError if its folder's is for others."""
    if config.folder:
        settings = LatteT2V.load_config(config.folder)
        if settings["sample_size"] != latents or settings["video_length"] < num_frames:
            raise UserError(
                f"{config.folder} is of a model for {settings['video_length']} frames of {settings['sample_size']} "
                f"latent pixels; the data has {num_frames} of {latents} (data.num_frames, data.image_size)"
            )
        if settings["in_channels"] != in_channels:
            raise UserError(
                f"{config.folder} is of a model for {settings['in_channels']} latent channels; the autoencoder has "
                f"{in_channels}"
            )
        return LatteT2V.from_config(settings, skip=config.skip, fuse=config.fuse)
    given = config.given("folder")
    width = given.get("num_attention_heads", 16) * given.get("attention_head_dim", 72)
    given |= {"in_channels": in_channels, "out_channels": 2 * in_channels}
    model = LatteT2V(**given, cross_attention_dim=width, sample_size=latents, video_length=num_frames)
    if latents % (patch := model.config.patch_size):
        raise UserError(
            f"data.image_size makes latents of {latents} pixels a side, which patches of {patch} do not tile"
        )
    return model


def make_loss(config: Config, vae: AutoencoderKL, texts: Texts) -> Loss:
    """The loss of joint training, of the F frames of a clip and the I images behind them."""
    objective, images = make_objective(config.train), config.data.images

    def loss(model: torch.nn.Module, batch: dict, draw: Draw) -> Tensor:
        x0 = joint_latents(batch, config.data, vae, draw)  # (N, F + I, C, h, w)
        labels = torch.cat([batch["label"][:, None], *([batch["image_label"]] if images else [])], dim=1)
        text, mask = texts.take(labels, draw.rand(1 + images) < config.caption_dropout)  # (N, 1 + I, S, C')
        x, t, losses = objective(x0, draw)
        (out,) = model(x.transpose(1, 2), t, text, mask, use_image_num=images, return_dict=False)
        return losses(out.transpose(1, 2))

    return loss


def train(config: Config, dry_run: bool = False) -> LatteT2V:
    """Run a config. Returns the averaged model."""
    files = config.data.files() | ({"texts": config.texts} if config.texts else {})

    def build(vae: AutoencoderKL) -> LatteT2V:
        side = latent_size(config.data.image_size, vae)
        return build_model(config.model, side, config.data.num_frames, vae.config.latent_channels)

    config, model, vae = open_training(
        config,
        files | ({"model.folder": config.model.folder} if config.model.folder else {}),
        build,
        "skipdit download text-to-video --only plain pipeline tokenizer",
        absent=[] if config.texts else missing_text_files(config.text_encoder, config.tokenizer),
    )
    dataset = open_clips(config.data, vae)
    if dataset.captions is None:
        fix = "encode them again with --captions" if config.data.kind == "latents" else "set data.captions"
        raise UserError(f"{config.data.path}: the clips have no captions; {fix}")
    texts = open_texts(dataset.captions, config.texts, config.text_encoder, config.tokenizer, config.text_dtype)
    dim, known = model.config.caption_channels, config.text_fingerprint
    config = changed(config, {"text_fingerprint": texts.require("texts", dim, known)})  # kept, as the autoencoder's is
    shown = sorted(set(dataset.labels))[:SHOWN]  # captions of the sample clips

    def sample(model: LatteT2V, step: int) -> None:
        scheduler = make_scheduler(config.train.preview, flow_shift=model.flow_shift)
        pipe = LattePipeline(None, None, vae.to(model.device), model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        clips = []
        for label in tqdm(shown, desc="sample clips", unit="clip", leave=False):
            embeddings, _ = texts.take(torch.tensor([label]), torch.tensor([False]))
            prompt = Prompt(embeddings, texts.null[: embeddings.shape[1]].float()[None])
            noise = generators(config.train.seed, [label], model.device)
            clips += pixels(vae, generate(pipe, prompt, noise, guidance_scale=config.grid_guidance))
        folder = Path(config.out) / "samples"
        write_look(folder, f"{step:07d}", clips)
        (folder / "captions.txt").write_text("".join(f"{dataset.captions[i]}\n" for i in shown), encoding="utf-8")

    return fit(model, make_loss(config, vae, texts), dataset, config.train, config.out, config, sample, dry_run)


if __name__ == "__main__":
    run_trainer(Config, __doc__, train)
