"""Class-to-image: Skip-DiT on latents of images, conditioned on a class."""

from skipdit.utils.lazy import lazy_names

__all__ = ["DiT"]
__getattr__ = lazy_names(__name__, {"DiT": "class_to_image.model"})
