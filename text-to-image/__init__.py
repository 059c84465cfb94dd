"""Text-to-image: Hunyuan-DiT, whose long skips are its own, conditioned on a prompt in Chinese or English."""

from skipdit.utils.lazy import lazy_names

__all__ = ["HunyuanDiT"]
__getattr__ = lazy_names(__name__, {"HunyuanDiT": "text_to_image.model"})
