"""Plans: their files, and runs by them."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import assert_rounding, tiny_dit

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import parse_policy
from skipdit.caching.runtime import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.diffusion.gaussian import Diffusion
from skipdit.sampling.class_conditional import generate
from skipdit.utils.seeding import generators


def test_weights_are_those_of_the_plan():
    weights = (None, (), None, (1.5,), (0.25,), None, (2.0, -0.5), (), (0.0, 4.0))
    cache = SkipCache(CachePlan(tuple(range(9, 0, -1)), weights), range(9, 0, -1))
    seen = {}
    for i, full in enumerate(cache.plan):
        step = cache.at(i)
        if full:
            step.kept_feature = torch.tensor([float(i * i)])
        else:
            seen[i] = step.feature.item()
    assert seen == {1: 0, 3: 4 + 1.5 * 4, 4: 4 + 0.25 * 4, 6: 25 + 2 * 21 - 0.5 * 4, 7: 25, 8: 25 + 4 * 4}


def test_a_stream_with_other_full_steps_extrapolates_linearly():
    plan = CachePlan((4, 3, 2, 1), (None, None, (3.0,), (3.0,)))
    assert plan.coefficients(2, (0, 1)) == (3.0,)
    assert plan.coefficients(3, (1, 2)) == (1.0,)
    assert plan.coefficients(3, (1,)) == ()
    reuse = CachePlan((4, 3, 2, 1), (None, None, (3.0,), ()))
    assert reuse.coefficients(3, (1,)) == ()  # what it uses is there


def test_plan_files_round_trip(tmp_path):
    plan = CachePlan((3.0, 2.0, 1.0), (None, None, (1.25,)), 2, about={"model": "abc"})
    plan.save(tmp_path / "plan.json")
    again = parse_policy(str(tmp_path / "plan.json"))
    assert again == plan and again.about == {"model": "abc"} and str(again) == str(plan)
    assert str(plan).startswith("plan of 2/3 full steps ")
    other = CachePlan((3.0, 2.0, 1.0), (None, None, (1.0,)), 2)
    assert str(other) != str(plan)  # a job knows one from the other


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("no json", "is not a plan"),
        ("[]", "is not a plan"),
        ('{"timesteps": [1]}', "is not a plan"),
        ('{"timesteps": [1, 0], "weights": [null], "branch": 1}', "1 features for 2 timesteps"),
        ('{"timesteps": [1, 0], "weights": [[], null], "branch": 1}', "first step must be full"),
        ('{"timesteps": [2, 1, 0], "weights": [null, null, [NaN]], "branch": 1}', "finite"),
        ('{"timesteps": [1, 0], "weights": [null, [1]], "branch": 1}', "step 1 has 1 coefficients for 1 features"),
        ('{"timesteps": [1, 0], "weights": [null, 1], "branch": 1}', "is not a plan"),
        ('{"timesteps": [1, 0], "weights": [null, ["x"]], "branch": 1}', "is not a plan"),
        ('{"timesteps": [1, 0], "weights": [null, []], "branch": 0}', "branch is 0"),
    ],
)
def test_broken_plan_files_are_refused(content, complaint, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        parse_policy(str(tmp_path / "plan.json"))
    assert "plan.json" in str(error.value)


STEPS = 8
TIMESTEPS = tuple(map(float, Diffusion(STEPS).sampling_timesteps))
MIXED = {  # every kind after every other one, and corrections of full and cached steps
    "kinds": "FFSOFSOO",
    "features": (None, None, (0.7,), None, None, (0.4, -0.2), None, None),
    "outputs": ((), (0.3,), (-0.2, 0.1), (0.8, 0.2), (), (0.25,), (1.1,), (2.1, -0.3)),
}


def mixed(**changes) -> CachePlan:
    return CachePlan(TIMESTEPS, **{"branch": 1, **MIXED, **changes})


def sample(model, cache="none", labels=(1, 2), seed=0, **kwargs):
    noise = generators(seed, range(len(labels)), "cpu")
    settings = {"steps": STEPS, "sampler": "ddim", "guidance_scale": 2.0} | kwargs
    return generate(model, torch.tensor(labels), noise, cache=cache, **settings)


@torch.no_grad()
@pytest.mark.parametrize("skip", [True, False])
def test_a_mixed_plan_by_hand(skip):
    """Each call returns what the coefficients say of the model's own outputs and features."""
    model, plan, draw = tiny_dit(skip=skip), mixed(), torch.Generator().manual_seed(0)
    cache, raw, features, returned = SkipCache(plan, TIMESTEPS), {}, {}, {}

    def combined(stored, coefficients):
        return stored[0] + sum(c * (a - b) for c, a, b in zip(coefficients, stored, stored[1:], strict=False))

    for i, kind in enumerate(plan.kinds):
        x, t, y = torch.randn(2, 4, 4, 4, generator=draw), torch.tensor([9 - i] * 2), torch.tensor([0, 1])
        returned[i] = model(x, t, y, cache=cache.at(i))
        own = CacheStep(1, None)
        if kind == "F":
            raw[i] = model(x, t, y, cache=own)
            features[i] = own.kept_feature
        elif kind == "S":
            raw[i] = model(x, t, y, cache=CacheStep(1, combined([*features.values()][::-1], plan.features[i])))
        assert_rounding(returned[i], combined([*raw.values()][::-1], plan.outputs[i]))
    assert cache.counts() == {"full": 3, "cached": 2, "forecast": 3}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_mixed_plans_a_b_a(skip, sampler):
    model = tiny_dit(skip=skip)
    first = sample(model, mixed(), sampler=sampler)
    sample(model, "N3-1000-20-b0-o1", labels=(3,), steps=7, seed=5)
    sample(model, mixed(outputs=()), labels=(4, 5, 6))
    assert torch.equal(sample(model, mixed(), sampler=sampler), first)
    assert not torch.equal(sample(model, sampler=sampler), first)


def test_a_plan_of_full_steps_is_the_uncached_run():
    model, nothing = tiny_dit(), CachePlan(TIMESTEPS, (None,) * STEPS)
    assert not nothing.caches and torch.equal(sample(model, nothing), sample(model))
    zeros = mixed(kinds="F" * STEPS, features=(None,) * STEPS, outputs=((), *[(0.0,)] * (STEPS - 1)))
    assert torch.equal(sample(model, zeros), sample(model))


def test_forecast_steps_run_no_layer():
    model, ran = tiny_dit(), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    cache = SkipCache(mixed(), TIMESTEPS)
    sample(model, cache)
    assert len(ran) == 3 * len(model.blocks) + 2 * 2
    assert not cache._outputs and not cache._features and cache.peak_bytes > 0  # nothing is kept after the run


def test_features_are_stored_for_cached_steps_only():
    model = tiny_dit()
    outputs = ((), (), (0.5,), (0.7,), (), (0.4, 0.1), (0.6,), (0.8,))
    plan = mixed(kinds="FFOOFOOO", features=(None,) * STEPS, outputs=outputs)
    plans = [plan, replace(plan, branch=0)]
    caches = [SkipCache(each, TIMESTEPS) for each in plans]
    a, b = (sample(model, cache) for cache in caches)
    assert torch.equal(a, b) and caches[0].peak_bytes == caches[1].peak_bytes


@pytest.mark.slow
def test_mixed_plans_compile():
    model = tiny_dit()
    expected = sample(model, mixed())
    model.compile(fullgraph=True)
    torch.testing.assert_close(sample(model, mixed()), expected, rtol=1e-4, atol=1e-4)


def test_a_stream_that_sat_out_a_step_runs_in_full():
    """Guidance that begins at step 3: the stream of both halves has no output then, and no feature."""
    model, cache = tiny_dit(), SkipCache(mixed(), TIMESTEPS)
    sample(model, cache, guidance_interval=(0, int(TIMESTEPS[3])))
    assert [cache.kind(i) for i in range(STEPS)] == [
        "full",
        "full",
        "cached",
        "full",
        "full",
        "cached",
        "forecast",
        "forecast",
    ]


def test_half_precision_forecasts_are_combined_in_float32():
    plan = CachePlan((3.0, 2.0, 1.0), (None,) * 3, 1, "FFO", ((), (), (3.0,)))
    cache, outputs = SkipCache(plan, plan.timesteps), [torch.tensor([1.0]), torch.tensor([1.0078125])]
    for i, output in enumerate(outputs):
        cache.at(i).finish(output.to(torch.bfloat16))
    step = cache.at(2)
    assert step.forecast.dtype == torch.bfloat16 and step.forecast.item() == 1.03125


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kinds": "SFSOFSOO"}, "first step must be full"),
        ({"kinds": "FFSOFSO"}, "7 kinds for 8 timesteps"),
        ({"kinds": "FFSOFSOX"}, "kind 'X'"),
        ({"branch": 0}, "branch is 0"),
        ({"kinds": "FFOOFSOO"}, "step 2 is of kind O; cached steps alone have features"),
        ({"kinds": "FFSOFSSO"}, "step 6 is of kind S; cached steps alone have features"),
        ({"outputs": ((0.1,), *MIXED["outputs"][1:])}, "step 0 has 1 coefficients for 1 outputs"),
        ({"features": (*MIXED["features"][:2], (0.7, 0.1), *MIXED["features"][3:])}, "step 2 has 2 .* for 2 features"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        mixed(**changes)


def test_mixed_plan_files_round_trip(tmp_path):
    mixed().save(tmp_path / "plan.json")
    again = parse_policy(str(tmp_path / "plan.json"))
    assert again == mixed() and str(again) == str(mixed())
    assert str(mixed(outputs=())) != str(mixed())
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["kinds"] == "FFSOFSOO" and content["outputs"][1] == [0.3]
