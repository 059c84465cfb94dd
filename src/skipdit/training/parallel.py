"""Sharding a model over processes (FSDP2), and peak memory."""

import copy
import sys
from contextlib import nullcontext

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


def _shard(model: nn.Module, precision: str) -> nn.Module:
    """Shard a model over all processes, block by block (FSDP2)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = torch.bfloat16 if precision == "bf16" else None
    # Autocast is on around the loss: inputs and the residual stream stay float32, as without sharding.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def _gather(sharded: nn.Module, blueprint: nn.Module, device: torch.device) -> nn.Module | None:
    """An unsharded copy of a sharded model. Every process calls it; the main one gets the copy, the others None."""
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    model = copy.deepcopy(blueprint).to_empty(device=device)
    model.load_state_dict(state)
    return model


def _synchronise(accelerator: Accelerator, model: nn.Module, last: bool):
    """Gradients are exchanged between processes only in the last micro-batch of a step."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def peak_memory() -> int:
    """Largest memory so far in bytes: the GPU's, or without one this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
