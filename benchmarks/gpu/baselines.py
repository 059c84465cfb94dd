"""The same weights in the code that others run: timm's layers for DiT, diffusers' models for the texts' two.

The plain DiT is the published one: block order, float32 parameters of the position embedding, modulation in every
block. Only its timestep and class embeddings are ours, which take no time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu.models import TIMESTEP, Case, build
from skipdit.checkpoints.diffusers_layout import diffusers_config, to_diffusers
from skipdit.checkpoints.released import to_released
from skipdit.layers.embeddings import LabelEmbedder, TimestepEmbedder, unpatchify


@dataclass
class Contender:
    """A model, and its call with inputs that are the same for all contenders.

    Attributes:
        name: what it is, for people.
        call: returns the output (rows, ...).
    """

    name: str
    model: nn.Module
    call: Callable[[], Tensor]


def baseline_of(case: Case, device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Contender, Contender]:
    """Ours and theirs for one case. Raises KeyError for a model that has no baseline."""
    return {"DiT": _dit, "LatteT2V": _latte, "HunyuanDiT": _hunyuan}[case.kind](case, device, dtype, rows)


def _dit(case: Case, device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Contender, Contender]:
    ours = build(case, device, dtype, skip=False)
    with torch.device(device):
        theirs = PlainDiT(**case.settings).eval().requires_grad_(False).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    inputs = tuple(ours.random_inputs(rows).values())
    ahead = ours.condition(inputs[1][:1], inputs[2])[0]  # as a sampler does; theirs computes it in every step
    return (
        Contender("skipdit", ours, lambda: ours(*inputs, conditioning=ahead)),
        Contender("timm", theirs, lambda: theirs(*inputs)),
    )


def _latte(case: Case, device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Contender, Contender]:
    from diffusers import LatteTransformer3DModel

    ours = build(case, device, dtype, skip=False)
    arguments = {
        name: value
        for name, value in ours.config.items()
        if name not in ("skip", "fuse", "flow_shift") and name[0] != "_"
    }
    with torch.device(device):
        theirs = LatteTransformer3DModel(**arguments).eval().requires_grad_(False)
    nn.Module.to(theirs, device, dtype)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # its table of positions is no weight
    inputs = ours.random_inputs(rows, encoded=False)
    ahead = inputs | {"encoder_hidden_states": ours.encode_text(inputs["encoder_hidden_states"])}
    return (
        Contender("skipdit", ours, lambda: ours(**ahead, return_dict=False)[0]),
        Contender("diffusers", theirs, lambda: theirs(**inputs, return_dict=False)[0]),
    )


def _hunyuan(case: Case, device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Contender, Contender]:
    from diffusers import HunyuanDiT2DModel

    ours = build(case, device, dtype)  # whose skips are its own
    state = to_diffusers(to_released(ours.state_dict()))
    with torch.device(device):
        sizes = {"sample_size": ours.config.input_size[0]}
        theirs = HunyuanDiT2DModel(**diffusers_config(state) | sizes).eval().requires_grad_(False)
    nn.Module.to(theirs, device, dtype)
    theirs.load_state_dict(state)
    del state
    inputs = ours.random_inputs(rows, encoded=False)
    t = torch.full((rows,), TIMESTEP, device=device, dtype=dtype)  # its pipeline gives timesteps in the model's dtype
    named = {name: inputs[name] for name in ("hidden_states", "image_rotary_emb")}
    text = {name: inputs[name] for name in ours.text_arguments}
    ahead = named | {"encoder_hidden_states": ours.encode_text(*text.values())}
    return (
        Contender("skipdit", ours, lambda: ours(**ahead, timestep=t, return_dict=False)[0]),
        Contender("diffusers", theirs, lambda: theirs(**named, **text, timestep=t, return_dict=False)[0]),
    )


class PlainDiT(nn.Module):
    """DiT (arXiv 2212.09748) as it was published, on timm's layers. Arguments and parameters as `skipdit`'s."""

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
    ):
        super().__init__()
        from timm.models.vision_transformer import PatchEmbed

        self.patch_size, self.rows = patch_size, input_size // patch_size
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", torch.zeros(1, self.rows**2, hidden_size))
        self.blocks = nn.ModuleList(PlainBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = PlainFinalLayer(hidden_size, patch_size**2 * 2 * in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents (N, C, H, W), timesteps (N,) and class ids (N,) -> noise and variance (N, 2C, H, W)"""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.patch_size, self.rows)


class PlainBlock(nn.Module):
    """Modulated norm, attention, gate; modulated norm, MLP, gate."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        from timm.models.vision_transformer import Attention, Mlp

        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"), drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (N, T, D), conditioning c (N, D) -> (N, T, D)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class PlainFinalLayer(nn.Module):
    """Modulated norm, and a linear map to patches."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (N, T, D), conditioning c (N, D) -> (N, T, out_features)"""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
