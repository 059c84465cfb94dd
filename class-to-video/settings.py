"""Settings of class-to-video: of the model, the sampler and the trainer, and the sampler's command line."""

from dataclasses import dataclass, field

from skipdit.cli import friendly_errors, make_parser
from skipdit.config import load_config, setting
from skipdit.data.settings import ClipData
from skipdit.layers.settings import ModelSettings
from skipdit.sampling.arguments import (
    ORIGINAL,
    add_cache_arguments,
    add_original_switches,
    cache_override,
    checked,
    require_config,
)
from skipdit.sampling.settings import RUN, SamplingConfig
from skipdit.training.settings import TrainerConfig

WINDOW = "N{}-900-49"  # the original code's caching window for this task


@dataclass(frozen=True)
class ModelConfig(ModelSettings):
    """A Latte; see `ModelSettings`."""

    name: str | None = setting(None, "Latte-skip, Latte-{S,B,L,XL}/{2,4,8}[-skip]; unset: the arguments below")
    depth: int | None = setting(None, "number of blocks, two per pair", least=1)
    num_classes: int | None = setting(None, "classes; unset: unconditional", least=1)
    n_skips: int | None = setting(None, "long skips, counted from the outer pairs; unset: all of them", least=0)


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """A class-to-video sampling run."""

    out: str = setting("samples/class-to-video", "folder for the clips and the report", identity=False)
    num_frames: int = setting(16, "frames of a clip, as the model was trained", least=1)
    fps: float = setting(8.0, "frames per second of the files", least=0.01, most=1000)
    gif: bool = setting(True, "also write every clip as GIF", identity=False)
    batch_size: int = setting(2, "clips per model call and process (guidance doubles it)", identity=False, least=1)
    model: ModelConfig = field(default_factory=ModelConfig)


def read_arguments(description: str, argv: list[str] | None = None) -> SampleConfig:
    """Return the settings that the sampler's command line asks for; ends the program for --help and mistakes.

    Args:
        argv: arguments of `skipdit sample`; None: those of the task's own script.
    """
    parser = make_parser(SampleConfig, description, RUN, prog=argv and "skipdit sample")
    add_cache_arguments(parser, WINDOW)
    add_original_switches(parser, ORIGINAL, {"sample_method": "sampler"})
    args = parser.parse_intermixed_args(argv)
    require_config(parser, args)
    with friendly_errors():
        spec = cache_override(args, WINDOW)
        return checked(load_config(SampleConfig, args.config, args.first + args.overrides + spec))


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """A class-to-video training run."""

    out: str = setting("results/class-to-video", "run folder", identity=False)
    label_dropout: float = setting(0.1, "share of labels replaced by the null class, for guidance", least=0, most=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ClipData = field(default_factory=ClipData)
