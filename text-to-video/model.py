"""Skip-DiT for text-to-video: Latte T2V (arXiv 2401.03048) with long skip connections (arXiv 2411.17616).

Pairs of a spatial block, which attends within frames and to the text, and a temporal block, which attends across
frames; a pair is one layer of the skip stack. All blocks share one conditioning of the timestep (adaLN-single,
PixArt-alpha, arXiv 2310.00426). Shapes: N clips, F frames, I images, C latent channels, H x W latents, T tokens of a
frame, S tokens of a text, C' channels of a text encoder, D width, K heads.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers loads a pipeline's model by it)
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.layers.attention import modulate, normalize
from skipdit.layers.embeddings import PatchEmbed, sincos_1d, sincos_2d, unpatchify
from skipdit.layers.parallel import context_parallel_plan
from skipdit.layers.skip import SkipTransformer, caches_output, make_skips
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import count_members


class Text(NamedTuple):
    """Texts as the blocks read them: their keys and values in every spatial block, for the clip (1) and its images (I).

    They depend on neither timestep nor latents: a sampler computes them once per run (`LatteT2V.encode_text`).
    """

    keys: tuple[Tensor, ...]  # per spatial block (N, 1 + I, K, S, D / K)
    values: tuple[Tensor, ...]
    bias: Tensor | None  # (N, 1 + I, 1, 1, S), added to the attention's scores


# Of one block: keys and values (N, 1 + I, K, S, D / K), or the projected text (N, 1 + I, S, D) and None; and the bias.
BlockText = tuple[Tensor, Tensor | None, Tensor | None]


class Attention(nn.Module):
    """Multi-head attention on PyTorch's fused kernel; parameter names as in diffusers."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(..., S, D') -> keys and values, each (..., K, S, D / K)"""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """Queries of x (G, T, D) to keys and values (G, K, S, D / K) -> (G, T, D)"""
        x = F.scaled_dot_product_attention(self._heads(self.to_q(x)), keys, values, attn_mask=bias)
        return self.to_out[0](x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., T, D) -> (..., T, D); tokens attend within their row of T."""
        groups = x.shape[:-2]
        x = x.flatten(0, -3)
        return self.attend(x, *self.keys_values(x)).unflatten(0, groups)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


class Block(nn.Module):
    """Transformer block under adaLN-single: a table of its own is added to the modulation that all blocks share."""

    def __init__(self, dim: int, num_heads: int, activation: str, bias: bool, text_dim: int | None = None):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn1 = Attention(dim, num_heads, bias=bias)
        self.attn2 = None if text_dim is None else Attention(dim, num_heads, text_dim, bias)
        self.ff = FeedForward(dim, activation_fn=activation)

    def forward(self, x: Tensor, modulation: Tensor, text: BlockText | None = None, axis: int = -2) -> Tensor:
        """Tokens x (N, F, T, D) -> the same shape.

        Args:
            modulation: (N, 1, 1, 6, D).
            text: for a spatial block; the last I of the F are images.
            axis: the axis of x along which tokens attend to each other: -2, those of a frame; -3, those of the same
                place in all frames.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).unbind(-2)
        h = modulate(normalize(x), shift1, scale1)
        x = torch.addcmul(x, gate1, self.attn1(h.transpose(axis, -2)).transpose(axis, -2))
        if text is not None:
            x = x + self._read(x, *text)
        return torch.addcmul(x, gate2, self.ff(modulate(normalize(x), shift2, scale2)))

    def _read(self, x: Tensor, keys: Tensor, values: Tensor | None, bias: Tensor | None) -> Tensor:
        """Cross-attention. All frames of a clip have one text: their tokens are the queries of one call."""
        if values is None:  # here, inside the block, whose weights FSDP gathers for as long as it runs
            keys, values = self.attn2.keys_values(keys)
        images = keys.shape[1] - 1
        frames = x.shape[1] - images
        clip = x[:, :frames].flatten(1, 2)
        clip = self.attn2.attend(clip, keys[:, 0], values[:, 0], None if bias is None else bias[:, 0])
        clip = clip.unflatten(1, (frames, -1))
        if not images:
            return clip
        own = [None if part is None else part[:, 1:].flatten(0, 1) for part in (keys, values, bias)]
        single = self.attn2.attend(x[:, frames:].flatten(0, 1), *own).unflatten(0, (-1, images))
        return torch.cat([clip, single], dim=1)


class LatteT2V(SkipTransformer):
    """Text-to-video diffusion transformer on latents, with or without long skips; a `transformer` for `LattePipeline`.

    Args:
        num_attention_heads: K.
        attention_head_dim: D / K.
        in_channels: latent channels C.
        out_channels: 2C: noise and variance.
        num_layers: number of pairs.
        cross_attention_dim: width of the projected text, D.
        attention_bias: biases of queries, keys and values.
        sample_size: side of the latents it is made for; others get the positions of its grid, stretched.
        patch_size: side of a patch, in latent pixels.
        activation_fn: of the MLP, as diffusers names them.
        num_embeds_ada_norm: of the released configs, as the next three; only their values work.
        norm_type: see `num_embeds_ada_norm`.
        norm_elementwise_affine: see `num_embeds_ada_norm`.
        norm_eps: see `num_embeds_ada_norm`.
        caption_channels: width of the text encoder.
        video_length: frames it is made for; fewer work.
        skip: whether pair i is joined to pair L-1-i, for every i < L // 2.
        fuse: "replace" as in the paper, or "residual"; see `skipdit.layers.skip.LongSkip`.
        flow_shift: see `SkipTransformer.flow_shift`.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers' convention; also the unit that FSDP shards)
    text_arguments = ("encoder_hidden_states", "encoder_attention_mask")
    _cp_plan = context_parallel_plan(  # temporal blocks attend within the tokens of one place: nothing is gathered
        "transformer_blocks.0",
        "proj_out",
        2,
        gathered=["transformer_blocks.*.attn1.to_k", "transformer_blocks.*.attn1.to_v"],
    )

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 64,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        video_length: int = 16,
        skip: bool = True,
        fuse: str = "replace",
        flow_shift: float | None = None,
    ):
        super().__init__()
        if (norm_type, norm_elementwise_affine, norm_eps) != ("ada_norm_single", False, 1e-6):
            raise UserError(
                f"norm_type {norm_type!r}, norm_elementwise_affine {norm_elementwise_affine}, norm_eps {norm_eps}: "
                "only 'ada_norm_single', False and 1e-6 are known, which all released Latte models have"
            )
        dim = num_attention_heads * attention_head_dim
        block = (dim, num_attention_heads, activation_fn, attention_bias)
        self.pos_embed = PatchEmbed(None, patch_size, in_channels, dim)
        self.adaln_single = AdaLayerNormSingle(dim)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
        self.transformer_blocks = nn.ModuleList(Block(*block, cross_attention_dim) for _ in range(num_layers))
        self.temporal_transformer_blocks = nn.ModuleList(Block(*block) for _ in range(num_layers))
        self.skips = make_skips(dim, num_layers // 2 if skip else 0, fuse)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """PixArt-alpha's initialisation: the text is not read at first, and the model predicts zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(".delta"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        steps, texts = self.adaln_single.emb.timestep_embedder, self.caption_projection
        for small in (steps.linear_1, steps.linear_2, self.adaln_single.linear, texts.linear_1, texts.linear_2):
            nn.init.normal_(small.weight, std=0.02)
        for zero in (self.proj_out, *(block.attn2.to_out[0] for block in self.transformer_blocks)):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @torch.no_grad()
    def encode_text(self, embeddings: Tensor, mask: Tensor | None = None) -> Text:
        """Project texts, and their keys and values for every spatial block: once per run, not per frame and step.

        Args:
            embeddings: (N, S, C') from the text encoder; (N, 1 + I, S, C') with texts of images behind the clip's.
            mask: (N, S) or (N, 1 + I, S), nonzero where there is text; or, without images, a bias on the scores
                (N, 1, S), as diffusers makes it.
        """
        texts, bias = self._project(embeddings, mask)
        pairs = [block.attn2.keys_values(texts) for block in self.transformer_blocks]
        keys, values = zip(*pairs, strict=True)
        return Text(keys, values, bias)

    def _project(self, embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Texts (N, 1 + I, S, D), and the bias (N, 1 + I, 1, 1, S) that their mask is."""
        texts = embeddings.unsqueeze(1) if embeddings.ndim == 3 else embeddings
        if mask is not None and not (mask.ndim == 3 and embeddings.ndim == 3):
            # a text without any token is read as a whole, rather than as nothing, which has no mean
            mask = (1 - mask.to(texts.dtype).reshape(texts.shape[:3])) * -10_000.0
        texts = self.caption_projection(texts)
        return texts, None if mask is None else mask[:, :, None, None].to(texts.dtype)

    @caches_output
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | Text,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        use_image_num: int = 0,
        return_dict: bool = True,
        cache: CacheStep | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise and variance.

        Args:
            hidden_states: noisy latents (N, C, F, H, W); in joint training (N, C, F + I, H, W), single images behind
                the frames. Temporal blocks see the frames only.
            timestep: (N,).
            encoder_hidden_states: (N, S, C'), with images (N, 1 + I, S, C'); or all of them as `encode_text` gives it.
            encoder_attention_mask: see `encode_text`.
            enable_temporal_attentions: False leaves out all temporal blocks.
            use_image_num: I.
            return_dict: False returns a tuple of one.
            cache: `SkipCache.at(i)` of this sampling step; None runs every block.

        Returns:
            `sample`, (N, 2C, F + I, H, W): the noise, then the interpolation coefficient of the log variance.

        Raises ValueError for latents that no patches tile, too many frames, or texts that do not fit the images.
        """
        count, _, pictures, height, width = hidden_states.shape
        frames, patch = pictures - use_image_num, self.config.patch_size
        if height % patch or width % patch:
            raise UserError(f"latents are {height} x {width}, which patches of {patch} do not tile")
        if not 1 <= frames <= self.config.video_length:
            raise UserError(f"clips have {frames} frames, the model was made for up to {self.config.video_length}")
        text = encoder_hidden_states
        if isinstance(text, Text):
            texts = [(keys, values, text.bias) for keys, values in zip(text.keys, text.values, strict=True)]
        else:
            projected, bias = self._project(text, encoder_attention_mask)
            texts = [(projected, None, bias)] * len(self.transformer_blocks)
        if texts[0][0].shape[:2] != (count, 1 + use_image_num):
            raise UserError(
                f"texts are {tuple(texts[0][0].shape[:2])}, wanted is one for each of {count} clips"
                + (f" and its {use_image_num} images" if use_image_num else "")
            )
        dtype = self.scale_shift_table.dtype
        modulation, embedded = self.adaln_single(timestep.expand(count), hidden_dtype=dtype)
        modulation = modulation.unflatten(-1, (6, -1))[:, None, None]  # (N, 1, 1, 6, D)
        x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)).unflatten(0, (count, pictures))  # (N, F, T, D)
        x = x.to(hidden_states.dtype)  # the stream stays float32 under autocast, and where FSDP computes in bf16
        x = x + self._grid(height // patch, width // patch, x.device).to(x.dtype)
        temporal = sincos_1d(torch.arange(frames, dtype=torch.float32, device=x.device), x.shape[-1]).to(x.dtype)

        def pair(i: int, x: Tensor) -> Tensor:
            x = self._run(self.transformer_blocks[i], x, modulation, texts[i])
            if not enable_temporal_attentions:
                return x
            clip = x[:, :frames]
            if i == 0 and frames > 1:
                clip = clip + temporal[:, None]
            clip = self._run(self.temporal_transformer_blocks[i], clip, modulation, None, -3)
            return torch.cat([clip, x[:, frames:]], dim=1) if use_image_num else clip

        x = self._stack(x, pair, cache)
        shift, scale = (self.scale_shift_table + embedded[:, None, None, None]).unbind(-2)
        x = self.proj_out(modulate(normalize(x), shift, scale))
        sample = unpatchify(x, patch, height // patch).transpose(1, 2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _grid(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Positions of a grid of patches (T, D), float32. Grids of other sizes cover the range of that of training."""
        config = self.config
        base = config.sample_size // config.patch_size / max(config.sample_size // 64, 1)
        axes = [torch.arange(n, dtype=torch.float32, device=device) * (base / n) for n in (rows, columns)]
        return sincos_2d(*axes, self.scale_shift_table.shape[1])

    @property
    def depth(self) -> int:
        return len(self.transformer_blocks)

    def random_inputs(
        self,
        batch: int,
        tokens: int = 120,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        temporal: bool = True,
        encoded: bool = True,
    ) -> dict[str, Tensor | Text | bool]:
        """Arguments of `forward` for counting and timing: noise, and a text, by default one that is already encoded."""
        config, like = self.config, {"device": self.device, "dtype": self.dtype}
        size = (frames or config.video_length, height or config.sample_size, width or config.sample_size)
        shape = (batch, config.in_channels, *size)
        text = torch.randn(batch, tokens, config.caption_channels, **like)
        return {
            "hidden_states": torch.randn(shape, **like),
            "timestep": torch.full((batch,), 500, device=self.device),
            "enable_temporal_attentions": temporal,
            "encoder_hidden_states": self.encode_text(text) if encoded else text,
        }

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
        """Constructor arguments that fit a state dict, read off its shapes; those that leave no trace are as released.

        Args:
            state: names as `skipdit.checkpoints.files.load_state` gives them.
            num_heads: None takes those of the released model, if the width is its.

        Raises ValueError if the state dict is another model's, or if the heads of this width are not known.
        """
        try:
            dim, in_channels, patch_size, _ = state["pos_embed.proj.weight"].shape
            out_channels = len(state["proj_out.bias"]) // patch_size**2
            caption_channels = state["caption_projection.linear_1.weight"].shape[1]
            num_layers = count_members(state, "temporal_transformer_blocks")
            cross_attention_dim = state["transformer_blocks.0.attn2.to_k.weight"].shape[1]
        except KeyError as error:
            raise UserError(f"not the weights of a {cls.__name__}: they lack {error}") from error
        if not num_heads and dim != 1152:
            raise UserError(
                f"no released {cls.__name__} is {dim} wide: state its number of attention heads (num_heads)"
            )
        heads = num_heads or 16
        return {
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_layers": num_layers,
            "cross_attention_dim": cross_attention_dim,
            "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in state,
            "patch_size": patch_size,
            "caption_channels": caption_channels,
            "skip": count_members(state, "skips") > 0,
            "fuse": "residual" if "skips.0.delta.weight" in state else "replace",
        }
