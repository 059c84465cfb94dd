"""Captions as training sees them: encoded on the spot, or once, in safetensors shards that say how they were made.

A shard holds `embeddings` (sum of lengths, C) of its captions' own tokens, one caption after the other, `lengths` (N,),
and `null` (S, C) and `null_mask` (S,), the encoding of "" with its padding. Where a model reads the embeddings of
padding (`Reading.whole`), those of the captions are there, too: `embeddings` is (N * S, C). Its metadata: the encoder's
fingerprint, tokens at most, dtype, what reads it; which captions of how many it holds, and what they say.
"""

import bisect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skipdit.encoders.reading import CHUNK, LATTE, Reading
from skipdit.encoders.text import Encoded, TextEncoder
from skipdit.utils.errors import UserError


class Row(NamedTuple):
    """What is kept of a caption of k tokens: their embeddings (k, C), or with those of its padding (S, C), and k."""

    embeddings: Tensor
    length: int


class Texts(ABC):
    """The captions of a dataset, from files or from an encoder: the same up to rounding.

    Attributes:
        captions: one per label.
        dim: channels C of an embedding.
        fingerprint: of the encoder.
        reading: of the encoder; its S tokens are the most that a caption has.
        null: (S, C), the encoding of "" and of its padding, which stands for a dropped caption.
        null_mask: (S,) bool, True at the tokens of "".
    """

    captions: list[str]
    dim: int
    fingerprint: str
    reading: Reading
    null: Tensor
    null_mask: Tensor

    @abstractmethod
    def rows(self, labels: Sequence[int]) -> list[Row]:
        """What is kept of each of these captions."""

    def require(self, name: str, dim: int, fingerprint: str | None) -> str:
        """Check that these texts are for a model of `dim` channels, and by the encoder of this fingerprint, if given.

        Returns the encoder's fingerprint. Raises ValueError, naming the setting `name`.
        """
        if self.dim != dim:
            raise UserError(f"{name}: they have {self.dim} channels, the model takes {dim}")
        if fingerprint not in (None, self.fingerprint):
            raise UserError(f"{name}: the text encoder's fingerprint is {self.fingerprint}, the run's {fingerprint}")
        return self.fingerprint

    def take(self, labels: Tensor, dropped: Tensor) -> Encoded:
        """What Latte is given for some captions.

        As in sampling, where `LattePipeline` trims the encoding of the negative prompt to the tokens of the prompt,
        a dropped caption keeps its mask and has its embeddings replaced.

        Args:
            labels: (...) int64, indices of captions.
            dropped: (...) bool.

        Returns embeddings (..., k, C) float32 and mask (..., k) bool on the labels' device; k is the longest of these
        captions. The embeddings of padding are zero, except those of "" and of a reading that takes them whole. Raises
        IndexError for a label without caption.
        """
        rows = self._find(labels)
        longest = max(row.length for row in rows)
        embeddings, mask = _padded(rows, longest, labels.device)
        null = self.null[:longest].to(labels.device).float()
        embeddings = torch.where(dropped.to(labels.device).flatten()[:, None, None], null, embeddings)
        return Encoded(embeddings.reshape(*labels.shape, *null.shape), mask.reshape(*labels.shape, longest))

    def take_whole(self, labels: Tensor, dropped: Tensor) -> Encoded:
        """What Hunyuan-DiT is given for some captions: all S tokens, and for a dropped caption "" with its mask.

        Arguments and errors are those of `take`. Returns embeddings (..., S, C) float32 and mask (..., S) bool on the
        labels' device. Padding has the embeddings that it has in `take`.
        """
        device = labels.device
        embeddings, mask = _padded(self._find(labels), self.reading.max_tokens, device)
        null, null_mask = self.null.to(device).float(), self.null_mask.to(device)
        replaced = dropped.to(device).flatten()[:, None]
        embeddings = torch.where(replaced[..., None], null, embeddings).reshape(*labels.shape, *null.shape)
        return Encoded(embeddings, torch.where(replaced, null_mask, mask).reshape(*labels.shape, *null_mask.shape))

    def _find(self, labels: Tensor) -> list[Row]:
        """The rows of labels (...), flattened; each is looked up once."""
        indices = labels.flatten().tolist()
        distinct = sorted(set(indices))
        if distinct[0] < 0 or distinct[-1] >= len(self.captions):
            raise IndexError(f"labels {distinct[0]} to {distinct[-1]}, and there are {len(self.captions)} captions")
        found = dict(zip(distinct, self.rows(distinct), strict=True))
        return [found[i] for i in indices]


def _padded(rows: list[Row], tokens: int, device: torch.device) -> Encoded:
    """N captions -> embeddings (N, tokens, C) float32, zero where none are kept, and mask (N, tokens)."""
    embeddings = pad_sequence([row.embeddings for row in rows], batch_first=True)[:, :tokens]
    embeddings = F.pad(embeddings, (0, 0, 0, tokens - embeddings.shape[1]))
    mask = torch.arange(tokens) < torch.tensor([row.length for row in rows])[:, None]
    return Encoded(embeddings.to(device).float(), mask.to(device))


class LiveTexts(Texts):
    """Captions encoded when taken, in the dtype of files. Raises FloatingPointError for what that cannot hold."""

    def __init__(
        self, encoder: TextEncoder, captions: list[str], dtype: torch.dtype = torch.float16, batch_size: int = CHUNK
    ):
        self.captions, self.dim, self.reading = captions, encoder.dim, encoder.reading
        self._encoder, self._dtype, self._batch_size = encoder, dtype, batch_size

    @property
    def fingerprint(self) -> str:
        return self._encoder.fingerprint

    @property
    def null(self) -> Tensor:
        return self._empty.embeddings[0]

    @property
    def null_mask(self) -> Tensor:
        return self._empty.mask[0]

    @cached_property
    def _empty(self) -> Encoded:
        return self._encode([""])

    def rows(self, labels: Sequence[int]) -> list[Row]:
        embeddings, mask = self._encode([self.captions[i] for i in labels])
        lengths = mask.sum(1).tolist()
        kept = embeddings if self.reading.whole else (row[valid] for row, valid in zip(embeddings, mask, strict=True))
        return [Row(row, length) for row, length in zip(kept, lengths, strict=True)]

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
    """Captions that `skipdit encode-text` encoded, memory-mapped.

    Args:
        folder: what it wrote.
        expected_captions: those of the dataset, in order; others are refused.
        reading: what the trainer needs; embeddings made for another one are refused.

    Raises FileNotFoundError or ValueError, naming the folder, the first difference and what to do.
    """

    def __init__(self, folder: str | Path, expected_captions: list[str] | None = None, reading: Reading = LATTE):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"no text embeddings in {folder}; `skipdit encode-text --help` tells how to make them"
            )
        parts = [TextPart.read(path) for path in paths]
        self.captions = [caption for part in parts for caption in part.captions]
        made, self._starts = {part.made for part in parts}, [part.start for part in parts]
        if len(made) > 1 or [*self._starts, parts[0].total] != [0, *(part.stop for part in parts)]:
            raise UserError(
                f"{folder} holds {len(self.captions)} of {' and of '.join(sorted(made))}: encoding was interrupted, or "
                "mixed with another one; run the same command again, or encode into a new folder"
            )
        _refuse_reading(folder, parts[0], reading)
        if expected_captions is not None:
            _refuse_difference(folder, self.captions, expected_captions)
        self.fingerprint, self.reading, self._folder = parts[0].encoder, reading, folder
        self._shards = [safe_open(path, framework="pt") for path in paths]
        self._lengths = [shard.get_tensor("lengths") for shard in self._shards]
        kept = (torch.full_like(k, reading.max_tokens) if reading.whole else k for k in self._lengths)
        self._offsets = [[0, *tokens.cumsum(0).tolist()] for tokens in kept]
        self.null = self._shards[0].get_tensor("null")
        self.dim = self.null.shape[1]

    @cached_property
    def null_mask(self) -> Tensor:
        if "null_mask" not in self._shards[0].keys():  # noqa: SIM118 (not a mapping)
            raise UserError(f"{self._folder} was encoded by an older version, for Latte; encode into a new folder")
        return self._shards[0].get_tensor("null_mask")

    def rows(self, labels: Sequence[int]) -> list[Row]:
        found = []
        for label in labels:
            number = bisect.bisect_right(self._starts, label) - 1
            offsets, row = self._offsets[number], label - self._starts[number]
            kept = self._shards[number].get_slice("embeddings")[offsets[row] : offsets[row + 1]]
            found.append(Row(kept, int(self._lengths[number][row])))
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
    role: str = LATTE.role  # with max_tokens the reading; files of older versions do not say it

    @property
    def made(self) -> str:
        reading = f"{self.max_tokens} tokens at most, role {self.role}"
        return f"{self.total} captions in {self.dtype} of encoder {self.encoder}, {reading}"

    def metadata(self) -> dict[str, str]:
        return {"texts": json.dumps(asdict(self))}

    @classmethod
    def read(cls, path: Path) -> "TextPart":
        try:
            with safe_open(path, framework="pt") as file:
                return cls(**json.loads(file.metadata()["texts"]))
        except (SafetensorError, KeyError, TypeError) as error:
            made = "a file of `skipdit encode-text`"
            raise UserError(f"{path} is damaged, or not {made} ({error}); remove it and encode again") from error


def _refuse_reading(folder: str | Path, part: TextPart, expected: Reading) -> None:
    if (part.role, part.max_tokens) != (expected.role, expected.max_tokens):
        raise UserError(
            f"{folder} was encoded for {part.role} with {part.max_tokens} tokens at most, what is needed is "
            f"{expected.role} with {expected.max_tokens}. Encode the captions with `skipdit encode-text "
            f"--role {expected.role} --max-tokens {expected.max_tokens}` into a new folder."
        )


def _refuse_difference(folder: str | Path, found: list[str], expected: list[str]) -> None:
    for number, (there, wanted) in enumerate(zip_longest(found, expected)):
        if there != wanted:
            there, wanted = ("missing" if text is None else repr(text) for text in (there, wanted))
            raise UserError(
                f"{folder} holds the embeddings of {len(found)} captions, the dataset has {len(expected)}; caption "
                f"{number} is {there} there and {wanted} in the dataset. Encode the dataset's captions with "
                "`skipdit encode-text` into a new folder."
            )
