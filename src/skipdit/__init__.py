"""Skip-DiT and Skip-Cache: diffusion transformers with long skip connections, and the feature cache they allow."""

from skipdit import _moved
from skipdit.utils.lazy import lazy_names

__version__ = "0.2.0"

_PLACES = {  # public name -> its module
    "CachePolicy": "caching.policy",
    "CacheSpec": "caching.policies",
    "SkipCache": "caching.runtime",
    "parse_policy": "caching.policies",
    "load_weights": "checkpoints.loading",
    "enable_cache": "pipelines.cache",
    "disable_cache": "pipelines.cache",
    "add_long_skips": "pipelines.skips",
    "with_long_skips": "pipelines.skips",
    "plan_pipeline": "planning.pipelines",
    "DiT": "class_to_image.model",
    "Latte": "class_to_video.model",
    "LatteT2V": "text_to_video.model",
    "HunyuanDiT": "text_to_image.model",
}
__all__ = list(_PLACES)
__getattr__ = lazy_names(__name__, _PLACES)

_moved.install()
