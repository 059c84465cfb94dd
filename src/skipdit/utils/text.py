"""Texts and paths as people write them."""

import codecs
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from skipdit.utils.errors import UserError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text in UTF-8 or, with a byte order mark, UTF-16. Lines end in "\\n". Raises OSError or UnicodeDecodeError.

    Args:
        errors: what becomes of other bytes, as for `bytes.decode`.
    """
    content = Path(path).read_bytes()
    text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file in UTF-8 holds. Raises OSError, and UserError for a damaged one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def counted(number: int, unit: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{number} {unit}" + "s" * (number != 1)


def user_path(text: str) -> str:
    """A path in which "~" is the user's home, where no shell has put that in: `out=~/runs`, and in files."""
    return os.path.expanduser(text) if text.startswith(("~/", "~\\")) else text


def with_home(args: Namespace) -> Namespace:
    """Parsed arguments with the user's home in their paths, which shells do not put into `--out=~/runs`."""
    for name, value in vars(args).items():
        if isinstance(value, str | Path):
            setattr(args, name, type(value)(user_path(str(value))))
    return args
