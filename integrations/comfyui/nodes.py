"""The node "Skip-Cache: output forecast".

At a forecast step the model does not run: its output is extrapolated from those of earlier steps, for each
conditioning by itself. What is forecast is the network's own output, noise or velocity, and not the denoised latents
that ComfyUI computes from it, so a spec or a plan means here what it means in a diffusers pipeline.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from skipdit.caching import CachePolicy, CacheStep, SkipCache, parse_policy
from skipdit.caching.policy import CACHED
from skipdit.utils.errors import UserError

KEY = "skipdit"  # of its wrappers
EXAMPLE = "N3-1000-0-b0-o1"


class OutputForecast:
    """The node."""

    CATEGORY = "advanced/model"
    DESCRIPTION = "Runs the model at some sampling steps only, and extrapolates its output at the others."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        cache = f"A spec, such as {EXAMPLE} (every third step runs the model), or the path of a plan: plan.json."
        last = "How many steps at the end run the model, whatever the spec or the plan says."
        return {
            "required": {
                "model": ("MODEL",),
                "cache": ("STRING", {"default": EXAMPLE, "tooltip": cache}),
                "last_full": ("INT", {"default": 1, "min": 0, "max": 10000, "tooltip": last}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, cache: str | None) -> bool | str:
        """Return True, or what is wrong. None comes from another node and is not known yet."""
        try:
            return bool(forecasting_policy(cache))
        except (UserError, FileNotFoundError) as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, cache: str | None, **others: Any) -> str:
        """Return another text for another policy: the file of a plan may change."""
        return str(parse_policy(cache))

    def patch(self, model: Any, cache: str, last_full: int) -> tuple[Any]:
        """Return a clone of the model with the cache."""
        forecasts, model = Forecasts(forecasting_policy(cache), last_full), model.clone()
        wrappers = {WrappersMP.OUTER_SAMPLE: forecasts.outer_sample, WrappersMP.APPLY_MODEL: forecasts.apply_model}
        for kind, wrapper in wrappers.items():
            model.remove_wrappers_with_key(kind, KEY)  # those of such a node before this one
            model.add_wrapper_with_key(kind, KEY, wrapper)
        return (model,)


def forecasting_policy(cache: str | None) -> CachePolicy:
    """Return the policy of a spec or a plan's file. Raises UserError for one that has cached steps."""
    policy = parse_policy(cache)
    if policy.caches and policy.branch and CACHED in getattr(policy, "kinds", CACHED):
        raise UserError(
            f"cache {cache} has cached steps, which run some of the model's blocks, and in ComfyUI all of them run or "
            f"none: write {EXAMPLE}, or give a plan of forecasts"
        )
    return policy


class Forecasts:
    """What the wrappers of a patched model share.

    Attributes:
        run: the sampling run that is under way; None between runs, when the model computes without a cache.
    """

    def __init__(self, policy: CachePolicy, last_full: int):
        self.policy, self.last_full = policy, last_full
        self.run: Run | None = None

    def outer_sample(self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs):
        """Sample, in a run of its own, which ends however the sampling ends."""
        outer, sampling = self.run, executor.class_obj.model_patcher.get_model_object("model_sampling")
        self.run = Run(self.policy, sigmas[:-1], sampling, self.last_full) if len(sigmas) > 1 else None
        try:
            result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            if self.run is not None:
                logging.info(f"Skip-Cache {self.policy}: {self.run.summary()}")
            return result
        finally:
            self.run = outer

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ) -> Tensor:
        """Return the denoised latents: of the model, or of the forecasts of its output."""
        steps = [] if self.run is None else self.run.steps(x, float(t[0]), transformer_options)
        forecast = bool(steps) and all(step.forecast is not None for step in steps)
        if not forecast:
            result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        if not steps:
            return result
        self.run.ran[self.run.step] |= not forecast
        results = [None] * len(steps) if forecast else result.chunk(len(steps))
        formula = executor.class_obj.model_sampling.calculate_denoised
        chunks = zip(steps, results, x.chunk(len(steps)), t.chunk(len(steps)), strict=True)
        return torch.cat([denoised_by(*chunk, formula) for chunk in chunks])


def denoised_by(step: CacheStep, denoised: Tensor | None, x: Tensor, sigma: Tensor, formula: Callable) -> Tensor:
    """Return the denoised latents of a conditioning, given those of the model if it ran.

    They are linear in the network's output, so two more calls of ComfyUI's own formula give that back.
    """
    if step.forecast is not None:
        return formula(sigma, step.forecast, x)
    none = torch.zeros_like(x)
    output = (denoised - formula(sigma, none, x)) / formula(sigma, torch.ones_like(x), none)
    used = step.finish(output)
    return denoised if used is output else formula(sigma, used, x)


class Run:
    """One sampling run: a `SkipCache` for every conditioning and size of the latents.

    Args:
        sigmas: of the run's steps.
        sampling: the model's `model_sampling`.
        last_full: how many steps at the end run the model.

    Attributes:
        step: the newest step.
        ran: per step, whether the model ran.
        between: how often it ran at other sigmas than those of the steps.

    Raises UserError for a plan that is for other steps.
    """

    def __init__(self, policy: CachePolicy, sigmas: Tensor, sampling: Any, last_full: int):
        self._policy, self._sigmas = policy, sigmas.float().tolist()
        self._timesteps = timesteps_of(policy, sigmas.float().cpu(), sampling.sigmas.float().cpu())
        policy.step_kinds(self._timesteps)
        self.step, self.ran, self.between = 0, [False] * len(self._sigmas), 0
        self._end = len(self._sigmas) - last_full
        self._caches: dict[Hashable, SkipCache] = {}
        self._calls: Counter[Hashable] = Counter()  # of this step

    def steps(self, x: Tensor, sigma: float, options: dict[str, Any]) -> list[CacheStep]:
        """Return the step of every conditioning in a call of the model; none if it runs without a cache."""
        places = [i for i, own in enumerate(self._sigmas) if math.isclose(own, sigma, rel_tol=1e-5)]
        if not places:  # samplers of higher order call between the steps
            self.between += 1
            return []
        step = next((i for i in places if i >= self.step), places[0])
        if step < self.step:  # the sampler went back
            self._caches.clear()
        if step != self.step:
            self.step, self._calls = step, Counter()
        names = options.get("uuids") or options["cond_or_uncond"]
        frames = getattr(options.get("context_window"), "index_list", None)  # of a long video, a part at a time
        steps = [self._cache((name, len(x) // len(names), x.shape[1:], str(frames))).at(step) for name in names]
        if None in steps:  # of a policy that caches nothing
            self.ran[step] = True
            return []
        for each in steps if step >= self._end else ():
            each.forecast = None
        return steps

    def summary(self) -> str:
        """Return a line on the steps of the run."""
        line = f"the model ran at {sum(self.ran)} of {len(self.ran)} steps"
        return line + (f", and {self.between} times between them, as this sampler does" if self.between else "")

    def _cache(self, call: Hashable) -> SkipCache:
        """That of a conditioning, and of its first, second, ... call in this step."""
        self._calls[call] += 1
        name = call, self._calls[call]
        if name not in self._caches:
            self._caches[name] = SkipCache(self._policy, self._timesteps)
        return self._caches[name]


def timesteps_of(policy: CachePolicy, sigmas: Tensor, table: Tensor) -> list[float]:
    """Return timesteps from 1000, which is noise, to 0, as policies have them; a plan's own if rounding alone differs.

    Those of flow matching are a thousand times sigma, as in diffusers. Others are the places in the model's table of
    sigmas, which are the model's own timesteps where it was trained on a thousand.
    """
    nearest = (sigmas.log()[:, None] - table.log()).abs().argmin(dim=1) * (1000 / len(table))
    timesteps = (1000 * sigmas if table[-1] < 1.001 else nearest).tolist()
    own = getattr(policy, "timesteps", ())
    same = len(own) == len(timesteps) and all(abs(a - b) < 0.05 for a, b in zip(own, timesteps, strict=True))
    return list(own) if same else timesteps
