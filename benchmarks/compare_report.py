"""The table and the picture of compare.py."""

from pathlib import Path

import matplotlib
from rows import FEWER, METHODS, REUSE

from skipdit.metrics import FIDELITY_COLUMNS, fidelity_cells

COLOURS = (
    "black",
    "tab:blue",
    "tab:red",
    "magenta",
    "salmon",
    "tab:orange",
    "tab:green",
    "tab:purple",
    "tab:brown",
    "tab:pink",
)
COLOURS += ("tab:olive", "tab:cyan", "tab:gray", "gold")
MARKERS = "osDd8^vP*Xh<>p"
STYLES = {
    method: {"color": colour, "marker": marker, "linestyle": ":" if method == FEWER else "-"}
    | ({"linewidth": 2.5, "markersize": 8, "zorder": 3} if method.startswith(REUSE) else {"linewidth": 1})
    for method, colour, marker in zip(METHODS.values(), COLOURS, MARKERS, strict=True)
}


def markdown(table: list[dict]) -> str:
    """The rows of every backbone."""
    extra = {"lpips": "LPIPS", "frechet": "Fréchet"}
    extra = {key: title for key, title in extra.items() if key in table[0]}
    lines = []
    for backbone in dict.fromkeys(row["backbone"] for row in table):
        columns = ["", "full + partial steps", "GFLOP", "speedup in FLOPs", "s", "spread", "speedup", "cache kB"]
        columns += [*FIDELITY_COLUMNS, *extra.values()]
        lines += [f"### {backbone} backbone", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in table:
            if row["backbone"] != backbone:
                continue
            cells = [row["name"], f"{row['full_steps']:g} + {row['partial_steps']:g}", f"{row['flops'] / 1e9:.2f}"]
            spread = "" if row["seconds_spread"] is None else f"{row['seconds_spread']:.0%}"
            cells += [f"{row['flops_speedup']:.2f}", f"{row['seconds_per_sample']:.3f}", spread]
            cells += [f"{row['speedup']:.2f}", f"{row['cache_bytes'] / 1e3:.0f}", *fidelity_cells(row)]
            lines.append(f"| {' | '.join([*cells, *(f'{row[key]:.3f}' for key in extra)])} |")
        lines.append("")
    return "\n".join(lines)


def plot(table: list[dict], title: str, path: Path) -> None:
    """Fidelity against speedup in FLOPs: a panel per backbone, a line per method.

    Skip-Cache's lines are of the task's window; hollow markers are of the window of all steps.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    names = list(dict.fromkeys(row["backbone"] for row in table))
    figure, panels = plt.subplots(
        1, len(names), figsize=(3 + 6 * len(names), 5.5), sharey=True, squeeze=False, layout="constrained"
    )
    drawn = {}
    for panel, backbone in zip(panels[0], names, strict=True):
        for method, style in STYLES.items():
            mine = [row for row in table if (row["backbone"], row["method"]) == (backbone, method)]
            for number, window in enumerate(dict.fromkeys(row["window"] for row in mine)):  # the task's first
                points = [
                    (row["flops_speedup"], row["psnr"])
                    for row in mine
                    if row["window"] == window and not row["identical"]
                ]
                dashed = {"linestyle": "--", "fillstyle": "none"} if number else {}
                if points:
                    (line,) = panel.plot(*zip(*sorted(points), strict=True), label=method, **style | dashed)
                    drawn.setdefault(method, line)
        panel.set(title=f"{backbone} backbone", xlabel="speedup in FLOPs", xscale="log")
        panel.xaxis.set_major_locator(FixedLocator((1, 1.5, 2, 3, 4, 6, 8, 10)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR to the uncached run, dB")
    handles = [drawn[method] for method in STYLES if method in drawn]
    figure.legend(handles=handles, loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
