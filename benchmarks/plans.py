"""Plans and everything else that their cost could buy, on noise that they were not fitted on.

    python benchmarks/plans.py --task class-to-image --out results/plans num_samples=16 batch_size=16
    python benchmarks/plans.py --task text-to-video --plan results/plan-8.json --seeds 0 1 --out results/some
    python benchmarks/plans.py --task class-to-image --name "plain twin" --plan benchmarks/plans/twin-10.json \\
        --out results/plans weights=benchmarks/weights/class-to-image-plain.pt model.skip=false

Every run is compared with the converged images of its noise, and with those of the uncached run. Beside each plan stand
fewer steps of its sampler, as many steps of the multistep solvers, Skip-Cache at a regular interval, TaylorSeer of
order 2, and evenly spaced full steps with fitted forecasts between them. Plans: the task's demo_plan.json and those in
benchmarks/plans, or --plan. Writes plans.md and plans.png of all results in --out, and every figure as soon as it is
measured: the same command again continues.
"""

import argparse
import json
import math
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from baselines import TaylorSeer
from store import Store
from tqdm import tqdm

from skipdit.caching.plans import CachePlan
from skipdit.caching.policies import CacheSpec
from skipdit.cli import Parser, friendly_errors
from skipdit.commands.plan import SEED
from skipdit.config import changed, load_config, to_dict
from skipdit.evaluation.compare import check_plans
from skipdit.layers.flops import flop_counter
from skipdit.layers.skip import SkipTransformer
from skipdit.planning.calibration import TARGETS, Bench
from skipdit.planning.controls import INTERVALS, controls
from skipdit.planning.schedules import even_full_steps, schedule
from skipdit.planning.tables import psnr_of
from skipdit.sampling.rows import Row
from skipdit.tasks import TASKS, find_task
from skipdit.utils.errors import UserError
from skipdit.utils.files import replace_text, whole_file
from skipdit.utils.provenance import fingerprint, versions

ROOT = Path(__file__).parents[1]
PLAN, EVEN = "plan", "evenly spaced forecasts, fitted"
STYLES = ("o-", "^-", "d:", "v-", "s-", "x-", "P-")
TITLES = {"converged": "dB to the converged images", "sampler": "dB to the uncached images"}


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Attributes:
        speedup: in FLOPs.
        baseline: that caches in place of the row's policy.
    """

    row: Row
    speedup: float
    baseline: TaylorSeer | None = None

    def key(self, seed: int) -> str:
        return f"seed {seed}, {self.row.steps} steps, {self.row.method}, {self.baseline or self.row.spec}"

    def errors(self, bench: Bench) -> dict[str, float]:
        """Per target, as `Bench.errors`."""
        if self.baseline is None:
            return bench.errors(*self.row[1:])
        with self.baseline.on(bench.model, bench.timesteps):
            return bench.errors_of(bench.sampler.images(self.row.steps, self.row.spec))


def extrapolated_share(model: SkipTransformer) -> float:
    """What a step that TaylorSeer extrapolates costs, in FLOPs of a full one; counted on the meta device."""
    with torch.device("meta"):
        model = type(model).from_config(model.config).to("meta").eval()
    inputs, flops = model.random_inputs(2), []
    with torch.no_grad(), TaylorSeer(2).on(model, range(2)):
        for _ in range(2):
            with flop_counter() as counter:
                model(**inputs)
            flops.append(counter.get_total_flops())
    return flops[1] / flops[0]


def taylor_seer(bench: Bench, cost: float) -> tuple[TaylorSeer, float]:
    """TaylorSeer at the interval that comes nearest to a cost in full steps, and its speedup."""
    share = extrapolated_share(bench.model)
    costs = {}
    for interval in INTERVALS:
        full = math.ceil(bench.steps / interval)
        costs[interval] = full + (bench.steps - full) * share
    nearest = min(INTERVALS, key=lambda interval: abs(costs[interval] - cost))
    return TaylorSeer(nearest, order=2), bench.steps / costs[nearest]


def evenly_spaced(bench: Bench, plan: CachePlan, store: Store) -> CachePlan:
    """Full steps at even distances, as many as come nearest to the cost of a plan, with fitted forecasts between them.

    They are fitted once, towards the target of the plan, on the samples of the bench with the seed of the plan's
    calibration.
    """
    full = max(1, round(bench.cost(plan)))
    seed = SEED if plan.calibration_seed is None else plan.calibration_seed
    file = store.folder / f"{full} of {bench.steps} steps even, seed {seed}, {plan.target}.json"
    if not file.exists():
        sampler, config = bench.sampler, bench.sampler.config
        sampler.config = changed(config, {"seed": seed})
        try:
            own = Bench(sampler, bench.steps, bench.branch, plan.target)
            own.calibrate()
            with whole_file(file) as partial:
                own.fit(schedule(bench.steps, even_full_steps(bench.steps, full), 0)).plan.save(partial)
        finally:
            sampler.config = config
    return CachePlan.load(file)


def runs_for(bench: Bench, plan: CachePlan, store: Store) -> list[Run]:
    """The plan, and what stands beside it."""
    cost, uncached = bench.cost(plan), bench.steps * bench.sampler.flops["full"]
    rows = [Row(PLAN, plan, bench.steps), *controls(bench, cost)]
    rows.insert(-1, Row(EVEN, evenly_spaced(bench, plan, store), bench.steps))
    runs = [Run(row, uncached / row.flops(bench.sampler)) for row in rows]
    baseline, speedup = taylor_seer(bench, cost)
    name = f"TaylorSeer N={baseline.interval}, {speedup:.2f}x"
    runs.insert(-2, Run(Row(name, CacheSpec(), bench.steps), speedup, baseline))
    return runs


def measure(bench: Bench, plans: list[CachePlan], seeds: list[int], store: Store) -> list[dict[str, Any]]:
    """PSNR of every plan and what stands beside it: a dict per plan, with a dict per row, seeds in order."""
    groups = [runs_for(bench, plan, store) for plan in plans]
    sampler = bench.sampler
    table = [
        {run.row.name: {"speedup": run.speedup, "psnr": {t: [] for t in TARGETS}} for run in runs} for runs in groups
    ]
    with tqdm(total=len(seeds) * sum(map(len, groups)), desc="measuring", unit="run") as progress:
        for seed in seeds:
            sampler.config = changed(sampler.config, {"seed": seed})
            calibrated = False
            for rows, runs in zip(table, groups, strict=True):
                for run in runs:
                    key = run.key(seed).replace("/", " of ")
                    if (known := store.result(key)) is None:
                        if not calibrated:
                            bench.calibrate()
                            calibrated = True
                        known = {k: psnr_of(e) for k, e in run.errors(bench).items()}
                        store.save(key, known)
                    for target, value in known.items():
                        rows[run.row.name]["psnr"][target].append(value)
                    progress.update()
    return table


def spread(values: list[float]) -> str:
    """Mean and deviation over seeds."""
    if not values or math.isinf(values[0]):
        return "" if not values else "identical"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown(name: str, table: list[dict[str, Any]]) -> str:
    """A line per run, those beside a plan after it."""
    lines = [f"| {name} | speedup in FLOPs | {' | '.join(TITLES.values())} |", "|---" * 4 + "|"]
    for rows in table:
        for row, result in rows.items():
            cells = [spread(result["psnr"][target]) for target in TITLES]
            lines.append(f"| {f'**{row}**' if row == PLAN else row} | {result['speedup']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curves(table: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one kind over the plans: the plan, and the best of the solvers and of whatever else is there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rows in table:
        fewer, *solvers = [name for name in rows if " steps, " in name and not name.endswith("uncached")]
        kinds = {PLAN: [PLAN], "the best solver": solvers, "fewer steps": [fewer]}
        for name in rows:
            if " N=" in name or name == EVEN:
                kinds.setdefault(name.partition(" N=")[0], []).append(name)
        for kind, names in kinds.items():
            psnrs = [rows[name]["psnr"] for name in names]
            best = max(range(len(names)), key=lambda n: mean(psnrs[n]["converged"] or psnrs[n]["sampler"]))
            found.setdefault(kind, []).append(rows[names[best]])
    return found


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Fidelity over speedup in FLOPs: a row of panels per table; bars are the deviation over seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(tables), 2, figsize=(9, 0.6 + 3.4 * len(tables)), squeeze=False, layout="constrained"
    )
    for line, (name, table) in zip(panels, tables.items(), strict=True):
        for panel, (target, title) in zip(line, TITLES.items(), strict=True):
            for (label, rows), style in zip(curves(table).items(), STYLES, strict=False):
                values = [row["psnr"][target] for row in rows]
                if not values[0]:  # a stochastic sampler has no converged images
                    continue
                bars = [stdev(each) if len(each) > 1 else 0 for each in values]
                speedups = [row["speedup"] for row in rows]
                panel.errorbar(speedups, list(map(mean, values)), bars, fmt=style, capsize=3, label=label)
            panel.set(title=name, xlabel="speedup in FLOPs", ylabel=title)
            panel.grid(alpha=0.3)
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--name", help="of the result, beside others in --out [the task]")
    parser.add_argument("--config", metavar="FILE", help="of the task's sampler [its demo.yaml]")
    parser.add_argument("--plan", action="append", metavar="FILE", help="one of this model and run; may come again")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    args = parser.parse_intermixed_args()
    benchmark(args)


def benchmark(args: argparse.Namespace) -> None:
    file = args.config or str(ROOT / f"configs/{args.task}/demo.yaml")
    own = [ROOT / f"configs/{args.task}/demo_plan.json", *(ROOT / "benchmarks/plans").glob(f"{args.task}-*.json")]
    plans = [CachePlan.load(plan) for plan in args.plan or own]
    if len(branches := {plan.branch for plan in plans}) != 1:
        raise UserError(f"plans of branches {sorted(branches)}: compare those of one branch at a time, with --plan")
    task = find_task(file, args.task)
    config = load_config(task.schema, file, args.overrides)
    sampler = task.open_sampler(config, plans[0].branch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*aims at the converged images")  # which are compared with here
        check_plans(plans, sampler, args.seeds)
    target = "converged" if sampler.refined(config.steps, 4) else "sampler"
    bench = Bench(sampler, config.steps, plans[0].branch, target)
    plans.sort(key=bench.cost)
    identity = {
        "config": to_dict(config) | {"out": None, "weights": None, "seed": None},
        "weights": fingerprint(sampler.model),
        "vae": fingerprint(sampler.vae),
        "threads": torch.get_num_threads(),
    }
    out, name = Path(args.out), args.name or args.task
    table = measure(bench, plans, args.seeds, Store(out / name, identity | versions()))
    record = {"name": name, "seeds": args.seeds, "plans": table, "settings": identity, **versions()}
    replace_text(out / f"{name}.json", json.dumps(record, indent=2) + "\n")
    records = [json.loads(file.read_bytes()) for file in sorted(out.glob("*.json"))]
    tables = {record["name"]: record["plans"] for record in records}
    text = "\n".join(markdown(name, rows) for name, rows in tables.items())
    replace_text(out / "plans.md", text)
    plot(tables, out / "plans.png")
    print(f"\n{text}\nplot: {out / 'plans.png'}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
