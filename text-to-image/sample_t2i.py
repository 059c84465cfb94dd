"""Sample pictures from prompts, in Chinese or English, with Hunyuan-DiT, with or without Skip-Cache.

    python text-to-image/sample_t2i.py --config configs/text-to-image/demo.yaml --prompt "a red apple"
    python text-to-image/sample_t2i.py --prompt "渔舟唱晚" --no-enhance --infer-steps 100 --image-size 1024 1024
    python text-to-image/sample_t2i.py --prompt "渔舟唱晚" --cache --cache-step 2
    torchrun --nproc-per-node 8 text-to-image/sample_t2i.py --config configs/text-to-image/t2i_sample_coco.yaml

Runs diffusers' HunyuanDiTPipeline. Without --config the released model is looked for in ckpts/. Writes every picture as
PNG; sheet.png with the first of them, prompts.json, and report.json. The same command again continues an interrupted
run; any number of processes makes the same pictures, to rounding.
"""

from skipdit.cli import say_start
from skipdit.text_to_image.settings import SampleConfig as Config
from skipdit.text_to_image.settings import read_arguments

if __name__ == "__main__":
    read_arguments(__doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, HunyuanDiTPipeline, SchedulerMixin
from torch import Tensor
from torchvision.io import ImageReadMode, read_image
from torchvision.utils import make_grid
from tqdm import tqdm

from skipdit.checkpoints.files import load_state, recorded_flow_shift
from skipdit.checkpoints.loading import identify
from skipdit.checkpoints.released import BEFORE_V1_2
from skipdit.cli import friendly_errors
from skipdit.encoders.autoencoder import downsampling, load_vae
from skipdit.encoders.reading import CLIP, T5, Reading
from skipdit.encoders.text import Encoded, load_text_encoder, missing_text_files
from skipdit.sampling import text_conditional as text_sample
from skipdit.sampling.job import preflight, run_job
from skipdit.sampling.prompts import file_names, read_prompts
from skipdit.sampling.text_conditional import Parts, PromptSampler, check_settings, run_pipeline, write_prompts
from skipdit.text_to_image.model import HunyuanDiT, rotary_tables
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import write_png
from skipdit.utils.seeding import generators

FETCH = "skipdit download text-to-image"
SHOWN = 16  # pictures on the contact sheet
UNIT = 16  # pixels; diffusers' pipeline rounds heights and widths down to multiples of it
RELEASED_WIDTH = 1408
SIZES = ["1024x1024", "1280x1280", "768x1024", "864x1152", "960x1280", "1024x768", "1152x864", "1280x960"]
SIZES += ["768x1280", "1280x768"]  # height x width; what the released model was trained for
NOISE = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "steps_offset": 1}  # and with
# What the released code guides away from where nothing else is asked for: wrong eyes, bad faces, blur and the like.


class TextPair(NamedTuple):
    """Prompts as both text encoders give them: embeddings (N, S, C) and masks (N, S)."""

    clip: Encoded
    t5: Encoded

    def rows(self, indices: Sequence[int], device: torch.device, dtype: torch.dtype) -> "TextPair":
        """Some of the prompts, for a model."""
        chosen = ((e.embeddings[indices].to(device, dtype), e.mask[indices].to(device)) for e in self)
        return TextPair(*(Encoded(*parts) for parts in chosen))


def make_scheduler(name: str, folder: Path | None = None, flow_shift: float | None = None) -> SchedulerMixin:
    """A diffusers scheduler for v-prediction, with the noise of the released model or the settings of a folder; or that
    of a model trained by flow matching, with its shift.
    """
    settings = NOISE | {"clip_sample": False} | text_sample.scheduler_settings(folder)
    return text_sample.make_scheduler(name, settings | {"prediction_type": "v_prediction"}, flow_shift)


def generate(
    pipe: HunyuanDiTPipeline,
    text: TextPair,
    negative: TextPair,
    generators: Sequence[torch.Generator],
    *,
    size: tuple[int, int],
    steps: int = 100,
    guidance_scale: float = 6.0,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample latents of N prompts.

    Args:
        pipe: with or without `enable_cache`; its transformer in eval mode.
        text, negative: of N prompts each, in the transformer's dtype and on its device.
        generators: N, on its device.
        size: height and width in pixels.
        callback: called with the number of every step, after it.

    Returns:
        Latents (N, C, h, w), float32.

    Raises FloatingPointError, naming the step, if they stop being finite.
    """
    model, factor = pipe.transformer, downsampling(pipe.vae) * pipe.transformer.config.patch_size
    rotary = rotary_tables(size[0] // factor, size[1] // factor, model.head_dim)
    device = pipe._execution_device
    rotary, timesteps, done = tuple(table.to(device) for table in rotary), None, 0

    def as_released(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The pipeline's tables are for other places, see `rotary_tables`, and its timesteps rounded to the dtype."""
        nonlocal timesteps
        if timesteps is None:
            timesteps = pipe.scheduler.timesteps.to(device, torch.float32)
        latents, _ = args
        return (latents, timesteps[done].expand(len(latents))), kwargs | {"image_rotary_emb": rotary}

    def after_step(i: int) -> None:
        nonlocal done
        done = i + 1
        if callback is not None:
            callback(i)

    hook = model.register_forward_pre_hook(as_released, with_kwargs=True, prepend=True)
    try:
        return run_pipeline(
            pipe,
            after_step,
            prompt_embeds=text.clip.embeddings,
            prompt_attention_mask=text.clip.mask,
            prompt_embeds_2=text.t5.embeddings,
            prompt_attention_mask_2=text.t5.mask,
            negative_prompt_embeds=negative.clip.embeddings,
            negative_prompt_attention_mask=negative.clip.mask,
            negative_prompt_embeds_2=negative.t5.embeddings,
            negative_prompt_attention_mask_2=negative.t5.mask,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=size[0],
            width=size[1],
            generator=list(generators),
            use_resolution_binning=False,
        )
    finally:
        hook.remove()


def check(config: Config, branch: int | None) -> Parts:
    """Raises ValueError or FileNotFoundError for settings that do not fit each other, before large files are read."""
    places, folder = config.places(), Path(config.pipeline, "scheduler")
    missing = missing_text_files(places["text_encoder"], config.tokenizer)
    missing += missing_text_files(places["text_encoder_2"], config.tokenizer_2)
    preflight({"weights": places["weights"], "vae": places["vae"]}, FETCH, absent=missing)
    flow_shift = recorded_flow_shift(places["weights"])
    scheduler_of = partial(make_scheduler, folder=folder if folder.is_dir() else None, flow_shift=flow_shift)
    vae = load_vae(places["vae"])
    state = load_state(places["weights"])
    if "style_embedder.weight" in state:
        raise UserError(f"{places['weights']} holds {identify(state)}. {BEFORE_V1_2}")
    with torch.device("meta"):
        model = HunyuanDiT(**HunyuanDiT.config_from_state(state))
    size, released = (config.height, config.width), model.config.hidden_size == RELEASED_WIDTH
    # Pictures of the released model are reported to be dark in other precisions.
    check_settings(config, model, vae, size, branch, UNIT, torch.float16 if released else None)
    if released and "x".join(map(str, size)) not in SIZES:
        warnings.warn(
            f"the released model was not trained for {size[0]}x{size[1]}, but for {', '.join(SIZES)}", stacklevel=2
        )
    return Parts(model, vae, scheduler_of, size)


def open_pipeline(config: Config, parts: Parts) -> HunyuanDiTPipeline:
    """Load the transformer's weights, and put all on the device; the text encoders are not part of the pipeline."""
    parts.load(config.places()["weights"])
    return make_pipeline(parts.vae, parts.model, parts.make_scheduler(config.scheduler))


def make_pipeline(vae: AutoencoderKL, model: HunyuanDiT, scheduler: SchedulerMixin) -> HunyuanDiTPipeline:
    """diffusers' pipeline without text encoders, which `generate` calls."""
    return HunyuanDiTPipeline(vae, None, None, model, scheduler, None, None, requires_safety_checker=False)


def encode_prompts(config: Config, model: HunyuanDiT, prompts: list[str]) -> tuple[TextPair, TextPair, str]:
    """Prompts and the negative prompt, on the CPU, and the encoders' fingerprints. One encoder is loaded at a time.

    Each text has a call of its own: what it gives is then the same to the bit, whatever other prompts a process has.

    Raises FloatingPointError if embeddings are not finite in the model's dtype.
    """
    both: dict[str, list] = {"prompts": [], "negative": [], "fingerprint": []}
    show = process_state().is_main_process
    for name, tokenizer, reading in _readings(config, model):
        encoder = load_text_encoder(name, tokenizer, model.dtype, reading).to(process_state().device)
        for key, texts in {"prompts": prompts, "negative": [config.negative_prompt]}.items():
            tokens = (len(texts), reading.max_tokens)
            encoded = Encoded(
                torch.empty(*tokens, encoder.dim, dtype=model.dtype), torch.empty(tokens, dtype=torch.bool)
            )
            for i, text in enumerate(tqdm(texts, desc=f"{key}, {reading.role}", leave=False, disable=not show)):
                for whole, part in zip(encoded, encoder.encode([text]), strict=True):
                    whole[i] = part[0]
            if not encoded.embeddings.isfinite().all():
                raise FloatingPointError(
                    f"embeddings of {name} are not finite in {model.dtype}: use dtype=bfloat16 or float32"
                )
            both[key].append(encoded)
        both["fingerprint"].append(encoder.fingerprint)
        del encoder  # before the next comes
    return TextPair(*both["prompts"]), TextPair(*both["negative"]), " ".join(both["fingerprint"])


def _readings(config: Config, model: HunyuanDiT) -> list[tuple[str, str | None, Reading]]:
    """Both text encoders, their tokenizers, and how they read."""
    places = config.places()
    return [
        (places["text_encoder"], config.tokenizer, CLIP._replace(max_tokens=model.config.text_len)),
        (places["text_encoder_2"], config.tokenizer_2, T5._replace(max_tokens=model.config.text_len_t5)),
    ]


class ImageSampler(PromptSampler):
    """All that a config asks for, on the device, ready to sample.

    Args:
        branch: the cache's, None without a cache.

    Attributes:
        text, negative: this process's prompts and the negative prompt, as the model reads them.
    """

    def __init__(self, config: Config, branch: int | None):
        self.config, self.copies = config, config.images_per_prompt
        self.prompts = read_prompts(config.prompts, config.prompt_file)
        parts, state = check(config, branch), process_state()
        samples = range(len(self.prompts) * self.copies)[state.process_index :: state.num_processes] or [0]
        own = dict.fromkeys(index // self.copies for index in samples)  # a text of the released size takes 1.4 MB
        self._rows = {prompt: row for row, prompt in enumerate(own)}
        self.text, self.negative, self.encoder = encode_prompts(config, parts.model, [self.prompts[p] for p in own])
        self._open(parts, file_names(self.prompts, self.copies, vbench=False), branch, open_pipeline)

    def call(self, indices: list[int], steps: int, callback: Callable[[int], None] | None) -> Tensor:
        place = self.pipe._execution_device, self.model.dtype
        return generate(
            self.pipe,
            self.text.rows([self._rows[index // self.copies] for index in indices], *place),
            self.negative.rows([0] * len(indices), *place),
            generators(self.config.seed, indices, self.pipe._execution_device),
            size=self.size,
            steps=steps,
            guidance_scale=self.config.guidance_scale,
            callback=callback,
        )

    def write(self, path: Path, pixels: Tensor) -> None:
        write_png(pixels, str(path))


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    sampler = ImageSampler.from_config(config)
    job, report = run_job(sampler)
    if process_state().is_main_process:
        write_prompts(job, sampler)
        shown = [read_image(str(job.path(i)), ImageReadMode.RGB) for i in range(min(job.total, SHOWN))]
        write_png(make_grid(shown, nrow=4, pad_value=255), str(job.folder / "sheet.png"))
    return report


@friendly_errors()
def main() -> None:
    sample(read_arguments(__doc__))


if __name__ == "__main__":
    main()
