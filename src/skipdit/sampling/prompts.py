"""Prompts: reading them, and what the files of the samples that they give are called."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skipdit.utils.errors import UserError
from skipdit.utils.text import read_text

# What files of others call a prompt, in any case: the original's prompts/vimeo_prompts.csv and COCO's captions,
# VBench's VBench_full_info.json, DrawBench, PartiPrompts. The first that a file has counts.
KEYS = ("prompt", "prompts", "prompt_en", "caption", "captions", "text")
WANTED = f"{', '.join(KEYS[:-1])} or {KEYS[-1]}"


def read_prompts(prompts: Sequence[str], file: str | None, each_once: bool = False) -> list[str]:
    """Prompts, then those of a file, in order.

    Args:
        file: text, a prompt per line, empty lines left out; or a folder of such files, .txt. CSV or TSV, whose first
            line names the columns, and JSONL: prompts are what they call so, see `KEYS`. JSON: a list of prompts or of
            objects as in JSONL, or one object of file names and prompts, as samplers write it.
        each_once: leave out repetitions. With them, prompt i is that of place i in the file.

    Raises ValueError or FileNotFoundError, naming file and place, for what is no prompt, and if there are none.
    """
    prompts = list(prompts)
    if file:
        place = Path(file)
        files = sorted(f for f in place.glob("*.txt") if not f.name.startswith(".")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"no prompts in {place}: it is a text file with one per line, or a folder of them")
        for file in files:
            prompts += _of_file(file)
    if not prompts:
        raise UserError('there is nothing to show: give --prompt "a bicycle", or set prompts or prompt_file')
    return list(dict.fromkeys(prompts)) if each_once else prompts


def _of_file(file: Path) -> list[str]:
    readers = {".csv": _of_table, ".tsv": _of_table, ".json": _of_json, ".jsonl": _of_json_lines}
    try:
        text = read_text(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    reader = readers.get(file.suffix.lower())
    if reader is None:
        return [line.strip() for line in text.split("\n") if line.strip()]
    found = []
    for place, prompt in reader(file, text):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{file}, {place}: the prompt is {prompt!r}; it should be a text")
        found.append(prompt.strip())
    return found


def _of_table(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, prompt) of the rows of a CSV or TSV file."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    column, number = None, 1
    try:
        for cells in reader:
            if column is None:
                names = [cell.strip().lower() for cell in cells]
                column = next((names.index(key) for key in KEYS if key in names), None)
                if column is None:
                    known = f"columns {', '.join(cells)}; its first line has to name one {WANTED}"
                    raise UserError(f"{file}, line 1: {known}; a file with a prompt per line is called .txt")
            elif cells:
                yield f"line {number}", cells[column] if column < len(cells) else None
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {number}: {error}") from error


def _of_json(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if isinstance(found, dict):
        own = next((value for key, value in found.items() if key.lower() in KEYS), None)
        if isinstance(own, list):
            found = own
        elif own is not None:
            found = [found]
        elif all(isinstance(value, str) for value in found.values()):
            found = list(found.values())
    if not isinstance(found, list):
        raise UserError(f"{file}: wanted is a list of prompts, or of objects with {WANTED}")
    for number, row in enumerate(found):
        yield f"entry {number} from 0", _prompt_of(file, row)


def _of_json_lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: wanted is an object with {WANTED}: {error}") from error
            yield f"line {number}", _prompt_of(file, row)


def _prompt_of(file: Path, row: Any) -> Any:
    """The prompt of an entry of a JSON file."""
    if not isinstance(row, dict):
        return row
    lower = {key.lower(): value for key, value in row.items()}
    if not (keys := [key for key in KEYS if key in lower]):
        raise UserError(f"{file}: wanted is an object with {WANTED}, and one has {', '.join(row) or 'nothing'}")
    return lower[keys[0]]


def slug(prompt: str) -> str:
    """The first words of a prompt, in letters and digits of any script."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]


def file_names(prompts: list[str], each: int, vbench: bool) -> list[str]:
    """What the samples' files are called, without suffix: a number and the first words, or as VBench wants it.

    Raises ValueError for prompts that VBench's names cannot hold.
    """
    if not vbench:
        return [f"{i:06d}-{slug(prompts[i // each])}".strip("-") for i in range(len(prompts) * each)]
    if bad := [prompt for prompt in prompts if "/" in prompt or len(prompt.encode()) > 240]:
        raise UserError(f"vbench_names: no file can be called {bad[0]!r}; set vbench_names=false")
    return [f"{prompt}-{copy}" for prompt in prompts for copy in range(each)]
