"""What the samplers share: seeds per sample, a resumable work list, timing, and the run's report."""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import skipdit
from skipdit.cache import CachePlan, DriftSpec, Policy, SkipCache
from skipdit.config import in_the_project
from skipdit.data.stream import seed_of
from skipdit.device import process_state
from skipdit.download import is_hub_name
from skipdit.stopping import telling
from skipdit.weights import holds_weights
from skipdit.writing import naming, replace_text, whole_file

T = TypeVar("T")


def generators(seed: int, indices: list[int], device: torch.device | str) -> list[torch.Generator]:
    """One generator per sample, seeded by (seed, index): the noise of sample i is the same in any batch and process."""
    return [torch.Generator(device).manual_seed(seed_of(seed, index)) for index in indices]


def preflight(files: dict[str, str], fetch: str, absent: Sequence[str] = ()) -> None:
    """Check that everything a run needs is there, before anything is loaded.

    Args:
        files: setting name -> path; of the `vae` also a Hub name, which cannot be checked offline; as `weights` and
            `init` a folder has to hold some.
        fetch: the command that fetches what is missing.
        absent: what is known to be missing besides.

    Raises FileNotFoundError that lists every missing file.
    """
    found = {
        key: holds_weights(path) if key in ("weights", "init") else Path(path).exists() for key, path in files.items()
    }
    found["vae"] = found.get("vae") or is_hub_name(files.get("vae", ""))
    missing = [f"{key}={path}" for key, path in files.items() if not found[key]]
    missing += absent
    if missing:
        hints = "".join(in_the_project(path) for key, path in files.items() if not found[key])
        raise FileNotFoundError(f"missing: {', '.join(missing)}{hints or f'; `{fetch}` fetches the released ones'}")


def resolve_dtype(name: str, device: torch.device, released: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype that a setting names. Raises ValueError for an unknown name.

    Args:
        name: "auto" is bfloat16 on GPUs that have it, else float32.
        released: what a released model was published to run in, which "auto" is on any GPU then.
    """
    if name == "auto" and released is not None and device.type == "cuda":
        return released
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype is {name!r}; known: auto, {', '.join(known)}")
    return known[name]


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class Job:
    """A numbered list of samples to make, shared out over processes, that can be interrupted and continued.

    Sample i lives in `<folder>/<i>.<suffix>`, or under a name of its own. `job.json` holds what makes the samples what
    they are; a folder with another one is refused.

    Args:
        folder: created if absent.
        identity: settings that determine the samples.
        total: number of samples.
        suffix: of their files.
        names: without suffix, one per sample; None numbers them.

    Process r of `world` makes samples r, r + world, ...
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, Any],
        total: int,
        suffix: str = "png",
        rank: int = 0,
        world: int = 1,
        names: Sequence[str] | None = None,
    ):
        self.folder, self.total, self.suffix, self.rank, self.world = Path(folder), total, suffix, rank, world
        self._names = names
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "job.json"
        text = json.dumps(identity | {"suffix": suffix}, indent=2, sort_keys=True, default=str) + "\n"
        before, now = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}, json.loads(text)
        before.setdefault("suffix", suffix)  # jobs of older versions do not have it
        files = (file for file in self.folder.glob(f"*.{before['suffix']}") if not file.name.startswith("partial-"))
        begun = any(file.stem not in ("grid", "sheet", "compare") for file in files)  # without samples it is free
        if begun and path.exists():
            before, now = _dotted(before), _dotted(now)
            # Settings that are newer than the samples, and off, as they were then.
            newer = {k for k in now if k not in before and (now[k] is None or now[k] is False)}
            differ = [k for k in before | now if k not in newer and before.get(k) != now.get(k)]
            if differ:
                lines = [f"  {k}: {before.get(k)} there, {now.get(k)} now" for k in differ]
                raise ValueError(
                    f"{folder} holds samples made with other settings; use another folder:\n" + "\n".join(lines)
                )
        else:
            replace_text(path, text, f".{rank}")

    def path(self, index: int) -> Path:
        name = f"{index:06d}" if self._names is None else self._names[index]
        return self.folder / f"{name}.{self.suffix}"

    def own(self) -> range:
        """This process's samples."""
        return range(self.rank, self.total, self.world)

    def save(self, index: int, write: Callable[[Path], None]) -> None:
        """Write a sample under a temporary name, then give it its own: a file that exists is complete."""
        with whole_file(self.path(index), keep_suffix=True) as partial:  # encoders go by it
            write(partial)

    def pending(self) -> list[int]:
        """This process's samples that do not exist yet."""
        return [i for i in self.own() if not self.path(i).exists()]

    def made(self) -> int:
        """Samples that exist, of every process."""
        return sum(self.path(i).exists() for i in range(self.total))

    def is_complete(self) -> bool:
        """Whether all samples exist, of every process."""
        return all(self.path(i).exists() for i in range(self.total))

    def batches(self, size: int) -> Iterator[list[int]]:
        pending = self.pending()
        for start in range(0, len(pending), size):
            yield pending[start : start + size]


def cache_identity(
    policy: Policy, weights: str, sampler: str, guidance_scale: float, batch_size: int
) -> dict[str, Any]:
    """What of a caching policy determines the samples of a run. Warns of a plan for other runs.

    Args:
        weights: fingerprint of the model's.
    """
    if isinstance(policy, CachePlan):
        policy.check(weights, sampler, guidance_scale)
    together = {"batch_size": batch_size} if isinstance(policy, DriftSpec) else {}  # samples of a call decide together
    return {"cache": str(policy), **together}


def work_off(
    job: Job,
    batches: Iterable[list[int]],
    make: Callable[[list[int], "StepTimer"], tuple[Tensor, SkipCache]],
    save: Callable[[int, Tensor], None],
    *,
    idle: SkipCache,
    flops: dict[str, float],
    unit: str,
    **more: Any,
) -> dict:
    """Make the samples of a job that are not there yet, and report.json.

    Args:
        batches: this process's pending samples, batch by batch.
        make: `make(indices, timer)` gives the pixels of some samples, and the cache that their run had; it starts the
            timer, and ticks after every step.
        save: `save(index, pixels)` writes a sample.
        idle: a cache of the run's spec and timesteps, for the report.
        flops: of one full and one cached step, per sample.
        unit: what a sample is, for people.
        more: further entries of the report.

    Returns:
        The report, of what all processes made now. All samples exist then. If all of them existed before, it is the
        one of then.
    """
    state, cache_bytes, made, full = process_state(), 0, 0, 0
    timer, began, complete = StepTimer(state.device), time.perf_counter(), job.is_complete()
    state.wait_for_everyone()
    progress = tqdm(total=len(job.pending()), desc=f"{unit}s", unit=unit, disable=not state.is_main_process)

    def how_to_go_on() -> str:
        return f"stopped; {job.made()} of {job.total} {unit}s are in {job.folder}: the same command makes the others"

    with progress, telling(how_to_go_on):
        for indices in batches:
            samples, cache = make(indices, timer)
            for index, pixels in zip(indices, samples, strict=True):
                save(index, pixels)
            made, full = made + len(indices), full + len(indices) * cache.full_steps
            cache_bytes = max(cache_bytes, cache.peak_bytes)
            progress.update(len(indices))
    seconds = time.perf_counter() - began
    state.wait_for_everyone()
    file = job.folder / "report.json"
    if complete and file.exists() and (before := json.loads(file.read_bytes()))["num_samples"] >= job.total:
        return before
    of_all, full_of_all = map(sum, zip(*gather_object([(made, full)]), strict=True))
    known = None if isinstance(idle.spec, DriftSpec) else idle.full_steps
    full_steps = full_of_all / of_all if of_all else known
    summary = report(
        idle,
        full_steps,
        timer.seconds(),
        flops,
        cache_bytes=cache_bytes,
        num_samples=job.total,
        seconds_per_sample=seconds / made if made else None,  # of those that this process made now
        processes=state.num_processes,
        **more,
    )
    if state.is_main_process:
        replace_text(file, json.dumps(summary, indent=2) + "\n")
        told, steps = f"{job.total} {unit}s in {job.folder}", summary["steps"]
        if full_steps is not None:
            told += f": {steps['full']:g} full and {steps['cached']:g} cached steps"
            told += f", {summary['flops_speedup']:.2f}x fewer FLOPs"
        times = summary["seconds_per_step"].items()
        print(told + "".join(f", {kind} step {value * 1e3:.1f} ms" for kind, value in times if value))
    return summary


def require_finite(finite: list[torch.Tensor], timesteps: list[int], dtype: torch.dtype) -> None:
    """Check the flags that a run collected, one per step; the one place that waits for the device.

    Raises FloatingPointError that names the first step whose latents were not finite.
    """
    bad = (~torch.stack(finite)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"latents are not finite from step {bad[0]} (timestep {timesteps[bad[0]]}) on, in {dtype}; "
            "sample in bfloat16 or float32, or check the weights"
        )


class Ahead(Generic[T]):
    """What does not depend on the samples, computed for many steps of a run at once and handed out step by step.

    One large matrix product reads its weights once, where a small one per step would read them at every step.

    Args:
        compute: `compute(steps, full)` gives the values of several steps of one kind.
        plan: the run's plan; steps of a kind are computed together, since cached ones need less.
        chunk: the most steps at once; bounds the memory.
    """

    def __init__(self, compute: Callable[[list[int], bool], list[T]], plan: list[bool], chunk: int):
        self._compute, self._plan, self._chunk = compute, plan, chunk
        self._ready: dict[tuple[int, bool], T] = {}

    def at(self, i: int, full: bool) -> T:
        """The value of step i, asked for in ascending order."""
        if (i, full) not in self._ready:
            alike = [j for j in range(i, len(self._plan)) if self._plan[j] == full] if self._plan[i] == full else [i]
            steps = alike[: self._chunk]
            self._ready |= {(j, full): value for j, value in zip(steps, self._compute(steps, full), strict=True)}
        return self._ready.pop((i, full))


class StepTimer:
    """Seconds of every sampling step, split by kind, without a device sync until they are read.

    Pass `tick` as a sampler's callback, after `start`.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._marks.append(("start", self._now()))

    def tick(self, full: bool) -> None:
        self._marks.append(("full" if full else "cached", self._now()))

    def seconds(self) -> dict[str, list[float]]:
        """Durations by kind. The first step of a run is left out: it warms up kernels and compiles."""
        if self._cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {"full": [], "cached": []}
        for (before, begin), (kind, end) in zip(self._marks, self._marks[1:], strict=False):
            if kind != "start" and before != "start":
                times[kind].append(begin.elapsed_time(end) / 1e3 if self._cuda else end - begin)
        return times


def report(
    cache: SkipCache,
    full_steps: float | None,
    seconds: dict[str, list[float]],
    flops: dict[str, float],
    **more: Any,
) -> dict[str, Any]:
    """The common part of a sampler's report.json. Times are medians in seconds, FLOPs count two per multiply-add.

    Args:
        cache: of the runs.
        full_steps: their mean number; None where it is unknown.
    """
    median = {kind: float(torch.tensor(values).median()) if values else None for kind, values in seconds.items()}
    total, cached_steps, speedup = len(cache.plan), None, None
    if full_steps is not None:
        full_steps = int(full_steps) if full_steps == int(full_steps) else full_steps
        cached_steps = total - full_steps
        speedup = total * flops["full"] / (full_steps * flops["full"] + cached_steps * flops["cached"])
    return {
        "cache": str(cache.spec),
        "steps": {"full": full_steps, "cached": cached_steps},
        "seconds_per_step": median,
        "flops_per_step": flops,
        "flops_speedup": speedup,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        **versions(),
        **more,
    }


def versions() -> dict[str, Any]:
    """What a result depends on besides its settings."""
    return {
        "versions": {"skipdit": skipdit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "tf32": torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32,
    }


def add_cache_arguments(parser: argparse.ArgumentParser, window: str) -> None:
    """`--cache SPEC`, and the original commands' ways to say it.

    Args:
        window: the task's default spec, with `{}` for the interval.
    """
    parser.add_argument(
        "--cache",
        nargs="?",
        const="default",
        metavar="SPEC",
        help="N<interval>-<start>-<stop>[-b<branch>][-o<order>], a plan's FILE.json, D<threshold>[-m<most>][-b<branch>]"
        f"[-o<order>], or none; alone: {window.format(2)}",
    )
    parser.add_argument("--cache-step", "--deepcache", type=int, metavar="N", help=f"as --cache {window.format('<N>')}")


def cache_override(args: argparse.Namespace, window: str) -> list[str]:
    """What a command line says of the cache, as overrides of the setting `cache`; nothing leaves it to the config.

    Args:
        args: parsed arguments of `add_cache_arguments`.
        window: the same as there.
    """
    if args.cache and "=" in args.cache:  # `--cache key=value`: argparse gives the switch what follows it
        args.overrides.append(args.cache)
        args.cache = "default"
    if args.cache_step is not None:
        return [f"cache={window.format(args.cache_step)}"]
    if args.cache == "default":
        return [f"cache={window.format(2)}"]
    return [f"cache={args.cache}"] if args.cache else []


def original_model_name(name: str) -> tuple[str, int | None]:
    """The original `--model DiT-cache-N` -> (model name, cache interval or None)."""
    match = re.fullmatch(r"(.+)-cache-(\d+)", name)
    return (f"{match[1]}-skip", int(match[2])) if match else (name, None)
