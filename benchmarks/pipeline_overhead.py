"""What a cache costs a diffusers pipeline on the host: CPU time of `enable_cache`, and of its code in a call.

    python benchmarks/pipeline_overhead.py
    python benchmarks/pipeline_overhead.py --steps 50 --spec N2-1000-0

The pipeline is a Flux of four small blocks and random weights. The time is that of finding the place among timesteps,
of copying and extrapolating what is stored, and of reading the clock. That of the model, the scheduler and the pipeline
is not in it, nor is the call of one more Python function per block of a model with cached steps.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from skipdit import disable_cache, enable_cache
from skipdit.cli import Parser, friendly_errors
from skipdit.pipelines.cache import PipelineCache
from skipdit.pipelines.costs import Costs

OWN = (
    *((PipelineCache, name) for name in ("begin", "end", "end_step", "host_timestep", "before_model")),
    (Costs, "end"),
)


def small_flux() -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline of random weights without text encoders and autoencoder, and the arguments of a call."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    texts = {"prompt_embeds": torch.randn(1, 4, 16), "pooled_prompt_embeds": torch.randn(1, 16)}
    return pipe, texts | {"height": 64, "width": 64, "output_type": "latent"}


class Clock:
    """CPU time of this thread within functions, those that they call included once."""

    def __init__(self):
        self.seconds, self._depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            began, self._depth = time.thread_time(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - began

        return timed


@contextmanager
def own_time() -> Iterator[Clock]:
    """Time the cache's own code."""
    clock = Clock()
    patches = [mock.patch.object(kind, name, clock.around(getattr(kind, name))) for kind, name in OWN]
    for patch in patches:
        patch.start()
    try:
        yield clock
    finally:
        for patch in patches:
            patch.stop()


def measure(pipe: DiffusionPipeline, call: dict[str, Any], spec: str, repeats: int) -> dict[str, float]:
    """CPU time in ms, medians of `repeats`: "enable", of `enable_cache`, and "call", of the cache within one call."""
    enabling, calls = [], []
    for _ in range(repeats):
        disable_cache(pipe)
        with own_time() as clock:
            began = time.thread_time()
            enable_cache(pipe, spec)
            enabling.append(time.thread_time() - began)
            clock.seconds = 0.0
            pipe(**call)
            calls.append(clock.seconds)
    disable_cache(pipe)
    return {"enable": 1000 * median(enabling), "call": 1000 * median(calls)}


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--spec", nargs="+", default=["N3-1000-0-b0-o1", "N2-1000-0"], help="cache specs")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pipe, call = small_flux()
    pipe(**call, num_inference_steps=2)  # warm up
    for spec in args.spec:
        found = measure(pipe, call | {"num_inference_steps": args.steps}, spec, args.repeats)
        per_step = found["call"] / args.steps
        print(
            f"{spec}: enable_cache {found['enable']:.2f} ms, per call {found['call']:.2f} ms, {per_step:.3f} ms a step"
        )


if __name__ == "__main__":
    main()
