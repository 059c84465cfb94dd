"""Skip-DiT and Skip-Cache: diffusion transformers with long skip connections, and the feature cache they allow."""

from skipdit.cache import CacheSpec, SkipCache

__all__ = ["CacheSpec", "SkipCache"]
__version__ = "0.1.0"
