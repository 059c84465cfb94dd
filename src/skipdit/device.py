"""Where a process runs."""

import os

import torch
from accelerate import PartialState


def cpu_only() -> bool:
    """Whether several processes were launched on a machine without a GPU; accelerate has to be told."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()


def process_state() -> PartialState:
    """This process's rank, device and barriers, joined to the others that torchrun or accelerate launched."""
    return PartialState(cpu=cpu_only())
