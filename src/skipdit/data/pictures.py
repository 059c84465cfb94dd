"""Captioned pictures of any shape, each cut to the bucket whose aspect ratio is nearest to its own.

A caption is a label: the number of it in `dataset.captions`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from skipdit.data.captions import BESIDE, match, read_rows, texts_beside
from skipdit.data.files import IMAGE_SUFFIXES, is_a, open_picture, orientation, read_list, read_picture, walk
from skipdit.data.images import centre_crop
from skipdit.data.settings import PictureData
from skipdit.utils.errors import BrokenSample, UserError


def bucket_sizes(image_size: int, buckets: list[str]) -> list[tuple[int, int]]:
    """(height, width) of every bucket; without any, of the square. Raises ValueError, naming the bucket."""
    sizes = []
    for text in buckets:
        height, by, width = text.partition("x")
        if not (by and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise UserError(f"data.buckets has {text!r}; a bucket is HEIGHTxWIDTH in pixels, for example 1024x768")
        sizes.append((int(height), int(width)))
    return sizes or [(image_size, image_size)]


class PictureFolder(Dataset):
    """Captioned pictures anywhere below a folder. Samples: {"image": uint8 (3, H, W) of its bucket, "label": int}.

    Transparent ones are laid on white. Raises FileNotFoundError or ValueError, naming the folder or the captions file
    and its line, if there is nothing to read.

    Attributes:
        names: of the pictures, in the order of their captions.
        captions, labels: label i is that of caption i.
        sizes: (height, width) of the buckets.
        buckets: for every picture, which of them is its own: the nearest aspect ratio, then the nearest area.
        left_out: messages about pictures left out for their captions, or as their headers cannot be read.
        uncaptioned: those of the first kind.
    """

    def __init__(self, config: PictureData):
        self.root, self.sizes = Path(config.path), bucket_sizes(config.image_size, config.buckets)
        found, self.uncaptioned = self._captioned(config)
        Image.init()  # here: threads that look for a format must not meet half of the formats
        with ThreadPoolExecutor() as threads:
            buckets = dict(zip(found, threads.map(self._bucket, found), strict=True))
        broken = [bucket for bucket in buckets.values() if isinstance(bucket, str)]
        self.names = [name for name, bucket in buckets.items() if not isinstance(bucket, str)]
        if not self.names:
            raise UserError(f"none of {len(broken)} pictures can be read, for example {broken[0]}")
        self.buckets, self.captions = [buckets[name] for name in self.names], [found[name] for name in self.names]
        self.labels, self.left_out = list(range(len(self.names))), self.uncaptioned + broken

    def _file(self, name: str) -> Path | BinaryIO:
        """Where a picture is read from."""
        return self.root / name

    def _captioned(self, config: PictureData) -> tuple[dict[str, str], list[str]]:
        """Captions by picture, and messages about pictures without."""
        if not config.captions:
            raise UserError("data.captions is not set: a file of captions, or txt for text files beside the pictures")
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of pictures {self.root}")
        listed = None
        if config.picture_list:
            listed = {Path(name).as_posix(): None for name in read_list(config.picture_list)}  # a set with an order
        if config.captions == BESIDE:
            names = self._find() if listed is None else listed
            rows = texts_beside({name: (self.root / name).with_suffix(".txt") for name in names})
        else:
            rows = read_rows(config.captions, "image")
        source = str(self.root) if config.captions == BESIDE else config.captions
        wanted = "any pictures" if listed is None else "the pictures"
        return match(rows, source, wanted, listed, config.picture_list)

    def _find(self) -> list[str]:
        """Names of all pictures below the root."""
        paths = (path for path in walk(self.root) if is_a(path, IMAGE_SUFFIXES))
        return sorted(path.relative_to(self.root).as_posix() for path in paths)

    def _bucket(self, name: str) -> int | str:
        """The index of a picture's bucket, or why its header cannot be read."""
        try:
            with open_picture(self._file(name)) as image:
                width, height = image.size if orientation(image) < 5 else reversed(image.size)
        except BrokenSample as error:
            return str(error)
        return nearest_bucket(height, width, self.sizes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        picture = centre_crop(read_picture(self._file(self.names[index])), *self.sizes[self.buckets[index]])
        return {"image": torch.from_numpy(np.array(picture)).permute(2, 0, 1), "label": self.labels[index]}


def nearest_bucket(height: int, width: int, sizes: list[tuple[int, int]]) -> int:
    """Index of the size whose aspect ratio is nearest; of several of one ratio, whose area is."""

    def distance(index: int) -> tuple[float, float]:
        h, w = sizes[index]
        return abs(math.log(height / width) - math.log(h / w)), abs(math.log(height * width / (h * w)))

    return min(range(len(sizes)), key=distance)
