"""What a training step costs and how true its gradient is: `python benchmarks/adjoint.py [OUT.json] [STEPS]`.

A T2MLR model of the published measurement's size (8 layers, width 256, span 2..5, batch 2 x 256) is first trained on
bytes of the standard library, its mixer at 30 times the learning rate, so that the gates are open. Then, for every
schedule: the time of forward and backward over that of the plain backbone (medians of interleaved rounds, one thread,
process time), the distance of the memory it differentiates at, and that of its gradient, to token-by-token
backpropagation through time.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig

import undertow as ut
from undertow.analysis import label
from undertow.data.corpus import load_corpus

T, B, ROUNDS = 256, 2, 5
SCHEDULES = [
    ut.Jacobi(15, backward=3),
    ut.Jacobi(16, adjoint=4),
    ut.Cyclic(8, 3, adjoint=2),
    ut.Cyclic(8, 3, adjoint=4),
    ut.Cyclic(8, 3, adjoint=8),
    ut.Cyclic(8, 3, adjoint=1, solve="cyclic"),
    ut.Cyclic(8, 3, adjoint=2, solve="cyclic"),
    ut.Cyclic(8, 3, adjoint=3, solve="cyclic"),
    ut.Cyclic(8, 2, backward=1),
    ut.Interleaved(2),
]


def text() -> torch.Tensor:
    joined = "\n".join(document.text for document in load_corpus().train[:200])
    return torch.tensor(list(joined.encode()[: 1 << 20]))


def batch(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - T, (B,), generator=generator)
    return torch.stack([data[s : s + T] for s in starts])


def gradients(model, x, schedule) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x, labels=x, schedule=schedule).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(a: dict, b: dict, ours: bool) -> float:
    names = [n for n in b if n.startswith("undertow.") == ours]
    off = sum(float((a[n] - b[n]).square().sum()) for n in names)
    return (off / sum(float(b[n].square().sum()) for n in names)) ** 0.5


def seconds(step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def main(out: str | None = None, steps: str = "200"):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4
    )
    model = ut.from_scratch(config, time=ut.T2MLR(2, 5)).train()
    ours = [p for n, p in model.named_parameters() if n.startswith("undertow.")]
    theirs = [p for n, p in model.named_parameters() if not n.startswith("undertow.")]
    optimiser = torch.optim.AdamW([{"params": theirs, "lr": 1e-3}, {"params": ours, "lr": 3e-2}])
    data, generator = text(), torch.Generator().manual_seed(0)
    for _ in range(int(steps)):
        x = batch(data, generator)
        optimiser.zero_grad()
        model(x, labels=x, schedule=ut.Cyclic(8, 3, adjoint=4)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    gate = {n: float(p.detach()) for n, p in model.named_parameters() if p.numel() == 1}
    print(f"trained {steps} steps", gate)

    x = batch(data, generator)
    true = gradients(model, x, ut.Sequential())
    with torch.no_grad():
        memory = model(x, schedule=ut.Sequential()).memory
    plain = model.backbone
    warnings.simplefilter("error")  # a fallback would be another schedule
    times: dict[str, list[float]] = {label(s): [] for s in SCHEDULES}
    for _ in range(ROUNDS + 1):
        base = seconds(lambda: plain(x, labels=x, use_cache=False).loss.backward())
        for schedule in SCHEDULES:
            times[label(schedule)].append(
                seconds(lambda s=schedule: model(x, labels=x, schedule=s).loss.backward()) / base
            )
    found = []
    for schedule in SCHEDULES:
        mine = gradients(model, x, schedule)
        with torch.no_grad():
            off = float((model(x, schedule=schedule).memory - memory).norm() / memory.norm())
        ratios = times[label(schedule)][1:]
        found.append(
            {
                "schedule": label(schedule),
                "time": round(statistics.median(ratios), 2),
                "range": [round(min(ratios), 2), round(max(ratios), 2)],
                "memory": off,
                "gradient_backbone": apart(mine, true, ours=False),
                "gradient_mixer": apart(mine, true, ours=True),
            }
        )
        line = "{schedule:44s} {time:5.2f} {range}  memory {memory:.1e}"
        print((line + "  gradient {gradient_backbone:.1e} {gradient_mixer:.1e}").format(**found[-1]))
    if out:
        command = f"python benchmarks/adjoint.py {out} {steps}"
        Path(out).write_text(json.dumps({"command": command, "gates": gate, "rows": found}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
