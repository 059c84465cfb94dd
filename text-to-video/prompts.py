"""Prompts: reading and encoding them, and what the clips that they give are called."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from skipdit.text import TextEncoder


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Prompts, and those of a text file with one per line or of a folder of such files; each once.

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
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from error
            prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('there is nothing to show: give --prompt "a bicycle", or set prompts or prompt_file')
    return list(dict.fromkeys(prompts))


class Prompt(NamedTuple):
    """A prompt as the model reads it: embeddings (1, k, C) of its k tokens, and as many of the negative prompt."""

    embeddings: Tensor
    negative: Tensor


def encode_prompts(encoder: TextEncoder, prompts: list[str], negative_prompt: str) -> dict[str, Prompt]:
    """The prompts as `LattePipeline` encodes them, on the CPU.

    Raises FloatingPointError if they are not finite in the encoder's dtype.
    """
    negative = encoder.encode([negative_prompt]).embeddings.cpu()
    embeddings, mask = (part.cpu() for part in encoder.encode(prompts))
    lengths = mask.sum(1).tolist()
    if not (negative.isfinite().all() and embeddings.isfinite().all()):
        raise FloatingPointError(f"embeddings are not finite in {negative.dtype}: use dtype=bfloat16 or float32")
    return {
        prompt: Prompt(embeddings[i : i + 1, :length], negative[:, :length])
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    }


def file_names(prompts: list[str], each: int, vbench: bool) -> list[str]:
    """What the samples' files are called, without suffix: a number and the first words, or as VBench wants it.

    Raises ValueError for prompts that VBench's names cannot hold.
    """
    if not vbench:
        slugs = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] for prompt in prompts]
        return [f"{i:06d}-{slugs[i // each]}".strip("-") for i in range(len(prompts) * each)]
    if bad := [prompt for prompt in prompts if "/" in prompt or len(prompt.encode()) > 240]:
        raise ValueError(f"vbench_names: no file can be called {bad[0]!r}; set vbench_names=false")
    return [f"{prompt}-{copy}" for prompt in prompts for copy in range(each)]


def batches_of_prompts(pending: Sequence[int], each: int, size: int) -> Iterator[list[int]]:
    """Samples of one prompt at a time: prompts differ in length, and a clip must not depend on what is beside it."""
    for _, group in groupby(pending, key=lambda index: index // each):
        indices = list(group)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
