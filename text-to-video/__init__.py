"""Text-to-video: Skip-DiT on Latte T2V, conditioned on a prompt."""

from skipdit.text_to_video.model import LatteT2V

__all__ = ["LatteT2V"]
