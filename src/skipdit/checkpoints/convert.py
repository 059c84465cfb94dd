"""Checkpoints from one layout to another: `python -m skipdit weights`."""

import argparse
import importlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from torch import nn

from skipdit.checkpoints.averages import combine
from skipdit.checkpoints.diffusers_layout import diffusers_config, to_diffusers
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import (
    is_finite,
    is_partial,
    load_checkpoint,
    load_state,
    recorded_flow_shift,
    recorded_settings,
)
from skipdit.checkpoints.loading import load_weights
from skipdit.checkpoints.released import State, to_released
from skipdit.checkpoints.sums import SUMS, require_sound, sha256, verify
from skipdit.cli import friendly_errors
from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, whole_file


def convert(
    source: Path,
    out: Path,
    model_class: type[nn.Module],
    dtype: torch.dtype,
    num_heads: int | None = None,
    skips: str | None = None,
) -> None:
    """Write a checkpoint as a diffusers folder (config.json, safetensors) that `model_class.from_pretrained` opens, and
    the checksums of its files.

    Args:
        model_class: has `config_from_state`, which reads the constructor arguments off the shapes; or diffusers' own
            `HunyuanDiT2DModel`.
        num_heads: attention heads, where neither the checkpoint nor a published size of its width tells them.
        skips: see `load_state`.

    Raises ValueError for weights of another class, damaged ones, or some that are not finite in `dtype`; OSError if
    `out` exists or cannot be written.
    """
    state = load_state(source, skips)
    require_sound(source, state)
    try:
        model = _load(source, state, model_class, dtype, num_heads)
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:  # no such model has the shapes
        raise WeightsError(f"{source}, as {model_class.__name__}: {error}") from error
    _require_finite(model.state_dict(), dtype)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors")))
        (folder / SUMS).write_text(sums, encoding="utf-8")

    _write(out, save)


def _load(
    source: Path, state: State, model_class: type[nn.Module], dtype: torch.dtype, num_heads: int | None
) -> nn.Module:
    """The model that the shapes of its weights tell, with them."""
    if model_class is HunyuanDiT2DModel:
        if missing := {"mlp_t5.0.weight", "skips.0.linear.weight"} - state.keys():
            raise UserError(f"not the weights of a HunyuanDiT with skips as released: they lack {', '.join(missing)}")
        state = to_diffusers(to_released(state))
        config = diffusers_config(state)
    else:
        config = _config(source, state, model_class, num_heads)
    with torch.device("meta"):
        model = model_class(**config)
    model = nn.Module.to(model, dtype=dtype).to_empty(device="cpu")  # not diffusers' own, which warns
    if model_class is HunyuanDiT2DModel:
        model.load_state_dict(state)
    else:
        load_weights(model, {"ema": state, "config": config})
    return model


def export(source: Path, out: Path, dtype: torch.dtype, skips: str | None = None) -> None:
    """Write the weights of a checkpoint as a file of the released layout {"ema": ...}.

    Skips between some pairs only keep our names, which say how they are numbered; see `load_state` for `skips`.

    Raises WeightsError if they are damaged, or not finite in `dtype`; OSError if `out` exists or cannot be written.
    """
    state = load_state(source, skips)
    require_sound(source, state)
    flow_shift = recorded_flow_shift(source)
    write_weights(state, out, dtype, {} if flow_shift is None else {"flow_shift": flow_shift})


def write_weights(state: State, out: Path, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Write weights, under our names, as a file of the released layout, with settings of the model; as `export`."""
    state = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    _require_finite(state, dtype)
    content: dict[str, Any] = {"ema": state if is_partial(state) else to_released(state)}
    content |= {"config": config} if config else {}

    def save(path: Path) -> None:
        torch.save(content, path)
        require_sound(path, load_checkpoint(path))

    _write(out, save)


def _config(source: Path, state: State, model_class: type[nn.Module], num_heads: int | None) -> dict[str, Any]:
    """Constructor arguments: by the shapes of the weights, and, of those that leave no trace there, as recorded."""
    recorded, known = recorded_settings(source), inspect.signature(model_class).parameters
    heads = num_heads or recorded.get("num_heads") or recorded.get("num_attention_heads")
    config = model_class.config_from_state(state, heads)
    config |= {key: value for key, value in recorded.items() if key in known and key not in config}
    if untold := [key for key in ("sample_size", "video_length") if key in known and key not in config]:
        told = ", ".join(f"{key} {known[key].default}" for key in untold)
        warnings.warn(f"nothing in {source} tells {told}, as released: mend config.json if that is wrong", stacklevel=3)
    return config


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


def _model_class(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    try:
        model_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no model class {name}: {error}") from error
    if not hasattr(model_class, "config_from_state") and model_class is not HunyuanDiT2DModel:
        raise UserError(f"{name} cannot be converted to: it has no config_from_state")
    return model_class


@friendly_errors("starts anew")
def main(args: argparse.Namespace) -> None:
    if args.command == "verify":
        print(verify(args.source))
        return
    dtype = getattr(torch, args.dtype)
    if args.command == "average":
        content = combine(args.source, args.length, args.step)
        write_weights(content["ema"], args.out, dtype, content["config"])
    elif args.command == "convert":
        convert(args.source, args.out, _model_class(args.model_class), dtype, args.num_heads, args.skips)
    else:
        export(args.source, args.out, dtype, args.skips)
    print(args.out)
