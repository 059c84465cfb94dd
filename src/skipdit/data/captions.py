"""Files with the captions of clips: JSONL, or CSV whose first line names the columns.

Every row has a `video`, the clip's path relative to the folder of all clips, and its `caption`; what else it has does
not count.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path


def read_rows(file: str) -> Iterator[tuple[str, str, object]]:
    """(place, clip, caption) of every row of a captions file, None without a caption.

    Raises FileNotFoundError, or ValueError, naming file and line, for a row that cannot be read or names no video.
    """
    reader = _csv_rows if Path(file).suffix.lower() == ".csv" else _json_rows
    try:
        with open(file, "rb") as lines:
            for number, row in reader(file, lines):
                place, video = f"{file}, line {number}", row.get("video")
                if not isinstance(video, str) or not video.strip():
                    raise ValueError(f"{place}: no video; every row has a video and its caption")
                yield place, Path(video.strip()).as_posix(), row.get("caption")
    except OSError as error:
        raise FileNotFoundError(f"no captions {file}: {error.strerror}") from error


def _json_rows(file: str, lines: Iterable[bytes]) -> Iterator[tuple[int, dict]]:
    """(number from 1, object) of the lines of a JSONL file."""
    wanted = 'wanted is a JSON object a line, {"video": ..., "caption": ...}'
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except json.JSONDecodeError as error:  # which counts lines from this one
            raise ValueError(f"{file}, line {number}, column {error.colno}: {wanted}: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: {wanted}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: {wanted}")
        yield number, row


def _csv_rows(file: str, lines: Iterable[bytes]) -> Iterator[tuple[int, dict]]:
    """(number from 1 of its first line, cells by column) of the rows of a CSV file."""
    reader = csv.reader((line.decode("utf-8-sig") for line in lines), strict=True)
    header, number = None, 1
    try:
        for cells in reader:
            if header is None:
                header = [cell.strip() for cell in cells]
                if not {"video", "caption"} <= set(header):
                    raise csv.Error(f"columns {', '.join(header)}; the first line has to name video and caption")
            elif any(cells[len(header) :]):  # what follows a comma would be lost
                raise csv.Error(f"{len(cells)} cells for {len(header)} columns; quote a caption that has commas")
            elif cells:
                yield number, dict(zip(header, cells, strict=False))
            number = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}, line {number}: {error}") from error
    if header is None:
        raise ValueError(f"{file}, line 1: it is empty; the first line has to name the columns video and caption")


def complaint(name: str, caption: object, before: str | None) -> str | None:
    """Why a caption of a clip cannot be used, if so; `before` is the place of an earlier one."""
    if caption is None:
        return f"no caption of {name}"
    if not isinstance(caption, str):
        return f"the caption of {name} is no text but of type {type(caption).__name__}"
    if not caption.strip():
        return f"the caption of {name} is empty"
    return before and f"{name} has a caption already: {before}"
