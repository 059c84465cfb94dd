"""Texts and paths as people write them."""

import codecs
import os
from pathlib import Path

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text in UTF-8 or, with a byte order mark, UTF-16. Lines end in "\\n". Raises OSError or UnicodeDecodeError.

    Args:
        errors: what becomes of other bytes, as for `bytes.decode`.
    """
    content = Path(path).read_bytes()
    text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def user_path(text: str) -> str:
    """A path in which "~" is the user's home, where no shell has put that in: `out=~/runs`, and in files."""
    return os.path.expanduser(text) if text.startswith(("~/", "~\\")) else text
