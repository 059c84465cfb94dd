"""Images and clips to latents: `skipdit encode`."""

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from itertools import accumulate, groupby

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from skipdit.cli import friendly_errors
from skipdit.data.clips import ClipDataset
from skipdit.data.features import FeatureInfo, write_features
from skipdit.data.kinds import CLIPS, IMAGES, PICTURES
from skipdit.data.latents import LatentInfo, Part, expected_latents
from skipdit.data.settings import ClipData, PictureData
from skipdit.data.stream import Stream, collate
from skipdit.encoders.autoencoder import encode, latent_size, load_vae
from skipdit.encoders.image import load_image_encoder
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, replace_text, whole_file
from skipdit.utils.pixels import to_float
from skipdit.utils.provenance import fingerprint
from skipdit.utils.signals import leave_signals_to_parent


class _InOrder(Stream):
    """A stream that neither shuffles nor crops: position is index, a clip is all of it."""

    def index(self, position: int) -> int:
        return position

    def take(self, index: int, position: int) -> dict:
        sample = self.dataset[index]
        captioned = getattr(self.dataset, "captions", None) is not None
        return sample | {"label": index} if captioned else sample  # shards hold the captions of their rows, no others


def captions_of(dataset: Dataset) -> list[str]:
    """The caption of every row of a dataset; empty if it has none."""
    captions = getattr(dataset, "captions", None)
    return [] if captions is None else [captions[label] for label in dataset.labels]


def shards_of(dataset: Dataset, size: int) -> list[list[int]]:
    """The dataset indices of every shard: sorted by bucket, those of one bucket in their order, `size` at most."""
    buckets = getattr(dataset, "buckets", None) or [0] * len(dataset)
    order = sorted(range(len(dataset)), key=buckets.__getitem__)
    groups = [list(group) for _, group in groupby(order, key=buckets.__getitem__)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def open_dataset(args: argparse.Namespace) -> Dataset:
    if args.data in PICTURES:
        return PICTURES[args.data](
            PictureData(
                kind=args.data,
                path=args.path,
                captions=args.captions,
                picture_list=args.picture_list,
                image_size=args.image_size,
                buckets=args.buckets,
            )
        )
    if args.buckets or args.picture_list:
        raise UserError(f"--buckets and --picture-list are of --data {' and '.join(PICTURES)}, not of {args.data}")
    if args.data in IMAGES:
        if args.captions:
            raise UserError(f"--captions are of clips, and --data {args.data} is of images")
        return IMAGES[args.data](args.path, args.image_size)
    return CLIPS[args.data](
        ClipData(
            kind=args.data,
            path=args.path,
            image_size=args.image_size,
            labelled=args.labelled,
            clip_list=args.clip_list,
            classes=args.classes,
            captions=args.captions,
            num_frames=1,  # here no clip is too short
        )
    )


@friendly_errors()
def main(args: argparse.Namespace) -> None:
    state = process_state()
    vae = load_vae(args.vae)
    latent_size(args.image_size, vae)
    info = expected_latents(args.latents, args.image_size, vae, args.buckets)
    if args.features and args.data not in IMAGES:
        raise UserError(f"--features are of images with classes, and --data is {args.data}")
    encoder = load_image_encoder(args.features, args.features_size) if args.features else None
    with state.local_main_process_first():  # a data set that downloads itself does so once
        dataset = open_dataset(args)
    vae.to(state.device)
    if encoder is not None:
        seen = (encoder.size, encoder.mean, encoder.std, encoder.grid, encoder.dim)
        features = FeatureInfo(args.features, fingerprint(encoder.model), args.image_size, *seen)
        encoder.model.to(state.device)
    with naming(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    parts = [args.data, args.path, *args.classes, "labelled" if args.labelled else "", args.clip_list or ""]
    source, buckets = " ".join(filter(None, parts)), getattr(dataset, "buckets", None)
    if captions := captions_of(dataset):  # with all of them: a file of captions may be edited
        known = [dataset.names, captions, *filter(None, [buckets])]
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        source += f" captions {args.captions} {digest[:16]}"
    batch_size = 1 if isinstance(dataset, ClipDataset) else 64  # clips differ in length
    shards = shards_of(dataset, args.shard)
    starts = [0, *accumulate(len(shard) for shard in shards)]
    mine = range(len(shards))[state.process_index :: state.num_processes]
    for number in tqdm(mine, desc="encoding", unit="shard", disable=not state.is_main_process):
        rows, target = shards[number], args.out / f"latents-{number:05d}.safetensors"
        bucket = buckets[rows[0]] if buckets else 0
        part = Part(source, starts[number], starts[number + 1], len(dataset), bucket=bucket)
        samples = Subset(_InOrder(dataset, 0), rows)
        workers = {"num_workers": args.workers, "worker_init_fn": leave_signals_to_parent}
        loader = DataLoader(samples, batch_size, collate_fn=collate, **workers)
        if target.exists():
            if LatentInfo.read(target) != info or replace(Part.read(target), broken=()) != part:
                raise UserError(f"{args.out} holds other latents, or other shards; give these another folder (--out)")
        else:
            tensors, broken = encode_shard(vae, loader, args.latents)
            metadata = info.metadata() | {"part": json.dumps(asdict(replace(part, broken=tuple(broken))))}
            metadata |= {"captions": json.dumps({row: captions[row] for row in rows})} if captions else {}
            with whole_file(target) as partial:
                save_file(tensors, partial, metadata=metadata)
        if encoder is not None:
            write_features(encoder, features, loader, target)
    state.wait_for_everyone()
    if state.is_main_process:
        broken = [message for shard in sorted(args.out.glob("*.safetensors")) for message in Part.read(shard).broken]
        unit = "clips" if isinstance(dataset, ClipDataset) else "pictures" if buckets else "images"
        print(f"{len(dataset) - len(broken)} of {len(dataset)} {unit}, latents in {args.out}")
        if encoder is not None:
            rows, columns = encoder.grid
            print(f"features of {args.features}: {rows}x{columns} tokens of {encoder.dim} per image")
        left_out, listed = getattr(dataset, "left_out", []), args.out / "broken_files.txt"
        if broken or left_out:
            replace_text(listed, "".join(f"{message}\n" for message in broken + left_out))
        if broken:
            print(f"{len(broken)} unreadable {unit} were left out, listed in {listed}")
        if left_out:
            reason = "could not be read" if buckets else "no frames"
            print(f"{len(left_out)} more had no caption or {reason}, listed in {listed}")


def encode_shard(vae: AutoencoderKL, loader: DataLoader, kind: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of one shard, and the messages of the samples that could not be read and are left out."""
    parts: dict[str, list] = {"mean": [], "std": [], "label": [], "length": []}
    broken = []
    for batch in tqdm(loader, leave=False, desc="samples", unit="batch"):
        broken += batch["broken"]
        kept = batch["weight"] > 0
        pictures = batch["image"][kept]
        if not len(pictures):
            continue
        if pictures.ndim == 5:  # clips (N, F, 3, H, W)
            parts["length"].append(torch.full((len(pictures),), pictures.shape[1]))
            pictures = pictures.flatten(0, 1)
        for some in pictures.split(64):  # a long clip does not fit on the device
            views = to_float(some.to(vae.device))
            both = [encode(vae, view) for view in (views, views.flip(-1))]
            for key, tensors in zip(("mean", "std"), zip(*both, strict=True), strict=True):
                parts[key].append(torch.stack(tensors, dim=1).half().cpu())
        if "label" in batch:
            parts["label"].append(batch["label"][kept])
    if kind == "mean":
        parts["std"] = []
    return {key: torch.cat(tensors) for key, tensors in parts.items() if tensors}, broken
