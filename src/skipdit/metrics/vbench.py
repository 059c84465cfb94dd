"""Clips in the layout that VBench judges (arXiv 2311.17982): `<prompt>-<n>.mp4`, n from 0, in one folder."""

import os
import shutil
from collections import Counter
from pathlib import Path

from skipdit.metrics.samples import Files
from skipdit.utils.errors import UserError


def link_clips(samples: Files, folder: Path) -> list[str]:
    """Give clips that were named otherwise VBench's names, in another folder, by their prompts.

    Hard links where the file system has them, else copies. Returns the names. Raises FileNotFoundError without a
    prompts.json, ValueError for prompts that no file can be called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies, names = Counter(), []
    for name in samples.names:
        prompt = samples.prompts[name]
        if "/" in prompt or len(prompt.encode()) > 240:
            raise UserError(f"no file can be called {prompt!r}")
        names.append(f"{prompt}-{copies[prompt]}{Path(name).suffix}")
        copies[prompt] += 1
        place = folder / names[-1]
        place.unlink(missing_ok=True)
        try:
            os.link(samples.source / name, place)
        except OSError:
            shutil.copyfile(samples.source / name, place)
    return names


def missing_clips(names: list[str], prompts: list[str], each: int) -> list[str]:
    """What VBench would look for and not find."""
    there = set(names)
    return [name for prompt in prompts for n in range(each) if (name := f"{prompt}-{n}.mp4") not in there]
