"""Skip-Cache: which sampling steps run every layer, and what the others see in their place."""

from typing import TYPE_CHECKING

from skipdit.utils.lazy import lazy_names

if TYPE_CHECKING:
    from skipdit.caching.plans import CachePlan
    from skipdit.caching.policies import CacheSpec, DriftSpec, parse_policy
    from skipdit.caching.policy import CachePolicy
    from skipdit.caching.runtime import SkipCache
    from skipdit.caching.steps import CacheStep

__all__ = ["CachePlan", "CachePolicy", "CacheSpec", "CacheStep", "DriftSpec", "SkipCache", "parse_policy"]
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(__all__, "caching.policies")
    | {
        "CachePlan": "caching.plans",
        "CachePolicy": "caching.policy",
        "SkipCache": "caching.runtime",
        "CacheStep": "caching.steps",
    },
)
