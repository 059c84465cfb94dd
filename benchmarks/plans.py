"""Plans and the other ways to spend the same FLOPs, over numbers of full steps: fidelity on several noises.

    python benchmarks/plans.py --task class-to-image --out results/plans num_samples=20 batch_size=10
    python benchmarks/plans.py --task text-to-video --plan results/plan-8.json --seeds 0 1 --out results/some

Plans: the task's demo_plan.json and those in benchmarks/plans, or --plan. Beside each, with as many full steps at even
distances, forecast and reuse, and uncached runs with fewer steps. What a plan was calibrated on should not be among the
samples. Writes plans.md and plans.png of all tasks in --out, and every figure as soon as it is measured: the same
command again continues.
"""

import argparse
import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from compare import ROOT, TASKS, Store
from torch import Tensor
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import FULL, CacheSpec
from skipdit.cli import friendly_errors
from skipdit.config import load_config, to_dict
from skipdit.evaluation.compare import Row, check_plans
from skipdit.layers.flops import uncached_steps
from skipdit.metrics import sample_psnr
from skipdit.planning.schedules import forecast, uniform
from skipdit.sampling.sampler import Sampler
from skipdit.tasks import find_task
from skipdit.utils.files import replace_text
from skipdit.utils.provenance import fingerprint, versions

PLAN, FORECAST, REUSE, FEWER = "plan", "even, forecast", "even, reuse", "fewer steps"
STYLES = {PLAN: "o-", FORECAST: "s-", REUSE: "v-", FEWER: "d:"}


def rows_beside(plan: CachePlan, sampler: Sampler) -> list[Row]:
    """A plan, and what costs the same: of uncached runs that whose FLOPs come nearest."""
    steps, full = len(plan.timesteps), plan.kinds.count(FULL)
    even = [replace(plan, weights=forecast(steps, uniform(steps, full), order)) for order in (1, 0)]
    rows = [Row(name, policy, steps) for name, policy in zip((PLAN, FORECAST, REUSE), (plan, *even), strict=True)]
    return [*rows, Row(FEWER, CacheSpec(), uncached_steps(rows[0].flops(sampler), sampler.flops))]


def measure(sampler: Sampler, plans: list[CachePlan], seeds: list[int], store: Store) -> list[dict[str, Any]]:
    """PSNR to the uncached run of every plan and what stands beside it: one dict per plan, seeds in order."""
    groups = [rows_beside(plan, sampler) for plan in plans]
    uncached = sampler.config.steps * sampler.flops["full"]
    table = [
        {
            "full_steps": plan.kinds.count(FULL),
            "uncached_steps": rows[-1].steps,
            "speedup": {row.name: uncached / row.flops(sampler) for row in rows},
            "psnr": {row.name: [] for row in rows},
        }
        for plan, rows in zip(plans, groups, strict=True)
    ]
    work = [(result["psnr"][row.name], row) for result, rows in zip(table, groups, strict=True) for row in rows]
    with tqdm(total=len(work) * len(seeds), desc="measuring", unit="run") as progress:
        for seed in seeds:
            sampler.config.seed = seed
            reference: Tensor | None = None
            for found, row in work:
                key = f"seed {seed}, {row.steps} steps, {row.spec}".replace("/", " of ")
                if (known := store.result(key)) is None:
                    if reference is None:
                        reference = sampler.make(sampler.config.steps, CacheSpec())
                    made = sampler.make(row.steps, row.spec)
                    each = sample_psnr(made, reference).tolist()
                    known = {"psnr": mean(each), "samples": each}
                    store.save(key, known)
                found.append(known["psnr"])
                progress.update()
    return table


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown(task: str, table: list[dict[str, Any]]) -> str:
    """A line per plan: mean and deviation over seeds, and how far it is ahead in the same noise."""
    columns = ["full steps", "speedup in FLOPs", PLAN, FORECAST, REUSE, FEWER]
    columns += ["plan over forecast", "plan over fewer steps"]
    lines = [f"| {task}, PSNR dB | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for result in table:
        psnr = result["psnr"]
        leads = [[a - b for a, b in zip(psnr[PLAN], psnr[name], strict=True)] for name in (FORECAST, FEWER)]
        cells = [str(result["full_steps"]), f"{result['speedup'][PLAN]:.2f}", *map(spread, psnr.values())]
        cells[-1] += f" ({result['uncached_steps']} steps)"
        lines.append(f"| | {' | '.join([*cells, *map(spread, leads)])} |")
    return "\n".join(lines) + "\n"


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Fidelity over speedup in FLOPs: a panel per task, bars are the deviation over seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(2, len(tables))
    down = math.ceil(len(tables) / across)
    figure, panels = plt.subplots(
        down, across, figsize=(4.5 * across, 0.6 + 3.4 * down), squeeze=False, layout="constrained"
    )
    for panel, (task, table) in zip(panels.flat, tables.items(), strict=False):
        for name, style in STYLES.items():
            values = [result["psnr"][name] for result in table]
            bars = [stdev(each) if len(each) > 1 else 0 for each in values]
            speedups = [result["speedup"][name] for result in table]
            panel.errorbar(speedups, list(map(mean, values)), bars, fmt=style, capsize=3, label=name)
        panel.set(title=task, xlabel="speedup in FLOPs", ylabel="PSNR to the uncached run, dB")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(tables) :]:
        panel.axis("off")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--config", metavar="FILE", help="of the task's sampler [its demo.yaml]")
    parser.add_argument("--plan", action="append", metavar="FILE", help="one of this model and run; may come again")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    args = parser.parse_intermixed_args()
    with friendly_errors():
        benchmark(args)


def benchmark(args: argparse.Namespace) -> None:
    file = args.config or str(ROOT / f"configs/{args.task}/demo.yaml")
    own = [ROOT / f"configs/{args.task}/demo_plan.json", *(ROOT / "benchmarks/plans").glob(f"{args.task}-*.json")]
    plans = sorted(map(CachePlan.load, args.plan or own), key=lambda plan: plan.kinds.count(FULL))
    if len(branches := {plan.branch for plan in plans}) != 1:
        raise ValueError(f"plans of branches {sorted(branches)}: compare those of one branch at a time, with --plan")
    task = find_task(file, args.task)
    config = load_config(task.schema, file, args.overrides)
    sampler = task.open_sampler(config, plans[0].branch)
    check_plans(plans, sampler, args.seeds)
    identity = {
        "config": to_dict(config) | {"out": None, "weights": None, "seed": None},
        "weights": fingerprint(sampler.model),
        "vae": fingerprint(sampler.vae),
        "threads": torch.get_num_threads(),
    }
    out = Path(args.out)
    table = measure(sampler, plans, args.seeds, Store(out / args.task, identity | versions()))
    record = {"seeds": args.seeds, "plans": table, "settings": identity, **versions()}
    replace_text(out / f"{args.task}.json", json.dumps(record, indent=2) + "\n")
    files = {name: out / f"{name}.json" for name in TASKS}
    tables = {name: json.loads(file.read_bytes())["plans"] for name, file in files.items() if file.exists()}
    text = "\n".join(markdown(name, rows) for name, rows in tables.items())
    replace_text(out / "plans.md", text)
    plot(tables, out / "plans.png")
    print(f"\n{text}\nplot: {out / 'plans.png'}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
