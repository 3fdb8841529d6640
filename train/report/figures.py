"""The report's pictures, drawn by matplotlib without a display.

Shapes: N logged steps, M MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.metrics import DROP_CAUSES, LAYERS
from train.report.runs import Run

# Inches of a picture beside another; a wider one has a line of the page to itself.
WIDTH = 6.2
# What is shown is how much more it is than this.
_LEAST = {"moe/rounds": 1}
# A load of twice the even share or more has the last colour.
_FULL = 2.0
_CURVES = {
    "tokens_per_second": ("Throughput", "tokens per second"),
    "grad_norm": ("Gradient norm", "norm"),
    "moe/max_vio": ("Balance: MaxVio of the worst layer", "largest load over mean load, minus 1"),
    "eval/moe/max_vio": (
        "Balance in evaluation: MaxVio of the worst layer",
        "largest load over mean load, minus 1",
    ),
    "eval/moe/changed": (
        "First choices that changed since the last evaluation",
        "share of the watched tokens",
    ),
    "moe/router_entropy": ("Router entropy, mean of the layers", "nats"),
    "moe/dropped_fraction": ("Dropped choices", "share of all choices"),
    **{f"moe/{name}": (f"Dropped {cause}", "share of all choices") for name, cause in DROP_CAUSES.items()},
    "moe/padding": ("Padding: rows of the buffers that hold none", "share of all rows"),
    "moe/rounds": ("Further rounds of the exchange, most of any layer", "rounds beyond the first"),
    "moe/dead_experts": ("Dead experts", "experts without a token for long"),
}


def loss_curves(runs: Sequence[Run]) -> Figure:
    """Training loss of each run as a line, its evaluations as points of the same colour."""
    figure, axes = _figure("Loss", "nats per token")
    for number, run in enumerate(runs):
        colour = f"C{number}"
        axes.plot(*run.series("loss"), color=colour, alpha=0.6, linewidth=1.2, label=f"{run.name}: training")
        if run.evaluations:
            axes.plot(*run.losses(), "o-", color=colour, markersize=4, label=f"{run.name}: evaluation")
    axes.legend(fontsize=8)
    return figure


def curves(runs: Sequence[Run]) -> tuple[dict[str, Figure], list[str]]:
    """One picture per scalar that any run has, with a line per run; and the titles of those that are always zero."""
    figures, always_zero = {}, []
    for field, (title, unit) in _CURVES.items():
        drawn = [(number, run, *run.series(field)) for number, run in enumerate(runs)]
        least = _LEAST.get(field, 0)
        drawn = [(number, run, steps, values - least) for number, run, steps, values in drawn if len(steps)]
        if not drawn:
            continue
        if not any(values.any() for *_, values in drawn):
            always_zero.append(title)
            continue
        figure, axes = _figure(title, unit)
        for number, run, steps, values in drawn:
            line = "o-" if field.startswith("eval/") else "-"
            axes.plot(steps, values, line, color=f"C{number}", linewidth=1.2, markersize=4, label=run.name)
        axes.set_ylim(bottom=0)
        if len(runs) > 1:
            axes.legend(fontsize=8)
        figures[field.replace("/", "_")] = figure
    return figures, always_zero


def load_over_time(run: Run) -> Figure | None:
    """For each MoE layer: experts against steps, the colour their load; None where it was not logged."""
    steps_N, loads = run.load()
    if not loads:
        return None
    num_layers, most = len(loads), max(load_NE.shape[1] for load_NE in loads)
    rows = -(-num_layers // 2)
    figure = Figure(figsize=(2 * WIDTH, 0.7 + rows * (1.1 + min(most, 64) * 0.06)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, min(2, num_layers), squeeze=False).ravel()
    # The numbers of a step hold until the next logged one.
    edges = np.append(steps_N, steps_N[-1] + max(1, steps_N[-1] - steps_N[-2] if len(steps_N) > 1 else 1))
    for layer, axes in enumerate(grid):
        if layer >= num_layers:
            axes.axis("off")
            continue
        experts = np.arange(loads[layer].shape[1] + 1) - 0.5
        image = axes.pcolormesh(edges, experts, loads[layer].T, cmap="RdBu_r", vmin=0, vmax=_FULL)
        axes.set_title(f"MoE layer {layer}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("expert", fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.tick_params(labelsize=7)
    figure.suptitle("Load of the experts", fontsize=10)
    figure.colorbar(image, ax=grid.tolist(), label="load over even share", extend="max", shrink=0.8)
    return figure


def by_layer(run: Run, field: str, title: str, unit: str) -> Figure | None:
    """A number of each MoE layer over the steps; None where it was not logged."""
    steps_N, values_NM = run.series(LAYERS + field)
    if values_NM.ndim != 2:
        return None
    figure, axes = _figure(title, unit)
    for layer in range(values_NM.shape[1]):
        # From dark to light; the lightest tenth would be lost on white.
        shade = colormaps["viridis"](0.9 * layer / max(values_NM.shape[1] - 1, 1))
        axes.plot(steps_N, values_NM[:, layer], color=shade, linewidth=1.3, label=f"MoE layer {layer}")
    axes.set_ylim(bottom=0)
    if values_NM.shape[1] <= 12:
        axes.legend(fontsize=7, ncols=2)
    return figure


def coactivation(pairs_of_layers: Sequence[np.ndarray]) -> Figure:
    """How often two experts are chosen by the same token, as a multiple of what independence would give."""
    num_layers = len(pairs_of_layers)
    columns = min(4, num_layers)
    rows = -(-num_layers // columns)
    figure = Figure(figsize=(2.9 * columns + 1, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for layer, axes in enumerate(grid):
        if layer >= num_layers:
            axes.axis("off")
            continue
        image = axes.imshow(pairs_of_layers[layer], cmap="magma", vmin=0, vmax=2.5)
        axes.set_title(f"MoE layer {layer}", fontsize=9)
        axes.set_xlabel("expert", fontsize=8)
        axes.set_ylabel("expert", fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        axes.tick_params(labelsize=7)
    figure.suptitle("Experts chosen together", fontsize=10)
    figure.colorbar(image, ax=grid.tolist(), label="times what chance would give", extend="max", shrink=0.8)
    return figure


def _figure(title: str, unit: str):
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    return figure, axes
