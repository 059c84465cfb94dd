"""Planned caching: the dynamic programme against brute force, the calibration against direct runs, and plan files."""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, skipdit_command, tiny_dit
from tqdm import tqdm

from skipdit import CacheSpec, SkipCache
from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import parse_policy
from skipdit.caching.steps import CacheStep
from skipdit.class_to_image.sample import Config, ImageSampler
from skipdit.class_to_image.sample import main as sample_classes
from skipdit.config import load_config, to_yaml
from skipdit.diffusion.gaussian import Diffusion
from skipdit.evaluation.compare import check_plans, rows_for
from skipdit.layers.inspect import replaced
from skipdit.planning.calibration import NUDGE, Bench, Watch
from skipdit.planning.errors import Errors
from skipdit.planning.fitting import fit
from skipdit.planning.schedules import forecast, greedy, interpolate, moved, optimal, uniform, widened
from skipdit.sampling.class_conditional import generate
from skipdit.tasks import find_task
from skipdit.text_to_image import sample_t2i
from skipdit.utils.provenance import fingerprint
from skipdit.utils.seeding import generators

main = skipdit_command("plan")


def sample(model, cache="none", steps=12, labels=(1, 2), seed=0, **kwargs):
    noise = generators(seed, range(len(labels)), "cpu")
    return generate(model, torch.tensor(labels), noise, steps=steps, sampler="ddim", cache=cache, **kwargs)


def random_errors(steps: int, reach: int, seed: int) -> Errors:
    """Errors of features that wander at random: products of real vectors, as those of a model are."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(steps, 5, generator=draw, dtype=torch.float64).cumsum(0)
    errors = Errors(steps, reach)
    for k in range(1, steps):
        d = features[max(k - 2 * reach, 0) : k] - features[k]
        errors.grams[k] = (d @ d.T * torch.rand(1, generator=draw)).numpy()
    return errors


@pytest.mark.parametrize("budget", [2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memory", [1, 2])
def test_optimal_is_what_brute_force_finds(budget, seed, memory):
    errors = random_errors(steps=10, reach=9, seed=seed)
    errors.memory = memory
    best = min(([0, *rest] for rest in combinations(range(1, 10), budget - 1)), key=errors.total)
    found = optimal(errors, budget)
    assert len(found) == budget and found[0] == 0
    assert errors.total(found) == pytest.approx(errors.total(best), rel=1e-12)
    assert errors.total(found) <= errors.total(greedy(errors, budget)) * (1 + 1e-12)
    assert (errors.cost((0, 3), 6) == errors.cost((3,), 6)) == (memory == 1)
    alone = errors.curve(errors.weights(found))
    assert [k for k, error in enumerate(alone) if error == 0] == found
    if memory == 1 and (k := found[-1] + 1) < 10:  # by its only feature, that of the step before
        assert alone[k] ** 2 == pytest.approx(errors.grams[k][-1, -1])


def test_optimal_within_a_reach():
    errors = random_errors(steps=12, reach=4, seed=0)
    chosen = ([0, *rest] for rest in combinations(range(1, 12), 3))
    near = [f for f in chosen if all(b - a <= 4 for a, b in pairwise(f)) and 12 - f[-1] <= 4]
    assert optimal(errors, 4) == min(near, key=errors.total)
    assert optimal(errors, 12) == list(range(12))
    with pytest.raises(ValueError, match="2 full steps cannot span 12 steps within a reach of 4"):
        optimal(errors, 2)


def test_best_weight_is_that_of_least_squares():
    """Against least squares on the vectors themselves."""
    draw = torch.Generator().manual_seed(0)
    d = torch.randn(3, 50, generator=draw, dtype=torch.float64) + torch.tensor([[5.0], [3.0], [1.5]])
    errors = Errors(4, 3, {3: (d @ d.T).numpy()})
    for full in [(0, 1, 2), (1, 2), (0, 2)]:
        newest_first = d[list(reversed(full))]
        changes = newest_first[:-1] - newest_first[1:]
        exact = torch.linalg.lstsq(changes.T, -newest_first[0])
        weights, error = errors.best(full, 3)
        assert weights == pytest.approx(exact.solution.tolist(), rel=0.01)
        left = newest_first[0] + exact.solution @ changes
        assert error == pytest.approx((left @ left).item(), rel=1e-3)
    assert errors.best((2,), 3) == ((), pytest.approx((d[2] @ d[2]).item()))


def test_uniform_and_interpolation():
    assert uniform(50, 13) == [*range(0, 48, 4), 47]
    assert uniform(6, 6) == [0, 1, 2, 3, 4, 5] and uniform(6, 1) == [0]
    assert interpolate([2, 4], [1.0, 3.0], 6) == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0]
    assert interpolate([3], [2.0], 4) == [2.0] * 4


def test_calibration_measures_what_cached_steps_do():
    """Products of step k are those of the errors of a model call at step k with the features of other steps."""
    model, steps = tiny_dit(), 6
    timesteps, seen = Diffusion(steps).sampling_timesteps, []

    def keep(module, args, kwargs, output):
        seen.append((args, kwargs, output))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    with tqdm(disable=True) as progress:
        watch = Watch(model, 1, steps, 3, progress)
        with replaced(model, "forward", watch):
            watched = sample(model, steps=steps, guidance_scale=2.0)
        handle.remove()
    watch.fold(2)
    assert torch.equal(watched, sample(model, steps=steps, guidance_scale=2.0))  # watching changes nothing
    assert watch.calls == steps == len(timesteps)
    features = []
    for args, kwargs, _ in seen:
        step = CacheStep(1, None)
        with torch.no_grad():
            model(*args, **kwargs | {"cache": step})
        features.append(step.kept_feature)
    args, kwargs, truth = seen[4]
    with torch.no_grad():
        reused = [model(*args, **kwargs | {"cache": CacheStep(1, features[j])}) for j in (1, 3)]
    (gram,) = watch.grams[4]
    assert gram.shape == (2, 3, 3)  # two samples, the features of steps 1, 2, 3
    a, b = ((out - truth)[:, :4].unflatten(0, (2, 2)).double() for out in reused)  # with classes, then without
    torch.testing.assert_close(gram[:, 0, 2], (a * b).mean((0, 2, 3, 4)), rtol=1e-5, atol=0)
    torch.testing.assert_close(gram[:, 2, 2], b.square().mean((0, 2, 3, 4)), rtol=1e-5, atol=0)


def test_plan_goes_the_way_of_intervals():
    """An interval's plan, written out as a plan of weights, gives the same samples."""
    model, steps = tiny_dit(), 12
    timesteps = Diffusion(steps).sampling_timesteps
    for order in (0, 1):
        spec = CacheSpec(3, 1000, 20, 1, order)
        full = [i for i, f in enumerate(spec.full_mask(timesteps)) if f]
        plan = CachePlan(tuple(timesteps), forecast(steps, full, order))
        assert plan.full_mask(timesteps) == spec.full_mask(timesteps) and plan.order == order
        torch.testing.assert_close(sample(model, SkipCache(plan, timesteps)), sample(model, str(spec)))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_all_full_plan_is_bit_equal_to_uncached(scale):
    model, timesteps = tiny_dit(), Diffusion(12).sampling_timesteps
    plan = CachePlan(tuple(timesteps), (None,) * 12)
    assert not plan.caches
    assert torch.equal(
        sample(model, SkipCache(plan, timesteps), guidance_scale=scale), sample(model, guidance_scale=scale)
    )


def test_plans_for_other_timesteps_are_refused(tmp_path):
    timesteps = Diffusion(12).sampling_timesteps
    CachePlan(tuple(map(float, timesteps)), (None,) * 6 + ((1.0,),) * 6).save(tmp_path / "plan.json")
    sample(tiny_dit(), str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"plan\.json is for 12 steps .*; this run has 10 steps"):
        sample(tiny_dit(), str(tmp_path / "plan.json"), steps=10)
    with pytest.raises(FileNotFoundError, match=r"no plan .*none\.json"):
        parse_policy(str(tmp_path / "none.json"))


WEIGHTS = ROOT / "class-to-image/weights"
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


class Line:
    """Stands for a sampler: images that are a linear function of all weights of a plan, one of the samples far off."""

    def __init__(self):
        self.model = torch.nn.Identity()
        draw = torch.Generator().manual_seed(0)
        self.base = 1e-3 * torch.randn(3, 3, 4, 4, generator=draw) * torch.tensor([1.0, 1.0, 30.0])[:, None, None, None]
        self.columns = 1e-3 * torch.randn(5, 3, 3, 4, 4, generator=draw)

    def timesteps(self, steps):
        return list(range(steps, 0, -1))

    def images(self, steps, policy):
        weights = [w for several in getattr(policy, "weights", ()) for w in several or ()]
        yield self.base + torch.einsum("w,w...->...", torch.tensor(weights), self.columns) if weights else 0 * self.base


def test_joint_fit_is_least_squares_of_relative_errors(monkeypatch):
    monkeypatch.setattr("skipdit.planning.fitting.DAMPING", (1e-9,))
    bench = Bench(Line(), 7, 1)
    bench.reference = list(bench.sampler.images(7, CacheSpec()))
    start = widened((None, None, (0.5,), None, (1.0,), None, (0.1,)), 3)
    assert start == (None, None, (0.5,), None, (1.0, 0.0), None, (0.1, 0.0))
    fitted = fit(bench, start, rounds=1)
    now = next(bench.sampler.images(7, bench.plan(start))).flatten(1)
    scale = 1 / now.norm(dim=1, keepdim=True)
    columns = (bench.sampler.columns.flatten(2) * scale).flatten(1)
    exact = torch.linalg.lstsq(columns.T.double(), -(now * scale).flatten().double()).solution
    moved = torch.tensor([w for several in fitted for w in several or ()]) - torch.tensor([0.5, 1.0, 0.0, 0.1, 0.0])
    torch.testing.assert_close(moved.double(), exact, rtol=1e-3, atol=1e-3)
    assert bench.error(bench.plan(fitted)) < bench.error(bench.plan(start))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_moved_weights_recompute_only_what_follows(batch_size, tmp_path):
    """Runs that begin like another one are what they are without a record of it, to the last bit."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load_config(Config, tmp_path / "tiny.yaml", ["steps=6", f"batch_size={batch_size}", "sampler=ddpm"])
    bench = Bench(ImageSampler(config, 1), 6, 1)
    bench.reference = list(bench.sampler.images(6, CacheSpec()))
    start, places, calls = (None, None, (1.0,), (0.5,), None, (1.0,)), [(2, 0), (5, 0), (3, 0)], []
    handle = next(bench.model.children()).register_forward_hook(lambda *_: calls.append(1))
    runs = list(bench.nudged(start, places))
    handle.remove()
    assert len(calls) == (6 + 4 + 1 + 3) * 2 // batch_size and "forward" not in vars(bench.model)
    for run, (k, by) in zip(runs, [(2, 0.0), (2, NUDGE), (5, NUDGE), (3, NUDGE)], strict=True):
        direct = bench.changes(bench.plan(moved(start, [(k, 0)], [by])))
        assert all(torch.equal(a, b) for a, b in zip(run, direct, strict=True))
    assert len(runs[0]) == 2 // batch_size and not torch.equal(runs[1][0], runs[3][0])


def test_joint_fit_takes_nothing_that_is_worse(monkeypatch):
    monkeypatch.setattr("skipdit.planning.fitting.DAMPING", (-10.0,))  # a step the wrong way
    bench = Bench(Line(), 7, 1)
    bench.reference = list(bench.sampler.images(7, CacheSpec()))
    start = (None, None, (0.5,), None, (1.0, 0.0), None, (0.1, 0.0))
    assert fit(bench, start, rounds=1) == start


def test_comparison_with_a_plan():
    model = SimpleNamespace(flops={"full": 10.0, "cached": 1.0}, timesteps=lambda steps: list(range(steps, 0, -1)))
    plan = CachePlan((4.0, 3.0, 2.0, 1.0), (None, (), None, (1.0,)))
    rows = rows_for(4, [2], CacheSpec(2), model, [plan])
    assert [row.name for row in rows] == ["uncached", "reuse N=2", "forecast N=2", "2 steps", "a plan"]
    assert rows[-1].flops(model) == 22.0
    with pytest.raises(ValueError, match=r"--also D0\.2-o1: what it costs is not known"):
        rows_for(4, [2], CacheSpec(2), model, [parse_policy("D0.2-o1")])


def test_comparisons_check_their_plans():
    model = tiny_dit()
    about = {"model": fingerprint(model), "calibration": {"seed": 3}}
    plan = CachePlan((2.0, 1.0), (None, ()), about=about)
    sampler = SimpleNamespace(
        model=model,
        method="DDIM",
        config=SimpleNamespace(steps=2, seed=3, guidance_scale=1.0),
        timesteps=lambda steps: [float(t) for t in range(steps, 0, -1)],
    )
    with pytest.warns(UserWarning, match="a plan was calibrated on seed 3, too"):
        check_plans([plan], sampler)
    sampler.config.steps = 3
    with pytest.raises(ValueError, match="a plan is for 2 steps from 2 to 1; this run has 3 steps"):
        check_plans([plan], sampler)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line, on the embedded model with few steps; gives the plan's file."""
    config, out = tmp_path / "class-to-image" / "tiny.yaml", tmp_path / "plan.json"
    config.parent.mkdir()
    config.write_text(TINY)

    def run(*arguments: str) -> Path:
        few = ["--probes", "3", "--memory", "2", "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["plan", "--config", str(config), *arguments, *few])
        main()
        return out

    return run


def test_budget(command, capsys, tmp_path):
    plan = CachePlan.load(command("--budget", "5"))
    assert sum(weight is None for weight in plan.features) == 5
    assert f"5 of 10 steps full, {plan.about['speedup']:.2f}x fewer FLOPs" in capsys.readouterr().out
    config = load_config(Config, str(tmp_path / "class-to-image/tiny.yaml"), ["seed=10000"])
    bench = Bench(ImageSampler(config, 1), 10, 1)
    bench.reference = list(bench.sampler.images(10, CacheSpec()))
    alone = {order: bench.error(bench.plan(forecast(10, uniform(10, 5), order))) for order in (0, 1)}
    assert plan.about["errors"]["uniform, reuse"] == pytest.approx(alone[0], rel=1e-4)
    assert plan.about["errors"]["uniform, linear forecast"] == pytest.approx(alone[1], rel=1e-4)
    assert bench.error(replace(plan, about={})) <= min(alone.values())
    assert fingerprint(bench.model) == plan.about["model"]


def test_a_plan_for_other_runs_is_told(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY + f"out: {tmp_path}/out\n")
    timesteps = tuple(map(float, Diffusion(10).sampling_timesteps))
    CachePlan(timesteps, (None,) * 9 + ((1.0,),), about={"model": "abc", "sampler": "ddpm"}).save(
        tmp_path / "plan.json"
    )
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--cache", str(tmp_path / "plan.json")]
    monkeypatch.setattr("sys.argv", ["sample", *arguments])
    with pytest.warns(UserWarning, match=r"plan\.json was made for model abc, not \w+; sampler ddpm, not ddim \("):
        sample_classes()


@pytest.mark.parametrize(("budget", "branch"), [(1, 1), (2, 2), (10, 1)])
def test_extreme_budgets(command, budget, branch):
    plan = CachePlan.load(command("--budget", str(budget), "--branch", str(branch)))
    assert (plan.features.count(None), plan.branch) == (budget, branch)
    assert (plan.about["errors"]["uniform, reuse"] < 1e-6) == (budget == 10)


@pytest.mark.slow
def test_pipelines_are_planned_too(released_t2i, tmp_path, monkeypatch):
    settings = {"pipeline": str(released_t2i / "ckpts"), "prompts": ["a dog", "a cat"], "height": 64, "width": 64}
    config = sample_t2i.Config(**settings, scheduler="ddim", steps=6, guidance_scale=2.0)
    (tmp_path / "text-to-image").mkdir()
    (tmp_path / "text-to-image/tiny.yaml").write_text(to_yaml(config))
    arguments = [
        "--config",
        str(tmp_path / "text-to-image/tiny.yaml"),
        "--budget",
        "3",
        "--out",
        str(tmp_path / "p.json"),
    ]
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    main()
    plan = CachePlan.load(tmp_path / "p.json")
    errors = plan.about["errors"]
    assert plan.features.count(None) == 3 and plan.order > 0
    assert 0 < min(errors.values()) <= min(errors["uniform, linear forecast"], errors["uniform, reuse"]) < 0.5
    sampler = sample_t2i.ImageSampler(config, 1)
    assert sampler.make(6, plan).shape == (2, 3, 64, 64)
    assert len(sampler.timesteps(4)) == 4  # to ask is not to sample, which the plan would refuse


def test_speedup_and_error(command, capsys):
    fast = CachePlan.load(command("--speedup", "2"))
    assert fast.about["speedup"] >= 2
    near = CachePlan.load(command("--max-error", "0.05"))
    assert near.about["errors"][near.about["chosen"]] <= 0.05
    fewer = CachePlan.load(command("--budget", str(near.weights.count(None) - 1)))
    assert fewer.about["errors"][fewer.about["chosen"]] > 0.05
    for wrong in (["--budget", "11"], ["--speedup", "100"], ["--speedup", "0"]):
        with pytest.raises(SystemExit):
            command(*wrong)
        assert f"error: {wrong[0]} is {wrong[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget", "2", "--reach", "3"], "--reach 3 is too short for 2 full steps of 10"),
        (["--budget", "2", "--branch", "0"], "argument --branch: 0 is no number from 1 on"),
        (["--budget", "4", "guidance_low=300", "guidance_high=700"], "guidance that begins or ends within a run"),
    ],
)
def test_what_cannot_be_planned_is_refused(command, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        command(*arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class-to-image", "class-to-video", "text-to-video", "text-to-image"])
def test_shipped_plans_beat_even_forecasts(name):
    """On a sample that no plan was fitted to, and by more than the aim for the average."""
    file = ROOT / f"configs/{name}/demo.yaml"
    task, plan = find_task(str(file)), CachePlan.load(file.with_name("demo_plan.json"))
    config = load_config(task.schema, file, ["seed=0"])
    if name.startswith("class"):
        config.num_samples = 1
    else:
        config.prompts = config.prompts[:1]
    bench = Bench(task.open_sampler(config, plan.branch), config.steps, plan.branch)
    assert plan.about["model"] == fingerprint(bench.model) and plan.timesteps == bench.timesteps
    assert plan.about["chosen"] == min(plan.about["errors"], key=plan.about["errors"].get)
    assert [error > 0 for error in plan.about["step_errors"]] == [weights is not None for weights in plan.features]
    assert (plan.about["sampler"], plan.about["guidance_scale"]) == (bench.sampler.method, config.guidance_scale)
    bench.reference = list(bench.sampler.images(config.steps, CacheSpec()))
    even = bench.plan(forecast(config.steps, uniform(config.steps, plan.features.count(None)), 1))
    assert bench.error(plan) < 10 ** (-1 / 20) * bench.error(even)
