"""Settings of sampling runs that do not depend on the task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skipdit.config import ConfigError, Settings, required, setting
from skipdit.diffusion.schedulers import SCHEDULERS
from skipdit.sampling.run_folder import inherit

WINDOW = "N{}-700-50"  # the released code's caching window, of both tasks
RUN = "settings of the training that weights=FOLDER names"  # what runs without a config


@dataclass(frozen=True)
class RunConfig(Settings):
    """Settings of every sampling run."""

    out: str = setting("samples", "folder for the samples and the report", identity=False)
    batch_size: int = setting(1, "samples per model call and process (guidance doubles it)", identity=False, least=1)
    seed: int = setting(0, "seed of the run; sample i depends on it and on i", least=0)
    steps: int = setting(50, "sampling steps", least=1)
    guidance_scale: float = setting(7.5, "classifier-free guidance; 1 is none", least=1)
    cache: str = setting("none", "Skip-Cache spec, as --cache")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    tf32: bool = setting(False, "let float32 products run in TF32 on the GPU: faster, to about three digits")
    compile: str = setting(
        "none", "torch.compile: none, default, reduce-overhead (CUDA graphs) or max-autotune", identity=False
    )


@dataclass(frozen=True)
class SamplingConfig(RunConfig):
    """Settings of a run by classes that do not depend on the task."""

    weights: str = required(
        "checkpoint: .pt, .safetensors, or folder; that of a training says model, vae and sizes", identity=False
    )
    vae: str = setting("stabilityai/sd-vae-ft-ema", "autoencoder, folder or Hub name", identity=False)
    image_size: int = setting(256, "pixels along a side", least=1)
    classes: list[int] = field(
        default_factory=list, metadata={"help": "class ids, repeated over the samples; empty: all of them"}
    )
    num_samples: int = setting(8, "samples to make", identity=False, least=1)
    batch_size: int = setting(8, "samples per model call and process (guidance doubles it)", identity=False, least=1)
    sampler: str = setting(
        "ddpm", "ddpm, ddim, deis, dpm, unipc; of order 3: deis3, dpm3, unipc3; of flows: euler, heun"
    )
    steps: int = setting(250, "sampling steps", least=1)
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1 is none", least=0)
    guidance_channels: int | None = setting(None, "latent channels to guide; null for all", least=1)
    guidance_low: int = setting(0, "guide at timesteps from here ...", least=0)
    guidance_high: int = setting(1000, "... to here", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_low > self.guidance_high:
            raise ConfigError(f"guidance_low is {self.guidance_low}, above guidance_high, {self.guidance_high}")

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that follow from the folder of the run in `weights`; see `load_config`."""
        settings = {"vae": "vae", "image_size": "data.image_size", "model": "model"}
        settings |= {"num_frames": "data.num_frames"} if hasattr(cls, "num_frames") else {}
        return inherit(given, settings, "sampler")


@dataclass(frozen=True)
class PromptConfig(RunConfig):
    """Settings of a run from prompts that do not depend on the task."""

    prompts: list[str] = field(default_factory=list, metadata={"identity": False, "help": "what to show, as --prompt"})
    prompt_file: str | None = setting(
        None, "text file with a prompt per line, folder of such files, or CSV, JSON, JSONL of captions", identity=False
    )
    negative_prompt: str = setting("", "what not to show")
    height: int | None = setting(None, "pixels; unset: as the model was made for", identity=False, least=1)
    width: int | None = setting(None, "pixels; unset: as the model was made for", identity=False, least=1)
    scheduler: str = setting("ddim", f"one of {', '.join(SCHEDULERS)}")
    vae_slicing: bool = setting(False, "decode one picture at a time, to save memory", identity=False)
    vae_tiling: bool = setting(False, "decode pictures in tiles, to save more")
    offload: str = setting(
        "none", "keep on the GPU only what runs: none, model (one by one) or group (layer by layer)", identity=False
    )
