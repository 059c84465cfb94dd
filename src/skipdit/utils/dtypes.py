"""Precision of a model, by setting and device."""

import torch

from skipdit.utils.errors import UserError


def resolve_dtype(name: str, device: torch.device, released: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype that a setting names. Raises ValueError for an unknown name.

    Args:
        name: "auto" is bfloat16 on GPUs that have it, else float32.
        released: what a released model was published to run in, which "auto" is on any GPU then.
    """
    if name == "auto" and released is not None and device.type == "cuda":
        return released
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(f"dtype is {name!r}; known: auto, {', '.join(known)}")
    return known[name]
