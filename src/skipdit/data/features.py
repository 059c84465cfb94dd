"""Patch tokens of an image encoder beside encoded images: what `train.align` trains towards.

For a shard `latents-N.safetensors` there is `features/features-N.safetensors`, with `features` (N, P, D) float16 of
the same images in the same order. They are not flipped: training mirrors those of flipped images. The metadata: the
encoder and what it saw, and which part of which dataset the shard holds.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipdit.data.latents import LatentInfo, Latents, OpenFiles, Part, differences
from skipdit.encoders.image import ImageEncoder
from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.files import naming, whole_file

AGAIN = "run the command that encoded the latents again, with --features ENCODER"


@dataclass(frozen=True)
class FeatureInfo:
    """How features were made; two files with different ones do not mix."""

    encoder: str = field(compare=False)  # as it was called
    fingerprint: str  # of the encoder
    image_size: int  # pixels along a side of the images
    size: int  # to which they were resized
    mean: tuple[float, ...]  # by which they were normalised
    std: tuple[float, ...]
    grid: tuple[int, ...]  # rows and columns of tokens
    dim: int  # channels of a token
    dtype: str = "float16"

    @classmethod
    def read(cls, latents: Path) -> "FeatureInfo":
        """That of the features beside a shard of latents.

        Raises ValueError, naming their file and what to do, if they are not there, or of other images.
        """
        path = beside(latents)
        if not path.exists():
            raise UserError(f"{path} is not there: {AGAIN}")
        try:
            with safe_open(path, framework="pt") as file:
                info, part = json.loads(file.metadata()["features"]), Part.parse(file.metadata()["part"])
            found = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in info.items()})
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no features ({error}): remove it, and {AGAIN}") from error
        if part != Part.read(latents) or found.image_size != LatentInfo.read(latents).image_size:
            raise UserError(f"{path} is of other images than {latents}: remove {path.parent}, and {AGAIN}")
        return found

    def require(self, latents: Path) -> None:
        """Raise ValueError, naming file and difference, unless the features beside a shard were made like this."""
        if differ := differences(self.read(latents), self):
            path = beside(latents)
            raise UserError(f"{path} has other features ({differ}): remove {path.parent}, and {AGAIN}")


def beside(latents: Path) -> Path:
    """Where the features of a shard of latents lie."""
    return latents.parent / "features" / latents.name.replace("latents", "features")


def write_features(encoder: ImageEncoder, info: FeatureInfo, loader: DataLoader, latents: Path) -> None:
    """Write the features of one shard, unless they are there.

    Args:
        info: of this encoder.
        loader: batches of all images of the shard, in order.
        latents: the shard.

    Raises ValueError if other features are there, or other images can be read than when the latents were encoded.
    """
    target, part = beside(latents), Part.read(latents)
    if target.exists():
        info.require(latents)
        return
    features = torch.empty(part.readable, math.prod(info.grid), info.dim, dtype=torch.float16)
    broken, done = [], 0
    for batch in tqdm(loader, leave=False, desc="features", unit="batch"):
        broken += batch["broken"]
        images = batch["image"][batch["weight"] > 0]
        if 0 < len(images) <= part.readable - done:
            features[done : done + len(images)] = encoder.encode(images)
        done += len(images)
    if tuple(broken) != part.broken:
        raise UserError(f"other images can be read now than were encoded into {latents}: encode all into a new --out")
    with naming(target):
        target.parent.mkdir(exist_ok=True)
    with whole_file(target) as partial:
        metadata = {"features": json.dumps(asdict(info)), "part": json.dumps(asdict(part))}
        save_file({"features": features}, partial, metadata=metadata)


class WithFeatures(Dataset):
    """Encoded images with their features. Samples: those of `Latents`, and "features" (rows, columns, D).

    Attributes:
        features: how all of them were made.

    Raises ValueError for images that are not encoded, and for features that do not fit them.
    """

    def __init__(self, images: Dataset):
        if not isinstance(images, Latents):
            raise UserError(f"train.align needs data.kind=latents with features: {AGAIN}")
        self.images, self.num_classes = images, images.num_classes
        first, *others = images.table.paths
        self._files = OpenFiles([beside(path) for path in images.table.paths])
        self.features = FeatureInfo.read(first)
        for path in others:
            self.features.require(path)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        number, row = self.images.table.place(index)
        try:
            features = self._files[number].get_slice("features")[row].unflatten(0, self.features.grid)
        except (SafetensorError, OSError) as error:
            path = beside(self.images.table.paths[number])
            raise BrokenSample(f"{path}: row {row}: {error}") from error
        return self.images[index] | {"features": features}
