"""Skip-DiT for videos: Latte (arXiv 2401.03048) with long skip connections (arXiv 2411.17616).

Blocks come in pairs, a spatial one that attends within frames and a temporal one that attends across them; a pair is
one layer of the skip stack. Shapes: N clips, F frames, I images, C latent channels, H x W latents, T tokens of a frame,
D width.
"""

from collections.abc import Mapping

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers loads a pipeline's model by it)
from torch import Tensor

from skipdit.caching.steps import CacheStep
from skipdit.layers.adaln import AdaLNTransformer, Conditioning
from skipdit.layers.embeddings import rotary_table, sincos_1d
from skipdit.layers.parallel import context_parallel_plan
from skipdit.layers.skip import caches_output
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import count_members


class Latte(AdaLNTransformer):
    """Video diffusion transformer on latents, with or without long skips.

    Args:
        input_size: height and width of the latents.
        patch_size: side of a patch, in latent pixels.
        in_channels: latent channels C; the output has 2C, noise and variance (learned sigma, arXiv 2102.09672).
        hidden_size: width D.
        depth: number of blocks, two per pair.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_frames: frames F of a clip.
        num_classes: with extras 2, class ids are 0 .. num_classes - 1; `num_classes` itself is the null class.
        extras: 1 unconditional, 2 class-conditional.
        skip: whether pair i is joined to pair L-1-i, for every i < n_skips.
        n_skips: long skips, counted from the outside; None joins all pairs, L // 2.
        fuse: "replace" as in the paper, or "residual"; see `skipdit.layers.skip.LongSkip`.
        flow_shift: see `SkipTransformer.flow_shift`.
        qk_norm: see `skipdit.layers.settings.ModelSettings`.
        rms_norm: see `skipdit.layers.settings.ModelSettings`.
        swiglu: see `skipdit.layers.settings.ModelSettings`.
        rotary: see `skipdit.layers.settings.ModelSettings`.
    """

    blocks_per_layer = 2
    inner_axes = 2

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        num_classes: int = 1000,
        extras: int = 1,
        skip: bool = True,
        n_skips: int | None = None,
        fuse: str = "replace",
        flow_shift: float | None = None,
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        rotary: bool = False,
    ):
        super().__init__()
        pairs, odd = divmod(depth, 2)
        n_skips = (pairs // 2 if n_skips is None else n_skips) if skip else 0
        if odd:
            raise UserError(f"depth {depth} is odd; blocks come in pairs, spatial and temporal")
        if extras not in (1, 2):
            raise UserError(f"extras is {extras}; 1 is unconditional, 2 class-conditional")
        if not 0 <= n_skips <= pairs // 2:
            raise UserError(f"n_skips is {n_skips}; {pairs} pairs have at most {pairs // 2}")
        self._build(num_classes if extras == 2 else None, n_skips)
        self.sample_shape = (num_frames, *self.sample_shape)
        temporal = sincos_1d(torch.arange(num_frames, dtype=torch.float64), hidden_size)
        self.register_buffer("temp_embed", temporal.float()[None])
        if rotary:
            self.temp_rotary_embed = rotary_table(num_frames, 1, hidden_size // num_heads)

    @caches_output
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        y_image: Tensor | None = None,
        use_image_num: int = 0,
        cache: CacheStep | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Predict noise and variance.

        Args:
            x: noisy latents (N, F, C, H, W); in joint training (N, F + I, C, H, W), single images behind the frames.
                Temporal blocks see the frames only.
            t: timesteps (N,).
            y: class ids (N,) of the clips; None if unconditional.
            y_image: class ids (N, I) of the images; None if unconditional.
            use_image_num: I.
            cache: `SkipCache.at(i)` of this sampling step; None runs every block.
            conditioning: of t and y, if computed before; they are not looked at then.

        Returns:
            x's shape with 2C channels: the noise, then the interpolation coefficient of the log variance.
        """
        frames = x.shape[1] - use_image_num
        if frames != self.config.num_frames:
            raise UserError(f"clips have {frames} frames, the model was made for {self.config.num_frames}")
        c = each = self.embed(t, y) if conditioning is None else None  # (N, 1, 1, D): one for all frames
        if use_image_num and self.null_class is not None:  # images have classes of their own: (N, F + I, 1, D)
            if y_image is None:
                raise ValueError("y_image, the classes of the images, is missing")
            images = self.embed(t[:, None], y_image).squeeze(2)
            each = torch.cat([c.expand(-1, frames, -1, -1), images], dim=1)

        def pair(i: int, x: Tensor) -> Tensor:
            x = self._block(2 * i, x, each, conditioning)
            clip = x[:, :frames]
            if i == 0:
                clip = clip + self.temp_embed[:, :, None]
            clip = self._block(2 * i + 1, clip, c, conditioning, axis=-3)
            return torch.cat([clip, x[:, frames:]], dim=1) if use_image_num else clip

        x = self._stack(
            self.x_embedder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) + self.pos_embed,  # (N, F + I, T, D)
            block=pair,
            cache=cache,
        )
        return self._unpatchify(self.final_layer(x, each, conditioning.final if conditioning else None))

    @property
    def _cp_plan(self) -> dict | None:
        """Even blocks are spatial. Temporal ones attend within the tokens of one place: nothing is gathered there."""
        spatial = [f"blocks.{i}.attn" for i in range(0, len(self.blocks), 2)]
        return context_parallel_plan(
            "blocks.0", "final_layer", 2, [f"{name}.qkv" for name in spatial], [f"{name}.proj" for name in spatial]
        )

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
        """See `AdaLNTransformer.config_from_state`."""
        config = super().config_from_state(state, num_heads)
        if "temp_embed" not in state:
            raise UserError("not the weights of a Latte: they lack 'temp_embed'")
        classes = state.get("y_embedder.embedding_table.weight")
        config |= {"num_frames": state["temp_embed"].shape[1], "extras": 1 if classes is None else 2}
        config["n_skips"] = count_members(state, "skips")
        return config | ({} if classes is None else {"num_classes": len(classes) - 1})
