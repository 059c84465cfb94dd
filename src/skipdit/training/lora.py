"""Low-rank adapters (LoRA, arXiv 2106.09685) on the attention of a backbone, by the `peft` library."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skipdit.checkpoints.released import to_released
from skipdit.training.steps import set_trainable
from skipdit.utils.errors import UserError
from skipdit.utils.files import whole_file

TARGETS = ("Wqkv", "q_proj", "kv_proj", "out_proj")  # of Hunyuan-DiT's blocks, as its authors train them


def add_lora(model: nn.Module, rank: int) -> None:
    """Put adapters into a model, in place, and freeze all else. They start as no change.

    Raises ValueError without the `peft` library.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "lora_rank needs the peft library: `pip install peft`, or skipdit with its extra `lora`"
        ) from error
    where = rf"blocks\.\d+\.attn\d\.({'|'.join(TARGETS)})"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=where), model)
    set_trainable(model, {"*.lora_[AB].*": True, "*": False})


def merge_lora(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model with its adapters added in, under the names of the model without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for module in merged.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = merged.state_dict()
    return {name.replace(".base_layer.", "."): state[name] for name in state if ".lora_" not in name}


def save_lora(model: nn.Module, folder: Path) -> None:
    """Write `lora.safetensors`, the adapters alone as peft names them, and `merged.pt`, a checkpoint for a sampler."""
    from peft import get_peft_model_state_dict

    adapters = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    with whole_file(folder / "lora.safetensors") as partial:
        save_file(adapters, partial)
    with whole_file(folder / "merged.pt") as partial, open(partial, "wb") as file:
        torch.save({"ema": to_released(merge_lora(model)), "config": {"flow_shift": model.flow_shift}}, file)
