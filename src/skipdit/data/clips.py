"""Clips of video files or of folders of frames, with single images of other clips riding along.

A clip dataset is indexed by clip. `dataset[i]` is all of clip i; `dataset.draw(i, rng)` is what training sees of it: a
random stretch, and for joint image-video training (Latte, arXiv 2401.03048) frames of other clips behind it.
"""

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from skipdit.config import setting
from skipdit.data.stream import BrokenSample

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".m4v"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
STRETCH = 32  # frames to hold at the size of their file at once
ATTEMPTS = 10  # other pictures to try where one of those that ride along cannot be read


@dataclass
class ClipData:
    """Where training clips come from."""

    kind: str = setting("videos", "videos (files), frames (in folders), or latents (of `python -m skipdit.encode`)")
    path: str = setting("data/clips", "folder of the clips, nested as it may be, or of the latents")
    clip_list: str | None = setting(None, "text file with one clip per line, relative to path; unset: all clips there")
    labelled: bool = setting(False, "a clip's class is the folder right below path that it lies in")
    classes: list[str] = field(
        default_factory=list, metadata={"help": "class folders to use, in order of their ids; empty: all, by name"}
    )
    num_frames: int = setting(16, "frames of a clip")
    frame_interval: int = setting(3, "frames of the source from one to the next; 1 takes all")
    images: int = setting(0, "single frames of other clips beside every clip, for joint training")
    image_path: str | None = setting(None, "folder of the pictures in image_list")
    image_list: str | None = setting(None, "text file, a picture <clip>/<frame> per line: draw images from these")
    image_size: int = setting(256, "pixels along a side: centre crop, then resize")
    latents: str = setting("sample", "mean or sample: what of the autoencoder's posterior is trained on")
    flip: bool = setting(True, "flip half of the clips, and of the images, horizontally")

    def files(self) -> dict[str, str]:
        """What has to be there, by setting."""
        names = ("path", "clip_list", "image_path", "image_list")
        return {f"data.{name}": value for name in names if (value := getattr(self, name)) is not None}


class ClipDataset(Dataset, ABC):
    """What training draws from clips, wherever they are kept.

    A subclass sets `names` and `labels` (None where there are no classes), and opens clips.

    Attributes:
        left_out: messages about clips that are too short, where that is known without reading them.
    """

    names: list[str]
    labels: list[int] | None

    def __init__(self, num_frames: int, frame_interval: int, images: int = 0):
        if num_frames < 1 or frame_interval < 1 or images < 0:
            raise ValueError(
                f"num_frames {num_frames} and frame_interval {frame_interval} must be at least 1, images {images} 0"
            )
        self.num_frames, self.frame_interval, self.images = num_frames, frame_interval, images
        self.left_out: list[str] = []

    @abstractmethod
    def open(self, index: int) -> "Clip":
        """Clip `index`, to read frames from. Raises BrokenSample."""

    @property
    def span(self) -> int:
        """Frames of the source that a clip reaches over."""
        return (self.num_frames - 1) * self.frame_interval + 1

    @property
    def num_classes(self) -> int:
        return 0 if self.labels is None else 1 + max(self.labels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """All frames of a clip."""
        clip = self.open(index)
        return clip.read(range(len(clip))) | self._label(index)

    def draw(self, index: int, rng: np.random.Generator) -> dict:
        """A stretch of clip `index` and `images` frames of other clips, F + I pictures along the first axis.

        With classes, `label` is the clip's and `image_label` (I,) are the images'. Where an image cannot be read,
        another one is drawn, and `broken` holds the message. Raises BrokenSample if the clip itself cannot be read.
        """
        clip = self.open(index)
        if self.is_short(len(clip)):
            raise BrokenSample(self.too_short(index, len(clip)))
        start = int(rng.integers(len(clip) - self.span + 1))
        parts, labels, broken = [clip.read(range(start, start + self.span, self.frame_interval))], [], []
        for _ in range(self.images):
            picture, label, messages = self._draw_image(index, rng)
            parts.append(picture)
            labels.append(label)
            broken += messages
        sample = {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | self._label(index)
        if self.labels is not None and self.images:
            sample["image_label"] = torch.tensor(labels)
        return sample | {"broken": "\n".join(broken)}

    def _draw_image(self, index: int, rng: np.random.Generator) -> tuple[dict, int | None, list[str]]:
        """A picture (1, ...) from another clip, its class, and messages of those that could not be read."""
        broken = []
        for _ in range(ATTEMPTS):
            try:
                return *self.draw_image(index, rng), broken
            except BrokenSample as error:
                broken += error.args
        raise BrokenSample(*broken)

    def draw_image(self, index: int, rng: np.random.Generator) -> tuple[dict, int | None]:
        """One frame of another clip."""
        if len(self) < 2:
            raise ValueError("images of other clips are wanted, and there is only one clip: set data.images=0")
        other = int(rng.integers(len(self) - 1))
        other += other >= index
        clip = self.open(other)
        frame = int(rng.integers(len(clip)))
        return clip.read(range(frame, frame + 1)), self._label(other).get("label")

    def _label(self, index: int) -> dict:
        return {} if self.labels is None else {"label": self.labels[index]}

    def is_short(self, length: int) -> bool:
        return length < self.span

    def too_short(self, index: int, length: int) -> str:
        return f"{self.names[index]}: {length} frames, too short for {self.num_frames} at every {self.frame_interval}"

    def _leave_out_short(self, lengths: list[int]) -> list[int]:
        """Drop the clips that are too short. Returns the positions that stay."""
        kept = [i for i, length in enumerate(lengths) if not self.is_short(length)]
        self.left_out = [self.too_short(i, length) for i, length in enumerate(lengths) if self.is_short(length)]
        if not kept:
            raise ValueError(f"all {len(lengths)} clips are too short, for example {self.left_out[0]}")
        self.names = [self.names[i] for i in kept]
        self.labels = None if self.labels is None else [self.labels[i] for i in kept]
        return kept


class Clip(ABC):
    """An open clip: its number of frames, and a way to read some."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, frames: range) -> dict[str, Tensor]:
        """Tensors with one entry per frame along the first axis. Raises BrokenSample."""


class ClipFolder(ClipDataset):
    """Clips that are video files or, with `kind` "frames", folders of numbered pictures, anywhere below a folder.

    Samples: {"image": uint8 (F + I, 3, S, S)}, with classes "label" and "image_label". Files of other kinds are passed
    over. Raises FileNotFoundError or ValueError, naming the folder, if there is nothing to read.

    Attributes:
        classes: class folders in order of their ids.
        strays: how many files of which suffix were passed over.
        pictures, picture_root: the pictures to draw images from, None for frames of the clips themselves.
    """

    def __init__(self, config: ClipData):
        super().__init__(config.num_frames, config.frame_interval, config.images)
        self.root, self.size, self.kind = Path(config.path), config.image_size, config.kind
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of clips {self.root}")
        self.strays: Counter[str] = Counter()
        self.names = _lines(config.clip_list) if config.clip_list else self._find()
        self.labels = self._classify(config) if config.labelled or config.classes else None
        if not self.names:
            wanted = "video files" if self.kind == "videos" else "folders of pictures"
            place = "" if self.labels is None else " in class folders"
            raise ValueError(f"{config.clip_list or self.root} holds no {wanted}{place}")
        if self.kind == "frames":
            self._leave_out_short([len(_frames(self.root / name)) for name in self.names])
        self.pictures = self._list_pictures(config.image_list) if config.image_list and config.images else None
        self.picture_root = Path(config.image_path or config.path)

    def _find(self) -> list[str]:
        """Names of all clips below the root: video files, or folders that hold pictures themselves."""
        wanted = VIDEO_SUFFIXES if self.kind == "videos" else IMAGE_SUFFIXES
        found = set()
        for folder, _, files in os.walk(self.root, followlinks=True):
            for path in (Path(folder, file) for file in files):
                if _is_a(path, wanted):
                    found.add(path if self.kind == "videos" else path.parent)
                else:
                    self.strays[path.suffix.lower()] += 1
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def open(self, index: int) -> Clip:
        path = self.root / self.names[index]
        return _Video(path, self.size) if self.kind == "videos" else _FrameFolder(path, self.size)

    def draw_image(self, index: int, rng: np.random.Generator) -> tuple[dict, int | None]:
        if self.pictures is None:
            return super().draw_image(index, rng)
        clip = Path(self.names[index])
        own = {clip.name, clip.stem}  # what a folder of this clip's pictures may be called
        name = self.pictures[int(rng.integers(len(self.pictures)))]
        if not own.isdisjoint(Path(name).parts):
            others = [name for name in self.pictures if own.isdisjoint(Path(name).parts)]
            if not others:
                raise ValueError(f"data.image_list lists no picture of another clip than {self.names[index]}")
            name = others[int(rng.integers(len(others)))]
        label = None if self.labels is None else self._class_of(name)
        return _read_pictures([self.picture_root / name], self.size), label

    def _classify(self, config: ClipData) -> list[int]:
        """Class ids of the clips; those outside of the classes asked for are dropped."""
        self.classes = config.classes or sorted({Path(name).parts[0] for name in self.names if "/" in name})
        self.names = [name for name in self.names if "/" in name and Path(name).parts[0] in self.classes]
        if missing := set(self.classes) - {Path(name).parts[0] for name in self.names}:
            raise ValueError(f"{self.root} has no clips of {', '.join(sorted(missing))} (data.classes)")
        return [self._class_of(name) for name in self.names]

    def _list_pictures(self, file: str) -> list[str]:
        """The pictures of a list; those outside of the classes asked for are dropped."""
        listed = _lines(file)
        pictures = [name for name in listed if self.labels is None or Path(name).parts[0] in self.classes]
        if not pictures:
            where = f" in the class folders {', '.join(self.classes)}: it has {listed[0]}" if listed else ""
            raise ValueError(f"{file} lists no pictures{where}")
        return pictures

    def _class_of(self, name: str) -> int:
        return self.classes.index(Path(name).parts[0])


class _Video(Clip):
    """A video file, decoded by decord."""

    def __init__(self, path: Path, size: int):
        import decord  # here: half a second that only readers of videos pay

        decord.logging.set_level(decord.logging.FATAL)
        self.path, self.size = path, size
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
        except Exception as error:  # damaged files make decord raise RuntimeError, DECORDError and others
            raise BrokenSample(f"{path}: {_reason(error)}") from error

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, frames: range) -> dict[str, Tensor]:
        pictures = []
        for start in range(0, len(frames), STRETCH):
            try:
                pixels = self._reader.get_batch(list(frames[start : start + STRETCH])).asnumpy()  # (F, H, W, 3)
            except Exception as error:
                raise BrokenSample(f"{self.path}: {_reason(error)}") from error
            pictures.append(to_square(torch.from_numpy(pixels).permute(0, 3, 1, 2), self.size))
        return {"image": torch.cat(pictures)}


class _FrameFolder(Clip):
    """A folder of numbered pictures."""

    def __init__(self, path: Path, size: int):
        self.size, self._files = size, _frames(path)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, frames: range) -> dict[str, Tensor]:
        return _read_pictures([self._files[i] for i in frames], self.size)


def to_square(pictures: Tensor, size: int) -> Tensor:
    """uint8 (..., 3, H, W) -> (..., 3, size, size): the largest square in the middle, resized with antialiasing."""
    side = min(pictures.shape[-2:])
    pictures = transforms.center_crop(pictures, [side, side])
    return pictures if side == size else transforms.resize(pictures, [size, size], antialias=True)


def _read_pictures(files: Sequence[Path], size: int) -> dict[str, Tensor]:
    pictures = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
        except Exception as error:  # damaged bytes make PIL raise nearly anything
            raise BrokenSample(f"{file}: {error}") from error
        pictures.append(to_square(torch.from_numpy(pixels).permute(2, 0, 1), size))
    return {"image": torch.stack(pictures)}


def _frames(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their numbers: frame_2 comes before frame_10."""
    files = [path for path in folder.iterdir() if _is_a(path, IMAGE_SUFFIXES)] if folder.is_dir() else []
    return sorted(files, key=lambda file: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", file.stem)])


def _is_a(path: Path, suffixes: set[str]) -> bool:
    """Whether a file is one of these by its name. Hidden ones are not: macOS puts a "._clip.mp4" beside a clip.mp4."""
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def _lines(file: str) -> list[str]:
    """The lines of a list, without empty ones."""
    try:
        return [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise FileNotFoundError(f"no list {file}: {error.strerror}") from error


def _reason(error: Exception) -> str:
    """One line of decord's message, without its times and source positions: the same for a file every time."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^(\[[\d:]+\] \S+:\d+: )+", "", text)
