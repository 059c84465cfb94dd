"""Sample clips from Skip-DiT (Latte), with or without Skip-Cache.

    python class-to-video/sample.py --config configs/class-to-video/demo.yaml --cache N2-900-49-o1
    torchrun --nproc-per-node 8 class-to-video/sample.py --config configs/class-to-video/ucf101_sample_fvd.yaml

Writes every clip as mp4 and, with gif=true, as GIF; sheet.png with frames of the first clips, preview.gif with all of
them in motion, and report.json. The same command again continues an interrupted run; any number of processes makes the
same clips, to rounding.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from skipdit.caching.policies import parse_policy
from skipdit.class_to_video.model import Latte
from skipdit.cli import friendly_errors, make_parser
from skipdit.config import Settings, load_config, setting
from skipdit.data.video import add_gifs, read_mp4
from skipdit.encoders.autoencoder import latent_size
from skipdit.sampling.arguments import add_cache_arguments, cache_override
from skipdit.sampling.class_conditional import ClassSampler, SamplingConfig
from skipdit.sampling.job import run_job
from skipdit.utils.device import process_state
from skipdit.utils.files import write_png
from skipdit.utils.video import check_fps, contact_sheet, side_by_side, write_gif, write_mp4

WINDOW = "N{}-900-49"  # the original code's caching window for this task
SHOWN = 16  # clips on the contact sheet


@dataclass
class ModelConfig(Settings):
    """A model by name, or by its constructor's arguments; unset ones are the class's defaults or the name's."""

    name: str | None = setting(None, "Latte-skip, Latte-{S,B,L,XL}/{2,4,8}[-skip]; unset: the arguments below")
    patch_size: int | None = setting(None, "side of a patch in latent pixels", least=1)
    hidden_size: int | None = setting(None, "width", least=1)
    depth: int | None = setting(None, "number of blocks, two per pair", least=1)
    num_heads: int | None = setting(None, "attention heads", least=1)
    num_classes: int | None = setting(None, "classes; unset: unconditional", least=1)
    skip: bool | None = setting(None, "long skips")
    n_skips: int | None = setting(None, "long skips, counted from the outer pairs; unset: all of them", least=0)
    fuse: str | None = setting(None, "how skips join: replace as in the paper, or residual, which start at zero")


@dataclass
class Config(SamplingConfig):
    """A class-to-video sampling run."""

    out: str = setting("samples/class-to-video", "folder for the clips and the report", identity=False)
    num_frames: int = setting(16, "frames of a clip, as the model was trained", least=1)
    fps: float = setting(8.0, "frames per second of the files", least=0.01, most=1000)
    gif: bool = setting(True, "also write every clip as GIF", identity=False)
    batch_size: int = setting(2, "clips per model call and process (guidance doubles it)", identity=False, least=1)
    model: ModelConfig = field(default_factory=ModelConfig)


def build_model(config: ModelConfig, input_size: int, num_frames: int, in_channels: int = 4) -> Latte:
    """The model of a config for clips of latents of a given side and number of channels."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"input_size": input_size, "num_frames": num_frames, "in_channels": in_channels}
    given["extras"] = 1 if config.num_classes is None else 2
    return Latte.from_name(config.name, **given) if config.name else Latte(**given)


class ClipSampler(ClassSampler):
    """All clips of a config; see `ClassSampler`. Raises ValueError, too, for a frame rate that no file has."""

    fetch = "python -m skipdit download class-to-video"
    unit, suffix = "clip", "mp4"

    def __init__(self, config: Config, branch: int | None):
        check_fps(config.fps)
        super().__init__(config, branch)

    def build(self) -> Latte:
        side = latent_size(self.config.image_size, self.vae)
        return build_model(self.config.model, side, self.config.num_frames, self.vae.config.latent_channels)

    def write(self, path: Path, pixels: Tensor) -> None:
        write_mp4(path, pixels, self.config.fps)


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    policy = parse_policy(config.cache)
    job, report = run_job(ClipSampler(config, policy.branch if policy.caches else None))
    if config.gif:
        add_gifs(map(job.path, job.own()), config.fps)
    if process_state().is_main_process:
        clips = [read_mp4(job.path(i)) for i in range(min(config.num_samples, SHOWN))]
        write_png(contact_sheet(clips), str(job.folder / "sheet.png"))
        write_gif(job.folder / "preview.gif", side_by_side(clips), config.fps)
    return report


def main() -> None:
    parser = make_parser(Config, __doc__)
    add_cache_arguments(parser, WINDOW)
    args = parser.parse_intermixed_args()
    with friendly_errors():
        spec = cache_override(args, WINDOW)
        sample(load_config(Config, args.config, args.overrides + spec))


if __name__ == "__main__":
    main()
