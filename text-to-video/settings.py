"""Settings of text-to-video: of the model, the sampler and the trainer, and the sampler's command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skipdit.cli import friendly_errors, make_parser
from skipdit.config import ConfigError, Settings, load_config, required, setting
from skipdit.data.settings import ClipData
from skipdit.sampling.arguments import (
    ORIGINAL,
    add_cache_arguments,
    add_original_switches,
    add_prompt_argument,
    cache_override,
    checked,
    require_config,
    take_prompts,
)
from skipdit.sampling.run_folder import inherit
from skipdit.sampling.settings import RUN, WINDOW, PromptConfig
from skipdit.training.settings import TrainerConfig


@dataclass(frozen=True)
class SampleConfig(PromptConfig):
    """A text-to-video sampling run."""

    weights: str = required("checkpoint of the transformer: .pt, .safetensors, or folder", identity=False)
    pipeline: str | None = setting(
        "checkpoints/Latte-0",
        "folder with transformer/config.json, scheduler, vae, text_encoder; null: the weights say the first, vae and "
        "text_encoder are set, as those of a run do",
        identity=False,
    )
    skip: bool = setting(True, "the weights have long skips", identity=False)
    fuse: str | None = setting(
        None, "replace or residual long skips; unset: as the pipeline's config.json says", identity=False
    )
    vae: str | None = setting(None, "autoencoder, folder or Hub name; unset: the pipeline's", identity=False)
    temporal_decoder: bool = setting(
        False, "use the pipeline's vae_temporal_decoder, whose clips flicker less", identity=False
    )
    text_encoder: str | None = setting(None, "folder or Hub name; unset: the pipeline's", identity=False)
    tokenizer: str | None = setting(None, "folder or Hub name; unset: beside the text encoder", identity=False)
    out: str = setting("samples/text-to-video", "folder for the clips and the report", identity=False)
    videos_per_prompt: int = setting(1, "clips of each prompt; VBench wants 5", least=1)
    vbench_names: bool = setting(False, "call the files <prompt>-<n>.mp4, as VBench wants them")
    num_frames: int = setting(16, "frames of a clip; 1 makes pictures", least=1)
    fps: float = setting(8.0, "frames per second of the files", least=0.01, most=1000)
    gif: bool = setting(False, "also write every clip as GIF", identity=False)
    temporal_attention: bool = setting(True, "run the temporal blocks; without them frames know nothing of each other")

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that follow from the folder of the run in `weights`; see `load_config`."""
        settings = {name: name for name in ("vae", "text_encoder", "tokenizer")}
        settings |= {"num_frames": "data.num_frames", "skip": "model.skip", "fuse": "model.fuse"}
        of_run = inherit(given, settings, "scheduler")
        return of_run | {"pipeline": None} if of_run and "pipeline" not in given else of_run

    def places(self) -> dict[str, str]:
        """Where everything comes from that is not set directly. Raises ConfigError if nothing says so."""
        autoencoder = "vae_temporal_decoder" if self.temporal_decoder else "vae"
        names = {"vae": autoencoder, "text_encoder": "text_encoder"}
        if self.pipeline is None and (unset := [name for name in names if not getattr(self, name)]):
            raise ConfigError(f"without a pipeline, {' and '.join(unset)} must be set: a folder or Hub name")
        return {name: getattr(self, name) or f"{self.pipeline}/{place}" for name, place in names.items()}


def read_arguments(description: str, argv: list[str] | None = None) -> SampleConfig:
    """Return the settings that the sampler's command line asks for; ends the program for --help and mistakes.

    Args:
        argv: arguments of `skipdit sample`; None: those of the task's own script.
    """
    parser = make_parser(SampleConfig, description, RUN, prog=argv and "skipdit sample")
    add_cache_arguments(parser, WINDOW)
    add_prompt_argument(parser)
    add_original_switches(parser, ORIGINAL, {"sample_method": "scheduler"})
    args = parser.parse_intermixed_args(argv)
    require_config(parser, args)
    with friendly_errors():
        spec = cache_override(args, WINDOW)
        args.overrides = args.first + args.overrides
        config = load_config(SampleConfig, args.config, args.overrides + spec)
        return checked(take_prompts(config, args))


@dataclass(frozen=True)
class ModelConfig(Settings):
    """A model by the config.json of its folder, or by its constructor's arguments; unset ones are the class's."""

    folder: str | None = setting(
        None, "folder of a transformer's config.json; unset: the arguments below", identity=False
    )
    num_attention_heads: int | None = setting(None, "attention heads", least=1)
    attention_head_dim: int | None = setting(None, "width of a head; times the heads it is the model's", least=1)
    num_layers: int | None = setting(None, "pairs of blocks", least=1)
    patch_size: int | None = setting(None, "side of a patch in latent pixels", least=1)
    caption_channels: int | None = setting(None, "channels of the text encoder", least=1)
    skip: bool = setting(True, "long skips")
    fuse: str = setting("replace", "replace, as in the paper, or residual, which starts at the plain model")


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """A text-to-video training run."""

    out: str = setting("results/text-to-video", "run folder", identity=False)
    vae: str = setting("checkpoints/Latte-0/vae", "autoencoder, folder or Hub name", identity=False)
    text_encoder: str = setting("checkpoints/Latte-0/text_encoder", "folder or Hub name; frozen", identity=False)
    tokenizer: str | None = setting(None, "folder or Hub name; unset: beside the text encoder", identity=False)
    text_dtype: str = setting("bfloat16", "of the text encoder: auto, float32, bfloat16 or float16")
    texts: str | None = setting(
        None, "embeddings of `skipdit encode-text`, in place of the text encoder", identity=False
    )
    text_fingerprint: str | None = setting(None, "of the text encoder; the trainer fills it in and refuses another")
    caption_dropout: float = setting(0.1, "share of captions replaced by the empty one, for guidance", least=0, most=1)
    grid_guidance: float = setting(7.5, "guidance scale of the sample clips", identity=False, least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ClipData = field(default_factory=ClipData)
