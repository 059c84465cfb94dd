"""Sample images from Skip-DiT, with or without Skip-Cache.

    python class-to-image/sample.py --config configs/class-to-image/demo.yaml --cache N2-1000-20-o1
    torchrun --nproc-per-node 8 class-to-image/sample.py --config configs/class-to-image/imagenet256_sample_50k.yaml

Writes single PNGs, grid.png, report.json and, with npz=true, samples.npz for ADM's evaluation suite. The same command
again continues an interrupted run; any number of processes makes the same images, to rounding.
"""

from skipdit.class_to_image.settings import ModelConfig, read_arguments
from skipdit.class_to_image.settings import SampleConfig as Config
from skipdit.cli import say_start

if __name__ == "__main__":
    read_arguments(__doc__)  # answers --help and mistakes before the imports below, which take seconds
    say_start()


from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from skipdit.class_to_image.model import DiT
from skipdit.cli import friendly_errors
from skipdit.encoders.autoencoder import latent_size
from skipdit.sampling.class_conditional import ClassSampler
from skipdit.sampling.job import Job, run_job
from skipdit.utils.device import process_state
from skipdit.utils.files import whole_file, write_png


def build_model(config: ModelConfig, input_size: int, in_channels: int = 4) -> DiT:
    """The model of a config for latents of a given side and number of channels."""
    given = config.given("name") | {"input_size": input_size, "in_channels": in_channels}
    return DiT.from_name(config.name, **given) if config.name else DiT(**given)


class ImageSampler(ClassSampler):
    """All images of a config; see `ClassSampler`."""

    overview = "grid.png"
    fetch = "skipdit download class-to-image"

    def build(self) -> DiT:
        side = latent_size(self.config.image_size, self.vae)
        return build_model(self.config.model, side, self.vae.config.latent_channels)

    def write(self, path: Path, pixels: Tensor) -> None:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, format="png")


def sample(config: Config) -> dict:
    """Run a config. Returns the report that is also written to report.json."""
    job, report = run_job(ImageSampler.from_config(config))
    if process_state().is_main_process:
        write_outputs(config, job)
    return report


def write_outputs(config: Config, job: Job) -> None:
    """grid.png of the first images, samples.npz if asked for."""
    shown = [torch.from_numpy(_pixels(job, i)).permute(2, 0, 1) for i in range(min(config.num_samples, 64))]
    columns = len(config.classes) or (config.model.num_classes if config.model.num_classes <= 10 else 8)
    write_png(make_grid(torch.stack(shown), nrow=min(columns, 16)), str(job.folder / "grid.png"))
    if config.npz:  # the array names and the layout that ADM's evaluator reads
        packed = np.stack([_pixels(job, i) for i in tqdm(range(config.num_samples), desc="packing", unit="image")])
        with whole_file(job.folder / "samples.npz", keep_suffix=True) as partial:
            np.savez(partial, arr_0=packed)


def _pixels(job: Job, index: int) -> np.ndarray:
    """One image of the job, uint8 (H, W, 3)."""
    with Image.open(job.path(index)) as image:
        return np.array(image)


@friendly_errors()
def main() -> None:
    sample(read_arguments(__doc__))


if __name__ == "__main__":
    main()
