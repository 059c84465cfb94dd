"""Where a process runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

from skipdit.utils.errors import UserError

# Variables by which accelerate's launcher and its config file say how to train. Ours is the one config of a training.
_ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
_PLACES = {  # they say where to run, and change no number
    *("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY"),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL"),
}
_FOREIGN = {  # ways to train that a run here would not follow
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "accelerate's own sharding",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's device meshes",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "SageMaker's own parallelism",
}
_SETTINGS = {  # what of the config counts instead
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "micro_batch_size",
    "ACCELERATE_MIXED_PRECISION": "precision",
    "ACCELERATE_DYNAMO_BACKEND": "compile",
    "ACCELERATE_GRADIENT_CLIPPING": "grad_clip",
}
_NOTHING = ("", "0", "1", "false", "no", "n", "f", "off", "none", "auto")  # values that ask for nothing


def cpu_only() -> bool:
    """Whether to leave a GPU alone, or several processes were launched without one; accelerate has to be told."""
    return _is_set("ACCELERATE_USE_CPU") or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available())


def double(x: Tensor) -> Tensor:
    """In float64; of an Apple GPU, which has none, on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def compile_mode(setting: str) -> str | None:
    """The mode of torch.compile that a setting names, None for no compiling. Raises ValueError for an unknown one."""
    name = str(setting).lower()
    if name in ("none", "false", "no", "off"):
        return None
    mode = "default" if name in ("true", "yes", "on") else name
    if mode not in COMPILE_MODES:
        raise UserError(f"compile is {setting!r}; known: none, {', '.join(COMPILE_MODES)}")
    return mode


def set_tf32(on: bool) -> None:
    """Let float32 matrix products and convolutions of this process run in TF32, on GPUs that have it, or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def process_state() -> PartialState:
    """This process's rank, device and barriers, joined to the others that torchrun or accelerate launched.

    Processes wait a day for each other: one may have hours of sampling left when another is done.

    Raises ValueError where accelerate was told to run the processes in a way that is not supported here.
    """
    with own_settings():
        return PartialState(cpu=cpu_only(), timeout=timedelta(days=1))


def make_accelerator(precision: str) -> Accelerator:
    """What wraps a model for training in "fp32" or "bf16". Whatever accelerate's variables and its config file say of
    the training, they do not change it; the main process says which of them count for nothing.

    Raises ValueError as `process_state`.
    """
    state = process_state()  # first: its processes wait for each other as long as it takes
    for name, setting in _SETTINGS.items():
        if (value := os.environ.get(name, "")).strip().lower() not in (*_NOTHING, precision):
            state.print(f"{name}={value} is not used: train.{setting} decides")
    AcceleratorState._reset_state()  # an earlier training of this process may have had another precision
    with own_settings():
        return Accelerator(cpu=cpu_only(), mixed_precision=precision.replace("fp32", "no"))


@contextmanager
def own_settings() -> Iterator[None]:
    """Hides accelerate's variables, but for those of the place, while it is called: some are read when a model is
    prepared. Raises ValueError if they ask for what is not supported.
    """
    if foreign := [f"{name} ({what})" for name, what in _FOREIGN.items() if _is_set(name)]:
        raise UserError(
            f"the environment sets {', '.join(foreign)}, which is not supported: launch with torchrun, or with an "
            "accelerate config without it; train.parallel=fsdp shards the weights of a training"
        )
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_ACCELERATE)}
    os.environ.update({name: value for name, value in hidden.items() if name in _PLACES})
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_set(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    return value == "1" or value not in _NOTHING
