"""Rows of a comparison: ways to sample, and what they cost."""

from contextlib import nullcontext
from typing import NamedTuple

from skipdit.caching.policy import CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.layers.flops import run_flops
from skipdit.sampling.sampler import Sampler


class Row(NamedTuple):
    """One way to sample.

    Attributes:
        method: the sampler's, if it is another.
    """

    name: str
    spec: CachePolicy
    steps: int
    method: str | None = None

    def cache(self, sampler: Sampler) -> SkipCache:
        """Return the cache of a run."""
        with sampler.using(self.method) if self.method else nullcontext():
            return SkipCache(self.spec, sampler.timesteps(self.steps))

    def flops(self, sampler: Sampler) -> float:
        """Return the FLOPs of a run, per sample."""
        return run_flops(self.cache(sampler), sampler.flops)
