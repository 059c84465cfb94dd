"""Sample clips from Skip-DiT (Latte), with or without Skip-Cache.

    python class-to-video/sample.py --config configs/class-to-video/demo.yaml --cache N2-900-49-o1
    torchrun --nproc-per-node 8 class-to-video/sample.py --config configs/class-to-video/ucf101_sample_fvd.yaml

Writes every clip as mp4 and, with gif=true, as GIF; sheet.png with frames of the first clips, preview.gif with all of
them in motion, and report.json. The same command again continues an interrupted run; any number of processes makes the
same clips, to rounding.
"""

from dataclasses import dataclass, field, fields

from diffusers import AutoencoderKL
from torch import Tensor

from skipdit.caching.policies import CacheSpec
from skipdit.class_to_video.model import Latte
from skipdit.cli import friendly_errors, make_parser
from skipdit.config import load_config, setting
from skipdit.data.video import add_gifs, read_mp4
from skipdit.encoders.autoencoder import latent_size
from skipdit.sampling.arguments import add_cache_arguments, cache_override
from skipdit.sampling.class_conditional import Models, SamplingConfig, open_models, run_job
from skipdit.sampling.job import Job
from skipdit.utils.device import process_state
from skipdit.utils.files import write_png
from skipdit.utils.video import check_fps, contact_sheet, side_by_side, write_gif, write_mp4

WINDOW = "N{}-900-49"  # the original code's caching window for this task
SHOWN = 16  # clips on the contact sheet


@dataclass
class ModelConfig:
    """A model by name, or by its constructor's arguments; unset ones are the class's defaults or the name's."""

    name: str | None = setting(None, "Latte-skip, Latte-{S,B,L,XL}/{2,4,8}[-skip]; unset: the arguments below")
    patch_size: int | None = setting(None, "side of a patch in latent pixels")
    hidden_size: int | None = setting(None, "width")
    depth: int | None = setting(None, "number of blocks, two per pair")
    num_heads: int | None = setting(None, "attention heads")
    num_classes: int | None = setting(None, "classes; unset: unconditional")
    skip: bool | None = setting(None, "long skips")
    n_skips: int | None = setting(None, "long skips, counted from the outer pairs; unset: all of them")
    fuse: str | None = setting(None, "how skips join: replace as in the paper, or residual, which start at zero")


@dataclass
class Config(SamplingConfig):
    """A class-to-video sampling run."""

    out: str = setting("samples/class-to-video", "folder for the clips and the report")
    num_frames: int = setting(16, "frames of a clip, as the model was trained")
    fps: float = setting(8.0, "frames per second of the files")
    gif: bool = setting(True, "also write every clip as GIF")
    batch_size: int = setting(2, "clips per model call and process (guidance doubles it)")
    model: ModelConfig = field(default_factory=ModelConfig)


def build_model(config: ModelConfig, input_size: int, num_frames: int, in_channels: int = 4) -> Latte:
    """The model of a config for clips of latents of a given side and number of channels."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"input_size": input_size, "num_frames": num_frames, "in_channels": in_channels}
    given["extras"] = 1 if config.num_classes is None else 2
    return Latte.from_name(config.name, **given) if config.name else Latte(**given)


def load(config: Config, branch: int | None) -> Models:
    """The model and autoencoder of a config; see `open_models`. Raises ValueError, too, for a rate that no file has."""
    check_fps(config.fps)

    def build(vae: AutoencoderKL) -> Latte:
        side = latent_size(config.image_size, vae)
        return build_model(config.model, side, config.num_frames, vae.config.latent_channels)

    return open_models(
        config,
        build,
        branch,
        "python -m skipdit download class-to-video",
    )


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    spec = CacheSpec.parse(config.cache)
    models = load(config, spec.branch if spec.caches else None)

    def save(job: Job, index: int, pixels: Tensor) -> None:
        job.save(index, lambda path: write_mp4(path, pixels, config.fps))

    job, report = run_job(config, models, save, "mp4", "clip", free={"gif"})
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
