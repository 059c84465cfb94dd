"""Files that are whole or not there, whatever happens while they are written: a full disk, Ctrl-C, a lost machine."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def whole_file(path: str | Path, keep_suffix: bool = False, mark: str = "") -> Iterator[Path]:
    """A name beside `path` to write a file or folder under: it gets its own once the block has ended well, and is
    removed otherwise.

    Args:
        keep_suffix: for writers that go by it.
        mark: tells names apart that several processes write under at the same time.

    Raises OSError that names `path`, the reason and what to do, if the disk is full or may not be written.
    """
    path = Path(path)
    partial = path.with_name(f"partial-{path.name}" if keep_suffix else f"{path.name}{mark}.partial")
    try:
        with naming(path):
            yield partial
            if not _has_room(partial):  # some writers do not say if they fail
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # there is none, or the disk cannot be written at all
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        raise


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Raises the failures of a block that writes to `path` as OSError: the file, the reason, and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk may be any of these
        raise explained(error, path) from error


def explained(error: Exception, path: str | Path) -> OSError:
    """The failure of writing a file, as a sentence for its user."""
    number, reason = _cause(error)
    if number is None and not _has_room(Path(path).parent):
        number, reason = errno.ENOSPC, os.strerror(errno.ENOSPC)
    advice = "; free some space, and run the same command again" if number in FULL else ""
    advice = "; name a folder that may be written" if number in UNWRITABLE else advice
    return OSError(f"could not write {path}: {reason}{advice}")


def replace_text(path: str | Path, text: str, mark: str = "") -> None:
    """Write or rewrite a file of UTF-8 text. What has no UTF-8, such as names of old files, is written as escapes."""
    with whole_file(path, mark=mark) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_png(picture: "Tensor", path: str | Path) -> None:
    """A picture uint8 (3, H, W). torchvision's function of this name says nothing of a disk that is full."""
    from torchvision.io import encode_png

    with whole_file(path, keep_suffix=True) as partial:
        partial.write_bytes(encode_png(picture.cpu()).numpy().tobytes())


def _cause(error: BaseException) -> tuple[int | None, str]:
    """Number and text of the failure of the system that led to an error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno, seen.strerror or str(seen)
        seen = seen.__cause__ or seen.__context__
    return None, (str(error).splitlines() or [type(error).__name__])[0]


def _has_room(path: Path) -> bool:
    """Whether a byte is left on the disk of a file or folder."""
    try:
        disk = os.statvfs(path)
    except (AttributeError, OSError):  # Windows; no such folder
        return True
    return not disk.f_blocks or bool(disk.f_bfree if os.geteuid() == 0 else disk.f_bavail)
