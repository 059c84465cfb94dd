"""Files as people have them: which of a folder count, how a picture is read, lists and other texts."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.text import read_text

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def is_a(path: Path, suffixes: set[str]) -> bool:
    """Whether a file is one of these by its name. Hidden ones are not: macOS puts a "._clip.mp4" beside a clip.mp4."""
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def is_visible(name: str) -> bool:
    """Whether a folder counts by its name: hidden ones do not, nor do those that systems put beside others."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def walk(root: str | Path) -> Iterator[Path]:
    """All files below a folder, also in folders that are linked there, but not in hidden ones.

    A link to a folder above is not followed: what lies there would come again and again.
    """
    waiting = [(str(root), (os.path.realpath(root),))]
    while waiting:
        folder, above = waiting.pop()
        with suppress(PermissionError), os.scandir(folder) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    if entry.is_symlink() or entry.is_file():  # reading a pipe would wait for its writer
                        yield Path(entry.path)
                elif is_visible(entry.name):
                    real = os.path.realpath(entry.path) if _is_link(entry) else os.path.join(above[-1], entry.name)
                    if real not in above:
                        waiting.append((entry.path, (*above, real)))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(entry.path)


def read_list(file: str) -> list[str]:
    """The lines of a list, without empty ones. Bytes that are no UTF-8 stay what they are in names of files.

    Raises FileNotFoundError.
    """
    try:
        return [line.strip() for line in read_text(file, "surrogateescape").split("\n") if line.strip()]
    except OSError as error:
        raise FileNotFoundError(f"no list {file}: {error.strerror}") from error


def check_size(width: int, height: int) -> None:
    """Raises ValueError for a picture, or a frame, of more pixels than PIL's limit."""
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{width} x {height} pixels are more than the {Image.MAX_IMAGE_PIXELS:,} that are decoded")


@contextmanager
def open_picture(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """A picture, of which only the header has been read. Raises BrokenSample for whatever is then wrong with it, and
    for one of more pixels than PIL's limit.
    """
    try:
        with Image.open(path) as image:
            check_size(*image.size)
            yield image
    except Exception as error:  # damaged bytes make PIL raise nearly anything
        raise BrokenSample(f"{path}: {error}") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on, the picture lies on its side."""
    with suppress(Exception):  # EXIF is often damaged, beside pixels that are not
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # that of PNGs would read all of the picture
        return found if found in _TURNS else 1
    return 1


def read_picture(path: str | Path | BinaryIO) -> Image.Image:
    """An RGB picture, upright, whatever its mode.

    What is transparent lies on white. Grey of 16 bits keeps its tones. Of integers of 32 bits and of floats, which have
    no range of their own, 0 to 255 is taken to be black to white, or 0 to 65,535 and 0 to 1, whichever holds them all.
    CMYK is converted by its profile, if it has one.

    Raises BrokenSample, naming the file.
    """
    with open_picture(path) as image:
        image.load()  # the EXIF of a PNG may follow its pixels
        turn, rgb = _TURNS.get(orientation(image)), _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _to_grey(image)
    elif image.mode in ("CMYK", "LAB"):
        image = _by_profile(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits -> of 8. Raises ValueError for values outside of its range."""
    values = np.array(image).astype(np.float32)
    top = values.max()
    if image.mode.startswith("I;") or image.format in ("PNG", "PPM"):  # older PIL has their 16 bits in mode I
        white = 65535
    elif image.mode == "F":
        white = 1 if top <= 1 else 255
    else:
        white = 255 if top <= 255 else 65535
    if not (values.min() >= 0 and top <= white):
        raise UserError(f"it has values from {values.min():g} to {top:g}; they should be 0 to {white}")
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = white
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _by_profile(image: Image.Image) -> Image.Image:
    """A CMYK or Lab picture in sRGB; a CMYK one stays as it is without a profile that can be read."""
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    with suppress(ImageCms.PyCMSError, OSError):
        if profile := image.info.get("icc_profile"):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image
