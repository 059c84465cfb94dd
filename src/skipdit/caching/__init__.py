"""Skip-Cache: which sampling steps run every layer, and what the others see in their place."""

from skipdit.utils.lazy import lazy_names

__all__ = ["CachePlan", "CachePolicy", "CacheSpec", "CacheStep", "DriftSpec", "SkipCache", "parse_policy"]
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(__all__, "caching.policies") | {"SkipCache": "caching.runtime", "CacheStep": "caching.steps"},
)
