"""Skip-DiT and Skip-Cache: diffusion transformers with long skip connections, and the feature cache they allow."""

from importlib import import_module
from typing import Any

from skipdit import _moved

__version__ = "0.1.0"

_PLACES = {  # public name -> its module, imported when first asked for: torch and diffusers take seconds
    "CachePolicy": "caching",
    "CacheSpec": "caching",
    "SkipCache": "caching",
    "parse_policy": "caching",
    "load_weights": "checkpoints.loading",
    "enable_cache": "pipelines.cache",
    "disable_cache": "pipelines.cache",
    "DiT": "class_to_image",
    "Latte": "class_to_video",
    "LatteT2V": "text_to_video",
    "HunyuanDiT": "text_to_image",
}
__all__ = list(_PLACES)

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"skipdit.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
