"""Hunyuan-DiT (arXiv 2405.08748): a diffusion transformer for text-to-image whose second half has long skips natively.

Two texts, of a CLIP and of a multilingual T5, make one sequence that every block reads. Shapes: N pictures, C latent
channels, H x W latents, T tokens of a picture, S tokens of the two texts together, D width, K heads.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import HunyuanDiTAttentionPool, apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers loads a pipeline's model by it)
from diffusers.models.normalization import FP32LayerNorm
from timm.layers import Mlp
from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.layers.adaln import FinalLayer
from skipdit.layers.attention import GELU
from skipdit.layers.embeddings import PatchEmbed, TimestepEmbedder, rotary_2d, unpatchify
from skipdit.layers.parallel import context_parallel_plan
from skipdit.layers.skip import SkipTransformer, caches_output, make_skips
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import count_members

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (T, D / K)


class Text(NamedTuple):
    """Two texts as the model reads them; they depend on neither timestep nor latents (`HunyuanDiT.encode_text`)."""

    keys: tuple[Tensor, ...]  # per block (N, K, S, D / K)
    values: tuple[Tensor, ...]
    pooled: Tensor  # (N, D): what the conditioning has of the T5's text


class SelfAttention(nn.Module):
    """Attention among tokens, with normalised and rotated queries and keys; parameter names as released."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = _head_norm(dim, num_heads, qk_norm), _head_norm(dim, num_heads, qk_norm)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """x (N, T, D) -> (N, T, D)"""
        q, k, v = (_heads(part, self.num_heads) for part in self.Wqkv(x).chunk(3, dim=-1))
        q, k = _rotate(self.q_norm(q), rotary), _rotate(self.k_norm(k), rotary)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens to the text; parameter names as released."""

    def __init__(self, dim: int, text_dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.kv_proj = nn.Linear(dim, dim), nn.Linear(text_dim, 2 * dim)
        self.q_norm, self.k_norm = _head_norm(dim, num_heads, qk_norm), _head_norm(dim, num_heads, qk_norm)
        self.out_proj = nn.Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S, C') -> keys and values, each (N, K, S, D / K)"""
        k, v = (_heads(part, self.num_heads) for part in self.kv_proj(text).chunk(2, dim=-1))
        return self.k_norm(k), v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor | None, rotary: Rotary | None) -> Tensor:
        """x (N, T, D), and keys and values of the text, or the text itself and None -> (N, T, D)"""
        if values is None:
            keys, values = self.keys_values(keys)
        q = _rotate(self.q_norm(_heads(self.q_proj(x), self.num_heads)), rotary)
        return self.out_proj(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _head_norm(dim: int, num_heads: int, wanted: bool) -> nn.Module:
    return FP32LayerNorm(dim // num_heads, eps=1e-6) if wanted else nn.Identity()


def _rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    return x if rotary is None else apply_rotary_emb(x, rotary)


class Block(nn.Module):
    """Transformer block whose self-attention is shifted by the conditioning."""

    def __init__(self, dim: int, text_dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (FP32LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn1 = SelfAttention(dim, num_heads, qk_norm)
        self.attn2 = CrossAttention(dim, text_dim, num_heads, qk_norm)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=GELU)
        self.default_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor, c: Tensor, keys: Tensor, values: Tensor | None, rotary: Rotary | None) -> Tensor:
        """Tokens x (N, T, D), conditioning c (N, 1, D), keys and values as for `CrossAttention` -> (N, T, D)"""
        x = x + self.attn1(self.norm1(x) + self.default_modulation(c), rotary)
        x = x + self.attn2(self.norm3(x), keys, values, rotary)  # released names: the third norm comes second
        return x + self.mlp(self.norm2(x))


class HunyuanDiT(SkipTransformer):
    """Text-to-image diffusion transformer on latents; a `transformer` for diffusers' `HunyuanDiTPipeline`.

    Args:
        input_size: (height, width) of the latents it is made for; any other size works, with its own rotary tables.
        patch_size: side of a patch, in latent pixels.
        in_channels: latent channels C.
        hidden_size: width D.
        depth: number of blocks L.
        num_heads: K.
        mlp_ratio: hidden width of the MLP over D.
        learn_sigma: also predict the variance, in C more channels.
        text_states_dim: channels of the CLIP's text.
        text_states_dim_t5: channels of the T5's text.
        text_len: tokens of the CLIP's text.
        text_len_t5: tokens of the T5's text.
        qk_norm: normalise queries and keys.
        skip: whether block i is joined to block L-1-i, for every i < L // 2 - 1.
        fuse: "replace" as released, or "residual"; see `skipdit.layers.skip.LongSkip`.
        flow_shift: see `SkipTransformer.flow_shift`.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers' convention; also the unit that FSDP shards)
    text_arguments = (
        "encoder_hidden_states",
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
    )

    _cp_plan = context_parallel_plan(  # queries meet the rotary tables, which are those of all tokens
        "blocks.0",
        "final_layer",
        1,
        gathered=["blocks.*.attn1.Wqkv", "blocks.*.attn2.q_proj"],
        split=["blocks.*.attn1.out_proj", "blocks.*.attn2.out_proj"],
    )

    @register_to_config
    def __init__(
        self,
        input_size: Sequence[int] = (128, 128),
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1408,
        depth: int = 40,
        num_heads: int = 16,
        mlp_ratio: float = 4.3637,
        learn_sigma: bool = True,
        text_states_dim: int = 1024,
        text_states_dim_t5: int = 2048,
        text_len: int = 77,
        text_len_t5: int = 256,
        qk_norm: bool = True,
        skip: bool = True,
        fuse: str = "replace",
        flow_shift: float | None = None,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        pooled = 1024  # of every released model, whatever its text encoders
        self.x_embedder = PatchEmbed(None, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.text_embedding_padding = nn.Parameter(torch.randn(text_len + text_len_t5, text_states_dim))
        self.mlp_t5 = _mlp(text_states_dim_t5, 4 * text_states_dim_t5, text_states_dim)
        self.pooler = HunyuanDiTAttentionPool(text_len_t5, text_states_dim_t5, num_heads=8, output_dim=pooled)
        self.extra_embedder = _mlp(pooled, 4 * hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, text_states_dim, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.skips = make_skips(hidden_size, depth // 2 - 1 if skip else 0, fuse)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        self.initialize_weights()
        # What diffusers' pipeline asks a transformer for; none of it is an argument, which a config would keep.
        self.num_heads, self.inner_dim = num_heads, hidden_size
        vars(self.config)["sample_size"] = input_size[0]

    def initialize_weights(self) -> None:
        """The released code's initialisation: no block is shifted by the conditioning, the model predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for mlp in (self.extra_embedder, self.mlp_t5, self.t_embedder.mlp):
            nn.init.normal_(mlp[0].weight, std=0.02)
            nn.init.normal_(mlp[2].weight, std=0.02)
        shifts = [block.default_modulation[1] for block in self.blocks]
        deltas = [skip.delta for skip in self.skips if skip.residual]
        for zero in [*shifts, *deltas, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @property
    def head_dim(self) -> int:
        return self.config.hidden_size // self.config.num_heads

    @torch.no_grad()
    def encode_text(self, clip: Tensor, clip_mask: Tensor, t5: Tensor, t5_mask: Tensor) -> Text:
        """What the model computes from the texts alone: once per run, not at every step.

        Args:
            clip: embeddings (N, S1, C1), of the length that the model was made for.
            clip_mask: (N, S1), nonzero where there is text; elsewhere learned padding is read.
            t5: embeddings (N, S2, C2), likewise.
            t5_mask: (N, S2), likewise.
        """
        text, pooled = self._project(clip, clip_mask, t5, t5_mask)
        keys, values = zip(*(block.attn2.keys_values(text) for block in self.blocks), strict=True)
        return Text(keys, values, pooled)

    def _project(self, clip: Tensor, clip_mask: Tensor, t5: Tensor, t5_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The text that the blocks read (N, S, C1), and what the conditioning has of it (N, D)."""
        text = torch.cat([clip, self.mlp_t5(t5)], dim=1)
        mask = torch.cat([clip_mask, t5_mask], dim=1).bool()
        text = torch.where(mask[..., None], text, self.text_embedding_padding.to(text.dtype))
        return text, self.extra_embedder(self.pooler(t5))

    @caches_output
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | Text,
        text_embedding_mask: Tensor | None = None,
        encoder_hidden_states_t5: Tensor | None = None,
        text_embedding_mask_t5: Tensor | None = None,
        image_meta_size: None = None,
        style: None = None,
        image_rotary_emb: Rotary | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        cache: CacheStep | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict v, and the variance.

        Args:
            hidden_states: noisy latents (N, C, H, W).
            timestep: (N,).
            encoder_hidden_states: `clip` of `encode_text`, or its result, in place of all four.
            text_embedding_mask: `clip_mask` of `encode_text`.
            encoder_hidden_states_t5: `t5` of `encode_text`.
            text_embedding_mask_t5: `t5_mask` of `encode_text`.
            image_meta_size: of versions before v1.2; ignored.
            style: of versions before v1.2; ignored.
            image_rotary_emb: cosines and sines (T, D / K) of the tokens' places.
            controlnet_block_samples: (N, T, D) for every skip, outermost first; added to what it brings.
            return_dict: False returns a tuple of one.
            cache: `SkipCache.at(i)` of this sampling step; None runs every block.

        Returns:
            `sample`, (N, 2C, H, W).

        Raises ValueError for latents that no patches tile, or another number of controls than of skips.
        """
        height, width, patch = *hidden_states.shape[-2:], self.config.patch_size
        if height % patch or width % patch:
            raise UserError(f"latents are {height} x {width}, which patches of {patch} do not tile")
        if controlnet_block_samples is not None and len(controlnet_block_samples) != self.n_skips:
            raise UserError(f"there are {len(controlnet_block_samples)} controls for {self.n_skips} skips")
        if isinstance(encoder_hidden_states, Text):
            keys, values, pooled = encoder_hidden_states
        else:
            masks = text_embedding_mask, text_embedding_mask_t5
            text, pooled = self._project(encoder_hidden_states, masks[0], encoder_hidden_states_t5, masks[1])
            keys, values = [text] * len(self.blocks), [None] * len(self.blocks)
        c = (self.t_embedder(timestep.expand(len(hidden_states))) + pooled)[:, None]  # (N, 1, D)
        x = self._stack(
            self.x_embedder(hidden_states).to(hidden_states.dtype),  # under autocast too, the stream is float32
            lambda i, x: self._run(self.blocks[i], x, c, keys[i], values[i], image_rotary_emb),
            cache,
            controlnet_block_samples,
        )
        sample = unpatchify(self.final_layer(x, c), patch, height // patch)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def random_inputs(
        self, batch: int, height: int | None = None, width: int | None = None, encoded: bool = True
    ) -> dict[str, Tensor | Text | Rotary]:
        """Arguments of `forward` for counting and timing: noise, and texts, by default ones that are already encoded.

        Args:
            height: of the latents; None: as the model was made for.
            width: likewise.
        """
        config, like = self.config, {"device": self.device, "dtype": self.dtype}
        size = height or config.input_size[0], width or config.input_size[1]
        clip = torch.randn(batch, config.text_len, config.text_states_dim, **like)
        t5 = torch.randn(batch, config.text_len_t5, config.text_states_dim_t5, **like)
        clip_mask, t5_mask = (torch.ones(states.shape[:2], device=self.device) for states in (clip, t5))
        text = dict(zip(self.text_arguments, (clip, clip_mask, t5, t5_mask), strict=True))
        tables = rotary_tables(*(side // config.patch_size for side in size), self.head_dim)
        return {
            "hidden_states": torch.randn(batch, config.in_channels, *size, **like),
            "timestep": torch.full((batch,), 500, device=self.device),
            "image_rotary_emb": tuple(table.to(self.device) for table in tables),
            **({"encoder_hidden_states": self.encode_text(*text.values())} if encoded else text),
        }

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
        """Constructor arguments that fit a state dict, read off its shapes; those that leave no trace are as released.

        Args:
            state: names as `skipdit.checkpoints.files.load_state` gives them.
            num_heads: None reads them off the norms of queries, or takes those of the released model.

        Raises ValueError if the state dict is another model's, or if its heads are not known.
        """
        try:
            dim, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
            text, text_states_dim = state["text_embedding_padding"].shape
            text_len_t5 = len(state["pooler.positional_embedding"]) - 1  # and one for the mean of all tokens
            qk_norm = "blocks.0.attn1.q_norm.weight" in state
            out_channels = len(state["final_layer.linear.bias"]) // patch_size**2
            mlp_hidden = len(state["blocks.0.mlp.fc1.bias"])
            text_states_dim_t5 = state["mlp_t5.0.weight"].shape[1]
        except KeyError as error:
            raise UserError(f"not the weights of a {cls.__name__}: they lack {error}") from error
        if qk_norm:
            num_heads = dim // len(state["blocks.0.attn1.q_norm.weight"])
        if not num_heads and dim != 1408:
            raise UserError(
                f"no released {cls.__name__} is {dim} wide: state its number of attention heads (num_heads)"
            )
        return {
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": dim,
            "depth": count_members(state, "blocks"),
            "num_heads": num_heads or 16,
            "mlp_ratio": (mlp_hidden + 0.5) / dim,  # the constructor rounds down
            "learn_sigma": out_channels == 2 * in_channels,
            "text_states_dim": text_states_dim,
            "text_states_dim_t5": text_states_dim_t5,
            "text_len": text - text_len_t5,
            "text_len_t5": text_len_t5,
            "qk_norm": qk_norm,
            "skip": count_members(state, "skips") > 0,
            "fuse": "residual" if "skips.0.delta.weight" in state else "replace",
        }


def rotary_tables(rows: int, columns: int, head_dim: int, base: int = 32) -> Rotary:
    """Cosines and sines (rows * columns, head_dim) of a grid of patches, float32.

    The grid is laid over the `base` x `base` one of 512 x 512 pixels: its longer side fills that, its shorter side lies
    in the middle, rounded to whole places. diffusers ends the shorter side too early, by a sixth to a third of a patch.
    """
    longest = max(rows, columns)
    axes = []
    for count in (rows, columns):
        length = round(base / longest * count)
        start = round((base - length) / 2)
        axes.append(start + torch.arange(count, dtype=torch.float64) * (length / count))
    cos, sin = rotary_2d(*axes, head_dim)
    return cos.float(), sin.float()


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
