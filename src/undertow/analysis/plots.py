"""Plots, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def curves(
    models: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    path: Path,
    x: str = "flops",
    y: str = "bits_per_byte",
    labels: tuple[str, str] = ("training FLOPs", "validation bits per byte"),
    title: str = "",
) -> None:
    """Draw one line a run, runs of one model in one colour, and write a PNG.

    Args:
        models: name -> runs (seeds) -> points, each a mapping with the keys `x` and `y`.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, runs) in enumerate(models.items()):
        for seed, points in enumerate(runs):
            axes.plot(
                [point[x] for point in points],
                [point[y] for point in points],
                marker="o",
                markersize=3,
                linewidth=1.4,
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                label=name if seed == 0 else None,
            )
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def scaling(
    models: Mapping[str, Sequence[Mapping]], path: Path, axes: Mapping[str, str], y: str, title: str = ""
) -> None:
    """Draw one curve a model against each of `axes` (key of a point: its label), a panel each, and write a PNG.

    Args:
        models: name -> points with the keys of `axes`, `mean` and `deviation` (None: no error bar).
        y: label of the means.
    """
    figure = Figure(figsize=(5.5 * len(axes), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, (key, label) in zip(panels, axes.items(), strict=True):
        for number, (name, points) in enumerate(models.items()):
            panel.errorbar(
                [point[key] for point in points],
                [point["mean"] for point in points],
                yerr=[math.nan if point["deviation"] is None else point["deviation"] for point in points],
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=3,
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                label=name,
            )
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(y)
    panels[0].legend()
    figure.suptitle(title)
    figure.savefig(path)
