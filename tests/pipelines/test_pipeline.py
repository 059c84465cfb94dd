"""`enable_cache` on diffusers' LattePipeline: right on every call, and nothing left behind."""

import contextlib
import copy
import gc
import itertools
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from conftest import NoReadBack, tiny_latte_t2v
from diffusers import (
    AutoencoderKL,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    HeunDiscreteScheduler,
    LattePipeline,
)
from pipelines.tiny import build
from torch._dynamo.testing import CompileCounterWithBackend

from skipdit import SkipCache, disable_cache, enable_cache
from skipdit.caching.policies import parse_policy
from skipdit.pipelines.scheduler import FollowedMethod

SMALL = {"height": 8, "width": 8, "video_length": 4, "output_type": "latent"}
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture
def pipe(vae_folder) -> LattePipeline:
    return make_pipe(vae_folder)


def make_pipe(vae_folder, **overrides) -> LattePipeline:
    vae = AutoencoderKL.from_pretrained(vae_folder)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    pipe = LattePipeline(None, None, vae, tiny_latte_t2v(**overrides), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=10, seed=0, tokens=6, count=1, guidance=3.0, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    text, null = torch.randn(2, count, tokens, 12, generator=generator)
    return pipe(
        None,
        negative_prompt=None,
        prompt_embeds=text,
        negative_prompt_embeds=null,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        **{**SMALL, **kwargs},
    ).frames


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("spec", ["none", "N1-700-50"])
def test_interval_1_is_uncached_to_the_bit(pipe, spec, guidance):
    expected = run(pipe, guidance=guidance)
    cache = enable_cache(pipe, spec)
    assert torch.equal(run(pipe, guidance=guidance), expected)
    assert (cache.run.full_steps, cache.run.cached_steps) == (10, 0)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["N2-700-50", "N3-800-50-b2-o1"])
def test_cached_run_is_the_plan_written_out(pipe, spec):
    """The pipeline's cached latents are those of a plain loop over the model with a `SkipCache`."""
    generator = torch.Generator().manual_seed(0)
    text = torch.cat(list(torch.randn(2, 1, 6, 12, generator=generator))[::-1])
    x = torch.randn(1, 4, 4, 4, 4, generator=generator)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(10)
    by_hand = SkipCache(spec, scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        noise = pipe.transformer(torch.cat([x, x]), t.expand(2), text, cache=by_hand.at(i)).sample[:, :4]
        uncond, cond = noise.chunk(2)
        x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    cache = enable_cache(pipe, spec)
    assert torch.equal(run(pipe), x)
    assert cache.run.ran == by_hand.ran
    assert cache.run.cached_steps > 2


def test_calls_do_not_see_each_other(vae_folder, pipe):
    """A, B, A with other steps, prompts, sizes, counts and guidance: the second A is that of a new process."""
    enable_cache(pipe, "N2-900-50")
    first = run(pipe)
    others = [
        {"steps": 7},
        {"seed": 3, "tokens": 9},
        {"video_length": 1},
        {"height": 16, "width": 24},
        {"count": 2},
        {"guidance": 1.0},
    ]
    for other in others:
        fresh = make_pipe(vae_folder)
        enable_cache(fresh, "N2-900-50")
        assert torch.equal(run(pipe, **other), run(fresh, **other)), other
        assert torch.equal(run(pipe), first), other


@pytest.mark.parametrize("scheduler", [DDPMScheduler, HeunDiscreteScheduler])
def test_scheduler_may_be_replaced(pipe, vae_folder, scheduler):
    cache = enable_cache(pipe, "N2-900-50")
    run(pipe)
    old, pipe.scheduler = pipe.scheduler, scheduler(**SCHEDULE)
    fresh = make_pipe(vae_folder)
    fresh.scheduler = scheduler(**SCHEDULE)
    uncached = run(fresh)
    enable_cache(fresh, "N2-900-50")
    cached = run(fresh)
    assert torch.equal(run(pipe), cached)
    assert torch.equal(run(pipe), cached)  # its first call had no set_timesteps to listen to, the second has
    assert not torch.equal(cached, uncached)
    assert len(cache.run.plan) == len(pipe.scheduler.timesteps)
    assert "step" not in vars(old)


def test_guidance_in_two_calls_is_guidance_in_one(pipe):
    """A pipeline that runs the model twice per step, without and with the text, gets the cached latents of one call."""
    enable_cache(pipe, "N2-900-50")
    batched = run(pipe)

    model, scheduler = pipe.transformer, pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    text, null = torch.randn(2, 1, 6, 12, generator=generator)
    x = torch.randn(1, 4, 4, 4, 4, generator=generator)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            uncond = model(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=null).sample[:, :4]
            cond = model(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=text).sample[:, :4]
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, batched, atol=1e-3, rtol=1e-3)


def test_plan_follows_custom_timesteps(pipe):
    pipe.scheduler = DDPMScheduler(**SCHEDULE)
    cache, timesteps = enable_cache(pipe, "N2-900-50"), [950, 800, 620, 400, 100, 0]
    run(pipe, timesteps=timesteps)
    assert cache.run.timesteps == timesteps
    assert cache.run.ran == parse_policy("N2-900-50").full_mask(timesteps)


def test_text_is_encoded_once_per_call(pipe, monkeypatch):
    calls, encode = [], pipe.transformer.encode_text
    monkeypatch.setattr(pipe.transformer, "encode_text", lambda *args: calls.append(1) or encode(*args))
    enable_cache(pipe, "none")
    run(pipe)
    assert len(calls) == 1
    run(pipe)
    assert len(calls) == 2


def test_prompt_may_change_within_a_call(pipe):
    """A callback that swaps the prompt's embeddings is heard at once."""

    def swap(pipe, i, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if i == 4 else {}

    arguments = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = run(pipe, **arguments)
    enable_cache(pipe, "none")
    assert torch.equal(run(pipe, **arguments), expected)
    assert not torch.equal(run(pipe), expected)


@pytest.mark.slow
def test_nothing_is_left_after_a_call(pipe):
    cache, alive = enable_cache(pipe, "N2-900-50-o1"), []
    text = torch.randn(1, 6, 12)
    gc.collect()
    alive = weakref.ref(text)
    pipe(None, negative_prompt=None, prompt_embeds=text, negative_prompt_embeds=text, num_inference_steps=8, **SMALL)
    assert cache.run.peak_bytes > 0 and not cache.run._features and not cache.run._open
    del text
    gc.collect()
    assert alive() is None


def test_a_call_that_breaks_off_leaves_a_good_pipeline(pipe):
    enable_cache(pipe, "N2-900-50")
    first = run(pipe)

    def stop(pipe, i, t, tensors):
        if i == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=stop)
    assert torch.equal(run(pipe), first)


def test_disable_puts_everything_back(pipe):
    expected = run(pipe)
    enable_cache(pipe, "N2-900-50")
    enable_cache(pipe, "N3-900-50")  # takes the place of the first
    assert not torch.equal(run(pipe), expected)
    disable_cache(pipe)
    disable_cache(pipe)
    assert torch.equal(run(pipe), expected)
    assert not pipe.transformer._forward_pre_hooks
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()


@pytest.mark.slow
def test_compiles_into_two_graphs(pipe):
    enable_cache(pipe, "N2-900-50-o1")
    expected = run(pipe)
    disable_cache(pipe)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    enable_cache(pipe, "N2-900-50-o1")
    torch.testing.assert_close(run(pipe), expected)
    run(pipe, steps=13)
    assert backend.frame_count == 2
    torch._dynamo.reset()


def test_no_step_reads_the_device_back(pipe, monkeypatch):
    """With a scheduler that does not either: DDIM's looks its coefficients up by a timestep on the device."""
    enable_cache(pipe, "N2-900-50-o1")

    def step(noise, t, x, **kwargs):
        return (x - noise / 10,)

    monkeypatch.setattr(type(pipe.scheduler), "step", staticmethod(step))
    enable_cache(pipe, "N2-900-50-o1")
    pipe.scheduler.set_timesteps(10)
    timesteps, x = list(pipe.scheduler.timesteps), torch.randn(1, 4, 4, 4, 4)
    text = torch.randn(1, 6, 12)
    with NoReadBack(), torch.no_grad():
        for t in timesteps:
            noise = pipe.transformer(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=text).sample[:, :4]
            (x,) = pipe.scheduler.step(noise, t, x)
    assert pipe._skip_cache.run.cached_steps > 2


def test_what_cannot_be_cached_is_named(pipe, vae_folder):
    with pytest.raises(ValueError, match="branch 3 is larger than the model's number of skips, 2"):
        enable_cache(pipe, "N2-700-50-b3")
    with pytest.raises(ValueError, match="does not parse"):
        enable_cache(pipe, "often")
    with pytest.warns(UserWarning, match="never engages"):
        enable_cache(pipe, "N2-0-0")
        run(pipe)
    plain = make_pipe(vae_folder, skip=False)
    with pytest.raises(ValueError, match="branch 9 is larger than half of the model's"):
        enable_cache(plain, "N2-700-50-b9")
    plain.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="blocks of Linear are not known"):
        enable_cache(plain, "N2-700-50")
    pipe.transformer.compile()
    with pytest.raises(ValueError, match="compiled in place"):
        enable_cache(pipe, "N2-700-50")


def test_a_second_transformer_that_cannot_be_cached_leaves_the_first_alone():
    two, call = build("WanPipeline (2.2, two transformers)")
    two.transformer_2.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place"):
        enable_cache(two, "N2-1000-0-b0")
    assert not {"_skip_cache", "forward"} & vars(two.transformer).keys()
    assert not two.transformer._forward_pre_hooks and not two.transformer._forward_hooks
    two(**call)


def test_the_timestep_of_a_scheduler_is_found_by_its_name():
    """CogVideoX's has an earlier prediction before it, which must not be taken for a timestep."""
    seen = []
    cache = SimpleNamespace(host_timestep=lambda t: seen.append(t) or t, end_step=lambda: None)
    scheduler = CogVideoXDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(3)
    x, (first, second, _) = torch.zeros(1, 2, 4, 4, 4), scheduler.timesteps
    step = FollowedMethod(scheduler, "step", cache)
    earlier = step(x, None, first, None, x, return_dict=False)[1]
    step(x, earlier, second, first, x, return_dict=False)
    assert seen == [first, second]


@pytest.mark.slow
def test_compiling_afterwards(pipe):
    """The hook moves outside of the graphs with the next call."""
    cache = enable_cache(pipe, "N2-900-50")
    expected, backend = run(pipe), CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(pipe), expected)
    run(pipe, steps=13)
    assert backend.frame_count == 2 and cache.run.cached_steps > 2
    torch._dynamo.reset()


def test_transformer_may_be_replaced(pipe, vae_folder):
    cache = enable_cache(pipe, "N2-900-50")
    run(pipe)
    old, pipe.transformer = pipe.transformer, tiny_latte_t2v(seed=1)
    fresh = make_pipe(vae_folder)
    fresh.transformer = tiny_latte_t2v(seed=1)
    enable_cache(fresh, "N2-900-50")
    assert torch.equal(run(pipe), run(fresh))
    assert cache.run.cached_steps > 2 and not old._forward_pre_hooks
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="blocks of Linear are not known"):
        pipe.scheduler.set_timesteps(3)


def test_pipelines_that_share_their_parts_share_the_cache(pipe):
    uncached = run(pipe)
    enable_cache(pipe, "N2-900-50")
    expected = run(pipe)
    other = LattePipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    enable_cache(other, "N2-900-50")
    assert torch.equal(run(other), expected) and torch.equal(run(pipe), expected)
    disable_cache(pipe)  # whose cache the other's took the place of
    assert torch.equal(run(other), expected)
    disable_cache(other)
    assert torch.equal(run(pipe), uncached) and torch.equal(run(other), uncached)
    assert not pipe.transformer._forward_pre_hooks and "_skip_cache" not in vars(pipe.scheduler)


def test_copies_have_no_cache_and_their_own_parts(pipe):
    uncached = run(pipe)
    enable_cache(pipe, "N2-900-50")
    expected = run(pipe)
    copied, scheduler = copy.deepcopy(pipe), copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(7)
    assert len(scheduler.timesteps) == 7 and len(pipe.scheduler.timesteps) == 10
    assert torch.equal(run(copied), uncached)
    assert torch.equal(run(pipe), expected)


def test_saved_pipelines_load(pipe, tmp_path):
    """With a cache on, too: the files know nothing of it, and the pipeline keeps it."""
    uncached = run(pipe)
    enable_cache(pipe, "N2-900-50")
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    for kind in (LattePipeline, DiffusionPipeline):
        loaded = kind.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is LattePipeline and torch.equal(run(loaded), uncached)
    assert torch.equal(run(pipe), expected) and isinstance(pipe, LattePipeline)


def test_pickled_parts_have_no_cache(pipe):
    uncached = run(pipe)
    enable_cache(pipe, "N2-900-50")
    run(pipe)
    model, scheduler = pickle.loads(pickle.dumps((pipe.transformer, pipe.scheduler)))
    assert "_skip_cache" not in {key for key, value in vars(model).items() if value is not None}
    fresh = LattePipeline(None, None, pipe.vae, model, scheduler)
    fresh.set_progress_bar_config(disable=True)
    assert torch.equal(run(fresh), uncached)


@pytest.mark.slow
def test_compiled_calls_may_differ_in_everything(pipe):
    """More kinds of call than torch compiles a function for by default: 8 full and 8 cached ones."""
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    cache = enable_cache(pipe, "N2-1000-0")
    for tokens, (guidance, frames, count) in enumerate(itertools.product((3.0, 1.0), (4, 1), (1, 2)), 3):
        run(pipe, steps=4, tokens=tokens, guidance=guidance, video_length=frames, count=count)
        assert cache.run.ran == [True, False, True, False]
    torch._dynamo.reset()


@pytest.mark.slow
def test_pipelines_die(vae_folder):
    model, alive = tiny_latte_t2v(), []
    for _ in range(3):
        pipe = make_pipe(vae_folder)
        pipe.transformer = model
        enable_cache(pipe, "N2-900-50")
        run(pipe)
        alive.append(weakref.ref(pipe))
    del pipe
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert len(model._forward_pre_hooks) == 1


class Stop(Exception):
    pass


def breaks(pipe, i, t, tensors):
    """A callback that ends a call before its sixth step, a cached one."""
    if i == 4:
        raise Stop
    return {}


def interrupts(pipe, i, t, tensors):
    pipe._interrupt = i == 4
    return {}


@pytest.mark.parametrize("callback", [breaks, interrupts])
def test_model_by_itself_after_a_call_that_broke_off(pipe, callback):
    """The run ends with the call: at the timestep of its next step, too, the model computes as without a cache."""
    inputs = {"hidden_states": torch.randn(1, 4, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 6, 12)}
    with torch.no_grad():
        expected = [pipe.transformer(**inputs, timestep=torch.tensor([t])).sample for t in (400, 77)]
        cache = enable_cache(pipe, "N2-1000-0")
        with contextlib.suppress(Stop):
            run(pipe, callback_on_step_end=callback)
        assert cache.run.full_steps < 10 and not cache.run._features and not cache._streams
        for t, wanted in zip((400, 77), expected, strict=True):
            assert torch.equal(pipe.transformer(**inputs, timestep=torch.tensor([t])).sample, wanted)


def test_model_by_itself_after_a_loop_that_broke_off(pipe):
    """A loop of one's own has no call that ends; a timestep that is not its next one shows that it has."""
    inputs = {"hidden_states": torch.randn(1, 4, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 6, 12)}
    with torch.no_grad():
        expected = pipe.transformer(**inputs, timestep=torch.tensor([500])).sample
        cache = enable_cache(pipe, "N2-1000-0")
        pipe.scheduler.set_timesteps(10)
        for t in pipe.scheduler.timesteps[:3]:
            noise = pipe.transformer(**inputs, timestep=t.expand(1)).sample[:, :4]
            pipe.scheduler.step(noise, t, inputs["hidden_states"])
        assert torch.equal(pipe.transformer(**inputs, timestep=torch.tensor([500])).sample, expected)
    assert not cache.run._features and not cache.run._open and not cache._streams


@torch.no_grad()
@pytest.mark.parametrize("begin", [0, 9])
@pytest.mark.parametrize("anew", [False, True])
def test_streams_are_told_apart_by_their_text(pipe, begin, anew):
    """Guidance in an interval, its halves one after the other: the conditional half alone, before or after, reads what
    it has stored itself. Loops may make the tensors of their texts anew at every step.
    """
    text, null, start = 5 * torch.randn(1, 6, 12), 5 * torch.randn(1, 6, 12), torch.randn(1, 4, 4, 4, 4)
    model, scheduler = pipe.transformer, pipe.scheduler

    def sample(call):
        x = start
        scheduler.set_timesteps(12)
        for i, t in enumerate(scheduler.timesteps):
            guided = abs(i - begin) < 5
            uncond = call(i, "uncond", x, t, null.clone() if anew else null) if guided else None
            cond = call(i, "cond", x, t, text.clone() if anew else text)
            x = scheduler.step(uncond + 3 * (cond - uncond) if guided else cond, t, x)[0]
        return x

    scheduler.set_timesteps(12)
    by_hand = SkipCache("N2-1000-0", scheduler.timesteps)
    expected = sample(lambda i, who, x, t, y: model(x, t[None], y, cache=by_hand.at(i, who)).sample[:, :4])
    cache = enable_cache(pipe, "N2-1000-0")
    found = sample(lambda i, who, x, t, y: model(x, timestep=t[None], encoder_hidden_states=y).sample[:, :4])
    torch.testing.assert_close(found, expected)
    assert cache.run.ran == by_hand.ran and cache.run.cached_steps > 3


@torch.no_grad()
@pytest.mark.parametrize("rounded", [False, True])
def test_loops_that_begin_in_the_middle(pipe, rounded):
    """The plan is that of the steps that run, as in image-to-image."""
    cache, x, text = enable_cache(pipe, "N2-1000-0"), torch.randn(1, 4, 4, 4, 4), torch.randn(1, 6, 12)
    pipe.scheduler.set_timesteps(20)
    for t in pipe.scheduler.timesteps[9:]:
        given = torch.tensor([t]).to(torch.bfloat16) if rounded else t.expand(1)
        noise = pipe.transformer(hidden_states=x, timestep=given, encoder_hidden_states=text).sample[:, :4]
        x = pipe.scheduler.step(noise, t, x)[0]
    assert cache.run.ran == [True, False] * 5 + [True]


@torch.no_grad()
def test_a_compiled_model_may_write_into_its_outputs_again(pipe):
    """As CUDA graphs do: the next call of the model writes into the memory of what the last one returned."""
    text, start = torch.randn(1, 6, 12), torch.randn(1, 4, 4, 4, 4)
    model, scheduler, memory = pipe.transformer, pipe.scheduler, {}

    def reuse(name, tensor):
        place = memory.setdefault(name, torch.empty_like(tensor))
        return place.copy_(tensor)

    def sample(forward):
        scheduler.set_timesteps(10)
        cache, x, last = SkipCache("N3-1000-0-o1", scheduler.timesteps), start, 0
        for i, t in enumerate(scheduler.timesteps):
            for stream, given in (("uncond", -text), ("cond", text)):
                step = cache.at(i, stream)
                noise = forward(x, t[None], given, step).clone()
                last = noise - 0.5 * last
            x = scheduler.step(last, t, x)[0]
        return x

    def graphed(x, t, text, step):
        noise = model(x, t, text, cache=step).sample[:, :4]
        if step.kept_feature is not None:
            step.kept_feature = reuse("feature", step.kept_feature)
        return reuse("noise", noise)

    expected = sample(lambda x, t, text, step: model(x, t, text, cache=step).sample[:, :4])
    assert torch.equal(sample(graphed), expected)


def test_timesteps_of_a_loop_come_to_the_latents(pipe):
    """Once a cache is on, schedulers have them on the CPU, and not every loop moves them."""
    cache = enable_cache(pipe, "N2-900-50")
    pipe.scheduler.set_timesteps(10)
    given = {"hidden_states": torch.empty(1, 4, 4, 4, 4, device="meta"), "timestep": pipe.scheduler.timesteps[:1]}
    _, given = cache._denoisers[0].call((), given)
    assert given["timestep"].device.type == "meta" and given["cache"] is not None


def test_offloaded_weights(pipe):
    """Sequential offload puts weights on the device only while their own module runs."""
    inputs = {"hidden_states": torch.randn(1, 4, 4, 4, 4), "timestep": torch.tensor([500])}
    inputs |= {"encoder_hidden_states": torch.randn(1, 6, 12)}
    with torch.no_grad():
        expected = pipe.transformer(**inputs).sample
        cpu_offload(pipe.transformer, torch.device("cpu"))
        assert torch.equal(pipe.transformer(**inputs).sample, expected)
