"""Draw the training losses of runs, one after the other where a run starts from another.

    python scripts/plot_losses.py --out losses.png results/emoji
    python scripts/plot_losses.py --steps 1400 --out visuals/fuse.png \\
        "start at zero=results/t2v-emoji-stage1,results/t2v-emoji-stage2" \\
        "drawn at random=results/t2v-emoji-stage1-replace,results/t2v-emoji-stage2-replace"

Dots are what stats.jsonl has, lines their running means; a dashed line is where the next run begins.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from skipdit.cli import Parser, friendly_errors


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN[,RUN...]", help="run folders, in order, and their name")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--smooth", type=int, default=5, metavar="N", help="points to average over [%(default)s]")
    parser.add_argument("--steps", type=int, metavar="N", help="show the first N steps of all together")
    args = parser.parse_args()
    draw(args)


def draw(args: argparse.Namespace) -> None:
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for color, text in enumerate(args.runs):
        name, _, folders = text.rpartition("=")
        steps, losses, begins = read([Path(folder) for folder in folders.split(",")], args.steps)
        around = [losses[max(0, i - args.smooth // 2) : i + args.smooth // 2 + 1] for i in range(len(losses))]
        means = [sum(part) / len(part) for part in around]
        axes.plot(steps, losses, ".", color=f"C{color}", alpha=0.25, markersize=3)
        axes.plot(steps, means, color=f"C{color}", label=name or folders)
        for begin in begins:
            axes.axvline(begin, color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(args.out)


def read(folders: list[Path], limit: int | None) -> tuple[list[int], list[float], list[int]]:
    """Steps counted over all runs, their losses, and the steps at which a run follows another."""
    steps, losses, begins = [], [], []
    for folder in folders:
        before = steps[-1] if steps else 0
        begins += [before] if before else []
        try:
            lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise FileNotFoundError(f"{folder} is no run of a trainer: {error}") from error
        rows = {
            before + line["step"]: line["loss"] for line in lines if line["loss"] is not None
        }  # resumed: the newest
        kept = {step: loss for step, loss in rows.items() if limit is None or step <= limit}
        steps += kept
        losses += kept.values()
    return steps, losses, begins


if __name__ == "__main__":
    main()
