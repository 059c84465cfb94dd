"""Sample clips from prompts with Skip-DiT (Latte T2V), with or without Skip-Cache.

    python text-to-video/sample_t2v.py --config configs/text-to-video/demo.yaml --prompt "a bicycle"
    python text-to-video/sample_t2v.py --config configs/text-to-video/t2v_sample_skip_cache.yaml --cache N2-700-50
    torchrun --nproc-per-node 8 text-to-video/sample_t2v.py --config configs/text-to-video/t2v_sample_vbench.yaml

Runs diffusers' LattePipeline. Writes every clip as mp4 (with num_frames=1 as PNG), sheet.png with frames of the first
clips, prompts.json and report.json; with gif=true also every clip as GIF, and preview.gif with the first ones moving.
The same command again continues an interrupted run; any number of processes makes the same clips, to rounding.
"""

from skipdit.cli import say_start
from skipdit.text_to_video.settings import SampleConfig as Config
from skipdit.text_to_video.settings import read_arguments

if __name__ == "__main__":
    read_arguments(__doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import LattePipeline, SchedulerMixin
from torch import Tensor
from torchvision.io import ImageReadMode, read_image

from skipdit.checkpoints.files import recorded_flow_shift, recorded_settings
from skipdit.cli import friendly_errors
from skipdit.data.video import add_gifs, read_mp4
from skipdit.encoders.autoencoder import downsampling, load_vae
from skipdit.encoders.text import TextEncoder, load_text_encoder, missing_text_files
from skipdit.sampling import text_conditional as text_sample
from skipdit.sampling.job import Job, preflight, run_job
from skipdit.sampling.prompts import file_names, read_prompts
from skipdit.sampling.text_conditional import Parts, PromptSampler, check_settings, run_pipeline, write_prompts
from skipdit.text_to_video.model import LatteT2V
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import write_png
from skipdit.utils.seeding import generators
from skipdit.utils.video import contact_sheet, side_by_side, write_gif, write_mp4

FETCH = "skipdit download text-to-video"
SHOWN = 16  # clips on the contact sheet
RELEASED_WIDTH = 1152
NOISE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # that Latte was trained with


def make_scheduler(name: str, folder: Path | None = None, flow_shift: float | None = None) -> SchedulerMixin:
    """A diffusers scheduler with the settings of a folder, if given, and the noise that Latte was trained with; or that
    of a model trained by flow matching, with its shift.
    """
    settings = text_sample.scheduler_settings(folder) | NOISE | {"clip_sample": False}
    settings.pop("variance_type", None)
    if name == "ddpm":  # the others have no use for a learned variance, and the pipeline keeps it from them then
        settings["variance_type"] = "learned_range"
    return text_sample.make_scheduler(name, settings, flow_shift)


class Prompt(NamedTuple):
    """A prompt as the model reads it: embeddings (1, k, C) of its k tokens, and as many of the negative prompt."""

    embeddings: Tensor
    negative: Tensor


def encode_prompts(encoder: TextEncoder, prompts: list[str], negative_prompt: str) -> dict[str, Prompt]:
    """The prompts as `LattePipeline` encodes them, on the CPU.

    Each has a call of its own: what it gives is then the same to the bit, whatever other prompts a run has.

    Raises FloatingPointError if they are not finite in the encoder's dtype.
    """
    negative, texts = encoder.encode([negative_prompt]).embeddings.cpu(), {}
    for prompt in dict.fromkeys(prompts):
        embeddings, mask = (part.cpu() for part in encoder.encode([prompt]))
        if not (negative.isfinite().all() and embeddings.isfinite().all()):
            raise FloatingPointError(f"embeddings are not finite in {negative.dtype}: use dtype=bfloat16 or float32")
        length = int(mask.sum())
        texts[prompt] = Prompt(embeddings[:, :length], negative[:, :length])
    return texts


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
    model, device = pipe.transformer, pipe._execution_device
    height, width = size or (model.config.sample_size * downsampling(pipe.vae),) * 2
    latents = run_pipeline(
        pipe,
        callback,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=prompt.embeddings.expand(len(generators), -1, -1).to(device, model.dtype),
        negative_prompt_embeds=prompt.negative.expand(len(generators), -1, -1).to(device, model.dtype),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        video_length=num_frames or model.config.video_length,
        height=height,
        width=width,
        generator=list(generators),
        enable_temporal_attentions=temporal_attention,
    )
    return latents.transpose(1, 2)


def check(config: Config, branch: int | None) -> Parts:
    """Raises ValueError or FileNotFoundError for settings that do not fit each other, before large files are read."""
    folder, places = Path(config.pipeline) if config.pipeline else None, config.places()
    needed = {"weights": config.weights, "vae": places["vae"]}
    if folder:
        needed |= {"pipeline": f"{folder}/transformer/config.json"}
        needed |= {"scheduler": f"{folder}/scheduler/scheduler_config.json"}
    extra = ["temporal_decoder"] * config.temporal_decoder + ["plain"] * (not config.skip)
    fetch = FETCH + (f"`, and `{FETCH} --only {' '.join(extra)}" if extra else "")
    preflight(needed, fetch, absent=missing_text_files(places["text_encoder"], config.tokenizer))
    flow_shift = recorded_flow_shift(config.weights)
    scheduler_of = partial(make_scheduler, folder=folder / "scheduler" if folder else None, flow_shift=flow_shift)
    vae = load_vae(places["vae"])
    settings = LatteT2V.load_config(folder / "transformer") if folder else recorded_settings(config.weights)
    if "sample_size" not in settings:
        raise UserError(f"{config.weights} says nothing of its model's sizes: set pipeline to a folder that does")
    with torch.device("meta"):
        model = LatteT2V.from_config(settings, skip=config.skip, **({"fuse": config.fuse} if config.fuse else {}))
    native = model.config.sample_size * downsampling(vae)
    height, width = config.height or native, config.width or native
    if not 1 <= config.num_frames <= model.config.video_length:
        raise UserError(f"num_frames is {config.num_frames}; this model makes 1 to {model.config.video_length}")
    if config.temporal_decoder and (config.vae_slicing or config.vae_tiling):
        raise UserError("the temporal decoder knows neither vae_slicing nor vae_tiling")
    released = torch.float16 if model.config.cross_attention_dim == RELEASED_WIDTH else None
    check_settings(config, model, vae, (height, width), branch, released=released)
    return Parts(model, vae, scheduler_of, (height, width))


def open_pipeline(config: Config, parts: Parts) -> LattePipeline:
    """Load the transformer's weights, and put all on the device; the text encoder is not part of the pipeline."""
    parts.load(config.weights)
    return LattePipeline(None, None, parts.vae, parts.model, parts.make_scheduler(config.scheduler))


def open_text_encoder(config: Config, dtype: torch.dtype) -> TextEncoder:
    encoder = load_text_encoder(config.places()["text_encoder"], config.tokenizer, dtype)
    return encoder.to(process_state().device)


class ClipSampler(PromptSampler):
    """All that a config asks for, on the device, ready to sample.

    Args:
        branch: the cache's, None without a cache.

    Attributes:
        texts: of each prompt, as the model reads it.
    """

    def __init__(self, config: Config, branch: int | None):
        self.config, self.copies = config, config.videos_per_prompt
        self.prompts = read_prompts(config.prompts, config.prompt_file, each_once=config.vbench_names)
        parts = check(config, branch)
        encoder = open_text_encoder(config, parts.model.dtype)
        self.texts, self.encoder = encode_prompts(encoder, self.prompts, config.negative_prompt), encoder.fingerprint
        del encoder  # before the transformer comes
        tokens = max(text.embeddings.shape[1] for text in self.texts.values())
        sizes = {"frames": config.num_frames, "temporal": config.temporal_attention, "tokens": tokens}
        names = file_names(self.prompts, self.copies, config.vbench_names)
        self._open(parts, names, branch, open_pipeline, **sizes)
        if config.num_frames > 1:
            self.unit, self.suffix = "clip", "mp4"

    def batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Samples of one prompt at a time: prompts differ in length, and padding one would change its clip."""
        for _, group in groupby(indices, key=lambda index: index // self.copies):
            yield from super().batches(list(group))

    def call(self, indices: list[int], steps: int, callback: Callable[[int], None] | None) -> Tensor:
        return generate(
            self.pipe,
            self.texts[self.prompts[indices[0] // self.copies]],
            generators(self.config.seed, indices, self.pipe._execution_device),
            steps=steps,
            guidance_scale=self.config.guidance_scale,
            num_frames=self.config.num_frames,
            size=self.size,
            temporal_attention=self.config.temporal_attention,
            callback=callback,
        )

    def to_model(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)  # (N, C, F, h, w)

    def write(self, path: Path, pixels: Tensor) -> None:
        if self.suffix == "png":
            write_png(pixels[0], str(path))
        else:
            write_mp4(path, pixels, self.config.fps)


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    sampler = ClipSampler.from_config(config)
    job, report = run_job(sampler)
    if process_state().is_main_process:
        write_prompts(job, sampler)
    write_look(config, job)
    return report


def write_look(config: Config, job: Job) -> None:
    """GIFs, shared out over the processes; the contact sheet, and its clips in motion."""
    pictures = job.suffix == "png"
    if config.gif and not pictures:
        add_gifs(map(job.path, job.own()), config.fps)
    if process_state().is_main_process:
        paths = [job.path(i) for i in range(min(job.total, SHOWN))]
        shown = [read_image(str(p), ImageReadMode.RGB)[None] if pictures else read_mp4(p) for p in paths]
        write_png(contact_sheet(shown), str(job.folder / "sheet.png"))
        if config.gif and not pictures:
            write_gif(job.folder / "preview.gif", side_by_side(shown), config.fps)


@friendly_errors()
def main() -> None:
    sample(read_arguments(__doc__))


if __name__ == "__main__":
    main()
