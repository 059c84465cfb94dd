"""Schedulers of diffusers by the names that settings have. Nothing heavy is imported before one is made."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # class, and settings of its own
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "deis3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmms": ("DPMSolverMultistepScheduler", {}),  # Hunyuan-DiT's name for it
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc3": ("UniPCMultistepScheduler", {"solver_order": 3}),
}
SOLVERS = ("dpm", "dpm3", "unipc", "unipc3", "deis", "deis3")  # those of several steps, without noise of their own


def make_gaussian_scheduler(name: str, settings: Mapping[str, Any]) -> "SchedulerMixin":
    """Make a scheduler of `SCHEDULERS`, for models of noise or v, with those of the settings that it knows."""
    import diffusers

    kind, own = SCHEDULERS[name]
    known = set(inspect.signature(getattr(diffusers, kind).__init__).parameters)
    return getattr(diffusers, kind)(**{key: value for key, value in {**settings, **own}.items() if key in known})
