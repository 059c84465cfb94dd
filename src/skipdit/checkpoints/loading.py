"""Loading checkpoints into models, strictly."""

import fnmatch
import re
from pathlib import Path

import torch
from torch import nn

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import _name, load_state, recorded_flow_shift
from skipdit.checkpoints.released import BEFORE_V1_2, State
from skipdit.checkpoints.sums import _MARKS, require_sound


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


def load_weights(model: nn.Module, source: str | Path | State, allow_missing: str | None = None) -> list[str]:
    """Copy a checkpoint into a model, strictly.

    Args:
        model: any of our backbones; its dtype and device stay. Its `flow_shift` becomes what the source records.
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
    if hasattr(model, "flow_shift"):
        model.flow_shift = recorded_flow_shift(source)
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
