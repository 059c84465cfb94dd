"""Planning: the fit against a real run and against brute force, costs in time, the command."""

import inspect
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, skipdit_command, tiny_dit

from skipdit import CacheSpec, SkipCache
from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import parse_policy
from skipdit.checkpoints.files import load_state
from skipdit.class_to_image import DiT
from skipdit.class_to_image.sample import Config, ImageSampler
from skipdit.class_to_image.sample import main as sample_classes
from skipdit.commands.plan import read_arguments
from skipdit.config import changed, load_config, to_yaml
from skipdit.diffusion.flow import FLOW_SOLVERS
from skipdit.diffusion.gaussian import Diffusion
from skipdit.diffusion.schedulers import SOLVERS
from skipdit.evaluation.compare import check_plans, rows_for
from skipdit.planning.calibration import Bench
from skipdit.planning.controls import controls
from skipdit.planning.fitting import Fit, LeastSquares, State, extrapolated
from skipdit.planning.schedules import stretched
from skipdit.sampling.class_conditional import generate
from skipdit.tasks import find_task
from skipdit.text_to_image import sample_t2i
from skipdit.utils.provenance import fingerprint
from skipdit.utils.seeding import generators

main = skipdit_command("plan")


def sample(model, cache="none", steps=12, labels=(1, 2), seed=0, **kwargs):
    noise = generators(seed, range(len(labels)), "cpu")
    return generate(model, torch.tensor(labels), noise, steps=steps, sampler="ddim", cache=cache, **kwargs)


# The fit


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


def bench(tmp_path, target="sampler", steps=8, **settings) -> Bench:
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = load_config(Config, tmp_path / "tiny.yaml", [f"{key}={value}" for key, value in settings.items()])
    made = Bench(ImageSampler(config, 1), steps, 1, target)
    made.calibrate()
    return made


@pytest.fixture
def flow_weights(tmp_path) -> str:
    """The embedded weights, as if they predicted velocities."""
    state = load_state(WEIGHTS / "fashion-skip.pt")
    torch.save({"ema": state, "config": {"flow_shift": 2.0}}, tmp_path / "flow.pt")
    return str(tmp_path / "flow.pt")


def flow(names) -> list:
    return [pytest.param(name, True, id=f"flow-{name}") for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "is_flow"), [*((name, False) for name in ("ddpm", "ddim", *SOLVERS)), *flow(FLOW_SOLVERS)]
)
def test_response_says_where_outputs_lead(sampler, is_flow, tmp_path, flow_weights):
    """Latents that another output at one step leads to, in a real run of a model that does not look at them."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    given = [f"sampler={sampler}", "guidance_scale=1", *[f"weights={flow_weights}"] * is_flow]
    it = ImageSampler(load_config(Config, tmp_path / "tiny.yaml", given), 1)
    count, seen = len(it.timesteps(6)), []
    outputs = torch.randn(count, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(changed: int | None):
        calls = iter(range(count))

        def forward(x, t, y, cache=None, conditioning=None):
            k = next(calls)
            seen.append(x)
            return outputs[k] * (1.5 if k == changed else 1.0) * torch.tensor([1.0] * 4 + [0.0] * 4)[:, None, None]

        it.model.forward = forward
        final, _ = it.latents([0, 1], 6, CacheSpec())
        states = [*seen[1:], final]
        seen.clear()
        return torch.stack(states).double()

    plain, response = run(None), it.response(6)
    for j in (0, 2, 5):
        moved = response[:, j, None, None, None, None] * 0.5 * outputs[j, :, :4].double()
        torch.testing.assert_close(run(j) - plain, moved, rtol=1e-4, atol=1e-6 * plain.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sampler", "converged"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_fit_foresees_the_run_of_its_plan(target, batch_size, tmp_path):
    """What the fit, which has no sampler, says of the images is what the sampler makes with the plan."""
    made = bench(tmp_path, target, batch_size=batch_size)
    for kinds in ("FFSOFSOO", "FOOOFOOO", "FFFFFFFF", "FSSSFSSS"):
        fitted = made.fit(kinds)
        assert fitted.plan.kinds == kinds
        assert fitted.error == pytest.approx(made.error(fitted.plan), rel=1e-2, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "is_flow"), [("ddpm", False), ("dpm", False), ("unipc3", False), *flow(["euler", "unipc"])]
)
def test_the_fit_foresees_other_samplers(sampler, is_flow, tmp_path, flow_weights):
    made = bench(tmp_path, sampler=sampler, **({"weights": flow_weights} if is_flow else {}))
    fitted = made.fit("FFSOFSOF")
    assert fitted.error == pytest.approx(made.error(fitted.plan), rel=0.1)  # ddpm: the variance is not fitted
    linear = CachePlan(made.timesteps, (None, None, (1.0,), None, None, (0.5,), None, None), 1, "FFSOFSOF")
    assert fitted.error < made.error(linear)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "sampler"), [("converged", "ddim"), ("sampler", "unipc3")])
def test_a_fit_that_begins_with_the_steps_of_another_is_the_same(target, sampler, tmp_path, monkeypatch):
    made = bench(tmp_path, target, batch_size=1, sampler=sampler)
    base, computed, compute = made.fit("FFSOFSOO", keep=True), [], Fit._compute
    monkeypatch.setattr(Fit, "_compute", lambda *args: computed.append(args) or compute(*args))
    for kinds, shared in (("FFSOSFOO", 4), ("FFSOFSOO", 7), ("FFSOFSOF", 7), ("FOSFOSOO", 1), ("FOOFOOOO", 0)):
        computed.clear()
        alone, runs = made.fit(kinds), len(computed)
        computed.clear()
        begun = made.fit(kinds, base, keep=True)
        assert begun.plan == alone.plan and begun.error == alone.error and not alone.fit
        assert len(computed) == runs - len(kinds[:shared].replace("O", "")) * len(made.own)
        assert made.fit(kinds, begun).plan == alone.plan  # which began with another fit's steps itself
        assert made.fit(kinds, alone).plan == alone.plan  # which kept none


@pytest.mark.slow
def test_full_steps_alone_are_the_uncached_run(tmp_path):
    made = bench(tmp_path)
    plan = made.fit("F" * 8).plan
    assert not plan.caches and made.error(plan) < 1e-6


@pytest.mark.slow
def test_no_single_coefficient_is_better(tmp_path):
    """Each forecast's coefficients are the best for the latents after it: any change of one is worse."""
    made = bench(tmp_path, num_samples=1)
    fit = Fit(made.sampler, made.own, made.goals, "FFSOFOFF", 1, made.response, (2, 3), correct=False)
    fit.run(keep=True)
    (own,), (goals,) = made.own, made.goals
    for k, count in ((3, 2), (5, 3)):
        state, best = fit.begun[k][0], fit.outputs[k]

        def distance(coefficients: torch.Tensor, k: int = k, state: State = state) -> float:
            """To the goal after the step, if these are the forecast's."""
            moved = state.copy()
            moved.used.append(fit._guided(extrapolated(state.outputs, coefficients), 0, k) - own.outputs[k])
            return (fit._latents(0, moved, k + 1) - goals[k]).square().sum().item()

        assert len(best) == count and len(fit.features[2]) == 1
        for change in 0.1 * torch.eye(count, dtype=best.dtype):
            assert distance(best) < min(distance(best + change), distance(best - change))


def test_least_squares_weighs_samples_by_their_own_error():
    draw = torch.Generator().manual_seed(0)
    moves = [torch.randn(6, 50, generator=draw, dtype=torch.float64) for _ in range(2)]
    truth = torch.tensor([0.5, -0.3], dtype=torch.float64)
    noise = torch.randn(6, 50, generator=draw, dtype=torch.float64) * torch.tensor([100.0, *[1e-3] * 5])[:, None]
    problem = LeastSquares()
    residual = noise - truth[0] * moves[0] - truth[1] * moves[1]
    problem.add(residual[:4], [move[:4] for move in moves])
    problem.add(residual[4:], [move[4:] for move in moves])
    assert (problem.solve() - truth).abs().max() < 0.01  # one sample, whatever its error, does not decide


def test_combinations_are_those_of_the_runtime():
    stored = [torch.tensor([float(n * n)]) for n in (3, 2, 1)]
    assert extrapolated(stored, torch.tensor([0.5, 2.0])).item() == 9 + 0.5 * 5 + 2 * 3


@pytest.mark.slow
def test_converged_images_are_those_of_many_steps(tmp_path):
    """Nearer to a run of 320 steps than the run of 32 of which they are extrapolated."""
    made = bench(tmp_path, "converged", steps=8, seed=3)
    many, _ = made.sampler.latents([0, 1], made.sampler.refined(8, 40), CacheSpec())
    (own,), (goals,) = made.own, made.goals
    longest, _ = made.sampler.latents([0, 1], made.sampler.refined(8, 4), CacheSpec())
    far = [(each.double() - many.double()).square().mean() for each in (own.latents[-1], longest, goals[-1])]
    assert far[2] < 0.5 * far[1] < far[0]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "dpm"])
def test_flow_matching_has_a_converged_run(sampler, tmp_path, flow_weights):
    made = bench(tmp_path, "converged", steps=6, sampler=sampler, weights=flow_weights)
    many, _ = made.sampler.latents([0, 1], 96, CacheSpec())
    (own,), (goals,) = made.own, made.goals
    far = [(each.double() - many.double()).square().mean() for each in (own.latents[-1], goals[-1])]
    assert far[1] < 0.2 * far[0]
    assert made.fit("FFSOFF").error < 0.1
    assert {each.method for each in controls(made, made.cost(CacheSpec(2)))} >= {"heun", "unipc"} - {sampler}


def test_stochastic_samplers_have_no_converged_run(tmp_path):
    with pytest.raises(ValueError, match="no converged run of ddpm with 8 steps: it is stochastic"):
        bench(tmp_path, "converged", sampler="ddpm")


@pytest.mark.slow
def test_controls_cost_what_the_plan_does(tmp_path):
    made = bench(tmp_path, steps=10)
    rows = {row.name: row for row in controls(made, made.cost(CacheSpec(2)))}
    fewer = round(made.cost(CacheSpec(2)))
    assert {f"{fewer} steps, {method}" for method in ("ddim", "dpm", "unipc3", "deis")} < set(rows)
    assert rows["reuse N=2, 1.71x"].spec == CacheSpec(2) and rows["10 steps, ddim, uncached"].spec == CacheSpec()
    solved = rows[f"{fewer} steps, deis"]
    assert made.error(*solved[1:]) > 0
    assert made.sampler.method == "ddim"  # as before


# Costs in time


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but in calls of DiT: how many seconds those of each kind take is given."""
    forward, now, each = DiT.forward, [0.0], {}

    @wraps(forward)
    def timed(*args, **kwargs):
        step = inspect.signature(forward).bind(*args, **kwargs).arguments.get("cache")
        kind = "full" if step is None or step.may_be_full else "cached" if step.forecast is None else "forecast"
        now[0] += each.get(kind, 0.0)
        return forward(*args, **kwargs)

    monkeypatch.setattr(DiT, "forward", timed)
    monkeypatch.setattr("skipdit.planning.calibration.moment", lambda device: now[0])
    return each.update


@pytest.mark.slow
def test_costs_are_measured(tmp_path, clock):
    made = bench(tmp_path, steps=10)
    in_flops = made.cost(CacheSpec(2))
    clock({"full": 2.0, "cached": 1.0, "forecast": 0.1})
    made.measure()
    assert made.seconds == pytest.approx({"full": 2.0, "cached": 1.0, "forecast": 0.1})
    assert made.costs["time"] == pytest.approx({"full": 1.0, "cached": 0.5, "forecast": 0.05})
    assert made.cost(CacheSpec(2)) == pytest.approx(7.5) and made.speedup(CacheSpec(2)) == pytest.approx(10 / 7.5)
    assert made.cost(CacheSpec(2), "flops") == in_flops == pytest.approx(5 + 5 * 0.168, rel=1e-2)
    rows = {row.name: row for row in controls(made, made.cost(CacheSpec(2)))}  # they follow
    assert "8 steps, ddim" in rows and rows["reuse N=2, 1.33x"].spec == CacheSpec(2)


@pytest.mark.slow
def test_without_a_branch_no_cached_step_is_measured(tmp_path, clock):
    (tmp_path / "tiny.yaml").write_text(TINY)
    made = Bench(ImageSampler(load_config(Config, tmp_path / "tiny.yaml"), 0), 10, 0)
    clock({"full": 2.0, "forecast": 0.1})
    made.measure()
    assert made.costs == {"flops": {"full": 1.0, "forecast": 0.0}, "time": pytest.approx({"full": 1, "forecast": 0.05})}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class-to-image", "class-to-video", "text-to-video", "text-to-image"])
def test_costs_of_every_task(name, monkeypatch):
    """By the real clock. How much less a cached step takes depends on the machine."""
    monkeypatch.setattr("skipdit.planning.calibration.ROUNDS", 2)
    file = ROOT / f"configs/{name}/demo.yaml"
    task = find_task(str(file))
    config = load_config(task.schema, file)
    config = changed(config, {"num_samples": 1} if name.startswith("class") else {"prompts": config.prompts[:1]})
    made = Bench(task.open_sampler(config, 1), config.steps, 1)
    made.measure()
    assert 0 < made.costs["time"]["forecast"] < made.costs["time"]["cached"] < 1 == made.costs["time"]["full"]


# The command


BRIEF = ("--exchanges", "2")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line, on the embedded model with few steps; gives the plan's file."""
    config, out = tmp_path / "class-to-image" / "tiny.yaml", tmp_path / "plan.json"
    config.parent.mkdir()
    config.write_text(TINY)

    def run(*arguments: str) -> Path:
        monkeypatch.setattr("sys.argv", ["plan", "--config", str(config), *arguments, "--out", str(out)])
        main()
        return out

    return run


@pytest.mark.slow
def test_budget(command, capsys):
    plan = CachePlan.load(command("--budget", "5", *BRIEF))
    cost = plan.kinds.count("F") + plan.kinds.count("S") * 0.168
    assert cost <= 5.01 and plan.about["speedup"] == pytest.approx(10 / cost, rel=1e-2) and plan.about["speedup"] >= 2
    told, errors = capsys.readouterr().out, plan.about["errors"]
    assert f"of 10 steps, {plan.about['speedup']:.2f}x fewer FLOPs" in told and "distance to the converged" in told
    fitted = min(errors["forecasts alone, fitted"], errors["cached steps alone, fitted"])
    assert errors["plan"] <= 1.0001 * fitted  # one is measured by the sampler, the others in the fit
    assert all(name in told for name in errors) and plan.about["target"] == "converged"
    assert {f"5 steps, {method}" for method in ("ddim", "dpm3", "deis")} < set(errors)


@pytest.mark.slow
def test_speedup_and_error(command, capsys):
    fast = CachePlan.load(command("--speedup", "2", "--target", "sampler", *BRIEF))
    assert fast.about["speedup"] >= 2 and fast.about["target"] == "sampler"
    near = CachePlan.load(command("--max-error", "0.05", "--branch", "0", *BRIEF))
    assert near.about["errors"]["plan"] <= 0.05 and "S" not in near.kinds
    capsys.readouterr()
    command("--max-error", "1e-9", "--target", "converged", *BRIEF)
    assert "Not even all steps reach an error of 1e-09" in capsys.readouterr().out


def test_a_search_is_as_long_as_it_is_asked_to_be(command, monkeypatch):
    asked = []

    def find(bench: Bench, *args) -> CachePlan:
        asked.append(bench.exchanges)
        return CachePlan.load(WEIGHTS.parents[1] / "configs/class-to-image/demo_plan.json")

    monkeypatch.setattr("skipdit.planning.command.find_plan", find)
    for words in ((), ("--exchanges", "7")):
        command("--budget", "4", *words)
    assert asked == [30, 7]


@pytest.mark.slow
def test_like_another_plan(command, capsys, tmp_path):
    """Its schedule, fitted to other steps in one run; and to its own steps the plan itself."""
    first = command("--budget", "5", *BRIEF)
    plan = CachePlan.load(first)
    again = tmp_path / "first.json"
    again.write_bytes(first.read_bytes())
    same = CachePlan.load(command("--like", str(again)))
    assert (same.kinds, same.features, same.outputs) == (plan.kinds, plan.features, plan.outputs)
    shorter = CachePlan.load(command("--like", str(again), "steps=6"))
    assert shorter.kinds == stretched(plan.kinds, 6) and len(shorter.timesteps) == 6
    assert (
        "6 steps, ddim, uncached" in shorter.about["errors"]
        and "schedules fitted" not in capsys.readouterr().err[-2000:]
    )


@pytest.mark.slow
def test_a_schedule_of_another_branch_is_refused(command, capsys, tmp_path):
    plan = tmp_path / "other.json"
    plan.write_bytes((ROOT / "benchmarks/plans/12-blocks-13.json").read_bytes())
    with pytest.raises(SystemExit):
        command("--like", str(plan), "--branch", "2")
    assert "its cached steps run the branch 1; this wants --branch 1" in capsys.readouterr().err


@pytest.mark.slow
def test_planning_by_time(command, capsys, tmp_path, clock):
    """On a clock where a cached step takes 0.6 times as long as a full one, and a forecast a tenth."""
    clock({"full": 2.0, "cached": 1.2, "forecast": 0.2})
    timesteps, kinds = tuple(map(float, Diffusion(6).sampling_timesteps)), "FFSOSO"
    CachePlan(timesteps, tuple(() if kind == "S" else None for kind in kinds), 1, kinds).save(tmp_path / "like.json")
    given = ["--like", str(tmp_path / "like.json"), "--target", "sampler", "steps=6"]
    timed = CachePlan.load(command(*given, "--cost", "time"))
    told, about = capsys.readouterr().out, timed.about
    assert about["costs"]["time"] == pytest.approx({"full": 1.0, "cached": 0.6, "forecast": 0.1})
    assert about["costs"]["flops"] == pytest.approx({"full": 1.0, "cached": 0.168, "forecast": 0.0}, rel=1e-2)
    assert about["seconds_per_step"] == pytest.approx({"full": 2.0, "cached": 1.2, "forecast": 0.2})
    assert about["speedup_in_time"] == pytest.approx(6 / 3.4) and about["speedup"] == pytest.approx(6 / 2.336, rel=1e-2)
    assert "6 steps, 2.57x fewer FLOPs, 1.76x faster by the measured steps" in told
    assert "cached      1.2000  0.600  0.168" in told and "forecast    0.2000  0.100  0.000" in told
    assert "3 steps, ddim" in about["errors"]  # as many as take that long
    plain = CachePlan.load(command(*given))
    assert not {"costs", "speedup_in_time"} & set(plain.about) and "measured" not in capsys.readouterr().out
    assert "2 steps, ddim" in plain.about["errors"] and plain.about["speedup"] == about["speedup"]


def test_what_a_speedup_counts_is_told(capsys):
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--cost {flops,time}" in told and "seconds of its steps on this device" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget", "11"], "--budget is 11.0 full steps; a run of 10 has 1 to 10"),
        (["--speedup", "100"], "--speedup is 100; with 10 steps, 1 to 10 is possible"),
        (["--speedup", "0"], "--speedup is 0"),
        (["--max-error", "0"], "--max-error is 0"),
        (
            ["--budget", "4", "--prompts", "mine.txt"],
            "--prompts is for --pipeline; a config has a setting: prompt_file=FILE",
        ),
        (["--budget", "4", "--dtype", "float32"], "--dtype is for --pipeline; a config has a setting: dtype=float32"),
        (["--budget", "4", "guidance_low=300", "guidance_high=700"], "guidance that begins or ends within a run"),
        (["--budget", "4", "guidance_low=300", "num_samples=1"], "guidance that begins or ends within a run"),
        (["--budget", "4", "guidance_high=700", "num_samples=1"], "guidance that begins or ends within a run"),
        (["--budget", "4", "--target", "converged", "sampler=ddpm"], "no converged run of ddpm"),
    ],
)
def test_what_cannot_be_planned_is_refused(command, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        command(*arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "is_flow"), [("ddim", False), *flow(["euler", "unipc"])])
def test_pipelines_are_planned_too(released_t2i, tmp_path, monkeypatch, scheduler, is_flow):
    settings = {"pipeline": str(released_t2i / "ckpts"), "prompts": ["a dog", "a cat"], "height": 64, "width": 64}
    if is_flow:
        state = load_state(released_t2i / "ckpts/t2i/model/pytorch_model_ema.pt")
        torch.save({"ema": state, "config": {"flow_shift": 2.0}}, tmp_path / "flow.pt")
        settings["weights"] = str(tmp_path / "flow.pt")
    config = sample_t2i.Config(**settings, scheduler=scheduler, steps=5, guidance_scale=2.0)
    (tmp_path / "text-to-image").mkdir()
    (tmp_path / "text-to-image/tiny.yaml").write_text(to_yaml(config))
    file, out = str(tmp_path / "text-to-image/tiny.yaml"), str(tmp_path / "p.json")
    monkeypatch.setattr("sys.argv", ["plan", "--config", file, "--budget", "3", "--out", out])
    main()
    plan = CachePlan.load(out)
    assert plan.about["speedup"] >= 5 / 3 and plan.about["errors"]["plan"] < 0.5
    sampler = sample_t2i.ImageSampler(config, 1)
    assert sampler.make(5, plan).shape == (2, 3, 64, 64)
    assert len(sampler.timesteps(4)) == 4  # to ask is not to sample, which the plan would refuse


@pytest.mark.slow
def test_the_fit_foresees_text_to_video():
    """Whose prompts are batches of their own, and whose latents have another layout in the model."""
    file = ROOT / "configs/text-to-video/demo.yaml"
    task = find_task(str(file))
    config = load_config(task.schema, file, ["prompts=[fish, crab]", "steps=5"])
    made = Bench(task.open_sampler(config, 1), 5, 1, "converged")
    made.calibrate()
    fitted = made.fit("FFSOS")
    assert len(made.batches) == 2 and fitted.error == pytest.approx(made.error(fitted.plan), rel=2e-2)


# Plans of other runs


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


def test_comparison_with_a_plan():
    model = SimpleNamespace(flops={"full": 10.0, "cached": 1.0}, timesteps=lambda steps: list(range(steps, 0, -1)))
    plan = CachePlan((4.0, 3.0, 2.0, 1.0), (None, (), None, (1.0,)))
    rows = rows_for(4, [2], CacheSpec(2), model, [plan])
    assert [row.name for row in rows] == ["uncached", "reuse N=2", "extrapolate N=2", "2 steps", "a plan"]
    assert rows[-1].flops(model) == 22.0
    with pytest.raises(ValueError, match=r"--also D0\.2-o1: what it costs is not known"):
        rows_for(4, [2], CacheSpec(2), model, [parse_policy("D0.2-o1")])
    with pytest.raises(ValueError, match=r"--also N2-1000-0-b2: its branch is 2, of the others 1: see --branch"):
        rows_for(4, [2], CacheSpec(2), model, [parse_policy("N2-1000-0-b2")])
    forecasts = rows_for(4, [2], CacheSpec(2, branch=2), model, [parse_policy("N2-1000-0-b0-o1")])[-1]
    assert forecasts.flops(model) == 20.0  # two of the four steps run nothing


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class-to-image", "class-to-video", "text-to-video", "text-to-image"])
def test_shipped_plans_beat_even_extrapolation(name):
    """On a sample that no plan was fitted to, by more than 1 dB."""
    file = ROOT / f"configs/{name}/demo.yaml"
    task, plan = find_task(str(file)), CachePlan.load(file.with_name("demo_plan.json"))
    config = load_config(task.schema, file, ["seed=0"])
    if name.startswith("class"):
        config = changed(config, {"num_samples": 1})
    else:
        config = changed(config, {"prompts": config.prompts[:1]})
    bench = Bench(task.open_sampler(config, plan.branch), config.steps, plan.branch)
    bench.calibrate()
    assert plan.about["model"] == fingerprint(bench.model) and plan.timesteps == bench.timesteps
    assert (plan.about["sampler"], plan.about["guidance_scale"]) == (bench.sampler.method, config.guidance_scale)
    even = min((CacheSpec(n, order=1) for n in range(2, 9)), key=lambda spec: abs(bench.cost(spec) - bench.cost(plan)))
    assert bench.error(plan) < 10 ** (-1 / 20) * bench.error(even)
