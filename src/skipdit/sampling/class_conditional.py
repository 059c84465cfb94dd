"""What the samplers of DiT and Latte share: models whose only condition is a class, or nothing."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.checkpoints.files import recorded_flow_shift
from skipdit.checkpoints.loading import load_weights
from skipdit.diffusion.flow import FLOW_SOLVERS
from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.samplers import Callback, Model, ddim, ddpm, make_solver, multistep, randn
from skipdit.diffusion.schedulers import SOLVERS
from skipdit.encoders.autoencoder import load_vae
from skipdit.layers.adaln import AdaLNTransformer, Conditioning
from skipdit.layers.flops import step_flops
from skipdit.layers.skip import check_branch
from skipdit.sampling.job import Ahead, preflight, require_finite
from skipdit.sampling.sampler import Sampler
from skipdit.sampling.settings import SamplingConfig
from skipdit.utils.device import compile_mode, process_state, set_tf32
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.errors import UserError
from skipdit.utils.seeding import generators

SAMPLERS = tuple(dict.fromkeys(("ddpm", "ddim", *SOLVERS, *FLOW_SOLVERS)))
AHEAD_BYTES = 2**28  # memory for modulations that are computed ahead of their steps


def _is_solved(sampler: str, flow_shift: float | None) -> bool:
    """Whether a solver runs, and not DDPM or DDIM."""
    return flow_shift is not None or sampler in (*SOLVERS, *FLOW_SOLVERS)


def sampling_timesteps(
    sampler: str, steps: int | str | Sequence[int], flow_shift: float | None = None
) -> list[int] | list[float]:
    """Return the timesteps of a run, in sampling order, of a model whose `flow_shift` this is.

    Raises ValueError for steps that the sampler does not take, and a sampler that is not for such a model.
    """
    if _is_solved(sampler, flow_shift):
        return make_solver(sampler, steps, flow_shift).timesteps.tolist()
    return Diffusion(steps).sampling_timesteps


def _loop(
    sampler: str,
    steps: int | str | Sequence[int],
    flow_shift: float | None,
    model: Model,
    x: Tensor,
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Run the sampling loop of this name."""
    if _is_solved(sampler, flow_shift):
        return multistep(model, x, make_solver(sampler, steps, flow_shift), callback, progress)
    loop = {"ddpm": ddpm, "ddim": ddim}[sampler]
    return loop(model, x, Diffusion(steps), generators, callback=callback, progress=progress)


def guide(rows: Tensor, scale: float, channels: int | None) -> Tensor:
    """Noise (2N, ..., C, H, W), conditional and unconditional, to guided noise (N, ..., C, H, W)."""
    conditional, unconditional = rows.chunk(2)
    guided = torch.lerp(unconditional, conditional, scale)
    if channels is None:
        return guided
    return torch.cat([guided[..., :channels, :, :], conditional[..., channels:, :, :]], dim=-3)


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
    steps: int | str | Sequence[int] = 250,
    sampler: str = "ddpm",
    guidance_scale: float = 4.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[int, int] = (0, 1000),
    cache: SkipCache | CachePolicy | str = "none",
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
        cache: a spec, a policy, or a `SkipCache` for these steps to read its counts afterwards.
        callback: see `diffusion.ddpm`.
        sampler: one of `FLOW_SOLVERS` for a model trained by flow matching, and of the other `SAMPLERS` otherwise.

    Returns:
        Latents (N, *model.sample_shape), float32.

    Raises FloatingPointError, naming the step, if they stop being finite.
    """
    timesteps, count = sampling_timesteps(sampler, steps, model.flow_shift), len(generators)
    run = cache if isinstance(cache, SkipCache) else SkipCache(cache, timesteps)
    if run.spec.adaptive and model._compiled_call_impl is not None:
        raise UserError(f"cache {run.spec} decides within the model, which cannot be compiled then: set compile=none")
    x = randn((count, *model.sample_shape), generators, model.device, torch.float32)
    both = None if labels is None else torch.cat([labels, torch.full_like(labels, model.null_class)])
    low, high = guidance_interval

    steps_on_device = torch.tensor(timesteps, device=model.device)

    def condition(steps: list[int], kind: str) -> list[Conditioning]:
        branch = run.spec.branch if kind == "cached" else None
        return model.condition(torch.stack([steps_on_device[j] for j in steps]), both, branch)

    rows = 1 if both is None else len(both)
    step_bytes = 6 * model.config.hidden_size * rows * len(model.blocks) * model.dtype.itemsize
    # a step that decides by itself needs what a full one does
    kinds = ["full" if run.spec.adaptive else run.kind(i) for i in range(len(run.plan))]
    ahead = Ahead(condition, kinds, max(1, AHEAD_BYTES // step_bytes))

    def guided(x: Tensor, t: Tensor, i: int) -> Tensor:
        guide = labels is not None and guidance_scale != 1 and low <= timesteps[i] <= high
        step = run.at(i, stream="guided" if guide else "conditional")
        forecast = step is not None and step.forecast is not None
        conditioning = None if forecast else ahead.at(i, "full" if step is None or step.may_be_full else "cached")
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned has been read
        x = x.to(model.dtype)
        if guide:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            out = model.forward_with_cfg(x, t, both, guidance_scale, step, guidance_channels, conditioning)
            return out[:count]
        if conditioning is not None:
            conditioning = Conditioning(conditioning.blocks[:, :count], conditioning.final[:count])
        return model(x, t, labels, cache=step, conditioning=conditioning)

    finite: list[Tensor] = []  # per step, on the device: read once, after the run

    def after_step(i: int, x: Tensor, x0: Tensor) -> None:
        finite.append(x.isfinite().all())
        if callback is not None:
            callback(i, x, x0)

    try:
        x = _loop(sampler, steps, model.flow_shift, guided, x, generators, after_step, progress)
    finally:
        run.clear()
    require_finite(finite, timesteps, model.dtype)
    return x


class ClassSampler(Sampler):
    """All samples of a config by a model whose only condition is a class, or nothing.

    Args:
        branch: the cache's, None without a cache.

    Raises ValueError or FileNotFoundError for settings that do not fit each other, before the model's weights are read.
    """

    fetch: str  # the command that fetches the released weights

    def __init__(self, config: SamplingConfig, branch: int | None):
        self.config, self.total = config, config.num_samples
        device, mode = process_state().device, compile_mode(config.compile)
        set_tf32(config.tf32)
        preflight({"weights": config.weights, "vae": config.vae}, self.fetch)
        self.vae = load_vae(config.vae).to(device)
        with torch.device("meta"):
            model = self.build()
        if bad := [c for c in config.classes if not 0 <= c < (model.null_class or 0)]:
            known = f"0 .. {model.null_class - 1}" if model.null_class else "no classes"
            raise UserError(f"class ids {bad} are out of range; this model knows {known}")
        if config.sampler not in SAMPLERS:
            raise UserError(f"sampler is {config.sampler!r}; known: {', '.join(SAMPLERS)}")
        sampling_timesteps(config.sampler, config.steps, recorded_flow_shift(config.weights))
        guided = config.guidance_scale != 1
        if guided and model.null_class is None:
            raise UserError(f"guidance_scale is {config.guidance_scale}, and the model is unconditional: set it to 1")
        if guided and (config.guidance_channels or 1) > (channels := model.config.in_channels):
            raise UserError(f"guidance_channels is {config.guidance_channels}; the latents have {channels}")
        check_branch(branch or 0, model.depth, model.n_skips)
        self.flops = step_flops(model, 2 if guided else 1, 1 if branch is None else branch)
        dtype = resolve_dtype(config.dtype, device)
        nn.Module.to(model, dtype=dtype)  # not diffusers' own, which warns of float32 modules that this model has not
        model.to_empty(device="cpu")
        load_weights(model, config.weights)
        model.to(device).eval().requires_grad_(False)
        if mode:
            model.compile(fullgraph=True, mode=mode)
        self.model = model

    @abstractmethod
    def build(self) -> AdaLNTransformer:
        """Make the model of the config for latents of the autoencoder; called on the meta device."""

    @property
    def method(self) -> str:
        return self.config.sampler

    @contextmanager
    def using(self, method: str) -> Iterator[None]:
        before, self.config = self.config, replace(self.config, sampler=method)
        try:
            yield
        finally:
            self.config = before

    def timesteps(self, steps: int | Sequence[int]) -> list[int]:
        return sampling_timesteps(self.config.sampler, steps, self.model.flow_shift)

    def guide(self, rows: Tensor) -> Tensor:
        if self.config.guidance_scale == 1:
            return rows
        return guide(rows, self.config.guidance_scale, self.config.guidance_channels)

    def follow(self, outputs: Tensor, steps: int) -> list[Tensor]:
        count, states = outputs.shape[1], []
        x = torch.zeros(count, 1, 1, 1, dtype=torch.float64)
        alike = [torch.Generator().manual_seed(0) for _ in range(count)]

        def model(x: Tensor, t: Tensor, i: int) -> Tensor:
            noise = outputs[i].to(x)[:, None, None, None]
            return torch.cat([noise, torch.zeros_like(noise)], dim=1)  # and the variance

        _loop(
            self.config.sampler,
            steps,
            self.model.flow_shift,
            model,
            x,
            alike,
            lambda i, x, x0: states.append(x.flatten()),
        )
        return states

    def refined(self, steps: int, factor: int) -> int | list[int] | None:
        if self.config.sampler == "ddpm":
            return None
        if _is_solved(self.config.sampler, self.model.flow_shift):
            return steps * factor if steps * factor < 1000 else None
        own = self.timesteps(steps)
        between = [round(a + (b - a) * n / factor) for a, b in pairwise(own) for n in range(factor)]
        return sorted({*between, own[-1]}, reverse=True)

    def identity(self) -> dict[str, Any]:
        return {"flow_shift": self.model.flow_shift}

    def latents(
        self, indices: list[int], steps: int, policy: CachePolicy, on_step: Callable[[int, str], None] | None = None
    ) -> tuple[Tensor, SkipCache]:
        cache = SkipCache(policy, self.timesteps(steps))
        latents = generate(
            self.model,
            labels_of(self.config, self.model, indices),
            generators(self.config.seed, indices, self.model.device),
            **generate_settings(self.config) | {"steps": steps},
            cache=cache,
            callback=None if on_step is None else lambda i, x, x0: on_step(i, cache.kind(i)),
            progress=process_state().is_main_process,
        )
        return latents, cache
