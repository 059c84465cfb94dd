"""Reading checkpoints: released layouts to ours, strictly, and back to released names.

    python -m skipdit.weights verify IN            # whether every byte is as it was saved, and every weight finite
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
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from skipdit.config import in_the_project
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
ORDERS = ("inside-out", "outside-in")  # how a checkpoint numbers its skips; ours begin with the innermost
_IN_BLOCKS = re.compile(r"^blocks\.(\d+)\.skip_(?:norm|linear)\.")  # Hunyuan-DiT keeps them in its deep blocks
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel, torch.compile
_UNUSED = ("caption_projection.y_embedding",)  # buffers of released files that no forward pass reads
_CONTAINERS = ("ema", "model", "state_dict", "module")  # what a training checkpoint keeps its weights under, best first
SUMS = "SHA256SUMS"  # of the files beside it, as the program sha256sum writes them
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
        if name in renamed:
            raise ValueError(f"two of its tensors are {name}")
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
    "Say it once: `python -m skipdit.weights export {0} OUT.pt --skips outside-in` (or inside-out), and take OUT.pt"
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


def _turned(state: State) -> dict[str, Tensor]:
    """The same, with released skips numbered from the other end."""
    last = count_members(state, "skip_norms") - 1
    number = re.compile(r"^(skip_norms|skip_linears)\.(\d+)\.")
    return {number.sub(lambda m: f"{m[1]}.{last - int(m[2])}.", name): tensor for name, tensor in state.items()}


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
            f"no checkpoint at {', '.join(missing)}; `python -m skipdit.download` fetches the released ones"
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


def verify(source: Path) -> str:
    """Read every byte of weights, of a training checkpoint all of it, and compare it with the checksums that they were
    saved with: those in a .pt file, or in the SHA256SUMS beside safetensors that were converted here.

    Returns a line about what was found; raises WeightsError or FileNotFoundError.
    """
    began, files = time.perf_counter(), _weights_files(source)
    content = read(source)
    tensors = dict(tensors_of(content))
    require_sound(source, content)
    listed = files[0].parent / SUMS
    lines = listed.read_text("utf-8").splitlines() if listed.exists() else []
    sums = dict(reversed(line.split(maxsplit=1)) for line in lines)
    if damaged := [str(file) for file in files if file.name in sums and sha256(file) != sums[file.name]]:
        raise WeightsError(f"{', '.join(damaged)}: not as saved ({listed}); download or copy it again")
    known = _checksums(files[0]) or all(file.name in sums for file in files)
    size = sum(file.stat().st_size for file in files)
    return (
        f"{source}: {len(tensors)} tensors, {size / 1e9:.2f} GB, all finite, "
        + ("as they were saved" if known else "but there are no checksums to compare with")
        + f" ({size / 1e9 / (time.perf_counter() - began):.1f} GB/s)"
    )


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


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
        WeightsError: lists every missing, unexpected and misshapen name; names weights that are not finite, or not as
            they were saved.
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
        "not of floating point": [
            f"{name} is {theirs[name].dtype}"
            for name, tensor in ours.items()
            if name in theirs and tensor.is_floating_point() and not theirs[name].is_floating_point()
        ],
    }
    if any(misfits.values()):
        lines = [f"{_name(source)} holds {identify(theirs)}; it does not fit {type(model).__name__}, {identify(ours)}:"]
        for title, names in misfits.items():
            lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)] if names else []
        raise WeightsError("\n".join(lines + _advice(ours, theirs)))
    require_sound(source, theirs)
    with torch.no_grad():
        for name, tensor in theirs.items():  # one at a time: mapped pages are read once and can be dropped again
            ours[name].copy_(tensor)
    return missing


def require_sound(source: str | Path | State, state: Mapping[str, Any]) -> None:
    """Raise WeightsError, naming tensors, unless they have the checksums that their .pt file was saved with, and are
    finite.

    Args:
        source: what they were loaded from, see `load_state`.
        state: tensors, at any depth. Those that are not of floating point need not be finite.
    """
    found = list(tensors_of(state))
    _require_dense(_name(source), dict(found))
    if not isinstance(source, Mapping) and (damaged := _damaged(_weights_files(Path(source))[0], found)):
        names = ", ".join(damaged[:5])
        raise WeightsError(f"{source} is damaged: {names} are not as they were saved; download or copy it again")
    require_finite(_name(source), dict(found))


def require_finite(source: str, state: State) -> None:
    """Raise WeightsError, naming tensors, unless all of them are finite. `source` is what they are from, for people."""
    if bad := [name for name, tensor in state.items() if not is_finite(tensor)]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise WeightsError(f"{source}: not finite are {', '.join(bad[:5])}{more}")


def _damaged(path: Path, tensors: list[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors, mapped from a file, whose bytes have none of the checksums in its archive.

    Mapping skips these, and one flipped bit would go unnoticed. Only the bytes of these tensors are read.
    """
    try:
        sums = _checksums(path)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        return [f"its parts ({error})"]
    if sums is None:
        return []
    seen, damaged = {}, []
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            seen[storage.data_ptr()] = not data.size or (data.size, zlib.crc32(data)) in sums
        if not seen[storage.data_ptr()]:
            damaged.append(name)
    return damaged


def _checksums(path: Path) -> set[tuple[int, int]] | None:
    """Sizes and checksums of the parts of a .pt file; None of one from before torch 1.6, or saved without them.

    Raises BadZipFile, or what a damaged archive makes its reader raise, unless the two places agree that describe a
    part, and the small parts, which tell what the large ones are, have their checksums.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if not any(part.CRC for part in parts):
            return None
        for part in parts:
            with archive.open(part) as stream:
                stream.read(0 if "/data/" in part.filename else -1)
    return {(part.file_size, part.CRC) for part in parts}


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
