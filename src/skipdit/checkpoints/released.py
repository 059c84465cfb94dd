"""Names of weights in the released checkpoints, and in the models here."""

import re
from collections.abc import Mapping

from torch import Tensor

from skipdit.checkpoints.diffusers_layout import from_diffusers, is_diffusers_hunyuan
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import count_members

State = Mapping[str, Tensor]

# Released name <-> ours. The released code keeps the norms and the linears of the long skips in two lists.
_RELEASED_TO_OURS = [
    (re.compile(r"^skip_norms\.(\d+)\."), r"skips.\1.norm."),
    (re.compile(r"^skip_linears\.(\d+)\.linear\."), r"skips.\1.linear."),
]
_OURS_TO_RELEASED = [
    (re.compile(r"^skips\.(\d+)\.norm\."), r"skip_norms.\1."),
    (re.compile(r"^skips\.(\d+)\.linear\."), r"skip_linears.\1.linear."),
]
_IN_BLOCKS = re.compile(r"^blocks\.(\d+)\.skip_(?:norm|linear)\.")  # Hunyuan-DiT keeps them in its deep blocks
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel, torch.compile

BEFORE_V1_2 = "Of Hunyuan-DiT only v1.2 is supported, which has no style embedding: Tencent-Hunyuan/HunyuanDiT-v1.2."


def _rename(state: State, rules: list[tuple[re.Pattern, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise UserError(f"two of its tensors are {name}")
        renamed[name] = tensor
    return renamed


def from_released(state: State) -> dict[str, Tensor]:
    """Released parameter names to ours, diffusers' of Hunyuan-DiT too; names that are ours already stay."""
    state = from_diffusers(state) if is_diffusers_hunyuan(state) else state
    deep = sorted({int(match[1]) for name in state if (match := _IN_BLOCKS.match(name))})
    first = deep[0] if deep else 0
    rules = [(re.compile(rf"^blocks\.{i}\.skip_(norm|linear)\."), rf"skips.{i - first}.\1.") for i in deep]
    return _rename(state, _RELEASED_TO_OURS + rules)


def to_released(state: State) -> dict[str, Tensor]:
    """Our parameter names to the released ones; the inverse of `from_released`."""
    if "mlp_t5.0.weight" not in state:
        return _rename(state, _OURS_TO_RELEASED)
    n_skips = count_members(state, "skips")
    first = count_members(state, "blocks") - n_skips
    rules = [(re.compile(rf"^skips\.{j}\.(norm|linear)\."), rf"blocks.{first + j}.skip_\1.") for j in range(n_skips)]
    return _rename(state, rules)


def _turned(state: State) -> dict[str, Tensor]:
    """The same, with released skips numbered from the other end."""
    last = count_members(state, "skip_norms") - 1
    number = re.compile(r"^(skip_norms|skip_linears)\.(\d+)\.")
    return {number.sub(lambda m: f"{m[1]}.{last - int(m[2])}.", name): tensor for name, tensor in state.items()}
