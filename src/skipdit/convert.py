"""Checkpoints from one layout to another; the commands of `python -m skipdit.weights`.

    python -m skipdit.weights convert IN OUT       # a safetensors folder for `DiT.from_pretrained(OUT)`
    python -m skipdit.weights convert checkpoints/ffs-skip.pt latte-ffs --model-class skipdit.class_to_video.Latte
    python -m skipdit.weights convert results/t2i transformer --model-class diffusers.HunyuanDiT2DModel
    python -m skipdit.weights export IN OUT.pt     # the released layout {"ema": ...}, to ship

IN is anything that `load_weights` reads; of a training checkpoint the EMA is taken. OUT must not exist yet.
"""

import argparse
import importlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from safetensors import SafetensorError
from torch import nn

from skipdit.layouts import diffusers_config, to_diffusers
from skipdit.weights import State, WeightsError, load_state, load_weights, read, to_released


def convert(
    source: Path, out: Path, model_class: type[nn.Module], dtype: torch.dtype, num_heads: int | None = None
) -> None:
    """Write a checkpoint as a diffusers folder (config.json, safetensors) that `model_class.from_pretrained` opens.

    Args:
        model_class: has `config_from_state`, which reads the constructor arguments off the shapes; or diffusers' own
            `HunyuanDiT2DModel`.
        num_heads: attention heads, where neither the checkpoint nor a published size of its width tells them.

    Raises ValueError for weights of another class, or that are not finite in `dtype`; OSError if `out` exists or
    cannot be written.
    """
    state = load_state(source)
    if model_class is HunyuanDiT2DModel:
        if missing := {"mlp_t5.0.weight", "skips.0.linear.weight"} - state.keys():
            raise ValueError(f"not the weights of a HunyuanDiT with skips as released: they lack {', '.join(missing)}")
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
        load_weights(model, state)
    _require_finite(model.state_dict(), dtype)
    _write(out, model.save_pretrained)


def export(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the weights of a checkpoint as a file of the released layout {"ema": ...}.

    Raises WeightsError if they are not finite in `dtype`; OSError if `out` exists or cannot be written.
    """
    state = {name: tensor.to(dtype, copy=True) for name, tensor in load_state(source).items()}
    _require_finite(state, dtype)
    _write(out, lambda path: torch.save({"ema": to_released(state)}, path))


def _config(source: Path, state: State, model_class: type[nn.Module], num_heads: int | None) -> dict[str, Any]:
    """Constructor arguments: by the shapes of the weights, and, of those that leave no trace there, as recorded."""
    recorded, known = _recorded(source), inspect.signature(model_class).parameters
    heads = num_heads or recorded.get("num_heads") or recorded.get("num_attention_heads")
    config = model_class.config_from_state(state, heads)
    config |= {key: value for key, value in recorded.items() if key in known and key not in config}
    if untold := [key for key in ("sample_size", "video_length") if key in known and key not in config]:
        told = ", ".join(f"{key} {known[key].default}" for key in untold)
        warnings.warn(f"nothing in {source} tells {told}, as released: mend config.json if that is wrong", stacklevel=3)
    return config


def _recorded(source: Path) -> Mapping[str, Any]:
    """A model's settings, as the config.json beside safetensors or our trainer's checkpoints have them, if they do."""
    file = (source.parent if source.suffix == ".safetensors" else source) / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    content = read(source)
    settings = content.get("config") or content.get("args")
    if isinstance(settings, Mapping):
        settings = settings.get("model", settings)
    return settings if isinstance(settings, Mapping) else {}


def _require_finite(state: State, dtype: torch.dtype) -> None:
    if bad := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise WeightsError(f"not finite in {dtype}, so nothing was written: {', '.join(bad[:5])}")


def _write(out: Path, save: Callable[[Path], None]) -> None:
    """Give a file or folder its name only when it is complete, and never replace one."""
    if out.exists():
        raise FileExistsError(f"{out} exists and is kept; name another OUT, or remove it first")
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save(partial)
        os.replace(partial, out)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise OSError(f"could not write {out}: {error}") from error


def _model_class(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    try:
        model_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no model class {name}: {error}") from error
    if not hasattr(model_class, "config_from_state") and model_class is not HunyuanDiT2DModel:
        raise ValueError(f"{name} cannot be converted to: it has no config_from_state")
    return model_class


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m skipdit.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in {"convert": "make a folder for from_pretrained", "export": "make a file to ship"}.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("source", type=Path, metavar="IN", help="a .pt or .safetensors file, or a folder")
        command.add_argument("out", type=Path, metavar="OUT", help="must not exist yet")
        command.add_argument(
            "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="on disk [%(default)s]"
        )
    command = commands.choices["convert"]
    command.add_argument("--model-class", default="skipdit.class_to_image.DiT", metavar="CLASS", help="[%(default)s]")
    command.add_argument("--num-heads", type=int, metavar="H", help="attention heads, if the width is no published one")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    try:
        if args.command == "convert":
            convert(args.source, args.out, _model_class(args.model_class), dtype, args.num_heads)
        else:
            export(args.source, args.out, dtype)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(args.out)


if __name__ == "__main__":
    main()
