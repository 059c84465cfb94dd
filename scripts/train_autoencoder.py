"""Train the small `AutoencoderKL` behind the embedded FashionMNIST model.

    python scripts/train_autoencoder.py --data data --out checkpoints/fashion-vae

A diffusers autoencoder in diffusers' own folder layout, so that the samplers and trainers treat it exactly as they
treat the Stable Diffusion one. Images are 32x32 RGB in [-1, 1]; latents are 4x8x8, scaled to unit standard deviation by
the `scaling_factor` that ends up in its config.json. About eighteen minutes on two cores.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torchvision.datasets import FashionMNIST
from tqdm import tqdm


def load_images(root: str, train: bool) -> torch.Tensor:
    """All images as uint8 (N, 1, 32, 32): the 28x28 originals with a margin of two black pixels."""
    return F.pad(FashionMNIST(root, train=train, download=True).data[:, None], (2, 2, 2, 2))


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 1, H, W) to float (N, 3, H, W) in [-1, 1]."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


@torch.no_grad()
def evaluate(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, float]:
    """PSNR in dB of mean-latent reconstructions (range 2), and the standard deviation of sampled latents."""
    posteriors = [vae.encode(to_rgb(chunk)).latent_dist for chunk in images.split(250)]
    recons = torch.cat([vae.decode(p.mean).sample for p in posteriors])
    mse = (recons - to_rgb(images)).square().mean(dim=(1, 2, 3))
    return {
        "psnr": (10 * torch.log10(4 / mse)).mean().item(),
        "latent_std": torch.cat([p.sample() for p in posteriors]).std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder that holds (or receives) FashionMNIST/ [%(default)s]")
    parser.add_argument("--out", required=True, type=Path, help="folder for config.json and the weights")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step [%(default)s]")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, cosine to zero [%(default)s]")
    parser.add_argument(
        "--kl-weight", type=float, default=2e-4, help="weight of the KL divergence, nats per latent value [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train, test = load_images(args.data, True), load_images(args.data, False)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    started, order = time.time(), torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(args.steps), desc="autoencoder", unit="step")
    for _ in progress:
        images = to_rgb(train[torch.randint(len(train), (args.batch_size,), generator=order)])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
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

    scaling = 1 / evaluate(vae, train[:2000])["latent_std"]
    vae.register_to_config(scaling_factor=round(scaling, 5))
    vae.half().save_pretrained(args.out)  # half the bytes; the reader upcasts
    numbers = evaluate(vae.float(), test[:2000])
    report = {
        **{key: value for key, value in vars(args).items() if key not in ("data", "out")},
        "minutes": round((time.time() - started) / 60, 1),
        "test_psnr_db": round(numbers["psnr"], 2),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    size = sum(p.numel() for p in vae.parameters())
    print(f"{args.out}: {size:,} parameters, test PSNR {numbers['psnr']:.2f} dB, scaling {scaling:.4f}")


if __name__ == "__main__":
    main()
