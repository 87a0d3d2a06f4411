"""How far each schedule is from the true recurrence, on a trained model: `python benchmarks/truth.py RUN [OUT.json]`.

For rows of the run's validation text, in float32 without autocast: the relative distance of the memory and of the
logits to `Sequential()`, and the cost in passes of the span.
"""

import json
import sys
from pathlib import Path

import torch

import undertow as ut
from undertow.analysis import label
from undertow.training import run as runs

SCHEDULES = [
    ut.Jacobi(1),
    ut.Jacobi(3),
    ut.Jacobi(7),
    ut.Jacobi(15),
    ut.Interleaved(2),
    ut.Cyclic(2, 3),
    ut.Cyclic(8, 3),
    ut.Cyclic(16, 1),
    ut.Cyclic(16, 3),
    ut.Cyclic(64, 1),
    ut.Cyclic(64, 3),
    ut.Converge(1e-6),
]


@torch.no_grad()
def main(folder: str, out: str | None = None, rows: int = 4):
    torch.set_num_threads(1)
    loaded = runs.load(Path(folder), "cpu")
    data = runs.reopen(Path(folder), loaded.recipe)
    whole = [i for i in range(len(data.validation)) if (data.validation[i]["labels"] != -100).sum() >= 255][:rows]
    x = torch.stack([torch.as_tensor(data.validation[i]["input_ids"]) for i in whole])
    model = loaded.model
    true = model(x, schedule=ut.Sequential())
    found = []
    for schedule in SCHEDULES:
        got = model(x, schedule=schedule)
        found.append(
            {
                "schedule": label(schedule),
                "passes": round(got.passes, 2),
                "memory": float((got.memory - true.memory).norm() / true.memory.norm()),
                "logits": float((got.logits - true.logits).abs().max()),
            }
        )
        print("{schedule:28s} {passes:6.2f} passes   memory {memory:.1e}   logits {logits:.1e}".format(**found[-1]))
    if out:
        Path(out).write_text(
            json.dumps({"command": f"python benchmarks/truth.py {folder}", "rows": found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
