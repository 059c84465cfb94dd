"""Text-to-video: Skip-DiT on Latte T2V, conditioned on a prompt."""

from skipdit.utils.lazy import lazy_names

__all__ = ["LatteT2V"]
__getattr__ = lazy_names(__name__, {"LatteT2V": "text_to_video.model"})
