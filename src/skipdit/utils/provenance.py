"""What a result was made of: versions and fingerprints of weights."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import skipdit

SKETCHED = 16  # weights of a model, and values of a weight, that a sketch has at least


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


def sketch(models: Sequence[nn.Module]) -> str | None:
    """Sixteen hex digits that tell checkpoints of the same classes apart by a few values of a few weights: quick for
    models of any size. None where weights lie elsewhere until they are needed. Taken in bfloat16, as `fingerprint`.
    """
    digest = hashlib.sha256()
    for model in models:
        model = getattr(model, "_orig_mod", model)  # of a compiled one
        weights = [(name, x) for name, x in model.named_parameters() if x.is_floating_point()]
        for name, weight in weights[:: max(len(weights) // SKETCHED, 1)]:
            if weight.is_meta:
                return None
            values = weight.detach().flatten()[:: max(weight.numel() // SKETCHED, 1)]
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(values.cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that tell a model's weights apart, the same on every machine.

    Taken in bfloat16: a float32 and a bfloat16 copy of a checkpoint agree, a float16 one need not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.bfloat16).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
