"""What weights say of themselves: the settings of their model and of its training. Needs no torch."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from skipdit.checkpoints.errors import WeightsError
from skipdit.config import read_values

SECTIONS = {"model", "data", "train"}  # of a trainer's config.yaml
METADATA = "skipdit"  # key of safetensors' metadata, whose value is the record as JSON
_ENTRIES = {"config": Mapping, "args": Mapping, "step": int}
_PLACES = {"out", "init", "texts", "files", "folder", "path", "captions"}  # settings of a training that name files ...
_PLACES |= {"clip_list", "image_path", "image_list", "picture_list"}  # ... which a sampler has no use for
_PLACES |= {"reference", "network"}  # of the Fréchet distance


def known_entries(content: Any) -> dict[str, Any]:
    """Return the record in a checkpoint: `config`, the arguments of its model, `args`, the settings of its training,
    and `step`, how far that came. What is there in another form, as the original's `args`, is left out.
    """
    content = content if isinstance(content, Mapping) else {}
    return {key: content[key] for key, kind in _ENTRIES.items() if isinstance(content.get(key), kind)}


def look_up(values: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings, None where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the record in a safetensors file; nothing if it has none. Raises WeightsError if it is damaged."""
    try:
        with safe_open(file, framework="np") as tensors:
            return known_entries(json.loads((tensors.metadata() or {}).get(METADATA, "{}")))
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{file} is damaged or incomplete ({error}); download or copy it again") from error


def read_run(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the config.yaml of the training that wrote these weights, and what it sets; None if there is none.

    Args:
        path: the folder of the run, its `checkpoints`, or a file in one of the two.
    """
    folder = path if path.is_dir() else path.parent
    file = (folder.parent if folder.name == "checkpoints" else folder) / "config.yaml"
    values = read_values(file) if file.is_file() else {}
    return (file, values) if values.keys() >= SECTIONS else None


def sampling_command(task: str, weights: str | Path, *words: str) -> str:
    """Return the command that samples from weights which say all else themselves, but for what further words say."""
    prompt = ['--prompt "WHAT TO SHOW"'] if task.startswith("text-") else []
    return " ".join([f"skipdit sample --task {task} weights={shlex.quote(str(weights))}", *words, *prompt])


def to_ship(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record for a file that others get: of the training's files and folders only the last name is kept."""

    def shortened(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: short(key, value) for key, value in values.items() if not key.startswith("_")}

    def short(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return shortened(value)
        return Path(value).name if key in _PLACES and isinstance(value, str) else value

    return json.loads(json.dumps(shortened(record), default=str))  # tuples and the like as every reader knows them
