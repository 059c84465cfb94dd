"""Sample clips from Skip-DiT (Latte), with or without Skip-Cache.

    python class-to-video/sample.py --config configs/class-to-video/demo.yaml --cache N2-900-49-o1
    torchrun --nproc-per-node 8 class-to-video/sample.py --config configs/class-to-video/ucf101_sample_fvd.yaml

Writes every clip as mp4 and, with gif=true, as GIF; sheet.png with frames of the first clips, preview.gif with all of
them in motion, and report.json. The same command again continues an interrupted run; any number of processes makes the
same clips, to rounding.
"""

from skipdit.class_to_video.settings import ModelConfig, read_arguments
from skipdit.class_to_video.settings import SampleConfig as Config
from skipdit.cli import say_start

if __name__ == "__main__":
    read_arguments(__doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from pathlib import Path

from torch import Tensor

from skipdit.class_to_video.model import Latte
from skipdit.cli import friendly_errors
from skipdit.data.video import add_gifs, read_mp4
from skipdit.encoders.autoencoder import latent_size
from skipdit.sampling.class_conditional import ClassSampler
from skipdit.sampling.job import run_job
from skipdit.utils.device import process_state
from skipdit.utils.files import write_png
from skipdit.utils.video import contact_sheet, side_by_side, write_gif, write_mp4

SHOWN = 16  # clips on the contact sheet


def build_model(config: ModelConfig, input_size: int, num_frames: int, in_channels: int = 4) -> Latte:
    """The model of a config for clips of latents of a given side and number of channels."""
    given = config.given("name") | {"input_size": input_size, "num_frames": num_frames, "in_channels": in_channels}
    given["extras"] = 1 if config.num_classes is None else 2
    return Latte.from_name(config.name, **given) if config.name else Latte(**given)


class ClipSampler(ClassSampler):
    """All clips of a config; see `ClassSampler`."""

    fetch = "skipdit download class-to-video"
    unit, suffix = "clip", "mp4"

    def build(self) -> Latte:
        side = latent_size(self.config.image_size, self.vae)
        return build_model(self.config.model, side, self.config.num_frames, self.vae.config.latent_channels)

    def write(self, path: Path, pixels: Tensor) -> None:
        write_mp4(path, pixels, self.config.fps)


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    job, report = run_job(ClipSampler.from_config(config))
    if config.gif:
        add_gifs(map(job.path, job.own()), config.fps)
    if process_state().is_main_process:
        clips = [read_mp4(job.path(i)) for i in range(min(config.num_samples, SHOWN))]
        write_png(contact_sheet(clips), str(job.folder / "sheet.png"))
        write_gif(job.folder / "preview.gif", side_by_side(clips), config.fps)
    return report


@friendly_errors()
def main() -> None:
    sample(read_arguments(__doc__))


if __name__ == "__main__":
    main()
