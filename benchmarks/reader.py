"""How fast a training can read its data: samples per second by the trainer's own loader, shuffled, without a model.

    python benchmarks/reader.py --workers 0 1 2                                     # made-up latents as of ImageNet
    python benchmarks/reader.py --path data/imagenet/latents --batch 256
    python benchmarks/reader.py --kind image_shards --path data/imagenet-shards --image-size 256

A training does not wait for its data as long as every process reads faster than its card trains. Files that were read
before may come from the system's memory: for the speed of a disk, let the data be larger than that.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset

from skipdit.cli import Parser, friendly_errors
from skipdit.data.kinds import IMAGES
from skipdit.data.latents import LatentInfo, Latents, Part
from skipdit.data.stream import Stream, make_loader

SHAPE = 4, 32, 32  # latents of 256x256 images
SHARD = 10_000  # samples of a file, as `skipdit encode` has them
WARM = 2  # batches that are not timed: worker processes start


def make_latents(folder: Path, count: int) -> None:
    """Write latents of noise, as `skipdit encode --latents sample` writes those of images."""
    info = LatentInfo("noise", 0.18215, "sample", "float16", 8 * SHAPE[1])
    for number, start in enumerate(range(0, count, SHARD)):
        rows = min(SHARD, count - start)
        part = Part("noise", start, start + rows, count)
        table = {key: torch.randn(rows, 2, *SHAPE).half() for key in ("mean", "std")}
        metadata = info.metadata() | {"part": json.dumps(asdict(part))}
        save_file(table | {"label": torch.arange(rows) % 1000}, folder / f"latents-{number:05d}.safetensors", metadata)


def measure(data: Dataset, batch: int, batches: int, workers: int) -> tuple[float, float]:
    """Samples and MB per second of one process."""
    loader = iter(make_loader(Stream(data, 0, batch), [range(batch)], batch, 0, WARM + batches, workers))
    for _ in range(WARM):
        next(loader)
    began, size = time.perf_counter(), 0
    for read in loader:
        size += sum(value.nbytes for value in read.values() if isinstance(value, torch.Tensor))
    seconds = time.perf_counter() - began
    return batches * batch / seconds, size / seconds / 1e6


@friendly_errors("starts anew")
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--kind", choices=["latents", *IMAGES], default="latents", help="[%(default)s]")
    parser.add_argument("--path", help="of the data [latents of noise, in a temporary folder]")
    parser.add_argument("--image-size", type=int, default=256, help="of images [%(default)s]")
    parser.add_argument("--samples", type=int, default=20_000, help="latents of noise to make [%(default)s]")
    parser.add_argument("--batch", type=int, default=32, help="samples of a process per step [%(default)s]")
    parser.add_argument("--batches", type=int, default=200, help="to read [%(default)s]")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of the loader [0 1 2]")
    args = parser.parse_args()
    if args.kind != "latents" and args.path is None:
        parser.error(f"--kind {args.kind} needs --path")
    if min(args.samples, args.batch, args.batches) < 1 or min(args.workers) < 0:
        parser.error("--samples, --batch and --batches must be 1 or more, --workers 0 or more")
    with TemporaryDirectory() as made:
        if args.path is None:
            make_latents(Path(made), args.samples)
        path = args.path or made
        data = Latents(path) if args.kind == "latents" else IMAGES[args.kind](path, args.image_size)
        print(f"{len(data)} samples of {args.path or 'noise'}, {args.batches} batches of {args.batch}")
        for workers in args.workers:
            samples, megabytes = measure(data, args.batch, args.batches, workers)
            print(f"{workers} workers: {samples:,.0f} samples/s, {megabytes:,.0f} MB/s", flush=True)


if __name__ == "__main__":
    main()
