"""diffusers' own caches, and cache-dit's, beside `enable_cache`, in diffusers' pipelines with models trained here.

    python benchmarks/pipeline_caches.py --out results/pipeline-caches
    python benchmarks/pipeline_caches.py --model text-to-video --samples 4 --speedups 2 --out results/clip-caches
    python benchmarks/pipeline_caches.py --model text-to-image --samples 4 --speedups 2 --out results/prompt-caches

The model is of diffusers' own class: `DiTTransformer2DModel` or `LatteTransformer3DModel`, both without long skips, or
`HunyuanDiT2DModel`, which has them. Every row samples the same classes or prompts from the same noise in this process;
the plan is fitted on other noise and other prompts. Cost is the FLOPs of the transformer, counted while it runs, and
the distance is to the uncached samples. Each method runs with several settings: compare rows of about one cost. If
cache-dit is installed, it takes part. Where a method fails on a model, its error stands below the table. Writes
pipeline_caches.md and .json.
"""

import contextlib
import copy
import functools
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from pipeline_models import MODELS, TrainedModel
from tqdm import tqdm

from skipdit import enable_cache, plan_pipeline
from skipdit.cli import Parser, friendly_errors
from skipdit.layers.flops import flop_counter

OURS = [f"N{n}-1000-0-b0-o1" for n in (2, 3, 4)] + [f"N{n}-1000-0-o1" for n in (2, 3, 4)]
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # of others' caches

Apply = Callable[[DiffusionPipeline], Any]


def sample(pipe: DiffusionPipeline, call: dict[str, Any], steps: int, seed: int) -> tuple[np.ndarray, float]:
    """Images (N, H, W, 3), or clips (N, F, H, W, 3), in [0, 1], and the transformer's FLOPs."""
    totals: list[int] = []  # before and after every call: by names of modules, cache-dit's blocks end elsewhere
    with flop_counter() as counter, pipe.transformer.cache_context("both halves of guidance"):
        count = lambda *_: totals.append(counter.get_total_flops())  # noqa: E731
        hooks = [
            pipe.transformer.register_forward_pre_hook(count, prepend=True),
            pipe.transformer.register_forward_hook(count),
        ]
        images = pipe(
            **call,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            return_dict=False,
        )[0]
        for hook in hooks:
            hook.remove()
    return np.asarray(images, dtype=np.float32), sum(totals[1::2]) - sum(totals[::2])


def use_plan(model: TrainedModel, steps: int, speedup: float, pipe: DiffusionPipeline) -> None:
    enable_cache(pipe, plan_pipeline(pipe, speedup, steps, target="sampler", **model.planned))


def diffusers_caches(model: TrainedModel, steps: int) -> Iterator[tuple[str, Apply]]:
    """Names and settings of diffusers' caches, of those that this version has for images and ordinary guidance."""
    for threshold in (0.02, 0.05, 0.1, 0.2):
        yield f"FirstBlockCache {threshold}", theirs(diffusers.FirstBlockCacheConfig(threshold=threshold))
    kinds = {  # it knows the names of other models' modules
        "TaylorSeer": {"cache_identifiers": [rf"{model.blocks}\.{part}" for part in model.parts]},
        "TaylorSeer lite": {"skip_predict_identifiers": [model.blocks], "cache_identifiers": [model.last]},
    }
    for kind, modules in kinds.items():
        for n, order in ((2, 1), (3, 1), (4, 1), (3, 2), (4, 2)):
            config = diffusers.TaylorSeerCacheConfig(
                cache_interval=n, max_order=order, taylor_factors_dtype=torch.float32, **modules
            )
            yield f"{kind} N={n}, order {order}", theirs(config)
    ratios = functools.cache(partial(magnitudes, model, steps))
    for threshold, most in ((0.06, 3), (0.12, 3), (0.24, 5)):
        yield f"MagCache {threshold}, at most {most}", partial(use_magnitudes, ratios, steps, threshold, most)
    for n in (2, 4):
        yield f"PyramidAttentionBroadcast N={n}", partial(broadcast, model, n)


def theirs(config: Any) -> Apply:
    return lambda pipe: pipe.transformer.enable_cache(config)


def magnitudes(model: TrainedModel, steps: int) -> list[float]:
    """What MagCache wants to know of a model: it prints that after a call."""
    told, pipe = io.StringIO(), copy.deepcopy(model.pipe)
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(told):
        sample(pipe, model.planned, steps, 10_000)
    return json.loads(re.search(r"^\[[-\d.e, ]+\]", told.getvalue(), flags=re.M)[0])


def use_magnitudes(
    ratios: Callable[[], list[float]], steps: int, threshold: float, most: int, pipe: DiffusionPipeline
) -> None:
    config = diffusers.MagCacheConfig(
        threshold=threshold, max_skip_steps=most, num_inference_steps=steps, mag_ratios=ratios()
    )
    pipe.transformer.enable_cache(config)


def broadcast(model: TrainedModel, n: int, pipe: DiffusionPipeline) -> None:
    """PyramidAttentionBroadcast, at all timesteps but the first and last ones."""
    now = [0]

    def look(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        now[0] = int((args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    settings: dict[str, Any] = {}
    for kind in model.attention:
        settings[f"{kind}_attention_block_skip_range"] = n
        settings[f"{kind}_attention_timestep_skip_range"] = (20, 980)
    config = diffusers.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: now[0], **settings)
    pipe.transformer.enable_cache(config)


def cache_dit_caches(pipe: DiffusionPipeline) -> Iterator[tuple[str, Apply]]:
    """Names and settings of cache-dit's caches; none where it is not installed or does not know the pipeline."""
    try:
        import cache_dit
    except ImportError:
        return
    if not cache_dit.BlockAdapterRegister.is_supported(pipe):
        return
    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    cache_dit.ENV.CACHE_DIT_PATCH_FUNCTOR_DISABLE_DIFFUSERS_CHECK = (
        True  # the classes here are subclasses of diffusers'
    )
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    for calibrator, suffix in ((None, ""), (taylor, ", TaylorSeer")):
        for first, threshold in ((8, 0.08), (1, 0.05), (1, 0.1), (1, 0.2), (1, 0.4)):
            config = cache_dit.DBCacheConfig(Fn_compute_blocks=first, residual_diff_threshold=threshold)
            yield f"cache-dit DBCache F{first}B0 {threshold}{suffix}", partial(use_cache_dit, config, calibrator)


def use_cache_dit(config: Any, calibrator: Any, pipe: DiffusionPipeline) -> None:
    import cache_dit

    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})  # whose `__call__` it replaces
    cache_dit.enable_cache(pipe, cache_config=copy.deepcopy(config), calibrator_config=copy.deepcopy(calibrator))


def benchmark(
    model: TrainedModel, steps: int, seed: int, speedups: list[float], only: str = ""
) -> list[dict[str, Any]]:
    """A row per setting: its name, speedup in FLOPs and PSNR in dB, the mean over samples and its standard error; or
    why it fails. Each has a copy of the pipeline.

    Args:
        only: a pattern of the names of the rows.
    """
    pipe, rows = model.pipe, []
    pipe.set_progress_bar_config(disable=True)
    reference, whole = sample(pipe, model.call, steps, seed)

    def measure(name: str, apply: Apply = lambda _: None, steps: int = steps, fails: tuple = ()) -> None:
        if not re.search(only, name):
            return
        bar.set_postfix_str(name)
        own = copy.deepcopy(pipe)
        try:
            apply(own)
            images, flops = sample(own, model.call, steps, seed)
        except fails as error:
            rows.append({"name": name, "fails": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
            return
        finally:
            bar.update()
        psnr = -10 * np.log10(np.square(images - reference).reshape(len(images), -1).mean(1).clip(1e-12))
        spread = float(psnr.std(ddof=1) / len(psnr) ** 0.5) if len(psnr) > 1 else float("nan")
        rows.append({"name": name, "speedup": whole / flops, "psnr": float(psnr.mean()), "error": spread})

    with tqdm(desc="settings", unit="run") as bar:
        for speedup in speedups:
            measure(f"{round(steps / speedup)} steps", steps=round(steps / speedup))
            measure(f"plan of forecasts, {speedup:g}x", partial(use_plan, model, steps, speedup))
        for spec in OURS:
            measure(spec, partial(enable_cache, spec=spec))
        for name, apply in (*diffusers_caches(model, steps), *cache_dit_caches(pipe)):
            measure(name, apply, fails=FAILURES)
    return sorted(rows, key=lambda row: row.get("speedup", 0))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; under them, what failed."""
    lines = ["| | speedup in FLOPs | PSNR dB |", "|---|---|---|"]
    ran, failed = [row for row in rows if "psnr" in row], [row for row in rows if "fails" in row]
    lines += [f"| {row['name']} | {row['speedup']:.2f} | {row['psnr']:.1f} ± {row['error']:.1f} |" for row in ran]
    return "\n".join([*lines, "", *(f"{row['name']} fails: {row['fails']}" for row in failed)]).strip() + "\n"


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", choices=MODELS, default="class-to-image", help="[%(default)s]")
    parser.add_argument("--config", metavar="FILE", help="of the sampler from prompts [the embedded model's]")
    parser.add_argument("--steps", type=int, default=50, help="of a call [%(default)s]")
    parser.add_argument("--samples", type=int, default=10, help="of a call, of prompts at most 4 [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of their noise [%(default)s]")
    parser.add_argument("--speedups", type=float, nargs="*", default=[2, 3], help="of plans [2 3]")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of the names of the rows that run [all]")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    rows = benchmark(MODELS[args.model](args.config, args.samples), args.steps, args.seed, args.speedups, args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pipeline_caches.md").write_text(table(rows), encoding="utf-8")
    (args.out / "pipeline_caches.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows), f"\ntable: {args.out / 'pipeline_caches.md'}")


if __name__ == "__main__":
    main()
