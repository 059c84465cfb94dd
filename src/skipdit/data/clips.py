"""Clips of video files or of folders of frames, with single images of other clips riding along.

A clip dataset is indexed by clip. `dataset[i]` is all of clip i; `dataset.draw(i, rng)` is what training sees of it: a
random stretch, and for joint image-video training (Latte, arXiv 2401.03048) frames of other clips behind it.

A caption is a label: where clips have captions, a clip's label is the number of its caption in `dataset.captions`.
"""

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from skipdit.config import load_config, setting
from skipdit.data.captions import complaint, read_rows
from skipdit.data.images import IMAGES, ImageData
from skipdit.data.stream import BrokenSample

CLIPS = ("videos", "frames")  # as data.kind
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".m4v"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
STRETCH = 32  # frames to hold at the size of their file at once
ATTEMPTS = 10  # other pictures to try where one of those that ride along cannot be read
BESIDE = "txt"  # as data.captions: every clip has a text file of its name beside it


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
    captions: str | None = setting(None, "JSONL or CSV of video (relative to path), caption; or txt: beside every clip")
    num_frames: int = setting(16, "frames of a clip")
    frame_interval: int = setting(3, "frames of the source from one to the next; 1 takes all")
    images: int = setting(0, "single frames beside every clip, for joint training")
    images_from: str = setting("other", "other or same: take those frames from other clips, or from the clip itself")
    image_path: str | None = setting(None, "folder of the pictures in image_list")
    image_list: str | None = setting(None, "text file, a picture <clip>/<frame> per line: draw images from these")
    image_size: int = setting(256, "pixels along a side: centre crop, then resize")
    latents: str = setting("sample", "mean or sample: what of the autoencoder's posterior is trained on")
    flip: bool = setting(True, "flip half of the clips, and of the images, horizontally")

    def files(self) -> dict[str, str]:
        """What has to be there, by setting."""
        names = ("path", "clip_list", "image_path", "image_list", *["captions"] * (self.captions != BESIDE))
        return {f"data.{name}": value for name in names if (value := getattr(self, name)) is not None}


def load_section(file: str, overrides: list[str]) -> ClipData | ImageData:
    """The section `data` of a trainer's config, which is of clips or of images.

    Args:
        file: the YAML file.
        overrides: `data.key=value`, as the trainer takes them, or `key=value`.

    Raises ConfigError or ValueError, naming the key.
    """
    overrides = [text.removeprefix("data.") for text in overrides]
    config = load_config(ClipData, file, overrides, section="data")  # has all settings of images, and more
    given = {*OmegaConf.load(file).data, *(text.partition("=")[0] for text in overrides)}
    if config.kind in IMAGES or given <= {field.name for field in fields(ImageData)} - {"kind"}:
        config = load_config(ImageData, file, overrides, section="data")
    if config.kind not in (*CLIPS, *IMAGES, "latents"):
        raise ValueError(f"data.kind is {config.kind!r}; it is {', '.join((*CLIPS, *IMAGES))} or latents")
    return config


class ClipDataset(Dataset, ABC):
    """What training draws from clips, wherever they are kept.

    A subclass sets `names` and `labels` (None where there are neither classes nor captions), and opens clips.

    Args:
        num_frames: F, frames of a clip.
        frame_interval: frames of the source from one to the next.
        images: I, single frames beside every clip.
        images_from: "other" clips or the "same" one.

    Attributes:
        captions: where clips have captions, what `labels` are indices of; clips left out as too short keep theirs here.
        left_out: messages about clips left out for their captions, or as too short where that is known without reading.
        uncaptioned: those of the first kind.

    Raises ValueError, naming the setting, for one that is out of its range.
    """

    names: list[str]
    labels: list[int] | None

    def __init__(self, num_frames: int, frame_interval: int, images: int = 0, images_from: str = "other"):
        if num_frames < 1 or frame_interval < 1 or images < 0:
            raise ValueError(
                f"num_frames {num_frames} and frame_interval {frame_interval} must be at least 1, images {images} 0"
            )
        if images_from not in ("other", "same"):
            raise ValueError(f"data.images_from is {images_from!r}; it is 'other' or 'same'")
        self.num_frames, self.frame_interval = num_frames, frame_interval
        self.images, self.images_from = images, images_from
        self.captions: list[str] | None = None
        self.left_out: list[str] = []
        self.uncaptioned: list[str] = []

    @abstractmethod
    def open(self, index: int) -> "Clip":
        """Clip `index`, to read frames from. Raises BrokenSample."""

    @property
    def span(self) -> int:
        """Frames of the source that a clip reaches over."""
        return (self.num_frames - 1) * self.frame_interval + 1

    @property
    def num_classes(self) -> int:
        """0 without classes; labels that are of captions are none."""
        return 0 if self.labels is None or self.captions is not None else 1 + max(self.labels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        """All frames of a clip."""
        clip = self.open(index)
        return clip.read(range(len(clip))) | self._label(index)

    def draw(self, index: int, rng: np.random.Generator) -> dict:
        """A stretch of clip `index` and `images` single frames, F + I pictures along the first axis.

        With classes or captions, `label` is the clip's and `image_label` (I,) are those of the images' clips. Where an
        image cannot be read, another one is drawn, and `broken` holds the message. Raises BrokenSample if the clip
        itself cannot be read.
        """
        clip = self.open(index)
        if self.is_short(len(clip)):
            raise BrokenSample(self.too_short(index, len(clip)))
        start = int(rng.integers(len(clip) - self.span + 1))
        parts, labels, broken = [clip.read(range(start, start + self.span, self.frame_interval))], [], []
        for _ in range(self.images):
            picture, label, messages = self._draw_image(index, clip, rng)
            parts.append(picture)
            labels.append(label)
            broken += messages
        sample = {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | self._label(index)
        if self.labels is not None and self.images:
            sample["image_label"] = torch.tensor(labels)
        return sample | {"broken": "\n".join(broken)}

    def _draw_image(self, index: int, clip: "Clip", rng: np.random.Generator) -> tuple[dict, int | None, list[str]]:
        """A picture (1, ...) to ride along, its label, and messages of those that could not be read."""
        broken = []
        for _ in range(ATTEMPTS):
            try:
                return *self.draw_image(index, clip, rng), broken
            except BrokenSample as error:
                broken += error.args
        raise BrokenSample(*broken)

    def draw_image(self, index: int, clip: "Clip", rng: np.random.Generator) -> tuple[dict, int | None]:
        """One frame (1, ...) beside clip `index`, which is open as `clip`, and its label. Raises BrokenSample."""
        if self.images_from == "other":
            if len(self) < 2:
                raise ValueError("images of other clips are wanted, and there is only one clip: set data.images=0")
            other = int(rng.integers(len(self) - 1))
            index = other + (other >= index)
            clip = self.open(index)
        frame = int(rng.integers(len(clip)))
        return clip.read(range(frame, frame + 1)), self._label(index).get("label")

    def _label(self, index: int) -> dict:
        return {} if self.labels is None else {"label": self.labels[index]}

    def is_short(self, length: int) -> bool:
        return length < self.span

    def too_short(self, index: int, length: int) -> str:
        return f"{self.names[index]}: {length} frames, too short for {self.num_frames} at every {self.frame_interval}"

    def _leave_out_short(self, lengths: list[int]) -> list[int]:
        """Drop the clips that are too short. Returns the positions that stay."""
        kept = [i for i, length in enumerate(lengths) if not self.is_short(length)]
        short = [self.too_short(i, length) for i, length in enumerate(lengths) if self.is_short(length)]
        if not kept:
            raise ValueError(f"all {len(lengths)} clips are too short, for example {short[0]}")
        self.left_out += short
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

    Samples: {"image": uint8 (F + I, 3, S, S)}, with classes or captions "label" and "image_label". Files of other kinds
    are passed over. Raises FileNotFoundError or ValueError, naming the folder or the captions file and its line, if
    there is nothing to read or settings exclude each other.

    Attributes:
        classes: class folders in order of their ids.
        strays: how many files of which suffix were passed over.
        pictures, picture_root: the pictures to draw images from, None for frames of the clips themselves.
    """

    def __init__(self, config: ClipData):
        super().__init__(config.num_frames, config.frame_interval, config.images, config.images_from)
        _refuse_mixtures(config)
        self.root, self.size, self.kind = Path(config.path), config.image_size, config.kind
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of clips {self.root}")
        self.strays: Counter[str] = Counter()
        if config.captions:
            self._caption(config)
        else:
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

    def draw_image(self, index: int, clip: Clip, rng: np.random.Generator) -> tuple[dict, int | None]:
        if self.pictures is None:
            return super().draw_image(index, clip, rng)
        path = Path(self.names[index])
        own = {path.name, path.stem}  # what a folder of this clip's pictures may be called
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

    def _caption(self, config: ClipData) -> None:
        """Set the names, captions and labels of the clips that have a caption, in the order of their captions."""
        listed = None
        if config.clip_list:
            listed = {Path(name).as_posix(): None for name in _lines(config.clip_list)}  # a set that keeps its order
        beside = config.captions == BESIDE
        rows = self._texts(self._find() if listed is None else listed) if beside else read_rows(config.captions)
        found, places, met = {}, {}, set()
        for place, name, caption in rows:
            if not _is_wanted(name, config.classes) or (listed is not None and name not in listed):
                continue
            met.add(name)
            if reason := complaint(name, caption, places.get(name)):
                self.uncaptioned.append(f"{place}: {reason}")
            else:
                found[name], places[name] = caption.strip(), place
        missing = [name for name in listed or () if name not in met and _is_wanted(name, config.classes)]
        self.uncaptioned += [f"{config.clip_list}: {name} is not in {config.captions}" for name in missing]
        self.left_out += self.uncaptioned
        source = self.root if beside else config.captions
        if not found:
            wanted = "any" if listed is None and not config.classes else "the"
            example = f", for example {self.uncaptioned[0]}" if self.uncaptioned else ""
            raise ValueError(f"{source} has no captions of {wanted} clips{example}")
        if empty := set(config.classes) - {Path(name).parts[0] for name in found}:
            raise ValueError(f"{source} has no captions of clips of {', '.join(sorted(empty))} (data.classes)")
        self.names, self.captions, self.labels = list(found), list(found.values()), list(range(len(found)))

    def _texts(self, names: Iterable[str]) -> Iterator[tuple[str, str, str | bytes | None]]:
        """(text file, clip, its text) for the text files beside clips: None where there is none, bytes if no UTF-8."""
        for name in names:
            path = self.root / (f"{name}.txt" if self.kind == "frames" else Path(name).with_suffix(".txt"))
            text = None
            if path.is_file():
                self.strays -= Counter({".txt": 1})  # which is read, and not passed over
                text = path.read_bytes()
                with suppress(UnicodeDecodeError):
                    text = text.decode("utf-8-sig")
            yield str(path), name, text

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


def _refuse_mixtures(config: ClipData) -> None:
    """Raises ValueError for settings that exclude each other."""
    if config.captions and config.labelled:
        raise ValueError("data.captions and data.labelled: a clip's label is its caption or its class, leave one out")
    if config.captions and config.image_list:
        raise ValueError("data.captions and data.image_list: the pictures of that list have no captions, leave one out")
    if config.images_from == "same" and config.image_list:
        raise ValueError("data.images_from=same takes images from the clip itself: leave out data.image_list")


def _is_wanted(name: str, classes: list[str]) -> bool:
    return not classes or ("/" in name and Path(name).parts[0] in classes)


def _reason(error: Exception) -> str:
    """One line of decord's message, without its times and source positions: the same for a file every time."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^(\[[\d:]+\] \S+:\d+: )+", "", text)
