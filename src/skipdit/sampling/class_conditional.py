"""What the samplers of DiT and Latte share: models whose only condition is a class, or nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from skipdit.caching.policies import CacheSpec, DriftSpec, Policy
from skipdit.caching.runtime import SkipCache
from skipdit.checkpoints.loading import load_weights
from skipdit.config import require_seed, required, setting, to_dict
from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.samplers import ddim, ddpm, randn
from skipdit.encoders.autoencoder import decode, load_vae, pixels
from skipdit.layers.adaln import AdaLNTransformer, Conditioning
from skipdit.layers.flops import step_flops
from skipdit.sampling.job import Ahead, Job, cache_identity, preflight, require_finite, work_off
from skipdit.sampling.report import StepTimer
from skipdit.utils.device import compile_mode, process_state, set_tf32
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.pixels import to_uint8
from skipdit.utils.provenance import fingerprint
from skipdit.utils.seeding import generators

SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
AHEAD_BYTES = 2**28  # memory for modulations that are computed ahead of their steps


@dataclass
class SamplingConfig:
    """Settings of a sampling run that do not depend on the task."""

    weights: str = required("checkpoint: .pt, .safetensors, or folder")
    out: str = setting("samples", "folder for the samples and the report")
    vae: str = setting("stabilityai/sd-vae-ft-ema", "autoencoder, folder or Hub name")
    image_size: int = setting(256, "pixels along a side")
    classes: list[int] = field(
        default_factory=list, metadata={"help": "class ids, repeated over the samples; empty: all of them"}
    )
    num_samples: int = setting(8, "samples to make")
    batch_size: int = setting(8, "samples per model call and process (guidance doubles it)")
    seed: int = setting(0, "seed of the run; sample i depends on it and on i")
    sampler: str = setting("ddpm", "ddpm or ddim")
    steps: int = setting(250, "sampling steps")
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1 is none")
    guidance_channels: int | None = setting(None, "latent channels to guide; null for all")
    guidance_low: int = setting(0, "guide at timesteps from here ...")
    guidance_high: int = setting(1000, "... to here")
    cache: str = setting("none", "Skip-Cache spec, as --cache")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    tf32: bool = setting(False, "let float32 products run in TF32 on the GPU: faster, to about three digits")
    compile: str = setting("none", "torch.compile: none, default, reduce-overhead (CUDA graphs) or max-autotune")

    def __post_init__(self):
        require_seed(self.seed)


# Settings that say where and how fast, not what is made. Of the weights the fingerprints count.
_FREE = {"out", "batch_size", "compile", "num_samples", "weights", "vae"}


def generate_settings(config: SamplingConfig) -> dict:
    """What a config says of the arguments of `generate`."""
    return {
        "steps": config.steps,
        "sampler": config.sampler,
        "guidance_scale": config.guidance_scale,
        "guidance_channels": config.guidance_channels,
        "guidance_interval": (config.guidance_low, config.guidance_high),
    }


def labels_of(config: SamplingConfig, model: AdaLNTransformer, indices: Sequence[int]) -> Tensor | None:
    """Class ids of samples, on the model's device; None for an unconditional model."""
    if model.null_class is None:
        return None
    classes = list(config.classes) or list(range(model.null_class))
    return torch.tensor([classes[i % len(classes)] for i in indices], device=model.device)


@torch.no_grad()
def generate(
    model: AdaLNTransformer,
    labels: Tensor | None,
    generators: Sequence[torch.Generator],
    *,
    steps: int | str = 250,
    sampler: str = "ddpm",
    guidance_scale: float = 4.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[int, int] = (0, 1000),
    cache: SkipCache | str = "none",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample latents.

    Args:
        model: in eval mode.
        labels: class ids (N,), on the model's device; None for an unconditional model, which is not guided.
        generators: N, on the model's device.
        guidance_interval: timesteps, both ends included, between which guidance acts; elsewhere the unconditional half
            is not run at all (arXiv 2404.07724).
        cache: a spec, or a `SkipCache` for these steps to read its counts afterwards.
        callback: see `diffusion.ddpm`.

    Returns:
        Latents (N, *model.sample_shape), float32.

    Raises FloatingPointError, naming the step, if they stop being finite.
    """
    diffusion, count = Diffusion(steps), len(generators)
    timesteps = diffusion.sampling_timesteps
    run = cache if isinstance(cache, SkipCache) else SkipCache(cache, timesteps)
    if (drifts := isinstance(run.spec, DriftSpec)) and model._compiled_call_impl is not None:
        raise ValueError(f"cache {run.spec} decides within the model, which cannot be compiled then: set compile=none")
    x = randn((count, *model.sample_shape), generators, model.device, torch.float32)
    both = None if labels is None else torch.cat([labels, torch.full_like(labels, model.null_class)])
    low, high = guidance_interval

    steps_on_device = torch.tensor(timesteps, device=model.device)

    def condition(steps: list[int], full: bool) -> list[Conditioning]:
        return model.condition(
            torch.stack([steps_on_device[j] for j in steps]), both, None if full else run.spec.branch
        )

    rows = 1 if both is None else len(both)
    step_bytes = 6 * model.config.hidden_size * rows * len(model.blocks) * model.dtype.itemsize
    plan = [full or drifts for full in run.plan]  # a step that decides by itself needs what a full one does
    ahead = Ahead(condition, plan, max(1, AHEAD_BYTES // step_bytes))

    def guided(x: Tensor, t: Tensor, i: int) -> Tensor:
        guide = labels is not None and guidance_scale != 1 and low <= timesteps[i] <= high
        step = run.at(i, stream="guided" if guide else "conditional")
        conditioning = ahead.at(i, step is None or step.may_be_full)
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned has been read
        x = x.to(model.dtype)
        if guide:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            out = model.forward_with_cfg(x, t, both, guidance_scale, step, guidance_channels, conditioning)
            return out[:count]
        blocks, final = conditioning
        return model(x, t, labels, cache=step, conditioning=Conditioning(blocks[:, :count], final[:count]))

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

    model: AdaLNTransformer
    vae: AutoencoderKL
    flops: dict[str, float]  # of one full and one cached step, per sample


def open_models(
    config: SamplingConfig, build: Callable[[AutoencoderKL], AdaLNTransformer], branch: int | None, fetch: str
) -> Models:
    """Check a config, then load its model and autoencoder.

    Args:
        build: makes the model of the config, for latents of this autoencoder; called on the meta device.
        branch: the cache's, None without a cache.
        fetch: the command that fetches the released weights.

    Raises ValueError or FileNotFoundError for settings that do not fit each other, before the model's weights are read.
    """
    device, mode = process_state().device, compile_mode(config.compile)
    set_tf32(config.tf32)
    preflight({"weights": config.weights, "vae": config.vae}, fetch)
    vae = load_vae(config.vae).to(device)
    with torch.device("meta"):
        model = build(vae)
    if bad := [c for c in config.classes if not 0 <= c < (model.null_class or 0)]:
        known = f"0 .. {model.null_class - 1}" if model.null_class else "no classes"
        raise ValueError(f"class ids {bad} are out of range; this model knows {known}")
    Diffusion(config.steps)
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler is {config.sampler!r}; known: {', '.join(SAMPLERS)}")
    guided = config.guidance_scale != 1
    if guided and model.null_class is None:
        raise ValueError(f"guidance_scale is {config.guidance_scale}, and the model is unconditional: set it to 1")
    if branch is not None and branch > model.n_skips:
        raise ValueError(f"cache branch {branch} is larger than the model's number of skips, {model.n_skips}")
    flops = step_flops(model, 2 if guided else 1, branch or 1)
    dtype = resolve_dtype(config.dtype, device)
    nn.Module.to(model, dtype=dtype)  # not diffusers' own, which warns of float32 modules that this model has not
    model.to_empty(device="cpu")
    load_weights(model, config.weights)
    model.to(device).eval().requires_grad_(False)
    if mode:
        model.compile(fullgraph=True, mode=mode)
    return Models(model, vae, flops)


@dataclass
class ClassSampler:
    """All samples of a config, by any cache and number of steps: what `skipdit.evaluation.compare` runs."""

    config: SamplingConfig
    models: Models

    @property
    def flops(self) -> dict[str, float]:
        return self.models.flops

    @property
    def method(self) -> str:
        return self.config.sampler

    def timesteps(self, steps: int) -> list[int]:
        return Diffusion(steps).sampling_timesteps

    @property
    def model(self) -> AdaLNTransformer:
        return self.models.model

    @property
    def vae(self) -> AutoencoderKL:
        return self.models.vae

    def images(self, steps: int, spec: Policy) -> Iterator[Tensor]:
        """(N, ..., 3, H, W) float32 in [-1, 1], of every batch."""
        config, model = self.config, self.model
        for start in range(0, config.num_samples, config.batch_size):
            indices = range(start, min(start + config.batch_size, config.num_samples))
            labels, noise = labels_of(config, model, indices), generators(config.seed, indices, model.device)
            settings = generate_settings(config) | {"steps": steps, "cache": SkipCache(spec, self.timesteps(steps))}
            latents = generate(model, labels, noise, **settings, progress=True)
            yield decode(self.models.vae, latents).clamp(-1, 1).cpu()

    def make(self, steps: int, spec: Policy) -> Tensor:
        """(N, ..., 3, H, W) uint8."""
        return torch.cat([to_uint8(images) for images in self.images(steps, spec)])


def run_job(
    config: SamplingConfig,
    models: Models,
    save: Callable[[Job, int, Tensor], None],
    suffix: str,
    unit: str,
    free: set[str],
) -> tuple[Job, dict]:
    """Make the samples of a config that are not there yet, and report.json.

    Args:
        save: `save(job, index, pixels)` writes a sample, uint8 of the shape that the autoencoder gives.
        suffix: of the samples' files.
        unit: what a sample is, for people.
        free: the task's settings that do not determine the samples.

    Returns:
        The job, all of whose samples exist then, and the run's report. If all of them existed before, the report is the
        one of then.
    """
    state, spec = process_state(), CacheSpec.parse(config.cache)
    model, vae, flops = models
    device, timesteps = state.device, Diffusion(config.steps).sampling_timesteps
    identity = {key: value for key, value in to_dict(config).items() if key not in _FREE | free}
    identity |= {"weights": fingerprint(model), "vae": fingerprint(vae)}
    identity |= {"dtype": str(model.dtype), "device": device.type}  # devices draw different noise from one seed
    identity |= cache_identity(spec, identity["weights"], config.sampler, config.guidance_scale, config.batch_size)
    job = Job(config.out, identity, config.num_samples, suffix, rank=state.process_index, world=state.num_processes)

    def make(indices: list[int], timer: StepTimer) -> tuple[Tensor, SkipCache]:
        cache = SkipCache(spec, timesteps)
        timer.start()
        latents = generate(
            model,
            labels_of(config, model, indices),
            generators(config.seed, indices, device),
            **generate_settings(config),
            cache=cache,
            callback=lambda i, x, x0: timer.tick(cache.ran[i]),
            progress=state.is_main_process,
        )
        return pixels(vae, latents), cache

    summary = work_off(
        job,
        job.batches(config.batch_size),
        make,
        lambda index, pixels: save(job, index, pixels),
        idle=SkipCache(spec, timesteps),
        flops=flops,
        unit=unit,
        seed=config.seed,
        config=to_dict(config),
    )
    return job, summary
