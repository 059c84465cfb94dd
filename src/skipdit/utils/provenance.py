"""What a result was made of: versions and fingerprints of weights."""

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import skipdit


def versions() -> dict[str, Any]:
    """What a result depends on besides its settings."""
    return {
        "versions": {"skipdit": skipdit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "tf32": torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32,
    }


def count_members(state: Mapping[str, Tensor], modules: str) -> int:
    """Members of a module list in a state dict."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{modules}.")})


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that tell a model's weights apart, the same on every machine.

    Taken in bfloat16: a float32 and a bfloat16 copy of a checkpoint agree, a float16 one need not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.bfloat16).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
