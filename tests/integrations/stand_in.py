"""A stand-in for what a custom node meets in ComfyUI, which no package registry has.

Names, arguments, and who calls whom in which order are those of ComfyUI: `WrappersMP` and `WrapperExecutor` of
comfy/patcher_extension.py (commit 06ce62d), `ModelPatcher` of comfy/model_patcher.py (08d0e51), `BaseModel` of
comfy/model_base.py (094c74c), `CFGGuider` and `calc_cond_batch` of comfy/samplers.py (311c014), parametrizations and
schedules of comfy/model_sampling.py (2fd2083). The code is not ComfyUI's. Devices, memory, areas, masks and hooks are
left out.
"""

import copy
import itertools
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Options = dict[str, Any]


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    APPLY_MODEL = "apply_model"


class WrapperExecutor:
    """A function and the wrappers around it; a wrapper gets the executor, and calls it for what is inside."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self.original(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)


def wrappers_of(kind: str, transformer_options: Options) -> list[Callable]:
    by_key = transformer_options.get("wrappers", {}).get(kind, {})
    return [wrapper for wrappers in by_key.values() for wrapper in wrappers]


def install() -> None:
    """Make it `comfy`."""
    extension = types.ModuleType("comfy.patcher_extension")
    extension.WrappersMP = WrappersMP
    comfy = types.ModuleType("comfy")
    comfy.patcher_extension = extension
    sys.modules |= {"comfy": comfy, "comfy.patcher_extension": extension}


def per_sample(sigma: Tensor, ndim: int) -> Tensor:
    return sigma.view(sigma.shape[:1] + (1,) * (ndim - 1))


class Flow(nn.Module):
    """Flow matching: `CONST` with `ModelSamplingDiscreteFlow`, or as `ModelSamplingFlux` with another multiplier."""

    def __init__(self, shift: float = 1.0, multiplier: float = 1000, size: int = 1000):
        super().__init__()
        t = torch.arange(1, size + 1) / size
        self.multiplier = multiplier
        self.register_buffer("sigmas", shift * t / (1 + (shift - 1) * t))

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - model_output * per_sample(sigma, model_input.ndim)


class Noise(nn.Module):
    """A model of the noise on a thousand timesteps: `EPS` with `ModelSamplingDiscrete`."""

    def __init__(self):
        super().__init__()
        kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
        self.register_buffer("sigmas", ((1 - kept) / kept).sqrt().float())

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise / (per_sample(sigma, noise.ndim) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - model_output * per_sample(sigma, model_input.ndim)


class Velocity(Noise):
    """`V_PREDICTION`: the model's output has another factor than the noise has."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        sigma = per_sample(sigma, model_input.ndim)
        return model_input / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5


def simple_scheduler(model_sampling: nn.Module, steps: int) -> Tensor:
    """The sigmas of a run, and zero: every n-th one of the model's table."""
    table = model_sampling.sigmas
    return torch.tensor([float(table[-1 - int(i * len(table) / steps)]) for i in range(steps)] + [0.0])


class BaseModel(nn.Module):
    """A model with its parametrization.

    Attributes:
        calls: the number of chunks of every call of the network.
    """

    def __init__(self, diffusion_model: nn.Module, model_sampling: nn.Module):
        super().__init__()
        self.diffusion_model, self.model_sampling = diffusion_model, model_sampling
        self.calls: list[int] = []

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Options = {},  # noqa: B006 (as in ComfyUI)
        **kwargs: Any,
    ) -> Tensor:
        wrappers = wrappers_of(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        self.calls.append(len(transformer_options["cond_or_uncond"]))
        network_input = self.model_sampling.calculate_input(t, x)
        timestep = self.model_sampling.timestep(t).float()
        output = self.diffusion_model(
            network_input, timestep, context=c_crossattn, transformer_options=transformer_options, **kwargs
        )
        return self.model_sampling.calculate_denoised(t, output.float(), x)


class ModelPatcher:
    """A model, and what was set on it; clones share the model."""

    def __init__(self, model: BaseModel):
        self.model = model
        self.model_options: Options = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}
        self.object_patches: dict[str, Any] = {}

    def clone(self) -> "ModelPatcher":
        other = ModelPatcher(self.model)
        other.model_options = copy.copy(self.model_options)
        other.object_patches = dict(self.object_patches)
        other.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))


def cond(uuids: bool = True, **model_conds: Tensor) -> Options:
    """A conditioning: tensors for the model, by the names of its arguments."""
    return {"model_conds": model_conds} | ({"uuid": uuid.uuid4()} if uuids else {})


class CFGGuider:
    """Guidance of one model.

    Attributes:
        capacity: how many chunks fit into memory at each call of `calc_cond_batch`, in turn.
    """

    def __init__(self, model_patcher: ModelPatcher, positive: list[Options], negative: list[Options], cfg: float):
        self.model_patcher, self.conds, self.cfg = model_patcher, (positive, negative), cfg
        self.model_options = model_patcher.model_options
        self.capacity: Iterator[int] | None = None

    def sample(self, noise: Tensor, sampler: Callable, sigmas: Tensor, callback: Callable | None = None) -> Tensor:
        self.model_options = {"transformer_options": {"wrappers": self.model_patcher.wrappers}}
        wrappers = wrappers_of(WrappersMP.OUTER_SAMPLE, self.model_options["transformer_options"])
        executor = WrapperExecutor(self.outer_sample, self, wrappers)
        return executor.execute(
            noise, torch.zeros_like(noise), sampler, sigmas, None, callback, True, 0, latent_shapes=[noise.shape]
        )

    def outer_sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None, **_
    ) -> Tensor:
        model, own = self.model_patcher.model, {}
        for name, patch in self.model_patcher.object_patches.items():
            own[name] = getattr(model, name)
            setattr(model, name, patch)
        options = copy.deepcopy({k: v for k, v in self.model_options.items() if k != "transformer_options"})
        options["transformer_options"] = self.model_options["transformer_options"] | {"sample_sigmas": sigmas}
        try:
            with torch.no_grad():
                start = noise * sigmas[0]
                return sampler(self, start, sigmas, extra_args={"model_options": options}, callback=callback)
        finally:
            for name, value in own.items():
                setattr(model, name, value)

    def __call__(self, x: Tensor, timestep: Tensor, model_options: Options, seed: int | None = None) -> Tensor:
        positive, negative = self.conds
        conds = [positive, None if self.cfg == 1 else negative]
        capacity = len(positive) + len(negative) if self.capacity is None else next(self.capacity)
        with_prompt, without = calc_cond_batch(self.model_patcher.model, conds, x, timestep, model_options, capacity)
        return without + (with_prompt - without) * self.cfg


def calc_cond_batch(
    model: BaseModel, conds: list[list[Options] | None], x: Tensor, timestep: Tensor, options: Options, capacity: int
) -> list[Tensor]:
    """The mean of what the model returns for each list of conditionings that are active at this timestep."""
    sums, counts = ([torch.zeros_like(x) for _ in conds] for _ in range(2))
    to_run = [(one, i) for i, several in enumerate(conds) for one in several or [] if active(one, timestep)]
    while to_run:
        batch, to_run = to_run[:capacity][::-1], to_run[capacity:]
        names = batch[0][0]["model_conds"]
        c = {
            name: torch.cat([one["model_conds"][name].expand(len(x), *[-1] * (t.ndim - 1)) for one, _ in batch])
            for name, t in names.items()
        }
        c["transformer_options"] = options["transformer_options"] | {
            "cond_or_uncond": [i for _, i in batch],
            "sigmas": timestep,
        }
        if "uuid" in batch[0][0]:
            c["transformer_options"]["uuids"] = [one["uuid"] for one, _ in batch]
        output = model.apply_model(torch.cat([x] * len(batch)), torch.cat([timestep] * len(batch)), **c)
        for chunk, (_, i) in zip(output.chunk(len(batch)), batch, strict=True):
            sums[i] += chunk
            counts[i] += 1
    return [total / count.clamp(min=1e-37) for total, count in zip(sums, counts, strict=True)]


def active(one: Options, timestep: Tensor) -> bool:
    return one.get("timestep_end", 0) <= timestep[0] <= one.get("timestep_start", float("inf"))


def sample_euler(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Callable | None) -> Tensor:
    """Euler's method, as k-diffusion has it: the model returns the denoised latents."""
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback(i, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Callable | None) -> Tensor:
    """Heun's method: two calls a step, the second one at the sigma of the next."""
    ones = x.new_ones(len(x))
    for now, after in itertools.pairwise(sigmas):
        slope = (x - model(x, now * ones, **extra_args)) / now
        if after > 0:
            predicted = x + slope * (after - now)
            slope = (slope + (predicted - model(predicted, after * ones, **extra_args)) / after) / 2
        x = x + slope * (after - now)
    return x


def sample_dpm_2(model: Callable, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Callable | None) -> Tensor:
    """The midpoint method: the second call of a step lies between two sigmas of the run."""
    ones = x.new_ones(len(x))
    for now, after in itertools.pairwise(sigmas):
        slope, middle = (x - model(x, now * ones, **extra_args)) / now, (now * after).sqrt()
        if after > 0:
            half = x + slope * (middle - now)
            slope = (half - model(half, middle * ones, **extra_args)) / middle
        x = x + slope * (after - now)
    return x
