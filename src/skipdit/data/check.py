"""What a data set holds, and what of it cannot be read: `skipdit data check`."""

import argparse
from collections import Counter
from statistics import median

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipdit.cli import friendly_errors
from skipdit.data.clip_folder import STRETCH, ClipFolder
from skipdit.data.clips import ClipDataset, load_section
from skipdit.data.kinds import FOLDERS, IMAGES
from skipdit.data.latents import Shards
from skipdit.data.pictures import PictureFolder, bucket_sizes
from skipdit.data.settings import CLIPS, ClipData
from skipdit.data.shards import ShardClips
from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.files import naming
from skipdit.utils.signals import leave_signals_to_parent


@friendly_errors("starts anew")
def main(args: argparse.Namespace) -> None:
    broken = check(args)
    raise SystemExit(1 if broken else 0)


def check(args: argparse.Namespace) -> int:
    """Print the report. Returns the number of broken files, and of clips or pictures without a caption."""
    config = load_section(args.config, args.overrides)
    clips, uncaptioned = config.kind in CLIPS, []
    if args.good and config.kind not in ("videos", "frames", "pictures"):
        raise UserError(f"--good lists files of clips or of captioned pictures, and data.kind is {config.kind}")
    if config.kind == "latents":
        _describe_latents(config.path)
        return 0
    folder = FOLDERS.get(config.kind)
    dataset = folder(config) if folder else IMAGES[config.kind](config.path, config.image_size)
    walk, workers = _Walk(dataset, args.quick, args.decode), args.workers
    loader = DataLoader(walk, batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_parent)
    found = list(tqdm(loader, desc="reading", unit="clip" if clips else "image"))
    broken = [error for _, error in found if error]
    if isinstance(dataset, PictureFolder):
        print(f"{config.path}: {len(found) - len(broken):,} readable pictures")
        _describe_captions(dataset.captions)
        _describe_buckets(dataset.sizes, dataset.buckets)
        uncaptioned = dataset.uncaptioned
        _list("without caption, or with a second one", uncaptioned)
        broken += dataset.left_out[len(uncaptioned) :]
    elif clips:
        _describe_clips(dataset, config, [length for length, error in found if not error])
        if dataset.pictures:
            broken += _missing(dataset)
        uncaptioned = dataset.uncaptioned  # of what was left out it came first
        _list("without caption, or with a second one", uncaptioned)
        short = dataset.left_out[len(uncaptioned) :] + [
            dataset.too_short(i, n) for i, (n, error) in enumerate(found) if not error and dataset.is_short(n)
        ]
        _list(f"too short for {config.num_frames} frames at every {config.frame_interval}", short)
    else:
        print(f"{config.path}: {len(found) - len(broken):,} images in {dataset.num_classes} classes")
    _list("broken", broken)
    if args.good:
        unusable = [error or (clips and dataset.is_short(length)) for length, error in found]
        good = [name for name, bad in zip(dataset.names, unusable, strict=True) if not bad]
        with naming(args.good):  # names that are no UTF-8 stay what they are, as `read_list` reads them
            args.good.write_bytes("".join(f"{name}\n" for name in good).encode(errors="surrogateescape"))
        unit = "clip" if clips else "picture"
        print(f"{len(good):,} good {unit}s listed in {args.good}: train with data.{unit}_list={args.good}")
    return len(broken) + len(uncaptioned)


class _Walk(Dataset):
    """(frames, error) of every sample."""

    def __init__(self, dataset: Dataset, quick: bool, decode: bool):
        self.dataset, self.quick, self.decode = dataset, quick, decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            if not isinstance(self.dataset, ClipDataset):
                self.dataset[index]
                return 1, ""
            clip = self.dataset.open(index)
            frames = range(len(clip))
            every = [frames[start : start + STRETCH] for start in range(0, len(frames), STRETCH)]
            for stretch in [frames[:1], frames[-1:]] if self.quick and frames else every:  # a long clip fills memory
                clip.read(stretch)
            if self.decode and (n := self.dataset.count(index)) != len(frames):
                raise BrokenSample(f"{self.dataset.names[index]}: {len(frames)} frames are counted, {n} can be decoded")
            return len(frames), ""
        except BrokenSample as error:
            return 0, str(error)


def _describe_clips(dataset: ClipFolder | ShardClips, config: ClipData, lengths: list[int]) -> None:
    what = {"videos": "video files", "frames": "folders of frames"}.get(config.kind, "rows with a video")
    print(f"{config.path}: {len(lengths):,} readable {what}, {sum(lengths):,} frames")
    if lengths:
        print(f"frames per clip: {min(lengths):,} to {max(lengths):,}, median {median(lengths):,.0f}")
    _describe_captions(dataset.captions)
    if dataset.labels is not None and dataset.captions is None:
        counts = Counter(dataset.labels)
        print(f"{len(dataset.classes)} classes of {min(counts.values()):,} to {max(counts.values()):,} clips:")
        print("  " + ", ".join(f"{i} {name} ({counts[i]})" for i, name in enumerate(dataset.classes)))
    if dataset.strays:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in dataset.strays.most_common(5))
        print(f"passed over: {sum(dataset.strays.values()):,} other files ({kinds})")


def _describe_latents(folder: str) -> None:
    table = Shards(folder)
    unit = f"frames of {len(table.column('length')):,} clips" if table.clips else "images"
    print(f"{folder}: latents of {len(table):,} {unit}, {table.info}")
    _describe_captions(table.captions)
    if table.captions is not None and not table.clips:
        _describe_buckets(bucket_sizes(table.info.image_size, table.info.buckets), table.buckets)


def _describe_buckets(sizes: list[tuple[int, int]], buckets: list[int]) -> None:
    counts = Counter(buckets)
    shapes = ", ".join(f"{height}x{width} ({counts[i]:,})" for i, (height, width) in enumerate(sizes))
    print(f"pictures per bucket, height x width: {shapes}")


def _describe_captions(captions: list[str] | None) -> None:
    if captions is not None:
        words = [len(text.split()) for text in captions]
        lengths = f"median {median(words):,.0f} words, largest {max(words):,}"
        print(f"{len(words):,} captions: {lengths}, for example {captions[0]!r}")


def _missing(dataset: ClipFolder) -> list[str]:
    """Messages of the listed pictures that do not exist."""
    print(f"{len(dataset.pictures):,} pictures listed to draw images from")
    paths = (dataset.picture_root / name for name in dataset.pictures)
    return [f"{path}: listed, but not there" for path in paths if not path.is_file()]


def _list(title: str, messages: list[str]) -> None:
    if messages:
        print(f"{title}: {len(messages)}\n  " + "\n  ".join(messages))
