"""Latents encoded once, in safetensors shards that say how they were made.

A shard holds `mean` and, for sampling, `std` (N, 2, C, h, w), scaled: index 1 along the second axis is the flipped
copy; `label` of the pictures, if there are classes. In a shard of clips N counts the frames of all its clips, one clip
after the other, and `length` and `label` have one entry per clip. Its metadata: autoencoder fingerprint and scaling,
"mean" or "sample", dtype, image size, buckets; and which part of which dataset it holds. Where clips or pictures have
captions, the metadata holds those of all of the part, also of unreadable ones, by their numbers in the whole dataset,
and these are the labels. Captioned pictures are sorted by bucket, and a shard is of one.
"""

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from skipdit.data.clips import Clip, ClipDataset
from skipdit.data.kinds import CLIPS, IMAGES, PICTURES
from skipdit.data.pictures import PictureFolder, bucket_sizes
from skipdit.data.settings import ClipData, ImageData, PictureData
from skipdit.encoders.autoencoder import latent_size, shift_factor
from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.provenance import fingerprint


@dataclass(frozen=True)
class LatentInfo:
    """How latents were made; two files with different ones do not mix."""

    vae_id: str
    scaling_factor: float
    kind: str  # mean or sample
    dtype: str
    image_size: int
    buckets: tuple[str, ...] = ()
    shift_factor: float = 0.0

    def __str__(self) -> str:
        size = "" if self.buckets else f"{self.image_size} pixels a side, "
        return f"{size}by the autoencoder {self.vae_id}; kind {self.kind}, {self.dtype}"

    def metadata(self) -> dict[str, str]:
        return {"latents": json.dumps(asdict(self))}

    @classmethod
    def read(cls, path: Path) -> "LatentInfo":
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()["latents"])
                return cls(**info | {"buckets": tuple(info.get("buckets", ()))})
        except (SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a latent file of `skipdit encode`: {error}") from error


@dataclass(frozen=True)
class Part:
    """Which part of which dataset a shard holds."""

    source: str  # kind and folder of the pictures or clips
    start: int
    stop: int
    total: int  # samples in the dataset
    broken: tuple[str, ...] = ()  # messages of the unreadable ones, which the shard lacks
    bucket: int = 0  # of all of them

    @property
    def readable(self) -> int:
        """Samples that the shard holds; without any, it has no tensors."""
        return self.stop - self.start - len(self.broken)

    @classmethod
    def read(cls, path: Path) -> "Part":
        LatentInfo.read(path)  # its error for files of other origin
        with safe_open(path, framework="pt") as file:
            return cls.parse(file.metadata()["part"])

    @classmethod
    def parse(cls, text: str) -> "Part":
        part = json.loads(text)
        return cls(**part | {"broken": tuple(part["broken"])})


class OpenFiles:
    """Files of tensors, memory-mapped, each opened when it is first read. Indexed by number."""

    def __init__(self, paths: Sequence[Path]):
        self._paths, self._opened = paths, {}

    def __getitem__(self, number: int):
        if number not in self._opened:
            self._opened[number] = safe_open(self._paths[number], framework="pt")
        return self._opened[number]

    def __iter__(self) -> Iterator:
        return map(self.__getitem__, range(len(self._paths)))

    def __getstate__(self) -> dict:  # for data loading processes that are spawned: open files do not travel
        return self.__dict__ | {"_opened": {}}


class Shards:
    """The shards of one encoded dataset, memory-mapped, as one table of rows.

    Args:
        folder: what `skipdit encode` wrote.
        expected: how the trainer would have made them; a difference is refused.
        wanted: the `contents` that it takes.

    Attributes:
        clips: whether it is a dataset of clips; rows are their frames.
        captions: those of all samples that were there to encode, which labels are indices of; None without captions.
        buckets: of every sample, the index of its bucket.

    Raises FileNotFoundError or ValueError, naming the folder and the fields that differ.
    """

    def __init__(self, folder: str | Path, expected: LatentInfo | None = None, wanted: str | None = None):
        self.paths = sorted(Path(folder).glob("*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(f"no latents in {folder}; `skipdit encode --help` tells how to make them")
        self.info = LatentInfo.read(self.paths[0])
        for path in self.paths:
            _refuse_difference(path, LatentInfo.read(path), self.info)
        parts = [Part.read(path) for path in self.paths]
        encoded, total = sum(part.stop - part.start for part in parts), parts[0].total
        if encoded != total or len({(part.source, part.total) for part in parts}) > 1:
            raise UserError(
                f"{folder} holds latents of {encoded} of {total} samples: encoding was interrupted, or mixed with "
                "another one; run the same `skipdit encode` command again, or encode into a new folder"
            )
        captions = dict(pair for path, part in zip(self.paths, parts, strict=True) for pair in _captions(path, part))
        self.captions = [captions[number] for number in range(total)] if captions else None
        self.buckets = [part.bucket for part in parts for _ in range(part.readable)]
        self.paths = [p for p, part in zip(self.paths, parts, strict=True) if part.readable]
        if not self.paths:
            raise UserError(f"{folder} holds no latents: none of the {total} samples could be read")
        self._shards = OpenFiles(self.paths)
        self._keys = ["mean", "std"] if self.info.kind == "sample" else ["mean"]
        self._ends = list(accumulate(shard.get_slice("mean").get_shape()[0] for shard in self._shards))
        self.clips = "length" in self._shards[0].keys()  # noqa: SIM118 (not a mapping)
        if wanted not in (None, self.contents):
            raise UserError(f"{folder} holds latents of {self.contents}, not of {wanted}")
        if expected is not None:
            _refuse_difference(self.paths[0], self.info, expected)

    @property
    def contents(self) -> str:
        """What was encoded."""
        return "clips" if self.clips else "pictures with classes" if self.captions is None else "captioned pictures"

    def column(self, name: str) -> list[int] | None:
        """The integers `name` of all shards, one after the other; None if they have none."""
        if name not in self._shards[0].keys():  # noqa: SIM118
            return None
        return [number for shard in self._shards for number in shard.get_tensor(name).tolist()]

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, row: int) -> tuple[int, int]:
        """The number of the shard of a row, and the row's there."""
        number = bisect.bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def read(self, rows: range) -> dict[str, Tensor]:
        """`mean` and, if kept, `std` (R, 2, C, h, w) of rows of one shard. Raises BrokenSample."""
        number, start = self.place(rows.start)
        try:
            tables = {key: self._shards[number].get_slice(key) for key in self._keys}
            stretch = slice(start, start + rows[-1] + 1 - rows.start)
            return {key: table[stretch][:: rows.step] for key, table in tables.items()}
        except (SafetensorError, OSError) as error:
            raise BrokenSample(f"{self.paths[number]}: row {start}: {error}") from error


class Latents(Dataset):
    """Encoded pictures. Samples: {"mean": (2, C, h, w), ["std"], "label"}. Arguments and errors as in `Shards`."""

    contents = "pictures with classes"

    def __init__(self, folder: str | Path, expected: LatentInfo | None = None):
        self.table = Shards(folder, expected, self.contents)
        self.info, self.labels = self.table.info, self.table.column("label")

    @property
    def num_classes(self) -> int:
        return 1 + max(self.labels)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict:
        rows = self.table.read(range(index, index + 1))
        return {key: row[0] for key, row in rows.items()} | {"label": self.labels[index]}


class PictureLatents(Latents):
    """Captioned pictures, encoded; h and w of a sample are those of its bucket. Sorted by bucket.

    Attributes: labels are indices of `captions`; the others are as in `PictureFolder`.
    """

    contents = "captioned pictures"
    num_classes = 0  # labels that are of captions are none

    def __init__(self, folder: str | Path, expected: LatentInfo | None = None):
        super().__init__(folder, expected)
        self.captions, self.buckets = self.table.captions, self.table.buckets
        self.sizes = bucket_sizes(self.info.image_size, self.info.buckets)
        self.left_out: list[str] = []


class ClipLatents(ClipDataset):
    """Encoded clips. Samples: {"mean": (F + I, 2, C, h, w), ["std"], and with classes "label", "image_label"}.

    With captions, labels are indices of `captions`. Arguments as in `ClipDataset` and `Shards`, errors as there.
    """

    def __init__(
        self,
        folder: str | Path,
        num_frames: int,
        frame_interval: int,
        images: int = 0,
        expected: LatentInfo | None = None,
        images_from: str = "other",
    ):
        super().__init__(num_frames, frame_interval, images, images_from)
        self._table = Shards(folder, expected, "clips")
        lengths, self.labels = self._table.column("length"), self._table.column("label")
        self.captions = self._table.captions
        self.names = [f"{folder}: clip {number}" for number in range(len(lengths))]
        starts = [stop - length for stop, length in zip(accumulate(lengths), lengths, strict=True)]
        kept = self._leave_out_short(lengths)
        self._rows = [range(starts[i], starts[i] + lengths[i]) for i in kept]

    def open(self, index: int) -> Clip:
        return _EncodedClip(self._table, self._rows[index])


class _EncodedClip(Clip):
    def __init__(self, table: Shards, rows: range):
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, frames: range) -> dict[str, Tensor]:
        return self._table.read(self._rows[frames.start : frames.stop : frames.step])


def open_images(config: ImageData, vae: AutoencoderKL) -> Dataset:
    """The dataset of a config. Raises ValueError or FileNotFoundError that names what is wrong with it."""
    expected = expected_latents(config.latents, config.image_size, vae)
    if config.kind in IMAGES:
        return IMAGES[config.kind](config.path, config.image_size)
    if config.kind == "latents":
        return Latents(config.path, expected)
    raise UserError(f"data.kind is {config.kind!r}; it is {', '.join(IMAGES)} or latents")


def open_clips(config: ClipData, vae: AutoencoderKL) -> ClipDataset:
    """The clips of a config, or latents made of them with this autoencoder.

    Raises ValueError or FileNotFoundError that names what is wrong with it.
    """
    expected = expected_latents(config.latents, config.image_size, vae)
    if config.kind in CLIPS:
        return CLIPS[config.kind](config)
    if config.kind != "latents":
        raise UserError(f"data.kind is {config.kind!r}; it is {', '.join(CLIPS)} or latents")
    ignored = ("classes", "clip_list", "captions", "image_list", "image_path")
    if given := [f"data.{name}" for name in ignored if getattr(config, name)]:
        names = ", ".join(given)
        raise UserError(f"latents hold the clips of their encoding, and images are their frames: unset {names}")
    drawn = (config.num_frames, config.frame_interval, config.images)
    return ClipLatents(config.path, *drawn, expected, config.images_from)


def open_pictures(config: PictureData, vae: AutoencoderKL) -> PictureFolder | PictureLatents:
    """The captioned pictures of a config, or latents made of them with this autoencoder.

    Raises ValueError or FileNotFoundError that names what is wrong with it.
    """
    expected = expected_latents(config.latents, config.image_size, vae, config.buckets)
    if config.kind in PICTURES:
        return PICTURES[config.kind](config)
    if config.kind != "latents":
        raise UserError(f"data.kind is {config.kind!r}; it is {', '.join(PICTURES)} or latents")
    if config.captions or config.picture_list:
        raise UserError("latents hold the pictures of their encoding: leave out data.captions and data.picture_list")
    return PictureLatents(config.path, expected)


def expected_latents(kind: str, image_size: int, vae: AutoencoderKL, buckets: Sequence[str] = ()) -> LatentInfo:
    """How the latents of a training run have to be made.

    Raises ValueError for an unknown kind, or a bucket that the autoencoder's factor does not divide.
    """
    if kind not in ("mean", "sample"):
        raise UserError(f"data.latents is {kind!r}; it is 'mean' or 'sample'")
    for bucket in buckets:
        for side in bucket_sizes(image_size, [bucket])[0]:
            latent_size(side, vae, f"data.buckets, {bucket}:")
    scale, shift = vae.config.scaling_factor, shift_factor(vae)
    return LatentInfo(fingerprint(vae), scale, kind, "float16", image_size, tuple(buckets), shift)


def _captions(path: Path, part: Part) -> Iterable[tuple[int, str]]:
    """(number in the whole dataset, caption) of the samples of a shard; none without captions."""
    with safe_open(path, framework="pt") as file:
        captions = json.loads(file.metadata().get("captions", "[]"))
    if isinstance(captions, list):  # as files had them before there were buckets
        return enumerate(captions, part.start)
    return ((int(number), caption) for number, caption in captions.items())


def differences(found: Any, expected: Any) -> str:
    """What two of one dataclass differ in, in words; empty if in nothing."""
    return "; ".join(
        f"{key} is {value!r} there, {getattr(expected, key)!r} wanted"
        for key, value in asdict(found).items()
        if value != getattr(expected, key)
    )


def _refuse_difference(path: Path, found: LatentInfo, expected: LatentInfo) -> None:
    if differ := differences(found, expected):
        raise UserError(f"latents {path} do not fit: {differ}. Encode them again with `skipdit encode`.")
