"""The table of agreement with published code, docs/parity.md: measured, then printed.

    PYTHONPATH=tests python -m golden.parity > docs/parity.md

The page holds bounds and verdicts, not measured digits, so that every processor makes the same one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from golden.cases import CASES, LEAST, WIDE, Case
from golden.differences import DIFFERENCES, REFUSED, standing
from golden.measure import imported, kinds, verdict

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
COMMAND = "PYTHONPATH=tests python -m golden.parity > docs/parity.md"
PEERS = {
    "t2mlr": "T2MLR (arXiv 2607.15178, release 4510e81)",
    "lrt": "LRT (arXiv 2605.26797, release e0d0f6e)",
    "ilr": "ILR (arXiv 2505.01855, release e3bfeb0)",
    "gpttrm": "GPTTRM (CarloNicolini/gpttrm, 72493a6)",
    "trm": "TRM (arXiv 2510.04871, release e7b6871; optimiser adam-atan2 0.0.3)",
}
HEAD = f"""\
# Agreement with published code

Random weights were put into four published code bases (five with the Tiny Recursive Model's optimiser), and what they
made of some token ids was kept: logits under every schedule, losses, gradients, greedy texts, optimiser steps. Undertow
loads the same weights and has to make the same numbers, in {len(CASES)} cases (`tests/golden/`, part of `make test`).

- *float64*: the published formulas in float64; every output within {WIDE:.0e}.
- *float32*: the code as released, in float32; every output within the bound, ten times the rounding once measured and
  at least {LEAST:.0e}.

A difference is the largest absolute one over the largest absolute value of an output.

`{COMMAND}` makes this page. It measures every case, and stops at the first
that does not hold. The page states bounds: another processor, whose last digits are others, makes the same one.
"""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def held(case: Case, kind: str) -> str:
    known = ", ".join(d.name for d in standing(case, kind))
    if kind not in kinds(case):
        return "-"
    return f"within {case.tolerance(kind):.0e}" + (f", but for: {known}" if known else "")


def page() -> str:
    """The page, as it is where every case holds."""
    parts = [HEAD, "## Differences\n"]
    rows = (
        (d.name, d.published, d.ours, "gone" if d.gone else "stands", ", ".join(f"`{c}`" for c in CASES if d.shows(c)))
        for d in DIFFERENCES
    )
    parts.append(table(("what", "published", "undertow", "today", "cases"), rows) + "\n")
    parts.append("## Cases\n")
    for peer, title in PEERS.items():
        rows = (
            (f"`{case}`", case.entry.get("notes", "").split(". ")[0], held(case, "wide"), held(case, "released"))
            for case in CASES
            if case.peer == peer
        )
        parts.append(f"### {title}\n\n" + table(("case", "what is special", "float64", "float32"), rows) + "\n")
    parts.append("## Checkpoints\n\nWhat `undertow import` makes of folders that the published code wrote.\n")
    rows = (
        (f"`{case}`", f"refused: {REFUSED[case.name]}" if case.name in REFUSED else f"its logits, within {LEAST:.0e}")
        for case in CASES
        if case.checkpoint
    )
    parts.append(table(("folder", "imported"), rows))
    return "\n".join(parts) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    for case in CASES:
        for kind in kinds(case):
            if wrong := verdict(case, kind):
                sys.exit(f"{case} ({kind}): {wrong}")
        if case.checkpoint and case.name not in REFUSED and imported(case) >= LEAST:
            sys.exit(f"{case}: what is imported differs")
    print(page(), end="")


if __name__ == "__main__":
    main()
