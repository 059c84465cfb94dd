"""Encode the captions of a training config once, so that training needs no text encoder in memory.

    skipdit encode-text configs/text-to-video/clips.yaml --out data/texts \\
        --text-encoder checkpoints/Latte-0/text_encoder
    torchrun --nproc-per-node 8 -m skipdit encode-text configs/text-to-video/clips.yaml --out data/texts \\
        --text-encoder checkpoints/Latte-0/text_encoder data.kind=latents data.path=data/clips-latents

Text-to-image reads every caption with two encoders:

    skipdit encode-text configs/text-to-image/t2i_train_stage2.yaml --out data/texts-clip --role clip \\
        --text-encoder ckpts/t2i/clip_text_encoder
    skipdit encode-text configs/text-to-image/t2i_train_stage2.yaml --out data/texts-t5 --role t5 \\
        --text-encoder ckpts/t2i/mt5

Takes the captions that training will ask for. An interrupted run continues with the shards it lacks.
"""

import argparse
from pathlib import Path

from skipdit.cli import Parser, at_least
from skipdit.encoders.reading import CHUNK, LATTE, READINGS
from skipdit.utils.text import with_home

DTYPES = ("float16", "bfloat16", "float32")


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit encode-text", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a training run; its section `data` counts")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="settings of that section to replace")
    parser.add_argument("--text-encoder", required=True, metavar="NAME", help="folder or Hub name")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name [that of the encoder]")
    reads = "what reads the texts: Latte, or which of Hunyuan-DiT's two [%(default)s]"
    parser.add_argument("--role", choices=READINGS, default=LATTE.role, help=reads)
    limits = ", ".join(f"{reading.max_tokens} of {role}" for role, reading in READINGS.items())
    parser.add_argument("--max-tokens", type=at_least(1), metavar="N", help=f"in place of the role's limit [{limits}]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the files [%(default)s]")
    parser.add_argument("--encoder-dtype", choices=DTYPES, default="float32", help="of the encoder [%(default)s]")
    parser.add_argument("--batch-size", type=at_least(1), default=CHUNK, help="captions at once [%(default)s]")
    parser.add_argument("--shard", type=at_least(1), default=1_000, help="captions per file [%(default)s]")
    return with_home(parser.parse_intermixed_args(argv))
