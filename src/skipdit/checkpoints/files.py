"""Reading checkpoints: .pt, .safetensors, folders; whole or refused, and nothing in them is run."""

import argparse
import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.records import known_entries, read_metadata
from skipdit.checkpoints.released import _WRAPPERS, State, _rename, _turned, from_released
from skipdit.config import in_the_project
from skipdit.utils.provenance import count_members

_UNUSED = ("caption_projection.y_embedding",)  # buffers of released files that no forward pass reads
_CONTAINERS = ("ema", "model", "state_dict", "module")  # what a training checkpoint keeps its weights under, best first
_PICKLED = (".pt", ".pth", ".bin")


def load_checkpoint(path: str | Path) -> dict:
    """Everything in a .pt file, memory-mapped where its format allows, without ever running pickled code.

    Raises WeightsError if the file is damaged or holds anything but tensors, containers and an argparse.Namespace.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:  # files from before torch 1.6 cannot be mapped
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except PermissionError as error:
        raise WeightsError(f"{path} may not be read: {error.strerror}") from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        # Not the message of an UnpicklingError itself: it recommends to unpickle the file unsafely.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({str(error)[:200] or type(error).__name__})"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path} was not loaded: it wants to call {code[1]}, and a checkpoint may run no code"
            ) from error
        raise WeightsError(
            f"{path} is damaged, incomplete or no checkpoint{reason}; download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def load_state(source: str | Path | State, skips: str | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint under our names, mapped from the file where its format allows.

    Args:
        source: a .pt / .pth / .bin or .safetensors file; a folder that holds one, its shards (`from_pretrained`
            layout) or training checkpoints, of which the newest counts; or a dict as such a file holds. Of a training
            checkpoint {model, ema, opt, args} the EMA is taken.
        skips: how it numbers its long skips, "inside-out" or "outside-in", where it does not say so itself.

    Raises:
        FileNotFoundError: nothing there; of shards, all that are missing are named.
        WeightsError: unreadable, or not a state dict; skips in an order that nothing tells.
    """
    content = source if isinstance(source, Mapping) else read(Path(source))
    state = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), content)
    require_tensors(_name(source), state)
    try:
        named = _rename(state, [(_WRAPPERS, "")])
        if _is_untold(content, named):
            if skips is None:
                raise WeightsError(_UNTOLD.format(_name(source)))
            if skips == "outside-in":
                named = _turned(named)
        return from_released({name: tensor for name, tensor in named.items() if name not in _UNUSED})
    except WeightsError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:  # parts that do not fit together
        raise WeightsError(f"{_name(source)} is no state dict of a known layout: {error}") from error


_UNTOLD = (
    "{0} has long skips between some of its pairs only, and nothing in it tells how they are numbered: from the "
    "outermost on, as the original LatteIMG-skip-partial does, or from the innermost on, as exports of skipdit 0.1 do. "
    "Say it once: `skipdit weights export {0} OUT.pt --skips outside-in` (or inside-out), and take OUT.pt"
)


def _is_untold(content: Mapping, state: State) -> bool:
    """Whether a checkpoint of Latte numbers its skips in an order that cannot be told.

    With skips between all pairs everybody begins with the innermost. With some, the original begins with the outermost,
    and names them as our trainer does; that one records the model's settings, too.
    """
    told = any("n_skips" in model_settings(content.get(key)) for key in ("config", "args"))
    return not told and is_partial(state) and any(name.startswith("skip_norms.") for name in state)


def is_partial(state: State) -> bool:
    """Whether this is a Latte with skips between some of its pairs only; released names or ours."""
    n_skips = max(count_members(state, name) for name in ("skip_norms", "skips"))
    return "temp_embed" in state and 0 < n_skips < count_members(state, "blocks") // 4


def model_settings(settings: Any) -> Mapping:
    """What a checkpoint's `config` or `args` say of the model."""
    settings = settings.get("model", settings) if isinstance(settings, Mapping) else {}
    return settings if isinstance(settings, Mapping) else {}


def record_of(source: str | Path | Mapping) -> dict[str, Any]:
    """What weights say of themselves, see `known_entries`; diffusers keeps the `config` in config.json beside them."""
    if isinstance(source, Mapping):
        return known_entries(source)
    path = Path(source)
    weights = _weights_files(path)[0]
    safe = weights.suffix == ".safetensors"
    record = read_metadata(weights) if safe and weights.exists() else {}
    beside = (weights.parent if safe else path) / "config.json"
    if "config" not in record and beside.is_file():
        try:
            record |= known_entries({"config": json.loads(beside.read_text(encoding="utf-8"))})
        except ValueError as error:
            raise WeightsError(f"{beside} is damaged ({error}); download or copy it again") from error
    return record if safe or record else known_entries(read(path))


def recorded_settings(source: str | Path | Mapping) -> Mapping[str, Any]:
    """A model's settings, as weights have them, if they do."""
    record = record_of(source)
    return model_settings(record.get("config") or record.get("args"))


def recorded_flow_shift(source: str | Path | Mapping) -> float | None:
    """The shift of times of a checkpoint that was trained by flow matching; None for one that says nothing of it.

    Raises WeightsError if what it says is no number above 0.
    """
    shift = recorded_settings(source).get("flow_shift")
    if shift is not None and not (isinstance(shift, int | float) and 0 < shift < math.inf):
        raise WeightsError(f"{_name(source)}: flow_shift is {shift!r}; it should be a number above 0, or none")
    return shift


def require_tensors(source: str, state: Mapping) -> None:
    """Raise WeightsError unless a state dict is one of names and plain tensors, all of them with their numbers."""
    if unnamed := [name for name in state if not isinstance(name, str)]:
        raise WeightsError(f"{source} is not a state dict: {unnamed[0]!r} is no parameter's name")
    if strays := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{source} is not a state dict: {', '.join(strays[:5])} are not tensors")
    _require_dense(source, state)


def _require_dense(source: str, state: State) -> None:
    kinds = {
        "has a shape but no numbers (a tensor of the meta device)": lambda tensor: tensor.is_meta,
        "is not a dense tensor": lambda tensor: tensor.layout is not torch.strided or tensor.is_nested,
        "is quantized": lambda tensor: tensor.is_quantized,
    }
    for name, tensor in state.items():
        if wrong := next((kind for kind, applies in kinds.items() if applies(tensor)), None):
            raise WeightsError(f"{source}: {name} {wrong}; save dense floating-point weights")


def _name(source: str | Path | State) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def read(path: Path) -> dict:
    """All that the weights file, or the shards, at a path hold."""
    files = _weights_files(path)
    if missing := [str(file) for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"no checkpoint at {', '.join(missing)}; `skipdit download` fetches the released ones"
            + "".join(map(in_the_project, missing))
        )
    if files[0].suffix != ".safetensors":
        return load_checkpoint(files[0])
    content = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                content |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise WeightsError(f"{file} is damaged or incomplete ({error}); download or copy it again") from error
    return content


def holds_weights(path: str | Path) -> bool:
    """Whether there is a file, or a folder with weights somewhere below."""
    path = Path(path)
    return path.is_file() or any(file.suffix in (*_PICKLED, ".safetensors") for file in path.rglob("*"))


def saved(folder: Path) -> list[Path]:
    """A trainer's checkpoints in a folder, oldest first. Files without a step for a name are somebody else's."""
    return sorted((file for file in folder.glob("*.pt") if file.stem.isdigit()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem)


def _weights_files(path: Path) -> list[Path]:
    """The file itself; in a folder merged weights, its weights file, the shards of that, or the newest checkpoint."""
    if not path.is_dir():
        return [path]
    for index in path.glob("*.safetensors.index.json"):
        try:
            return sorted({path / shard for shard in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is damaged; download or copy it again") from error
    files = (
        list(path.glob("merged.pt"))  # of a run that trained adapters, which lie beside it
        or sorted(path.glob("*.safetensors"))
        or sorted(saved(path) + saved(path / "checkpoints"), key=_step)[-1:]
        or sorted(file for file in path.iterdir() if file.suffix in _PICKLED)
    )
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no weights"
        raise WeightsError(f"{path} holds {names}" + ("; name one of these files" if files else ""))
    return files


def require_finite(source: str, state: State) -> None:
    """Raise WeightsError, naming tensors, unless all of them are finite. `source` is what they are from, for people."""
    if bad := [name for name, tensor in state.items() if not is_finite(tensor)]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise WeightsError(f"{source}: not finite are {', '.join(bad[:5])}{more}")


def tensors_of(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, with their dotted places."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping | list | tuple):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, as integers always are. By the extremes, which is twenty times as fast as one by one."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    extremes = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return bool(torch.stack(extremes).isfinite().all())
