"""Sample clips from prompts with Skip-DiT (Latte T2V), with or without Skip-Cache.

    python text-to-video/sample_t2v.py --config configs/text-to-video/demo.yaml --prompt "a bicycle"
    python text-to-video/sample_t2v.py --config configs/text-to-video/t2v_sample_skip_cache.yaml --cache N2-700-50
    torchrun --nproc-per-node 8 text-to-video/sample_t2v.py --config configs/text-to-video/t2v_sample_vbench.yaml

Runs diffusers' LattePipeline. Writes every clip as mp4 and, with gif=true, as GIF (with num_frames=1 as PNG); sheet.png
with frames of the first clips, prompts.json, and report.json. The same command again continues an interrupted run; any
number of processes makes the same clips.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, LattePipeline, SchedulerMixin
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image, write_png

from skipdit.bench import step_flops
from skipdit.cache import CacheSpec, SkipCache
from skipdit.config import friendly_errors, load_config, make_parser, required, setting, to_dict
from skipdit.data.images import to_uint8
from skipdit.device import process_state
from skipdit.media import contact_sheet, read_mp4, write_gif, write_mp4
from skipdit.pipeline import enable_cache
from skipdit.sample import (
    Job,
    StepTimer,
    add_cache_arguments,
    cache_override,
    generators,
    preflight,
    require_finite,
    resolve_dtype,
    work_off,
)
from skipdit.text import TextEncoder, load_text_encoder, missing_text_files
from skipdit.text_to_video.model import LatteT2V
from skipdit.text_to_video.prompts import Prompt, batches_of_prompts, encode_prompts, file_names, read_prompts
from skipdit.vae import decode, downsampling, load_vae
from skipdit.weights import fingerprint, load_weights

WINDOW = "N{}-700-50"  # the original code's caching window for this task
FETCH = "python text-to-video/download.py"
SHOWN = 16  # clips on the contact sheet
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass
class Config:
    """A text-to-video sampling run."""

    weights: str = required("checkpoint of the transformer: .pt, .safetensors, or folder")
    pipeline: str = setting("checkpoints/Latte-0", "folder with transformer/config.json, scheduler, vae, text_encoder")
    skip: bool = setting(True, "the weights have long skips")
    fuse: str | None = setting(None, "replace or residual long skips; unset: as the pipeline's config.json says")
    vae: str | None = setting(None, "autoencoder, folder or Hub name; unset: the pipeline's")
    temporal_decoder: bool = setting(False, "use the pipeline's vae_temporal_decoder, whose clips flicker less")
    text_encoder: str | None = setting(None, "folder or Hub name; unset: the pipeline's")
    tokenizer: str | None = setting(None, "folder or Hub name; unset: beside the text encoder")
    out: str = setting("samples/text-to-video", "folder for the clips and the report")
    prompts: list[str] = field(default_factory=list, metadata={"help": "what to show, as --prompt"})
    prompt_file: str | None = setting(None, "text file with one prompt per line, or a folder of such files (VBench)")
    videos_per_prompt: int = setting(1, "clips of each prompt; VBench wants 5")
    vbench_names: bool = setting(False, "call the files <prompt>-<n>.mp4, as VBench wants them")
    negative_prompt: str = setting("", "what not to show")
    num_frames: int = setting(16, "frames of a clip; 1 makes pictures")
    height: int | None = setting(None, "pixels; unset: as the model was made for")
    width: int | None = setting(None, "pixels; unset: as the model was made for")
    fps: float = setting(8.0, "frames per second of the files")
    gif: bool = setting(False, "also write every clip as GIF")
    batch_size: int = setting(1, "clips of one prompt per model call and process (guidance doubles it)")
    seed: int = setting(0, "seed of the run; clip i depends on it and on i")
    scheduler: str = setting("ddim", f"one of {', '.join(SCHEDULERS)}")
    steps: int = setting(50, "sampling steps")
    guidance_scale: float = setting(7.5, "classifier-free guidance; 1 is none")
    temporal_attention: bool = setting(True, "run the temporal blocks; without them frames know nothing of each other")
    cache: str = setting("none", "Skip-Cache spec, as --cache")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    vae_slicing: bool = setting(False, "decode one frame at a time, to save memory")
    vae_tiling: bool = setting(False, "decode frames in tiles, to save more")
    compile: bool = setting(False, "compile the model with torch.compile")

    def places(self) -> dict[str, str]:
        """Where everything comes from that is not set directly."""
        autoencoder = "vae_temporal_decoder" if self.temporal_decoder else "vae"
        return {
            "vae": self.vae or f"{self.pipeline}/{autoencoder}",
            "text_encoder": self.text_encoder or f"{self.pipeline}/text_encoder",
        }


# Settings that say where and how fast, not what is made; and those that the identity has in another form: weights by
# their fingerprints, the size in pixels, models and scheduler by their configs.
_FREE = {"out", "gif", "batch_size", "compile", "vae_slicing", "prompts", "prompt_file", "height", "width"}
_FREE |= {"weights", "pipeline", "skip", "fuse", "vae", "temporal_decoder", "text_encoder", "tokenizer"}


def make_scheduler(name: str, folder: Path | None = None) -> SchedulerMixin:
    """A diffusers scheduler with the settings of a folder, if given, and the noise that Latte was trained with.

    Raises ValueError for an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; known: {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, SCHEDULERS[name])
    settings = kind.load_config(folder) if folder else {}
    settings |= {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    settings["variance_type"] = "learned_range"
    known = set(inspect.signature(kind.__init__).parameters)
    if name != "ddpm":  # the others have no use for a learned variance, and the pipeline keeps it from them then
        known -= {"variance_type"}
    return kind(**{key: value for key, value in settings.items() if key in known})


def generate(
    pipe: LattePipeline,
    prompt: Prompt,
    generators: Sequence[torch.Generator],
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    temporal_attention: bool = True,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample latents of one prompt.

    Args:
        pipe: with or without `enable_cache`; its transformer in eval mode.
        generators: N, on the transformer's device.
        num_frames, size: F, and height and width in pixels; None: as the model was made for.
        callback: called with the number of every step, after it.

    Returns:
        Latents (N, F, C, h, w), float32.

    Raises FloatingPointError, naming the step, if they stop being finite.
    """
    model, finite = pipe.transformer, []  # flags per step, on the device: read once, after the run

    def after_step(pipe: LattePipeline, i: int, t: Tensor, tensors: dict) -> dict:
        finite.append(tensors["latents"].isfinite().all())
        if callback is not None:
            callback(i)
        return {}

    height, width = size or (model.config.sample_size * downsampling(pipe.vae),) * 2
    latents = pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=prompt.embeddings.expand(len(generators), -1, -1).to(model.device, model.dtype),
        negative_prompt_embeds=prompt.negative.expand(len(generators), -1, -1).to(model.device, model.dtype),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        video_length=num_frames or model.config.video_length,
        height=height,
        width=width,
        generator=list(generators),
        enable_temporal_attentions=temporal_attention,
        callback_on_step_end=after_step,
        output_type="latent",
    ).frames
    require_finite(finite, pipe.scheduler.timesteps.tolist(), model.dtype)
    return latents.float().transpose(1, 2)


class Parts(NamedTuple):
    """A checked config's pipeline, but for the weights of the transformer."""

    model: LatteT2V  # on the meta device
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    size: tuple[int, int]  # height and width in pixels


def check(config: Config, branch: int | None) -> Parts:
    """Raises ValueError or FileNotFoundError for settings that do not fit each other, before large files are read."""
    folder, places, device = Path(config.pipeline), config.places(), process_state().device
    needed = {"weights": config.weights, "vae": places["vae"]}
    needed |= {"pipeline": f"{folder}/transformer/config.json"}
    needed |= {"scheduler": f"{folder}/scheduler/scheduler_config.json"}
    extra = ["temporal_decoder"] * config.temporal_decoder + ["plain"] * (not config.skip)
    fetch = FETCH + (f"`, and `{FETCH} --only {' '.join(extra)}" if extra else "")
    preflight(needed, fetch, absent=missing_text_files(places["text_encoder"], config.tokenizer))
    scheduler = make_scheduler(config.scheduler, folder / "scheduler")
    vae = load_vae(places["vae"])
    settings = LatteT2V.load_config(folder / "transformer")
    with torch.device("meta"):
        model = LatteT2V.from_config(settings, skip=config.skip, **({"fuse": config.fuse} if config.fuse else {}))
    native = model.config.sample_size * downsampling(vae)
    height, width = config.height or native, config.width or native
    unit = max(8, downsampling(vae) * model.config.patch_size)
    if height % unit or width % unit:
        raise ValueError(f"height {height} and width {width} must be multiples of {unit} pixels")
    if not 1 <= config.num_frames <= model.config.video_length:
        raise ValueError(f"num_frames is {config.num_frames}; this model makes 1 to {model.config.video_length}")
    if branch is not None and branch > model.n_skips:
        raise ValueError(f"cache branch {branch} is larger than the model's number of skips, {model.n_skips}")
    if config.guidance_scale < 1:
        raise ValueError(f"guidance_scale is {config.guidance_scale}; 1 is no guidance, and less is not possible")
    if config.temporal_decoder and (config.vae_slicing or config.vae_tiling):
        raise ValueError("the temporal decoder knows neither vae_slicing nor vae_tiling")
    nn.Module.to(model, dtype=resolve_dtype(config.dtype, device))  # not diffusers' own, which warns
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tiling:
        vae.enable_tiling()
    return Parts(model, vae, scheduler, (height, width))


def open_pipeline(config: Config, parts: Parts) -> LattePipeline:
    """Load the transformer's weights, and put all on the device; the text encoder is not part of the pipeline."""
    state, model = process_state(), parts.model
    model.to_empty(device="cpu")
    load_weights(model, config.weights)
    model.to(state.device).eval().requires_grad_(False)
    pipe = LattePipeline(None, None, parts.vae.to(state.device), model, parts.scheduler)
    pipe.set_progress_bar_config(disable=not state.is_main_process, leave=False, desc="sampling", unit="step")
    return pipe


def open_text_encoder(config: Config, dtype: torch.dtype) -> TextEncoder:
    encoder = load_text_encoder(config.places()["text_encoder"], config.tokenizer, dtype)
    return encoder.to(process_state().device)


class TextSampler:
    """All that a config asks for, on the device, ready to sample.

    Args:
        branch: the cache's, None without a cache.

    Attributes:
        pipe: without its text encoder; its transformer may be compiled.
        model: the transformer itself.
        prompts, texts: the prompts, and each as the model reads it.
        encoder: fingerprint of the text encoder.
        size: height and width in pixels.
        flops: of one full and one cached step, per clip.
    """

    def __init__(self, config: Config, branch: int | None):
        self.config, self.method = config, config.scheduler
        self.prompts = read_prompts(config.prompts, config.prompt_file)
        parts, device = check(config, branch), process_state().device
        self.size, factor = parts.size, downsampling(parts.vae)
        encoder = open_text_encoder(config, parts.model.dtype)
        self.texts, self.encoder = encode_prompts(encoder, self.prompts, config.negative_prompt), encoder.fingerprint
        del encoder  # before the transformer comes
        self.flops = step_flops(
            parts.model,
            2 if config.guidance_scale > 1 else 1,
            branch or 1,
            frames=config.num_frames,
            height=self.size[0] // factor,
            width=self.size[1] // factor,
            temporal=config.temporal_attention,
            tokens=max(text.embeddings.shape[1] for text in self.texts.values()),
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the report is of sampling
        self.pipe = open_pipeline(config, parts)
        self.model = self.pipe.transformer
        if config.compile:
            self.pipe.transformer = torch.compile(self.model, fullgraph=True)

    def timesteps(self, steps: int) -> list[float]:
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.timesteps.tolist()

    def clips(self, indices: list[int], steps: int, callback: Callable[[int], None] | None = None) -> Tensor:
        """Samples of one prompt, (N, F, 3, H, W) uint8."""
        prompt = self.prompts[indices[0] // self.config.videos_per_prompt]
        latents = generate(
            self.pipe,
            self.texts[prompt],
            generators(self.config.seed, indices, self.model.device),
            steps=steps,
            guidance_scale=self.config.guidance_scale,
            num_frames=self.config.num_frames,
            size=self.size,
            temporal_attention=self.config.temporal_attention,
            callback=callback,
        )
        return to_uint8(decode(self.pipe.vae, latents)).cpu()

    def make(self, steps: int, spec: CacheSpec) -> Tensor:
        """All samples of the config, (N, F, 3, H, W) uint8."""
        enable_cache(self.pipe, spec)
        each = self.config.videos_per_prompt
        batches = batches_of_prompts(range(len(self.prompts) * each), each, self.config.batch_size)
        return torch.cat([self.clips(indices, steps) for indices in batches])


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    state, spec = process_state(), CacheSpec.parse(config.cache)
    prompts, each = read_prompts(config.prompts, config.prompt_file), config.videos_per_prompt
    names = file_names(prompts, each, config.vbench_names)
    sampler = TextSampler(config, spec.branch if spec.interval > 1 else None)
    cache, model = enable_cache(sampler.pipe, spec), sampler.model
    suffix = "png" if config.num_frames == 1 else "mp4"

    identity = {key: value for key, value in to_dict(config).items() if key not in _FREE}
    identity |= {"size": sampler.size, "prompts": prompts, "cache": str(spec), "text_encoder": sampler.encoder}
    identity |= {"weights": fingerprint(model), "vae": fingerprint(sampler.pipe.vae)}
    identity |= {"model": dict(model.config), "scheduler_config": dict(sampler.pipe.scheduler.config)}
    identity |= {"dtype": str(model.dtype), "device": state.device.type}  # devices draw different noise from one seed
    job = Job(config.out, identity, len(names), suffix, state.process_index, state.num_processes, names)

    def make(indices: list[int], timer: StepTimer) -> tuple[Tensor, SkipCache]:
        timer.start()
        return sampler.clips(indices, config.steps, lambda i: timer.tick(cache.run.ran[i])), cache.run

    def save(index: int, frames: Tensor) -> None:
        if suffix == "png":
            job.save(index, lambda path: write_png(frames[0], str(path)))
        else:
            job.save(index, lambda path: write_mp4(path, frames, config.fps))

    summary = work_off(
        job,
        batches_of_prompts(job.pending(), each, config.batch_size),
        make,
        save,
        idle=SkipCache(spec, sampler.timesteps(config.steps)),
        flops=sampler.flops,
        unit="picture" if suffix == "png" else "clip",
        seed=config.seed,
        config=to_dict(config) | {"prompts": prompts},
    )
    write_outputs(config, job, prompts)
    return summary


def write_outputs(config: Config, job: Job, prompts: list[str]) -> None:
    """GIFs, shared out over the processes; the contact sheet and the list of prompts."""
    pictures = job.suffix == "png"
    for index in range(job.rank, job.total, job.world) if config.gif and not pictures else ():
        gif = job.path(index).with_suffix(".gif")
        if not gif.exists():
            write_gif(gif, read_mp4(job.path(index)), config.fps)
    if process_state().is_main_process:
        paths = [job.path(i) for i in range(job.total)]
        shown = [read_image(str(p), ImageReadMode.RGB)[None] if pictures else read_mp4(p) for p in paths[:SHOWN]]
        write_png(contact_sheet(shown), str(job.folder / "sheet.png"))
        table = {path.name: prompts[i // config.videos_per_prompt] for i, path in enumerate(paths)}
        (job.folder / "prompts.json").write_text(
            json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def main() -> None:
    parser = make_parser(Config, __doc__)
    add_cache_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to show, instead of the config's prompts; more than once for several",
    )
    args = parser.parse_intermixed_args()
    with friendly_errors():
        spec = cache_override(args, WINDOW)
        config = load_config(Config, args.config, args.overrides + spec)
        if args.prompt:
            config.prompts, config.prompt_file = args.prompt, None
        sample(config)


if __name__ == "__main__":
    main()
