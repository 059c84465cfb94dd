"""Skip-Cache in diffusers pipelines.

    pipe = LattePipeline.from_pretrained(folder, transformer=model)   # one of ours: cached steps, on its long skips
    enable_cache(pipe, "N2-700-50")
    video = pipe("a bicycle").frames
    disable_cache(pipe)

    pipe = FluxPipeline.from_pretrained(folder)   # any other: forecasts of the transformer's output
    enable_cache(pipe, "N3-1000-0-b0-o1")

The pipeline's scheduler tells all that a cache has to know: `set_timesteps` says the timesteps of a run, the first of
them that is used says where it begins (image-to-image begins in the middle), `step` ends a step. A run ends with its
last step, or with the pipeline's call, however that ends. Nothing is counted on the model, and no step waits for the
device.
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from skipdit.caching.policies import parse_policy
from skipdit.caching.policy import NAMES, CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.layers.flops import flop_counter
from skipdit.pipelines.costs import Call, Costs
from skipdit.pipelines.denoiser import Denoiser, denoisers
from skipdit.pipelines.scheduler import follow, unfollow
from skipdit.utils.classes import subclass
from skipdit.utils.provenance import sketch

MAX_CALLS = 4  # of a model within one step: guidance takes one or two


def enable_cache(pipe: DiffusionPipeline, spec: str | CachePolicy) -> "PipelineCache":
    """Let a pipeline cache from its next call on, in place of a cache that its models or scheduler may have.

    Forecast steps (a spec with `-b0`, or a plan of them) work in any pipeline that has a scheduler with a transformer,
    two of them or a UNet. Cached steps run the outer blocks of a transformer: of ours, of diffusers'
    `HunyuanDiT2DModel`, and of others whose blocks diffusers registers for its own caches.

    What our models compute from the text alone is computed once per call then, too. Calls may differ in everything:
    steps, prompts, sizes, guidance, scheduler. Pipelines that share a transformer share its cache; a copy of a pipeline
    has none. To compile the model, write `pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)`.

    Args:
        spec: a policy (see `skipdit.caching.policies`), or the text or file of one; "none" caches nothing but the text.

    Returns:
        The cache; its `summary()` tells about the newest call.

    Raises TypeError for a pipeline that the policy cannot work in, ValueError for a spec that does not fit its model or
    a model compiled in place.
    """
    spec = parse_policy(spec)
    for owner in (*(getattr(part, "_orig_mod", part) for part in denoisers(pipe)), pipe.scheduler):
        if old := owner.__dict__.get("_skip_cache"):
            old.remove()
    disable_cache(pipe)
    cache = PipelineCache(pipe, spec)
    spec.check_pipeline(lambda: sketch(denoisers(pipe)))
    return _put(pipe, cache)


def disable_cache(pipe: DiffusionPipeline) -> None:
    """Undo `enable_cache`; without one, nothing happens."""
    cache = pipe.__dict__.pop("_skip_cache", None)
    if cache is not None:
        cache.remove()
        pipe.__class__ = type(pipe).__mro__[1]


@contextlib.contextmanager
def without_cache(pipe: DiffusionPipeline) -> Iterator[None]:
    """Take the cache out of a pipeline, if it has one, and put it back at the end, in place of any later one."""
    cache = pipe.__dict__.get("_skip_cache")
    disable_cache(pipe)
    try:
        yield
    finally:
        disable_cache(pipe)
        if cache is not None:
            cache.attach(pipe)
            _put(pipe, cache)


def _put(pipe: DiffusionPipeline, cache: "PipelineCache") -> "PipelineCache":
    pipe._skip_cache, pipe.__class__ = cache, _ending_runs(type(pipe))
    return cache


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
    return subclass(kind, copied_as=kind, __call__=__call__)  # a copy has no cache


class PipelineCache:
    """What `enable_cache` puts between a pipeline, its scheduler and its transformer.

    Attributes:
        run: the `SkipCache` of the newest run, for its counts; None before the first. It holds tensors only while the
            run lasts.
        costs: what the model calls of the newest run cost.
    """

    def __init__(self, pipe: DiffusionPipeline, spec: CachePolicy):
        self.run: SkipCache | None = None
        self.costs = Costs()
        self._pipe, self._spec = weakref.ref(pipe), spec
        self._denoisers: list[Denoiser] = []
        self._scheduler: SchedulerMixin | None = None
        self.attach(pipe)

    def __reduce__(self) -> tuple:
        return type(None), ()  # the copy of a pipeline, a scheduler or a model has no cache

    def summary(self) -> str:
        """Return a line on the newest call: steps of each kind, memory of what was stored, time in the model and how
        much cached steps saved, and the FLOPs saved if `counting_flops` counted them. Waits for a GPU.
        """
        if self.run is None:
            return "no call yet"
        kinds = [self.run.kind(i) for i in range(self._made)]  # not those that the call left out, or broke off before
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in NAMES.values() if kind in kinds)
        line = f"{len(kinds)} steps{': ' * bool(counts)}{counts}; {self.run.peak_bytes / 2**20:.1f} MiB stored at most"
        if (saved := self.costs.seconds_saved()) is not None:
            line += f"; {self.costs.seconds():.2f} s in the model, {saved:.2f} s saved"
        if (share := self.costs.flops_saved()) is not None:
            line += f"; {share:.0%} fewer FLOPs"
        return line

    @contextlib.contextmanager
    def counting_flops(self) -> Iterator[None]:
        """Count the FLOPs of the calls within, for `summary`. They take longer, and compiled models run uncompiled."""
        with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
            self.costs.counter = counter
            try:
                yield
            finally:
                self.costs.counter = None

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Hook the pipeline's models, and follow its scheduler."""
        self.end()
        self._attach(pipe)
        self._watch(pipe.scheduler)

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
        self.costs.forget()
        if self.run is not None:
            self.run.clear()

    def _attach(self, pipe: DiffusionPipeline) -> None:
        """Hook the pipeline's models, and no longer those before. Compiled ones are hooked outside of their graphs."""
        parts = denoisers(pipe)
        if len(parts) == len(self._denoisers) and all(a.is_of(b) for a, b in zip(self._denoisers, parts, strict=True)):
            return
        self._detach()
        try:
            for part in parts:
                denoiser = Denoiser(part, self._spec, self.before_model, self.costs.end)
                denoiser.model.__dict__["_skip_cache"] = self
                self._denoisers.append(denoiser)
        except BaseException:  # of the second model, say: the first one is left as it was
            self._detach()
            raise

    def _detach(self) -> None:
        for denoiser in self._denoisers:
            denoiser.remove()
            denoiser.model.__dict__.pop("_skip_cache", None)
        self._denoisers = []

    def _watch(self, scheduler: SchedulerMixin | None) -> None:
        """Follow this scheduler's calls, and no longer those of the one before."""
        self.end()
        if self._scheduler is not None:
            unfollow(self._scheduler)
        self._scheduler = scheduler
        if scheduler is not None:
            follow(scheduler, self)

    def begin(self) -> None:
        """Take the timesteps that the scheduler got. The pipeline may have got another transformer since then."""
        self.end()
        if (pipe := self._pipe()) is not None:
            self._attach(pipe)
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
            self._begin_at(first)
        return self._index(t, self._first + self._step) == self._first + self._step

    def _begin_at(self, first: int) -> None:
        self._first = first
        # The scheduler looks up its tables by them, and would read each one back from the device.
        self._scheduler.timesteps = self._timesteps
        self.run = SkipCache(self._spec, self._timesteps[first:])
        self.costs.calls, self._made = [], 0

    def _follows(self, denoiser: Denoiser, t: Any) -> bool:
        """Whether a call of the model at timestep t, whatever the model calls it, belongs to the run's step."""
        if denoiser.own_timesteps or self._timesteps is None:
            return self.locate(t)
        if self._first is None:  # other models get it scaled or turned round: the scheduler knows the place
            begin = getattr(self._scheduler, "begin_index", None)
            self._begin_at(begin or 0 if begin is not None or self._index(t) is None else self._index(t))
        return True

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
        if not isinstance(t, Tensor):
            return t
        if self.locate(t):
            return self._timesteps[self._first + self._step]
        if self._first is not None and self._index(t) is not None:  # of another step than the model was called for
            self.end()
            warnings.warn(
                "the steps are not those that the cache took them for, so the rest of this call runs without it: a "
                "loop that begins in the middle of the timesteps calls scheduler.set_begin_index first",
                stacklevel=4,
            )
        return t

    def end_step(self) -> None:
        """Count a step of the scheduler."""
        if self._first is None:
            return
        if not self._calls:
            warnings.warn("a step went by without a call of the cached transformer", stacklevel=4)
        self._step, self._made, self._calls = self._step + 1, self._made + 1, []
        if self._step == len(self.run.plan):
            self.end()

    def before_model(self, denoiser: Denoiser, named: dict[str, Any]) -> dict[str, Any]:
        """Give a model its step's cache, and the encoded text in place of the text. Returns the call's arguments."""
        pipe = self._pipe()
        if pipe is not None and pipe.scheduler is not self._scheduler:  # replaced: this is the first step of its run
            self._watch(pipe.scheduler)
            self.begin()
        latents, t = denoiser.latents(named), named.get("timestep")
        call = Call(latents)
        if len(self._calls) == MAX_CALLS or not self._follows(denoiser, t):  # of a run that broke off, or of none
            if len(self._calls) == MAX_CALLS:
                warnings.warn(f"a step has more than {MAX_CALLS} model calls: the run goes on uncached", stacklevel=4)
            if self._first is not None:
                self.end()
            return named
        if isinstance(latents, Tensor) and isinstance(t, Tensor):
            named["timestep"] = t.to(latents.device)  # of a loop that, other than pipelines, leaves it on the CPU
        stream = self._stream(denoiser, tuple(named.get(name) for name in denoiser.texts))
        name = f"{stream.number}.{self._calls.count(stream.number)}"
        self._calls.append(stream.number)
        named["cache"] = self.run.at(self._step, stream=name)
        if denoiser.encodes(stream.texts):
            if stream.encoded is None:
                stream.encoded = denoiser.model.encode_text(*stream.texts)
            named |= dict.fromkeys(denoiser.texts) | {denoiser.texts[0]: stream.encoded}
        call.stream = name
        self.costs.begin(call, named["cache"])
        return named

    def _stream(self, denoiser: Denoiser, texts: tuple) -> "_Stream":
        """The calls of a model with these texts: guidance may run its halves one after the other, and leave one out."""
        for stream in self._streams:
            if stream.denoiser is denoiser and stream.has(texts):
                return stream
        used = max((stream.number for stream in self._streams), default=-1)
        self._streams.append(_Stream(used + 1, denoiser, texts))
        del self._streams[: -MAX_CALLS * len(self._denoisers)]
        return self._streams[-1]


class _Stream:
    """The calls of a run that have the same texts, which are held: another tensor cannot take their place in memory."""

    def __init__(self, number: int, denoiser: Denoiser, texts: tuple):
        self.number, self.denoiser, self.texts, self.encoded = number, denoiser, texts, None

    def has(self, texts: tuple) -> bool:
        """Whether these are its texts: the same memory or, in a loop that makes them anew each step, equal values."""
        return _same(self.texts, texts)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if old is new or not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return old is new
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    return (old.data_ptr(), old.stride()) == (new.data_ptr(), new.stride()) or torch.equal(old, new)
