"""Class-to-image: Skip-DiT on latents of images, conditioned on a class."""

from skipdit.class_to_image.model import DiT

__all__ = ["DiT"]
