"""Skip-Cache: which sampling steps run every layer, and what the others see in their place."""

from skipdit.caching.policies import CachePlan, CachePolicy, CacheSpec, DriftSpec, parse_policy
from skipdit.caching.runtime import SkipCache
from skipdit.caching.steps import CacheStep

__all__ = ["CachePlan", "CachePolicy", "CacheSpec", "CacheStep", "DriftSpec", "SkipCache", "parse_policy"]
