"""Checksums of checkpoints, and damage that they show."""

import hashlib
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import _name, _require_dense, _weights_files, read, require_finite, tensors_of
from skipdit.checkpoints.released import State

SUMS = "SHA256SUMS"  # of the files beside it, as the program sha256sum writes them
_MARKS = {  # a parameter that tells a backbone from those below it
    "Hunyuan-DiT before v1.2 (style embedding, beta_end 0.03)": "style_embedder.weight",
    "text-to-image Hunyuan-DiT": "mlp_t5.0.weight",
    "text-to-video Latte": "temporal_transformer_blocks.0.scale_shift_table",
    "class-to-video Latte": "temp_embed",
    "class-to-image DiT": "blocks.0.attn.qkv.weight",
}


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
    lines = listed.read_text("utf-8", "replace").splitlines() if listed.exists() else []
    if any(len(line.split()) < 2 for line in lines):
        raise WeightsError(f"{listed} is damaged; download or copy it again")
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
    """Return the digest of a file's bytes, in hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


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
