"""Train the small `AutoencoderKL` behind an embedded model.

    python scripts/train_autoencoder.py --fashion data --out checkpoints/fashion-vae
    python scripts/train_autoencoder.py --folders data/emoji-anim/videos data/emoji-3d/images \\
        --init class-to-image/weights/vae --out checkpoints/emoji-vae

A diffusers autoencoder in diffusers' own folder layout, so that the samplers and trainers treat it exactly as they
treat the Stable Diffusion one. Images are square RGB in [-1, 1]; the latents have a quarter of their side and four
channels, or as many as --latent-channels says, scaled to unit standard deviation by the `scaling_factor` that ends up
in config.json. About twenty minutes on two cores.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

from skipdit.cli import Parser, friendly_errors
from skipdit.data.files import is_a, read_picture, walk
from skipdit.data.video import read_mp4
from skipdit.utils.pixels import to_float

HELD_OUT = 2000  # images that only measure


def load_fashion(root: str) -> tuple[Tensor, Tensor]:
    """Training and test images, uint8 (N, 1, 32, 32): the 28x28 originals with a margin of two black pixels."""
    sets = [FashionMNIST(root, train=train, download=True).data for train in (True, False)]
    train, test = (F.pad(images[:, None], (2, 2, 2, 2)) for images in sets)
    return train, test[:HELD_OUT]


def load_folders(folders: list[Path]) -> tuple[Tensor, Tensor]:
    """All pictures, and every fourth frame of all clips, below the folders: uint8 (N, 3, H, W), some of them held out.

    Whole files are held out, at most a tenth of all: the frames of one clip are nearly the same picture.
    """
    files = sorted(file for folder in folders for file in walk(folder) if is_a(file, {".png", ".mp4"}))
    if not files:
        raise SystemExit(f"error: no .png or .mp4 below {', '.join(map(str, folders))}")
    train, test = [], []
    for number, file in enumerate(tqdm(files, desc="reading", unit="file")):
        if is_a(file, {".mp4"}):
            frames = read_mp4(file)[::4]
        else:
            frames = torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1)[None]
        (test if number % 10 == 0 else train).append(frames)
    return torch.cat(train), torch.cat(test)[:: max(1, sum(map(len, test)) // HELD_OUT)]


def to_rgb(images: Tensor) -> Tensor:
    """uint8 (N, 1 or 3, H, W) to float (N, 3, H, W) in [-1, 1]."""
    return to_float(images).expand(-1, 3, -1, -1)


@torch.no_grad()
def evaluate(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """PSNR in dB of mean-latent reconstructions (range 2), and the standard deviation of sampled latents."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # here: it takes a second to import

    posteriors, decibels = [], []
    for chunk in images.split(100):
        posteriors.append(vae.encode(to_rgb(chunk)).latent_dist)
        recons = vae.decode(posteriors[-1].mean).sample
        decibels.append(peak_signal_noise_ratio(recons, to_rgb(chunk), 2.0, reduction="none", dim=(1, 2, 3)))
    return {
        "psnr": torch.cat(decibels).mean().item(),
        "latent_std": torch.cat([p.sample() for p in posteriors]).std().item(),
    }


def build(size: int, latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def load_matching(vae: AutoencoderKL, state: dict[str, Tensor]) -> None:
    """Load the weights that fit; those at the latents do not where their number of channels is another one."""
    ours = vae.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if tensor.shape == ours[name].shape}
    vae.load_state_dict(fitting, strict=False)


@friendly_errors("starts anew")
def main() -> None:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--fashion", metavar="FOLDER", help="folder that holds (or receives) FashionMNIST/")
    source.add_argument("--folders", nargs="+", type=Path, help="folders with .png and .mp4 of one square size")
    parser.add_argument("--init", type=Path, help="autoencoder of this script to start from")
    parser.add_argument("--latent-channels", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--out", required=True, type=Path, help="folder for config.json and the weights")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step [%(default)s]")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, cosine to zero [%(default)s]")
    parser.add_argument(
        "--kl-weight", type=float, default=2e-4, help="weight of the KL divergence, nats per latent value [%(default)s]"
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: faster where the CPU has it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train, test = load_fashion(args.fashion) if args.fashion else load_folders(args.folders)
    vae = build(train.shape[-1], args.latent_channels)
    if args.init:
        load_matching(vae, AutoencoderKL.from_pretrained(args.init).state_dict())
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    started, order = time.time(), torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(args.steps), desc="autoencoder", unit="step")
    for _ in progress:
        images = to_rgb(train[torch.randint(len(train), (args.batch_size,), generator=order)])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(images).latent_dist
            recon = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(recon, images) + args.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}")

    sample = torch.randperm(len(train), generator=order)[:HELD_OUT]
    scaling = 1 / evaluate(vae, train[sample])["latent_std"]
    vae.register_to_config(scaling_factor=round(scaling, 5), _name_or_path="")
    vae.half().save_pretrained(args.out)  # half the bytes; the reader upcasts
    numbers = evaluate(vae.float(), test)
    report = {
        **{key: value for key, value in vars(args).items() if key not in ("fashion", "folders", "init", "out")},
        "init": args.init is not None,
        "minutes": round((time.time() - started) / 60, 1),
        "test_psnr_db": round(numbers["psnr"], 2),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    size = sum(p.numel() for p in vae.parameters())
    print(f"{args.out}: {size:,} parameters, test PSNR {numbers['psnr']:.2f} dB, scaling {scaling:.4f}")


if __name__ == "__main__":
    main()
