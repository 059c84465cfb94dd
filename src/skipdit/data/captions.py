"""The captions of clips and of pictures: in JSONL, in CSV whose first line names the columns, or in text files.

Every row has a `video` or an `image`, its path relative to the folder of all of them, and its `caption`; what else it
has does not count.
"""

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from skipdit.utils.errors import UserError
from skipdit.utils.text import UTF16, read_text

BESIDE = "txt"  # as data.captions: every clip or picture has a text file of its name beside it

Row = tuple[str, str, object]  # (place, name, caption), None without a caption


def read_rows(file: str, key: str = "video") -> Iterator[Row]:
    """The rows of a captions file, whose `key` names the clip or the picture.

    Raises FileNotFoundError, or ValueError, naming file and line, for a row that cannot be read or lacks the key.
    """
    reader = _csv_rows if Path(file).suffix.lower() == ".csv" else _json_rows
    for number, row in reader(file, _lines(file), key):
        place, name = f"{file}, line {number}", row.get(key)
        if not isinstance(name, str) or not name.strip():
            article = "an" if key == "image" else "a"
            raise UserError(f"{place}: no {key}; every row has {article} {key} and its caption")
        yield place, Path(name.strip()).as_posix(), row.get("caption")


def _lines(file: str) -> Iterator[bytes]:
    """The lines of a file, in UTF-8, with their ends. Raises FileNotFoundError."""
    try:
        with open(file, "rb") as lines:
            if lines.read(2) in UTF16:
                yield from read_text(file).encode().splitlines(keepends=True)  # bytes have no other ends of lines
            else:
                lines.seek(0)
                yield from lines
    except OSError as error:
        raise FileNotFoundError(f"no captions {file}: {error.strerror}") from error


def texts_beside(files: Mapping[str, Path]) -> Iterator[Row]:
    """The rows of text files, given by name: None where there is none, bytes if it is no UTF-8."""
    for name, path in files.items():
        text = None
        if path.is_file():
            text = path.read_bytes()
            with suppress(UnicodeDecodeError):
                text = text.decode("utf-8-sig")
        yield str(path), name, text


def match(
    rows: Iterable[Row], source: str, wanted: str, listed: Collection[str] | None = None, list_file: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Captions by name, in the order of their rows, and messages about those that have none, or a second one.

    Args:
        source: where the rows come from, for messages.
        wanted: what should have captions, for messages: "any clips".
        listed: the names that count, those of `list_file`; None: all.

    Raises ValueError, naming the source, if there are no captions.
    """
    found, places, met, complaints = {}, {}, set(), []
    for place, name, caption in rows:
        if listed is not None and name not in listed:
            continue
        met.add(name)
        if reason := complaint(name, caption, places.get(name)):
            complaints.append(f"{place}: {reason}")
        else:
            found[name], places[name] = caption.strip(), place
    complaints += [f"{list_file}: {name} is not in {source}" for name in listed or () if name not in met]
    if not found:
        example = f", for example {complaints[0]}" if complaints else ""
        raise UserError(f"{source} has no captions of {wanted}{example}")
    return found, complaints


def _json_rows(file: str, lines: Iterable[bytes], key: str) -> Iterator[tuple[int, dict]]:
    """(number from 1, object) of the lines of a JSONL file."""
    wanted = f'wanted is a JSON object a line, {{"{key}": ..., "caption": ...}}'
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except json.JSONDecodeError as error:  # which counts lines from this one
            raise UserError(f"{file}, line {number}, column {error.colno}: {wanted}: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: {wanted}: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: {wanted}")
        yield number, row


def _csv_rows(file: str, lines: Iterable[bytes], key: str) -> Iterator[tuple[int, dict]]:
    """(number from 1 of its first line, cells by column) of the rows of a CSV file."""
    reader = csv.reader((line.decode("utf-8-sig") for line in lines), strict=True)
    header, number = None, 1
    try:
        for cells in reader:
            if header is None:
                header = [cell.strip() for cell in cells]
                if not {key, "caption"} <= set(header):
                    raise csv.Error(f"columns {', '.join(header)}; the first line has to name {key} and caption")
            elif any(cells[len(header) :]):  # what follows a comma would be lost
                raise csv.Error(f"{len(cells)} cells for {len(header)} columns; quote a caption that has commas")
            elif cells:
                yield number, dict(zip(header, cells, strict=False))
            number = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}, line {number}: {error}") from error
    if header is None:
        raise UserError(f"{file}, line 1: it is empty; the first line has to name the columns {key} and caption")


def complaint(name: str, caption: object, before: str | None) -> str | None:
    """Why a caption cannot be used, if so; `before` is the place of an earlier one."""
    if caption is None:
        return f"no caption of {name}"
    if not isinstance(caption, str):
        return f"the caption of {name} is no text but of type {type(caption).__name__}"
    if not caption.strip():
        return f"the caption of {name} is empty"
    return before and f"{name} has a caption already: {before}"
