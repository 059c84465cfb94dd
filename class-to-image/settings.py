"""Settings of class-to-image: of the model, the sampler and the trainer, and the sampler's command line."""

from dataclasses import dataclass, field

from skipdit.cli import friendly_errors, make_parser
from skipdit.config import load_config, setting
from skipdit.data.settings import ImageData
from skipdit.layers.settings import ModelSettings
from skipdit.sampling.arguments import (
    ORIGINAL,
    add_cache_arguments,
    add_original_switches,
    cache_override,
    checked,
    original_model_name,
    require_config,
)
from skipdit.sampling.settings import RUN, SamplingConfig
from skipdit.training.settings import JudgeConfig, TrainerConfig

WINDOW = "N{}-1000-20-b4"  # the original code's caching window for this task
SWITCHES = {  # of the original samplers -> settings
    "image-size": "image_size",
    "num-classes": "model.num_classes",
    "vae": "vae=stabilityai/sd-vae-ft-{0}",
    "sample_method": "sampler",
    "sample-dir": "out",
    "global-seed": "seed",
    "per-proc-batch-size": "batch_size",
    "num-fid-samples": "num_samples",
}


@dataclass(frozen=True)
class ModelConfig(ModelSettings):
    """A DiT; see `ModelSettings`."""

    name: str | None = setting(None, "DiT-skip, DiT-{S,B,L,XL}/{2,4,8}[-skip]; unset: the arguments below")
    num_classes: int = setting(1000, "classes; the null class is added", least=1)


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """A class-to-image sampling run."""

    out: str = setting("samples/class-to-image", "folder for the images and the report", identity=False)
    guidance_scale: float = setting(4.0, "classifier-free guidance; 1 is none", least=0)
    guidance_channels: int | None = setting(3, "latent channels to guide; null for all", least=1)
    npz: bool = setting(False, "also pack all images into samples.npz for ADM's evaluation suite", identity=False)
    model: ModelConfig = field(default_factory=ModelConfig)


def read_arguments(description: str, argv: list[str] | None = None) -> SampleConfig:
    """Return the settings that the sampler's command line asks for; ends the program for --help and mistakes.

    Args:
        argv: arguments of `skipdit sample`; None: those of the task's own script.
    """
    default = f"that of the released model which --model names, or {RUN}"
    parser = make_parser(SampleConfig, description, default, prog=argv and "skipdit sample")
    add_cache_arguments(parser, WINDOW)
    parser.add_argument(
        "--model", metavar="NAME", help="model name, as model.name; the original's DiT-cache-N also sets the cache"
    )
    add_original_switches(parser, ORIGINAL, SWITCHES)
    args = parser.parse_intermixed_args(argv)
    if not args.model:
        require_config(parser, args, ", --model")
    with friendly_errors():
        if args.model:
            name, interval = original_model_name(args.model)
            args.overrides.append(f"model.name={name}")
            args.cache_step = args.cache_step or interval
            args.config = args.config or released_config(name, args.first + args.overrides)
        spec = cache_override(args, WINDOW)
        return checked(load_config(SampleConfig, args.config, args.first + args.overrides + spec))


def released_config(model: str, overrides: list[str]) -> str:
    """Return the config of a released model, as the original commands ask for it: without a file."""
    size = "512" if "image_size=512" in overrides else "256"
    return f"configs/class-to-image/imagenet{size}_sample{'' if model.endswith('-skip') else '_plain'}.yaml"


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """A class-to-image training run."""

    out: str = setting("results/class-to-image", "run folder", identity=False)
    label_dropout: float = setting(0.1, "share of labels replaced by the null class, for guidance", least=0, most=1)
    grid_guidance: float = setting(4.0, "guidance scale of the sample grids", identity=False, least=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ImageData = field(default_factory=ImageData)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
