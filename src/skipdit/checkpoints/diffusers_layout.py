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


def diffusers_config(state: State) -> dict[str, int | float | bool]:
    """Arguments of diffusers' `HunyuanDiT2DModel` that fit a state dict of its layout, read off its shapes."""
    width, in_channels, patch_size, _ = state["pos_embed.proj.weight"].shape
    head_dim = len(state["blocks.0.attn1.norm_q.weight"])
    text, cross_attention_dim = state["text_embedding_padding"].shape
    text_len_t5 = len(state["time_extra_emb.pooler.positional_embedding"]) - 1  # and one for the mean of all tokens
    return {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "hidden_size": width,
        "sample_size": 128,  # leaves no trace
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": (len(state["blocks.0.ff.net.0.proj.bias"]) + 0.5) / width,  # the constructor rounds down
        "learn_sigma": len(state["proj_out.bias"]) == 2 * in_channels * patch_size**2,
        "cross_attention_dim": cross_attention_dim,
        "cross_attention_dim_t5": state["text_embedder.linear_1.weight"].shape[1],
        "text_len": text - text_len_t5,
        "text_len_t5": text_len_t5,
        "use_style_cond_and_image_meta_size": False,
    }


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
