"""What a training step costs and how true its gradient is: `python benchmarks/adjoint.py [OUT.json] [STEPS]`.

A T2MLR model of the published measurement's size (8 layers, width 256, span 2..5, batch 2 x 256) is first trained on
bytes of the standard library, the memory's gate open (its gamma starts at 1), so that the memory matters. Then, for
every schedule: the time of forward and backward over that of the plain backbone (medians of interleaved rounds, one
thread, process time), the distance of the memory it differentiates at, and that of its gradient, to token-by-token
backpropagation through time.
"""

import json
import statistics
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import undertow as ut
from undertow.analysis import label
from undertow.bench import work
from undertow.bench.measure import seconds
from undertow.bench.models import gradient_error, gradients, memory_error
from undertow.bench.report import one_thread
from undertow.bench.rows import STEP

ROUNDS = 5
SCHEDULES = [
    ut.Jacobi(16, backward=4),
    ut.Jacobi(16, adjoint=4),
    ut.Cyclic(8, 3, adjoint=2),
    ut.Cyclic(8, 3, adjoint=4),
    ut.Cyclic(8, 3, adjoint=8),
    ut.Cyclic(10, 3, adjoint=4),
    ut.Cyclic(10, 2, adjoint=3),
    ut.Cyclic(8, 3, adjoint=1, solve="cyclic"),
    ut.Cyclic(8, 3, adjoint=2, solve="cyclic"),
    ut.Cyclic(8, 3, adjoint=3, solve="cyclic"),
    ut.Cyclic(8, 2, backward=1),
    ut.Interleaved(2),
]


def part(gradient: dict, ours: bool) -> dict:
    return {name: g for name, g in gradient.items() if name.startswith("undertow.") == ours}


def main(out: str | None = None, steps: str = str(STEP.steps)):
    one_thread()
    model, x, memory, true = work.strong(replace(STEP, steps=int(steps)))
    gate = {n: float(p.detach()) for n, p in model.named_parameters() if p.numel() == 1}
    print(f"trained {steps} steps", gate)
    warnings.simplefilter("error")  # a fallback would be another schedule
    times: dict[str, list[float]] = {label(s): [] for s in SCHEDULES}
    for _ in range(ROUNDS + 1):
        base = seconds(work.backward(model.backbone, x, use_cache=False))
        for schedule in SCHEDULES:
            times[label(schedule)].append(seconds(work.backward(model, x, schedule=schedule)) / base)
    found = []
    for schedule in SCHEDULES:
        mine = gradients(model, x, schedule)
        ratios = times[label(schedule)][1:]
        found.append(
            {
                "schedule": label(schedule),
                "time": round(statistics.median(ratios), 2),
                "range": [round(min(ratios), 2), round(max(ratios), 2)],
                "memory": memory_error(model, x, schedule, memory),
                "gradient_backbone": gradient_error(mine, part(true, ours=False)),
                "gradient_mixer": gradient_error(mine, part(true, ours=True)),
            }
        )
        line = "{schedule:44s} {time:5.2f} {range}  memory {memory:.1e}"
        print((line + "  gradient {gradient_backbone:.1e} {gradient_mixer:.1e}").format(**found[-1]))
    if out:
        command = f"python benchmarks/adjoint.py {out} {steps}"
        Path(out).write_text(json.dumps({"command": command, "gates": gate, "rows": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
