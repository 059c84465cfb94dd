"""Skip-Cache for diffusers' own `HunyuanDiT2DModel`, unmodified: its forward pass on the library's skip stack."""

from collections.abc import Sequence

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from skipdit.caching.steps import CacheStep
from skipdit.layers.embeddings import unpatchify
from skipdit.layers.skip import caches_output, skip_stack
from skipdit.utils.errors import UserError


def n_skips(model: HunyuanDiT2DModel) -> int:
    return model.config.num_layers // 2 - 1


@caches_output
def cached_forward(
    model: HunyuanDiT2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    text_embedding_mask: Tensor | None = None,
    encoder_hidden_states_t5: Tensor | None = None,
    text_embedding_mask_t5: Tensor | None = None,
    image_meta_size: Tensor | None = None,
    style: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    return_dict: bool = True,
    cache: CacheStep | None = None,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What the model's own `forward` computes, with `cache`; see there for the other arguments."""
    if controlnet_block_samples is not None and len(controlnet_block_samples) != n_skips(model):
        raise UserError(f"there are {len(controlnet_block_samples)} controls for {n_skips(model)} skips")
    height = hidden_states.shape[-2]
    temb = model.time_extra_emb(timestep, encoder_hidden_states_t5, image_meta_size, style, hidden_dtype=timestep.dtype)
    text = torch.cat([encoder_hidden_states, model.text_embedder(encoder_hidden_states_t5)], dim=1)
    mask = torch.cat([text_embedding_mask, text_embedding_mask_t5], dim=-1).bool()
    text = torch.where(mask[..., None], text, model.text_embedding_padding)
    fused: list[Tensor] = []  # its blocks take the shallow feature along with x, and fuse the two themselves

    def fuse(j: int, x: Tensor, shallow: Tensor) -> Tensor:
        control = None if controlnet_block_samples is None else controlnet_block_samples[n_skips(model) - 1 - j]
        fused.append(shallow if control is None else shallow + control)
        return x

    def block(i: int, x: Tensor) -> Tensor:
        skip = fused.pop() if fused else None
        return model.blocks[i](x, temb=temb, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, skip=skip)

    x = skip_stack(
        model.pos_embed(hidden_states),
        block=block,
        fuse=fuse,
        depth=model.config.num_layers,
        n_skips=n_skips(model),
        cache=cache,
    )
    x = model.proj_out(model.norm_out(x, temb.to(torch.float32)))
    sample = unpatchify(x, model.config.patch_size, height // model.config.patch_size)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
