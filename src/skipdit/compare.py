"""The same samples with several caches: a table of speed and fidelity, and pictures to look at.

Rows: the uncached run, reuse (order 0), forecast (order 1), and simply fewer steps at the cost of the cached run. Every
row starts from the same noise.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from skipdit.bench import run_flops
from skipdit.cache import CacheSpec, SkipCache
from skipdit.class_sample import Models, SamplingConfig, generate, generate_settings, labels_of
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


def rows_for(steps: int, intervals: list[int], window: CacheSpec, per_step: dict[str, float]) -> list[Row]:
    """Uncached, then per interval: reuse, forecast, and the number of uncached steps nearest to their FLOPs."""
    rows = [Row("uncached", CacheSpec(), steps)]
    for interval in intervals:
        reuse = Row(f"reuse N={interval}", CacheSpec(interval, window.start, window.stop, window.branch), steps)
        forecast = Row(f"forecast N={interval}", reuse.spec.with_order(1), steps)
        fewer = max(1, round(reuse.flops(per_step) / per_step["full"]))
        rows += [reuse, forecast, Row(f"{fewer} steps", CacheSpec(), fewer)]
    return rows


def compare(config: SamplingConfig, rows: list[Row], models: Models, repeats: int) -> tuple[list[dict], list[Tensor]]:
    """Sample every row `repeats` times in turn; medians of time, fidelity to the first row.

    Returns one dict per row, and the samples (N, ..., 3, H, W), uint8, of each.
    """
    model, vae, per_step = models
    settings = generate_settings(config)

    def make(steps: int, cache: Callable[[], SkipCache]) -> Tensor:
        batches = []
        for start in range(0, config.num_samples, config.batch_size):
            indices = range(start, min(start + config.batch_size, config.num_samples))
            labels, noise = labels_of(config, model, indices), generators(config.seed, indices, model.device)
            changed = settings | {"steps": steps}
            latents = generate(model, labels, noise, **changed, cache=cache(), progress=True)
            batches.append(to_uint8(decode(vae, latents)).cpu())
        return torch.cat(batches)

    for spec in (CacheSpec(), CacheSpec(2, stop=0, branch=rows[-2].spec.branch)):  # warm up
        make(4, Row("", spec, 4).cache)
    times: list[list[float]] = [[] for _ in rows]
    samples: list[Tensor] = [torch.empty(0)] * len(rows)
    for _ in range(repeats):  # interleaved: a machine that slows down slows all rows
        for number, row in enumerate(rows):
            began = time.perf_counter()
            samples[number] = make(row.steps, row.cache)
            times[number].append((time.perf_counter() - began) / config.num_samples)
    table = []
    for row, seconds, made in zip(rows, times, samples, strict=True):
        cache, middle = row.cache(), median(seconds)
        pictures = made.flatten(0, -4), samples[0].flatten(0, -4)
        table.append(
            {
                "name": row.name,
                "cache": str(row.spec),
                "full_steps": cache.full_steps,
                "cached_steps": cache.cached_steps,
                "seconds_per_sample": middle,
                "speedup": median(times[0]) / middle,
                "flops_speedup": rows[0].flops(per_step) / row.flops(per_step),
                "psnr": psnr(*pictures).mean().item(),
                "ssim": ssim(*pictures).mean().item(),
            }
        )
    return table, samples


def markdown(table: list[dict], unit: str) -> str:
    """The table as the README shows it."""
    lines = [
        f"| | full + cached steps | s / {unit} | speedup | speedup in FLOPs | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        fidelity = "| | |" if math.isinf(row["psnr"]) else f"| {row['psnr']:.1f} | {row['ssim']:.3f} |"
        lines.append(
            f"| {row['name']} | {row['full_steps']} + {row['cached_steps']} | {row['seconds_per_sample']:.3f} "
            f"| {row['speedup']:.2f} | {row['flops_speedup']:.2f} {fidelity}"
        )
    return "\n".join(lines)


def picture(table: list[dict], tiles: Sequence[Tensor], side: int = 64) -> Image.Image:
    """One line of pictures (M, 3, H, W) per row of the table, with its name, speedup in FLOPs and PSNR on the left."""
    margin, gap = 130, 2
    canvas = Image.new("RGB", (margin + len(tiles[0]) * (side + gap), len(table) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for y, (row, line) in enumerate(zip(table, tiles, strict=True)):
        cost = "" if math.isinf(row["psnr"]) else f"\n{row['flops_speedup']:.2f}x, {row['psnr']:.1f} dB"
        draw.text((4, y * (side + gap) + side // 2 - 14), row["name"] + cost, fill="black", font=font)
        for x, tile in enumerate(line):
            shown = Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(shown, (margin + x * (side + gap), y * (side + gap)))
    return canvas


def run(
    schema: type[SamplingConfig],
    description: str,
    load: Callable[[SamplingConfig, int], Models],
    window: CacheSpec,
    unit: str,
    tiles: Callable[[Tensor], Tensor],
) -> tuple[SamplingConfig, list[Tensor]]:
    """The command line of a task's compare.py; writes compare.png and compare.json into the config's `out`.

    Args:
        schema: the task's sampling settings.
        description: for `--help`.
        load: `load(config, branch)` gives model and autoencoder.
        window: the timesteps between which to cache, and the default branch.
        unit: what a sample is.
        tiles: which pictures (M, 3, H, W) of the samples to show.

    Returns:
        The config, and the samples of every row.
    """
    parser = make_parser(schema, description)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 4], help="cache intervals [2 3 4]")
    parser.add_argument("--branch", type=int, default=window.branch, help="cache branch [%(default)s]")
    parser.add_argument("--repeats", type=int, default=1, help="times to run each row; medians are shown [%(default)s]")
    args = parser.parse_intermixed_args()
    with friendly_errors():
        config = load_config(schema, args.config, args.overrides)
        models = load(config, args.branch)
        window = CacheSpec(2, window.start, window.stop, args.branch)
        rows = rows_for(config.steps, args.intervals, window, models.flops)
        table, samples = compare(config, rows, models, args.repeats)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    picture(table, [tiles(made) for made in samples]).save(out / "compare.png")
    record = {"rows": table, "config": to_dict(config), **versions()}
    (out / "compare.json").write_text(json.dumps(record, indent=2) + "\n")
    guidance = "" if config.guidance_scale == 1 else f", guidance {config.guidance_scale}"
    print(f"\n{config.num_samples} {unit}s, {config.sampler} {config.steps} steps{guidance}\n")
    print(markdown(table, unit))
    print(f"\nside by side: {out / 'compare.png'}")
    return config, samples
