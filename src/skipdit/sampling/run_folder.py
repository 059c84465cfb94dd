"""What a training says of the samples of its model: its settings are in the folder of the run, or in the weights."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.records import SECTIONS, look_up, read_metadata, read_run
from skipdit.config import ConfigError
from skipdit.utils.shipped import found


def inherit(given: Mapping[str, Any], settings: Mapping[str, str], method: str) -> dict[str, Any]:
    """Return what the run that `weights` names says of a sampler's settings.

    A file outside of the folder of a run is asked for what it records, unless the given settings describe the model.

    Args:
        given: settings of the config file and the command line, nested.
        settings: names of the sampler -> dotted names of the trainer, which say the same.
        method: the sampler's name for its sampling method.

    Raises ConfigError if the given ones are of a model of another shape.
    """
    weights = given.get("weights")
    if not isinstance(weights, str):
        return {}
    path = Path(found(weights))
    run = read_run(path) or (None if {"model", "pipeline"} & given.keys() else _read_record(path))
    if run is None:
        return {}
    file, values = run
    inherited = {name: value for name, key in settings.items() if (value := look_up(values, key)) is not None}
    mine, theirs = given.get("model") or {}, inherited.get("model", {})
    if mine.get("name") not in (None, theirs.get("name")):  # which says all sizes, or most
        del inherited["model"]
    else:
        _require_same(mine, theirs, file)
    if values["train"].get("objective") == "flow":
        inherited[method] = "euler"
    return inherited


def _read_record(path: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """What a weights file records of its training, as `read_run` returns it; a damaged file, nothing."""
    record: Mapping[str, Any] = {}
    with suppress(WeightsError):
        if path.is_file() and path.suffix == ".safetensors":
            record = read_metadata(path)
        elif path.is_file():
            from skipdit.checkpoints.files import record_of  # torch takes seconds

            record = record_of(path)
    values = record.get("args", {})
    return (path, values) if all(isinstance(values.get(name), Mapping) for name in SECTIONS) else None


def _require_same(given: Mapping[str, Any], trained: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError if settings of a model are not those that it was trained with."""
    both = {name: (trained[name], value) for name, value in given.items() if None not in (value, trained.get(name))}
    if differ := [f"{name}={theirs}, not {mine}" for name, (theirs, mine) in both.items() if theirs != mine]:
        raise ConfigError(
            f"the weights are of a model with {' and '.join(differ)} ({file}): leave `model` out, or name other weights"
        )
