"""Sample images from Skip-DiT, with or without Skip-Cache.

    python class-to-image/sample.py --config configs/class-to-image/demo.yaml --cache N2-1000-20-o1
    torchrun --nproc-per-node 8 class-to-image/sample.py --config configs/class-to-image/imagenet256_sample_50k.yaml

Writes single PNGs, grid.png, report.json and, with npz=true, samples.npz for ADM's evaluation suite. The same command
again continues an interrupted run; any number of processes makes the same images.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torchvision.io import write_png
from torchvision.utils import make_grid
from tqdm import tqdm

from skipdit.bench import step_flops
from skipdit.cache import CacheSpec, SkipCache
from skipdit.class_to_image.model import Conditioning, DiT
from skipdit.config import friendly_errors, load_config, make_parser, required, setting, to_dict
from skipdit.data.images import to_uint8
from skipdit.device import process_state
from skipdit.diffusion import Diffusion, ddim, ddpm, randn
from skipdit.sample import (
    Ahead,
    Job,
    StepTimer,
    add_cache_arguments,
    cache_override,
    generators,
    original_model_name,
    preflight,
    report,
    require_finite,
    resolve_dtype,
)
from skipdit.vae import decode, latent_size, load_vae
from skipdit.weights import fingerprint, load_weights

WINDOW = "N{}-1000-20-b4"  # the original code's caching window for this task
SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
AHEAD_BYTES = 2**28  # memory for modulations that are computed ahead of their steps


@dataclass
class ModelConfig:
    """A model by name, or by its constructor's arguments; unset ones are the class's defaults or the name's."""

    name: str | None = setting(None, "DiT-skip, DiT-{S,B,L,XL}/{2,4,8}[-skip]; unset: the arguments below")
    patch_size: int | None = setting(None, "side of a patch in latent pixels")
    hidden_size: int | None = setting(None, "width")
    depth: int | None = setting(None, "number of blocks")
    num_heads: int | None = setting(None, "attention heads")
    num_classes: int = setting(1000, "classes; the null class is added")
    skip: bool | None = setting(None, "long skips")


@dataclass
class Config:
    """A class-to-image sampling run."""

    weights: str = required("checkpoint: .pt, .safetensors, or folder")
    out: str = setting("samples/class-to-image", "folder for the images and the report")
    vae: str = setting("stabilityai/sd-vae-ft-ema", "autoencoder, folder or Hub name")
    image_size: int = setting(256, "pixels along a side")
    classes: list[int] = field(
        default_factory=list, metadata={"help": "class ids, repeated over the samples; empty: all of them"}
    )
    num_samples: int = setting(8, "images to make")
    batch_size: int = setting(8, "images per model call and process (guidance doubles it)")
    seed: int = setting(0, "seed of the run; image i depends on it and on i")
    sampler: str = setting("ddpm", "ddpm or ddim")
    steps: int = setting(250, "sampling steps")
    guidance_scale: float = setting(4.0, "classifier-free guidance; 1 is none")
    guidance_channels: int | None = setting(3, "latent channels to guide; null for all")
    guidance_low: int = setting(0, "guide at timesteps from here ...")
    guidance_high: int = setting(1000, "... to here")
    cache: str = setting("none", "Skip-Cache spec, as --cache")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    compile: bool = setting(False, "compile the model with torch.compile")
    npz: bool = setting(False, "also pack all images into samples.npz for ADM's evaluation suite")
    model: ModelConfig = field(default_factory=ModelConfig)


def build_model(config: ModelConfig, input_size: int) -> DiT:
    """The model of a config for latents of a given side."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    given = {name: value for name, value in given.items() if value is not None} | {"input_size": input_size}
    return DiT.from_name(config.name, **given) if config.name else DiT(**given)


def generate_settings(config: Config) -> dict:
    """What a config says of the arguments of `generate`."""
    return {
        "steps": config.steps,
        "sampler": config.sampler,
        "guidance_scale": config.guidance_scale,
        "guidance_channels": config.guidance_channels,
        "guidance_interval": (config.guidance_low, config.guidance_high),
    }


@torch.no_grad()
def generate(
    model: DiT,
    labels: Tensor,
    generators: Sequence[torch.Generator],
    *,
    steps: int | str = 250,
    sampler: str = "ddpm",
    guidance_scale: float = 4.0,
    guidance_channels: int | None = 3,
    guidance_interval: tuple[int, int] = (0, 1000),
    cache: SkipCache | str = "none",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample latents.

    Args:
        model: in eval mode.
        labels: class ids (N,), on the model's device.
        generators: N, on the model's device.
        guidance_interval: timesteps, both ends included, between which guidance acts; elsewhere the unconditional half
            is not run at all (arXiv 2404.07724).
        cache: a spec, or a `SkipCache` for these steps to read its counts afterwards.
        callback: see `diffusion.ddpm`.

    Returns:
        Latents (N, C, H, W), float32.

    Raises FloatingPointError, naming the step, if they stop being finite.
    """
    diffusion = Diffusion(steps)
    timesteps = diffusion.sampling_timesteps
    run = cache if isinstance(cache, SkipCache) else SkipCache(cache, timesteps)
    size = model.config.input_size
    x = randn((len(labels), model.config.in_channels, size, size), generators, labels.device, torch.float32)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)])
    low, high = guidance_interval

    steps_on_device = torch.tensor(timesteps, device=labels.device)

    def condition(steps: list[int], full: bool) -> list[Conditioning]:
        return model.condition(
            torch.stack([steps_on_device[j] for j in steps]), both, None if full else run.spec.branch
        )

    rows_bytes = 6 * model.config.hidden_size * len(both) * len(model.blocks) * model.dtype.itemsize
    ahead = Ahead(condition, run.plan, max(1, AHEAD_BYTES // rows_bytes))

    def guided(x: Tensor, t: Tensor, i: int) -> Tensor:
        guide = guidance_scale != 1 and low <= timesteps[i] <= high
        step = run.at(i, stream="guided" if guide else "conditional")
        conditioning = ahead.at(i, step is None or step.feature is None)
        x = x.to(model.dtype)
        if guide:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            out = model.forward_with_cfg(x, t, both, guidance_scale, step, guidance_channels, conditioning)
            return out[: len(labels)]
        blocks, final = conditioning
        return model(x, t, labels, step, Conditioning(blocks[:, : len(labels)], final[: len(labels)]))

    finite: list[Tensor] = []  # per step, on the device: read once, after the run

    def after_step(i: int, x: Tensor, x0: Tensor) -> None:
        finite.append(x.isfinite().all())
        if callback is not None:
            callback(i, x, x0)

    try:
        x = SAMPLERS[sampler](guided, x, diffusion, generators, callback=after_step, progress=progress)
    finally:
        run.clear()
    require_finite(finite, timesteps, model.dtype)
    return x


class Models(NamedTuple):
    """What a config asks for, on the device, ready to sample."""

    model: DiT
    vae: AutoencoderKL
    flops: dict[str, float]  # of one full and one cached step, per image


def open_models(config: Config, branch: int | None) -> Models:
    """Check a config, then load its model and autoencoder.

    Raises ValueError or FileNotFoundError for settings that do not fit each other, before any weight is read.
    """
    device, num_classes = process_state().device, config.model.num_classes
    if bad := [c for c in config.classes if not 0 <= c < num_classes]:
        raise ValueError(f"class ids {bad} are out of range; this model knows 0 .. {num_classes - 1}")
    preflight({"weights": config.weights, "vae": config.vae}, "bash scripts/download.sh class-to-image")
    vae = load_vae(config.vae).to(device)
    with torch.device("meta"):
        model = build_model(config.model, latent_size(config.image_size, vae))
    Diffusion(config.steps)
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler is {config.sampler!r}; known: {', '.join(SAMPLERS)}")
    if branch is not None and branch > model.n_skips:
        raise ValueError(f"cache branch {branch} is larger than the model's number of skips, {model.n_skips}")
    flops = step_flops(model, 1 if config.guidance_scale == 1 else 2, branch or 1)
    dtype = resolve_dtype(config.dtype, device)
    nn.Module.to(model, dtype=dtype)  # not diffusers' own, which warns of float32 modules that this model has not
    model.to_empty(device="cpu")
    load_weights(model, config.weights)
    model.to(device).eval().requires_grad_(False)
    if config.compile:
        model.compile(fullgraph=True)
    return Models(model, vae, flops)


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    state, spec = process_state(), CacheSpec.parse(config.cache)
    device, main = state.device, state.is_main_process
    model, vae, flops = open_models(config, spec.branch if spec.interval > 1 else None)
    classes = list(config.classes) or list(range(config.model.num_classes))
    images_depend_not_on = {"out", "batch_size", "compile", "npz", "num_samples", "weights", "vae"}
    identity = {key: value for key, value in to_dict(config).items() if key not in images_depend_not_on}
    identity |= {"weights": fingerprint(model), "vae": fingerprint(vae), "cache": str(spec)}
    identity |= {"dtype": str(model.dtype), "device": device.type}  # devices draw different noise from one seed
    job = Job(config.out, identity, config.num_samples, rank=state.process_index, world=state.num_processes)

    timesteps = Diffusion(config.steps).sampling_timesteps
    cache, timer, began = SkipCache(spec, timesteps), StepTimer(device), time.perf_counter()
    made = cache_bytes = 0
    progress = tqdm(total=len(job.pending()), desc="images", unit="image", disable=not main)
    for indices in job.batches(config.batch_size):
        cache = SkipCache(spec, timesteps)
        timer.start()
        latents = generate(
            model,
            torch.tensor([classes[i % len(classes)] for i in indices], device=device),
            generators(config.seed, indices, device),
            **generate_settings(config),
            cache=cache,
            callback=lambda i, x, x0, ran=cache.ran: timer.tick(ran[i]),
            progress=main,
        )
        images = to_uint8(decode(vae, latents)).permute(0, 2, 3, 1).cpu().numpy()
        for index, image in zip(indices, images, strict=True):
            job.save(index, lambda path, image=image: Image.fromarray(image).save(path, format="png"))
        made, cache_bytes = made + len(indices), max(cache_bytes, cache.peak_bytes)
        progress.update(len(indices))
    progress.close()
    seconds = time.perf_counter() - began
    state.wait_for_everyone()
    summary = report(
        cache,
        timer.seconds(),
        flops,
        cache_bytes=cache_bytes,
        num_samples=config.num_samples,
        seconds_per_image=seconds / made if made else None,  # of the images that this process made now
        processes=state.num_processes,
        seed=config.seed,
        config=to_dict(config),
    )
    if main:
        write_outputs(config, job, summary)
    return summary


def write_outputs(config: Config, job: Job, summary: dict) -> None:
    """grid.png of the first images, samples.npz if asked for, report.json."""
    shown = [torch.from_numpy(_pixels(job, i)).permute(2, 0, 1) for i in range(min(config.num_samples, 64))]
    columns = len(config.classes) or (config.model.num_classes if config.model.num_classes <= 10 else 8)
    write_png(make_grid(torch.stack(shown), nrow=min(columns, 16)), str(job.folder / "grid.png"))
    if config.npz:  # the array names and the layout that ADM's evaluator reads
        packed = np.stack([_pixels(job, i) for i in tqdm(range(config.num_samples), desc="packing", unit="image")])
        np.savez(job.folder / "samples.npz", arr_0=packed)
    (job.folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    steps, times = summary["steps"], summary["seconds_per_step"]
    print(
        f"{config.num_samples} images in {job.folder}: {steps['full']} full and {steps['cached']} cached steps, "
        f"{summary['flops_speedup']:.2f}x fewer FLOPs"
        + "".join(f", {kind} step {value * 1e3:.1f} ms" for kind, value in times.items() if value)
    )


def _pixels(job: Job, index: int) -> np.ndarray:
    """One image of the job, uint8 (H, W, 3)."""
    with Image.open(job.path(index)) as image:
        return np.array(image)


def main() -> None:
    parser = make_parser(Config, __doc__)
    add_cache_arguments(parser)
    parser.add_argument(
        "--model", metavar="NAME", help="model name, as model.name; the original's DiT-cache-N also sets the cache"
    )
    args = parser.parse_intermixed_args()
    with friendly_errors():
        if args.model:
            name, interval = original_model_name(args.model)
            args.overrides.append(f"model.name={name}")
            args.cache_step = args.cache_step or interval
        spec = cache_override(args, WINDOW)
        sample(load_config(Config, args.config, args.overrides + spec))


if __name__ == "__main__":
    main()
