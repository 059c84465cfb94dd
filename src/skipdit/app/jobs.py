"""What the page runs: a request, as its widgets have it, to the samples of several caches from the same noise."""

import hashlib
import shlex
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec, parse_policy
from skipdit.caching.policy import CACHED, CachePolicy
from skipdit.config import load_config, to_yaml
from skipdit.evaluation.compare import check_plans, compare, rows_for
from skipdit.sampling.rows import Row
from skipdit.sampling.sampler import Sampler
from skipdit.tasks import Task, find_task
from skipdit.utils.errors import UserError
from skipdit.utils.files import write_png
from skipdit.utils.provenance import fingerprint
from skipdit.utils.shipped import find_config, found
from skipdit.utils.video import write_gif

CHOICES = ("reuse", "extrapolate", "plan", "fewer steps")  # caches that follow the budget; others are specs or files
MOST = 3  # caches of a comparison
INTERVALS = range(2, 16)


@dataclass(frozen=True)
class Request:
    """A comparison to make.

    Attributes:
        config: file of a sampler's settings.
        subject: the prompt, or the class id; None for an unconditional model.
        method: the sampler or scheduler.
        caches: of `CHOICES`, or specs or plans as `--cache` takes them.
        budget: the largest share of full steps that a chosen interval or plan may have.
        overrides: other settings, `key=value`.
        task: its name; None: that of the config's folder.
    """

    config: str
    subject: str | int | None
    steps: int
    method: str
    guidance_scale: float
    seed: int
    caches: Sequence[str] = CHOICES[:MOST]
    budget: float = 0.3
    overrides: Sequence[str] = ()
    task: str | None = None


@dataclass
class Result:
    """The sample of a row.

    Attributes:
        row: of the table of `compare`, with the kind of every step in `kinds`.
        file: what the sampler's command writes, and `suffix` of its name.
        shown: a PNG or GIF of it.
        difference: the same of the amplified distance from the uncached sample.
        command: the command line that writes `file`.
    """

    row: dict[str, Any]
    suffix: str
    file: bytes
    shown: bytes
    difference: bytes
    command: str


@dataclass
class Comparison:
    """Results, the uncached one first, the factor of their difference maps, and what there is to say of them."""

    results: list[Result]
    factor: int
    notes: list[str]


def field_settings(schema: type, request: Request) -> dict[str, Any]:
    """Return the settings that fields of the page stand for, and those that make it one sample."""
    names = {field.name for field in fields(schema)}
    found = {
        "classes": [] if request.subject is None else [request.subject],
        "sampler": request.method,
        "scheduler": request.method,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "seed": request.seed,
    }
    found |= dict.fromkeys(("num_samples", "images_per_prompt", "videos_per_prompt", "batch_size"), 1)
    return {name: value for name, value in found.items() if name in names}


def read_request(request: Request) -> tuple[Task, Any, list[str]]:
    """Return the task, the sampler's settings, and the overrides of the config that make them so.

    Raises UserError in words for what is no setting, and an empty prompt.
    """
    task = find_task(request.config, request.task)
    wanted = field_settings(task.schema, request)
    if empty := next((name for name in ("steps", "guidance_scale", "seed") if getattr(request, name) is None), None):
        raise UserError(f"{empty.replace('_', ' ')} is empty: write a number")
    for text in request.overrides:
        if (key := text.partition("=")[0].strip()) in {*wanted, "prompts", "prompt_file", "cache"}:
            raise UserError(f"{key} has a field of its own: leave it out of the other settings")
    base = load_config(task.schema, request.config, list(request.overrides))
    differing = [f"{key}={value}" for key, value in wanted.items() if getattr(base, key) != value]
    overrides = [*request.overrides, *differing]
    config = load_config(task.schema, request.config, overrides)
    if "classes" not in wanted:
        if not (request.subject or "").strip():
            raise UserError("the prompt is empty: write what to show")
        config = replace(config, prompts=[request.subject], prompt_file=None)
    elif request.subject is None and config.model.num_classes is not None:
        raise UserError("the class is empty: write its number")
    return task, config, overrides


def interval_within(budget: float, window: CacheSpec, timesteps: Sequence[float]) -> tuple[int, float]:
    """Return the smallest interval whose share of full steps is within a budget, else that of the least; the share."""
    shares = {n: sum(replace(window, interval=n).full_mask(timesteps)) / len(timesteps) for n in INTERVALS}
    within = [n for n in INTERVALS if shares[n] <= budget]
    interval = within[0] if within else min(INTERVALS, key=shares.__getitem__)
    return interval, shares[interval]


def plan_within(
    budget: float, files: Sequence[Path], branch: int, timesteps: Sequence[float], model: str
) -> tuple[CachePlan | None, str]:
    """Return the plan with the most full steps of those within a budget, else None, and why.

    Args:
        model: fingerprint of the weights, for which the plan has to be made.
    """
    plans = [plan for plan in map(CachePlan.load, files) if plan.about.get("model") == model]
    plans = [plan for plan in plans if list(plan.timesteps) == list(timesteps)]
    plans = [plan for plan in plans if plan.branch == branch or CACHED not in plan.kinds]
    within = [plan for plan in plans if plan.kinds.count("F") <= budget * len(timesteps)]
    if within:
        return max(within, key=lambda plan: plan.kinds.count("F")), ""
    if not plans:
        return None, f"No plan: none beside this config is for this model and these {len(timesteps)} steps."
    least = min(plan.kinds.count("F") for plan in plans) / len(timesteps)
    return None, f"No plan: the cheapest has {least:.0%} full steps, above the budget of {budget:.0%}."


def own_policies(caches: Sequence[str]) -> dict[str, CachePolicy]:
    """Return the policies that are not of `CHOICES`. Raises UserError for no cache, too many, or those unfit."""
    if not 1 <= len(caches) <= MOST:
        raise UserError(f"{len(caches)} caches are chosen; choose one to {MOST} to compare with the uncached run")
    policies = {text: parse_policy(found(text)) for text in caches if text not in CHOICES}
    if adaptive := [text for text, policy in policies.items() if policy.adaptive]:
        raise UserError(f"{adaptive[0]} decides while it runs, so that its cost is not known before: choose another")
    branch_of(policies)
    return policies


def rows_of(request: Request, task: Task, sampler: Sampler, policies: dict[str, CachePolicy]) -> tuple[list[Row], list]:
    """Return the uncached row and those of the request, and what there is to say of the choice."""
    steps, notes, plan = sampler.config.steps, [], None
    timesteps = sampler.timesteps(steps)
    window = replace(task.window, branch=branch_of(policies))
    interval, share = interval_within(request.budget, window, timesteps)
    if share > request.budget and set(request.caches) - {"plan", *policies}:
        notes.append(f"No interval stays within {request.budget:.0%} full steps: N={interval} has {share:.0%}.")
    if "plan" in request.caches:
        files = sorted(find_config(request.config).parent.glob("*plan*.json"))
        plan, why = plan_within(request.budget, files, window.branch, timesteps, fingerprint(sampler.model))
        notes += [why] * (not plan)
    also = policies | ({"plan": plan} if plan else {})
    uncached, *regular = rows_for(steps, [interval], window, sampler, list(also.values()))
    named = dict(zip(["reuse", "extrapolate", "fewer steps", *also], regular, strict=True))
    return [uncached, *(named[name] for name in request.caches if name in named)], notes


def branch_of(policies: dict[str, CachePolicy]) -> int:
    """Return the branch that policies share; 1 if no step of theirs is cached. Raises UserError if they share none."""
    branches = {policy.branch for policy in policies.values() if policy.caches and policy.branch}
    if len(branches) > 1:
        raise UserError(f"caches have the branches {' and '.join(map(str, sorted(branches)))}: compare one of them")
    return next(iter(branches), 1)


def command_line(request: Request, task: Task, overrides: Sequence[str], row: Row) -> str:
    """Return the command that makes the sample of a row, in a folder of its own."""
    spec = row.spec.source if isinstance(row.spec, CachePlan) else str(row.spec)
    words = ["skipdit", "sample", "--config", request.config, *(["--task", request.task] if request.task else [])]
    words += ["--cache", spec]
    words += ["--prompt", str(request.subject)] if "classes" not in field_settings(task.schema, request) else []
    words += [text for text in overrides if not text.startswith(("steps=", "out="))] + [f"steps={row.steps}"]
    digest = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
    return shlex.join([*words, f"out=samples/app-{digest}"])


def amplified(samples: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return the distances of samples, uint8, from the first, times a factor that makes the largest of them visible.

    The brightest hundredth of a map may be cut at 255: a few pixels that move do not darken the others.
    """
    distances = [(sample.int() - samples[0].int()).abs() for sample in samples]
    largest = max(int(np.percentile(distance.numpy(), 99)) for distance in distances)
    factor = 255 // max(1, largest)
    return [(distance * factor).clamp(max=255).to(torch.uint8) for distance in distances], factor


def image_bytes(pixels: Tensor, folder: Path, fps: float | None) -> bytes:
    """Return a PNG of pixels uint8 (..., 3, H, W), or with a frame rate a GIF that repeats for ever."""
    file = folder / "shown"
    if fps is None:
        write_png(pixels.flatten(0, -4)[0] if pixels.ndim > 3 else pixels, file)
    else:
        write_gif(file, pixels, fps)
    return file.read_bytes()


class Studio:
    """The models of a page, at most one per config, which run one request after the other."""

    def __init__(self) -> None:
        self._samplers: dict[str, tuple[str, Sampler]] = {}
        self._lock = threading.Lock()

    def run(self, request: Request) -> Comparison:
        """Make a comparison. Raises UserError or OSError in words for a request that cannot be met."""
        task, config, overrides = read_request(request)
        policies = own_policies(request.caches)
        with self._lock, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sampler = self._open(request.config, task, config, branch_of(policies))
            rows, notes = rows_of(request, task, sampler, policies)
            check_plans([row.spec for row in rows if isinstance(row.spec, CachePlan)], sampler)
            if len(rows) == 1:
                raise UserError(" ".join(notes))
            table, samples = compare(sampler, rows, 1)
            commands = [command_line(request, task, overrides, row) for row in rows]
            for row, line in zip(rows, table, strict=True):
                cache = row.cache(sampler)
                line["kinds"] = [cache.kind(i) for i in range(len(cache.plan))]
            results, factor = _results(sampler, table, [made[0] for made in samples], commands)
        own = [str(warning.message) for warning in told if _is_own(warning)]
        return Comparison(results, factor, list(dict.fromkeys(notes + own)))

    def _open(self, file: str, task: Task, config: Any, branch: int) -> Sampler:
        """Return the config's sampler; the one that is there if nothing changed but what a run alone reads."""
        key = to_yaml(replace(config, seed=0, steps=1)) + str(branch)
        if self._samplers.get(file, ("",))[0] != key:
            self._samplers.pop(file, None)  # its memory is free before the next one loads
            self._samplers[file] = key, task.open_sampler(config, branch)
        sampler = self._samplers[file][1]
        sampler.config = config
        return sampler


def _is_own(warning: warnings.WarningMessage) -> bool:
    """Whether it is meant for the user and of this package, not of one beside it or below the folder of a clone."""
    return warning.category is UserWarning and "skipdit" in warning.filename.rpartition("site-packages")[2]


def _results(sampler: Sampler, table: list[dict], samples: list[Tensor], commands: list[str]) -> tuple[list, int]:
    maps, factor = amplified(samples)
    fps, results = None if sampler.suffix == "png" else sampler.config.fps, []
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name, f"sample.{sampler.suffix}")
        for row, pixels, distance, command in zip(table, samples, maps, commands, strict=True):
            sampler.write(file, pixels)
            shown = (image_bytes(part, folder, fps) for part in (pixels, distance))
            results.append(Result(row, sampler.suffix, file.read_bytes(), *shown, command))
    return results, factor
