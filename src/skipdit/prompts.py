"""Prompts: reading them, and what the files of the samples that they give are called."""

import json
import re
from collections.abc import Sequence
from pathlib import Path


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Prompts, and those of a text file with one per line, of a folder of such files, or of a JSONL file of captions;
    each once.

    Raises ValueError or FileNotFoundError if there are none.
    """
    prompts = list(prompts)
    if file:
        place = Path(file)
        files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"no prompts in {place}: it is a text file with one per line, or a folder of them")
        for file in files:
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
                if file.suffix == ".jsonl":
                    lines = [json.loads(line)["caption"] for line in lines if line.strip()]
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from error
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: wanted is an object with a caption on every line ({error!r})") from error
            prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('there is nothing to show: give --prompt "a bicycle", or set prompts or prompt_file')
    return list(dict.fromkeys(prompts))


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
        raise ValueError(f"vbench_names: no file can be called {bad[0]!r}; set vbench_names=false")
    return [f"{prompt}-{copy}" for prompt in prompts for copy in range(each)]
