"""Files that are not where a command looks for them: those of the project, and places that the original code has."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parents[1] if PACKAGE.parent.name == "src" else None  # the checkout; None: an installed package
WEIGHTS = ("checkpoints", "pretrained", "ckpts")  # where this project and the original keep what they download
_RENAMED = {
    "_img_train": "_scratch",
    "_train": "_scratch",
    "_joint_train_skip": "_train_stage2",
}  # ends of names of the original's configs
_RENAMED |= {"_sample_origin": "_sample_plain", "_sample_skip": "_sample", "-origin": "_sample_plain"}
_RENAMED |= {"-skip": "_sample_skip", "-skip-cache": "_sample_skip_cache"}


_tells = ContextVar("tells", default=True)  # whether `found` says where


@contextmanager
def untold() -> Iterator[None]:
    """Find files without a word: those that a command has chosen itself, and not its user."""
    token = _tells.set(False)
    try:
        yield
    finally:
        _tells.reset(token)


def locate(path: str | Path) -> Path | None:
    """Return where a file or folder lies in the project, None if it is not there.

    Args:
        path: relative to the top of the repository, such as configs/class-to-image/demo.yaml.
    """
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts or (len(parts) == 1 and not PROJECT):
        return None
    place = PROJECT.joinpath(*parts) if PROJECT else PACKAGE.joinpath(parts[0].replace("-", "_"), *parts[1:])
    return place if place.exists() else None


def found(path: str) -> str:
    """Return a path as it is if something is there, else where the project or the original code keeps it.

    The other place is told on stderr, once; see `untold`.
    """
    if not path or os.path.exists(path):
        return path
    return next((_told(path, place) for place in _places(path) if place is not None and place.exists()), path)


def find_config(path: str | Path) -> Path:
    """Return the file of a config: as `found`, or the project's that is called as the original's was.

    A file that is nowhere stays as it is.
    """
    place = Path(found(str(path)))
    if place.exists():
        return place
    names = [place.name] + [
        place.stem.removesuffix(old) + new + place.suffix for old, new in _RENAMED.items() if place.stem.endswith(old)
    ]
    folder = locate("configs/class-to-image")
    for name in names if folder else []:
        # A name that several tasks have, such as demo.yaml, does not say which is meant.
        files = [file for task in sorted(folder.parent.iterdir()) if (file := task / name).is_file()]
        if len(files) == 1:
            return Path(_told(str(path), files[0]))
    return place


def near_configs(path: Path) -> str:
    """Return what to say of a config that is not there: the project's of nearly this name, or where they are."""
    if not (folder := locate("configs/class-to-image")):
        return ""
    names = [f"configs/{file.relative_to(folder.parent).as_posix()}" for file in sorted(folder.parent.glob("*/*.yaml"))]
    near = get_close_matches(path.name, [Path(name).name for name in names], n=1, cutoff=0.8)
    alike = [name for name in names if Path(name).name in near]
    tell = " or ".join(get_close_matches(str(path), alike, n=1, cutoff=0) if len(path.parts) > 1 else alike)
    return f"; did you mean {tell}?" if tell else f"; those of the project are in {folder.parent}"


def _places(path: str) -> Iterator[Path | None]:
    yield locate(path)
    first, *rest = Path(path).parts
    for name in WEIGHTS if first in WEIGHTS and rest else ():
        yield Path(name, *rest)
        yield locate(Path(name, *rest))


@cache
def _told(path: str, place: Path) -> str:
    if _tells.get() and os.environ.get("RANK", "0") == "0":
        print(f"{path} is not here: taking {place}", file=sys.stderr)
    return str(place)
