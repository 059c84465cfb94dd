"""The table at the end, and docs/gpu.md."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gpu.record import ROOT
from skipdit.cli import Parser
from skipdit.sampling.report import steps_column

NO_CARD = "# On a GPU: not measured yet"
DIT = "DiT-XL/2 256"
GIB = 2**30
Data = dict[str, Any]


class Aim(NamedTuple):
    """What is wanted of an H100 or H200, and what was measured; None if it was not."""

    text: str
    wanted: float
    measured: float | None
    at_most: bool
    where: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def main(arguments: list[str]) -> int:
    """The command `report`. Returns the exit code."""
    parser = Parser("python benchmarks/gpu report", description="make docs/gpu.md of results")
    parser.add_argument("folder", type=Path, help="folder with gpu.json, as bash scripts/gpu_check.sh made it")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/gpu.md", help="Markdown file [docs/gpu.md]")
    args = parser.parse_args(arguments)
    file = args.folder / "gpu.json"
    if not file.exists():
        print(f"error: no {file}; `bash scripts/gpu_check.sh` makes it", file=sys.stderr)
        return 2
    data = json.loads(file.read_text(encoding="utf-8"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(data), encoding="utf-8")
    if data["machine"]["device"] == "cuda":
        args.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out} is written")
    return 0


def page(data: Data) -> str:
    """docs/gpu.md. Without results of a GPU it says so, and how to get some."""
    guide = Path(__file__).with_name("guide.md").read_text(encoding="utf-8")
    if data["machine"]["device"] != "cuda":
        told = "Nothing here has been timed on a GPU. `bash scripts/gpu_check.sh` does it and makes this page."
        return f"{NO_CARD}\n\n{told}\n\n{guide}"
    parts = [
        f"# On a GPU: {data['machine']['card']}",
        _machine(data),
        *_section("Aims", _aims_table(data)),
        *_section("Tests", _tests(data)),
        *_section("Latency", _latency_table(data)),
        *_section("Baselines", _baseline_table(data)),
        *_section("End to end", _runs_table(data)),
        *_section("Training", _training_table(data)),
        *_section("Precision", _precision_table(data)),
        *_section("What failed", [f"- `{key}`: {error}" for key, error in failures(data).items()]),
        *_section("Left out", _left_out(data)),
        guide,
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def summary(data: Data, out: Path) -> str:
    """What is printed last."""
    lines = ["", _machine(data), "", *_tests(data), "", *_aims_table(data), "", *_best_table(data), ""]
    failed, left = failures(data), data["runs"][-1].get("left_out", [])
    lines += [f"failed: {key}: {error[:150]}" for key, error in failed.items()]
    if left:
        names = ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        lines.append(f"left out for lack of time: {names}")
    lines.append(f"results are in {out / 'gpu.json'}; type next:")
    if left:
        lines.append("  bash scripts/gpu_check.sh --missing      # the rows that were left out, into the same file")
    lines.append(f"  python benchmarks/gpu report {out} --out docs/gpu.md")
    return "\n".join(lines)


def results(data: Data, section: str) -> list[dict[str, Any]]:
    """Numbers of the rows of a section, also of those that are not right, in the order in which they were measured."""
    rows = [row for key, row in data["rows"].items() if key.startswith(f"{section}/")]
    return [row["result"] for row in rows if row.get("result")]


def failures(data: Data) -> dict[str, str]:
    """First lines of the errors of rows that failed, by name."""
    return {key: row["error"].splitlines()[0] for key, row in data["rows"].items() if row["status"] != "ok"}


def rate(data: Data, dtype: str) -> float | None:
    """The measured rate of matrix products in FLOP/s."""
    return next((each["flops_per_second"].get(dtype) for each in results(data, "probe")), None)


def share(data: Data, row: dict[str, Any], kind: str = "full") -> float | None:
    """A step's share of the matmul rate."""
    limit = rate(data, row["dtype"])
    return row["flops"][kind] / row["seconds"][kind] / limit if limit else None


def overhead(row: dict[str, Any], branch: int) -> float:
    """A cached step's share of the time over its share of the FLOPs."""
    kind, seconds, flops = str(branch), row["seconds"], row["flops"]
    return seconds[kind] / seconds["full"] / (flops[kind] / flops["full"])


def training_share(data: Data, row: dict[str, Any]) -> float | None:
    limit = rate(data, "bf16")
    return row["flops"] / row["seconds"] / limit if limit else None


def aims(data: Data) -> list[Aim]:
    """The aims, with what was measured in the fastest compiled mode, at the worst of all places."""
    steps = [row for row in results(data, "latency") if "branches" in row]
    best = _best(row for row in steps if row["dtype"] == "bf16" and row["mode"] != "eager")
    shares = [share(data, row) for (model, batch), row in best.items() if (model, batch) == (DIT, 64)]
    text = "full step of DiT-XL/2, batch 64, compiled: share of the matmul rate"
    listed = [Aim(text, 0.5, next(iter(shares), None), at_most=False)]
    gains = {
        (row["model"], row["batch"]): row["seconds"]["theirs"] / best[row["model"], row["batch"]]["seconds"]["full"]
        for row in results(data, "latency")
        if "baseline" in row and row["mode"] == "eager" and (row["model"], row["batch"]) in best
    }
    listed.append(_worst("full step, compiled: times faster than the eager baseline", 1.5, gains, at_most=False))
    cached = {key: overhead(row, row["branches"][0]) for key, row in best.items()}
    large = {key: value for key, value in cached.items() if key[1] >= 8}
    small = {key: value for key, value in cached.items() if key[1] < 8}
    listed.append(_worst("cached step from batch 8 on: time over FLOPs", 1.10, large, at_most=True))
    listed.append(_worst("cached step below batch 8: time over FLOPs", 1.3, small, at_most=True))
    trained = [row for row in results(data, "training") if "flops" in row and row["stage"] != "stage 1"]
    shares = {(f"{row['stage']}{_options(row)}", row["batch"]): training_share(data, row) for row in trained}
    top = max((key for key in shares if shares[key]), key=lambda key: shares[key], default=None)
    where = f"{top[0]}, batch {top[1]}" if top else ""
    listed.append(Aim("training: share of the matmul rate", 0.45, shares[top] if top else None, False, where))
    return listed


def _best(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Of each model and batch the row with the fastest cached step: that is what the mode is chosen for."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key, kind = (row["model"], row["batch"]), str(row["branches"][0])
        if key not in best or row["seconds"][kind] < best[key]["seconds"][kind]:
            best[key] = row
    return best


def _worst(text: str, wanted: float, values: dict[tuple[str, int], float], at_most: bool) -> Aim:
    """The aim at its worst place."""
    if not values:
        return Aim(text, wanted, None, at_most)
    key = (max if at_most else min)(values, key=lambda key: values[key])
    return Aim(text, wanted, values[key], at_most, f"{key[0]}, batch {key[1]}, the worst of {len(values)}")


def _options(row: dict[str, Any]) -> str:
    return " compiled" * row["compile"] + " checkpointed" * row["checkpointing"]


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _table(columns: tuple[str, ...], rows: list[tuple]) -> list[str]:
    if not rows:
        return []
    cells = [[str(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def _machine(data: Data) -> str:
    machine = data["machine"]
    about = [machine["card"], f"driver {machine.get('driver_version')}", f"CUDA {machine.get('cuda')}"]
    about = about if machine["device"] == "cuda" else [f"CPU {machine['card']}"]
    names = ("torch", "triton", "diffusers", "timm", "accelerate", "skipdit")
    about += [f"{name} {machine[name]}" for name in names if machine.get(name)]
    about += [
        f"Python {machine['python']}",
        *([f"commit {machine['code']}"] if machine["code"] else []),
        machine["date"],
    ]
    told = ", ".join(about) + "."
    for row in results(data, "probe"):
        rates = [f"{name} {value / 1e12:,.0f}" for name, value in row["flops_per_second"].items()]
        told += f" Products of {row['side']} x {row['side']} matrices in TFLOP/s: {', '.join(rates)};"
        told += f" a copy reads and writes {row['copy_bytes_per_second'] / 1e12:.2f} TB/s."
    return told + (" Tiny models: the numbers mean nothing." if machine["tiny"] else "")


def _aims_table(data: Data) -> list[str]:
    rows = []
    for aim in aims(data):
        wanted = f"{'at most' if aim.at_most else 'at least'} {aim.wanted:g}"
        measured = "not measured" if aim.measured is None else f"{aim.measured:.2f}"
        rows.append((aim.text, wanted, measured, {True: "yes", False: "no", None: ""}[aim.met], aim.where))
    return _table(("aim", "wanted", "measured", "met", "where"), rows)


def _tests(data: Data) -> list[str]:
    lines = []
    for row in results(data, "tests"):
        counts = ", ".join(f"{row[kind]} {kind}" for kind in ("passed", "failed", "errors", "skipped"))
        lines.append(f"`pytest -m cuda`: {counts}" + (", interrupted" if row["interrupted"] else "") + ".")
        lines += [f"- {name}: {(message.splitlines() or [''])[0][:200]}" for name, message in row["failures"].items()]
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / GIB:.1f}"


def _latency_row(data: Data, row: dict[str, Any]) -> tuple:
    branches = row["branches"]
    mark = [f" (b{branch})" if len(branches) > 1 else "" for branch in branches]
    cached = ", ".join(_ms(row["seconds"][str(b)]) + m for b, m in zip(branches, mark, strict=True))
    over = ", ".join(f"{overhead(row, b):.2f}{m}" for b, m in zip(branches, mark, strict=True))
    about = (row["model"], row["batch"], row["dtype"], row["mode"])
    return (*about, _ms(row["seconds"]["full"]), _percent(share(data, row)), cached, over, _gib(row["peak_bytes"]))


LATENCY = ("model", "batch", "dtype", "mode", "full ms", "of matmul rate", "cached ms", "time over FLOPs", "peak GiB")


def _latency_table(data: Data) -> list[str]:
    return _table(LATENCY, [_latency_row(data, row) for row in results(data, "latency") if "branches" in row])


def _best_table(data: Data) -> list[str]:
    rows = [row for row in results(data, "latency") if "branches" in row]
    best = _best(row for row in rows if row["dtype"] == "bf16")
    return _table(LATENCY, [_latency_row(data, row) for row in best.values()])


def _baseline_table(data: Data) -> list[str]:
    rows = []
    for row in (row for row in results(data, "latency") if "baseline" in row):
        theirs, ours = row["seconds"]["theirs"], row["seconds"]["ours"]
        about = (row["model"], row["batch"], row["dtype"], row["mode"], row["baseline"])
        rows.append((*about, _ms(theirs), _ms(ours), f"{theirs / ours:.2f}", f"{row['difference']:.1e}"))
    columns = ("model", "batch", "dtype", "mode", "baseline", "its ms", "ours ms", "times faster", "outputs differ by")
    return _table(columns, rows)


def _runs_table(data: Data) -> list[str]:
    measured = [(row, spec, run) for row in results(data, "end-to-end") for spec, run in row["runs"].items()]
    title, steps = steps_column([run for _, _, run in measured])
    rows = []
    for (row, spec, run), counts in zip(measured, steps, strict=True):
        about = (row["model"], row["batch"], row["dtype"], row["mode"], "uncached" if spec == "none" else spec)
        speedups = (f"{run['speedup']:.2f}", f"{run['flops_speedup']:.2f}", _gib(run["peak_bytes"]))
        rows.append((*about, counts, f"{run['seconds_per_sample']:.3g}", *speedups))
    columns = ("model", "batch", "dtype", "mode", "cache", title, "s / sample")
    return _table((*columns, "speedup", "in FLOPs", "peak GiB"), rows)


def _training_table(data: Data) -> list[str]:
    largest = {row["stage"]: row["batch"] for row in results(data, "training") if "tried" in row}
    rows = []
    for row in (row for row in results(data, "training") if "flops" in row):
        name = f"{row['stage']}{_options(row)}"
        speed = (f"{row['images_per_second']:.0f}", _ms(row["seconds"]), _percent(training_share(data, row)))
        rows.append((name, row["batch"], *speed, _gib(row["peak_bytes"]), largest.get(name) or ""))
    columns = ("stage", "batch", "images / s", "ms / step", "of matmul rate", "peak GiB", "largest batch")
    return _table(columns, rows)


def _precision_table(data: Data) -> list[str]:
    rows = []
    for row in results(data, "precision"):
        errors = [f"{row['errors'][name]:.1e}" for name in ("tf32", "bf16", "fp16")]
        largest = row["stream"]["fp32"]["largest"]
        rows.append((row["model"], *errors, "yes" if row["finite"]["fp16"] else "no", f"{largest:.3g}"))
    columns = ("model", "TF32", "bf16", "fp16", "fp16 finite", "largest number in the residual stream")
    return _table(columns, rows)


def _left_out(data: Data) -> list[str]:
    """Rows that the newest call had no time for, and that no other has measured."""
    return [f"- `{key}`" for key in data["runs"][-1].get("left_out", []) if key not in data["rows"]]
