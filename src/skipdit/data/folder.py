"""What lies in a folder of somebody's own: pictures or clips, classes or captions, and their sizes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipdit.data.captions import BESIDE, match, read_rows, texts_beside
from skipdit.data.clip_folder import VIDEO_SUFFIXES, to_square
from skipdit.data.files import is_a, read_picture, walk
from skipdit.data.images import SUFFIXES
from skipdit.data.video import Video
from skipdit.utils.errors import BrokenSample, UserError

CAPTIONS = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
LOOKED_AT = 32  # files of which sizes are read


class Folder(NamedTuple):
    """What lies in a folder.

    Attributes:
        unit: what its files are, "image" or "clip".
        classes: folders right below it, if all files lie in some.
        captions: as `data.captions`; None without any.
        texts: the captions themselves.
        side: the median of the shorter sides, in pixels.
        frames: those that nine of ten clips have at least; 1 of images.
    """

    path: Path
    unit: str
    files: list[Path]
    classes: list[str]
    captions: str | None
    texts: list[str]
    side: int
    frames: int

    @property
    def task(self) -> str:
        """Name of the task that it is for."""
        return f"{'text' if self.captions else 'class'}-to-{'image' if self.unit == 'image' else 'video'}"

    def pictures(self, count: int, size: int) -> Tensor:
        """Return so many images, or first frames of clips, from all over: uint8 (N, 3, size, size), fewer if some
        cannot be read.
        """
        read = (_read(file, self.unit) for file in _some(self.files, count))
        return torch.stack([to_square(picture, size) for picture, _ in filter(None, read)])


def look_into(path: Path) -> Folder:
    """Find out what lies in a folder. Raises FileNotFoundError or UserError if it is nothing to train on."""
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: --data wants a folder of pictures or clips")
    everything = sorted(walk(path))
    files = [file for file in everything if is_a(file, VIDEO_SUFFIXES)]
    unit = "clip" if files else "image"
    files = files or [file for file in everything if is_a(file, SUFFIXES)]
    if not files:
        raise UserError(f"{path} holds neither pictures ({', '.join(sorted(SUFFIXES))}) nor video files")
    captions, texts = _captions(path, unit, files)
    nested = [file for file in files if file.parent != path]
    if unit == "image" and not captions and 0 < len(nested) < len(files):  # whose class is told by no folder
        alone = next(file for file in files if file.parent == path)
        raise UserError(
            f"{alone} lies beside folders of pictures, which are classes: move it into one, or out of {path}"
        )
    classes = sorted({file.relative_to(path).parts[0] for file in files}) if len(nested) == len(files) else []
    read = [read for file in _some(files, LOOKED_AT) if (read := _read(file, unit))]
    if not read:
        raise UserError(f"{path}: none of {min(LOOKED_AT, len(files))} files can be read, for example {files[0]}")
    frames = sorted(count for _, count in read)[len(read) // 10]
    side = int(median(min(picture.shape[-2:]) for picture, _ in read))
    return Folder(path, unit, files, classes, captions, texts, side, frames)


def _some(files: Sequence[Path], count: int) -> Sequence[Path]:
    return [files[i * len(files) // count] for i in range(count)] if len(files) > count else files


def _read(file: Path, unit: str) -> tuple[Tensor, int] | None:
    """An image, or the first frame of a clip, uint8 (3, H, W), and how many there are; None if it cannot be read."""
    try:
        if unit == "clip":
            video = Video(file)
            return video.read(range(1))[0], len(video)
        return torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1), 1
    except BrokenSample:
        return None


def _captions(path: Path, unit: str, files: list[Path]) -> tuple[str | None, list[str]]:
    """Where captions are, as `data.captions` says it, and the captions; text files count if most files have one."""
    file = next((str(path / name) for name in CAPTIONS if (path / name).is_file()), None)
    beside = {str(file): file.with_suffix(".txt") for file in files}
    if file is None and 2 * sum(text.is_file() for text in beside.values()) <= len(files):
        return None, []
    rows = read_rows(file, "image" if unit == "image" else "video") if file else texts_beside(beside)
    captions, _ = match(rows, file or str(path), f"any {unit}s")
    return file or BESIDE, list(captions.values())
