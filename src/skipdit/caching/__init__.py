"""Skip-Cache: which sampling steps run every layer, and what the others see in their place."""

from skipdit.caching.policies import CachePlan, CacheSpec, DriftSpec, Policy
from skipdit.caching.runtime import CacheStep, SkipCache

__all__ = ["CachePlan", "CacheSpec", "CacheStep", "DriftSpec", "Policy", "SkipCache"]
