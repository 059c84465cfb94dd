"""What the samplers of prompts share: settings, schedulers, the call of a diffusers pipeline, a job of samples."""

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.checkpoints.loading import load_weights
from skipdit.diffusion.flow import make_flow_scheduler
from skipdit.diffusion.schedulers import SCHEDULERS, make_gaussian_scheduler
from skipdit.encoders.autoencoder import downsampling
from skipdit.layers.flops import step_flops
from skipdit.layers.skip import SkipTransformer, check_branch
from skipdit.pipelines.cache import enable_cache
from skipdit.sampling.job import Job, require_finite
from skipdit.sampling.sampler import Sampler
from skipdit.sampling.settings import PromptConfig
from skipdit.utils.device import compile_mode, process_state, set_tf32
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text

STOCHASTIC = ("ddpm", "euler-ancestral", "kdpm2-ancestral")  # of the schedulers


def make_scheduler(name: str, settings: dict[str, Any], flow_shift: float | None = None) -> SchedulerMixin:
    """A diffusers scheduler with those of the settings that it knows.

    Args:
        flow_shift: of a model trained by flow matching, whose scheduler has no other settings; None for others.

    Raises ValueError for an unknown name, and one that is not for such a model.
    """
    if name not in SCHEDULERS:
        raise UserError(f"scheduler is {name!r}; known: {', '.join(SCHEDULERS)}")
    if flow_shift is not None:
        return make_flow_scheduler(name, flow_shift)
    return make_gaussian_scheduler(name, settings)


def scheduler_settings(folder: Path | None) -> dict[str, Any]:
    """The settings of a diffusers scheduler's folder; none without a folder."""
    return diffusers.DDIMScheduler.load_config(folder) if folder else {}  # the file is the same for every class


class Parts(NamedTuple):
    """A checked config's pipeline, but for the weights of the transformer."""

    model: SkipTransformer  # on the meta device, until it is loaded
    vae: AutoencoderKL
    make_scheduler: Callable[[str], SchedulerMixin]  # of a name, for this model
    size: tuple[int, int]  # height and width in pixels

    def load(self, weights: str) -> None:
        """Read the transformer's weights, on the CPU."""
        self.model.to_empty(device="cpu")
        load_weights(self.model, weights)
        self.model.eval().requires_grad_(False)


def check_settings(
    config: PromptConfig,
    model: SkipTransformer,
    vae: AutoencoderKL,
    size: tuple[int, int],
    branch: int | None,
    unit: int = 8,
    released: torch.dtype | None = None,
) -> None:
    """Check that settings fit the model and each other, and set the autoencoder's.

    Args:
        model: on the meta device; takes the dtype.
        size: height and width in pixels.
        branch: the cache's, None without a cache.
        unit: pixels of which the pipeline takes multiples.
        released: dtype of a released model; see `resolve_dtype`.

    Raises ValueError for those that do not.
    """
    unit = max(unit, downsampling(vae) * model.config.patch_size)
    if size[0] % unit or size[1] % unit:
        raise UserError(f"height {size[0]} and width {size[1]} must be multiples of {unit} pixels")
    check_branch(branch or 0, model.depth, model.n_skips)
    if model.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"the model is for {model.config.in_channels} latent channels, and the autoencoder has "
            f"{vae.config.latent_channels}: set vae to the one that it was trained with"
        )
    if config.offload not in ("none", "model", "group"):
        raise UserError(f"offload is {config.offload!r}; known: none, model, group")
    if compile_mode(config.compile) and config.offload == "group":
        raise UserError("offload=group moves weights within the model, which cannot be compiled: set offload=model")
    set_tf32(config.tf32)
    dtype = resolve_dtype(config.dtype, process_state().device, released)
    nn.Module.to(model, dtype=dtype)  # not diffusers' own, which warns
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tiling:
        vae.enable_tiling()


def run_pipeline(pipe: DiffusionPipeline, callback: Callable[[int], None] | None = None, **arguments: Any) -> Tensor:
    """Latents, float32, that a pipeline's call ends with.

    Args:
        pipe: its transformer in eval mode.
        callback: called with the number of every step, after it.
        arguments: of the call.

    Raises FloatingPointError, naming the step, if latents stop being finite.
    """
    finite = []  # flags per step, on the device: read once, after the run

    def after_step(pipe: DiffusionPipeline, i: int, t: Tensor, tensors: dict) -> dict:
        finite.append(tensors["latents"].isfinite().all())
        if callback is not None:
            callback(i)
        return {}

    latents = pipe(**arguments, callback_on_step_end=after_step, output_type="latent")[0]
    require_finite(finite, pipe.scheduler.timesteps.tolist(), latents.dtype)
    return latents.float()


def place(pipe: DiffusionPipeline, offload: str, device: torch.device) -> None:
    """Put a pipeline's models on a device, or let diffusers bring them there when they run.

    Args:
        offload: "none"; "model", one model at a time; "group", layer by layer, the next ones while one runs.
    """
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
        return
    if offload == "group":
        streams = {"use_stream": True, "non_blocking": True} if device.type == "cuda" else {}
        pipe.transformer.enable_group_offload(device, torch.device("cpu"), "leaf_level", **streams)
    else:
        pipe.transformer.to(device)
    pipe.vae.to(device)


class PromptSampler(Sampler):
    """All samples of a config from prompts, by a diffusers pipeline.

    Attributes:
        pipe: the pipeline, without text encoders; its transformer may be compiled.
        prompts: what to show.
        copies: samples of each prompt.
        encoder: fingerprint of the text encoder, or of both.
        size: height and width in pixels.
    """

    config: PromptConfig
    pipe: DiffusionPipeline
    prompts: list[str]
    copies: int
    encoder: str
    size: tuple[int, int]

    @abstractmethod
    def call(self, indices: list[int], steps: int, callback: Callable[[int], None] | None) -> Tensor:
        """Call the pipeline for a batch of samples.

        Args:
            callback: called with the number of every step, after it.

        Returns:
            Latents (N, ..., C, h, w), float32.
        """

    def latents(
        self, indices: list[int], steps: int, policy: CachePolicy, on_step: Callable[[int, str], None] | None = None
    ) -> tuple[Tensor, SkipCache]:
        cache = enable_cache(self.pipe, policy)
        latents = self.call(indices, steps, None if on_step is None else lambda i: on_step(i, cache.run.kind(i)))
        return latents, cache.run

    @property
    def method(self) -> str:
        return self.config.scheduler

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    def timesteps(self, steps: int) -> list[float]:
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)  # the pipe's would begin a run
        scheduler.set_timesteps(steps)
        return scheduler.timesteps.tolist()

    @contextmanager
    def using(self, method: str) -> Iterator[None]:
        config, scheduler = self.config, self.pipe.scheduler
        self.config = replace(config, scheduler=method)
        self.pipe.scheduler = self._make_scheduler(method)
        try:
            yield
        finally:
            self.config, self.pipe.scheduler = config, scheduler

    def guide(self, rows: Tensor) -> Tensor:
        if self.config.guidance_scale == 1:
            return rows
        unconditional, conditional = rows.chunk(2)
        return torch.lerp(unconditional, conditional, self.config.guidance_scale)

    def follow(self, outputs: Tensor, steps: int) -> list[Tensor]:
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        x, states, noise = torch.zeros(outputs.shape[1], 1, 1, 1), [], {}
        learned = scheduler.config.get("variance_type") in ("learned", "learned_range")  # it splits it off the output
        if "generator" in inspect.signature(scheduler.step).parameters:
            noise["generator"] = [torch.Generator().manual_seed(0) for _ in x]
        for i, t in enumerate(scheduler.timesteps):
            output = outputs[i][:, None, None, None]
            output = torch.cat([output, torch.zeros_like(output)], dim=1) if learned else output
            x = scheduler.step(output, t, x, **noise).prev_sample
            following = scheduler.timesteps[i + 1 : i + 2]
            states.append((scheduler.scale_model_input(x, following[0]) if len(following) else x).flatten())
        return states

    def refined(self, steps: int, factor: int) -> int | None:
        fine, own = self.timesteps(steps * factor), self.timesteps(steps)
        # "leading" timesteps of the longer run begin earlier, too; what counts is that it visits those of this one
        return None if self.config.scheduler in STOCHASTIC or not set(own) <= set(fine) else steps * factor

    def identity(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "prompts": self.prompts,
            "text_encoder": self.encoder,
            "model": _settings(self.model),
            "scheduler_config": _settings(self.pipe.scheduler),
        }

    def record(self) -> dict[str, Any]:
        return {"prompts": self.prompts}

    def _open(
        self,
        parts: Parts,
        names: list[str],
        branch: int | None,
        make: Callable[[PromptConfig, Parts], DiffusionPipeline],
        **sizes: int,
    ) -> None:
        """Count what a step costs, then load the pipeline; the text encoders have left the device by now.

        Args:
            names: of the samples' files, without suffix.
            branch: the cache's, None without a cache.
            make: loads the parts, and makes the pipeline of them.
            sizes: of the samples, as the model's `random_inputs` takes them.
        """
        scheduler = parts.make_scheduler(self.config.scheduler)
        try:
            scheduler.set_timesteps(self.config.steps)
        except ValueError as error:  # of diffusers: more steps than it was trained for, or too few for its order
            raise UserError(f"steps is {self.config.steps}, refused by {self.config.scheduler}: {error}") from error
        state, factor = process_state(), downsampling(parts.vae)
        height, width = (side // factor for side in parts.size)
        rows = 2 if self.config.guidance_scale > 1 else 1
        self.size, self.names, self.total = parts.size, names, len(names)
        self.flops = step_flops(parts.model, rows, 1 if branch is None else branch, height=height, width=width, **sizes)
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the report is of sampling
        self.pipe, self._make_scheduler = make(self.config, parts), parts.make_scheduler
        self.pipe.set_progress_bar_config(disable=not state.is_main_process, leave=False, desc="sampling", unit="step")
        self.model = self.pipe.transformer
        if mode := compile_mode(self.config.compile):
            self.pipe.transformer = torch.compile(self.model, fullgraph=True, mode=mode)
        place(self.pipe, self.config.offload, state.device)


def write_prompts(job: Job, sampler: PromptSampler) -> None:
    """Write prompts.json, which says what each sample shows."""
    table = {job.path(i).name: sampler.prompts[i // sampler.copies] for i in range(job.total)}
    replace_text(job.folder / "prompts.json", json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _settings(part: ConfigMixin) -> dict[str, Any]:
    """A part's config. Which of its entries are defaults diffusers lists in an order of chance, and is left out."""
    return {key: value for key, value in part.config.items() if key != "_use_default_values"}
