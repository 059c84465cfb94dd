"""Check correctness, speed and memory of everything on one GPU, within a given time.

    bash scripts/gpu_check.sh                              # everything, most important first, in eight minutes
    bash scripts/gpu_check.sh --missing                    # what the last call had no time for
    bash scripts/gpu_check.sh --only latency training      # some of it anew
    bash scripts/gpu_check.sh --device cpu --tiny          # small models, to see that the program itself works
    python benchmarks/gpu report results/gpu --out docs/gpu.md

Results go to <out>/gpu.json as soon as they are there. The exit code is 0 if nothing failed, whatever was left out.
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the folder above, so that `gpu` is a package and its modules hide no others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import importlib.util
import logging
import warnings

import torch

if missing := [name for name in ("skipdit", "diffusers", "accelerate") if importlib.util.find_spec(name) is None]:
    sys.exit(f"error: {', '.join(missing)} cannot be imported; WHEELS=DIR brings packages as wheels: docs/gpu.md")

from gpu import report
from gpu.ahead import Ahead, compile_row
from gpu.bench import Bench
from gpu.plan import Clock, Plan, Row, end_if_stuck
from gpu.record import ROOT, Record, describe_machine
from gpu.rows import SECTIONS, all_rows
from skipdit.cli import Parser

WANTED = {  # packages, and what fails without them
    "timm": "DiT, Latte and Hunyuan-DiT",
    "omegaconf": "training",
    "tensorboard": "training",
    "transformers": "whole runs of the models of texts, and the tests",
    "sentencepiece": "the tests",
    "pytest": "the tests",
}
TESTS_SHARE = 0.27  # of the time, at most
AHEAD_SHARE = 0.25  # of the time until children have compiled, tests included


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    commands = {"report": report.main, "compile": compile_one}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    args = make_parser().parse_args(arguments)
    tell_missing()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; --device cpu --tiny tries the program out", file=sys.stderr)
        return 2
    return check(args)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser("gpu_check.sh", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--missing", action="store_true", help="only rows that have no result yet")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu", help="folder for gpu.json [results/gpu]")
    parser.add_argument("--minutes", type=float, default=8, help="time for everything [%(default)s]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument(
        "--ahead", type=int, metavar="N", help="processes that compile ahead [half the cores on CUDA, else 0]"
    )
    return parser


def tell_missing() -> None:
    """Say at once what will fail for lack of a package."""
    for name, what in WANTED.items():
        if importlib.util.find_spec(name) is None:
            print(f"warning: {name} is missing, without which {what} will fail", flush=True)


def check(args: argparse.Namespace) -> int:
    """Run the rows that were asked for, and print what came of them."""
    quiet()
    clock = Clock(args.minutes, float(os.environ["GPU_CHECK_BEGAN"]) if "GPU_CHECK_BEGAN" in os.environ else None)
    device = torch.device(args.device)
    bench = Bench(device, args.tiny)
    record = Record(args.out, describe_machine(device, args.tiny))
    print(f"{record.data['machine']['card']}, skipdit {record.data['machine']['skipdit']}", flush=True)
    rows = all_rows(args.tiny, clock.minutes * 60 * TESTS_SHARE)
    chosen = [row for row in rows if row.section in (args.only or SECTIONS)]
    limits = [row for row in rows if row.section == "probe"]
    if args.missing:
        limits, chosen = ([row for row in each if row.key not in record.good()] for each in (limits, chosen))
    again = os.environ.get("GPU_CHECK_RUN")
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    record.begin({"id": again or began, "began": began, "minutes": args.minutes, "sections": args.only or SECTIONS})

    plan = Plan(bench, record, clock)
    with end_if_stuck(clock, lambda: print(report.summary(record.data, args.out))):
        plan.run(limits)
        compile_ahead_and_test(args, plan, chosen)
        plan.run([row for row in chosen if row.section != "tests"])
        plan.end()
    print(report.summary(record.data, args.out))
    made = [row for row in record.data["rows"].values() if row["run"] == record.run["id"]]
    return int(any(row["status"] != "ok" for row in made))


def compile_ahead_and_test(args: argparse.Namespace, plan: Plan, chosen: list[Row]) -> None:
    """Run the tests, and compile for the rows after them meanwhile."""
    workers = args.ahead
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // 2 - 1) if args.device == "cuda" else 0
    if "GPU_CHECK_RUN" in os.environ:  # before the restart
        workers = 0
        plan.compiled |= set(plan.record.run.get("compiled_ahead", []))
    arguments = ["--device", args.device] + ["--tiny"] * args.tiny
    ahead = Ahead([row for row in chosen if row.compile is not None], workers, arguments)
    plan.run([row for row in chosen if row.section == "tests"])
    if workers:
        ahead.finish(max(AHEAD_SHARE * plan.clock.minutes * 60 - plan.clock.spent(), 5))
        plan.compiled |= ahead.done
        plan.record.run |= {"compiled_ahead": sorted(plan.compiled), "compiling_failed": ahead.failed}
        told = f"compiled ahead: {len(ahead.done)}" + (f", failed: {len(ahead.failed)}" if ahead.failed else "")
        print(f"{plan.clock.spent():5.0f} s  {told}", flush=True)


def compile_one(arguments: list[str]) -> int:
    """A child of `Ahead`: compile what one row needs."""
    parser = Parser()
    parser.add_argument("row")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    quiet()
    (row,) = (row for row in all_rows(args.tiny, 60) if row.key == args.row)
    compile_row(row, Bench(torch.device(args.device), args.tiny))
    return 0


def quiet() -> None:
    """Keep the output to what matters: rows, failures, and the table."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers", "accelerate", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
