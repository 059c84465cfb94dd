"""Plans of forecasts for any diffusers pipeline."""

from typing import Any

from diffusers import DiffusionPipeline

from skipdit.caching.plans import CachePlan
from skipdit.pipelines.cache import without_cache
from skipdit.planning.calibration import BaseBench
from skipdit.planning.pipeline_bench import PipelineBench
from skipdit.planning.search import budget_of, find_plan


def plan_pipeline(
    pipe: DiffusionPipeline,
    speedup: float,
    num_inference_steps: int = 50,
    seed: int = 10_000,
    target: str | None = None,
    cost: str = "flops",
    exchanges: int = BaseBench.exchanges,
    **arguments: Any,
) -> CachePlan:
    """Plan the calls of a diffusers pipeline: which steps run the model, and what the others extrapolate from.

        plan = plan_pipeline(pipe, speedup=2, prompt=prompts, guidance_scale=3.5)
        enable_cache(pipe, plan)

    Costs about as much as 28 calls, fewer for larger speedups. The plan is for this model, scheduler and number of
    steps. A cache that the pipeline has is back when this returns.

    Args:
        speedup: of what `cost` says, against all steps full.
        seed: of the noise. Take prompts and a seed that the plan is judged on nowhere else.
        target: what the images should be: "sampler", those of the uncached call, or "converged", those that ever more
            steps tend to; None for the latter if the scheduler is deterministic.
        cost: what counts: "flops" of the transformer, or "time", the seconds of steps as measured on this device.
        exchanges: how long to search: exchanges of neighbouring steps that are tried from each start; each takes half a
            call.
        arguments: of the pipeline's call, all samples in one batch.

    Returns:
        The plan; `about["errors"]` has its error and those of other calls of the same cost.

    Raises ValueError for a scheduler whose steps cannot be planned, or a speedup that so many steps cannot have.
    """
    bench = PipelineBench(pipe, arguments, num_inference_steps, seed, target)
    bench.exchanges = exchanges
    with without_cache(pipe):
        budget = budget_of(num_inference_steps, None, speedup)
        return find_plan(bench, budget, 0.0, bench.made_for(), bench.about(), cost=cost)
