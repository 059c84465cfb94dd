"""Skip-Cache in diffusers pipelines.

    pipe = LattePipeline.from_pretrained(folder, transformer=model)   # model: one of ours
    enable_cache(pipe, "N2-700-50")
    video = pipe("a bicycle").frames
    disable_cache(pipe)

The pipeline's scheduler tells all that a cache has to know: `set_timesteps` says the timesteps of a run, the first of
them that is used says where it begins (image-to-image begins in the middle), `step` ends a step. A run ends with its
last step, or with the pipeline's call, however that ends. Nothing is counted on the model, and no step waits for the
device.
"""

import functools
import inspect
import types
import warnings
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel, SchedulerMixin
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_map_only

from skipdit.caching.policies import parse_policy
from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.layers.skip import SkipTransformer, check_branch
from skipdit.pipelines import hunyuan2d

MAX_CALLS = 4  # of the model within one step: guidance takes one or two
RECOMPILES = 64  # torch's limit is 8; full and cached steps, guided or not, of clips and single images take more


def enable_cache(pipe: DiffusionPipeline, spec: str | CachePolicy) -> "PipelineCache":
    """Let a pipeline cache from its next call on, in place of a cache that its transformer or scheduler may have.

    What the model computes from the text alone is computed once per call then, too. Calls may differ in everything:
    steps, prompts, sizes, guidance, scheduler. Pipelines that share a transformer share its cache; a copy of a pipeline
    has none. To compile the model, write `pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)`.

    Args:
        pipe: its `transformer` is one of ours, or diffusers' `HunyuanDiT2DModel`.
        spec: a policy (see `skipdit.caching.policies`), or the text or file of one; "none" caches nothing but the text.

    Returns:
        The cache; its `run` has the counts of the newest call.

    Raises TypeError for another transformer, ValueError for a spec that does not fit it or a model compiled in place.
    """
    spec = parse_policy(spec)
    model = _cacheable(pipe.transformer, spec)
    for owner in (model, pipe.scheduler):
        if old := owner.__dict__.get("_skip_cache"):
            old.remove()
    disable_cache(pipe)
    pipe._skip_cache = PipelineCache(pipe, spec)
    pipe.__class__ = _ending_runs(type(pipe))
    return pipe._skip_cache


def disable_cache(pipe: DiffusionPipeline) -> None:
    """Undo `enable_cache`; without one, nothing happens."""
    cache = pipe.__dict__.pop("_skip_cache", None)
    if cache is not None:
        cache.remove()
        pipe.__class__ = type(pipe).__mro__[1]


@functools.cache
def _ending_runs(kind: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass of a pipeline, of the same name, whose calls end the run of its cache, however they end."""

    def __call__(self, *args, **kwargs):
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            if cache := self.__dict__.get("_skip_cache"):
                cache.end()

    functools.update_wrapper(__call__, kind.__call__)
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), named | {"__call__": __call__})


def _cacheable(transformer: nn.Module, spec: CachePolicy) -> nn.Module:
    """A transformer without the wrapper that torch.compile puts around it. Raises as `enable_cache`."""
    model = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(model, SkipTransformer | HunyuanDiT2DModel):
        raise TypeError(
            f"the pipeline's transformer is a {type(model).__name__}, which has no long skips to cache on: load "
            "weights that have some into one of skipdit's models, and pass that as `transformer`"
        )
    if spec.caches and isinstance(model, SkipTransformer):
        check_branch(spec.branch, model.depth, model.n_skips)
    elif spec.caches:
        check_branch(spec.branch, len(model.blocks), hunyuan2d.n_skips(model))
    if spec.adaptive and model is not transformer:
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
        run: the `SkipCache` of the newest run, for its counts; None before the first. It holds tensors only while the
            run lasts.
    """

    def __init__(self, pipe: DiffusionPipeline, spec: CachePolicy):
        self.run: SkipCache | None = None
        self._pipe, self._spec = weakref.ref(pipe), spec
        self._hooks, self._scheduler = [], None
        self.end()
        self._attach(pipe.transformer)
        self._watch(pipe.scheduler)

    def __reduce__(self) -> tuple:
        return type(None), ()  # the copy of a pipeline, a scheduler or a model has no cache

    def remove(self) -> None:
        """Put everything back."""
        self._watch(None)
        self._detach()

    def end(self) -> None:
        """End the run, if there is one: what comes next runs without a cache until the scheduler gets timesteps."""
        self._timesteps: Tensor | None = None  # of the scheduler, on the CPU; None without a run
        self._first: int | None = None  # the first of them that is used; None before that
        self._step, self._calls = 0, []  # the streams of this step's calls so far
        self._streams: list[_Stream] = []
        if self.run is not None:
            self.run.clear()

    def _attach(self, transformer: nn.Module) -> None:
        """Hook this module, and no longer the one before. A compiled one is hooked outside of its graphs."""
        model = _cacheable(transformer, self._spec)
        self._detach()
        if isinstance(model, HunyuanDiT2DModel):
            _replace_forward(model)
        self._hooked, self._model = weakref.ref(transformer), model
        self._arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        self._texts = getattr(model, "text_arguments", ()) or ("encoder_hidden_states", "encoder_hidden_states_t5")
        hook = _Hook(self)
        self._hooks = [transformer.register_forward_pre_hook(hook, with_kwargs=True)]
        if isinstance(transformer, OptimizedModule):
            self._hooks.append(transformer.register_forward_hook(_copied))
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
        model.__dict__["_skip_cache"] = self

    def _detach(self) -> None:
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._model.__dict__.pop("_skip_cache", None)
            if isinstance(self._model, HunyuanDiT2DModel):
                _restore_forward(self._model)

    def _watch(self, scheduler: SchedulerMixin | None) -> None:
        """Follow this scheduler's calls, and no longer those of the one before."""
        self.end()
        if self._scheduler is not None:
            for name in (*_WRAPPED, "_skip_cache"):
                self._scheduler.__dict__.pop(name, None)  # the class's own come back
        self._scheduler = scheduler
        if scheduler is not None:
            scheduler._skip_cache = self
            for name in _WRAPPED:
                setattr(scheduler, name, _Wrapped(scheduler, name, self))

    def begin(self) -> None:
        """Take the timesteps that the scheduler got. The pipeline may have got another transformer since then."""
        self.end()
        pipe = self._pipe()
        if pipe is not None and pipe.transformer is not self._hooked():
            self._attach(pipe.transformer)
        self._timesteps = self._scheduler.timesteps.cpu()
        self._on_device = self._scheduler.timesteps

    def locate(self, t: Any) -> bool:
        """Begin the run if t is the first of its timesteps that is used. Returns whether t is that of its step."""
        if self._timesteps is None:
            return False
        if self._first is None:
            first = self._index(t)
            if first is None:
                return False
            self._first = first
            # The scheduler looks up its tables by them, and would read each one back from the device.
            self._scheduler.timesteps = self._timesteps
            self.run = SkipCache(self._spec, self._timesteps[first:])
        return self._index(t, self._first + self._step) == self._first + self._step

    def _index(self, t: Any, expected: int | None = None) -> int | None:
        """Where t, a number or a tensor with the timestep of every sample, is among the run's timesteps; None if it is
        not there. Nothing is read back from the device: views of the scheduler's tensor say it by their place in
        memory, other tensors on the device are taken for the expected one.
        """
        if isinstance(t, Tensor) and t.device == self._on_device.device and _memory(t) == _memory(self._on_device):
            return t.storage_offset() - self._on_device.storage_offset()
        if isinstance(t, Tensor) and t.device.type != "cpu":
            begin = getattr(self._scheduler, "begin_index", None)  # image-to-image pipelines set it
            return (begin or 0) if expected is None else expected
        value = t.flatten()[0] if isinstance(t, Tensor) else torch.as_tensor(t)
        places = (self._timesteps.to(value.dtype) == value).nonzero().flatten().tolist()  # pipelines may round it
        return expected if expected in places else next(iter(places), None)

    def host_timestep(self, t: Any) -> Any:
        """The timestep of a call of the scheduler, on the CPU if it is this step's."""
        if isinstance(t, Tensor) and self.locate(t):
            return self._timesteps[self._first + self._step]
        return t

    def end_step(self) -> None:
        """Count a step of the scheduler."""
        if self._first is None:
            return
        if not self._calls:
            warnings.warn("a step went by without a call of the cached transformer", stacklevel=4)
        self._step, self._calls = self._step + 1, []
        if self._step == len(self.run.plan):
            self.end()

    def before_model(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give the model its step's cache, and the encoded text in place of the text. Returns the call's arguments."""
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self._scheduler:  # replaced: this is the first step of its run
            self._watch(pipe.scheduler)
            self.begin()
        named = dict(zip(self._arguments, args, strict=False)) | kwargs
        latents, t = named.get("hidden_states"), named.get("timestep")
        if len(self._calls) == MAX_CALLS or not self.locate(t):  # of a run that broke off, or of none
            if self._first is not None:
                self.end()
            return args, kwargs
        if isinstance(latents, Tensor) and isinstance(t, Tensor):
            named["timestep"] = t.to(latents.device)  # of a loop that, other than pipelines, leaves it on the CPU
        stream = self._stream(tuple(named.get(name) for name in self._texts))
        name = f"{stream.number}.{self._calls.count(stream.number)}"
        self._calls.append(stream.number)
        named["cache"] = self.run.at(self._step, stream=name)
        if self._model_reads_encoded(stream.texts):
            if stream.encoded is None:
                stream.encoded = self._model.encode_text(*stream.texts)
            named |= dict.fromkeys(self._texts) | {self._texts[0]: stream.encoded}
        return (), named

    def _stream(self, texts: tuple) -> "_Stream":
        """The calls with these texts: guidance may run its halves one after the other, and leave one of them out."""
        for stream in self._streams:
            if stream.has(texts):
                return stream
        used = max((stream.number for stream in self._streams), default=-1)
        self._streams.append(_Stream(used + 1, texts))
        del self._streams[:-MAX_CALLS]
        return self._streams[-1]

    def _model_reads_encoded(self, texts: tuple) -> bool:
        """Whether the model takes these texts encoded. A module that is offloaded has its weights elsewhere until its
        forward begins: it encodes the text there.
        """
        if not hasattr(self._model, "encode_text") or not isinstance(texts[0], Tensor):
            return False
        return texts[0].device == next(self._model.parameters()).device


class _Stream:
    """The calls of a run that have the same texts, which are held: another tensor cannot take their place in memory."""

    def __init__(self, number: int, texts: tuple):
        self.number, self.texts, self.encoded = number, texts, None

    def has(self, texts: tuple) -> bool:
        """Whether these are its texts: the same memory or, in a loop that makes them anew each step, equal values."""
        return all(_same(old, new) for old, new in zip(self.texts, texts, strict=True))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _same(old: Any, new: Any) -> bool:
    if old is new or not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return old is new
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    return (old.data_ptr(), old.stride()) == (new.data_ptr(), new.stride()) or torch.equal(old, new)


class _Hook:
    """The forward pre-hook of a transformer; that of a copied one does nothing."""

    def __init__(self, cache: PipelineCache | None):
        self.cache = cache

    def __reduce__(self) -> tuple:
        return _Hook, (None,)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.cache is None:
            return args, kwargs
        if torch.compiler.is_compiling():
            raise RuntimeError("assign the compiled transformer to pipe.transformer before calling the pipeline")
        torch.compiler.cudagraph_mark_step_begin()
        return self.cache.before_model(args, kwargs)


def _copied(module: nn.Module, args: tuple, output: Any) -> Any:
    """What a compiled transformer returns, in memory of its own: that of a CUDA graph is written again by the next
    call, while guidance in two calls and multistep schedulers still need it.
    """
    return tree_map_only(Tensor, Tensor.clone, output)


_WRAPPED = ("set_timesteps", "scale_model_input", "step")  # methods of a scheduler


class _Wrapped:
    """A method of a scheduler that a cache follows. Its signature stays: pipelines look at it."""

    def __init__(self, scheduler: SchedulerMixin, name: str, cache: PipelineCache):
        self._scheduler, self._name, self._cache = weakref.ref(scheduler), name, cache
        self.__wrapped__ = getattr(scheduler, name)
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        if self._name == "set_timesteps":
            result = self.__wrapped__(*args, **kwargs)
            self._cache.begin()
            return result
        if "timestep" in kwargs:
            kwargs["timestep"] = self._cache.host_timestep(kwargs["timestep"])
        elif len(args) > 1:
            args = (args[0], self._cache.host_timestep(args[1]), *args[2:])
        result = self.__wrapped__(*args, **kwargs)
        if self._name == "step":
            self._cache.end_step()
        return result

    def __reduce__(self) -> tuple:
        return getattr, (self._scheduler(), self._name)  # of the copied scheduler, whose attributes are not there yet
