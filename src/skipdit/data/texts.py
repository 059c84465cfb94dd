"""Captions as training sees them: encoded on the spot, or once, in safetensors shards that say how they were made.

A shard holds `embeddings` (sum of lengths, C) of its captions' valid tokens, one caption after the other, `lengths`
(N,), and `null` (120, C), the encoding of "" with its padding. Its metadata: the encoder's fingerprint, tokens at most,
dtype; which captions of how many it holds, and what they say.
"""

import bisect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skipdit.text import CHUNK, Encoded, TextEncoder


class Texts(ABC):
    """The captions of a dataset, from files or from an encoder: the same up to rounding.

    Attributes:
        captions: one per label.
        dim: channels C of an embedding.
        fingerprint: of the encoder.
        null: (120, C), the encoding of "" and of its padding, which stands for a dropped caption.
    """

    captions: list[str]
    dim: int
    fingerprint: str
    null: Tensor

    @abstractmethod
    def rows(self, labels: Sequence[int]) -> list[Tensor]:
        """The embeddings (k, C) of each caption's k tokens."""

    def take(self, labels: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given for some captions.

        As in sampling, where `LattePipeline` trims the encoding of the negative prompt to the tokens of the prompt,
        a dropped caption keeps its mask and has its embeddings replaced.

        Args:
            labels: (...) int64, indices of captions.
            dropped: (...) bool.

        Returns embeddings (..., S, C) float32 and mask (..., S) bool on the labels' device; S is the longest of these
        captions. The embeddings of padding are zero, except those of "". Raises IndexError for a label without caption.
        """
        indices = labels.flatten().tolist()
        distinct = sorted(set(indices))
        if distinct[0] < 0 or distinct[-1] >= len(self.captions):
            raise IndexError(f"labels {distinct[0]} to {distinct[-1]}, and there are {len(self.captions)} captions")
        found, device = dict(zip(distinct, self.rows(distinct), strict=True)), labels.device
        rows = [found[i] for i in indices]
        embeddings, lengths = pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
        longest = embeddings.shape[1]
        null, embeddings = self.null[:longest].to(device).float(), embeddings.to(device).float()
        embeddings = torch.where(dropped.to(device).flatten()[:, None, None], null, embeddings)
        mask = (torch.arange(longest) < lengths[:, None]).to(device)
        return embeddings.reshape(*labels.shape, longest, -1), mask.reshape(*labels.shape, longest)


class LiveTexts(Texts):
    """Captions encoded when taken, in the dtype of files. Raises FloatingPointError for what that cannot hold."""

    def __init__(
        self, encoder: TextEncoder, captions: list[str], dtype: torch.dtype = torch.float16, batch_size: int = CHUNK
    ):
        self.captions, self.dim = captions, encoder.dim
        self._encoder, self._dtype, self._batch_size = encoder, dtype, batch_size

    @property
    def fingerprint(self) -> str:
        return self._encoder.fingerprint

    @cached_property
    def null(self) -> Tensor:
        return self._encode([""]).embeddings[0]

    def rows(self, labels: Sequence[int]) -> list[Tensor]:
        encoded = self._encode([self.captions[i] for i in labels])
        return [row[valid] for row, valid in zip(*encoded, strict=True)]

    def _encode(self, texts: list[str]) -> Encoded:
        embeddings, mask = self._encoder.encode(texts, self._batch_size)
        kept = embeddings.to(self._dtype)
        if not kept.isfinite().all():
            raise FloatingPointError(
                f"text embeddings are not finite, encoded in {embeddings.dtype} and kept in {self._dtype}: "
                "use bfloat16 or float32"
            )
        return Encoded(kept, mask)


class TextTable(Texts):
    """Captions that `python -m skipdit.encode_text` encoded, memory-mapped.

    Args:
        folder: what it wrote.
        expected_captions: those of the dataset, in order; others are refused.

    Raises FileNotFoundError or ValueError, naming the folder, the first difference and what to do.
    """

    def __init__(self, folder: str | Path, expected_captions: list[str] | None = None):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"no text embeddings in {folder}; `python -m skipdit.encode_text --help` tells how to make them"
            )
        parts = [TextPart.read(path) for path in paths]
        self.captions = [caption for part in parts for caption in part.captions]
        made, self._starts = {part.made for part in parts}, [part.start for part in parts]
        if len(made) > 1 or [*self._starts, parts[0].total] != [0, *(part.stop for part in parts)]:
            raise ValueError(
                f"{folder} holds {len(self.captions)} of {' and of '.join(sorted(made))}: encoding was interrupted, or "
                "mixed with another one; run the same command again, or encode into a new folder"
            )
        if expected_captions is not None:
            _refuse_difference(folder, self.captions, expected_captions)
        self.fingerprint = parts[0].encoder
        self._shards = [safe_open(path, framework="pt") for path in paths]
        self._offsets = [[0, *shard.get_tensor("lengths").cumsum(0).tolist()] for shard in self._shards]
        self.null = self._shards[0].get_tensor("null")
        self.dim = self.null.shape[1]

    def rows(self, labels: Sequence[int]) -> list[Tensor]:
        found = []
        for label in labels:
            number = bisect.bisect_right(self._starts, label) - 1
            offsets, row = self._offsets[number], label - self._starts[number]
            found.append(self._shards[number].get_slice("embeddings")[offsets[row] : offsets[row + 1]])
        return found


@dataclass(frozen=True)
class TextPart:
    """How the embeddings of a shard were made, and which captions of how many they are."""

    encoder: str  # fingerprint
    max_tokens: int
    dtype: str
    start: int
    stop: int
    total: int
    captions: list[str]

    @property
    def made(self) -> str:
        return f"{self.total} captions in {self.dtype} of encoder {self.encoder}, {self.max_tokens} tokens at most"

    def metadata(self) -> dict[str, str]:
        return {"texts": json.dumps(asdict(self))}

    @classmethod
    def read(cls, path: Path) -> "TextPart":
        try:
            with safe_open(path, framework="pt") as file:
                return cls(**json.loads(file.metadata()["texts"]))
        except (SafetensorError, KeyError, TypeError) as error:
            made = "a file of `python -m skipdit.encode_text`"
            raise ValueError(f"{path} is damaged, or not {made} ({error}); remove it and encode again") from error


def _refuse_difference(folder: str | Path, found: list[str], expected: list[str]) -> None:
    for number, (there, wanted) in enumerate(zip_longest(found, expected)):
        if there != wanted:
            there, wanted = ("missing" if text is None else repr(text) for text in (there, wanted))
            raise ValueError(
                f"{folder} holds the embeddings of {len(found)} captions, the dataset has {len(expected)}; caption "
                f"{number} is {there} there and {wanted} in the dataset. Encode the dataset's captions with "
                "`python -m skipdit.encode_text` into a new folder."
            )
