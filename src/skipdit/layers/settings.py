"""Settings of models."""

from dataclasses import dataclass

from skipdit.config import Settings, setting


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The settings that DiT and Latte share: a model by name, or by its constructor's arguments; unset ones are the
    class's defaults or the name's. The last four are newer than the released models, which have none of them.
    """

    name: str | None = setting(None, "published model; unset: the arguments below")
    patch_size: int | None = setting(None, "side of a patch in latent pixels", least=1)
    hidden_size: int | None = setting(None, "width", least=1)
    depth: int | None = setting(None, "number of blocks", least=1)
    num_heads: int | None = setting(None, "attention heads", least=1)
    num_classes: int | None = setting(None, "classes; the null class is added", least=1)
    skip: bool | None = setting(None, "long skips")
    fuse: str | None = setting(None, "how skips join: replace as in the paper, or residual, which start at zero")
    qk_norm: bool | None = setting(None, "normalise queries and keys, for large learning rates")
    rms_norm: bool | None = setting(None, "RMSNorm with weights in place of LayerNorm without")
    swiglu: bool | None = setting(None, "SwiGLU of as many parameters in place of the GELU MLP")
    rotary: bool | None = setting(None, "rotary positions in the attention besides the added ones")
