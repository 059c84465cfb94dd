"""Class-to-video: Skip-DiT (Latte) on latents of clips, unconditional or conditioned on a class."""

from skipdit.utils.lazy import lazy_names

__all__ = ["Latte"]
__getattr__ = lazy_names(__name__, {"Latte": "class_to_video.model"})
