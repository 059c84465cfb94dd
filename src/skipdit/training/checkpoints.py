"""Training checkpoints that survive being killed at any moment.

One file per checkpoint in the layout of the released ones, {model, ema, opt, args}, plus the step and the model's own
config: any tool that reads those reads these. A file gets its name only when it is complete on disk.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import is_finite, load_checkpoint, require_tensors, saved
from skipdit.checkpoints.released import from_released, to_released
from skipdit.checkpoints.sums import require_sound
from skipdit.training.align import Alignment
from skipdit.training.ema import PowerAverage
from skipdit.utils.errors import UserError
from skipdit.utils.files import whole_file

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on rank 0 where parameters are sharded
_LOAD = StateDictOptions(full_state_dict=True)


class NotSaved(OSError, RuntimeError):
    """A checkpoint that could not be written. The last good one stays."""


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    optimizers: Sequence[Optimizer],
    args: dict,
    keep: int,
    writer: bool,
    averages: Sequence[PowerAverage] = (),
    alignment: Alignment | None = None,
) -> None:
    """Write `<folder>/<step>.pt`, then delete all but the newest `keep`, unless that is 0. Every process calls it, and
    `writer` writes.

    Raises NotSaved, and leaves the older checkpoints as they are, if weights are not finite or the disk is full.
    """
    state = {
        "model": to_released(get_model_state_dict(model, options=_FULL)),
        "ema": to_released(get_model_state_dict(ema, options=_FULL)),
        "opt": get_optimizer_state_dict(model, optimizers, options=_FULL),
        "args": args,
        "config": {key: value for key, value in getattr(ema, "config", {}).items() if not key.startswith("_")},
        "step": step,
    }
    if averages:
        state["averages"] = _states(averages)
    if alignment is not None:
        state["align"] = alignment.state_dict()
    if not writer:
        return
    both = [*state["model"].items(), *state["ema"].items()]
    if bad := [name for name, tensor in both if not is_finite(tensor)]:
        raise NotSaved(f"step {step}: weights are not finite ({', '.join(bad[:3])}); {_kept(folder)}")
    _write(folder, step, state)
    good = [file for file in saved(folder) if int(file.stem) <= step]  # a later one was damaged, and passed over
    for old in good[:-keep]:
        old.unlink()


def save_averages(folder: Path, step: int, averages: Sequence[PowerAverage], writer: bool) -> None:
    """Write `<folder>/<step>.pt`, in half precision, for `checkpoints.averages`. Every process calls it, and `writer`
    writes. Raises NotSaved if the disk is full.
    """
    states = _states(averages)
    if writer:
        halves = {length: {name: tensor.half() for name, tensor in state.items()} for length, state in states.items()}
        _write(folder, step, {"averages": halves, "step": step})


def _states(averages: Sequence[PowerAverage]) -> dict[str, dict]:
    return {f"{own.length:g}": to_released(get_model_state_dict(own.model, options=_FULL)) for own in averages}


def _write(folder: Path, step: int, content: dict) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"{step:07d}.pt") as partial, open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NotSaved(f"{error}; {_kept(folder)}") from error


def _kept(folder: Path) -> str:
    files = saved(folder)
    return f"the last good checkpoint is {files[-1]}" if files else "there is no earlier checkpoint"


def latest(folder: Path) -> tuple[Path, dict] | None:
    """The newest sound checkpoint and its content; a damaged one is named in a warning and passed over.

    None if there are none. Raises WeightsError if there are some, and none can be read.
    """
    files = saved(folder)
    for path in reversed(files):
        try:
            state = load_checkpoint(path)
            require_sound(path, state)
            for part in ("model", "ema"):
                require_tensors(f"{path}, {part}", state.get(part, {}))
            return path, state
        except WeightsError as error:
            warnings.warn(str(error), stacklevel=2)
    if files:
        raise WeightsError(f"none of the {len(files)} checkpoints in {folder} can be read; remove them to start anew")
    return None


def load_chosen(path: Path) -> dict:
    """The checkpoint that the main process goes on from, in another process.

    Raises WeightsError if it cannot be read here.
    """
    try:
        return load_checkpoint(path)
    except (FileNotFoundError, WeightsError) as error:
        raise WeightsError(
            f"the run goes on from {path}, which one of its processes cannot read: all machines must see the same "
            f"folder ({error})"
        ) from error


def restore(
    state: dict,
    model: nn.Module,
    ema: nn.Module,
    optimizers: Sequence[Optimizer],
    averages: Sequence[PowerAverage] = (),
    alignment: Alignment | None = None,
) -> int:
    """Put a checkpoint back, whatever the parallelism it was saved under. Returns its step.

    Raises WeightsError for a checkpoint without optimizer and step, such as a released or exported one; ValueError if
    the alignment was to another encoder.
    """
    wanted = {"model", "ema", "opt", "step", *(["averages"] if averages else []), *(["align"] if alignment else [])}
    if lacking := wanted - state.keys():
        lacks = ", ".join(sorted(lacking))
        raise WeightsError(f"a checkpoint of this run lacks {lacks}: only the trainer's own can be resumed; see `init`")
    if alignment is not None:
        alignment.load_state_dict(state["align"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        if other := trained ^ state["opt"]["state"].keys():  # torch would leave their moments at zero
            raise UserError(f"the optimizer's state is not of {', '.join(sorted(map(str, other))[:3])}")
        set_model_state_dict(model, from_released(state["model"]), options=_LOAD)
        set_model_state_dict(ema, from_released(state["ema"]), options=_LOAD)
        for own in averages:
            set_model_state_dict(own.model, from_released(state["averages"][f"{own.length:g}"]), options=_LOAD)
        set_optimizer_state_dict(model, optimizers, state["opt"], options=_LOAD)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"a checkpoint of this run does not fit its model and optimizer: {error}") from error
    return state["step"]
