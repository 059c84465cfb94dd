"""Skip-Cache and the caching methods that one would take instead: same machine, weights, prompts and seeds.

    python benchmarks/compare.py --task class-to-image --out results/class-to-image
    python benchmarks/compare.py --task text-to-video --out results/text-to-video --repeats 5
    python benchmarks/compare.py --task class-to-image --quick --out results/quick    # few samples, few settings
    python benchmarks/compare.py --task text-to-video --methods skip-cache taylorseer --out results/some num_frames=8
    python benchmarks/compare.py --task text-to-image --full-size --out results/text-to-image
    python benchmarks/compare.py --task class-to-image --also results/demo-plan.json --also D0.2-o1 --out results/some

Every method runs on the model with skips and, with plain weights (--plain), on the plain one; Skip-Cache needs skips.
Fidelity is against the uncached samples of the same backbone. The baselines and their sources are in baselines/, their
settings in rows.py: those of their papers or packages where these fit a model of any depth. Writes compare.md,
compare.json and compare.png into --out, and every row as soon as it is measured: the same command again continues, and
with more --methods or --repeats adds to what is there.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from baselines import TeaCache
from compare_report import markdown, plot
from full_size import full_size, full_size_markdown
from rows import METHODS, UNCACHED, Row, rows_for
from store import Store
from torch import Tensor
from tqdm import tqdm

from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.cli import Parser, friendly_errors
from skipdit.config import changed, load_config, to_dict
from skipdit.evaluation.compare import check_plans
from skipdit.layers.flops import flop_counter
from skipdit.layers.inspect import replaced
from skipdit.layers.skip import SkipTransformer
from skipdit.metrics import IDENTICAL, frechet_distance, measure_fidelity
from skipdit.metrics.networks import load_image_script
from skipdit.metrics.samples import fitted, open_samples
from skipdit.sampling.sampler import Sampler
from skipdit.tasks import TASKS, find_task
from skipdit.utils.device import compile_mode, process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text
from skipdit.utils.provenance import fingerprint, versions

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "benchmarks/weights"  # of plain models


@dataclass
class Backbone:
    """A model, ready to sample."""

    name: str
    sampler: Sampler
    window: CacheSpec

    @property
    def model(self) -> SkipTransformer:
        return self.sampler.model

    def seconds(self, row: Row) -> float:
        """Per sample, with decoding: of the config's first batch, of all where they differ."""
        began, count = time.perf_counter(), 0
        with row.baseline.on(self.model, self.sampler.timesteps(row.steps)) if row.baseline else nullcontext():
            batches = self.sampler.images(row.steps, row.spec)
            for images in batches if row.varies else islice(batches, 1):
                count += len(images)  # on the CPU, so the device has finished
        return (time.perf_counter() - began) / count


class Meter:
    """What the model calls of a sampling run cost; see `metered`."""

    def __init__(self) -> None:
        self.flops, self.full, self.cached, self.feature_bytes = 0.0, 0, 0, 0


@contextmanager
def metered(model: SkipTransformer) -> Iterator[Meter]:
    """Counts the FLOPs of the model's calls, two per multiply-add with attention, and Skip-Cache's steps and feature.

    What samplers compute ahead of the steps and the autoencoder are not in them.
    """
    meter, original = Meter(), model.forward

    def forward(*args, **kwargs):
        with flop_counter() as counter:
            out = original(*args, **kwargs)
        meter.flops += counter.get_total_flops()
        cache = kwargs.get("cache")
        if cache is not None and cache.kept_feature is None:  # a full call leaves its feature there
            meter.cached += 1
        else:
            meter.full += 1
        if cache is not None and cache.kept_feature is not None:
            meter.feature_bytes = max(meter.feature_bytes, cache.kept_feature.nbytes)
        return out

    with replaced(model, "forward", forward):
        yield meter


def measure(backbone: Backbone, row: Row) -> tuple[dict[str, Any], Tensor]:
    """A row's samples, and what they cost, apart from time."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timesteps = backbone.sampler.timesteps(row.steps)
    with (
        row.baseline.on(backbone.model, timesteps) if row.baseline else nullcontext() as run,
        metered(backbone.model) as meter,
    ):
        samples = backbone.sampler.make(row.steps, row.spec)
    calls = meter.full + meter.cached
    full, partial = (run.full, run.partial) if run else (meter.full, meter.cached)
    features = row.spec.order + 1 + row.spec.adaptive if meter.cached else 0
    kept = run.peak_bytes if run else meter.feature_bytes * features
    result = {
        "flops": meter.flops / len(samples),
        "full_steps": full * row.steps / calls,  # means over batches, which a measuring method treats differently
        "partial_steps": partial * row.steps / calls,
        "cache_bytes": kept,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    return result, samples


def fitted_polynomial(backbone: Backbone, steps: int, store: Store) -> list[float]:
    """TeaCache's for this model, from samples of other seeds than those that are compared."""
    key = f"{backbone.name}-teacache-fit"
    if (known := store.result(key)) is None:
        sampler, config = backbone.sampler, backbone.sampler.config
        seed = config.seed
        try:
            sampler.config = changed(config, {"seed": seed + 1})
            polynomial = TeaCache.fit(
                backbone.model, sampler.timesteps(steps), lambda: sampler.make(steps, CacheSpec())
            )
        finally:
            sampler.config = config
        known = {"polynomial": polynomial, "seed": seed + 1}
        store.save(key, known)
    return known["polynomial"]


def run(backbones: list[Backbone], rows: list[Row], store: Store, repeats: int) -> list[dict]:
    """Measure what is not measured yet. One dict per row, in order."""
    by_name = {backbone.name: backbone for backbone in backbones}
    todo = [row for row in rows if store.result(row.key) is None]
    for row in tqdm(todo, desc="counting", unit="row"):
        result, samples = measure(by_name[row.backbone], row)
        store.save_samples(row.key, samples)
        store.save(row.key, result | {"seconds": [], "uncached_seconds": []})
    rounds = [
        (turn, row) for turn in range(repeats) for row in rows if len(store.result(row.key)["seconds"]) <= turn
    ]  # interleaved: a machine that slows down slows all rows
    first = {row.backbone: row for row in reversed(rows)}  # uncached
    uncached: dict[tuple[int, str], float] = {}  # measured in every turn, also if rows of this turn are added later
    for turn, row in tqdm(rounds, desc="timing", unit="run"):
        backbone, result = by_name[row.backbone], store.result(row.key)
        if row.backbone not in {name for _, name in uncached}:
            backbone.seconds(first[row.backbone])  # warm up
        if (turn, row.backbone) not in uncached:
            uncached[turn, row.backbone] = backbone.seconds(first[row.backbone])
        base = uncached[turn, row.backbone]
        result["uncached_seconds"].append(base)
        result["seconds"].append(base if row is first[row.backbone] else backbone.seconds(row))
        store.save(row.key, result)
    about = [{"backbone": row.backbone, "method": row.method, "name": row.name, "window": row.window} for row in rows]
    return [each | store.result(row.key) for each, row in zip(about, rows, strict=True)]


def judge(
    table: list[dict],
    rows: list[Row],
    store: Store,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    frechet: Callable[[Tensor], float] | None,
) -> None:
    """Add speed and fidelity to the rows, against the uncached one of their backbone.

    Args:
        lpips: distance of uint8 (N, 3, H, W) and (N, 3, H, W) -> (N,).
        frechet: distance of samples (N, ..., 3, H, W) to real ones.
    """
    base: dict[str, tuple[dict, Tensor]] = {}  # of every backbone
    for result, row in zip(tqdm(table, desc="judging", unit="row"), rows, strict=True):
        made, seconds = store.samples(row.key), result["seconds"]
        first, samples = base.setdefault(row.backbone, (result, made))
        middle = median(seconds)
        result |= {
            "seconds_per_sample": middle,
            "seconds_spread": (max(seconds) - min(seconds)) / middle if len(seconds) > 1 else None,
            "speedup": median(a / b for a, b in zip(result["uncached_seconds"], seconds, strict=True)),
            "flops_speedup": first["flops"] / result["flops"],
            **measure_fidelity(made, samples),
        }
        if lpips is not None:
            pairs = zip(*(part.flatten(0, -4).split(32) for part in (made, samples)), strict=True)
            device = process_state().device
            result["lpips"] = torch.cat([lpips(a.to(device), b.to(device)).cpu() for a, b in pairs]).mean().item()
        if frechet is not None:
            result["frechet"] = frechet(made)


def open_backbones(args: argparse.Namespace) -> list[Backbone]:
    """The model with skips, and the plain one if there are weights of it."""
    file = args.config or str(ROOT / f"configs/{args.task}/demo.yaml")
    task = find_task(file, args.task)
    window = task.window
    quick = []
    if args.quick:
        quick = ["steps=20", *(["num_samples=4", "batch_size=4"] if args.task.startswith("class") else [])]
    config = load_config(task.schema, file, quick + args.overrides)
    if args.quick and not args.task.startswith("class"):
        config = changed(config, {"prompts": config.prompts[:2]})
    if compile_mode(config.compile):
        raise UserError("baselines replace parts of the model, so it cannot be compiled: set compile=none")
    backbones = [Backbone("skip", task.open_sampler(config, window.branch), window)]
    plain = Path(args.plain or WEIGHTS / f"{args.task}-plain.pt")
    if args.plain and not plain.exists():
        raise FileNotFoundError(f"--plain {plain}: no such file or training run")
    if not plain.exists():
        print(f"no plain weights in {plain}: rows of the plain backbone are left out. Train some with skip=false")
        return backbones
    plain_config = load_config(task.schema, file, [*quick, *args.overrides, *task.plain])
    same = {"prompts": config.prompts} if hasattr(config, "prompts") else {}
    plain_config = changed(plain_config, {"weights": str(plain)} | same)
    backbones.append(Backbone("plain", task.open_sampler(plain_config, None), window))
    if backbones[1].model.n_skips:
        raise UserError(f"{plain} holds a model with long skips; --plain wants one without")
    return backbones


class Frechet:
    """Fréchet distance of samples to real ones, frame by frame."""

    def __init__(self, network: str, reference: str):
        self.network, self.real = load_image_script(network, process_state().device), open_samples(Path(reference))
        self._reference: dict[tuple[int, int], Tensor] = {}  # by size

    @torch.no_grad()
    def features(self, samples: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
        """Of every frame one, (M, D); real ones come to the size of the samples."""
        frames = (
            fitted(sample.reshape(-1, *sample.shape[-3:]), size)[:, None].to(process_state().device)
            for sample in samples
        )
        return torch.cat([self.network.features(some).cpu() for some in frames])

    def __call__(self, samples: Tensor) -> float:
        size = tuple(samples.shape[-2:])
        if size not in self._reference:
            real = (self.real[i] for i in tqdm(range(len(self.real)), desc="reference", unit="sample"))
            self._reference[size] = self.features(real, size)
        return frechet_distance(self.features(samples, size), self._reference[size])

    def protocol(self) -> dict[str, Any]:
        return {"network": self.network.protocol(), "reference": self.real.protocol()}


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--config", metavar="FILE", help="of the task's sampler [its demo.yaml]")
    parser.add_argument("--plain", metavar="PATH", help="weights or training run without skips [benchmarks/weights]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="[all]")
    parser.add_argument(
        "--also", action="append", default=[], metavar="SPEC", help="a plan FILE.json, drift, any cache; may come again"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="times to run each row [3; 1 with --quick]")
    parser.add_argument("--quick", action="store_true", help="few samples, 20 steps, one setting a method, one repeat")
    parser.add_argument("--full-size", action="store_true", help="also FLOPs of the full-size model, without weights")
    parser.add_argument("--lpips", metavar="FILE", help="torchvision's AlexNet: also LPIPS")
    parser.add_argument("--network", metavar="FILE", help="TorchScript, pictures to features: also Fréchet distance")
    parser.add_argument("--reference", metavar="FOLDER", help="real samples for it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    args = parser.parse_intermixed_args()
    benchmark(args)


def benchmark(args: argparse.Namespace) -> None:
    out, methods = Path(args.out), {METHODS[name] for name in args.methods}
    also = [parse_policy(spec) for spec in args.also]
    lpips, protocol = None, {}
    if args.lpips:
        from skipdit.metrics.perceptual import load_lpips

        lpips, protocol["lpips"] = load_lpips("alex", args.lpips, process_state().device)
    if bool(args.network) != bool(args.reference):
        raise UserError("--network and --reference go together")
    frechet = Frechet(args.network, args.reference) if args.network else None
    backbones = open_backbones(args)
    check_plans(also, backbones[0].sampler)
    config = backbones[0].sampler.config
    vae = fingerprint(backbones[0].sampler.vae)
    identity = {"task": args.task, "vae": vae, "threads": torch.get_num_threads()} | {
        f"{backbone.name} {key}": value
        for backbone in backbones
        for key, value in {
            "config": to_dict(backbone.sampler.config) | {"out": None, "weights": None},  # the fingerprint counts
            "weights": fingerprint(backbone.model),
            "dtype": str(backbone.model.dtype),
        }.items()
    }
    store, rows = Store(out, identity | versions()), []
    for backbone in backbones:
        polynomial = []
        if METHODS["teacache-fitted"] in methods:
            polynomial = fitted_polynomial(backbone, config.steps, store)
        timesteps, flops = backbone.sampler.timesteps(config.steps), backbones[0].sampler.flops
        found = rows_for(
            backbone.name, backbone.model, config.steps, timesteps, backbone.window, flops, polynomial, args.quick, also
        )
        rows += [row for row in found if row.method in methods | {UNCACHED} or row.spec in also]
    table = run(backbones, rows, store, args.repeats or (1 if args.quick else 3))
    judge(table, rows, store, lpips, frechet)
    samples = len(store.samples(rows[0].key))
    protocol |= {
        "samples": samples,
        "repeats": min(len(row["seconds"]) for row in table),
        "time": "seconds per sample of the first batch, decoded; of all batches for methods that decide at run time; "
        "medians, the spread is (max - min) / median; speedups are against an uncached run of the same turn",
        "flops": "per sample, of all model calls of a run, counted while it ran; two per multiply-add, with attention",
        "fidelity": f"mean over pictures or frames, uint8, against {UNCACHED}; identical ones count {IDENTICAL:g} dB; "
        "± is the standard error over samples; with a stochastic sampler, fewer steps make other samples",
        "frechet": frechet.protocol() if frechet else None,
        "settings": identity,
        "diffusers": diffusers.__version__,
    }
    record = {"rows": table, "protocol": protocol, **versions()}
    title = f"{args.task}: {samples} samples, {backbones[0].sampler.method} {config.steps} steps"
    if not math.isclose(config.guidance_scale, 1):
        title += f", guidance {config.guidance_scale:g}"
    text = f"{title}\n\n{markdown(table)}"
    plot(table, title, out / "compare.png")
    if args.full_size:
        kind, timesteps = type(backbones[0].model), backbones[0].sampler.timesteps(config.steps)
        record["full_size"] = full_size(kind, config.steps, timesteps, backbones[0].window, methods)
        text += f"\n### {kind.__name__}, full size, model calls of one run\n\n"
        text += f"{full_size_markdown(record['full_size'])}\n"
    replace_text(out / "compare.json", json.dumps(record, indent=2) + "\n")
    (out / "compare.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nplot: {out / 'compare.png'}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
