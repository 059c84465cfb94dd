"""Clips that are video files, or folders of numbered pictures."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from skipdit.data.captions import BESIDE, Row, match, read_rows, texts_beside
from skipdit.data.clips import Clip, ClipDataset
from skipdit.data.files import IMAGE_SUFFIXES, is_a, read_list, read_picture, walk
from skipdit.data.settings import ClipData
from skipdit.data.video import Video, load_av
from skipdit.utils.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".m4v"}
STRETCH = 32  # frames to hold at the size of their file at once


class ClipFolder(ClipDataset):
    """Clips that are video files or, with `kind` "frames", folders of numbered pictures, anywhere below a folder.

    Samples: {"image": uint8 (F + I, 3, S, S)}, with classes or captions "label" and "image_label". Files of other kinds
    are passed over. Raises FileNotFoundError or ValueError, naming the folder or the captions file and its line, if
    there is nothing to read, settings exclude each other, or videos lack their library.

    Attributes:
        classes: class folders in order of their ids.
        strays: how many files of which suffix were passed over.
        pictures, picture_root: the pictures to draw images from, None for frames of the clips themselves.
    """

    def __init__(self, config: ClipData):
        super().__init__(config.num_frames, config.frame_interval, config.images, config.images_from)
        refuse_mixtures(config)
        self.root, self.size, self.kind = Path(config.path), config.image_size, config.kind
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of clips {self.root}")
        if self.kind == "videos":
            load_av()  # or say that it is missing, before many processes read
        self.strays: Counter[str] = Counter()
        if config.captions:
            self._caption(config)
        else:
            self.names = read_list(config.clip_list) if config.clip_list else self._find()
            self.labels = self._classify(config) if config.labelled or config.classes else None
        if not self.names:
            wanted = "video files" if self.kind == "videos" else "folders of pictures"
            place = "" if self.labels is None else " in class folders"
            raise UserError(f"{config.clip_list or self.root} holds no {wanted}{place}")
        if self.kind == "frames":
            self._leave_out_short([len(_frames(self.root / name)) for name in self.names])
        self.pictures = self._list_pictures(config.image_list) if config.image_list and config.images else None
        self.picture_root = Path(config.image_path or config.path)

    def _find(self) -> list[str]:
        """Names of all clips below the root: video files, or folders that hold pictures themselves."""
        wanted = VIDEO_SUFFIXES if self.kind == "videos" else IMAGE_SUFFIXES
        found = set()
        for path in walk(self.root):
            if is_a(path, wanted):
                found.add(path if self.kind == "videos" else path.parent)
            else:
                self.strays[path.suffix.lower()] += 1
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def open(self, index: int) -> Clip:
        path = self.root / self.names[index]
        return VideoClip(Video(path), self.size) if self.kind == "videos" else _FrameFolder(path, self.size)

    def count(self, index: int) -> int:
        """The frames that decoding all of clip `index` gives, whatever its file says of them. Raises BrokenSample."""
        path = self.root / self.names[index]
        return len(Video(path, decode=True) if self.kind == "videos" else _FrameFolder(path, self.size))

    def draw_image(self, index: int, clip: Clip, rng: np.random.Generator) -> tuple[dict, int | None]:
        if self.pictures is None:
            return super().draw_image(index, clip, rng)
        path = Path(self.names[index])
        own = {path.name, path.stem}  # what a folder of this clip's pictures may be called
        name = self.pictures[int(rng.integers(len(self.pictures)))]
        if not own.isdisjoint(Path(name).parts):
            others = [name for name in self.pictures if own.isdisjoint(Path(name).parts)]
            if not others:
                raise UserError(f"data.image_list lists no picture of another clip than {self.names[index]}")
            name = others[int(rng.integers(len(others)))]
        label = None if self.labels is None else self._class_of(name)
        return _read_pictures([self.picture_root / name], self.size), label

    def _classify(self, config: ClipData) -> list[int]:
        """Class ids of the clips; those outside of the classes asked for are dropped."""
        self.classes = config.classes or sorted({Path(name).parts[0] for name in self.names if "/" in name})
        self.names = [name for name in self.names if "/" in name and Path(name).parts[0] in self.classes]
        if missing := set(self.classes) - {Path(name).parts[0] for name in self.names}:
            raise UserError(f"{self.root} has no clips of {', '.join(sorted(missing))} (data.classes)")
        return [self._class_of(name) for name in self.names]

    def _caption(self, config: ClipData) -> None:
        """Set the names, captions and labels of the clips that have a caption, in the order of their captions."""
        listed, beside = None, config.captions == BESIDE
        if config.clip_list:
            listed = [Path(name).as_posix() for name in read_list(config.clip_list)]
        rows = self._texts(self._find() if listed is None else listed) if beside else read_rows(config.captions)
        rows = (row for row in rows if _is_wanted(row[1], config.classes))
        wanted = "any clips" if listed is None and not config.classes else "the clips"
        listed = listed and {name: None for name in listed if _is_wanted(name, config.classes)}  # a set with an order
        source = str(self.root) if beside else config.captions
        found, uncaptioned = match(rows, source, wanted, listed, config.clip_list)
        if empty := set(config.classes) - {Path(name).parts[0] for name in found}:
            raise UserError(f"{source} has no captions of clips of {', '.join(sorted(empty))} (data.classes)")
        self._set_captions(found, uncaptioned)

    def _texts(self, names: Iterable[str]) -> list[Row]:
        """The text files beside clips, which are read, and not passed over."""
        suffixed = {name: name if self.kind == "frames" else Path(name).with_suffix("") for name in names}
        rows = list(texts_beside({name: self.root / f"{stem}.txt" for name, stem in suffixed.items()}))
        self.strays -= Counter({".txt": sum(text is not None for _, _, text in rows)})
        return rows

    def _list_pictures(self, file: str) -> list[str]:
        """The pictures of a list; those outside of the classes asked for are dropped."""
        listed = read_list(file)
        pictures = [name for name in listed if self.labels is None or Path(name).parts[0] in self.classes]
        if not pictures:
            where = f" in the class folders {', '.join(self.classes)}: it has {listed[0]}" if listed else ""
            raise UserError(f"{file} lists no pictures{where}")
        return pictures

    def _class_of(self, name: str) -> int:
        return self.classes.index(Path(name).parts[0])


class VideoClip(Clip):
    """A video file, and the side of its frames in pixels."""

    def __init__(self, video: Video, size: int):
        self._video, self.size = video, size

    def __len__(self) -> int:
        return len(self._video)

    def read(self, frames: range) -> dict[str, Tensor]:
        pictures = []
        for start in range(0, len(frames), STRETCH):
            read = self._video.read(frames[start : start + STRETCH])
            pictures += [to_square(picture, self.size) for picture in read]
        return {"image": torch.stack(pictures)}


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
        pixels = torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1)
        pictures.append(to_square(pixels, size))
    return {"image": torch.stack(pictures)}


def _frames(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their numbers: frame_2 comes before frame_10."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        files = [Path(entry.path) for entry in entries if entry.is_file()]

    def numbers(file: Path) -> tuple[list[int | str], str]:
        parts = re.split(r"(\d+)", file.stem)
        return [int(part) if part.isdecimal() else part for part in parts], file.name

    return sorted((file for file in files if is_a(file, IMAGE_SUFFIXES)), key=numbers)


def refuse_mixtures(config: ClipData) -> None:
    """Raises ValueError for settings that exclude each other."""
    if config.captions and config.labelled:
        raise UserError("data.captions and data.labelled: a clip's label is its caption or its class, leave one out")
    if config.captions and config.image_list:
        raise UserError("data.captions and data.image_list: the pictures of that list have no captions, leave one out")
    if config.images_from == "same" and config.image_list:
        raise UserError("data.images_from=same takes images from the clip itself: leave out data.image_list")


def _is_wanted(name: str, classes: list[str]) -> bool:
    return not classes or ("/" in name and Path(name).parts[0] in classes)
