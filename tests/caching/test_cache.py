"""Plans, what is stored, and the promises of USERS' stories: nothing stale, nothing shared, nothing kept."""

import gc
import re
import warnings

import pytest
import torch
from conftest import assert_rounding, tiny_dit

from skipdit import SkipCache
from skipdit.caching import CachePolicy, CacheSpec, CacheStep, parse_policy
from skipdit.diffusion.gaussian import Diffusion
from skipdit.sampling.class_conditional import generate
from skipdit.utils.seeding import generators

SPECS = ["N2-1000-20", "N3-1000-20-b2", "N3-1000-20-o1", "N3-1000-20-b0-o1"]
PLAIN = ["N2-1000-20", "N3-1000-20-b2-o1", "N3-1000-20-b0-o1"]  # for backbones without skips


def sample(model, cache="none", steps=12, labels=(1, 2), seed=0, **kwargs):
    noise = generators(seed, range(len(labels)), "cpu")
    return generate(model, torch.tensor(labels), noise, steps=steps, sampler="ddim", cache=cache, **kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "N2-700-50",
        "N3-1000-20-b4",
        "N4-800-100-o1",
        "N2-900-49-b2-o1",
        "N3-1000-0-b0-o1",
        "D0.2",
        "D0.05-m3-b2-o1",
    ],
)
def test_spec_round_trips(text):
    assert str(parse_policy(text)) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("D0.1-b0", "branch is 0"), ("D0.1-o2", "order is 2"), ("D", "does not parse"), ("D-1", "does not parse")]
    + [("N0-700-50", "interval is 0"), ("N2-700-50-o2", "order is 2")]
    + [(text, "does not parse") for text in ("", "2-700-50", "N2-700", "N2-700-50-x1", "N2-700-50 N3", "always")],
)
def test_bad_spec_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_policy(text)


def test_branch_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"branch 3 is larger than the model's number of skips, 2"):
        sample(tiny_dit(), "N2-1000-20-b3")


def test_branch_larger_than_half_of_a_plain_model_is_refused():
    with pytest.raises(ValueError, match=r"branch 3 is larger than half of the model's 4 layers"):
        sample(tiny_dit(skip=False), "N2-1000-20-b3")


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_interval_one_is_bit_equal_to_uncached(scale):
    model = tiny_dit()
    assert torch.equal(sample(model, "N1-1000-20", guidance_scale=scale), sample(model, guidance_scale=scale))


def test_all_full_plan_through_the_cache_is_bit_equal():
    """The cached code path itself, not the short cut of a run without cached steps."""
    model, cache = tiny_dit(), SkipCache("N2-1000-20-o1", range(100, 0, -10))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([5, 5]), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(model(x, t, y, cache=cache.at(0)), model(x, t, y))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_cached_steps_change_the_sample(spec, scale):
    """The cache engages for every guidance scale, and its sample stays near the uncached one."""
    model = tiny_dit()
    cached, uncached = sample(model, spec, guidance_scale=scale), sample(model, guidance_scale=scale)
    assert 0 < (cached - uncached).abs().max() < 0.5 * uncached.abs().max()


@pytest.mark.parametrize("spec", SPECS)
def test_a_b_a(spec):
    """Story 1: the second A equals the first, whatever ran in between, at another shape and step count too."""
    model = tiny_dit()
    first = sample(model, spec)
    sample(model, spec, labels=(3,), steps=7, seed=5)
    sample(model, "N4-1000-20", labels=(4, 5, 6))
    assert torch.equal(sample(model, spec), first)


@pytest.mark.parametrize("spec", PLAIN)
def test_a_b_a_on_a_plain_backbone(spec):
    model = tiny_dit(skip=False, depth=6)
    first = sample(model, spec)
    sample(model, spec, labels=(3,), steps=7, seed=5)
    sample(model, "N4-1000-20", labels=(4, 5, 6))
    assert torch.equal(sample(model, spec), first)
    assert 0 < (first - sample(model)).abs().max() < 0.5 * first.abs().max()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("branch", [1, 2])
def test_a_cached_pass_with_its_own_feature_is_the_full_pass(skip, branch):
    model, full = tiny_dit(skip=skip), CacheStep(branch, None)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([5, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(x, t, y, cache=full)
        assert torch.equal(expected, model(x, t, y))
        assert_rounding(model(x, t, y, cache=CacheStep(branch, full.kept_feature)), expected)


@torch.no_grad()
def test_branch_0_runs_no_layer_and_forecasts_the_output():
    """What a forecast step returns is the extrapolated output of earlier ones, whatever the latents are."""
    model, cache = tiny_dit(), SkipCache("N3-1000-300-b0-o1", [1000.0, 900.0, 600.0, 400.0, 350.0, 340.0])
    ran, outputs = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    for i in range(6):
        outputs.append(model(torch.randn(1, 4, 4, 4), torch.tensor([100]), torch.tensor([1]), cache=cache.at(i)))
    assert [cache.kind(i) for i in range(6)] == ["full", "forecast", "forecast", "full", "forecast", "forecast"]
    assert len(ran) == 2 * len(model.blocks)
    assert torch.equal(outputs[2], outputs[0])  # one output is known
    assert_rounding(outputs[4], outputs[3] + (outputs[3] - outputs[0]) / 3)
    assert_rounding(outputs[5], outputs[3] + (outputs[3] - outputs[0]) * 2 / 3)


def test_a_plain_backbone_stores_what_its_middle_adds():
    model, full = tiny_dit(skip=False), CacheStep(1, None)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: streams.append(out))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([5, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        model(x, t, y, cache=full)
    assert torch.equal(full.kept_feature, streams[2] - streams[0])


@pytest.mark.parametrize("interval", [(0, 1000), (300, 700)])
@pytest.mark.slow
def test_no_tensor_survives_a_run(interval):
    model, steps = tiny_dit(), 12
    cache = SkipCache("N3-1000-20-o1", Diffusion(steps).sampling_timesteps)
    before = _tensors()
    sample(model, cache, guidance_interval=interval)
    assert cache.peak_bytes > 0
    assert _tensors() - before == 0
    assert not any(isinstance(value, torch.Tensor) for value in vars(model).values())


def _tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("spec", SPECS)
def test_guidance_in_one_call_or_two_is_the_same(spec):
    """Story 2: the two halves of guidance never see each other's features."""
    model, timesteps = tiny_dit(), list(range(950, 0, -50))
    together, apart = SkipCache(spec, timesteps), SkipCache(spec, timesteps)
    y, null = torch.tensor([1, 2]), torch.full((2,), model.null_class)
    with torch.no_grad():
        for i, step in enumerate(timesteps):
            x, t = torch.randn(2, 4, 4, 4), torch.full((2,), step)
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), cache=together.at(i))
            cond = model(x, t, y, cache=apart.at(i, stream="cond"))
            uncond = model(x, t, null, cache=apart.at(i, stream="uncond"))
            assert_rounding(both, torch.cat([cond, uncond]))


def test_two_runs_on_one_model_never_meet():
    """Runs whose steps interleave give what they give alone."""
    model, timesteps = tiny_dit(), list(range(900, 0, -100))
    inputs = [torch.randn(len(timesteps), 1, 4, 4, 4) for _ in range(2)]

    def step(cache, xs, i):
        with torch.no_grad():
            return model(xs[i], torch.tensor([timesteps[i]]), torch.tensor([1]), cache=cache.at(i))

    alone = []
    for xs in inputs:
        cache = SkipCache("N3-1000-20", timesteps)
        alone.append([step(cache, xs, i) for i in range(len(timesteps))])
    caches = [SkipCache("N3-1000-20", timesteps) for _ in inputs]
    for i in range(len(timesteps)):
        for cache, xs, expected in zip(caches, inputs, alone, strict=True):
            assert torch.equal(step(cache, xs, i), expected[i])


@pytest.mark.parametrize("steps", [28, 50, 28, 3])
def test_plan_follows_the_actual_timesteps(steps):
    """Story 4: nothing assumes a step count."""
    timesteps = Diffusion(steps).sampling_timesteps
    cache = SkipCache("N2-700-50", timesteps)
    assert len(cache.plan) == steps
    assert all(full for full, t in zip(cache.plan, timesteps, strict=True) if t >= 700)
    assert cache.full_steps + cache.cached_steps == steps


def test_custom_timesteps_as_tensor_and_floats():
    assert SkipCache("N2-700-50", torch.tensor([800.5, 650.0, 600.0, 10.0])).plan == [True, False, True, False]


def test_a_cache_that_never_engages_warns():
    with pytest.warns(UserWarning, match=re.escape("cache N2-100-50 never engages")):
        SkipCache("N2-100-50", [900, 500, 200])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SkipCache("none", [900, 500, 200])


def test_extrapolation_is_linear_over_steps():
    """Order 1 continues a feature that moves at constant speed exactly, order 0 keeps it still."""
    timesteps = list(range(900, 0, -100))
    for spec, expected in (("N3-1000-0", [3.0, 3.0]), ("N3-1000-0-o1", [4.0, 5.0])):
        cache = SkipCache(spec, timesteps)
        seen = {}
        for i, full in enumerate(cache.plan):
            step = cache.at(i)
            if full:
                step.kept_feature = torch.full((2,), float(i))
            else:
                seen[i] = step.feature.tolist()
        assert seen[1] == [0.0, 0.0]  # one full step so far: nothing to extrapolate from
        assert [seen[4][0], seen[5][0]] == expected


def test_peak_bytes_are_the_features_bytes():
    model, timesteps = tiny_dit(), list(range(900, 0, -100))
    tokens, width, rows = 4, 32, 2
    for spec, features in (("N2-1000-20", 1), ("N2-1000-20-o1", 2)):
        cache = SkipCache(spec, timesteps)
        with torch.no_grad():
            for i, t in enumerate(timesteps):
                model(torch.randn(rows, 4, 4, 4), torch.full((rows,), t), torch.zeros(rows).long(), cache=cache.at(i))
        assert cache.peak_bytes == features * rows * tokens * width * 4


@pytest.mark.parametrize("spec", ["none", "N2-1000-20", "N3-1000-20-o1"])
def test_guidance_interval(spec):
    """Outside the interval only the conditional half runs; over the whole range it is plain guidance."""
    model = tiny_dit()
    assert torch.equal(sample(model, spec, guidance_interval=(0, 1000)), sample(model, spec))
    nowhere = sample(model, spec, guidance_interval=(2000, 3000))
    torch.testing.assert_close(nowhere, sample(model, spec, guidance_scale=1.0))
    middle = sample(model, spec, guidance_interval=(300, 700))
    assert not torch.allclose(middle, nowhere)
    assert not torch.allclose(middle, sample(model, spec))


def test_a_stream_that_sat_out_a_full_step_runs_its_own():
    """Guidance that starts in mid-run has nothing fresh to reuse: a full step, and the counts say so."""
    cache = SkipCache("N2-1000-0", list(range(900, 0, -100)))
    kinds = []
    for i in range(len(cache.plan)):
        step = cache.at(i, stream="guided" if 3 <= i < 6 else "conditional")
        kinds.append(step.feature is None)
        step.kept_feature = torch.zeros(1)
    assert cache.plan == [True, False] * 4 + [True]
    assert kinds == [True, False, True, True, True, False, True, False, True]
    assert cache.ran == kinds
    assert (cache.full_steps, cache.cached_steps) == (6, 3)


def test_drift_decides_by_how_far_the_shallow_feature_moved():
    """Full where the distance to the last full step is above the threshold; at most so many cached in a row."""
    cache, kinds = SkipCache("D0.25-m3", list(range(9, 0, -1))), []
    moves = [1.0, 1.1, 1.2, 1.3, 1.35, 1.4, 1.45, 1.5, 1.7]  # 1.3 is more than a quarter off 1.0
    for i, value in enumerate(moves):
        step, shallow = cache.at(i), torch.tensor([value, 0.0])
        kinds.append(step.is_full(shallow))
        if kinds[-1]:
            step.kept_feature = torch.full((2,), float(i))
        else:
            assert step.feature.tolist() == [max(j for j in range(i) if kinds[j])] * 2  # order 0: the last one's
    assert kinds == [True, False, False, True, False, False, False, True, False]  # the 4th after 1.3 is forced
    assert cache.ran == kinds and (cache.full_steps, cache.cached_steps) == (3, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_drift_of_large_features(dtype):
    """Norms that float16 cannot hold: every step moves by a half, and so is full."""
    cache = SkipCache("D0.25", list(range(9, 0, -1)))
    for i in range(8):
        step = cache.at(i)
        assert step.is_full(torch.full((100_000,), 400.0 * 1.5**i, dtype=dtype))
        step.kept_feature = torch.zeros(1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_drift_of_no_tolerance_is_bit_equal_to_uncached(scale):
    model, cache = tiny_dit(), SkipCache("D0", Diffusion(12).sampling_timesteps)
    with pytest.warns(UserWarning, match="cache D0 cached none of the 11 steps before the last"):
        cached = sample(model, cache, guidance_scale=scale)
    assert torch.equal(cached, sample(model, guidance_scale=scale))
    assert cache.cached_steps == 0


def test_drift_without_limit_is_an_interval():
    """A threshold that is never reached caches `most` steps after every full one.

    To rounding: modulations of steps whose kind is known are computed together, here those of every step by itself.
    """
    model = tiny_dit()
    drift = SkipCache("D1000-m2-b2-o1", Diffusion(12).sampling_timesteps)
    assert_rounding(sample(model, drift), sample(model, "N3-1000-0-b2-o1"))
    assert drift.ran == parse_policy("N3-1000-0").full_mask(drift.timesteps)
    assert not drift._features and not drift._memory  # nothing survives the run


def test_drift_cannot_be_compiled():
    model = tiny_dit()
    model.compile()
    with pytest.raises(ValueError, match="set compile=none"):
        sample(model, "D0.1")


class FirstAndLast(CachePolicy):
    """A user's own policy."""

    def full_mask(self, timesteps):
        return [i in (0, len(timesteps) - 1) for i in range(len(timesteps))]


def test_a_policy_of_ones_own_works_everywhere():
    model, steps = tiny_dit(), 6
    cache = SkipCache(FirstAndLast(), Diffusion(steps).sampling_timesteps)
    generate(model, torch.tensor([1]), generators(0, [0], "cpu"), steps=steps, sampler="ddim", cache=cache)
    assert cache.ran == [True, False, False, False, False, True]
    policy = FirstAndLast()
    assert parse_policy(policy) is policy and policy.coefficients(3, (0,)) == ()
    assert (policy.caches, policy.adaptive, policy.calibration_seed) == (True, False, None)


def test_a_policy_of_ones_own_that_extrapolates():
    class Extrapolate(FirstAndLast):
        order = 1

        def full_mask(self, timesteps):
            return [i < 2 for i in range(len(timesteps))]

    timesteps = Diffusion(5).sampling_timesteps
    own = SkipCache(Extrapolate(), timesteps)
    interval = SkipCache(CacheSpec(9, start=timesteps[1], stop=-1, order=1), timesteps)
    assert own.plan == interval.plan
    results = [
        generate(tiny_dit(), torch.tensor([1]), generators(0, [0], "cpu"), steps=5, sampler="ddim", cache=cache)
        for cache in (own, interval)
    ]
    assert torch.equal(*results)
