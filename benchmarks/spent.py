"""Where the time of rows of `undertow bench` goes: `python benchmarks/spent.py benchmarks/results/spent.json ROW...`

Both sides of a row run under torch's profiler, in turn, three times after one that does not count. Of each, the time in
matrix products, in attention and in all other operators, in units of what theirs takes in all (0.5 is half of the other
side's whole work); then how many operators ran and how many FLOPs torch counts (compiled rows: not), ours over theirs.
Rows that stand in the file already and are not named stay as they are.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from undertow.bench import measure
from undertow.bench.report import one_thread
from undertow.bench.rows import ROWS

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_addmm_activation"}
ROUNDS = 3


def kind(name: str) -> str:
    if name in PRODUCTS:
        return "products"
    return "attention" if "scaled_dot_product" in name else "other"


def spent(call) -> tuple[Counter, Counter]:
    """Microseconds and numbers of operators, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    time, number = Counter(), Counter()
    for event in found.key_averages():
        time[kind(event.key)] += event.self_cpu_time_total
        number[kind(event.key)] += event.count * event.key.startswith("aten::")
    return time, number


class Untracked:
    """In place of torch's tracker of modules, which cannot follow the adjoint's backward."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    with sdpa_kernel(SDPBackend.MATH), counter:  # fused attention on the CPU counts as nothing
        call()
    return counter.get_total_flops()


def look(name: str) -> dict:
    row = ROWS[name]
    made = row.make(row.size)
    calls = (made.ours, made.theirs)
    run, against = map(measure.whole, calls) if row.how is measure.steps else calls
    run(), against()
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(spent(run))
        theirs.append(spent(against))
    counted = None if row.slow else flops(run) / flops(against)  # counting would compile everything anew
    whole = sum(time.total() for time, _ in theirs)
    return {
        "row": name,
        "operators": round(sum(n.total() for _, n in ours) / sum(n.total() for _, n in theirs), 2),
        "flops": counted and round(counted, 2),
        **{
            f"{side} {what}": round(sum(time[what] for time, _ in found) / whole, 3)
            for side, found in (("ours", ours), ("theirs", theirs))
            for what in ("products", "attention", "other")
        },
    }


def main(out: str, *names: str) -> None:
    one_thread()
    known = json.loads(Path(out).read_text(encoding="utf-8"))["rows"] if Path(out).exists() else []
    found = {row["row"]: row for row in known}
    for name in names:
        found[name] = look(name)
        print(found[name], flush=True)
        rows = [found[name] for name in ROWS if name in found]
        command = f"python benchmarks/spent.py {out} {' '.join(row['row'] for row in rows)}"
        Path(out).write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
