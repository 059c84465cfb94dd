"""Skip-DiT and Skip-Cache: diffusion transformers with long skip connections, and the feature cache they allow."""

from importlib import import_module

from skipdit.cache import CacheSpec, SkipCache

__all__ = ["CacheSpec", "SkipCache", "disable_cache", "enable_cache", "load_weights"]
__version__ = "0.1.0"

# Imported when first asked for: `python -m skipdit.weights` must not find it imported, and diffusers takes seconds.
_LATER = {"load_weights": "weights", "enable_cache": "pipeline", "disable_cache": "pipeline"}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"skipdit.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
