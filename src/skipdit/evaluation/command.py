"""Judge samples: `skipdit evaluate`."""

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipdit.cli import friendly_errors
from skipdit.metrics import frechet_distance, gaussian_frechet_distance, mean_psnr, moments, psnr, ssim
from skipdit.metrics.features import features_of, shipped_statistics
from skipdit.metrics.kept import kept_rows
from skipdit.metrics.networks import load_i3d, load_image_network, sha256
from skipdit.metrics.perceptual import BACKBONES, ClipScore, load_lpips
from skipdit.metrics.samples import EVALUATION, Files, Samples, open_clips, open_samples
from skipdit.metrics.sets import inception_score, kid, precision_recall
from skipdit.metrics.vbench import link_clips, missing_clips
from skipdit.sampling.prompts import read_prompts
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text
from skipdit.utils.provenance import versions

FID_SAMPLES, FVD_CLIPS = 50_000, 2_048  # that published figures are of
# Where two runs differ in one of these, sample i of one is not meant to be sample i of the other.
_SAME = ("seed", "device", "classes", "prompts", "videos_per_prompt", "images_per_prompt", "num_frames")
_PACKAGES = ("lpips", "numpy", "pytorch-fid", "torchmetrics", "torchvision", "transformers")


def fidelity(args: argparse.Namespace) -> dict:
    """PSNR, SSIM and LPIPS of every sample against its namesake; of clips the means over frames.

    Identical samples are counted and left out of the mean PSNR; an identical frame of another clip is `IDENTICAL` dB.
    """
    ours, theirs = open_samples(args.run), open_samples(args.reference)
    differences = compare_runs(ours, theirs)
    if missing := sorted(set(ours.names) - set(theirs.names)):
        raise UserError(f"{theirs.source} has no partner of {_some(missing)}")
    partner = {name: i for i, name in enumerate(theirs.names)}
    networks = {name: load_lpips(name, args.weights[name], process_state().device) for name in args.lpips}

    def row(index: int) -> Tensor:
        name = ours.names[index]
        a, b = ours[index], theirs[partner[name]]
        if a.shape != b.shape:
            raise UserError(f"{name} is {tuple(a.shape)} in {ours.source}, and {tuple(b.shape)} in {theirs.source}")
        pair = a.to(process_state().device), b.to(process_state().device)
        decibels = psnr(*pair)
        values = [mean_psnr(decibels) if decibels.isfinite().any() else decibels[0], ssim(*pair).mean()]
        for distance, _ in networks.values():
            frames = zip(*(part.split(args.batch_size) for part in pair), strict=True)
            values.append(torch.cat([distance(*some) for some in frames]).mean())
        return torch.stack([value.float().cpu() for value in values])

    rows = kept_rows(
        args.features,
        {
            "metric": "fidelity",
            "source": str(ours.source.resolve()),
            "reference": str(theirs.source.resolve()),
            "networks": [about for _, about in networks.values()],
        },
        len(ours),
        lambda i: f"{ours.stamp(i)} {theirs.stamp(partner[ours.names[i]])}",
        lambda indices: torch.stack([row(i) for i in indices]),
        1,  # a sample is a batch of frames
        "pairs",
    ).double()
    equal = rows[:, 0].isinf()
    differ = rows[~equal]
    results = {"psnr": differ[:, 0].mean().item() if len(differ) else None, "ssim": rows[:, 1].mean().item()}
    results |= {f"lpips_{name}": rows[:, 2 + i].mean().item() for i, name in enumerate(networks)}
    results |= {"pairs": len(rows), "identical_pairs": int(equal.sum())}  # of infinite PSNR, left out of its mean
    extra = len(theirs) - len(ours)
    protocol = {"samples": ours.protocol(), "reference": theirs.protocol(), "differences": differences}
    protocol |= {"reference_samples_without_partner": extra, "networks": [about for _, about in networks.values()]}
    notes = [f"the runs differ in {name}: {a} here, {b} in the reference" for name, (a, b) in differences.items()]
    if "unknown" in protocol["samples"] or "unknown" in protocol["reference"]:
        notes.append("without both report.json it is unknown whether the pairs began with the same noise")
    if any(protocol["reference"].get(f"{kind}_steps", 0) != 0 for kind in ("cached", "forecast")):  # None: a drift's
        notes.append(f"the reference is not uncached: {protocol['reference']['cache']}")
    return {"results": results, "notes": notes, "protocol": protocol}


def compare_runs(ours: Samples, theirs: Samples) -> dict[str, list]:
    """Settings in which two runs differ besides the cache. Raises ValueError where they make other samples."""
    if not ours.job or not theirs.job:
        return {}
    keys = sorted((ours.job.keys() | theirs.job.keys()) - {"cache"})
    found = {key: [ours.job.get(key), theirs.job.get(key)] for key in keys if ours.job.get(key) != theirs.job.get(key)}
    if wrong := [key for key in _SAME if key in found]:
        lines = [f"  {key}: {found[key][0]} in {ours.source}, {found[key][1]} in {theirs.source}" for key in wrong]
        raise UserError("these are not the same samples with another cache:\n" + "\n".join(lines))
    return found


def fid(args: argparse.Namespace) -> dict:
    """FID, KID, precision and recall against a set of pictures, and the inception score."""
    device = process_state().device
    ours, theirs = open_samples(args.run), open_samples(args.reference)
    for samples in (ours, theirs):
        if isinstance(samples, Files) and len(samples[0]) > 1:
            raise UserError(f"{samples.source} holds clips, not pictures: fvd judges them")
    if not len(ours):
        raise UserError(f"{ours.source} holds statistics only; what is judged are pictures")
    network = load_image_network(args.network, args.inception, device)
    statistics = shipped_statistics(theirs, args.network, "--network")
    mine = features_of(ours, network, args.features, args.batch_size, ours.size)
    reference = theirs.protocol() if len(theirs) else {"source": str(theirs.source), "num_samples": 0}
    name, results = "frechet_distance" if args.network else "fid", {}
    notes = [] if network.released else [f"{network.file} does not hold the network of published figures"]
    if len(theirs):
        real = features_of(theirs, network, args.features, args.batch_size, ours.size)
        results["kid"], results["kid_std"] = kid(mine.to(device), real.to(device))
        results["precision"], results["recall"] = precision_recall(mine.to(device), real.to(device))
        reference["fitted_to"] = list(ours.size)  # centre crop of those of another size
    if statistics is not None:
        reference |= {"statistics": "mu and sigma of the file", "file_sha256": sha256(theirs.source)}
        distance = gaussian_frechet_distance(*moments(mine), *statistics)
    else:
        distance = frechet_distance(mine, real)
        if len(theirs) < min(len(ours), FID_SAMPLES):
            notes.append(f"the reference has {len(theirs):,} pictures only")
    results = {name: distance} | results
    if network.classifier is not None:
        logits = mine @ network.classifier.T.cpu().float()
        results["inception_score"], results["inception_score_std"] = inception_score(logits)
    if len(ours) < FID_SAMPLES:
        notes.append(
            f"{name} of {len(ours):,} samples, not {FID_SAMPLES:,}: the fewer, the larger it is; "
            "compare only with others of as many"
        )
    protocol = {"samples": ours.protocol(), "reference": reference, "network": network.protocol()}
    protocol |= {"kid": "mean over 100 random subsets of 1,000, or all", "precision_recall_neighbours": 3}
    return {"results": results, "notes": notes, "protocol": protocol}


def fvd(args: argparse.Namespace) -> dict:
    """FVD in the protocol of StyleGAN-V: 16 frames, 2,048 clips, covariances divided by N as there."""
    network = load_i3d(args.i3d, process_state().device)
    ours = open_clips(args.run, args.frames, 1, None, args.clips)
    height, width = ours.size
    if not isinstance(theirs := open_clips(args.reference, args.frames, args.interval, height, args.clips), Files):
        if height != width:
            raise UserError(f"clips of {height}x{width} need a run as reference: other clips are cropped square")
    elif args.interval != 1:
        raise UserError("--interval is of data sets; the clips of a run are taken as they are")
    gaussians, notes = [], []
    for samples, whose in ((ours, "of the run"), (theirs, "of the reference")):
        rows = features_of(samples, network, args.features, args.batch_size, ours.size, args.frames, args.clips)
        mean, covariance = moments(rows)
        gaussians += [mean, covariance * (len(rows) - 1) / len(rows)]
        if len(rows) < FVD_CLIPS:
            notes.append(f"FVD of {len(rows):,} clips {whose}, not {FVD_CLIPS:,}: compare only with others of as many")
    protocol = {"samples": ours.protocol(), "reference": theirs.protocol(), "network": network.protocol()}
    protocol |= {"frames": args.frames, "most_clips": args.clips, "fitted_to": list(ours.size)}
    return {"results": {"fvd": gaussian_frechet_distance(*gaussians)}, "notes": notes, "protocol": protocol}


def clip(args: argparse.Namespace) -> dict:
    """How well pictures, or the frames of clips, fit their prompts."""
    samples = open_samples(args.run)
    if not isinstance(samples, Files):
        raise UserError(f"{samples.source} has no prompts: the CLIP score is of a folder with a prompts.json")
    prompts = [samples.prompts[name] for name in samples.names]
    score = ClipScore(args.model, process_state().device)
    rows = kept_rows(
        args.features,
        {"metric": "clip", "source": str(samples.source.resolve()), **score.protocol()},
        len(samples),
        lambda i: f"{samples.stamp(i)} {prompts[i]}",
        lambda indices: score([samples[i] for i in indices], [prompts[i] for i in indices])[:, None],
        args.batch_size,
        "samples",
    )
    cut = score.too_long(prompts)
    notes = [f"{len(cut)} prompts are longer than the model reads, and were cut"] if cut else []
    protocol = {"samples": samples.protocol(), "network": score.protocol(), "prompts_cut": len(cut)}
    return {"results": {"clip_score": rows.double().mean().item()}, "notes": notes, "protocol": protocol}


def vbench(args: argparse.Namespace) -> dict:
    """Clips that are named otherwise are linked into OUT/vbench. Ends with status 1 if some are missing."""
    samples = open_samples(args.run)
    if not isinstance(samples, Files):
        raise UserError(f"{samples.source} is no folder of clips")
    folder, names = samples.source, samples.names
    wanted = read_prompts([] if args.prompts else samples.prompts.values(), args.prompts, each_once=True)
    if (folder / "prompts.json").exists() and not samples.job.get("vbench_names"):
        folder = args.out / "vbench"
        names = link_clips(samples, folder)
    missing = missing_clips(names, wanted, args.each)
    notes = [f"{len(missing)} clips are missing: {_some(missing)}"] if missing else []
    results = {"folder": str(folder), "prompts": len(wanted), "each": args.each, "missing": missing}
    return {"results": results, "notes": notes, "protocol": {"samples": samples.protocol()}}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def library_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


MEASURES = {measure.__name__: measure for measure in (fidelity, fid, fvd, clip, vbench)}


@friendly_errors()
def main(args: argparse.Namespace) -> None:
    run = Path(args.run)
    args.out = Path(args.out or (run / EVALUATION if run.is_dir() else run.with_suffix("") / EVALUATION))
    args.features = Path(getattr(args, "features", None) or args.out / "features")
    args.weights = {name: getattr(args, f"{name}_weights", None) for name in BACKBONES}
    with torch.no_grad():
        if getattr(args, "batch_size", 1) < 1:
            raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
        torch.backends.cudnn.allow_tf32 = False  # figures are of float32
        record: dict[str, Any] = {"metric": args.metric, **MEASURES[args.metric](args)}
    made = versions()
    record["protocol"] |= {"versions": made["versions"] | library_versions(), "device": made["device"]}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.metric}.json"
    replace_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    for name, value in record["results"].items():
        print(f"{name}: {f'{value:.4f}' if isinstance(value, float) else value}")
    for note in record["notes"]:
        print(f"note: {note}")
    print(f"protocol: {file}")
    if record["results"].get("missing"):
        raise SystemExit(1)
