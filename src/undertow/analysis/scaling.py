"""Scaling: bits per byte against compute, over several budgets of tokens per parameter.

Two axes side by side, because they answer different questions: *effective compute* (tokens per parameter times the
schedule's token-compute multiplier), on which the LRT paper compares models of one size, and the exact FLOPs of
training. `training.budget` says how both are counted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from undertow.analysis import plots
from undertow.training.launch import write_text

AXES = {
    "effective_compute": "effective compute (tokens per parameter × multiplier)",
    "training_flops": "training FLOPs",
}
MEASURES = {"bits_true": "bits per byte, decoded", "bits_training": "bits per byte, as trained"}
LEAST = 4  # budgets that a power law needs, to have two more than it has numbers


def curves(rows: Sequence[Mapping], measure: str = "bits_true") -> dict[str, list[dict]]:
    """One curve a model: its points in the order of their budgets.

    Args:
        rows: of `analysis.results`; runs that were not swept over tokens per parameter, are not finished or were not
            measured so are left out.
        measure: one of `MEASURES`.

    Returns:
        Model -> points with `tokens_per_parameter` (as asked for), the two axes, `bits` (one a seed), `seeds`, `mean`,
        `deviation` (standard, over seeds; None with a single one).
    """
    key = "training.tokens_per_parameter"
    points: dict[str, dict[float, list[Mapping]]] = {}
    for row in rows:
        if row["state"] == "finished" and key in row["swept"] and measure in row["result"]:
            points.setdefault(row["curve"], {}).setdefault(row["swept"][key], []).append(row["result"])
    return {
        name: [_point(ratio, found, measure) for ratio, found in sorted(budgets.items())]
        for name, budgets in points.items()
    }


def _point(ratio: float, found: Sequence[Mapping], measure: str) -> dict:
    bits = [result[measure] for result in found]
    return {
        "tokens_per_parameter": ratio,
        **{axis: statistics.mean(result[axis] for result in found) for axis in AXES},
        "seeds": [result["seed"] for result in found],
        "bits": bits,
        "mean": statistics.mean(bits),
        "deviation": statistics.stdev(bits) if len(bits) > 1 else None,
    }


def power_law(points: Sequence[Mapping], axis: str) -> dict | None:
    """`bits = scale * compute ** -exponent`, by least squares in logarithms over the means of the points.

    There is no floor in it (few budgets cannot tell one), so it says how steep the curve is between the first point and
    the last, and nothing beyond them.

    Returns:
        `scale`, `exponent`, `standard_error` of the exponent (from the residuals), `worst` (largest relative
        residual), `from`, `to`; None with fewer than `LEAST` points.
    """
    if len(points) < LEAST:
        return None
    x, y = (np.array([point[key] for point in points], dtype=float) for key in (axis, "mean"))
    (slope, height), spread = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    residuals = np.abs(np.exp(height + slope * np.log(x)) / y - 1)
    return {
        "scale": float(np.exp(height)),
        "exponent": float(-slope),
        "standard_error": float(np.sqrt(spread[0, 0])),
        "worst": float(residuals.max()),
        "from": float(x.min()),
        "to": float(x.max()),
    }


def draw(rows: Sequence[Mapping], folder: Path, title: str = "") -> dict | None:
    """Write scaling.json (every measure, with its power laws) and scaling.png (decoded bits) into `folder`.

    Returns:
        What scaling.json holds; None, and nothing written, while no model has two points.
    """
    found: dict[str, dict] = {}
    for measure in MEASURES:
        for name, points in curves(rows, measure).items():
            laws = {axis: power_law(points, axis) for axis in AXES}
            found.setdefault(measure, {})[name] = {"points": points, "power_law": laws}
    drawn = {name: curve["points"] for name, curve in found.get("bits_true", {}).items()}
    if all(len(points) < 2 for points in drawn.values()):
        return None
    write_text(folder / "scaling.json", json.dumps(found, indent=1))
    plots.scaling(drawn, folder / "scaling.png", AXES, MEASURES["bits_true"], title)
    return found
