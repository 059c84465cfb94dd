"""The paper's analyses of a model: `skipdit analyze`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from skipdit.analysis import measure, plot
from skipdit.analysis.trace import record, spread_out
from skipdit.caching.policies import parse_policy
from skipdit.caching.policy import FORECAST, CachePolicy
from skipdit.cli import friendly_errors
from skipdit.config import changed, load_config, to_dict
from skipdit.layers.skip import SkipTransformer
from skipdit.sampling.sampler import Sampler
from skipdit.tasks import Task, read_settings
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text, whole_file
from skipdit.utils.provenance import versions

Numbers = dict[str, Any]


class Subject(NamedTuple):
    """A model to look at."""

    sampler: Sampler
    config: Any

    @property
    def model(self) -> SkipTransformer:
        return self.sampler.model

    @property
    def steps(self) -> int:
        return self.config.steps


def open_subjects(task: Task, args: argparse.Namespace) -> dict[str, Subject]:
    """The config's model and, if asked for, the plain one; by name."""
    branches = [parse_policy(spec).branch for spec in getattr(args, "spec", [])]
    branch = max([getattr(args, "branch", 1), *branches])
    runs = [args.overrides] + ([[*args.overrides, f"weights={args.plain}", *task.plain]] if args.plain else [])
    subjects = {}
    for overrides in runs:
        config = load_config(task.schema, args.config, overrides)
        config = changed(config, {"dtype": "float32" if config.dtype == "auto" else config.dtype, "compile": "none"})
        sampler = task.open_sampler(config, None)
        n_skips = sampler.model.n_skips
        if n_skips and branch > n_skips:
            raise UserError(f"branch {branch} is larger than the model's number of skips, {n_skips}")
        subjects["with skips" if n_skips else "plain"] = Subject(sampler, config)
    if len(subjects) < len(runs):
        raise UserError(f"{args.config} has a model without skips, and so is --plain: compare one of each kind")
    return subjects


def perturb(subject: Subject, args: argparse.Namespace) -> Numbers:
    axis = [args.radius * (2 * i / (args.points - 1) - 1) for i in range(args.points)]
    calls = spread_out(record(subject.sampler, subject.steps), args.timesteps)
    surfaces = measure.perturbation(subject.model, calls, axis, args.branch, args.seed)
    rims = {kind: measure.rim(surface).mean().item() for kind, surface in surfaces.items()}
    lists = {kind: surface.tolist() for kind, surface in surfaces.items()}
    return {"axis": axis, "timesteps": _timesteps(calls), "rim_mean": rims, **lists}


def similarity(subject: Subject, args: argparse.Namespace) -> Numbers:
    specs, found = [parse_policy(spec) for spec in args.spec], {}
    if subject.model.n_skips:
        runs = {str(spec): measure.similarity(subject.sampler, subject.steps, spec) for spec in specs}
        found["cached_runs"] = runs
    if args.plain:
        uncached = record(subject.sampler, subject.steps)
        found["foresight"] = measure.foresight(subject.model, uncached, specs)
    return found


def dynamics(subject: Subject, args: argparse.Namespace) -> Numbers:
    runs = record(subject.sampler, subject.steps)
    kinds = zip(("relative_l1", "relative_l2", "cosine"), measure.dynamics(subject.model, runs), strict=True)
    numbers = {kind: grid.tolist() for kind, grid in kinds}  # [layer][step]
    return {"timesteps": [call.timestep for call in runs[0]][1:], **numbers}


def jacobian(subject: Subject, args: argparse.Namespace) -> Numbers:
    calls = spread_out(record(subject.sampler, subject.steps), args.timesteps)
    limits = {"iterations": args.iterations, "tolerance": args.tolerance}
    return measure.jacobian(subject.model, calls, **limits)


ANALYSES: dict[str, Callable[[Subject, argparse.Namespace], Numbers]] = {
    "perturb": perturb,
    "similarity": similarity,
    "dynamics": dynamics,
    "jacobian": jacobian,
}


def _timesteps(calls: list) -> list[float]:
    return list(dict.fromkeys(call.timestep for call in calls))


def summary(analysis: str, models: dict[str, Numbers]) -> list[str]:
    """A line or more per model, for people."""
    lines = []
    for name, numbers in models.items():
        if analysis == "perturb":
            rims = numbers["rim_mean"]
            lines += [f"{name}: mean on the rim {rims['feature']:.4f} (feature), {rims['output']:.4f} (output)"]
        elif analysis == "dynamics":
            kinds = ("relative_l1", "relative_l2", "cosine")
            means = [f"{kind} {mean(map(mean, numbers[kind])):.4f}" for kind in kinds]
            lines += [f"{name}: mean from step to step {', '.join(means)}"]
        elif analysis == "jacobian":
            layers, through = mean(map(mean, numbers["layers"])), mean(numbers["end_to_end"])
            lines += [f"{name}: mean {layers:.3f} (a layer), {through:.3f} (end to end)"]
        for kind, specs in ((key, numbers.get(key, {})) for key in ("cached_runs", "foresight")):
            for spec, run in specs.items():
                values = [f"{part} {run[part]['mean_cosine']:.5f}" for part in ("feature", "output") if part in run]
                lines += [f"{name}, {kind.replace('_', ' ')}, {spec}: cosine {', '.join(values)}"]
    return lines


def beside_the_bound(models: dict[str, Numbers]) -> list[dict[str, Any]]:
    """The paper's bound at the layers that a skip feeds, and what was measured there; means over timesteps."""
    plain, skip = (
        [mean(values) for values in zip(*models[name]["layers"], strict=True)] for name in ("plain", "with skips")
    )
    rows = measure.bound(plain, models["with skips"]["n_skips"])
    return [row | {"measured": skip[row["layer"]]} for row in rows]


def against_the_bound(rows: list[dict[str, float]]) -> str:
    counts = {
        "g below 1, without which the bound lies above g": sum(row["g"] < 1 for row in rows),
        "measured below g": sum(row["measured"] < row["g"] for row in rows),
        "measured below the bound of every weight a": sum(
            row["measured"] <= min(row["g"], row["at_a_1"]) for row in rows
        ),
    }
    return f"of {len(rows)} layers fed by skips: " + "; ".join(f"{text}: {count}" for text, count in counts.items())


def check(analysis: str, args: argparse.Namespace) -> None:
    """Raises ValueError for settings that make no sense, before any model is loaded."""
    least = {"points": 3, "branch": 1, "timesteps": 1, "iterations": 1, "seed": 0}
    for name, value in least.items():
        if getattr(args, name, value) < value:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {value}")
    forecasts = [spec for spec in getattr(args, "spec", []) if _forecasts(parse_policy(spec))]
    if forecasts:
        raise UserError(f"--spec {forecasts[0]} has forecast steps, which see no feature: name a spec of cached steps")
    drifts = [spec for spec in getattr(args, "spec", []) if parse_policy(spec).adaptive]
    if drifts and args.plain:
        raise UserError(
            f"--spec {drifts[0]} decides in a cached run, which a plain backbone has not: leave out --plain"
        )
    if not getattr(args, "radius", 1) > 0:
        raise UserError(f"--radius is {args.radius}; it must be above 0")


def _forecasts(policy: CachePolicy) -> bool:
    return policy.caches and (not policy.branch or FORECAST in getattr(policy, "kinds", ""))


@friendly_errors("starts anew")
def main(args: argparse.Namespace) -> None:
    analysis = args.analysis
    check(analysis, args)
    task, _ = read_settings(args)
    subjects = open_subjects(task, args)
    if analysis == "similarity" and "with skips" not in subjects:
        raise UserError("similarity needs a model with skips: a plain one has no cached pass")
    models = {}
    for name, subject in subjects.items():
        sizes = {"n_skips": subject.model.n_skips}
        models[name] = ANALYSES[analysis](subject, args) | sizes
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del settings["analysis"]  # which has a place of its own
    found = {"analysis": analysis, "settings": settings, "models": models}
    found["configs"] = {name: to_dict(subject.config) for name, subject in subjects.items()}
    if analysis == "perturb":
        found["feature_layer"] = f"L-{args.branch}"
    if analysis == "jacobian" and len(models) == 2:
        found["bound"] = beside_the_bound(models)
    args.out.mkdir(parents=True, exist_ok=True)
    with whole_file(args.out / f"{analysis}.png", keep_suffix=True) as partial:
        plot.PLOTS[analysis](found).savefig(partial)
    replace_text(args.out / f"{analysis}.json", json.dumps(found | versions(), indent=2) + "\n")
    print("\n".join(summary(analysis, models)))
    if "bound" in found:
        print(against_the_bound(found["bound"]))
    print(f"{args.out / analysis}.png, and all numbers in .json")
