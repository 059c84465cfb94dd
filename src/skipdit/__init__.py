"""Skip-DiT and Skip-Cache: diffusion transformers with long skip connections, and the feature cache they allow."""

from importlib import import_module

from skipdit.caching import CachePolicy, CacheSpec, SkipCache, parse_policy

__all__ = [
    "CachePolicy",
    "CacheSpec",
    "SkipCache",
    "disable_cache",
    "enable_cache",
    "load_weights",
    "parse_policy",
]
__version__ = "0.1.0"

# Imported when first asked for: diffusers takes seconds.
_LATER = {
    "load_weights": "checkpoints.loading",
    "enable_cache": "pipelines.cache",
    "disable_cache": "pipelines.cache",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"skipdit.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
