"""Skip-DiT and Skip-Cache: diffusion transformers with long skip connections, and the feature cache they allow."""

from skipdit.cache import CacheSpec, SkipCache

__all__ = ["CacheSpec", "SkipCache", "load_weights"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_weights`, imported when it is first asked for: `python -m skipdit.weights` must not find it imported."""
    if name == "load_weights":
        from skipdit.weights import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
