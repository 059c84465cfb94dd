"""Encode a dataset of images or clips into latents, once, with their flipped copies.

    skipdit encode --data fashion_mnist --path data --image-size 32 \\
        --vae class-to-image/weights/vae --out data/fashion-latents
    torchrun --nproc-per-node 8 -m skipdit encode --data image_folder --path data/imagenet/train --image-size 256 \\
        --vae stabilityai/sd-vae-ft-ema --out data/imagenet/latents
    skipdit encode --data videos --path data/UCF101/videos --labelled --image-size 256 --shard 200 \\
        --vae stabilityai/sd-vae-ft-ema --out data/UCF101/latents
    skipdit encode --data videos --path data/clips --captions data/clips/captions.jsonl --image-size 256 \\
        --shard 200 --vae stabilityai/sd-vae-ft-ema --out data/clips-latents
    skipdit encode --data pictures --path data/pictures --captions data/pictures/captions.jsonl \\
        --image-size 1024 --buckets 1024x1024 1024x768 768x1024 --shard 1000 \\
        --vae ckpts/t2i/sdxl-vae-fp16-fix --out data/pictures-latents
    skipdit encode --data image_folder --path data/imagenet/train --image-size 256 --out data/imagenet/latents \\
        --features facebook/dinov2-base

Training then does not decode, crop or encode any more. Of clips all frames are kept, so that training still draws its
random stretches. An interrupted run continues with the shards it lacks. With --features it also keeps an image
encoder's patch tokens, for train.align, beside latents that may be there already.
"""

import argparse
from pathlib import Path

from skipdit.cli import Parser, at_least
from skipdit.data.settings import CLIPS, IMAGES, PICTURES, READERS
from skipdit.utils.shipped import found
from skipdit.utils.text import with_home


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line, `argv` or the program's own; ends the program for --help and mistakes."""
    parser = Parser("skipdit encode", description=__doc__)
    parser.add_argument("--data", choices=[*IMAGES, *CLIPS, *PICTURES], required=True, help="kind of dataset")
    parser.add_argument("--path", required=True, help="its folder; of shards also a Hub name")
    parser.add_argument("--image-size", type=at_least(1), default=256, help="pixels along a side [%(default)s]")
    parser.add_argument(
        "--vae", default="stabilityai/sd-vae-ft-ema", help="autoencoder, folder or Hub name [%(default)s]"
    )
    parser.add_argument(
        "--latents",
        choices=["mean", "sample"],
        default="sample",
        help="keep the posterior's mean, or also its deviation to sample from it in training [%(default)s]",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--clip-list", metavar="FILE", help="clips: text file with those to encode, one per line")
    parser.add_argument(
        "--labelled", action="store_true", help="clips: the folder below path, or a column of shards, is their class"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="clips: their class folders to encode",
    )
    parser.add_argument(
        "--captions",
        metavar="FILE|txt",
        help="JSONL or CSV of video or image, and caption; txt: files beside them; of shards a column",
    )
    parser.add_argument("--picture-list", metavar="FILE", help="pictures: text file with those to encode, one per line")
    parser.add_argument(
        "--buckets", nargs="+", default=[], metavar="HxW", help="pictures: their shapes [a square of --image-size]"
    )
    parser.add_argument(
        "--features",
        metavar="ENCODER",
        help="images: keep this ViT's patch tokens, too; folder, Hub name or timm's name",
    )
    parser.add_argument(
        "--features-size", type=at_least(1), metavar="N", help="pixels along a side that it sees [as it was trained]"
    )
    parser.add_argument("--shard", type=at_least(1), default=10_000, help="images or clips per file [%(default)s]")
    parser.add_argument("--workers", type=at_least(0), default=READERS, help="reading processes [%(default)s]")
    args = with_home(parser.parse_args(argv))
    if args.features_size is not None and not args.features:
        parser.error("--features-size needs --features")
    args.vae, args.features = found(args.vae), args.features and found(args.features)
    return args
