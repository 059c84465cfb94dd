"""Checkpoints from one layout to another: `skipdit weights`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from skipdit.checkpoints.averages import combine
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import is_finite, is_partial, load_checkpoint, load_state, record_of, saved
from skipdit.checkpoints.hub import CardSettings, upload, write_folder
from skipdit.checkpoints.records import METADATA, SECTIONS, read_run, sampling_command, to_ship
from skipdit.checkpoints.released import State, to_released
from skipdit.checkpoints.single_file import find_class, open_model, task_of
from skipdit.checkpoints.sums import require_sound, verify
from skipdit.cli import friendly_errors
from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, whole_file


def convert(
    source: Path,
    out: Path,
    model_class: type[nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
    num_heads: int | None = None,
    skips: str | None = None,
    repo: str | None = None,
    card: CardSettings | None = None,
) -> None:
    """Write a checkpoint as a diffusers folder (config.json, safetensors) that `model_class.from_pretrained` opens, and
    what `write_folder` puts beside it.

    Args:
        model_class: see `open_model`.
        num_heads: attention heads, where neither the checkpoint nor a published size of its width tells them.
        skips: see `load_state`.
        repo: its name on the Hub, for the card; None: that of `out`.
        card: what else the card is to say.

    Raises ValueError for weights of another class, damaged ones, or some that are not finite in `dtype`; OSError if
    `out` exists or cannot be written.
    """
    model = open_model(source, model_class, dtype, skips, **({"num_heads": num_heads} if num_heads else {}))
    _require_finite(model.state_dict(), dtype)
    record = _record(source)
    _write(out, lambda folder: write_folder(folder, model, record, repo or out.name, card or CardSettings()))


def export(source: Path, out: Path, dtype: torch.dtype, skips: str | None = None) -> str | None:
    """Write the weights of a checkpoint as a file, safetensors by the suffix of that name, else the released layout
    {"ema": ...}; with the settings of the model and the training, if the checkpoint has them.

    Returns the command that samples from the file; None if that takes a config, too.

    Skips between some pairs only keep our names, which say how they are numbered; see `load_state` for `skips`.

    Raises WeightsError if they are damaged, or not finite in `dtype`; OSError if `out` exists or cannot be written.
    """
    state = load_state(source, skips)
    require_sound(source, state)
    return write_weights(state, out, dtype, _record(source))


def write_weights(state: State, out: Path, dtype: torch.dtype, record: dict[str, Any]) -> str | None:
    """Write weights, under our names, with a record as `records.to_ship` makes it; the rest is as of `export`."""
    task = task_of(state)
    state = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in state.items()}
    _require_finite(state, dtype)
    state = state if is_partial(state) else to_released(state)

    def save(path: Path) -> None:
        if out.suffix == ".safetensors":
            save_file(state, path, metadata={"format": "pt"} | ({METADATA: json.dumps(record)} if record else {}))
        else:
            torch.save({"ema": state} | record, path)
            require_sound(path, load_checkpoint(path))

    _write(out, save)
    if task is None or not record.get("args", {}).keys() >= SECTIONS:
        return None
    return sampling_command(task, out)


def _record(source: Path) -> dict[str, Any]:
    """What goes with the weights: of their model, and of their training, if it is recorded in them or beside them."""
    record = record_of(source)
    if "args" not in record and (run := read_run(source)):
        record["args"] = run[1]
    return to_ship(record)


def _require_finite(state: State, dtype: torch.dtype) -> None:
    if bad := [name for name, tensor in state.items() if not is_finite(tensor)]:
        raise WeightsError(f"not finite in {dtype}, so nothing was written: {', '.join(bad[:5])}")


def _write(out: Path, save: Callable[[Path], None]) -> None:
    """Give a file or folder its name only when it is complete, and never replace one."""
    if out.exists():
        raise FileExistsError(f"{out} exists and is kept; name another OUT, or remove it first")
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        save(partial)


@friendly_errors("starts anew")
def main(args: argparse.Namespace) -> None:
    if args.command == "verify":
        print(verify(args.source))
        return
    dtype = getattr(torch, args.dtype)
    if args.command == "convert":
        model_class = find_class(args.model_class) if args.model_class else None
        card = CardSettings(args.license, args.data, args.plan, args.samples)
        convert(args.source, args.out, model_class, dtype, args.num_heads, args.skips, args.push_to, card)
        print(args.out)
        if args.push_to:
            push(args.out, args.push_to, args.private)
        return
    if args.command == "average":
        state, record = combine(args.source, args.length, args.step), _record(args.source)
        record["step"] = int(saved(args.source / "averages")[-1].stem) if args.step is None else args.step
        command = write_weights(state, args.out, dtype, record)
    else:
        command = export(args.source, args.out, dtype, args.skips)
    print(f"the weights are in {args.out}; to sample from them:\n  {command}" if command else args.out)


def push(folder: Path, repo: str, private: bool) -> None:
    """Upload a folder, and say where it is, or how to go on."""
    try:
        print(upload(folder, repo, private=private or None))
    except UserError as error:
        raise UserError(f"{error}, and `hf upload {repo} {folder}` uploads what is in {folder}") from error
