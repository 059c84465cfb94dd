"""Latents encoded once, in safetensors shards that say how they were made.

A shard holds `mean` and, for sampling, `std` (N, 2, C, h, w), scaled: index 1 along the second axis is the flipped
copy; `label` (N,). Its metadata: autoencoder fingerprint and scaling, "mean" or "sample", dtype, image size.
"""

import bisect
import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from skipdit.data.stream import BrokenSample


@dataclass(frozen=True)
class LatentInfo:
    """How latents were made; two files with different ones do not mix."""

    vae_id: str
    scaling_factor: float
    kind: str  # mean or sample
    dtype: str
    image_size: int

    def metadata(self) -> dict[str, str]:
        return {"latents": json.dumps(asdict(self))}

    @classmethod
    def read(cls, path: Path) -> "LatentInfo":
        try:
            with safe_open(path, framework="pt") as file:
                return cls(**json.loads(file.metadata()["latents"]))
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a latent file of `python -m skipdit.encode`: {error}") from error


@dataclass(frozen=True)
class Part:
    """Which part of which dataset a shard holds."""

    source: str  # kind and folder of the images
    start: int
    stop: int
    total: int  # images in the dataset
    broken: tuple[str, ...] = ()  # messages of the unreadable images, which the shard lacks

    @classmethod
    def read(cls, path: Path) -> "Part":
        LatentInfo.read(path)  # its error for files of other origin
        with safe_open(path, framework="pt") as file:
            part = json.loads(file.metadata()["part"])
        return cls(**part | {"broken": tuple(part["broken"])})


class Latents(Dataset):
    """Samples {"mean": (2, C, h, w), ["std"], "label"} of a folder of shards, memory-mapped.

    Args:
        folder: what `python -m skipdit.encode` wrote.
        expected: how the trainer would have made them; a difference is refused.

    Raises FileNotFoundError or ValueError, naming the folder and the fields that differ.
    """

    def __init__(self, folder: str | Path, expected: LatentInfo | None = None):
        shards = sorted(Path(folder).glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"no latents in {folder}; `python -m skipdit.encode --help` tells how to make them")
        self.info = LatentInfo.read(shards[0])
        for shard in shards:
            _refuse_difference(shard, LatentInfo.read(shard), self.info)
        if expected is not None:
            _refuse_difference(shards[0], self.info, expected)
        parts = [Part.read(shard) for shard in shards]
        encoded, total = sum(part.stop - part.start for part in parts), parts[0].total
        if encoded != total or len({(part.source, part.total) for part in parts}) > 1:
            raise ValueError(
                f"{folder} holds latents of {encoded} of {total} images: encoding was interrupted, or mixed with "
                "another one; run the same `python -m skipdit.encode` command again, or encode into a new folder"
            )
        self._paths, self._opened = shards, None
        sizes = [shard.get_slice("label").get_shape()[0] for shard in self._shards]
        self._ends = list(accumulate(sizes))
        self.num_classes = 1 + max(int(shard.get_tensor("label").max()) for shard in self._shards)
        self._keys = ["mean", "std"] if self.info.kind == "sample" else ["mean"]

    @property
    def _shards(self) -> list:
        if self._opened is None:
            self._opened = [safe_open(path, framework="pt") for path in self._paths]
        return self._opened

    def __getstate__(self) -> dict:  # for data loading processes that are spawned: open files do not travel
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        shard = self._shards[number]
        try:
            return {key: shard.get_slice(key)[row] for key in self._keys} | {
                "label": int(shard.get_slice("label")[row])
            }
        except (SafetensorError, OSError) as error:
            raise BrokenSample(f"{self._paths[number]}: row {row}: {error}") from error


def _refuse_difference(path: Path, found: LatentInfo, expected: LatentInfo) -> None:
    differ = [
        f"{key} is {value!r} there, {getattr(expected, key)!r} wanted"
        for key, value in asdict(found).items()
        if value != getattr(expected, key)
    ]
    if differ:
        raise ValueError(
            f"latents {path} do not fit: {'; '.join(differ)}. Encode them again with `python -m skipdit.encode`."
        )
