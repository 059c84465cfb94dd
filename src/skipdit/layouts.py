"""Hunyuan-DiT's weights in diffusers' layout, to and from the released one.

The two name things differently, keep queries, keys and values apart or together, call the second norm the third, and
order the halves of the last modulation differently.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

# diffusers' name, ours; a number stands for any.
_NAMES = [
    ("text_embedder.linear_1", "mlp_t5.0"),
    ("text_embedder.linear_2", "mlp_t5.2"),
    ("pos_embed.proj", "x_embedder.proj"),
    ("time_extra_emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_extra_emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_extra_emb.extra_embedder.linear_1", "extra_embedder.0"),
    ("time_extra_emb.extra_embedder.linear_2", "extra_embedder.2"),
    ("time_extra_emb.style_embedder", "style_embedder"),  # of versions before v1.2
    ("time_extra_emb.pooler", "pooler"),
    *((f"time_extra_emb.pooler.{part}_proj", f"pooler.{part}_proj") for part in "qkvc"),
    ("blocks.#.norm1.linear", "blocks.#.default_modulation.1"),
    ("blocks.#.norm1.norm", "blocks.#.norm1"),
    ("blocks.#.norm2", "blocks.#.norm3"),
    ("blocks.#.norm3", "blocks.#.norm2"),
    ("blocks.#.attn1.to_out.0", "blocks.#.attn1.out_proj"),
    ("blocks.#.attn1.norm_q", "blocks.#.attn1.q_norm"),
    ("blocks.#.attn1.norm_k", "blocks.#.attn1.k_norm"),
    ("blocks.#.attn2.to_q", "blocks.#.attn2.q_proj"),
    ("blocks.#.attn2.to_out.0", "blocks.#.attn2.out_proj"),
    ("blocks.#.attn2.norm_q", "blocks.#.attn2.q_norm"),
    ("blocks.#.attn2.norm_k", "blocks.#.attn2.k_norm"),
    ("blocks.#.ff.net.0.proj", "blocks.#.mlp.fc1"),
    ("blocks.#.ff.net.2", "blocks.#.mlp.fc2"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear"),
]
_TOGETHER = {"attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn2.kv_proj": ("attn2.to_k", "attn2.to_v")}
_LAST_MODULATION = "final_layer.adaLN_modulation.1."


def is_diffusers_hunyuan(state: State) -> bool:
    return "time_extra_emb.timestep_embedder.linear_1.weight" in state


def from_diffusers(state: State) -> dict[str, Tensor]:
    """diffusers' layout to the released one."""
    released, apart = {}, {}
    for name, tensor in state.items():
        match = re.match(r"(blocks\.\d+\.)(attn\d\.to_[qkv])\.(\w+)$", name)
        whole = match and next((key for key, parts in _TOGETHER.items() if match[2] in parts), None)
        if whole:
            apart.setdefault(f"{match[1]}{whole}.{match[3]}", {})[match[2]] = tensor
        else:
            released[_rename(name, 0, 1)] = tensor
    for name, parts in apart.items():
        order = next(parts_of for key, parts_of in _TOGETHER.items() if key in name)
        released[name] = torch.cat([parts[part] for part in order])
    return _swap_halves(released)


def to_diffusers(state: State) -> dict[str, Tensor]:
    """The released layout to diffusers', its inverse."""
    theirs = {}
    for name, tensor in _swap_halves(state).items():
        match = re.match(r"(blocks\.\d+\.)(attn1\.Wqkv|attn2\.kv_proj)\.(\w+)$", name)
        if match:
            parts = _TOGETHER[match[2]]
            pieces = zip(parts, tensor.chunk(len(parts)), strict=True)
            theirs |= {f"{match[1]}{part}.{match[3]}": piece for part, piece in pieces}
        else:
            theirs[_rename(name, 1, 0)] = tensor
    return theirs


def _rename(name: str, source: int, target: int) -> str:
    for pair in _NAMES:
        pattern = re.escape(pair[source]).replace(r"\#", r"(\d+)")
        if match := re.match(rf"{pattern}\.(?=\w+$)", name):
            number = match[1] if match.groups() else ""
            return pair[target].replace("#", number) + name[match.end() - 1 :]
    return name


def _swap_halves(state: State) -> dict[str, Tensor]:
    """The last modulation gives shift and scale in one layout, scale and shift in the other."""
    return {
        name: torch.cat(tensor.chunk(2)[::-1]) if name.startswith(_LAST_MODULATION) else tensor
        for name, tensor in state.items()
    }
