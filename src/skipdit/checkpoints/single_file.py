"""Models made of weights alone: their settings are what the weights record, and what their shapes tell."""

import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipdit.checkpoints.diffusers_layout import diffusers_config, to_diffusers
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_state, model_settings, record_of
from skipdit.checkpoints.loading import identify, load_weights
from skipdit.checkpoints.released import State, to_released
from skipdit.checkpoints.sums import _MARKS, require_sound
from skipdit.utils.errors import UserError

_CLASSES = {  # by backbone
    "text-to-image Hunyuan-DiT": "skipdit.text_to_image.HunyuanDiT",
    "text-to-video Latte": "skipdit.text_to_video.LatteT2V",
    "class-to-video Latte": "skipdit.class_to_video.Latte",
    "class-to-image DiT": "skipdit.class_to_image.DiT",
}


def open_model(
    source: str | Path,
    model_class: type[nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
    skips: str | None = None,
    **settings: Any,
) -> nn.Module:
    """Make the model that weights are of, with them, on the CPU.

    Args:
        source: a file or a folder, see `load_state`.
        model_class: has `config_from_state`, which reads the constructor arguments off the shapes; or diffusers' own
            `HunyuanDiT2DModel`. None takes that of ours which the weights are of.
        skips: see `load_state`.
        settings: constructor arguments of one of our classes, which win over what the weights say; `num_heads` is that
            of any.

    Raises WeightsError for weights of another class or damaged ones, and if neither weights nor settings tell the
    number of attention heads; FileNotFoundError.
    """
    state = load_state(source, skips)
    require_sound(source, state)
    model_class = model_class or find_class(_class_of(source, state))
    ours = hasattr(model_class, "config_from_state")
    try:
        if not ours:
            if missing := {"mlp_t5.0.weight", "skips.0.linear.weight"} - state.keys():
                lacking = ", ".join(missing)
                raise UserError(f"not the weights of a HunyuanDiT with skips as released: they lack {lacking}")
            state = to_diffusers(to_released(state))
        config = _config(source, state, model_class, settings) if ours else diffusers_config(state)
        with torch.device("meta"):
            model = model_class(**config)
        model = nn.Module.to(model, dtype=dtype).to_empty(device="cpu")  # not diffusers' own, which warns
        if ours:
            load_weights(model, {"ema": state, "config": config})
        else:
            model.load_state_dict(state)
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:  # no such model has the shapes
        raise WeightsError(f"{source}, as {model_class.__name__}: {error}") from error
    return model


def task_of(state: State) -> str | None:
    """Return the name of the task whose model weights are of, under our names; None if no model here is."""
    backbone = _backbone_of(state)
    return backbone.partition(" ")[0] if backbone else None


def _backbone_of(state: State) -> str | None:
    """The name of the backbone here that weights are of."""
    backbone = next((name for name, mark in _MARKS.items() if mark in state), None)
    return backbone if backbone in _CLASSES else None


def _class_of(source: str | Path, state: State) -> str:
    """The name of that of our classes which weights are of."""
    if (backbone := _backbone_of(state)) is None:
        raise WeightsError(f"{source} holds {identify(state)}, which no model here is")
    return _CLASSES[backbone]


def find_class(name: str) -> type[nn.Module]:
    """Return a model class by its dotted name. Raises UserError if there is none, or none that `open_model` takes."""
    module, _, attribute = name.rpartition(".")
    try:
        model_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no model class {name}: {error}") from error
    if not hasattr(model_class, "config_from_state") and name != "diffusers.HunyuanDiT2DModel":
        raise UserError(f"{name} cannot be converted to: it has no config_from_state")
    return model_class


def _config(source: str | Path, state: State, model_class: type[nn.Module], settings: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments: as recorded, and, where the record has none, by the shapes of the weights."""
    known, record = inspect.signature(model_class).parameters, record_of(source)
    trained = model_settings(record.get("args"))
    named = {**trained, **record.get("config", {}), **settings}
    heads = named.get("num_heads") or named.get("num_attention_heads")
    told = {**trained, **model_class.config_from_state(state, heads), **record.get("config", {})}
    config = {key: value for key, value in told.items() if key in known}
    config |= {key: value for key, value in settings.items() if key in known or key != "num_heads"}
    if untold := [key for key in ("sample_size", "video_length") if key in known and key not in config]:
        values = ", ".join(f"{key} {known[key].default}" for key in untold)
        warnings.warn(
            f"nothing in {source} tells {values}, as released: state what is right, or mend config.json", stacklevel=3
        )
    return config
