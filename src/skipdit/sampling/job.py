"""A resumable list of samples, made batch by batch."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from skipdit.caching.policies import parse_policy
from skipdit.caching.policy import NAMES, CachePolicy
from skipdit.caching.runtime import SkipCache
from skipdit.checkpoints.download import is_hub_name
from skipdit.checkpoints.files import holds_weights
from skipdit.config import flatten, identity_of, in_the_project, to_dict
from skipdit.encoders.autoencoder import pixels
from skipdit.sampling.report import StepTimer, report, steps_in_words
from skipdit.sampling.sampler import Sampler
from skipdit.utils.device import process_state
from skipdit.utils.errors import UserError
from skipdit.utils.files import naming, replace_text, whole_file
from skipdit.utils.provenance import fingerprint
from skipdit.utils.shipped import WEIGHTS
from skipdit.utils.signals import telling
from skipdit.utils.text import counted, read_json

T = TypeVar("T")


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
        hints = hints or _how_to_get({key: path for key, path in files.items() if not found[key]}, fetch, absent)
        raise FileNotFoundError(f"missing: {', '.join(missing)}{hints}")


def _how_to_get(missing: dict[str, str], fetch: str, absent: Sequence[str]) -> str:
    """What to say of files that are missing: folders of trainings and data are not among the released ones."""
    folder = Path(missing.get("weights") or missing.get("init") or "a.pt")
    if not folder.suffix and folder.parts[:1] not in [(name,) for name in WEIGHTS]:
        return f"; {folder} has no checkpoint yet: run the training that writes it"
    if not absent and all(re.match(r"data\.|texts$|.*\.files$", key) for key in missing):
        return "; the head of the config has the commands that make it, or see docs/data.md"
    return f"; `{fetch}` fetches the released ones"


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
        before, now = read_json(path) if path.exists() else {}, json.loads(text)
        before.setdefault("suffix", suffix)  # jobs of older versions do not have it
        files = (file for file in self.folder.glob(f"*.{before['suffix']}") if not file.name.startswith("partial-"))
        begun = any(file.stem not in ("grid", "sheet", "compare") for file in files)  # without samples it is free
        if begun and path.exists():
            before, now = flatten(before), flatten(now)
            # Settings that are newer than the samples, and off, as they were then.
            newer = {k for k in now if k not in before and (now[k] is None or now[k] is False)}
            differ = [k for k in before | now if k not in newer and before.get(k) != now.get(k)]
            if differ:
                lines = [f"  {k}: {before.get(k)} there, {now.get(k)} now" for k in differ]
                raise UserError(
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


def run_job(sampler: Sampler) -> tuple[Job, dict]:
    """Make the samples of a config that are not there yet, and report.json.

    Returns:
        The job, all of whose samples exist then, and the report, of what all processes made now. If all of them
        existed before, the report is the one of then.
    """
    state, config, policy = process_state(), sampler.config, parse_policy(sampler.config.cache)
    job = _open_job(sampler, policy)
    cache_bytes, made, ran = 0, 0, Counter()
    timer, began, complete = StepTimer(state.device), time.perf_counter(), job.is_complete()
    state.wait_for_everyone()
    unit, pending = sampler.unit, job.pending()
    progress = tqdm(total=len(pending), desc=f"{unit}s", unit=unit, disable=complete or not state.is_main_process)

    def how_to_go_on() -> str:
        made = f"{job.made()} of {counted(job.total, unit)} are in {job.folder}"
        return f"stopped; {made}: the same command makes the others"

    with progress, telling(how_to_go_on):
        for indices in sampler.batches(pending):
            timer.start()
            latents, cache = sampler.latents(indices, config.steps, policy, lambda _, kind: timer.tick(kind))
            for index, sample in zip(indices, pixels(sampler.vae, latents), strict=True):
                job.save(index, partial(sampler.write, pixels=sample))
            made += len(indices)
            for kind, count in cache.counts().items():
                ran[kind] += len(indices) * count
            cache_bytes = max(cache_bytes, cache.peak_bytes)
            progress.update(len(indices))
    seconds = time.perf_counter() - began
    state.wait_for_everyone()
    file = job.folder / "report.json"
    if complete and file.exists() and (before := read_json(file))["num_samples"] >= job.total:
        if state.is_main_process:
            print(f"all {counted(job.total, unit)} are there: see {job.folder / sampler.overview}")
        return job, before
    parts = gather_object([(made, ran)])
    of_all, ran_of_all = sum(count for count, _ in parts), sum((kinds for _, kinds in parts), Counter())
    idle = SkipCache(policy, sampler.timesteps(config.steps))
    known = dict.fromkeys(NAMES.values()) if policy.adaptive else idle.counts()
    steps = {kind: ran_of_all[kind] / of_all for kind in known} if of_all else known
    summary = report(
        idle,
        steps,
        timer.seconds(),
        sampler.flops,
        cache_bytes=cache_bytes,
        num_samples=job.total,
        seconds_per_sample=seconds / made if made else None,  # of those that this process made now
        processes=state.num_processes,
        seed=config.seed,
        config=to_dict(config) | sampler.record(),
    )
    if state.is_main_process:
        replace_text(file, json.dumps(summary, indent=2) + "\n")
        told = f"{counted(job.total, unit)} in {job.folder}, see {sampler.overview}"
        if steps["full"] is not None:
            told += f": {steps_in_words(steps)}"
            told += f", {summary['flops_speedup']:.2f}x fewer FLOPs"
        times = summary["seconds_per_step"].items()
        print(told + "".join(f", {kind} step {value * 1e3:.1f} ms" for kind, value in times if value))
    return job, summary


def _open_job(sampler: Sampler, policy: CachePolicy) -> Job:
    """The job of a sampler's config. Warns of a plan that was made for another run."""
    state, config, model = process_state(), sampler.config, sampler.model
    identity = identity_of(config) | sampler.identity()
    identity |= {"weights": fingerprint(model), "vae": fingerprint(sampler.vae)}
    identity |= {"dtype": str(model.dtype), "device": state.device.type}  # devices draw different noise from one seed
    policy.check(identity["weights"], sampler.method, config.guidance_scale)
    if policy.adaptive:  # samples of a call decide together
        identity["batch_size"] = config.batch_size
    identity["cache"] = str(policy)
    place = state.process_index, state.num_processes
    return Job(config.out, identity, sampler.total, sampler.suffix, *place, sampler.names)


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
        compute: `compute(steps, kind)` gives the values of several steps of one kind.
        kinds: of all steps; those of a kind are computed together, since cached ones need less.
        chunk: the most steps at once; bounds the memory.
    """

    def __init__(self, compute: Callable[[list[int], str], list[T]], kinds: Sequence[str], chunk: int):
        self._compute, self._kinds, self._chunk = compute, kinds, chunk
        self._ready: dict[tuple[int, str], T] = {}

    def at(self, i: int, kind: str) -> T:
        """The value of step i, asked for in ascending order."""
        if (i, kind) not in self._ready:
            alike = [j for j in range(i, len(self._kinds)) if self._kinds[j] == kind] if self._kinds[i] == kind else [i]
            steps = alike[: self._chunk]
            self._ready |= {(j, kind): value for j, value in zip(steps, self._compute(steps, kind), strict=True)}
        return self._ready.pop((i, kind))
