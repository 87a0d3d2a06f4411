"""A 1.3B LRT run on 8 H100, worked out: `python benchmarks/cluster.py [count]` fills in docs/scaling.md.

`count` counts anew what no formula knows (benchmarks/results/cluster.json): operators launched and bytes kept, on twins
of the model that fit a CPU. Without it the page follows from that file, `analysis.flops` and the constants in
`analysis.cluster`. Nothing is timed.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import undertow as ut
from undertow.analysis import flops, label
from undertow.analysis.cluster import H100, Counted, Plan, count, held, plan, ring
from undertow.analysis.show import short
from undertow.training.budget import scaling_parameters

ROOT = Path(__file__).parents[1]
PAGE, FILE = ROOT / "docs" / "scaling.md", ROOT / "benchmarks" / "results" / "cluster.json"
LAYERS, T, STEP, RATIO = 20, 2048, 524_288, 10  # recipes/lrt/d20_interleaved.yaml
TWINS = (4, 8)  # layers: whole patterns of windows
BASELINE = ut.Jacobi(0)
SCHEDULES = [
    ut.Interleaved(2),
    ut.Jacobi(1, loss="mean"),
    ut.Jacobi(3, loss="mean"),
    ut.Cyclic(8, 2, adjoint=2),
    ut.Cyclic(8, 3, adjoint=4),
    ut.Cyclic(16, 3, adjoint=4),
]


def config(layers: int = LAYERS) -> ut.UndertowNanoChatConfig:
    return ut.UndertowNanoChatConfig.from_depth(layers, value="every")


def methods() -> list[tuple[str, ut.LRT | None, list]]:
    return [
        ("plain", None, [BASELINE]),
        ("shared", ut.LRT(), SCHEDULES),
        ("layerwise", ut.LRT(shared=False), SCHEDULES[:1]),
    ]


def counted() -> dict[str, Counted]:
    """Everything counted, by `model: schedule`."""
    return {
        f"{name}: {label(s)}": count(config(), time, s, T, TWINS) for name, time, listed in methods() for s in listed
    }


def read() -> dict[str, Counted]:
    rows = json.loads(FILE.read_text(encoding="utf-8"))["counted"]
    return {name: Counted(**{key: tuple(line) for key, line in row.items()}) for name, row in rows.items()}


def on_meta(time: ut.LRT | None) -> ut.UndertowForCausalLM:
    with torch.device("meta"):
        return ut.from_scratch(config(), time=time)


def plans(found: dict[str, Counted]) -> list[tuple[str, Plan]]:
    base = flops.training_flops(on_meta(None), T, BASELINE) / T
    rows = []
    for name, time, listed in methods():
        model = on_meta(time)
        rows += [(name, plan(model, base, s, found[f"{name}: {label(s)}"], H100, T, STEP)) for s in listed]
    return rows


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(cells) for cells in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def named(kind: str, p: Plan) -> str:
    return "plain backbone" if kind == "plain" else f"`{p.schedule}`" + (", layerwise" if kind == "layerwise" else "")


def sections(found: dict[str, Counted]) -> dict[str, str]:
    """The page's parts, by name."""
    rows, model = plans(found), on_meta(ut.LRT())
    kept, tokens = held(model), RATIO * scaling_parameters(model)
    plain = rows[0][1]
    memory = [
        ["float32 weights", short(kept.weights) + "B"],
        ["float32 gradients", short(kept.gradients) + "B"],
        ["optimiser (Muon one number, AdamW two)", short(kept.optimiser) + "B"],
        ["bfloat16 casts of the matrices", short(kept.casts) + "B"],
        ["together", short(kept.total) + "B"],
        ["K/V of one text of 2,048 tokens, and its memory", short(flops.kv_bytes(model, T, torch.bfloat16)) + "B"],
    ]
    head = ["schedule", "FLOPs a token", "x plain", "stages forward + backward", "rows of the smallest sweep"]
    work = [
        [named(k, p), short(p.flops), f"{p.relative:.2f}", f"{p.stages[0]} + {p.stages[1]}", f"{p.rows:,}"]
        for k, p in rows
    ]
    held_ = [
        [named(k, p), short(p.activations / p.batch / T) + "B", str(p.batch), str(p.micro), short(p.used) + "B"]
        for k, p in rows
    ]
    times = [
        [
            named(k, p), f"{sum(p.launches):,.0f}", f"{p.compute:.2f}", f"{p.eager:.2f}", f"{p.graph:.2f}",
            short(p.tokens), f"{tokens / p.tokens / 3600:.1f}",
        ]
        for k, p in rows
    ]  # fmt: skip
    traffic = [[named(k, p), *(sent(x) for x in (p.ddp, p.fsdp, p.resharded))] for k, p in rows]
    return {
        "run": f"{short(kept.parameters)} parameters, of which {short(scaling_parameters(model))} count for the "
        f"horizon: {RATIO} tokens each are {short(tokens)} tokens, {tokens // STEP:,} steps of {STEP:,}. The plain "
        f"backbone takes {short(plain.flops)} training FLOPs a token.",
        "memory": table(["bytes a GPU, whatever the batch", ""], memory),
        "work": table(head, work),
        "held": table(["schedule", "kept a token", "rows a GPU", "micro-batches a step", "in use"], held_),
        "times": table(
            ["schedule", "launches a micro-batch", "products s", "launches s, eager", "launches s, graph",
             "tokens a second", "hours"],
            times,
        ),
        "traffic": table(["schedule", "DDP", "FSDP2, kept", "FSDP2, resharded"], traffic),
        "ridge": f"{H100.ridge:.0f}",
        "gather": f"One all-gather of the layers alone is {short(ring(H100.gpus, kept.layers))}B, "
        f"{1e3 * ring(H100.gpus, kept.layers) / H100.link:.1f} ms over NVLink; the products of one sweep over an "
        f"eighth of 4 texts take {1e3 * sweep_seconds(model):.1f} ms.",
    }  # fmt: skip


def sent(numbers: float) -> str:
    """Bytes, and milliseconds over NVLink and over the network."""
    return f"{short(numbers)}B, {1e3 * numbers / H100.link:.0f} / {1e3 * numbers / H100.network:.0f}"


def sweep_seconds(model) -> float:
    one = flops.forward_flops(model, T, ut.Cyclic(8, 1)) - flops.forward_flops(model, T, ut.Jacobi(0))
    return 4 * one / 8 / (H100.flops * H100.mfu)


def fill(page: str, found: dict[str, Counted]) -> str:
    """The page with every part between its marks made anew."""
    for name, text in sections(found).items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = page.split(start)
        after = rest.split(end)[1]
        gap = "\n" if "\n" in text or name == "run" or name == "gather" else ""
        page = f"{before}{start}{gap}{text}{gap}{end}{after}"
    return page


def main(what: str = "") -> None:
    if what == "count":
        rows = {name: asdict(row) for name, row in counted().items()}
        about = {"command": "python benchmarks/cluster.py count", "torch": torch.__version__, "twins": TWINS}
        FILE.write_text(json.dumps({**about, "counted": rows}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
