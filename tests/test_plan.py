"""Planned caching: the dynamic programme against brute force, the calibration against direct runs, and plan files."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import tiny_dit
from tqdm import tqdm

from skipdit import CacheSpec, SkipCache
from skipdit.cache import CachePlan, CacheStep
from skipdit.class_sample import generate
from skipdit.class_to_image.compare import open_sampler
from skipdit.class_to_image.sample import Config
from skipdit.config import load_config
from skipdit.diffusion import Diffusion
from skipdit.plan import Bench, Errors, Watch, greedy, interpolate, main, optimal, total, uniform
from skipdit.sample import generators
from skipdit.weights import fingerprint


def sample(model, cache="none", steps=12, labels=(1, 2), seed=0, **kwargs):
    noise = generators(seed, range(len(labels)), "cpu")
    return generate(model, torch.tensor(labels), noise, steps=steps, sampler="ddim", cache=cache, **kwargs)


def random_errors(steps: int, reach: int, seed: int) -> Errors:
    """Errors of features that wander at random: products of real vectors, as those of a model are."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(steps, 5, generator=draw, dtype=torch.float64).cumsum(0)
    errors = Errors(steps, reach, sensitivity=torch.rand(steps, generator=draw).tolist())
    for k in range(steps):
        d = features[:k] - features[k]
        gram = (d @ d.T).tolist()
        errors.products |= {(i, j, k): gram[i][j] for i in range(k) for j in range(k) if i >= k - 2 * reach <= j}
    return errors


@pytest.mark.parametrize("budget", [2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_optimal_is_what_brute_force_finds(budget, seed):
    errors = random_errors(steps=10, reach=9, seed=seed)
    best = min(([0, *rest] for rest in combinations(range(1, 10), budget - 1)), key=lambda full: total(errors, full))
    found = optimal(errors, budget)
    assert len(found) == budget and found[0] == 0
    assert total(errors, found) == pytest.approx(total(errors, best), rel=1e-12)
    assert total(errors, found) <= total(errors, greedy(errors, budget)) * (1 + 1e-12)


def test_optimal_within_a_reach():
    errors = random_errors(steps=12, reach=4, seed=0)
    chosen = ([0, *rest] for rest in combinations(range(1, 12), 3))
    near = [f for f in chosen if all(b - a <= 4 for a, b in zip(f, [*f[1:]], strict=False)) and 11 - f[-1] <= 4]
    assert optimal(errors, 4) == min(near, key=lambda full: total(errors, full))
    assert optimal(errors, 12) == list(range(12))
    with pytest.raises(ValueError, match="2 full steps cannot span 12 steps within a reach of 4"):
        optimal(errors, 2)


def test_best_weight_is_that_of_least_squares():
    """Against a search over weights, on the vectors themselves."""
    draw = torch.Generator().manual_seed(0)
    d_i, d_j = torch.randn(2, 50, generator=draw, dtype=torch.float64) + torch.tensor([[3.0], [1.5]])
    errors = Errors(3, 2, {(0, 0, 2): d_i @ d_i, (0, 1, 2): d_i @ d_j, (1, 0, 2): d_i @ d_j, (1, 1, 2): d_j @ d_j})
    weights = torch.linspace(0, 2, 20001, dtype=torch.float64)
    squares = (d_j + weights[:, None] * (d_j - d_i)).square().sum(1)
    weight, error = errors.best(0, 1, 2)
    assert weight == pytest.approx(weights[squares.argmin()].item(), abs=1e-4)
    assert error == pytest.approx(squares.min().item(), rel=1e-6)
    assert errors.best(None, 1, 2) == (0.0, d_j @ d_j)


def test_uniform_and_interpolation():
    assert uniform(50, 13)[:4] == [0, 4, 8, 12] and len(uniform(50, 13)) == 13
    assert uniform(6, 6) == [0, 1, 2, 3, 4, 5]
    assert interpolate([2, 4], [1.0, 3.0], 6) == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0]
    assert interpolate([3], [2.0], 4) == [2.0] * 4


def test_calibration_measures_what_cached_steps_do():
    """Products of step k with step j are those of a run whose only cached step is k, with the feature of step j."""
    model, steps = tiny_dit(), 6
    timesteps, seen = Diffusion(steps).sampling_timesteps, []

    def keep(module, args, kwargs, output):
        seen.append((args, kwargs, output))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    errors = Errors(steps, reach=5)
    with tqdm(disable=True) as progress:
        watch = Watch(model, 1, errors, progress)
        watched = sample(model, steps=steps)
        watch.remove()
        handle.remove()
    watch.finish()
    assert torch.equal(watched, sample(model, steps=steps))  # watching changes nothing
    assert watch.calls == steps == len(timesteps)
    features = []
    for args, kwargs, _ in seen:
        step = CacheStep(1, None)
        with torch.no_grad():
            model(*args, **kwargs | {"cache": step})
        features.append(step.output)
    args, kwargs, truth = seen[4]
    with torch.no_grad():
        reused = [model(*args, **kwargs | {"cache": CacheStep(1, features[j])}) for j in (1, 3)]
    a, b = ((out - truth)[:, :4].flatten().double() for out in reused)
    assert errors.products[1, 3, 4] == pytest.approx((a @ b / len(a)).item(), rel=1e-5)
    assert errors.products[3, 3, 4] == pytest.approx((b @ b / len(b)).item(), rel=1e-5)


def test_plan_goes_the_way_of_intervals():
    """An interval's plan, written out as a plan of weights, gives the same samples."""
    model, steps = tiny_dit(), 12
    timesteps = Diffusion(steps).sampling_timesteps
    for order in (0, 1):
        spec = CacheSpec(3, 1000, 20, 1, order)
        full = [i for i, f in enumerate(spec.plan(timesteps)) if f]
        plan = CachePlan(tuple(timesteps), tuple(Errors(steps, 12).weights(full, order)))
        assert plan.plan(timesteps) == spec.plan(timesteps) and plan.order == order
        torch.testing.assert_close(sample(model, SkipCache(plan, timesteps)), sample(model, str(spec)))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_all_full_plan_is_bit_equal_to_uncached(scale):
    model, timesteps = tiny_dit(), Diffusion(12).sampling_timesteps
    plan = CachePlan(tuple(timesteps), (None,) * 12)
    assert not plan.caches
    assert torch.equal(
        sample(model, SkipCache(plan, timesteps), guidance_scale=scale), sample(model, guidance_scale=scale)
    )


def test_weights_are_those_of_the_plan():
    cache = SkipCache(CachePlan((5, 4, 3, 2, 1), (None, 0.5, None, 1.5, 0.25)), (5, 4, 3, 2, 1))
    seen = {}
    for i, full in enumerate(cache.plan):
        step = cache.at(i)
        if full:
            step.output = torch.tensor([float(i)])
        else:
            seen[i] = step.feature.item()
    assert seen == {1: 0.0, 3: 2 + 1.5 * 2, 4: 2 + 0.25 * 2}  # one full step before step 1: reuse


def test_a_stream_with_other_full_steps_forecasts_linearly():
    plan = CachePlan((4, 3, 2, 1), (None, None, 3.0, 3.0))
    assert plan.weight(2, 0, 1) == 3.0
    assert plan.weight(3, 1, 2) == 1.0


def test_plan_files_round_trip(tmp_path):
    plan = CachePlan((3.0, 2.0, 1.0), (None, None, 1.25), 2, {"model": "abc"})
    plan.save(tmp_path / "plan.json")
    again = CacheSpec.parse(str(tmp_path / "plan.json"))
    assert again == plan and again.about == {"model": "abc"} and str(again) == str(plan)
    assert str(plan).startswith("plan of 2/3 full steps ")
    other = CachePlan((3.0, 2.0, 1.0), (None, None, 1.0), 2)
    assert str(other) != str(plan)  # a job knows one from the other


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("no json", "is not a plan"),
        ("[]", "is not a plan"),
        ('{"timesteps": [1]}', "is not a plan"),
        ('{"timesteps": [1, 0], "weights": [null], "branch": 1}', "1 weights for 2 timesteps"),
        ('{"timesteps": [1, 0], "weights": [0.0, null], "branch": 1}', "first step must be full"),
        ('{"timesteps": [1, 0], "weights": [null, NaN], "branch": 1}', "finite"),
        ('{"timesteps": [1, 0], "weights": [null, 1], "branch": 0}', "branch is 0"),
    ],
)
def test_broken_plan_files_are_refused(content, complaint, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        CacheSpec.parse(str(tmp_path / "plan.json"))
    assert "plan.json" in str(error.value)


def test_plans_for_other_timesteps_are_refused(tmp_path):
    timesteps = Diffusion(12).sampling_timesteps
    CachePlan(tuple(map(float, timesteps)), (None,) * 6 + (1.0,) * 6).save(tmp_path / "plan.json")
    sample(tiny_dit(), str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"plan\.json is for 12 steps .*; this run has 10 steps"):
        sample(tiny_dit(), str(tmp_path / "plan.json"), steps=10)
    with pytest.raises(FileNotFoundError, match=r"no plan .*none\.json"):
        CacheSpec.parse(str(tmp_path / "none.json"))


WEIGHTS = Path(__file__).parents[1] / "class-to-image/weights"
TINY = f"""
weights: {WEIGHTS}/fashion-skip.pt
vae: {WEIGHTS}/vae
image_size: 32
num_samples: 2
sampler: ddim
steps: 10
guidance_scale: 2.0
model: {{patch_size: 1, hidden_size: 128, depth: 12, num_heads: 2, num_classes: 10, skip: true}}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line, on the embedded model with few steps; gives the plan's file."""
    config, out = tmp_path / "class-to-image" / "tiny.yaml", tmp_path / "plan.json"
    config.parent.mkdir()
    config.write_text(TINY)

    def run(*arguments: str) -> Path:
        few = ["--probes", "3", "--improve", "3", "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["plan", "--config", str(config), *arguments, *few])
        main()
        return out

    return run


def test_budget(command, capsys, tmp_path):
    plan = CachePlan.load(command("--budget", "5"))
    assert sum(weight is None for weight in plan.weights) == 5
    assert f"5 of 10 steps full, {plan.about['speedup']:.2f}x fewer FLOPs" in capsys.readouterr().out
    config = load_config(Config, str(tmp_path / "class-to-image/tiny.yaml"), ["seed=10000"])
    bench = Bench(open_sampler(config, 1), 10, 1)
    bench.reference = list(bench.sampler.latents(10, CacheSpec()))
    alone = {order: bench.error(bench.plan(Errors(10, 9).weights(uniform(10, 5), order))) for order in (0, 1)}
    assert plan.about["errors"]["uniform, reuse"] == pytest.approx(alone[0], rel=1e-4)
    assert plan.about["errors"]["uniform, linear forecast"] == pytest.approx(alone[1], rel=1e-4)
    assert bench.error(replace(plan, about={})) <= min(alone.values())
    assert fingerprint(bench.model) == plan.about["model"]


def test_speedup_and_error(command, capsys):
    fast = CachePlan.load(command("--speedup", "2"))
    assert fast.about["speedup"] >= 2
    near = CachePlan.load(command("--max-error", "0.05"))
    of_same_cost = [error for name, error in near.about["errors"].items() if "steps" not in name]
    assert min(of_same_cost) <= 0.05
    for wrong in (["--budget", "11"], ["--speedup", "100"]):
        with pytest.raises(SystemExit):
            command(*wrong)
        assert f"error: {wrong[0]} is {wrong[1]}" in capsys.readouterr().err
