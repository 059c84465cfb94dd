"""Captions to embeddings: `skipdit encode-text`."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from skipdit.cli import friendly_errors
from skipdit.data.clips import load_section
from skipdit.data.kinds import FOLDERS
from skipdit.data.latents import Shards
from skipdit.data.settings import ClipData, ImageData, PictureData
from skipdit.data.texts import LiveTexts, TextPart
from skipdit.encoders.reading import CHUNK, READINGS
from skipdit.encoders.text import TextEncoder, load_text_encoder
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, whole_file


@friendly_errors()
def main(args: argparse.Namespace) -> None:
    reading = READINGS[args.role]
    reading = reading._replace(max_tokens=reading.max_tokens if args.max_tokens is None else args.max_tokens)
    captions = captions_to_train(load_section(args.config, args.overrides))
    state = process_state()
    with state.local_main_process_first():  # an encoder from the Hub is fetched once
        encoder_dtype = getattr(torch, args.encoder_dtype)
        encoder = load_text_encoder(args.text_encoder, args.tokenizer, encoder_dtype, reading)
    dtype = getattr(torch, args.dtype)
    encode_captions(encoder.to(state.device), captions, args.out, dtype, args.batch_size, args.shard)
    if state.is_main_process:
        print(f"{len(captions)} captions, embeddings in {args.out}")


def captions_to_train(config: ClipData | ImageData | PictureData) -> list[str]:
    """What the labels of a dataset are indices of, in order. Raises ValueError for a dataset without captions."""
    if config.kind in FOLDERS:
        captions = FOLDERS[config.kind](config).captions
    else:
        captions = Shards(config.path).captions if config.kind == "latents" else None
    if captions is None:
        raise UserError(
            f"{config.path} ({config.kind}) has no captions: for clips set data.captions=FILE or txt, for latents run "
            "`skipdit encode --captions`"
        )
    return captions


def encode_captions(
    encoder: TextEncoder,
    captions: list[str],
    out: str | Path,
    dtype: torch.dtype = torch.float16,
    batch_size: int = CHUNK,
    shard: int = 1_000,
) -> None:
    """Write the embeddings of captions in files of `dtype`, for `TextTable`; those that are there already stay.

    `shard` captions go into a file, `batch_size` through the encoder at once; the processes of a launch share the
    files. Raises ValueError if `out` holds other embeddings, FloatingPointError for some that `dtype` cannot hold.
    """
    state, out, texts = process_state(), Path(out), LiveTexts(encoder, captions, dtype, batch_size)
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(captions), shard)[state.process_index :: state.num_processes]
    for start in tqdm(starts, desc="encoding", unit="shard", disable=not state.is_main_process):
        labels = range(start, min(start + shard, len(captions)))
        made = (encoder.fingerprint, encoder.reading.max_tokens, str(dtype).removeprefix("torch."))
        said = captions[start : labels.stop]
        part = TextPart(*made, start, labels.stop, len(captions), said, encoder.reading.role)
        target = out / f"texts-{start // shard:05d}.safetensors"
        if target.exists():
            if TextPart.read(target) != part:
                raise UserError(f"{out} holds other embeddings, or other shards; give these another folder (--out)")
            continue
        batches = tqdm(range(0, len(labels), batch_size), leave=False, desc="captions", unit="batch")
        rows = [(row.cpu(), length) for i in batches for row, length in texts.rows(labels[i : i + batch_size])]
        embeddings, lengths = zip(*rows, strict=True)
        tensors = {"embeddings": torch.cat(embeddings), "lengths": torch.tensor(lengths)}
        tensors |= {"null": texts.null.cpu(), "null_mask": texts.null_mask.cpu()}
        with whole_file(target) as partial:
            save_file(tensors, partial, metadata=part.metadata())
    state.wait_for_everyone()
