"""`enable_cache` in pipelines of diffusers with models that are not ours: forecasts in all, cached steps in many."""

import copy
import functools
import inspect
import pickle
import re

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import ROOT
from diffusers import DiffusionPipeline
from peft import LoraConfig
from pipelines.tiny import BUILDERS, Arguments, build
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from skipdit import disable_cache, enable_cache
from skipdit.pipelines.blocks import layers_of
from skipdit.pipelines.cache import PipelineCache
from skipdit.pipelines.denoiser import COMPONENTS, denoisers

FORECASTS, CACHED = "N3-1000-0-b0-o1", "N2-1000-0"
TWO_MODELS = "WanPipeline (2.2, two transformers)"  # the second one takes over at the third step, which is full then
EVERY_2ND, EVERY_3RD = [True, False, True, False, True], [True, False, False, True, False]


@pytest.fixture(params=BUILDERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def built(name) -> tuple[DiffusionPipeline, Arguments]:
    return build(name)


@pytest.fixture
def pipe(built) -> DiffusionPipeline:
    return built[0]


@pytest.fixture
def call(built) -> Arguments:
    return built[1]


def run(pipe: DiffusionPipeline, call: Arguments, **changes) -> Tensor:
    torch.manual_seed(1)  # not all that is drawn comes from the generator
    return torch.as_tensor(pipe(**call | changes, generator=torch.Generator().manual_seed(1))[0])


def changed(pipe: DiffusionPipeline, call: Arguments) -> Arguments:
    """The arguments of another call, that differs in steps and, where there is a choice, in size and guidance."""
    choices = inspect.signature(type(pipe).__call__).parameters
    guidance = "true_cfg_scale" if "true_cfg_scale" in choices else "guidance_scale"
    size = {"width": 2 * call["width"]} if "width" in call else {}
    return call | size | {guidance: 1.0, "num_inference_steps": call["num_inference_steps"] + 2}


def cached_or_none(pipe: DiffusionPipeline, call: Arguments, spec: str = CACHED) -> PipelineCache | None:
    """A cache with cached steps, None where there are only forecasts. That is said then, at the latest in a call."""
    try:
        cache = enable_cache(pipe, spec)
        run(pipe, call)
    except (TypeError, ValueError) as error:
        assert "only forecasts work, as in N3-1000-0-b0-o1" in str(error)
        disable_cache(pipe)
        return None
    return cache


class Counter:
    """How often modules without submodules run in each step, as long as the scheduler's `step` ends them."""

    def __init__(self, pipe: DiffusionPipeline, monkeypatch):
        self.calls = [0]
        kind = type(pipe.scheduler)
        original = kind.step

        @functools.wraps(original)
        def step(*args, **kwargs):
            self.calls.append(0)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "step", step)

    def follow(self, modules: list[nn.Module]) -> None:
        for leaf in (part for module in modules for part in module.modules() if not list(part.children())):
            leaf.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple) -> None:
        self.calls[-1] += 1

    @property
    def ran(self) -> list[bool]:
        return [count > 0 for count in self.calls[:-1]]


@pytest.mark.slow
def test_interval_1_is_uncached_to_the_bit(pipe, call):
    expected = run(pipe, call)
    enable_cache(pipe, "N1-1000-0-b0")
    assert torch.equal(run(pipe, call), expected)
    if cached_or_none(pipe, call, "N1-1000-0"):
        assert torch.equal(run(pipe, call), expected)


def test_forecast_steps_run_nothing(name, pipe, call, monkeypatch):
    expected = run(pipe, call)
    counter = Counter(pipe, monkeypatch)
    counter.follow(denoisers(pipe))
    cache = enable_cache(pipe, FORECASTS)
    result = run(pipe, call)
    full = [True, False, True, True, False] if name == TWO_MODELS else EVERY_3RD
    assert counter.ran == cache.run.ran == full
    assert cache.run.counts() == {"full": sum(full), "cached": 0, "forecast": 5 - sum(full)}
    assert result.isfinite().all() and not torch.equal(result, expected)


@pytest.mark.slow
def test_cached_steps_run_the_outer_blocks(pipe, call, monkeypatch):
    expected = run(pipe, call)
    if not cached_or_none(pipe, call):
        pytest.skip("its blocks are not known")
    disable_cache(pipe)
    stacks = [layers_of(model) for model in denoisers(pipe)]
    outer, inner = Counter(pipe, monkeypatch), Counter(pipe, monkeypatch)
    for layers in stacks:
        outer.follow([*layers[0], *layers[-1]])
        inner.follow([block for layer in layers[1:-1] for block in layer])
    cache = enable_cache(pipe, CACHED)
    result = run(pipe, call)
    assert outer.ran == [True] * 5
    assert inner.ran == cache.run.ran == EVERY_2ND
    assert cache.run.counts() == {"full": 3, "cached": 2, "forecast": 0}
    assert result.isfinite().all() and not torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [FORECASTS, CACHED])
def test_calls_do_not_see_each_other(name, pipe, call, spec):
    if not cached_or_none(pipe, call, spec):
        pytest.skip("its blocks are not known")
    other = changed(pipe, call)
    first, second = run(pipe, call), run(pipe, other)
    assert torch.equal(run(pipe, call), first)
    fresh = build(name)[0]
    enable_cache(fresh, spec)
    assert torch.equal(run(fresh, other), second)


@pytest.mark.slow
def test_compiled_models(name):
    """By torch's own tracer, without its code generation: with cached steps where there are some. Pipelines that begin
    with an image call the same models in the same way as those that begin with noise.
    """
    if re.search("Img2Img|Inpaint", name):
        pytest.skip("as the pipeline of text alone")
    pipe, call = build(name)
    if name == "FluxPipeline" or not cached_or_none(pipe, call):
        enable_cache(pipe, FORECASTS)
    expected = run(pipe, call)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    for part in COMPONENTS:
        if isinstance(model := getattr(pipe, part, None), nn.Module):
            setattr(pipe, part, torch.compile(model, backend=backend))
    torch.testing.assert_close(run(pipe, call), expected)
    assert backend.frame_count > 0
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("offload", [cpu_offload_with_hook, cpu_offload], ids=["model", "sequential"])
def test_offloaded_models(pipe, call, offload):
    """With the hooks that diffusers' `enable_model_cpu_offload` and `enable_sequential_cpu_offload` put on every model,
    before the cache and after it. Here they go from the CPU to the CPU: diffusers' methods want an accelerator.
    """
    cache = cached_or_none(pipe, call) or enable_cache(pipe, FORECASTS)
    expected, spec = run(pipe, call), FORECASTS if cache.run.forecast_steps else CACHED
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            offload(model, torch.device("cpu"))
    assert torch.equal(run(pipe, call), expected)
    disable_cache(pipe)
    enable_cache(pipe, spec)
    assert torch.equal(run(pipe, call), expected)


@pytest.mark.slow
def test_models_with_an_adapter(pipe, call):
    """Low-rank adapters of random weights, in all attention layers."""
    if not all(hasattr(model, "add_adapter") for model in denoisers(pipe)):
        pytest.skip("diffusers gives it no adapters")
    plain = run(pipe, call)
    for model in denoisers(pipe):
        model.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    uncached = run(pipe, call)
    assert not torch.equal(uncached, plain)
    cache = cached_or_none(pipe, call) or enable_cache(pipe, FORECASTS)
    cached = run(pipe, call)
    assert cache.run.full_steps < 5 and not torch.equal(cached, uncached)
    for model in denoisers(pipe):  # taken out and put in again while the cache is on
        model.disable_adapters()
    without = run(pipe, call)
    for model in denoisers(pipe):
        model.enable_adapters()
    assert torch.equal(run(pipe, call), cached) and not torch.equal(without, cached)


@pytest.mark.slow
def test_saved_with_a_cache(pipe, call, tmp_path):
    """The files know nothing of it: what is loaded computes without, and takes one."""
    uncached = run(pipe, call)
    enable_cache(pipe, FORECASTS)
    cached = run(pipe, call)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run(pipe, call), cached)
    missing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **missing)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded).__qualname__ == type(pipe).__qualname__
    rounding = {"rtol": 1e-3, "atol": 1e-3}  # weights that lie elsewhere in memory add up differently
    torch.testing.assert_close(run(loaded, call), uncached, **rounding)
    enable_cache(loaded, FORECASTS)
    torch.testing.assert_close(run(loaded, call), cached, **rounding)
    assert not torch.allclose(cached, uncached, **rounding)


@pytest.mark.slow
def test_disable_puts_everything_back(pipe, call):
    expected = run(pipe, call)
    cached_or_none(pipe, call)
    enable_cache(pipe, FORECASTS)
    assert not torch.equal(run(pipe, call), expected)
    disable_cache(pipe)
    assert torch.equal(run(pipe, call), expected)
    assert not any("forward" in vars(part) for model in denoisers(pipe) for part in model.modules())
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


@pytest.mark.slow
def test_copies_have_no_cache(pipe, call):
    expected = run(pipe, call)
    enable_cache(pipe, FORECASTS)
    cached = run(pipe, call)
    assert torch.equal(run(copy.deepcopy(pipe), call), expected)
    pickled = pickle.loads(pickle.dumps(pipe))
    torch.testing.assert_close(run(pickled, call), expected)  # weights that lie elsewhere in memory add up differently
    enable_cache(pickled, FORECASTS)
    torch.testing.assert_close(run(pickled, call), cached)
    assert torch.equal(run(pipe, call), cached)


@pytest.mark.slow
def test_a_call_that_breaks_off_leaves_a_good_pipeline(pipe, call):
    enable_cache(pipe, FORECASTS)
    first = run(pipe, call)
    interrupt = Interrupt()
    names = ["callback_on_step_end", "callback"]  # DiTPipeline has neither
    argument = next((name for name in names if name in inspect.signature(type(pipe).__call__).parameters), None)
    hook = None if argument else pipe.transformer.register_forward_hook(lambda *_: interrupt() or None)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, call, **({argument: interrupt} if argument else {}))
    if hook:
        hook.remove()
    assert torch.equal(run(pipe, call), first)


class Interrupt:
    """A callback that interrupts a call at its second step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return {}


@pytest.mark.slow
def test_docs_say_what_works_where():
    page = (ROOT / "docs/pipelines.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)`(.*?) \| (yes|no) \| (yes|no) \|$", page, flags=re.M)
    expected = []
    for name in BUILDERS:
        kind, _, variant = name.partition(" ")
        pipe, call = build(name)
        works = [cached_or_none(pipe, call, spec) is not None for spec in (FORECASTS, CACHED)]
        expected.append((kind, f" {variant}" if variant else "", *("yes" if good else "no" for good in works)))
    assert sorted(rows) == sorted(expected)
