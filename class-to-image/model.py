"""Skip-DiT for class-conditional images: DiT (arXiv 2212.09748) with long skip connections (arXiv 2411.17616).

Shapes: N samples, C latent channels, H x W latents, p patch size, T = (H/p)(W/p) tokens, D width.
"""

from collections.abc import Mapping

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers loads a pipeline's model by it)
from torch import Tensor

from skipdit.caching.steps import CacheStep
from skipdit.layers.adaln import AdaLNTransformer, Conditioning
from skipdit.layers.parallel import context_parallel_plan
from skipdit.layers.skip import caches_output
from skipdit.utils.errors import UserError


class DiT(AdaLNTransformer):
    """Diffusion transformer on latents, with or without long skips.

    Args:
        input_size: height and width of the latents.
        patch_size: side of a patch, in latent pixels.
        in_channels: latent channels C; the output has 2C, noise and variance (learned sigma, arXiv 2102.09672).
        hidden_size: width D.
        depth: number of blocks L.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: class ids are 0 .. num_classes - 1; `num_classes` itself is the null class.
        skip: whether block i is joined to block L-1-i, for every i < L // 2.
        fuse: "replace" as in the paper, or "residual"; see `skipdit.layers.skip.LongSkip`.
        flow_shift: see `SkipTransformer.flow_shift`.
        qk_norm: see `skipdit.layers.settings.ModelSettings`.
        rms_norm: see `skipdit.layers.settings.ModelSettings`.
        swiglu: see `skipdit.layers.settings.ModelSettings`.
        rotary: see `skipdit.layers.settings.ModelSettings`.
    """

    _cp_plan = context_parallel_plan(
        "blocks.0", "final_layer", 1, gathered=["blocks.*.attn.qkv"], split=["blocks.*.attn.proj"]
    )

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
        num_classes: int = 1000,
        skip: bool = True,
        fuse: str = "replace",
        flow_shift: float | None = None,
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        rotary: bool = False,
    ):
        super().__init__()
        self._build(num_classes, n_skips=depth // 2 if skip else 0)

    @caches_output
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cache: CacheStep | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Predict noise and variance.

        Args:
            x: noisy latents (N, C, H, W).
            t: timesteps (N,).
            y: class ids (N,).
            cache: `SkipCache.at(i)` of this sampling step; None runs every block.
            conditioning: of t and y, if computed before; they are not looked at then.

        Returns:
            (N, 2C, H, W): the noise, then the interpolation coefficient of the log variance.
        """
        c = self.embed(t, y) if conditioning is None else None  # (N, 1, D)
        x = self._stack(
            self.x_embedder(x) + self.pos_embed,  # (N, T, D)
            block=lambda i, x: self._block(i, x, c, conditioning),
            cache=cache,
        )
        return self._unpatchify(self.final_layer(x, c, conditioning.final if conditioning else None))

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cache: CacheStep | None = None,
        cfg_channels: int | None = 3,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """See `AdaLNTransformer.forward_with_cfg`. The original DiT guides 3 of its 4 channels."""
        return super().forward_with_cfg(x, t, y, cfg_scale, cache, cfg_channels, conditioning)

    @classmethod
    def config_from_state(cls, state: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
        """See `AdaLNTransformer.config_from_state`."""
        config = super().config_from_state(state, num_heads)
        if "temp_embed" in state:
            raise UserError("these are the weights of a class-to-video Latte, not of a DiT")
        classes = len(state["y_embedder.embedding_table.weight"]) - 1  # the last row is the null class
        return config | {"num_classes": classes}
