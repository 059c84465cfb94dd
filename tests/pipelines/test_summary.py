"""What a cache says a call cost: steps, memory, time and FLOPs."""

import time

import pytest
import torch
from pipelines.tiny import build

from skipdit import enable_cache
from skipdit.layers.flops import flop_counter

SPECS = ["N3-1000-0-b0-o1", "N2-1000-0"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["FluxPipeline (true guidance)", "WanPipeline", "DiTPipeline"])
def test_share_of_flops_is_that_of_whole_calls(name, spec):
    """Those of the pipeline's call, counted from outside, with a cache and without."""
    pipe, call = build(name)
    call["output_type"] = "latent"
    pipe.vae = None if name != "DiTPipeline" else pipe.vae

    def counted() -> int:
        with flop_counter() as counter:
            pipe(**call)
        return counter.get_total_flops() - decoding

    decoding = 0
    if name == "DiTPipeline":  # decodes always
        with flop_counter() as counter, torch.no_grad():
            pipe.vae.decode(torch.zeros(1, 4, 4, 4))
        decoding = counter.get_total_flops()
    uncached = counted()
    cache = enable_cache(pipe, spec)
    cached = counted()
    with cache.counting_flops():
        pipe(**call)
    share = 1 - cached / uncached
    assert cache.costs.flops_saved() == pytest.approx(share) and 0.1 < share <= 0.6
    assert f"{share:.0%} fewer FLOPs" in cache.summary()
    pipe(**call)
    assert cache.costs.flops_saved() is None and "FLOPs" not in cache.summary()


def test_attention_of_the_cpu_is_counted():
    q = torch.randn(1, 2, 8, 16)
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * 2 * 8 * 8 * 16


def test_time_saved_is_that_of_the_steps_left_out():
    pipe, call = build("FluxPipeline")
    pipe.transformer.proj_out.register_forward_hook(lambda *_: time.sleep(0.05))
    cache = enable_cache(pipe, SPECS[0])
    assert cache.summary() == "no call yet"
    pipe(**call)
    costs = cache.costs
    assert [each.kind for each in costs.calls] == ["full", "forecast", "forecast", "full", "forecast"]
    assert 0.1 < costs.seconds() < 0.5 and 0.12 < costs.seconds_saved() < 1
    assert cache.summary().startswith("5 steps: 2 full, 3 forecast; ")
    assert f"{costs.seconds():.2f} s in the model, {costs.seconds_saved():.2f} s saved" in cache.summary()


def test_steps_that_a_call_leaves_out_are_not_told():
    pipe, call = build("StableDiffusionXLPipeline")
    cache = enable_cache(pipe, "N2-1000-0-b0")
    pipe(**call | {"num_inference_steps": 10, "denoising_end": 0.6})
    assert cache.summary().startswith("6 steps: 3 full, 3 forecast; ")


def test_a_call_that_broke_off_is_not_one_of_the_next():
    pipe, call = build("FluxPipeline")
    cache, calls = enable_cache(pipe, "N2-1000-0"), iter([None, None, None, RuntimeError("out of memory")])

    def fail(*_):
        if error := next(calls, None):
            raise error

    hook = pipe.transformer.single_transformer_blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe(**call)
    hook.remove()
    told = len(cache.costs.calls)
    inputs = {"hidden_states": torch.randn(1, 4, 16), "encoder_hidden_states": torch.randn(1, 4, 16)}
    inputs |= {"pooled_projections": torch.randn(1, 16), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(4, 3)}
    pipe.transformer(timestep=torch.tensor([0.5]), guidance=torch.tensor([1.0]), **inputs)
    assert len(cache.costs.calls) == told


def test_nothing_is_saved_without_cached_steps():
    pipe, call = build("FluxPipeline")
    cache = enable_cache(pipe, "none")
    with cache.counting_flops():
        pipe(**call)
    assert cache.costs.flops_saved() == cache.costs.seconds_saved() == 0


def test_two_models_are_counted_apart():
    """The second one's first step is no cached step of the first one's."""
    pipe, call = build("WanPipeline (2.2, two transformers)")
    cache = enable_cache(pipe, SPECS[0])
    with cache.counting_flops():
        pipe(**call)
    assert cache.costs.flops_saved() == pytest.approx(0.4)


def test_flops_of_a_compiled_model_are_counted():
    pipe, call = build("FluxPipeline")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    cache = enable_cache(pipe, SPECS[0])
    with cache.counting_flops():
        pipe(**call)
    assert cache.costs.flops_saved() == pytest.approx(0.6)
    torch._dynamo.reset()
