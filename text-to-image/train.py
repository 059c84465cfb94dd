"""Train Hunyuan-DiT on captioned pictures: two stages onto the backbone without skips, from scratch, or LoRA.

    accelerate launch text-to-image/train.py --config configs/text-to-image/t2i_train_stage2.yaml
    python text-to-image/train.py --config configs/text-to-image/emoji_stage2.yaml out=results/mine

The same command again continues an interrupted run.
"""

from skipdit.cli import say_start
from skipdit.text_to_image.settings import ModelConfig
from skipdit.text_to_image.settings import TrainingConfig as Config
from skipdit.training.arguments import read_arguments

if __name__ == "__main__":
    read_arguments(Config, __doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from skipdit.config import changed
from skipdit.data.latents import open_pictures
from skipdit.data.pictures import bucket_sizes
from skipdit.data.texts import Texts
from skipdit.diffusion.gaussian import Diffusion
from skipdit.encoders.autoencoder import latent_size, pixels
from skipdit.encoders.reading import CLIP, T5
from skipdit.encoders.text import missing_text_files
from skipdit.pipelines.cache import disable_cache, enable_cache
from skipdit.text_to_image.model import HunyuanDiT, Rotary, rotary_tables
from skipdit.text_to_image.sample_t2i import FETCH, NOISE, UNIT, TextPair, generate, make_pipeline, make_scheduler
from skipdit.training.latents import clean_latents
from skipdit.training.loop import fit
from skipdit.training.lora import add_lora, save_lora
from skipdit.training.objective import make_objective
from skipdit.training.prepare import open_texts, open_training, run_trainer
from skipdit.training.steps import Draw, Loss
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import write_png
from skipdit.utils.seeding import generators

SHOWN = 8  # pictures of a sample grid


def build_model(config: ModelConfig, latents: int, in_channels: int = 4) -> HunyuanDiT:
    """The model of a config for latents of a given side and number of channels."""
    return HunyuanDiT((latents, latents), in_channels=in_channels, **config.given())


def make_loss(config: Config, vae: AutoencoderKL, clip: Texts, t5: Texts, model: HunyuanDiT) -> Loss:
    """The loss of the chosen objective; either text is dropped by itself. Of the model only the shapes count."""
    noise = {key: NOISE[key] for key in ("beta_start", "beta_end")}
    objective = make_objective(config.train, Diffusion(**noise, scaled=True, prediction="v"))
    patch_size, head_dim = model.config.patch_size, model.head_dim

    @cache
    def rotary(height: int, width: int, device: torch.device) -> Rotary:
        tables = rotary_tables(height // patch_size, width // patch_size, head_dim)
        return tuple(table.to(device) for table in tables)

    def loss(model: torch.nn.Module, batch: dict, draw: Draw) -> Tensor:
        flipped = (draw.rand() < 0.5) & config.data.flip
        x0 = clean_latents(batch, flipped, config.data.latents, vae, draw.randn)
        chance = draw.rand(2)
        texts = [
            *clip.take_whole(batch["label"], chance[:, 0] < config.clip.dropout),
            *t5.take_whole(batch["label"], chance[:, 1] < config.t5.dropout),
        ]
        x, t, losses = objective(x0, draw)
        (out,) = model(x, t, *texts, image_rotary_emb=rotary(*x.shape[-2:], x.device), return_dict=False)
        return losses(out)

    return loss


def train(config: Config, dry_run: bool = False) -> HunyuanDiT:
    """Run a config. Returns the averaged model."""
    if config.train.sample_every and config.data.image_size % UNIT:
        raise UserError(
            f"data.image_size {config.data.image_size} is not a multiple of {UNIT}: set train.sample_every=0"
        )
    if config.lora_rank and (config.train.freeze or config.train.parallel != "ddp" or not config.init):
        raise UserError("lora_rank puts adapters onto `init`: set that, train.freeze=false and train.parallel=ddp")
    absent = []
    for name, part in {"clip": config.clip, "t5": config.t5}.items():
        if not part.files and not part.encoder:
            raise UserError(f"set {name}.encoder, a text encoder, or {name}.files, what it gave of the captions")
        absent += [] if part.files else missing_text_files(part.encoder, part.tokenizer)

    def build(vae: AutoencoderKL) -> HunyuanDiT:
        side = latent_size(config.data.image_size, vae)
        model = build_model(config.model, side, vae.config.latent_channels)
        for size in bucket_sizes(config.data.image_size, config.data.buckets):
            name = f"data.buckets, {size[0]}x{size[1]}:" if config.data.buckets else "data.image_size"
            for side in size:  # now, and not when one is drawn, hours from here
                latent_size(side, vae, name, model.config.patch_size)
        return model

    config, model, vae = open_training(config, config.files(), build, FETCH, absent)
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    dataset, sizes = open_pictures(config.data, vae), model.config
    captions, pair = dataset.captions, []
    for name, part, reading, dim in [
        ("clip", config.clip, CLIP._replace(max_tokens=sizes.text_len), sizes.text_states_dim),
        ("t5", config.t5, T5._replace(max_tokens=sizes.text_len_t5), sizes.text_states_dim_t5),
    ]:
        texts = open_texts(captions, part.files, part.encoder, part.tokenizer, config.text_dtype, reading)
        known = texts.require(name, dim, part.fingerprint)
        config = changed(config, {f"{name}.fingerprint": known})  # kept with the run, as the autoencoder's is
        pair.append(texts)
    clip, t5 = pair
    shown = torch.arange(min(SHOWN, len(captions))) * (len(captions) // min(SHOWN, len(captions)))

    def sample(model: HunyuanDiT, step: int) -> None:
        device, pictures = model.device, []
        scheduler = make_scheduler(config.train.preview, flow_shift=model.flow_shift)
        pipe = make_pipeline(vae.to(device), model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        enable_cache(pipe, "none")  # the texts once
        settings = {"size": (config.data.image_size,) * 2, "steps": 50, "guidance_scale": config.grid_guidance}
        try:
            # one at a time: a training has little memory left
            for label in tqdm(shown.split(1), desc="sample grid", unit="image", leave=False):
                both = [
                    TextPair(*(texts.take_whole(label, torch.tensor([d])) for texts in (clip, t5)))
                    for d in (False, True)
                ]
                text, negative = (pair.rows([0], device, model.dtype) for pair in both)
                noise = generators(config.train.seed, label.tolist(), device)
                pictures.append(pixels(vae, generate(pipe, text, negative, noise, **settings)))
        finally:
            disable_cache(pipe)  # which lets go of the model
        folder = Path(config.out) / "samples"
        folder.mkdir(exist_ok=True)
        write_png(make_grid(torch.cat(pictures), nrow=4), str(folder / f"{step:07d}.png"))
        (folder / "captions.txt").write_text("".join(f"{captions[i]}\n" for i in shown), encoding="utf-8")

    loss = make_loss(config, vae, clip, t5, model)
    averaged = fit(model, loss, dataset, config.train, config.out, config, sample, dry_run)
    if config.lora_rank and not dry_run and process_state().is_main_process:
        save_lora(averaged, Path(config.out))
    return averaged


if __name__ == "__main__":
    run_trainer(Config, __doc__, train)
