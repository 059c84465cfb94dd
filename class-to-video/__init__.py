"""Class-to-video: Skip-DiT (Latte) on latents of clips, unconditional or conditioned on a class."""

from skipdit.class_to_video.model import Latte

__all__ = ["Latte"]
