"""Reading and writing checkpoints: released layouts to ours and back.

    python -m skipdit.weights convert IN OUT      # a safetensors folder for `from_pretrained`
    python -m skipdit.weights download class-to-image

Files are memory-mapped and never unpickle code.
"""

import argparse
import fnmatch
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

State = Mapping[str, Tensor]

# Released name <-> ours. The released code keeps the norms and the linears of the long skips in two lists.
_RELEASED_TO_OURS = [
    (re.compile(r"^skip_norms\.(\d+)\."), r"skips.\1.norm."),
    (re.compile(r"^skip_linears\.(\d+)\.linear\."), r"skips.\1.linear."),
]
_OURS_TO_RELEASED = [
    (re.compile(r"^skips\.(\d+)\.norm\."), r"skip_norms.\1."),
    (re.compile(r"^skips\.(\d+)\.linear\."), r"skip_linears.\1.linear."),
]
_WRAPPER_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")  # left by DistributedDataParallel and torch.compile
_CONTAINERS = ("ema", "model", "state_dict", "module")  # what a training checkpoint keeps its weights under, best first


class WeightsError(ValueError):
    """A checkpoint that cannot be read, or that does not belong to the model."""


def _rename(state: State, rules: list[tuple[re.Pattern, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    return renamed


def from_released(state: State) -> dict[str, Tensor]:
    """Released parameter names to ours; names that are ours already stay."""
    return _rename(state, _RELEASED_TO_OURS)


def to_released(state: State) -> dict[str, Tensor]:
    """Our parameter names to the released ones; the inverse of `from_released`."""
    return _rename(state, _OURS_TO_RELEASED)


def load_checkpoint(path: str | Path) -> dict:
    """Everything in a .pt file, memory-mapped where its format allows, without ever running pickled code.

    Raises WeightsError if the file is damaged or holds anything but tensors, containers and an argparse.Namespace.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:  # files from before torch 1.6 cannot be mapped
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds pickled code or is not a checkpoint; it was not loaded. {error}") from error
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise WeightsError(f"{path} is damaged or incomplete: {error}. Download or copy it again.") from error


def load_state(source: str | Path | State) -> dict[str, Tensor]:
    """The weights of a checkpoint under our names.

    Args:
        source: a .pt / .pth / .bin or .safetensors file, a folder that holds one (`from_pretrained` layout or this
            project's checkpoints), or a state dict. Of a training checkpoint {model, ema, opt, args} the EMA is taken.
    """
    if isinstance(source, Mapping):
        return from_released(source)
    path = Path(source)
    if path.is_dir():
        path = _weights_file(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `bash scripts/download.sh class-to-image` fetches the released ones")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged or incomplete: {error}. Download or copy it again.") from error
    else:
        state = load_checkpoint(path)
        for key in _CONTAINERS:
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
    strays = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strays:
        raise WeightsError(f"{path} is not a state dict: {', '.join(map(str, strays[:5]))} are not tensors")
    return from_released({_WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in state.items()})


def _weights_file(folder: Path) -> Path:
    """The one weights file of a folder, or its newest training checkpoint."""
    for pattern in ("*.safetensors", "checkpoints/*.pt", "*.pt"):
        if files := sorted(folder.glob(pattern)):
            return files[-1]
    raise WeightsError(f"{folder} holds no .safetensors or .pt file")


def load_weights(model: nn.Module, source: str | Path | State, allow_missing: str | None = None) -> list[str]:
    """Copy a checkpoint into a model, strictly.

    Args:
        model: any of our backbones; its dtype and device stay.
        source: see `load_state`.
        allow_missing: name pattern of parameters that the checkpoint may lack as a whole; `"skips.*"` lets plain DiT
            weights start a skip model (stage 1). The model keeps its own values there.

    Returns:
        The names that were missing.

    Raises:
        WeightsError: lists every missing, unexpected and misshapen name.
    """
    theirs, ours = load_state(source), model.state_dict()
    missing = [name for name in ours if name not in theirs]
    if allow_missing is not None and set(missing) == set(fnmatch.filter(ours, allow_missing)):
        wrong_missing = []
    else:
        wrong_missing = missing
    unexpected = [name for name in theirs if name not in ours]
    misshapen = [
        f"{name} is {tuple(theirs[name].shape)}, the model has {tuple(ours[name].shape)}"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    if wrong_missing or unexpected or misshapen:
        where = "the state dict" if isinstance(source, Mapping) else str(source)
        lines = [f"{where} does not fit {type(model).__name__}:"]
        for title, names in [("missing", wrong_missing), ("unexpected", unexpected), ("misshapen", misshapen)]:
            if names:
                lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)]
        if unexpected and all(name.startswith("skips.") for name in unexpected):
            lines.append("  The checkpoint has long skips and the model has none: set model.skip=true.")
        if wrong_missing and all(name.startswith("skips.") for name in wrong_missing):
            lines.append("  The model has long skips and the checkpoint has none: stage 1 of training adds them.")
        raise WeightsError("\n".join(lines))
    with torch.no_grad():
        for name, tensor in theirs.items():  # one at a time: mapped pages are read once and can be dropped again
            ours[name].copy_(tensor)
    return missing
