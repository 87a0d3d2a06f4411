"""Sets what the benchmarks measured into docs/benchmarks.md, between its marks: `python benchmarks/page.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARK = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Markdown; the first `texts` columns are words, the others figures."""
    lines = [heads, ["---"] * texts + ["---:"] * (len(heads) - texts), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def bench(found: dict) -> str:
    words = {True: "met", False: "**missed**"}
    rows = [
        [
            f"`{row['row']}`", row["work"], row["published"], row["target"], row["floor"],
            f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})", words[row["met"]], row["how_true"],
        ]
        for row in found["rows"]
    ]  # fmt: skip
    heads = ["row", "work", "published code", "target", "floor", "ours (range)", "", "how true"]
    return f"{table(heads, rows, 2)}\n\n`{found['command']}`, {found['machine']['processor']}, torch {_torch(found)}"


def _torch(found: dict) -> str:
    return f"{found['machine']['torch']}, {found['threads']} thread, medians of {found['rounds']} rounds"


def growth(found: list[dict]) -> str:
    made = []
    for grows in dict.fromkeys(one["grows"] for one in found):
        of_it = [one for one in found if one["grows"] == grows]
        amounts = [point["n"] for point in of_it[0]["points"]]
        rows = [
            [one["name"]]
            + [f"{p['seconds']:.2f} s, {p['bytes'] / 2**20:,.0f} MiB" for p in one["points"]]
            + [f"{one['exponents'][key]:.2f}" for key in ("seconds", "bytes", "flops")]
            for one in of_it
        ]
        made.append(table([grows, *amounts, "time ^", "memory ^", "FLOPs ^"], rows))
    return "\n\n".join([*made, "`python benchmarks/growth.py benchmarks/results/growth.json`"])


def adjoint(found: dict) -> str:
    rows = [
        [
            f"`{row['schedule']}`", f"{row['time']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})",
            f"{row['memory']:.1e}", f"{row['gradient_backbone']:.3f}", f"{row['gradient_mixer']:.3f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    heads = ["schedule", "plain steps (range)", "memory off", "gradient off, backbone", "mixer"]
    return f"{table(heads, rows)}\n\n`{found['command']}`"


def serve(found: dict) -> str:
    rows = [
        [
            f"{row['model']}, {row['parameters']:,} parameters", row["clients"], f"{row['requests_per_second']:.2f}",
            f"{row['tokens_per_second']:.0f}", f"{row['latency_p50_ms']:.0f} ms", f"{row['latency_p95_ms']:.0f} ms",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    heads = ["model", "clients at a time", "requests/s", "tokens/s", "latency, median", "95 %"]
    return f"{table(heads, rows)}\n\n`{found['command']}`, {found['machine']}, torch {found['torch']}"


def spent(found: dict) -> str:
    parts = ("products", "attention", "other")
    rows = [
        [f"`{row['row']}`"]
        + [f"{row[f'ours {part}']:.2f} / {row[f'theirs {part}']:.2f}" for part in parts]
        + [f"{row['operators']:.2f}", "" if row["flops"] is None else f"{row['flops']:.2f}"]
        for row in found["rows"]
    ]
    heads = ["row", "products, ours / theirs", "attention", "other operators", "operators run, ratio", "FLOPs, ratio"]
    return f"{table(heads, rows)}\n\n`{found['command']}`"


BLOCKS: dict[str, Callable] = {
    "bench": bench, "spent": spent, "growth": growth, "adjoint": adjoint, "serve": serve,
}  # fmt: skip


def fill(text: str, results: Path) -> str:
    """The page with the tables of the results that are there."""

    def block(match: re.Match) -> str:
        path = results / f"{match[1]}.json"
        if not path.exists():
            return match[0]
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]](json.loads(path.read_text(encoding='utf-8')))}\n<!-- end -->"

    return MARK.sub(block, text)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
