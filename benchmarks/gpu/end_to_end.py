"""Whole sampling runs: 50 DDIM steps with guidance, uncached and with the released windows."""

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.bench import Bench, form_of
from gpu.latency import compile_steps
from gpu.models import Case
from gpu.plan import Row
from skipdit.caching.runtime import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.layers.flops import run_flops
from skipdit.layers.skip import SkipTransformer, predicted_noise
from skipdit.sampling.report import step_counts

SECTION = "end-to-end"
INTERVALS = (2, 3, 4)
GUIDANCE = 4.0
LONG = 3.0  # seconds; runs that take longer are timed once


def row(case: Case, batch: int, dtype: str, mode: str, **expected: float) -> Row:
    """The row of one model and mode. `expected`: seconds, as `Row` has them."""
    settings = {"case": case, "batch": batch, "dtype": dtype, "mode": mode}
    form = form_of(**settings)
    compile = partial(compile_steps, **settings) if form else None
    measure = partial(measure_runs, **settings)
    return Row(SECTION, f"{case.name} | {batch} | {dtype} | {mode}", measure, form=form, compile=compile, **expected)


class Uncached(SkipCache):
    """A run without cached steps whose calls are those of full steps in a cached run: one compiled form serves both."""

    def __init__(self, branch: int, timesteps: list[float]):
        super().__init__("none", timesteps)
        self.branch = branch

    def at(self, i: int, stream: str = "default") -> CacheStep:
        return CacheStep(self.branch, None)


def measure_runs(bench: Bench, case: Case, batch: int, dtype: str, mode: str) -> dict[str, Any]:
    """Seconds per sample of uncached and cached runs, and their speedup beside that in FLOPs."""
    model = bench.open(case, dtype, mode, batch)
    sample = (_ClassRun if case.has_classes else _TextRun)(case, model, batch, mode == "graphs")
    flops, before, result = bench.flops(case, case.branches[0]), bench.compiled(), {}
    sample(case.window.format(2), 4)  # compiles and records what is not there yet
    sample(case.window.format(2), 8)
    for spec in ("none", *(case.window.format(interval) for interval in INTERVALS)):
        bench.reset_peak()
        times = [bench.seconds(lambda spec=spec: sample(spec, case.steps))]
        if times[0] < LONG and not bench.tiny:
            times += [bench.seconds(lambda spec=spec: sample(spec, case.steps)) for _ in range(2)]
        cache = sample.cache
        result[spec] = {
            "seconds_per_sample": statistics.median(times) / batch,
            **step_counts(cache),
            "flops_speedup": case.steps * flops["full"] / run_flops(cache, flops),
            "peak_bytes": bench.peak(),
            "cache_bytes": cache.peak_bytes,
            "finite": sample.finite,
        }
        result[spec]["speedup"] = result["none"]["seconds_per_sample"] / result[spec]["seconds_per_sample"]
    about = {"model": case.name, "batch": batch, "dtype": dtype, "mode": mode, "steps": case.steps}
    compiled = {key: count - before[key] for key, count in bench.compiled().items()}
    return about | {"runs": result, "compiled": compiled}


class _Run:
    """A sampling run of a model.

    Attributes:
        cache: of the newest run.
        finite: whether its latents stayed so.
    """

    cache: SkipCache
    finite: bool

    def __init__(self, case: Case, model: SkipTransformer, batch: int, graphs: bool):
        self.case, self.model, self.batch, self.graphs = case, model, batch, graphs

    def _cache(self, spec: str, timesteps: list[float]) -> SkipCache:
        branch = self.case.branches[0]
        return Uncached(branch, timesteps) if spec == "none" else SkipCache(spec, timesteps)


class _ClassRun(_Run):
    """A run of DiT or Latte, by `class_sample.generate`."""

    def __call__(self, spec: str, steps: int) -> None:
        from skipdit.diffusion.gaussian import Diffusion
        from skipdit.sampling.class_conditional import generate
        from skipdit.utils.seeding import generators

        model, self.cache = self.model, self._cache(spec, Diffusion(steps).sampling_timesteps)
        labels = torch.arange(self.batch, device=model.device) % model.null_class
        noise = generators(0, list(range(self.batch)), model.device)
        settings = {"steps": steps, "sampler": "ddim", "guidance_scale": GUIDANCE, "cache": self.cache}
        channels = 3 if self.case.kind == "DiT" else None
        try:
            generate(model, labels, noise, guidance_channels=channels, **settings)
            self.finite = True
        except FloatingPointError:  # told after the last step; the time counts all the same
            self.finite = False


class _TextRun(_Run):
    """A run of Latte T2V or Hunyuan-DiT, by a diffusers scheduler, with random texts whose keys are computed once."""

    def __init__(self, case: Case, model: SkipTransformer, batch: int, graphs: bool):
        super().__init__(case, model, batch, graphs)
        with torch.no_grad():
            inputs = model.random_inputs(2 * batch)
        self.shape, self.device = inputs.pop("hidden_states").shape[1:], model.device
        self.inputs = {name: value for name, value in inputs.items() if name != "timestep"}

    @torch.no_grad()
    def __call__(self, spec: str, steps: int) -> None:
        scheduler = _scheduler(self.case)
        scheduler.set_timesteps(steps)  # on the CPU, where it looks up its tables by them
        timesteps = scheduler.timesteps
        self.cache = self._cache(spec, timesteps.tolist())
        rows = timesteps.to(self.device)[:, None].repeat(1, 2 * self.batch)
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(self.batch, *self.shape, generator=generator, device=self.device).to(self.model.dtype)
        for i, t in enumerate(timesteps):
            conditional, unconditional = self._noise(torch.cat([x, x]), rows[i], i).chunk(2)
            x = scheduler.step(torch.lerp(unconditional, conditional, GUIDANCE), t, x).prev_sample
        self.finite = bool(x.isfinite().all())
        self.cache.clear()

    def _noise(self, x: Tensor, t: Tensor, i: int) -> Tensor:
        """The model's prediction at step i, of the shape of x."""
        step = self.cache.at(i)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        out = self.model(cache=step, hidden_states=x, timestep=t, **self.inputs, return_dict=False)[0]
        return predicted_noise(out, x)


def _scheduler(case: Case) -> Any:
    """The DDIM scheduler of a task. Its numbers do not change the time, but for what the model predicts."""
    from skipdit.sampling.text_conditional import make_scheduler

    predicts = "v_prediction" if case.kind == "HunyuanDiT" else "epsilon"
    return make_scheduler("ddim", {"prediction_type": predicts, "clip_sample": False})
