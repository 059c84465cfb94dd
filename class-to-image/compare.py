"""The same images with several caches: a table of speed and fidelity, and a picture to look at.

    python class-to-image/compare.py --config configs/class-to-image/demo.yaml

Rows: the uncached run, reuse (order 0), forecast (order 1), and simply fewer steps at the cost of the cached run.
Every row starts from the same noise. Takes a sampler's config; writes compare.png and compare.json into its `out`.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from skipdit.bench import run_flops
from skipdit.cache import CacheSpec, SkipCache
from skipdit.class_to_image.sample import Config, generate, generate_settings, open_models
from skipdit.config import friendly_errors, load_config, make_parser, to_dict
from skipdit.data.images import to_uint8
from skipdit.diffusion import Diffusion
from skipdit.metrics.fidelity import psnr, ssim
from skipdit.sample import generators, versions
from skipdit.vae import decode


@dataclass
class Row:
    """One way to sample."""

    name: str
    spec: CacheSpec
    steps: int

    def cache(self) -> SkipCache:
        return SkipCache(self.spec, Diffusion(self.steps).sampling_timesteps)

    def flops(self, per_step: dict[str, float]) -> float:
        return run_flops(self.cache(), per_step)


def rows_for(config: Config, intervals: list[int], branch: int, per_step: dict[str, float]) -> list[Row]:
    """Uncached, then per interval: reuse, forecast, and the number of uncached steps nearest to their FLOPs."""
    rows = [Row("uncached", CacheSpec(), config.steps)]
    for interval in intervals:
        reuse = Row(f"reuse N={interval}", CacheSpec(interval, 1000, 20, branch), config.steps)
        forecast = Row(f"forecast N={interval}", reuse.spec.with_order(1), config.steps)
        fewer = max(1, round(reuse.flops(per_step) / per_step["full"]))
        rows += [reuse, forecast, Row(f"{fewer} steps", CacheSpec(), fewer)]
    return rows


def compare(config: Config, rows: list[Row], models, repeats: int) -> tuple[list[dict], list[Tensor]]:
    """Sample every row `repeats` times in turn; medians of time, fidelity to the first row.

    Returns one dict per row, and the images (N, 3, H, W), uint8, of each.
    """
    model, vae, per_step = models
    classes = list(config.classes) or list(range(config.model.num_classes))
    labels = torch.tensor([classes[i % len(classes)] for i in range(config.num_samples)], device=model.device)
    for warm_up in ("none", f"N2-1000-0-b{rows[-2].spec.branch}"):  # both kinds of step, in case they compile
        noise = generators(0, range(len(labels)), model.device)
        generate(model, labels, noise, steps=4, sampler="ddim", cache=warm_up)
    times: list[list[float]] = [[] for _ in rows]
    images: list[Tensor] = [torch.empty(0)] * len(rows)
    for _ in range(repeats):  # interleaved: a machine that slows down slows all rows
        for number, row in enumerate(rows):
            noise = generators(config.seed, range(config.num_samples), model.device)
            began = time.perf_counter()
            latents = generate(
                model,
                labels,
                noise,
                **generate_settings(config) | {"steps": row.steps},
                cache=row.cache(),
                progress=True,
            )
            images[number] = to_uint8(decode(vae, latents)).cpu()
            times[number].append((time.perf_counter() - began) / config.num_samples)
    table = []
    for row, seconds, made in zip(rows, times, images, strict=True):
        cache, middle = row.cache(), median(seconds)
        table.append(
            {
                "name": row.name,
                "cache": str(row.spec),
                "full_steps": cache.full_steps,
                "cached_steps": cache.cached_steps,
                "seconds_per_image": middle,
                "speedup": median(times[0]) / middle,
                "flops_speedup": rows[0].flops(per_step) / row.flops(per_step),
                "psnr": psnr(made, images[0]).mean().item(),
                "ssim": ssim(made, images[0]).mean().item(),
            }
        )
    return table, images


def markdown(table: list[dict]) -> str:
    """The table as the README shows it."""
    lines = [
        "| | full + cached steps | s / image | speedup | speedup in FLOPs | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        fidelity = "| |" if math.isinf(row["psnr"]) else f"| {row['psnr']:.1f} | {row['ssim']:.3f} |"
        lines.append(
            f"| {row['name']} | {row['full_steps']} + {row['cached_steps']} | {row['seconds_per_image']:.3f} "
            f"| {row['speedup']:.2f} | {row['flops_speedup']:.2f} {fidelity}"
        )
    return "\n".join(lines)


def picture(table: list[dict], images: list[Tensor], columns: int = 10, side: int = 64) -> Image.Image:
    """One line of images per row of the table, with its name, speedup in FLOPs and PSNR on the left."""
    columns = min(columns, len(images[0]))
    margin, gap = 130, 2
    canvas = Image.new("RGB", (margin + columns * (side + gap), len(table) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for y, (row, made) in enumerate(zip(table, images, strict=True)):
        cost = "" if math.isinf(row["psnr"]) else f"\n{row['flops_speedup']:.2f}x, {row['psnr']:.1f} dB"
        draw.text((4, y * (side + gap) + side // 2 - 14), row["name"] + cost, fill="black", font=font)
        for x in range(columns):
            tile = Image.fromarray(made[x].permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(tile, (margin + x * (side + gap), y * (side + gap)))
    return canvas


def main() -> None:
    parser = make_parser(Config, __doc__)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 4], help="cache intervals [2 3 4]")
    parser.add_argument("--branch", type=int, default=1, help="cache branch [%(default)s]")
    parser.add_argument("--repeats", type=int, default=1, help="times to run each row; medians are shown [%(default)s]")
    args = parser.parse_intermixed_args()
    with friendly_errors():
        config = load_config(Config, args.config, args.overrides)
        models = open_models(config, args.branch)
        rows = rows_for(config, args.intervals, args.branch, models.flops)
        table, images = compare(config, rows, models, args.repeats)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    picture(table, images).save(out / "compare.png")
    record = {"rows": table, "config": to_dict(config), **versions()}
    (out / "compare.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{config.num_samples} images, {config.sampler} {config.steps} steps, guidance {config.guidance_scale}\n")
    print(markdown(table))
    print(f"\nside by side: {out / 'compare.png'}")


if __name__ == "__main__":
    main()
