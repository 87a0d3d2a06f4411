"""The benchmark's table, and its file."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from undertow.bench.rows import Result, Row


def choose(names: Sequence[str], rows: Mapping[str, Row]) -> list[Row]:
    """The rows of these names, in the table's order; none: all but the slow ones. Raises ValueError."""
    for name in names:
        if name not in rows:
            raise ValueError(f"bench row {name!r}: allowed are {', '.join(rows)}")
    return [row for row in rows.values() if row.name in names or not (names or row.slow)]


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as `undertow train` does; for both sides of every row


def line(result: Result) -> str:
    """One row as a sentence, for while the others run."""
    ratio, row = result.ratio, result.row
    verdict = {True: "met", False: "missed", None: "not judged"}[result.met]
    note = f"; {result.note}" if result.note else ""
    range_ = f"{ratio.low:.2f}-{ratio.high:.2f}, {ratio.rounds} rounds"
    return f"{row.name}: {ratio.median:.2f} x ({range_}), target {row.target}: {verdict}{note}"


def table(results: Iterable[Result], rows: Iterable[Row] = ()):
    """The table for `rich`: what was measured, then `rows` that were not."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("row", "work", "published", "target", "floor", "ours", "range", "", "how true"):
        made.add_column(title, no_wrap=title == "row")
    marks = {True: Text("met", "green"), False: Text("missed", "red"), None: Text("")}
    for result in results:
        ratio = result.ratio
        figures = (f"{ratio.median:.2f}", f"{ratio.low:.2f}-{ratio.high:.2f}", marks[result.met], result.note)
        made.add_row(*_about(result.row), *figures)
    for row in rows:
        made.add_row(*_about(row), "", "", "", "")
    return made


def _about(row: Row) -> tuple[str, ...]:
    return row.name, row.about, row.published, f"{'>=' if row.more_is_better else '<='} {row.target}", row.floor


def write(path: Path, results: Sequence[Result], rounds: int, tiny: bool) -> None:
    """The figures and where they were measured, as JSON."""
    import torch
    import transformers

    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    found = [
        {
            "row": r.row.name,
            "work": r.row.about,
            "published": r.row.published,
            "target": r.row.target,
            "floor": r.row.floor,
            "size": asdict(r.row.size.tiny() if tiny else r.row.size),
            **asdict(r.ratio),
            "how_true": r.note,
            "met": r.met,
        }
        for r in results
    ]
    command = f"undertow bench --rounds {rounds} --out {path}"
    about = {"command": command, "machine": machine | {"processor": processor()}, "threads": 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({**about, "rounds": rounds, "tiny": tiny, "rows": found}, indent=1) + "\n", encoding="utf-8"
    )


def processor() -> str:
    """The processor's name where the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
