"""The curves of a run as plain values: which numbers of `metrics.jsonl` make a chart, and which come first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

# A chart: its name and title, a pattern of the keys, how a series is named after the pattern's groups, whether the
# scale is logarithmic, and whether it stands among the first.
CHARTS = (
    ("loss", "Training loss (nats)", r"loss|(sweep|future)_loss_(\d+)", False, True),
    ("bits", "Validation bits per byte", r"eval_bits_per_byte", False, True),
    ("gates", "Gates, mean", r"gates/(.+)/gate_(.+)_mean", False, True),
    ("norms", "Norm of the memory at its readers", r"gates/(.+)/norm_m", False, True),
    ("residual", "Residual: the schedule's memory from its fixed point", r"eval_residual", True, True),
    ("memory", "Norm of the memory that a token leaves", r"eval_memory_norm", False, False),
    ("change", "Change of the state at each visit, |y − x| / |x|", r"eval_visit_change_(\d+)", True, True),
    ("gradient", "Norm of the gradient after each visit", r"eval_visit_gradient_(\d+)", True, True),
    ("closed", "Gates, share closed (below 0.05)", r"gates/(.+)/gate_(.+)_closed", False, False),
    ("open", "Gates, share open (above 0.95)", r"gates/(.+)/gate_(.+)_open", False, False),
    ("scalars", "Scalars of the mixers", r"gates/(.+)/(?!gate_|norm_)(.+)", False, False),
    ("grad_norm", "Norm of the gradient of all parameters", r"grad_norm", True, False),
    ("rate", "Learning rate", r"learning_rate", False, False),
    ("speed", "Tokens per second", r"tokens_per_second", False, False),
)
WORDS = {"change": "visit", "gradient": "visit"}


def chart(title: str, x: str, series: Sequence[tuple[str, Points]], log: bool = False, points: bool = False) -> dict:
    """One chart as the page's script takes it: lines, or single points."""
    made = [{"name": name, "points": [list(point) for point in held], "dash": False} for name, held in series]
    positive = any(y is not None and y > 0 for _, held in series for _, y in held)
    return {"title": title, "x": x, "y": "", "log": log and positive, "points": points, "series": made}


def curves(metrics: Sequence[Mapping]) -> tuple[dict[str, dict], list[str], list[str]]:
    """`(charts by name, those shown at once, those behind a fold)` of the lines of a metrics file."""
    made: dict[str, dict] = {}
    first: list[str] = []
    folded: list[str] = []
    keys = dict.fromkeys(key for line in metrics for key in line)
    for name, title, pattern, log, early in CHARTS:
        series = []
        for key in keys:
            match = re.fullmatch(pattern, key)
            points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None] if match else []
            if match and points:
                groups = [group for group in match.groups() if group is not None]
                series.append((" ".join([WORDS[name], *groups] if name in WORDS else groups) or key, points))
        if series:
            made[name] = chart(title, "step", series, log)
            (first if early else folded).append(name)
    return made, first, folded
