"""Plans for diffusers pipelines, fitted while the pipelines themselves run."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    CogVideoXDPMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tests.pipelines.tiny import BUILDERS, build

from skipdit import enable_cache, plan_pipeline
from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.commands.plan import read_arguments
from skipdit.planning.command import main
from skipdit.planning.pipeline_bench import PipelineBench
from skipdit.planning.search import make_plan

KINDS = "FOFOOFOOFO"
BEGIN_LATER = {name for name in BUILDERS if "Img2Img" in name or "Inpaint" in name}
NOT_LINEAR = {"QwenImagePipeline", "Lumina2Pipeline"}  # their guidance keeps the norm of the output


def bench_of(name: str, target: str | None = None, steps: int = len(KINDS)) -> PipelineBench:
    pipe, call = build(name)
    call |= {} if name == "DiTPipeline" else {"output_type": "latent"}
    del call["num_inference_steps"]
    bench = PipelineBench(pipe, call, steps, 7, target)
    bench.calibrate()
    return bench


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in BEGIN_LATER])
def test_the_fit_runs_what_the_plan_runs(name):
    """The fit combines guided outputs, the plan those of every call of the model: images are equal."""
    bench = bench_of(name, "sampler")
    fitted = bench.fit(KINDS)
    assert fitted.plan.kinds.count("F") == KINDS.count("F") + len(bench.restarts)
    within = 1.0 if name in NOT_LINEAR else 1e-3
    assert bench.error(fitted.plan) == pytest.approx(fitted.error, rel=within)
    assert 0 < bench.error(fitted.plan) < bench.error(CacheSpec(10, branch=0))  # one full step, whose output is reused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline (2.2, two transformers)"])
@pytest.mark.parametrize("target", ["sampler", None])
def test_a_fit_that_begins_with_the_steps_of_another_is_the_same(name, target, monkeypatch):
    bench = bench_of(name, target)
    base = bench.fit(KINDS, keep=True)
    runs = []
    monkeypatch.setattr(bench, "images", lambda *args: runs.append(args) or PipelineBench.images(bench, *args))
    for kinds in ("FOFOOFOFOO", "FOFOFOOOFO", "FOFOOFOOOF", KINDS):
        alone, begun = bench.fit(kinds), bench.fit(kinds, base, keep=True)
        assert begun.plan == alone.plan and begun.error == alone.error
        assert bench.fit(kinds, begun).plan == alone.plan  # which began with another fit's steps itself
        whole, rest, least = [schedule.kinds.count("F") for schedule, *_ in runs]
        assert whole > rest >= least == 1 + len(bench.restarts)
        runs.clear()


def test_the_second_transformer_begins_with_a_full_step():
    bench = bench_of("WanPipeline (2.2, two transformers)", "sampler")
    (restart,) = bench.restarts
    plan = bench.fit("F" + "O" * 9).plan
    assert plan.kinds == "F" + "O" * (restart - 1) + "F" + "O" * (9 - restart)
    cache = enable_cache(bench.pipe, plan)
    bench.pipe(**bench.arguments, num_inference_steps=10)
    assert cache.run.counts() == {"full": 2, "cached": 0, "forecast": 8}
    assert bench.cost(plan) == bench.cost(CacheSpec(10, 1000, 0, branch=0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "DiTPipeline", "HunyuanVideoPipeline"])
def test_the_converged_run_is_where_more_steps_lead(name):
    bench = bench_of(name)
    assert bench.target == "converged"
    many = [bench.error(CacheSpec(), factor * bench.steps) for factor in (1, 2, 4, 8)]
    assert many[0] > many[1] > max(many[2:])  # the last is longer than any that the target was made of


def test_the_seed_of_a_call_is_that_of_the_bench():
    bench = bench_of("DiTPipeline", "sampler")
    alone, _ = build("DiTPipeline")
    expected = alone(
        **bench.arguments, num_inference_steps=10, generator=torch.Generator().manual_seed(7), return_dict=False
    )[0]
    assert np.array_equal(bench.images(CacheSpec(), 10), expected)
    assert bench.error(CacheSpec()) <= 1e-6


def test_noisy_schedulers_are_planned_towards_their_own_run():
    pipe, call = build("DiTPipeline")
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    bench = PipelineBench(pipe, {"class_labels": call["class_labels"]}, 6, 7)
    bench.calibrate()
    assert bench.target == "sampler"
    fitted = bench.fit("FFOFOF")
    assert bench.error(fitted.plan) == pytest.approx(fitted.error, rel=1e-3)
    with pytest.raises(ValueError, match="--target sampler"):
        PipelineBench(pipe, {"class_labels": [1]}, 6, 7, "converged").calibrate()


def test_schedulers_with_other_steps_are_refused():
    pipe, _ = build("CogVideoXPipeline")
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(
        ValueError, match="CogVideoXDPMScheduler cannot be planned for: its steps take model_output, old"
    ):
        PipelineBench(pipe, {}, 5, 7)


@pytest.mark.slow
def test_plans_of_two_transformers_cost_what_is_asked_for():
    bench = bench_of("WanPipeline (2.2, two transformers)", "sampler")
    plan, _ = make_plan(bench, 4)
    assert plan.plan.kinds.count("F") == 4 and plan.plan.kinds[bench.restarts[0]] == "F"


def test_schedulers_that_run_the_model_twice_per_step_are_refused():
    pipe, call = build("DiTPipeline")
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="makes 9 steps of 5"):
        PipelineBench(pipe, {"class_labels": call["class_labels"]}, 5, 7).calibrate()


@pytest.mark.slow
def test_plan_in_python():
    pipe, call = build("DiTPipeline")
    plan = plan_pipeline(pipe, 2, num_inference_steps=10, class_labels=[1, 2])
    assert plan.kinds.count("F") == 5
    bench = PipelineBench(pipe, {"class_labels": [1, 2]}, 10, 10_000)
    bench.calibrate()
    assert plan.about["errors"]["plan"] == pytest.approx(bench.error(plan), rel=1e-3)
    assert plan.about["errors"]["5 steps, DDIMScheduler"] == pytest.approx(bench.error(CacheSpec(), 5), rel=1e-3)
    cache = enable_cache(pipe, plan)
    pipe(**call | {"num_inference_steps": 10})
    assert cache.run.counts() == {"full": 5, "cached": 0, "forecast": 5}
    with pytest.raises(ValueError, match="this run has 9 steps"):
        pipe(**call | {"num_inference_steps": 9})
    with pytest.raises(ValueError, match="1 to 10"):
        plan_pipeline(pipe, 11, num_inference_steps=10, class_labels=[1, 2])


def test_a_cache_outlives_planning():
    pipe, call = build("DiTPipeline")
    cache = enable_cache(pipe, "N2-1000-0-b0")
    pipe(**call)
    plan_pipeline(pipe, 2, num_inference_steps=4, target="sampler", class_labels=[1])
    pipe(**call)
    assert len(cache.run.plan) == 5 and cache.run.counts()["forecast"] == 2
    with pytest.raises(ValueError, match="1 to 4"):
        plan_pipeline(pipe, 5, num_inference_steps=4, class_labels=[1])
    pipe(**call | {"num_inference_steps": 6})
    assert len(cache.run.plan) == 6


def test_a_plan_of_other_weights_warns(tmp_path):
    pipe, _ = build("DiTPipeline")
    plan = plan_pipeline(pipe, 2, num_inference_steps=4, target="sampler", class_labels=[1])
    plan.save(tmp_path / "plan.json")
    pipe.transformer.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_cache(pipe, str(tmp_path / "plan.json"))
    torch.nn.init.normal_(pipe.transformer.proj_out_2.weight)
    with pytest.warns(UserWarning, match=r"plan.json was made for other weights than this pipeline has: skipdit plan"):
        enable_cache(pipe, str(tmp_path / "plan.json"))
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_cache(pipe, str(tmp_path / "plan.json"))  # whose weights cannot be looked at


@pytest.mark.parametrize("name", ["generator", "return_dict", "sigmas", "timesteps"])
def test_arguments_that_the_plan_decides_are_refused(name):
    """With timesteps of its own, a call of fewer steps or more would be the same call."""
    pipe, call = build("FluxPipeline")
    with pytest.raises(ValueError, match=f"a plan cannot be made with {name}: leave it out"):
        plan_pipeline(pipe, 2, **call | {name: None})


@pytest.mark.filterwarnings("error:cache .* never engages")
def test_errors_do_not_depend_on_the_type_of_outputs():
    pipe, call = build("DiTPipeline")
    call |= {"num_inference_steps": 4, "target": "sampler"}
    arrays, images = (plan_pipeline(pipe, 1, **call | {"output_type": kind}) for kind in ("np", "pil"))
    assert images.kinds == "FFFF" and images.about["errors"] == arrays.about["errors"]


def test_latents_in_bfloat16_are_measured():
    pipe, call = build("FluxPipeline")
    pipe.transformer.to(torch.bfloat16)
    call = {name: x.bfloat16() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    errors = plan_pipeline(pipe, 2, target="sampler", **call).about["errors"]
    assert 0 < errors["plan"] < errors["reuse N=3, 2.50x"]


@pytest.mark.parametrize("name", ["DiTPipeline", "WanPipeline (2.2, two transformers)"])
@pytest.mark.slow
def test_costs_of_a_pipeline_are_measured(name):
    bench = bench_of(name, "sampler")
    for boundary in (0.6, 0.4):  # of two transformers, where the second one takes over
        if name.startswith("Wan"):
            bench.pipe.register_to_config(boundary_ratio=boundary)
        bench.measure()
        assert 0 < bench.costs["time"]["forecast"] < 1 and bench.costs["flops"]["forecast"] == 0
    halved = CacheSpec(2, branch=0)
    assert bench.speedup(halved) < bench.speedup(halved, "flops") == 2


@pytest.mark.slow
def test_full_steps_alone_may_be_corrected():
    """The plan is measured with its corrections, which its fit has."""
    bench = bench_of("DiTPipeline")
    fitted = bench.fit("F" * len(KINDS))
    assert any(fitted.plan.outputs) and bench.error(fitted.plan) == pytest.approx(fitted.error, rel=1e-3)


@pytest.mark.slow
def test_plan_in_python_by_time(monkeypatch):
    """On a clock that a call of the model moves by a second, and nothing else."""
    pipe, _ = build("DiTPipeline")
    now = [0.0]
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    monkeypatch.setattr("skipdit.planning.pipeline_bench.moment", lambda device: now[0])
    plan = plan_pipeline(pipe, 2, num_inference_steps=6, target="sampler", cost="time", class_labels=[1])
    assert plan.about["costs"] == {name: {"full": 1.0, "forecast": 0.0} for name in ("flops", "time")}
    assert plan.about["speedup_in_time"] == plan.about["speedup"] == 2
    with pytest.raises(ValueError, match="cost is 'money'; known: flops, time"):
        plan_pipeline(pipe, 2, cost="money", class_labels=[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved pipeline."""
    path = str(tmp_path_factory.mktemp("pipeline"))
    build("DiTPipeline")[0].save_pretrained(path)
    return path


def plan(folder: str, out, *words: str) -> None:
    main(read_arguments(["--pipeline", folder, "--speedup", "2", "--out", str(out), *words]))


def test_another_scheduler(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["--scheduler", "UniPCMultistepScheduler", "--target", "sampler", "class_labels=[0]"]
    plan(folder, out, *words, "num_inference_steps=4")
    about = json.loads(out.read_text())
    assert about["sampler"] == "UniPCMultistepScheduler" and "2 steps, UniPCMultistepScheduler" in about["errors"]
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert list(CachePlan.load(out).timesteps) == timesteps(pipe.scheduler, 4)


def timesteps(scheduler, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.slow
def test_plan_command(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    plan(folder, out, "class_labels=[0, 1, 2]", "num_inference_steps=8", "guidance_scale=2")
    told = capsys.readouterr().out
    assert "4 full, 0 cached, 4 forecast of 8 steps, 2.00x" in told and f'enable_cache(pipe, "{out}")' in told
    assert "4 steps, DDIMScheduler" in told and "other noise" in told
    assert Image.open(out.with_suffix(".png")).size == (3 * 32, 3 * 32)
    about = json.loads(out.read_text())
    assert about["calibration"] == {
        "pipeline": folder, "seed": 10_000, "class_labels": [0, 1, 2], "guidance_scale": 2
    }  # fmt: skip
    assert all(map(math.isfinite, about["errors"].values()))
    pipe = DiffusionPipeline.from_pretrained(folder)
    cache = enable_cache(pipe, str(out))
    pipe([1], num_inference_steps=8)
    assert cache.run.spec == CachePlan.load(out) and cache.run.full_steps == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to show"),
        (["class_labels"], "has no '='"),
        (["class_labels=[1]", "guidance=3"], "DiTPipeline takes no guidance; it takes class_labels, guidance_scale"),
        (["class_labels=[1]", "num_inference_steps=0"], "num_inference_steps is 0"),
        (["class_labels=[1]", "seed=x"], "seed is 'x'"),
        (["class_labels=[1]", "output_type=latent"], "output_type=latent: the images of a plan are shown"),
        (["class_labels=[1]", "--scheduler", "Euler"], "--scheduler Euler: the settings of DDIMScheduler are for DDIM"),
        (["class_labels=[1]", "--scheduler", "FlowMatchEulerDiscreteScheduler"], "--scheduler FlowMatchEuler"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        plan(folder, tmp_path / "plan.json", *words)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c"])
def test_a_pipeline_that_is_not_there_is_named(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main(read_arguments(["--pipeline", name, "--speedup", "2", "prompt=a dog"]))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert caught.value.code == 2 and line.startswith(f"error: --pipeline {name}: neither a pipeline's folder nor on")
