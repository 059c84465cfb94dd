"""Which files are pictures, how one is opened, and lists of files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from skipdit.data.stream import BrokenSample

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def is_a(path: Path, suffixes: set[str]) -> bool:
    """Whether a file is one of these by its name. Hidden ones are not: macOS puts a "._clip.mp4" beside a clip.mp4."""
    return path.suffix.lower() in suffixes and not path.name.startswith(".")


def read_list(file: str) -> list[str]:
    """The lines of a list, without empty ones. Raises FileNotFoundError."""
    try:
        return [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise FileNotFoundError(f"no list {file}: {error.strerror}") from error


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """A picture, of which only the header has been read. Raises BrokenSample for whatever is then wrong with it."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # damaged bytes make PIL raise nearly anything
        raise BrokenSample(f"{path}: {error}") from error
