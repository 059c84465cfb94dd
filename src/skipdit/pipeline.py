"""Skip-Cache in diffusers pipelines.

    pipe = LattePipeline.from_pretrained(folder, transformer=model)   # model: one of ours
    enable_cache(pipe, "N2-700-50")
    video = pipe("a bicycle").frames
    disable_cache(pipe)

The pipeline's scheduler tells all that a cache has to know: `set_timesteps` begins a run and says its timesteps, `step`
ends a step. So nothing is counted on the model, and nothing is read back from the device.
"""

import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel, SchedulerMixin
from torch import Tensor, nn

from skipdit import hunyuan2d
from skipdit.cache import CacheSpec, DriftSpec, Policy, SkipCache
from skipdit.skip import SkipTransformer

MAX_CALLS = 4  # of the model within one step: guidance takes one or two


def enable_cache(pipe: DiffusionPipeline, spec: str | Policy) -> "PipelineCache":
    """Let a pipeline cache from its next call on, in place of a cache that its transformer or scheduler may have.

    What the model computes from the text alone is computed once per call then, too. Calls may differ in everything:
    steps, prompts, sizes, guidance, scheduler. Pipelines that share a transformer share its cache; a copy of a pipeline
    has none. To compile the model, write `pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)`.

    Args:
        pipe: its `transformer` is one of ours, or diffusers' `HunyuanDiT2DModel`.
        spec: a policy (see `skipdit.cache`), or the text or file of one; "none" caches nothing but the text.

    Returns:
        The cache; its `run` has the counts of the newest call.

    Raises TypeError for another transformer, ValueError for a spec that does not fit it or a model compiled in place.
    """
    spec = CacheSpec.parse(spec)
    model = _cacheable(pipe.transformer, spec)
    for owner in (model, pipe.scheduler):
        if old := owner.__dict__.get("_skip_cache"):
            old.remove()
    disable_cache(pipe)
    pipe._skip_cache = PipelineCache(pipe, spec)
    return pipe._skip_cache


def disable_cache(pipe: DiffusionPipeline) -> None:
    """Undo `enable_cache`; without one, nothing happens."""
    cache = pipe.__dict__.pop("_skip_cache", None)
    if cache is not None:
        cache.remove()


def _cacheable(transformer: nn.Module, spec: Policy) -> nn.Module:
    """A transformer without the wrapper that torch.compile puts around it. Raises as `enable_cache`."""
    model = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(model, SkipTransformer | HunyuanDiT2DModel):
        raise TypeError(
            f"the pipeline's transformer is a {type(model).__name__}, which has no long skips to cache on: load "
            "weights that have some into one of skipdit's models, and pass that as `transformer`"
        )
    n_skips = model.n_skips if isinstance(model, SkipTransformer) else hunyuan2d.n_skips(model)
    if spec.caches and spec.branch > n_skips:
        raise ValueError(f"cache branch {spec.branch} is larger than the model's number of skips, {n_skips}")
    if isinstance(spec, DriftSpec) and model is not transformer:
        raise ValueError(f"cache {spec} decides within the transformer, which cannot be compiled then")
    if model._compiled_call_impl is not None:
        raise ValueError(
            "the transformer is compiled in place, and the cache has to stay outside of its graphs: write "
            "`pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)` instead"
        )
    return model


def _replace_forward(model: HunyuanDiT2DModel) -> None:
    """Let diffusers' model compute with a cache. Raises ValueError if its `forward` is wrapped in an unknown way."""
    if "_cached_forward" in model.__dict__:  # since before somebody wrapped it
        return
    slot = "_old_forward" if "_old_forward" in model.__dict__ else "forward"  # accelerate's offloading calls that
    if slot == "forward" and slot in model.__dict__:
        raise ValueError(
            "the transformer's forward is wrapped, by group offloading perhaps: call enable_cache before that"
        )
    model.__dict__[slot] = model.__dict__["_cached_forward"] = types.MethodType(hunyuan2d.cached_forward, model)


def _restore_forward(model: HunyuanDiT2DModel) -> None:
    """Undo `_replace_forward`. What has been wrapped since stays: without a cache it computes the same."""
    if model.__dict__.get("_old_forward") is model._cached_forward:
        model._old_forward = types.MethodType(type(model).forward, model)
    elif model.__dict__.get("forward") is model._cached_forward:
        del model.__dict__["forward"]  # the class's own comes back
    else:
        return
    del model.__dict__["_cached_forward"]


class PipelineCache:
    """What `enable_cache` puts between a pipeline, its scheduler and its transformer.

    Attributes:
        run: the `SkipCache` of the newest call, for its counts; None before the first. It holds tensors only while the
            call lasts; one that broke off leaves its own to the next.
    """

    def __init__(self, pipe: DiffusionPipeline, spec: Policy):
        self.run: SkipCache | None = None
        self._pipe, self._spec = weakref.ref(pipe), spec
        self._hook, self._scheduler, self._active = None, None, False
        self._attach(pipe.transformer)
        self._watch(pipe.scheduler)

    def __deepcopy__(self, memo: dict) -> None:
        return None  # the copy of a pipeline, a scheduler or a model has no cache

    def remove(self) -> None:
        """Put everything back."""
        self._end()
        self._watch(None)
        self._detach()

    def _attach(self, transformer: nn.Module) -> None:
        """Hook this module, and no longer the one before. A compiled one is hooked outside of its graphs."""
        model = _cacheable(transformer, self._spec)
        self._detach()
        if isinstance(model, HunyuanDiT2DModel):
            _replace_forward(model)
        self._hooked, self._model = weakref.ref(transformer), model
        self._hook = transformer.register_forward_pre_hook(_Hook(self), with_kwargs=True)
        model.__dict__["_skip_cache"] = self

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._model.__dict__.pop("_skip_cache", None)
            if isinstance(self._model, HunyuanDiT2DModel):
                _restore_forward(self._model)

    def _watch(self, scheduler: SchedulerMixin | None) -> None:
        """Follow this scheduler's calls, and no longer those of the one before."""
        if self._scheduler is not None:
            for name in ("set_timesteps", "step", "_skip_cache"):
                self._scheduler.__dict__.pop(name, None)  # the class's own come back
        self._scheduler, self._active = scheduler, False
        if scheduler is not None:
            scheduler._skip_cache = self
            scheduler.set_timesteps = _Then(scheduler, "set_timesteps", self._begin)
            scheduler.step = _Then(scheduler, "step", self._after_step)

    def _begin(self, unread: bool = True) -> None:
        """A run begins. The pipeline may have got another transformer since the last, or a compiled one.

        Args:
            unread: whether the pipeline has yet to read the timesteps.
        """
        self._end()
        pipe = self._pipe()
        if pipe is not None and pipe.transformer is not self._hooked():
            self._attach(pipe.transformer)
        # On the CPU: schedulers look up their tables by them, and would read every timestep back from the device.
        if unread:
            self._scheduler.timesteps = self._scheduler.timesteps.cpu()
        self.run = SkipCache(self._spec, self._scheduler.timesteps)
        self._active, self._step, self._calls = True, 0, 0
        self._texts: dict[int, tuple[tuple, Any]] = {}  # call of a step -> its text, and that encoded

    def _after_step(self) -> None:
        if not self._active:
            return
        if self._calls == 0:
            warnings.warn("a step went by without a call of the cached transformer", stacklevel=4)
        self._step, self._calls = self._step + 1, 0
        if self._step == len(self.run.plan):
            self._end()

    def _end(self) -> None:
        self._active, self._texts = False, {}
        if self.run is not None:
            self.run.clear()

    def before_model(self, kwargs: dict) -> None:
        """Give the model its step's cache, and the encoded text in place of the text."""
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self._scheduler:  # replaced: this is the first step of its run
            self._watch(pipe.scheduler)
            self._begin(unread=False)
        if self._active and self._calls == MAX_CALLS:  # a run that broke off, and the model is used by itself
            self._end()
        if not self._active:
            return
        latents, t = kwargs.get("hidden_states"), kwargs.get("timestep")
        if isinstance(latents, Tensor) and isinstance(t, Tensor):
            kwargs["timestep"] = t.to(latents.device)  # of a loop that, other than pipelines, leaves it on the CPU
        call, self._calls = self._calls, self._calls + 1  # guidance may run its two halves one after the other
        kwargs["cache"] = self.run.at(self._step, stream=str(call))
        names = getattr(self._model, "text_arguments", ())
        texts = tuple(kwargs.get(name) for name in names)
        # A module that is offloaded has its weights elsewhere until its forward begins: it encodes the text there.
        if texts and isinstance(texts[0], Tensor) and texts[0].device == next(self._model.parameters()).device:
            known, encoded = self._texts.get(call, ((), None))
            if len(known) != len(texts) or any(old is not new for old, new in zip(known, texts, strict=True)):
                encoded = self._model.encode_text(*texts)
                self._texts[call] = texts, encoded
            kwargs |= dict.fromkeys(names) | {names[0]: encoded}


class _Hook:
    """The forward pre-hook of a transformer; that of a copied one does nothing."""

    def __init__(self, cache: PipelineCache | None):
        self.cache = cache

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.cache is not None:
            if torch.compiler.is_compiling():
                raise RuntimeError("assign the compiled transformer to pipe.transformer before calling the pipeline")
            self.cache.before_model(kwargs)
        return args, kwargs


class _Then:
    """A method of a scheduler, and a call after it. Its signature stays: pipelines look at it."""

    def __init__(self, scheduler: SchedulerMixin, name: str, after: Callable[[], None]):
        self._scheduler, self._name, self._after = weakref.ref(scheduler), name, after
        self.__wrapped__ = getattr(scheduler, name)
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        result = self.__wrapped__(*args, **kwargs)
        self._after()
        return result

    def __deepcopy__(self, memo: dict) -> types.MethodType:
        """The copied scheduler's own method: its `copy.deepcopy` has made the new object before its attributes."""
        copied = memo[id(self._scheduler())]
        return types.MethodType(getattr(type(copied), self._name), copied)
