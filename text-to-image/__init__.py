"""Text-to-image: Hunyuan-DiT, whose long skips are its own, conditioned on a prompt in Chinese or English."""

from skipdit.text_to_image.model import HunyuanDiT

__all__ = ["HunyuanDiT"]
