"""Labelled images: folders and FashionMNIST. Samples are {"image": uint8 (3, H, W), "label": int}."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

from skipdit.data.files import IMAGE_SUFFIXES, is_a, is_visible, read_picture, walk
from skipdit.data.settings import ImageData  # noqa: F401 (its place in version 0.1)
from skipdit.utils.errors import UserError
from skipdit.utils.pixels import to_float, to_uint8  # noqa: F401 (their place in version 0.1)

SUFFIXES = IMAGE_SUFFIXES | {".pgm", ".ppm", ".tif", ".tiff"}  # of images in class folders
TOO_LONG = 16  # times as long as its size wants it
REACH = 5  # pixels, more than a bicubic filter sees beside those it is at, of a picture less than twice too large


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """ADM and DiT's preprocessing: halve by box filter while twice too large, resize bicubically, crop the centre.

    Of a picture that is many times too long only the centre is resized, the same up to rounding.
    """
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    wide, high = round(image.width * scale), round(image.height * scale)
    left, top = (wide - width) // 2, (high - height) // 2
    if wide * high <= TOO_LONG * width * height:
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + width, top + height))
    left, right = _stretch(image.width, wide, left, width)
    top, bottom = _stretch(image.height, high, top, height)
    x, y = max(0, int(left) - REACH), max(0, int(top) - REACH)
    image = image.crop((x, y, min(image.width, int(right) + REACH), min(image.height, int(bottom) + REACH)))
    return image.resize((width, height), Image.Resampling.BICUBIC, (left - x, top - y, right - x, bottom - y))


def _stretch(side: int, resized: int, start: int, length: int) -> tuple[float, float]:
    """Where a stretch of a side that is resized comes from."""
    return start * side / resized, (start + length) * side / resized


class ImageFolder(Dataset):
    """One folder per class, images of any size and format in it: ImageNet's layout. Images without any folder are one
    class.

    Transparent ones are laid on white. Raises FileNotFoundError or ValueError, naming the folder, if there is nothing
    to read.
    """

    def __init__(self, root: str | Path, size: int):
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no image folder {root}; it should hold one folder of images per class")
        folders = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and is_visible(path.name))
        files: dict[str, list[Path]] = {folder: [] for folder in folders}
        for path in walk(root):
            folder = path.relative_to(root).parts[0]
            if is_a(path, SUFFIXES) and folder in files:
                files[folder].append(path)
        if not files and (alone := [path for path in walk(root) if is_a(path, SUFFIXES)]):
            folders, files = ["."], {".": alone}
        if not files:
            raise UserError(f"{root} is empty of images: it should hold one folder of them per class")
        if empty := [folder for folder, paths in files.items() if not paths]:
            raise UserError(f"{root} is empty of images in its class folders {', '.join(empty)}")
        self._samples = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(files[folder], key=lambda path: (str(path.parent), path.name))
        ]
        self.size, self.num_classes = size, len(folders)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict:
        path, label = self._samples[index]
        pixels = np.array(centre_crop(read_picture(path), self.size, self.size))
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1), "label": label}


class FashionMNIST(Dataset):
    """FashionMNIST as RGB, its 28x28 pictures in the middle of size x size. Downloaded by torchvision if absent."""

    num_classes = 10

    def __init__(self, root: str | Path, size: int = 32, train: bool = True):
        margin, odd = divmod(size - 28, 2)
        if margin < 0 or odd:
            raise UserError(f"FashionMNIST at image_size {size}: it must be even and at least 28")
        try:
            data = datasets.FashionMNIST(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(f"FashionMNIST is not under {root} and could not be downloaded: {error}") from error
        self._images = F.pad(data.data, (margin,) * 4)  # (N, H, W)
        self._labels = data.targets.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index].expand(3, -1, -1), "label": self._labels[index]}
