"""Pictures of the analyses, drawn from nothing but their records. A record holds one entry per model in `models`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

Record = dict[str, Any]
_TIMESTEP = "timestep (sampling runs to the right)"


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of so many panels, each of so many inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width * columns + 0.9, height * rows + 0.3), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _grid(models: dict[str, Any], width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Axes (2, models) for two quantities; those of a single model lie beside each other."""
    figure, panels = _figure(*((2, len(models)) if len(models) > 1 else (1, 2)), width, height)
    return figure, panels.reshape(2, -1)


def perturb(record: Record) -> Figure:
    """Contours of two quantities, each on one colour scale for all models."""
    models = record["models"]
    figure, panels = _grid(models, 3.9, 3.4)
    titles = {"feature": f"input of layer {record['feature_layer']}", "output": "predicted noise"}
    for line, (kind, title) in zip(panels, titles.items(), strict=True):
        top = max(np.max(numbers[kind]) for numbers in models.values())
        levels = MaxNLocator(14).tick_values(0, top)
        for axes, (name, numbers) in zip(line, models.items(), strict=True):
            surface = np.array(numbers[kind])
            shades = axes.contourf(numbers["axis"], numbers["axis"], surface.T, levels, cmap="viridis")
            axes.contour(numbers["axis"], numbers["axis"], surface.T, levels, colors="white", linewidths=0.4)
            axes.set_title(f"{name}: {title}\nmean on the rim {numbers['rim_mean'][kind]:.3f}", fontsize=10)
            axes.set(xlabel=r"$\alpha$ (times a filter's norm)", ylabel=r"$\beta$ (times a filter's norm)")
            axes.set_aspect("equal")
            axes.locator_params(nbins=5)
        figure.colorbar(shades, ax=line, label="relative L2 change", ticks=levels[::2])
    return figure


def similarity(record: Record) -> Figure:
    """Feature and output of cached steps; beside a plain model, also what a cache would hand out to either."""
    foresight = {name: model["foresight"] for name, model in record["models"].items() if "foresight" in model}
    figure, panels = _figure(1 + bool(foresight), 2, 4.8, 3.2)
    cached = record["models"]["with skips"]["cached_runs"]
    for axes, kind, title in zip(panels[0], ("feature", "output"), ("cached feature", "predicted noise"), strict=True):
        _similarities(axes, cached, kind)
        axes.set_title(f"{title} against a full pass on the same input", fontsize=10)
    if foresight:
        panels[1, 1].sharey(panels[1, 0])
    for axes, (name, found) in zip(panels[1], foresight.items(), strict=True) if foresight else ():
        _similarities(axes, found, "feature")
        axes.set_title(f"{name}: what a cache would hand out, uncached run", fontsize=10)
    return figure


def _similarities(axes: Axes, runs: dict[str, Any], kind: str) -> None:
    """A line per cache over the cached steps, on a scale of nines. Caches that differ in their order only share a
    colour: extrapolation is drawn through, reuse is dashed. The shade is one standard deviation, towards the worse.
    """
    windows = list(dict.fromkeys(spec.removesuffix("-o1") for spec in runs))
    for spec, run in runs.items():
        keep = np.array(run["cached"])
        times, gap, spread = np.array([run["timesteps"], 1 - np.array(run[kind]["cosine"]), run[kind]["spread"]])[
            :, keep
        ]
        color, dashes = f"C{windows.index(spec.removesuffix('-o1'))}", "-" if spec.endswith("-o1") else "--"
        label = f"{spec}   {run[kind]['mean_cosine']:.5f}"
        axes.plot(times, gap, dashes, color=color, label=label, marker=".", markersize=4, linewidth=1)
        axes.fill_between(times, gap, gap + spread, color=color, alpha=0.1, linewidth=0)
    axes.set(xlabel=_TIMESTEP, ylabel="cosine similarity", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(lambda gap, _: f"{1 - gap:.7g}")
    axes.yaxis.set_inverted(True)
    axes.xaxis.set_inverted(True)
    axes.grid(alpha=0.3)
    axes.legend(title="cache, mean of cached steps", fontsize=8, title_fontsize=8)


def dynamics(record: Record) -> Figure:
    """Heat maps, layers by timesteps, of two quantities, each on one logarithmic colour scale for all models."""
    models = record["models"]
    figure, panels = _grid(models, 4.6, 2.9)
    kinds = {"relative_l2": "relative L2 change", "cosine": "1 - cosine similarity"}
    for line, (kind, label) in zip(panels, kinds.items(), strict=True):
        grids = {name: np.array(numbers[kind]) for name, numbers in models.items()}
        if kind == "cosine":
            grids = {name: np.maximum(1 - grid, 1e-9) for name, grid in grids.items()}
        scale = LogNorm(min(grid.min() for grid in grids.values()), max(grid.max() for grid in grids.values()))
        for axes, (name, grid) in zip(line, grids.items(), strict=True):
            times, layers = models[name]["timesteps"], np.arange(len(grid))
            shades = axes.pcolormesh(times, layers, grid, norm=scale, cmap="magma", shading="nearest")
            axes.set_title(f"{name}: mean {grid.mean():.4f}", fontsize=10)
            axes.set(xlabel=_TIMESTEP, ylabel="layer")
            axes.xaxis.set_inverted(True)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(shades, ax=line, label=f"{label},\nstep to step")
    return figure


def jacobian(record: Record) -> Figure:
    """Largest singular values: per layer, mean and range over timesteps; and from latents to noise, per timestep."""
    figure, (panels,) = _figure(1, 2, 4.8, 3.9)
    layers, through = panels
    for axes in panels:
        axes.set_yscale("log")
    for number, (name, numbers) in enumerate(record["models"].items()):
        grid, color = np.array(numbers["layers"]), f"C{number}"
        depth, n_skips = np.arange(grid.shape[1]), numbers["n_skips"]
        layers.plot(depth, grid.mean(0), color=color, marker=".", label=f"{name}, mean {grid.mean():.2f}")
        layers.fill_between(depth, grid.min(0), grid.max(0), color=color, alpha=0.15, linewidth=0)
        if n_skips:
            both = np.array(numbers["layers_with_skip_input"]).mean(0)
            label = f"{name}, by both of its inputs"
            layers.plot(depth[-n_skips:], both[-n_skips:], color=color, linestyle=":", label=label)
            layers.axvline(depth[-n_skips] - 0.5, color="grey", linewidth=0.8)
            layers.text(depth[-n_skips] - 0.4, 0.02, "fed by skips", fontsize=8, transform=layers.get_xaxis_transform())
        label = f"{name}, mean {np.mean(numbers['end_to_end']):.2f}"
        through.plot(numbers["timesteps"], numbers["end_to_end"], color=color, marker=".", label=label)
    layers.set_ylim(layers.get_ylim())  # of what was measured: the bound may lie far outside
    if "bound" in record:
        places, ends = [row["layer"] for row in record["bound"]], [[row["g"], row["at_a_1"]] for row in record["bound"]]
        label = "the paper's bound, of any weight a"
        layers.fill_between(places, np.min(ends, 1), np.max(ends, 1), color="grey", alpha=0.2, linewidth=0, label=label)
    layers.set(
        xlabel="layer", ylabel=r"$\sigma_{\max}$ of the layer's Jacobian", title="layer by layer, over timesteps"
    )
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    through.set(xlabel=_TIMESTEP, ylabel=r"$\sigma_{\max}$, latents to predicted noise", title="end to end")
    through.xaxis.set_inverted(True)
    for axes in panels:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return figure


PLOTS: dict[str, Callable[[Record], Figure]] = {
    "perturb": perturb,
    "similarity": similarity,
    "dynamics": dynamics,
    "jacobian": jacobian,
}
