"""The same samples with several caches: `skipdit compare`."""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.caching.policy import CachePolicy
from skipdit.cli import friendly_errors
from skipdit.config import to_dict
from skipdit.metrics import FIDELITY_COLUMNS, fidelity_cells, measure_fidelity
from skipdit.sampling.report import step_counts, steps_column
from skipdit.sampling.rows import Row
from skipdit.sampling.sampler import Sampler
from skipdit.tasks import read_settings
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text, whole_file
from skipdit.utils.provenance import fingerprint, versions
from skipdit.utils.video import side_by_side, write_gif

AMPLIFIED = 16  # differences that a comparison shows
SHOWN = 6  # of its samples


def rows_for(
    steps: int, intervals: list[int], window: CacheSpec, sampler: Sampler, also: Sequence[CachePolicy] = ()
) -> list[Row]:
    """Uncached; per interval: reuse, extrapolation, and the number of uncached steps nearest to their FLOPs; others.

    Raises ValueError for a policy that decides at run time, whose cost is not known here.
    """
    rows = [Row("uncached", CacheSpec(), steps)]
    for interval in intervals:
        reuse = Row(f"reuse N={interval}", CacheSpec(interval, window.start, window.stop, window.branch), steps)
        extrapolate = Row(f"extrapolate N={interval}", reuse.spec.with_order(1), steps)
        share = reuse.flops(sampler) / rows[0].flops(sampler)  # solvers of second order call the model twice a step
        fewer = max(1, round(steps * share))
        rows += [reuse, extrapolate, Row(f"{fewer} steps", CacheSpec(), fewer)]
    if drifts := [str(policy) for policy in also if policy.adaptive]:
        raise UserError(f"--also {drifts[0]}: what it costs is not known before; benchmarks/compare.py counts it")
    for policy in also:
        if policy.caches and policy.branch not in (0, window.branch):  # with 0, all its steps are full or forecasts
            raise UserError(
                f"--also {policy}: its branch is {policy.branch}, of the others {window.branch}: see --branch"
            )
    return rows + [Row(policy.label, policy, steps) for policy in also]


def check_plans(policies: Sequence[CachePolicy], sampler: Sampler, seeds: Sequence[int] = ()) -> None:
    """Warn of plans that were made for other runs, or from a seed that they are to be judged by.

    Args:
        seeds: those of the samples, if not the config's alone.

    Raises ValueError for a plan of other timesteps.
    """
    model = fingerprint(sampler.model) if policies else ""
    for policy in policies:
        policy.full_mask(sampler.timesteps(sampler.config.steps))
        if policy.target == "converged":
            told = f"{policy.label} aims at the converged images, not at the uncached ones"
            warnings.warn(f"{told}: benchmarks/plans.py measures the distance to both", stacklevel=2)
        policy.check(model, sampler.method, sampler.config.guidance_scale)
        if (seed := policy.calibration_seed) is not None and seed in (seeds or [sampler.config.seed]):
            warnings.warn(f"{policy.label} was calibrated on seed {seed}, too: take another", stacklevel=2)


def compare(sampler: Sampler, rows: list[Row], repeats: int) -> tuple[list[dict], list[Tensor]]:
    """Sample every row `repeats` times in turn; medians of time, fidelity to the first row.

    Returns one dict per row, and the samples (N, ..., 3, H, W), uint8, of each.
    """
    for spec in (CacheSpec(), CacheSpec(2, stop=0, branch=rows[1].spec.branch)):  # warm up
        sampler.make(4, spec)
    times: list[list[float]] = [[] for _ in rows]
    samples: list[Tensor] = [torch.empty(0)] * len(rows)
    fidelity: list[dict] = [{} for _ in rows]
    for repeat in range(repeats):  # interleaved: a machine that slows down slows all rows
        if repeats > 1:
            _tell(f"round {repeat + 1} of {repeats}, whose times the table has the medians of")
        for number, row in enumerate(rows):
            _tell(f"{row.name} ({row.spec}, {row.steps} steps) ...")
            began = time.perf_counter()
            samples[number] = sampler.make(row.steps, row.spec)
            times[number].append((time.perf_counter() - began) / len(samples[number]))
            fidelity[number] = fidelity[number] or measure_fidelity(samples[number], samples[0])
            likeness = "" if fidelity[number]["identical"] else f", {fidelity[number]['psnr']:.1f} dB"
            _tell(f"{row.name}: {times[number][-1]:.3f} s / {sampler.unit}{likeness}")
    table = []
    for row, seconds, likeness in zip(rows, times, fidelity, strict=True):
        cache, middle = row.cache(sampler), median(seconds)
        table.append(
            {
                "name": row.name,
                "cache": str(row.spec),
                **step_counts(cache),
                "seconds_per_sample": middle,
                "speedup": median(times[0]) / middle,
                "flops_speedup": rows[0].flops(sampler) / row.flops(sampler),
                **likeness,
            }
        )
    return table, samples


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_far(row: dict) -> bool:
    """Whether a time is another one than FLOPs explain: small models and other programs on the machine do that."""
    return not 0.5 <= row["speedup"] / row["flops_speedup"] <= 1.5


def markdown(table: list[dict], unit: str) -> str:
    """The table as the README shows it."""
    title, steps = steps_column(table)
    lines = [
        f"| | {title} | s / {unit} | speedup | speedup in FLOPs | {' | '.join(FIDELITY_COLUMNS)} |",
        "|---" * (5 + len(FIDELITY_COLUMNS)) + "|",
    ]
    for row, counts in zip(table, steps, strict=True):
        speedup = f"{row['speedup']:.2f}" + "*" * _is_far(row)
        lines.append(
            f"| {row['name']} | {counts} | {row['seconds_per_sample']:.3f} "
            f"| {speedup} | {row['flops_speedup']:.2f} | {' | '.join(fidelity_cells(row))} |"
        )
    if any(map(_is_far, table)):
        lines.append("\n\\* far from the speedup in FLOPs: other programs took processors, or the model is very small")
    return "\n".join(lines)


def picture(table: list[dict], tiles: Sequence[Tensor]) -> Image.Image:
    """A line per row of the table: its name, speedup in FLOPs and PSNR; its pictures (M, 3, H, W); and what differs
    from those of the first row, `AMPLIFIED` times and around grey, as most of it could not be seen.
    """
    margin, header, gap = 130, 22, 2
    count, _, height, width = tiles[0].shape
    side = min(max(height, 96), 256)  # room for the text, and for several large pictures
    across = side * width // height
    canvas = Image.new("RGB", (margin + 2 * count * (across + gap), header + len(table) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.text((margin + count * (across + gap) + 4, 2), f"difference, times {AMPLIFIED}", fill="black", font=font)
    for y, (row, line) in enumerate(zip(table, tiles, strict=True)):
        top = header + y * (side + gap)
        cost = "" if row["identical"] else f"\n{row['flops_speedup']:.2f}x, {row['psnr']:.1f} dB"
        draw.text((4, top + side // 2 - 14), row["name"] + cost, fill="black", font=font)
        for x, tile in enumerate(torch.cat([line, difference(line, tiles[0])])):
            shown = Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((across, side), Image.Resampling.BICUBIC)
            canvas.paste(shown, (margin + x * (across + gap), top))
    return canvas


def difference(pictures: Tensor, others: Tensor) -> Tensor:
    """What differs, `AMPLIFIED` times and around a medium grey; all are uint8 of one shape."""
    return ((pictures.int() - others.int()) * AMPLIFIED + 128).clamp(0, 255).to(torch.uint8)


@friendly_errors("starts anew")
def main(args: argparse.Namespace) -> None:
    also = [parse_policy(spec) for spec in args.also]
    task, config = read_settings(args)
    sampler = task.open_sampler(config, args.branch)
    check_plans(also, sampler)
    window = CacheSpec(2, task.window.start, task.window.stop, args.branch)
    rows = rows_for(config.steps, args.intervals, window, sampler, also)
    table, samples = compare(sampler, rows, args.repeats)
    out, unit = Path(config.out), sampler.unit
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "compare.png", keep_suffix=True) as partial:
        picture(table, [four_frames(made) if unit == "clip" else made.flatten(0, -4)[:SHOWN] for made in samples]).save(
            partial
        )
    record = {"rows": table, "config": to_dict(config), **versions()}
    replace_text(out / "compare.json", json.dumps(record, indent=2) + "\n")
    guidance = "" if config.guidance_scale == 1 else f", guidance {config.guidance_scale}"
    print(f"\n{len(samples[0])} {unit}s, {sampler.method} {config.steps} steps{guidance}\n")
    print(markdown(table, unit))
    print(f"\nside by side: {out / 'compare.png'}")
    if unit == "clip":
        film(samples, config.out, config.fps)


def four_frames(clips: Tensor) -> Tensor:
    """Four frames of the first clip, (4, 3, H, W): the tiles of a comparison of clips."""
    return clips[0, :: max(1, clips.shape[1] // 4)][:4]


def film(rows: list[Tensor], out: str, fps: float) -> None:
    """compare.gif in the folder `out`: a line of up to eight clips per row, all in motion."""
    shown, file = min(8, len(rows[0])), Path(out) / "compare.gif"
    write_gif(file, side_by_side([clip for row in rows for clip in row[:shown]], columns=shown), fps)
    print(f"in motion: {file}")
