"""Where a process runs."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor


def cpu_only() -> bool:
    """Whether several processes were launched on a machine without a GPU; accelerate has to be told."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()


def double(x: Tensor) -> Tensor:
    """In float64; of an Apple GPU, which has none, on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def process_state() -> PartialState:
    """This process's rank, device and barriers, joined to the others that torchrun or accelerate launched.

    Processes wait a day for each other: one may have hours of sampling left when another is done.
    """
    return PartialState(cpu=cpu_only(), timeout=timedelta(days=1))
