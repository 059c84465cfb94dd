"""diffusers' own caches beside `enable_cache`, in diffusers' pipeline, on the plain class-to-image model.

    python benchmarks/pipeline_caches.py --out results/pipeline-caches

The plain twin of the embedded model becomes a `DiTPipeline` of diffusers' `DiTTransformer2DModel`. Every row samples
the same classes from the same noise in this process; the plan is fitted on other noise. Cost is the FLOPs of the
transformer, counted while it runs, and the distance is to the uncached images. Each method runs with several settings:
compare rows of about one cost. Writes pipeline_caches.md and .json.
"""

import argparse
import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.cache_utils import CacheMixin
from tqdm import tqdm

from skipdit import disable_cache, enable_cache, load_weights, plan_pipeline
from skipdit.class_to_image import DiT
from skipdit.cli import friendly_errors
from skipdit.layers.flops import flop_counter

ROOT = Path(__file__).parents[1]
NULL = 1000  # the class id that DiTPipeline takes for none
SIZES = {"input_size": 8, "patch_size": 1, "hidden_size": 96, "depth": 28, "num_heads": 3, "num_classes": 10}
BLOCK = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj"}  # diffusers' names, ours
BLOCK |= {"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
OURS = [f"N{n}-1000-0-b0-o1" for n in (2, 3, 4)] + [f"N{n}-1000-0-o1" for n in (2, 3, 4)]

Apply = Callable[[DiTPipeline], Any]


class Transformer(DiTTransformer2DModel, CacheMixin):
    """diffusers' DiT, with the methods of its caches, which it has not by itself."""


def to_diffusers(model: DiT) -> Transformer:
    """Return a plain model in diffusers' class, in evaluation mode."""
    state, config = model.state_dict(), model.config
    theirs = Transformer(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=2 * config.in_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL,
        norm_eps=1e-6,
    )
    known = state["y_embedder.embedding_table.weight"]
    table = torch.zeros(NULL + 1, config.hidden_size)
    table[: len(known) - 1], table[NULL] = known[:-1], known[-1]
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_2": "final_layer.linear"}
    names["proj_out_1"] = "final_layer.adaLN_modulation.1"
    new = {}
    for i, block in enumerate(theirs.transformer_blocks):
        own = f"transformer_blocks.{i}."
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the original code has it
        names |= {own + a: f"blocks.{i}.{b}" for a, b in BLOCK.items()}
        names |= {f"{own}norm1.emb.timestep_embedder.linear_{j}": f"t_embedder.mlp.{2 * j - 2}" for j in (1, 2)}
        new[f"{own}norm1.emb.class_embedder.embedding_table.weight"] = table
        for part in ("weight", "bias"):
            for letter, chunk in zip("qkv", state[f"blocks.{i}.attn.qkv.{part}"].chunk(3), strict=True):
                new[f"{own}attn1.to_{letter}.{part}"] = chunk
    new |= {f"{a}.{part}": state[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}
    theirs.load_state_dict(new)
    theirs.pos_embed.pos_embed = model.pos_embed.detach().clone()
    return theirs.eval()


def open_pipeline() -> DiTPipeline:
    """The plain twin in diffusers' pipeline."""
    model = DiT(**SIZES, skip=False)
    load_weights(model, ROOT / "benchmarks/weights/class-to-image-plain.pt")
    vae = AutoencoderKL.from_pretrained(ROOT / "class-to-image/weights/vae").eval()
    pipe = DiTPipeline(to_diffusers(model), vae, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DiTPipeline, steps: int, seed: int, classes: list[int]) -> tuple[np.ndarray, float]:
    """Images (N, H, W, 3) in [0, 1], and the transformer's FLOPs."""
    with flop_counter() as counter, pipe.transformer.cache_context("both halves of guidance"):
        images = pipe(
            classes,
            num_inference_steps=steps,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
    return images, sum(counter.get_flop_counts()["Transformer"].values())


@contextmanager
def using(pipe: DiTPipeline, apply: Apply) -> Iterator[None]:
    """With a cache of diffusers or ours, or none."""
    apply(pipe)
    try:
        yield
    finally:
        disable_cache(pipe)
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()


def diffusers_caches(pipe: DiTPipeline, steps: int, classes: list[int]) -> Iterator[tuple[str, Apply]]:
    """Names and settings of diffusers' caches, of those that this version has and a plain DiT can run."""
    for threshold in (0.02, 0.05, 0.1, 0.2):
        yield f"FirstBlockCache {threshold}", theirs(diffusers.FirstBlockCacheConfig(threshold=threshold))
    blocks = r"transformer_blocks\.\d+"
    kinds = {  # it knows the names of other models' modules
        "TaylorSeer": {"cache_identifiers": [rf"{blocks}\.attn1", rf"{blocks}\.ff"]},
        "TaylorSeer lite": {"skip_predict_identifiers": [blocks], "cache_identifiers": ["proj_out_2"]},
    }
    for kind, modules in kinds.items():
        for n, order in ((2, 1), (3, 1), (4, 1), (3, 2), (4, 2)):
            config = diffusers.TaylorSeerCacheConfig(
                cache_interval=n, max_order=order, taylor_factors_dtype=torch.float32, **modules
            )
            yield f"{kind} N={n}, order {order}", theirs(config)
    ratios = magnitudes(pipe, steps, classes)
    for threshold, most in ((0.06, 3), (0.12, 3), (0.24, 5)):
        config = diffusers.MagCacheConfig(
            threshold=threshold, max_skip_steps=most, num_inference_steps=steps, mag_ratios=ratios
        )
        yield f"MagCache {threshold}, at most {most}", theirs(config)
    now = [0]
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: now.__setitem__(0, int(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    for n in (2, 4):
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=n,
            spatial_attention_timestep_skip_range=(20, 980),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: now[0],
        )
        yield f"PyramidAttentionBroadcast N={n}", theirs(config)


def theirs(config: Any) -> Apply:
    return lambda pipe: pipe.transformer.enable_cache(config)


def magnitudes(pipe: DiTPipeline, steps: int, classes: list[int]) -> list[float]:
    """What MagCache wants to know of a model: it prints that after a call."""
    told = io.StringIO()
    config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with using(pipe, theirs(config)), contextlib.redirect_stdout(told):
        sample(pipe, steps, 10_000, classes)
    return json.loads(re.search(r"^\[[-\d.e, ]+\]", told.getvalue(), flags=re.M)[0])


def benchmark(steps: int, seed: int, classes: list[int], speedups: list[float]) -> list[dict[str, Any]]:
    """A row per setting: its name, speedup in FLOPs and PSNR in dB, the mean over samples and its standard error."""
    pipe, rows = open_pipeline(), []
    reference, whole = sample(pipe, steps, seed, classes)

    def measure(name: str, apply: Apply = lambda _: None, steps: int = steps) -> None:
        bar.set_postfix_str(name)
        with using(pipe, apply):
            images, flops = sample(pipe, steps, seed, classes)
        psnr = -10 * np.log10(np.square(images - reference).reshape(len(images), -1).mean(1).clip(1e-12))
        spread = float(psnr.std(ddof=1) / len(psnr) ** 0.5)
        rows.append({"name": name, "speedup": whole / flops, "psnr": float(psnr.mean()), "error": spread})
        bar.update()

    with tqdm(desc="settings", unit="run") as bar:
        for speedup in speedups:
            measure(f"{round(steps / speedup)} steps", steps=round(steps / speedup))
            plan = plan_pipeline(pipe, speedup, steps, target="sampler", class_labels=classes, guidance_scale=2.0)
            measure(f"plan of forecasts, {speedup:g}x", lambda _, plan=plan: enable_cache(pipe, plan))
        for spec in OURS:
            measure(spec, partial(enable_cache, spec=spec))
        for name, apply in diffusers_caches(pipe, steps, classes):
            measure(name, apply)
    return sorted(rows, key=lambda row: row["speedup"])


@friendly_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=50, help="of a call [%(default)s]")
    parser.add_argument("--samples", type=int, default=10, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of their noise [%(default)s]")
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 3], help="of plans [2 3]")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    classes = [i % SIZES["num_classes"] for i in range(args.samples)]
    rows = benchmark(args.steps, args.seed, classes, args.speedups)
    lines = ["| | speedup in FLOPs | PSNR dB |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['speedup']:.2f} | {row['psnr']:.1f} ± {row['error']:.1f} |" for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pipeline_caches.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out / "pipeline_caches.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n\ntable: {args.out / 'pipeline_caches.md'}")


if __name__ == "__main__":
    main()
