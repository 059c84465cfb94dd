"""Reading checkpoints: released layouts to ours, strictly, and back to released names.

    python -m skipdit.weights convert IN OUT       # a safetensors folder for `DiT.from_pretrained(OUT)`
    python -m skipdit.weights export IN OUT.pt     # the released layout {"ema": ...}, to ship

IN is anything that `load_weights` reads. Files are memory-mapped and never unpickle code.
"""

import argparse
import fnmatch
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skipdit.layouts import from_diffusers, is_diffusers_hunyuan

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
_IN_BLOCKS = re.compile(r"^blocks\.(\d+)\.skip_(?:norm|linear)\.")  # Hunyuan-DiT keeps them in its deep blocks
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel, torch.compile
_UNUSED = ("caption_projection.y_embedding",)  # buffers of released files that no forward pass reads
_CONTAINERS = ("ema", "model", "state_dict", "module")  # what a training checkpoint keeps its weights under, best first
_PICKLED = (".pt", ".pth", ".bin")
_MARKS = {  # a parameter that tells a backbone from those below it
    "Hunyuan-DiT before v1.2 (style embedding, beta_end 0.03)": "style_embedder.weight",
    "text-to-image Hunyuan-DiT": "mlp_t5.0.weight",
    "text-to-video Latte": "temporal_transformer_blocks.0.scale_shift_table",
    "class-to-video Latte": "temp_embed",
    "class-to-image DiT": "blocks.0.attn.qkv.weight",
}

BEFORE_V1_2 = "Of Hunyuan-DiT only v1.2 is supported, which has no style embedding: Tencent-Hunyuan/HunyuanDiT-v1.2."


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
    """Released parameter names to ours, diffusers' of Hunyuan-DiT too; names that are ours already stay."""
    state = from_diffusers(state) if is_diffusers_hunyuan(state) else state
    deep = sorted({int(match[1]) for name in state if (match := _IN_BLOCKS.match(name))})
    first = deep[0] if deep else 0
    rules = [(re.compile(rf"^blocks\.{i}\.skip_(norm|linear)\."), rf"skips.{i - first}.\1.") for i in deep]
    return _rename(state, _RELEASED_TO_OURS + rules)


def to_released(state: State) -> dict[str, Tensor]:
    """Our parameter names to the released ones; the inverse of `from_released`."""
    if "mlp_t5.0.weight" not in state:
        return _rename(state, _OURS_TO_RELEASED)
    n_skips = count_members(state, "skips")
    first = count_members(state, "blocks") - n_skips
    rules = [(re.compile(rf"^skips\.{j}\.(norm|linear)\."), rf"blocks.{first + j}.skip_\1.") for j in range(n_skips)]
    return _rename(state, rules)


def identify(state: State) -> str:
    """The backbone that a state dict under our names belongs to, for example 'class-to-image DiT, 14 long skips'."""
    backbone = next((name for name, mark in _MARKS.items() if mark in state), "an unknown model")
    skips = len({name.rpartition(".")[0] for name in state if re.search(r"^skips\.\d+\.norm\.|\.skip_norm\.", name)})
    classes = state.get("y_embedder.embedding_table.weight")
    return (
        backbone
        + (f", {skips} long skips" if skips else "")
        + (f", {len(classes) - 1} classes" if classes is not None else "")
    )


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


def load_state(source: str | Path | State) -> dict[str, Tensor]:
    """The weights of a checkpoint under our names, mapped from the file where its format allows.

    Args:
        source: a .pt / .pth / .bin or .safetensors file; a folder that holds one, its shards (`from_pretrained`
            layout) or training checkpoints, of which the newest counts; or a dict as such a file holds. Of a training
            checkpoint {model, ema, opt, args} the EMA is taken.

    Raises:
        FileNotFoundError: nothing there; of shards, all that are missing are named.
        WeightsError: unreadable, or not a state dict.
    """
    state = source if isinstance(source, Mapping) else read(Path(source))
    state = next((state[key] for key in _CONTAINERS if isinstance(state.get(key), Mapping)), state)
    if strays := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{_name(source)} is not a state dict: {', '.join(strays[:5])} are not tensors")
    named = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    return from_released({name: tensor for name, tensor in named.items() if name not in _UNUSED})


def _name(source: str | Path | State) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def read(path: Path) -> dict:
    """All that the weights file, or the shards, at a path hold."""
    files = _weights_files(path)
    if missing := [str(file) for file in files if not file.exists()]:
        raise FileNotFoundError(f"no checkpoint at {', '.join(missing)}; scripts/download.sh fetches the released ones")
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
            return sorted({path / shard for shard in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError) as error:
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
        FileNotFoundError: see `load_state`.
    """
    theirs, ours = load_state(source), model.state_dict()
    missing = [name for name in ours if name not in theirs]
    optional = set(fnmatch.filter(ours, allow_missing)) if allow_missing else set()
    allowed = optional if optional.isdisjoint(theirs) else set()  # all of them or none
    misfits = {
        "missing": [name for name in missing if name not in allowed],
        "unexpected": [name for name in theirs if name not in ours],
        "misshapen": [
            f"{name} is {tuple(theirs[name].shape)}, the model has {tuple(tensor.shape)}"
            for name, tensor in ours.items()
            if name in theirs and theirs[name].shape != tensor.shape
        ],
    }
    if any(misfits.values()):
        lines = [f"{_name(source)} holds {identify(theirs)}; it does not fit {type(model).__name__}, {identify(ours)}:"]
        for title, names in misfits.items():
            lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)] if names else []
        raise WeightsError("\n".join(lines + _advice(ours, theirs)))
    with torch.no_grad():
        for name, tensor in theirs.items():  # one at a time: mapped pages are read once and can be dropped again
            ours[name].copy_(tensor)
    return missing


def _advice(ours: State, theirs: State) -> list[str]:
    """What to do where only the version or the long skips are at odds."""
    if "style_embedder.weight" in theirs:
        return [f"  {BEFORE_V1_2}"]
    differ = ours.keys() ^ theirs.keys()
    if not differ or not all(name.startswith("skips.") for name in differ):
        return []
    kinds = {name.split(".")[2] for name in differ}
    if kinds == {"linear", "delta"}:
        fuse = "residual" if "skips.0.delta.weight" in theirs else "replace"
        return [f"  The two have long skips of different kinds: set fuse={fuse} (or model.fuse)."]
    if not any(name.startswith("skips.") for name in ours):
        return ["  The checkpoint has long skips and the model has none: set skip=true (or model.skip)."]
    if not any(name.startswith("skips.") for name in theirs):
        advice = "stage 1 of training adds them; a sampler takes skip=false (or model.skip)"
        return [f"  The model has long skips and the checkpoint has none: {advice}."]
    return ["  Only some of the long skips are there: a checkpoint must bring all of them or none."]


if __name__ == "__main__":
    from skipdit.convert import main

    main()
