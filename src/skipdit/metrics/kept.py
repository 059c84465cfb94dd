"""What networks make of samples, computed once and kept in parts beside them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import skipdit
from skipdit.utils.files import naming, replace_text, whole_file

PART = 32  # samples of one file; as many are lost if an evaluation is killed


def kept_rows(
    folder: Path,
    key: dict[str, Any],
    count: int,
    stamp: Callable[[int], str],
    compute: Callable[[list[int]], Tensor],
    batch_size: int,
    title: str,
) -> Tensor:
    """A row of numbers per sample (count, D) float32, computed once and kept in parts.

    Interrupted at any moment, the next call goes on after the last complete part. A part counts only if all of its
    samples have the names and contents that it was made of.

    Args:
        folder: for the parts; one of its own below it for every key.
        key: all that determines the rows besides the samples' contents.
        stamp: `stamp(i)` tells sample i and its content apart from others.
        compute: `compute(indices)` gives the rows of some samples, on any device.
        batch_size: how many it is given at once, at most.
        title: of the progress bar.
    """
    text = json.dumps(key | {"skipdit": skipdit.__version__}, sort_keys=True)
    folder = Path(folder, hashlib.sha256(text.encode()).hexdigest()[:16])
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "key.json", text + "\n")
    parts = []
    with tqdm(total=count, desc=title, unit="sample") as progress:
        for start in range(0, count, PART):
            indices = list(range(start, min(start + PART, count)))
            stamps, file = json.dumps([stamp(i) for i in indices]), folder / f"{start:07d}.safetensors"
            if (rows := _read_part(file, stamps)) is None:
                batches = []
                for first in range(0, len(indices), batch_size):
                    batch = indices[first : first + batch_size]
                    batches.append(compute(batch).float().cpu())
                    progress.update(len(batch))
                rows = torch.cat(batches)
                with whole_file(file) as partial:
                    save_file({"rows": rows}, partial, {"stamps": stamps})
            else:
                progress.update(len(indices))
            parts.append(rows)
    return torch.cat(parts)


def _read_part(file: Path, stamps: str) -> Tensor | None:
    try:
        with safe_open(file, framework="pt") as part:
            return part.get_tensor("rows") if part.metadata()["stamps"] == stamps else None
    except (FileNotFoundError, SafetensorError):
        return None
