"""What a training says of the samples of its model: its settings are in the folder of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipdit.config import ConfigError, read_values
from skipdit.utils.shipped import found

SECTIONS = {"model", "data", "train"}  # of a trainer's config.yaml


def read_run(weights: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the config.yaml of the training that wrote these weights, and what it sets; None if there is none.

    Args:
        weights: the folder of the run, its `checkpoints`, or a file in one of the two.
    """
    path = Path(found(weights))
    folder = path if path.is_dir() else path.parent
    file = (folder.parent if folder.name == "checkpoints" else folder) / "config.yaml"
    values = read_values(file) if file.is_file() else {}
    return (file, values) if values.keys() >= SECTIONS else None


def inherit(given: Mapping[str, Any], settings: Mapping[str, str], method: str) -> dict[str, Any]:
    """Return what the run that `weights` names says of a sampler's settings.

    Args:
        given: settings of the config file and the command line, nested.
        settings: names of the sampler -> dotted names of the trainer, which say the same.
        method: the sampler's name for its sampling method.

    Raises ConfigError if the given ones are of a model of another shape.
    """
    weights = given.get("weights")
    run = read_run(weights) if isinstance(weights, str) else None
    if run is None:
        return {}
    file, values = run
    inherited = {name: value for name, key in settings.items() if (value := _look_up(values, key)) is not None}
    mine, theirs = given.get("model") or {}, inherited.get("model", {})
    if mine.get("name") not in (None, theirs.get("name")):  # which says all sizes, or most
        del inherited["model"]
    else:
        _require_same(mine, theirs, file)
    if values["train"].get("objective") == "flow":
        inherited[method] = "euler"
    return inherited


def _look_up(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _require_same(given: Mapping[str, Any], trained: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError if settings of a model are not those that it was trained with."""
    both = {name: (trained[name], value) for name, value in given.items() if None not in (value, trained.get(name))}
    if differ := [f"{name}={theirs}, not {mine}" for name, (theirs, mine) in both.items() if theirs != mine]:
        raise ConfigError(
            f"the weights are of a model with {' and '.join(differ)} ({file}): leave `model` out, or name other weights"
        )
