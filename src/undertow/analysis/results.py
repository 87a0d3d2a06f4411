"""The results of a sweep as one table: results.json, table.csv, table.txt."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from undertow.analysis.columns import COLUMNS as MODELS
from undertow.analysis.columns import columns_of, number
from undertow.analysis.columns import table as table_of
from undertow.training.launch import write_text

if TYPE_CHECKING:
    from undertow.training.sweep import Plan

COST = (  # what is known before training
    *MODELS[:4],
    ("steps", number("steps", "{:,.0f}".format)),
    ("tokens/\nparam", number("tokens_per_parameter", "{:.4g}".format)),
    ("multi-\nplier", number("token_compute_multiplier", "{:.3g}".format)),
    ("effective\ncompute", number("effective_compute", "{:.4g}".format)),
)
COLUMNS = (*COST, *MODELS[4:])
_FILES = (
    "params",
    "evals/\ntoken",
    "steps",
    "multi-\nplier",
    "tokens/s\ntrain",
    "tokens/s\ngenerate",
)  # not on a terminal


def rows(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Every run of a sweep, in its order.

    Returns:
        Mappings of `run`, `recipe`, `curve`, `group` (see `training.sweep.Run`), `swept` (key: value), `state`
        ("finished", "failed", "open") and, by state, `result` (the numbers of its result.json) or `failed` (why).
    """
    made = []
    for name, run in plan.runs.items():
        place = folder / "runs" / name
        row = {"run": name, "recipe": run.model, "curve": run.curve, "group": run.group, "swept": dict(run.values)}
        if (place / "result.json").exists():
            result = json.loads((place / "result.json").read_text(encoding="utf-8"))
            numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            row |= {"state": "finished", "result": numbers}
        elif (place / "failed.json").exists():
            row |= {"state": "failed", **json.loads((place / "failed.json").read_text(encoding="utf-8"))}
        else:
            row |= {"state": "open"}
        made.append(row)
    return made


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that `write` wrote. Raises FileNotFoundError."""
    path = Path(folder) / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `undertow sweep` writes it")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def write(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Write the three files anew, each whole or not at all; returns the rows."""
    found = rows(plan, folder)
    console = Console(width=200, color_system=None, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table(found), *failures(found), sep="\n", soft_wrap=True)
    texts = {
        "results.json": json.dumps({"name": plan.name, "rows": found}, indent=1),
        "table.csv": _csv(found),
        "table.txt": "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return found


def table(found: Sequence[Mapping], short: bool = False) -> Table:
    """Finished runs, those that differ in nothing but the seed as mean ± standard deviation.

    Args:
        short: leave out what a terminal has no room for.
    """
    groups: dict[str, list[dict]] = {}
    for row in found:
        if row["state"] == "finished":
            groups.setdefault(row["group"], []).append(row["result"])
    columns = [column for column in COLUMNS if not (short and column[0] in _FILES)]
    return table_of(groups, columns_of(groups.values(), columns), "run")


def costs(runs: Mapping[str, Sequence[dict]]) -> Table:
    """What runs will cost, by name (`training.sweep.costs`)."""
    return table_of(runs, COST, "run")


def failures(found: Sequence[Mapping]) -> list[str]:
    """One line for each run that failed."""
    return [f"{row['run']}: failed: {row['failed']}" for row in found if row["state"] == "failed"]


def _csv(found: Sequence[Mapping]) -> str:
    """A run a line; a swept value is written as in the file."""
    flat = [
        {"run": row["run"], "recipe": row["recipe"], "state": row["state"], "failed": row.get("failed", "")}
        | row.get("result", {})
        | {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in row["swept"].items()}
        for row in found
    ]
    swept = dict.fromkeys(key for row in found for key in row["swept"])
    head = list(dict.fromkeys(["run", "recipe", *swept, "state", *(key for row in flat for key in row)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()
