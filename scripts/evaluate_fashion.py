"""Judge the embedded FashionMNIST model, without Skip-Cache and with it.

    python scripts/evaluate_fashion.py --data data --out results/fashion-eval
    python scripts/evaluate_fashion.py --data data --cache results/demo-plan.json --cache 19    # and 19 steps

Three questions, each answered by a number that a reader can check against a floor:
- Is it the class that was asked for? A small classifier, trained here on the real training images, says.
- Do the images look like the real ones? The Fréchet distance between the classifier's features of the samples and of
  the real test images; the floor is the distance of as many real training images.
- How much does caching change? PSNR and SSIM of each image against the uncached one of the same seed.

Writes results.json and prints a markdown table. The same command again continues an interrupted run.
Measured on one core: three minutes for the classifier, then three seconds per sample for the default caches together.
"""

import argparse
import json
import math
import platform
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import skipdit
from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.class_to_image.sample import Config, ImageSampler
from skipdit.cli import Parser, friendly_errors
from skipdit.config import load_config
from skipdit.encoders.autoencoder import encode, pixels
from skipdit.evaluation.fashion import CLASSES, EPOCHS, IMAGE_SIZE, load_images, load_judge
from skipdit.layers.flops import run_flops, step_flops
from skipdit.metrics import FIDELITY_COLUMNS, fidelity_cells, measure_fidelity
from skipdit.sampling.job import Job
from skipdit.sampling.report import step_counts, steps_column
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.pixels import to_float
from skipdit.utils.provenance import fingerprint

CACHES = [f"N{interval}-1000-20{order}" for order in ("", "-o1") for interval in (2, 3, 4)]


def balanced(labels: Tensor, count: int) -> Tensor:
    """Indices (count,) of random images whose classes go round as those of the samples do: image i has class i % 10."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    of_class = [order[labels[order] == c] for c in range(CLASSES)]
    return torch.stack([of_class[i % len(of_class)][i // len(of_class)] for i in range(count)])


def parse(cache: str) -> CachePolicy | int:
    """A cache, or a number of uncached steps.

    Raises ValueError for neither, and for a cache that decides at run time: what that costs is not known.
    """
    policy = int(cache) if cache.isdecimal() else parse_policy(cache)
    if policy == 0 or (not isinstance(policy, int) and policy.adaptive):
        raise UserError(f"--cache {cache}: give an interval, a plan, or a number of uncached steps")
    return policy


def sample(sampler: ImageSampler, steps: int, policy: CachePolicy, identity: dict, folder: Path) -> Tensor:
    """Latents (N, C, h, w) under a cache, on the CPU. Those that `folder` already holds are not made again."""
    policy.check(identity["weights"], sampler.method, sampler.config.guidance_scale)
    job = Job(folder, identity | {"steps": steps, "cache": str(policy)}, sampler.total, suffix="pt")
    progress = tqdm(total=sampler.total, desc=folder.name, unit="image")
    progress.update(sampler.total - len(job.pending()))
    for indices in sampler.batches(job.pending()):
        latents, _ = sampler.latents(indices, steps, policy)
        for index, latent in zip(indices, latents.cpu(), strict=True):
            job.save(index, partial(torch.save, latent.clone()))  # a view would be saved with its whole batch
        progress.update(len(indices))
    progress.close()
    return torch.stack([torch.load(job.path(i), weights_only=True) for i in range(sampler.total)])


def evaluate(config: Config, data: Path, out: Path, caches: list[str]) -> dict:
    """Judge a model. Returns what results.json holds: `protocol` and `rows`."""
    policies = [CacheSpec(), *map(parse, caches)]
    device, count = process_state().device, config.num_samples
    if (config.image_size, config.model.num_classes) != (IMAGE_SIZE, CLASSES):
        raise UserError(
            f"FashionMNIST has {CLASSES} classes at image_size {IMAGE_SIZE}; this model has "
            f"{config.model.num_classes} at {config.image_size}"
        )
    if not 2 <= count <= 10_000:
        raise UserError(f"--samples is {count}; 2 to 10000 can be compared with the real test images")
    branches = [policy.branch for policy in policies if not isinstance(policy, int) and policy.caches]
    sampler = ImageSampler(replace(config, dtype="float32", classes=list(range(CLASSES))), max(branches, default=None))
    model, vae = sampler.model, sampler.vae

    out.mkdir(parents=True, exist_ok=True)
    train, test = load_images(data, train=True), load_images(data, train=False)
    judge = load_judge(out / "classifier.pt", train, test, device)

    sampling = {
        "weights": fingerprint(model),  # a fingerprint of any module's weights
        "sampler": config.sampler,
        "steps": config.steps,  # fewer in the rows that say so
        "guidance_scale": config.guidance_scale,
        "guidance_channels": config.guidance_channels,
        "guidance_interval": [config.guidance_low, config.guidance_high],
        "seed": config.seed,
        "dtype": "float32",
        "device": device.type,
    }
    classes = torch.arange(count) % CLASSES
    some_train, some_test = (images[balanced(labels, count)] for images, labels in (train, test))
    rebuilt = _images(vae, [encode(vae, to_float(part).to(device))[0] for part in some_test.split(100)])
    rows = [
        {"images": "real training images (the floor)", **judge.scores(some_train, classes)},
        {
            "images": "test images, autoencoded",
            **judge.scores(rebuilt, classes),
            **measure_fidelity(rebuilt, some_test),
        },
    ]
    uncached = None
    for wanted in policies:
        steps, policy = (wanted, CacheSpec()) if isinstance(wanted, int) else (config.steps, wanted)
        name = f"{steps} steps" if isinstance(wanted, int) else str(policy)
        plan = SkipCache(policy, sampler.timesteps(steps))
        flops = step_flops(model, 1 if config.guidance_scale == 1 else 2, policy.branch)
        folder = out / "samples" / re.sub(r"[^\w.-]+", "-", name)
        latents = sample(sampler, steps, policy, sampling, folder)
        images = _images(vae, latents.to(device).split(100))
        row = {"images": name, **step_counts(plan)}
        row["flops_speedup"] = config.steps * flops["full"] / run_flops(plan, flops)
        row |= judge.scores(images, classes)
        if uncached is None:
            uncached = images
        else:
            row |= measure_fidelity(images, uncached)
        rows.append(row)

    protocol = sampling | {
        "samples": count,
        "classes": "sample i has class i % 10",
        "seeds": "sample i starts from skipdit.utils.seeding.generators(seed, [i])",
        "vae": fingerprint(vae),
        "classifier": {"test_accuracy": judge.test_accuracy, "epochs": EPOCHS, "features": judge.real.shape[1]},
        "frechet_reference": f"{len(judge.real)} real test images",
        "versions": {"skipdit": skipdit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return {"protocol": protocol, "rows": rows}


def _images(vae: nn.Module, parts: list[Tensor]) -> Tensor:
    """Batches of latents -> uint8 images (N, 3, H, W), on the CPU."""
    return torch.cat([pixels(vae, latents) for latents in parts])


def table(rows: list[dict]) -> str:
    """Results as a markdown table; a dash where a number has no meaning."""

    columns = {
        "flops_speedup": "{:.2f}x",
        "accuracy": "{:.1%}",
        "frechet": "{:.3f}",
    }
    title, steps = steps_column(rows)
    lines = [
        f"| images | {title} | fewer FLOPs | class as asked | Fréchet | {' | '.join(FIDELITY_COLUMNS)} |",
        "|---" * (5 + len(FIDELITY_COLUMNS)) + "|",
    ]
    for row, counts in zip(rows, steps, strict=True):
        numbers = [form.format(row[key]) if key in row else "–" for key, form in columns.items()]
        lines.append(f"| {' | '.join([row['images'], counts, *numbers, *fidelity_cells(row)])} |")
    return "\n".join(lines)


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of FashionMNIST/ [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("results/fashion-eval"), help="[%(default)s]")
    parser.add_argument(
        "--config", default="configs/class-to-image/demo.yaml", help="the sampler's settings [%(default)s]"
    )
    parser.add_argument(
        "--cache",
        action="append",
        metavar="SPEC",
        help=f"an interval, plan FILE.json, or number of uncached steps; may come again [{' '.join(CACHES)}]",
    )
    parser.add_argument("--samples", dest="num_samples", type=int, default=1000, help="per cache spec [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=50, help="images per model call [%(default)s]")
    flags = parser.add_argument_group("instead of the config's", argument_default=argparse.SUPPRESS)
    flags.add_argument("--weights", help="checkpoint")
    flags.add_argument("--sampler", choices=["ddim", "ddpm"])
    flags.add_argument("--steps", type=int, help="sampling steps")
    flags.add_argument("--seed", type=int, help="of the samples' noise")
    flags.add_argument("--guidance-scale", type=float, help="1 is none")
    flags.add_argument("--guidance-channels", type=channels, help="leading latent channels to guide, or all")
    settings = vars(parser.parse_args())
    data, out, file, caches = (settings.pop(key) for key in ("data", "out", "config", "cache"))
    config = replace(load_config(Config, file), **settings)
    results = evaluate(config, data, out, caches or CACHES)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    error = math.sqrt(0.25 / config.num_samples)
    print(f"\n{table(results['rows'])}\n")
    print(
        f"{config.num_samples} images per row. The accuracies' standard error is at most "
        f"{error:.1%}. Fréchet distances have a bias that depends on the number of images; "
        f"compare them with the floor's. PSNR and SSIM are against the uncached images, or the originals."
    )


def channels(text: str) -> int | None:
    """The value of --guidance-channels, as `Config.guidance_channels` wants it."""
    return None if text == "all" else int(text)


if __name__ == "__main__":
    main()
