"""Skip-Cache in diffusers pipelines.

    pipe = LattePipeline.from_pretrained(folder, transformer=model)   # model: one of ours
    enable_cache(pipe, "N2-700-50")
    video = pipe("a bicycle").frames
    disable_cache(pipe)

The pipeline's scheduler tells all that a cache has to know: `set_timesteps` begins a run and says its timesteps, `step`
ends a step. So nothing is counted on the model, and nothing is read back from the device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from skipdit.cache import CacheSpec, SkipCache
from skipdit.skip import SkipTransformer


def enable_cache(pipe: DiffusionPipeline, spec: str | CacheSpec) -> "PipelineCache":
    """Let a pipeline cache from its next call on, in place of a cache that it may have.

    What the model computes from the text alone is computed once per call then, too. Calls may differ in everything:
    steps, prompts, sizes, guidance, scheduler. To compile the model, do it before, and with
    `pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)`.

    Args:
        pipe: its `transformer` is one of ours.
        spec: `CacheSpec` or its text; "none" caches nothing but the text.

    Returns:
        The cache; its `run` has the counts of the newest call.

    Raises TypeError for another transformer, ValueError for a spec that does not fit it or a model compiled in place.
    """
    disable_cache(pipe)
    pipe._skip_cache = PipelineCache(pipe, CacheSpec.parse(spec))
    return pipe._skip_cache


def disable_cache(pipe: DiffusionPipeline) -> None:
    """Undo `enable_cache`; without one, nothing happens."""
    cache = pipe.__dict__.pop("_skip_cache", None)
    if cache is not None:
        cache.remove()


class PipelineCache:
    """What `enable_cache` puts between a pipeline, its scheduler and its transformer.

    Attributes:
        run: the `SkipCache` of the newest call, for its counts; None before the first. It holds tensors only while the
            call lasts.
    """

    def __init__(self, pipe: DiffusionPipeline, spec: CacheSpec):
        model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)  # of torch.compile
        if not isinstance(model, SkipTransformer):
            raise TypeError(
                f"the pipeline's transformer is a {type(model).__name__}, which has no long skips to cache on: load "
                "weights that have some into one of skipdit's models, and pass that as `transformer`"
            )
        if spec.interval > 1 and spec.branch > model.n_skips:
            raise ValueError(f"cache branch {spec.branch} is larger than the model's number of skips, {model.n_skips}")
        if model._compiled_call_impl is not None:
            raise ValueError(
                "the transformer is compiled in place, and the cache has to stay outside of its graphs: write "
                "`pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)` instead"
            )
        self.run: SkipCache | None = None
        self._pipe, self._spec, self._model = pipe, spec, model
        self._hook = pipe.transformer.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._scheduler: SchedulerMixin | None = None
        self._watch(pipe.scheduler)

    def remove(self) -> None:
        self._end()
        self._hook.remove()
        self._watch(None)

    def _watch(self, scheduler: SchedulerMixin | None) -> None:
        """Follow this scheduler's calls, and no longer those of the one before."""
        if self._scheduler is not None:
            del self._scheduler.set_timesteps, self._scheduler.step  # the class's own come back
        self._scheduler = scheduler
        self._active = False
        if scheduler is not None:
            scheduler.set_timesteps = _then(scheduler.set_timesteps, self._begin)
            scheduler.step = _then(scheduler.step, self._after_step)

    def _begin(self) -> None:
        self._end()
        self.run = SkipCache(self._spec, self._scheduler.timesteps)
        self._active, self._step, self._calls = True, 0, 0
        self._texts: dict[int, tuple[tuple, Any]] = {}  # call of a step -> its text, and that encoded

    def _after_step(self) -> None:
        self._step, self._calls = self._step + 1, 0
        if self._active and self._step == len(self.run.plan):
            self._end()

    def _end(self) -> None:
        self._active, self._texts = False, {}
        if self.run is not None:
            self.run.clear()

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give the model its step's cache, and the encoded text in place of the text."""
        if torch.compiler.is_compiling():
            raise RuntimeError("compile the transformer before enable_cache, not after it")
        if self._pipe.scheduler is not self._scheduler:  # replaced since, and about to take the first step of a run
            self._watch(self._pipe.scheduler)
            self._begin()
        if not self._active:
            return None
        call, self._calls = self._calls, self._calls + 1  # guidance may run its two halves one after the other
        kwargs["cache"] = self.run.at(self._step, stream=str(call))
        names = self._model.text_arguments
        texts = tuple(kwargs.get(name) for name in names)
        # A module that is offloaded has its weights elsewhere until its forward begins: it encodes the text there.
        if texts and isinstance(texts[0], Tensor) and texts[0].device == self._model.device:
            known, encoded = self._texts.get(call, ((), None))
            if len(known) != len(texts) or any(old is not new for old, new in zip(known, texts, strict=True)):
                encoded = self._model.encode_text(*texts)
                self._texts[call] = texts, encoded
            kwargs |= dict.fromkeys(names) | {names[0]: encoded}
        return args, kwargs


def _then(method: Callable, after: Callable[[], None]) -> Callable:
    """A method, and a call after it. Its signature stays: pipelines look at those of their scheduler."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        result = method(*args, **kwargs)
        after()
        return result

    return wrapped
